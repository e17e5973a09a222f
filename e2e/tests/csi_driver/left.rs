//! What a cluster still has of volumes that are gone.

use ballast_api::v1 as api;
use ballast_e2e::cluster::Cluster;
use ballast_e2e::wait::within;

/// Seconds within which nodes forget what was deleted: replicas are removed, and connections found
/// closed, behind the answer.
const FORGET: u64 = 30;

/// No volume but the cluster's own `demo` is there, no lease, no replica, no client that may write.
/// All nodes must be up.
#[track_caller]
pub fn assert_cluster_is_empty(cluster: &Cluster) {
    let mut last = Vec::new();
    let seen = within(FORGET, || {
        last = left(cluster);
        last.is_empty().then_some(())
    });
    assert!(seen.is_some(), "left in the cluster: {last:?}");
}

fn left(cluster: &Cluster) -> Vec<String> {
    let mut left = Vec::new();
    for node in cluster.nodes() {
        let request = api::ListVolumesRequest::default;
        let volumes = cluster.ask(node.id, async |it| it.list_volumes(request()).await);
        let Some(Ok(volumes)) = volumes else {
            left.push(format!("node {} does not answer", node.id));
            continue;
        };
        for volume in volumes.into_inner().volumes {
            if volume.name != "demo" {
                left.push(format!("node {}: volume {}", node.id, volume.name));
            }
            left.extend(
                volume.leases.iter().map(|it| format!("lease of {} of {}", it.volume, it.host)),
            );
        }
        for (metric, expected) in [("ballast_attachments", 0), ("ballast_replicas", 1)] {
            let counted = cluster.metric(node.id, metric);
            if counted != expected {
                left.push(format!("node {}: {metric} {counted}", node.id));
            }
        }
    }
    left
}
