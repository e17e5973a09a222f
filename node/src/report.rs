//! What this node knows of itself, for peers and administrators.

use std::collections::BTreeMap;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::Env;
use ballast_raft_store::replica::Health;
use ballast_volume::group::Group;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;

use crate::calls::{NodeReportV1, ReplicaReportV1, Tag, decode};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// Longest wait for a peer's report: an administrator waits for it.
const REPORT_MAX: Duration = Duration::from_secs(1);

/// This node's report.
pub(crate) async fn own<E: Env>(inner: &Inner<E>) -> NodeReportV1 {
    let space = inner.pool.space();
    let families: Vec<_> = inner.families.borrow().values().cloned().collect();
    let mut replicas: Vec<_> = inner.cluster.group().map(replica).into_iter().collect();
    for family in &families {
        let mut report = replica(family.group());
        let state = family.state();
        report.writer_node = state.writer().map_or(0, |writer| writer.node.0);
        report.size = state.size();
        replicas.push(report);
    }
    let links = inner.config.founders.iter().map(|founder| founder.node);
    let links = links.filter(|&node| inner.links.peer(node).is_some()).map(|node| node.0);
    let failure = inner.pool.failure().borrow().as_ref().map(ToString::to_string);
    NodeReportV1 {
        replicas,
        pool_total: space.total,
        pool_used: space.used,
        pool_free: space.free,
        pool_failure: failure.unwrap_or_default(),
        links: links.collect(),
    }
}

fn replica<E: Env>(group: &Group<E>) -> ReplicaReportV1 {
    let metrics = group.raft().metrics();
    let metrics = metrics.borrow_watched();
    let role = match metrics.state {
        ServerState::Leader => "leader",
        ServerState::Follower => "follower",
        ServerState::Candidate => "candidate",
        ServerState::Learner => "learner",
        ServerState::Shutdown => "stopped",
    };
    let matched: BTreeMap<u64, u64> = metrics
        .replication
        .iter()
        .flatten()
        .map(|(&id, matched)| (id, matched.map_or(0, |id| id.index)))
        .collect();
    let store = group.replica();
    ReplicaReportV1 {
        family: store.family().0,
        replica: store.id().0,
        role: role.to_owned(),
        term: metrics.current_term,
        last_index: metrics.last_log_index.unwrap_or(0),
        purged_index: metrics.purged.map_or(0, |id| id.index),
        applied_index: metrics.last_applied.map_or(0, |id| id.index),
        retained_bytes: store.retained_bytes(),
        suspect: store.health() != Health::Good,
        matched,
        writer_node: 0,
        size: 0,
    }
}

/// The reports of all nodes that answer, this one's first asked.
pub(crate) async fn all<E: Env>(inner: &Inner<E>) -> BTreeMap<NodeId, NodeReportV1> {
    let asks = inner.config.founders.iter().map(|founder| async {
        let node = founder.node;
        if node == inner.config.node {
            return Some((node, own(inner).await));
        }
        let frame = Frame::plain(Kind::Call, 0, Tag::NodeReport.message(&()));
        let reply = inner.links.call(node, Lane::Control, frame, REPORT_MAX).await.ok()?;
        Some((node, decode(reply.body).ok()?))
    });
    futures_util::future::join_all(asks).await.into_iter().flatten().collect()
}
