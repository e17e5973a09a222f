//! What the Node service advertises, bit by bit, and what it does not: real driver, real mounts.

mod csi_driver;

use std::collections::BTreeSet;

use ballast_csi_shim::node::CAPABILITIES;
use ballast_csi_shim::v1::node_service_capability::Type;
use ballast_csi_shim::v1::node_service_capability::rpc::Type as Capability;
use ballast_csi_shim::v1::volume_capability::AccessType;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::volume_usage::Unit;
use ballast_csi_shim::v1::*;
use csi_driver::{Csi, Used, block, code, is_mounted, mounted};
use tonic::Code;

#[test]
fn every_advertised_bit_of_the_node_has_a_working_call() {
    let csi = Csi::start("csi-capabilities");
    let request = NodeGetCapabilitiesRequest::default();
    let answer = csi.node(async |mut it| it.node_get_capabilities(request).await);
    let kind = |it: &NodeServiceCapability| match it.r#type {
        Some(Type::Rpc(rpc)) => rpc.r#type,
        None => 0,
    };
    let told: BTreeSet<i32> = answer.expect("a list").capabilities.iter().map(kind).collect();
    assert_eq!(told, CAPABILITIES.iter().map(|it| *it as i32).collect());
    for capability in CAPABILITIES {
        let name = format!("{capability:?}").to_lowercase();
        let kind = match capability {
            // Only a device grows without more privileges than this machine may have.
            Capability::ExpandVolume => block(Mode::SingleNodeWriter),
            _ => mounted(Mode::SingleNodeMultiWriter, "ext4"),
        };
        let used = csi.create(&name, 32, kind);
        works(&csi, &used, capability);
        for target in ["pod-1", "pod-2"] {
            csi.unpublish(&used, target).expect("it is unpublished");
        }
        csi.finish(&used);
        csi.assert_nothing_left();
    }
}

#[track_caller]
fn works(csi: &Csi, used: &Used, capability: Capability) {
    let published = |target: &str| csi.publish(used, target).expect("it is published");
    match capability {
        Capability::StageUnstageVolume => {
            csi.stage(used).expect("it is staged");
            assert!(is_mounted(&used.staging));
            csi.unstage(used).expect("it is unstaged");
            assert!(!is_mounted(&used.staging));
        }
        Capability::GetVolumeStats => {
            csi.stage(used).expect("it is staged");
            let stats = csi.stats(used, &published("pod-1"));
            let units: Vec<i32> = stats.iter().map(|usage| usage.unit).collect();
            assert_eq!(units, [Unit::Bytes as i32, Unit::Inodes as i32]);
            assert!(stats.iter().all(|it| it.total > 0 && it.used + it.available <= it.total));
        }
        Capability::ExpandVolume => {
            csi.stage(used).expect("it is staged");
            let grown = csi.expand(used, 48, &published("pod-1"));
            assert_eq!(grown, 48 * csi_driver::MIB);
        }
        Capability::SingleNodeMultiWriter => {
            csi.stage(used).expect("it is staged");
            let (first, second) = (published("pod-1"), published("pod-2"));
            std::fs::write(format!("{first}/file"), "of the first").expect("it may write");
            std::fs::write(format!("{second}/more"), "of the second").expect("it may write, too");
            let seen = std::fs::read_to_string(format!("{second}/file"));
            assert_eq!(seen.expect("it is there"), "of the first");
        }
        other => panic!("{other:?} is advertised and not tried here"),
    }
}

#[test]
fn what_the_driver_does_not_advertise_it_refuses() {
    let csi = Csi::start("csi-not-advertised");
    let used = csi.create("data", 32, mounted(Mode::SingleNodeWriter, "ext4"));

    // VOLUME_MOUNT_GROUP.
    let mut with_group = used.clone();
    if let Some(AccessType::Mount(mount)) = &mut with_group.capability.access_type {
        mount.volume_mount_group = "1000".to_owned();
    }
    assert_eq!(code(csi.stage(&with_group)), Code::InvalidArgument);

    // VOLUME_CONDITION.
    csi.stage(&used).expect("it is staged");
    let request = NodeGetVolumeStatsRequest {
        volume_id: used.volume.volume_id.clone(),
        volume_path: used.staging.clone(),
        ..Default::default()
    };
    let stats = csi.node(async |mut it| it.node_get_volume_stats(request).await);
    assert_eq!(stats.expect("statistics").volume_condition, None);
    csi.finish(&used);

    // Snapshots, changes of parameters; group snapshots and changed blocks are services of their own.
    let codes =
        [
            code(csi.controller(async |mut it| {
                it.create_snapshot(CreateSnapshotRequest::default()).await
            })),
            code(csi.controller(async |mut it| {
                it.delete_snapshot(DeleteSnapshotRequest::default()).await
            })),
            code(csi.controller(async |mut it| {
                it.list_snapshots(ListSnapshotsRequest::default()).await
            })),
            code(
                csi.controller(async |mut it| it.get_snapshot(GetSnapshotRequest::default()).await),
            ),
            code(csi.controller(async |mut it| {
                it.controller_modify_volume(ControllerModifyVolumeRequest::default()).await
            })),
            code(csi.through(async |channel| {
                let mut it = group_controller_client::GroupControllerClient::new(channel);
                let request = GroupControllerGetCapabilitiesRequest::default();
                it.group_controller_get_capabilities(request).await.map(drop)
            })),
            code(csi.through(async |channel| {
                let mut it = snapshot_metadata_client::SnapshotMetadataClient::new(channel);
                it.get_metadata_allocated(GetMetadataAllocatedRequest::default()).await.map(drop)
            })),
        ];
    assert_eq!(codes, [Code::Unimplemented; 7]);
    csi.assert_nothing_left();
}

/// With only one of the services on its socket, the other's calls are not there.
#[test]
fn a_driver_serves_the_services_of_its_mode() {
    let csi = Csi::start("csi-modes");
    let mut node = csi_driver::Driver::new(&csi.cluster.scratch, "node", "node", "node-2");
    node.start(&csi.cluster.nodes(), None);
    let request = ListVolumesRequest::default();
    let listed = node.controller(async |mut it| it.list_volumes(request).await);
    assert_eq!(code(listed), Code::Unimplemented);
    let info = node.node(async |mut it| it.node_get_info(NodeGetInfoRequest::default()).await);
    assert_eq!(info.expect("it has a name").node_id, "node-2");

    let mut controller =
        csi_driver::Driver::new(&csi.cluster.scratch, "control", "controller", "none");
    controller.start(&csi.cluster.nodes(), None);
    let info =
        controller.node(async |mut it| it.node_get_info(NodeGetInfoRequest::default()).await);
    assert_eq!(code(info), Code::Unimplemented);
    let request = ListVolumesRequest::default();
    let listed = controller.controller(async |mut it| it.list_volumes(request).await);
    assert_eq!(listed.expect("a list").entries.len(), 1);
}
