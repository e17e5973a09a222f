//! The controller against a cluster in memory: codes, idempotence, and a call behind every
//! capability.

mod fake;

use std::collections::BTreeMap;
use std::time::Duration;

use ballast_csi_shim::NODE_TOPOLOGY_KEY;
use ballast_csi_shim::cluster::Cluster;
use ballast_csi_shim::context::PublishContext;
use ballast_csi_shim::controller::{CAPABILITIES, ControllerService, Hosts};
use ballast_csi_shim::v1::controller_server::Controller;
use ballast_csi_shim::v1::controller_service_capability::rpc::Type as Capability;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use ballast_csi_shim::v1::*;
use fake::Fake;
use tonic::{Code, Request};

const MIB: i64 = 1 << 20;

async fn controller() -> (Fake, ControllerService) {
    let fake = Fake::default();
    let cluster = Cluster::new(&[fake.serve().await]).expect("a good address");
    (fake, ControllerService::new(cluster, Hosts::Known(Default::default()), 10809))
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(5));
    request
}

fn mounted(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode as i32 }),
    }
}

fn block(mode: Mode) -> VolumeCapability {
    VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mounted(mode) }
}

fn wanted(name: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange { required_bytes: 64 * MIB, limit_bytes: 0 }),
        volume_capabilities: vec![mounted(Mode::SingleNodeWriter)],
        ..Default::default()
    }
}

async fn create(controller: &ControllerService, name: &str) -> Volume {
    let answer = controller.create_volume(request(wanted(name))).await.expect("created");
    answer.into_inner().volume.expect("a volume")
}

async fn create_code(controller: &ControllerService, it: CreateVolumeRequest) -> Code {
    controller.create_volume(request(it)).await.map_or_else(|status| status.code(), |_| Code::Ok)
}

fn publish(
    volume: &Volume,
    node: &str,
    capability: VolumeCapability,
) -> ControllerPublishVolumeRequest {
    ControllerPublishVolumeRequest {
        volume_id: volume.volume_id.clone(),
        node_id: node.to_owned(),
        volume_capability: Some(capability),
        ..Default::default()
    }
}

async fn publish_code(controller: &ControllerService, it: ControllerPublishVolumeRequest) -> Code {
    let answer = controller.controller_publish_volume(request(it)).await;
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn a_volume_is_created_once_however_often_it_is_asked_for() {
    let (fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    assert_eq!(volume.capacity_bytes, 64 * MIB);
    assert_eq!(create(&controller, "pvc-1").await, volume);
    let mut larger = wanted("pvc-1");
    larger.capacity_range = Some(CapacityRange { required_bytes: 65 * MIB, limit_bytes: 0 });
    assert_eq!(create_code(&controller, larger).await, Code::AlreadyExists);
    let mut fewer = wanted("pvc-1");
    fewer.parameters.insert("replicas".to_owned(), "1".to_owned());
    assert_eq!(create_code(&controller, fewer).await, Code::AlreadyExists);
    let mut smaller = wanted("pvc-1");
    smaller.capacity_range = Some(CapacityRange { required_bytes: MIB, limit_bytes: 64 * MIB });
    assert_eq!(create_code(&controller, smaller).await, Code::Ok, "what is there fits");
    assert_ne!(create(&controller, "PVC_1").await.volume_id, volume.volume_id);
    assert_eq!(fake.names().len(), 2);
}

#[tokio::test]
async fn what_can_not_be_is_refused_before_the_cluster_is_asked() {
    let (fake, controller) = controller().await;
    let mut cases = Vec::new();
    cases.push((CreateVolumeRequest { name: String::new(), ..wanted("") }, Code::InvalidArgument));
    cases.push((wanted(&"n".repeat(129)), Code::InvalidArgument));
    let mut case = wanted("a");
    case.volume_capabilities.clear();
    cases.push((case, Code::InvalidArgument));
    for capability in [mounted(Mode::MultiNodeMultiWriter), block(Mode::MultiNodeSingleWriter)] {
        let mut case = wanted("a");
        case.volume_capabilities.push(capability);
        cases.push((case, Code::InvalidArgument));
    }
    for (name, value) in [("replcas", "3"), ("replicas", "4"), ("fsType", "ntfs")] {
        let mut case = wanted("a");
        case.parameters.insert(name.to_owned(), value.to_owned());
        cases.push((case, Code::InvalidArgument));
    }
    let mut case = wanted("a");
    case.mutable_parameters.insert("iops".to_owned(), "1".to_owned());
    cases.push((case, Code::InvalidArgument));
    let mut case = wanted("a");
    case.volume_content_source = Some(VolumeContentSource::default());
    cases.push((case, Code::InvalidArgument));
    for (required_bytes, limit_bytes, code) in [
        (i64::MAX, 0, Code::OutOfRange),
        (MIB + 1, MIB + 2, Code::OutOfRange),
        (2 * MIB, MIB, Code::InvalidArgument),
        (-1, 0, Code::InvalidArgument),
    ] {
        let mut case = wanted("a");
        case.capacity_range = Some(CapacityRange { required_bytes, limit_bytes });
        cases.push((case, code));
    }
    for (case, code) in cases {
        let told = format!("{case:?}");
        assert_eq!(create_code(&controller, case).await, code, "{told}");
    }
    assert_eq!(fake.asked(), 0);
}

#[tokio::test]
async fn placement_local_prefers_the_pods_node_and_only_storage_nodes() {
    let (fake, controller) = controller().await;
    let topology = |node: &str| Topology {
        segments: BTreeMap::from([(NODE_TOPOLOGY_KEY.to_owned(), node.to_owned())]),
    };
    let mut near = wanted("near");
    near.parameters.insert("placement".to_owned(), "local".to_owned());
    near.accessibility_requirements = Some(TopologyRequirement {
        requisite: Vec::new(),
        preferred: vec![topology("elsewhere"), topology("node-2"), topology("node-1")],
    });
    let mut far = near.clone();
    assert_eq!(create_code(&controller, near).await, Code::Ok);
    assert_eq!(fake.last_created().preferred_nodes, ["node-2", "node-1"]);
    far.name = "far".to_owned();
    far.parameters.insert("placement".to_owned(), "spread".to_owned());
    assert_eq!(create_code(&controller, far).await, Code::Ok);
    assert!(fake.last_created().preferred_nodes.is_empty());
}

#[tokio::test]
async fn publishing_takes_a_lease_and_tells_the_node_all_it_needs() {
    let (_fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    let first = publish(&volume, "node-2", mounted(Mode::SingleNodeWriter));
    let answer =
        controller.controller_publish_volume(request(first.clone())).await.expect("a lease");
    let context = answer.into_inner().publish_context;
    let again =
        controller.controller_publish_volume(request(first.clone())).await.expect("the same");
    assert_eq!(again.into_inner().publish_context, context);
    let context = PublishContext::parse(&context).expect("our own");
    assert_eq!((context.export().as_str(), context.epoch), ("pvc-1@lease=1", 1));
    assert_eq!(context.addresses.len(), 3);
    assert_eq!(context.addresses[0].as_str(), "127.0.0.2:10809", "the host's own comes first");

    let code = |it| publish_code(&controller, it);
    let readonly = ControllerPublishVolumeRequest { readonly: true, ..first.clone() };
    assert_eq!(code(readonly).await, Code::AlreadyExists);
    let elsewhere = publish(&volume, "node-1", mounted(Mode::SingleNodeWriter));
    assert_eq!(code(elsewhere.clone()).await, Code::FailedPrecondition);
    assert_eq!(
        code(publish(&volume, "nowhere", mounted(Mode::SingleNodeWriter))).await,
        Code::NotFound
    );
    let unknown = ControllerPublishVolumeRequest { volume_id: "fake".to_owned(), ..first.clone() };
    assert_eq!(code(unknown).await, Code::NotFound);
    let by_name = ControllerPublishVolumeRequest { volume_id: "pvc-1".to_owned(), ..first.clone() };
    assert_eq!(code(by_name).await, Code::NotFound);
    for missing in [
        ControllerPublishVolumeRequest { volume_id: String::new(), ..first.clone() },
        ControllerPublishVolumeRequest { node_id: String::new(), ..first.clone() },
        ControllerPublishVolumeRequest { volume_capability: None, ..first.clone() },
    ] {
        assert_eq!(code(missing).await, Code::InvalidArgument);
    }

    let delete = DeleteVolumeRequest { volume_id: volume.volume_id.clone(), ..Default::default() };
    let held = controller.delete_volume(request(delete.clone())).await.expect_err("it is leased");
    assert_eq!(held.code(), Code::FailedPrecondition);
    let unpublish = ControllerUnpublishVolumeRequest {
        volume_id: volume.volume_id.clone(),
        ..Default::default()
    };
    for _ in 0..2 {
        controller.controller_unpublish_volume(request(unpublish.clone())).await.expect("released");
    }
    assert_eq!(code(elsewhere).await, Code::Ok);
    let unpublish = ControllerUnpublishVolumeRequest { node_id: "node-1".to_owned(), ..unpublish };
    controller.controller_unpublish_volume(request(unpublish)).await.expect("released");
    for _ in 0..2 {
        controller.delete_volume(request(delete.clone())).await.expect("deleted");
    }
}

/// A daemon goes on with what it was asked after the driver gave up and asked another one.
#[tokio::test]
async fn what_comes_late_neither_takes_a_lease_nor_gives_one_back() {
    let (fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    let first = publish(&volume, "node-1", mounted(Mode::SingleNodeWriter));
    let unpublish = ControllerUnpublishVolumeRequest {
        volume_id: volume.volume_id.clone(),
        node_id: "node-1".to_owned(),
        ..Default::default()
    };
    for _ in 0..2 {
        assert_eq!(publish_code(&controller, first.clone()).await, Code::Ok);
        let held = fake.leases("pvc-1");
        fake.repeat().await;
        assert_eq!(fake.leases("pvc-1"), held, "an earlier release came late");
        controller.controller_unpublish_volume(request(unpublish.clone())).await.expect("released");
        fake.repeat().await;
        assert_eq!(fake.leases("pvc-1"), [], "an earlier acquire came late");
    }
    fake.get_stuck(true);
    let mut given_up = Request::new(first.clone());
    given_up.set_timeout(Duration::from_millis(900));
    let status = controller.controller_publish_volume(given_up).await.expect_err("no answer");
    assert_eq!(status.code(), Code::Unavailable);
    fake.get_stuck(false);
    controller.controller_unpublish_volume(request(unpublish.clone())).await.expect("none held");
    fake.repeat().await;
    assert_eq!(fake.leases("pvc-1"), [], "it was granted after it was given up");
}

/// The call goes on when its caller has gone; another controller may be in charge by then.
#[tokio::test]
async fn a_call_that_is_overtaken_does_not_undo_what_came_after() {
    let (fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    let first = publish(&volume, "node-1", mounted(Mode::SingleNodeWriter));
    let unpublish = ControllerUnpublishVolumeRequest {
        volume_id: volume.volume_id.clone(),
        node_id: "node-1".to_owned(),
        ..Default::default()
    };
    let unpublish = || controller.controller_unpublish_volume(request(unpublish.clone()));
    fake.overtake(1);
    assert_eq!(publish_code(&controller, first.clone()).await, Code::Aborted);
    assert_eq!(fake.leases("pvc-1"), [], "it may be that nobody wants it any more");
    assert_eq!(publish_code(&controller, first.clone()).await, Code::Ok);
    fake.overtake(2);
    unpublish().await.expect("it is the same lease still");
    assert_eq!(fake.leases("pvc-1"), []);

    assert_eq!(publish_code(&controller, first).await, Code::Ok);
    fake.move_lease("node-1");
    unpublish().await.expect("the lease that it was about has ended");
    assert_eq!(fake.leases("pvc-1").len(), 1, "the later one stays");
    unpublish().await.expect("now it is about that one");
    assert_eq!(fake.leases("pvc-1"), []);
    fake.move_lease("node-1");
    assert_eq!(unpublish().await.expect_err("one was granted meanwhile").code(), Code::Aborted);
    assert_eq!(fake.leases("pvc-1").len(), 1);
}

#[tokio::test]
async fn readers_and_raw_writers_share_a_volume() {
    let (_fake, controller) = controller().await;
    for (name, capability) in
        [("rox", mounted(Mode::MultiNodeReaderOnly)), ("rwx", block(Mode::MultiNodeMultiWriter))]
    {
        let volume = create(&controller, name).await;
        for node in ["node-1", "node-2"] {
            let it = publish(&volume, node, capability.clone());
            assert_eq!(publish_code(&controller, it).await, Code::Ok, "{name} on {node}");
        }
        let id = ControllerGetVolumeRequest { volume_id: volume.volume_id };
        let answer = controller.controller_get_volume(request(id)).await.expect("it is there");
        let status = answer.into_inner().status.expect("a status");
        assert_eq!(status.published_node_ids, ["node-1", "node-2"]);
    }
}

#[tokio::test]
async fn pages_are_as_long_as_asked_for_and_tokens_are_checked() {
    let (_fake, controller) = controller().await;
    for number in 0..5 {
        create(&controller, &format!("pvc-{number}")).await;
    }
    let list = |max_entries: i32, starting_token: &str| {
        let starting_token = starting_token.to_owned();
        controller.list_volumes(request(ListVolumesRequest { max_entries, starting_token }))
    };
    let all = list(0, "").await.expect("a list").into_inner();
    assert_eq!((all.entries.len(), all.next_token.as_str()), (5, ""));
    let mut ids = Vec::new();
    let mut token = String::new();
    loop {
        let page = list(3, &token).await.expect("a page").into_inner();
        assert!(page.entries.len() <= 3);
        ids.extend(page.entries.into_iter().filter_map(|it| Some(it.volume?.volume_id)));
        token = page.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(ids.len(), 5);
    assert_eq!(list(3, "nonsense").await.expect_err("no token").code(), Code::Aborted);
    assert_eq!(list(-1, "").await.expect_err("no length").code(), Code::InvalidArgument);
}

#[tokio::test]
async fn volumes_grow_and_never_shrink() {
    let (_fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    let expand = async |required_bytes, limit_bytes| {
        let it = ControllerExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            capacity_range: Some(CapacityRange { required_bytes, limit_bytes }),
            ..Default::default()
        };
        let answer = controller.controller_expand_volume(request(it)).await;
        answer.map(tonic::Response::into_inner).map_err(|status| status.code())
    };
    let grown = expand(100 * MIB + 1, 0).await.expect("it grows");
    assert_eq!((grown.capacity_bytes, grown.node_expansion_required), (100 * MIB + 4096, true));
    assert_eq!(expand(MIB, 0).await.map(|it| it.capacity_bytes), Ok(100 * MIB + 4096));
    assert_eq!(expand(MIB, 50 * MIB).await, Err(Code::OutOfRange));
    assert_eq!(expand(i64::MAX, 0).await, Err(Code::OutOfRange));
    let nothing =
        ControllerExpandVolumeRequest { volume_id: volume.volume_id.clone(), ..Default::default() };
    let nothing = controller.controller_expand_volume(request(nothing)).await;
    assert_eq!(nothing.expect_err("no range").code(), Code::InvalidArgument);
}

/// A call that ended between the two is made again: a host must not be told to grow to it before.
#[tokio::test]
async fn a_size_that_is_decided_and_not_in_force_is_no_growth() {
    let (fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    let expand = async |within: u64| {
        let range = CapacityRange { required_bytes: 100 * MIB, limit_bytes: 0 };
        let mut it = request(ControllerExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            capacity_range: Some(range),
            ..Default::default()
        });
        it.set_timeout(Duration::from_millis(within));
        let answer = controller.controller_expand_volume(it).await;
        answer.map(|it| it.into_inner().capacity_bytes).map_err(|status| status.code())
    };
    fake.hold_growth(true);
    for _ in 0..2 {
        assert_eq!(expand(900).await, Err(Code::Unavailable));
    }
    fake.hold_growth(false);
    assert_eq!(expand(30_000).await, Ok(100 * MIB));
}

#[tokio::test]
async fn a_cluster_without_a_quorum_is_asked_again_until_the_deadline() {
    let (fake, controller) = controller().await;
    fake.lose_quorum(3);
    create(&controller, "pvc-1").await;
    fake.lose_quorum(u32::MAX);
    let mut hopeless = Request::new(wanted("pvc-2"));
    hopeless.set_timeout(Duration::from_millis(900));
    let status = controller.create_volume(hopeless).await.expect_err("no quorum");
    assert_eq!(status.code(), Code::Unavailable);
    fake.lose_quorum(0);
    create(&controller, "pvc-2").await;
}

#[tokio::test]
async fn a_second_call_for_a_volume_is_turned_away_while_one_runs() {
    let (fake, controller) = controller().await;
    fake.lose_quorum(2);
    let (first, second) = tokio::join!(
        controller.create_volume(request(wanted("pvc-1"))),
        controller.create_volume(request(wanted("pvc-1"))),
    );
    first.expect("the first goes on");
    assert_eq!(second.expect_err("one at a time").code(), Code::Aborted);
    create(&controller, "pvc-1").await;
    assert_eq!(fake.names().len(), 1);
}

/// Otherwise a lease could be taken after the release that was asked for later, and stay.
#[tokio::test]
async fn a_call_whose_caller_has_gone_runs_to_its_end_before_the_next() {
    let (fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    // Until it is seen that the call goes on.
    fake.lose_quorum(u32::MAX);
    let published = publish(&volume, "node-1", mounted(Mode::SingleNodeWriter));
    let call = controller.controller_publish_volume(request(published));
    tokio::time::timeout(Duration::from_millis(50), call).await.expect_err("it takes longer");
    let unpublish = async || {
        let it = ControllerUnpublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            node_id: "node-1".to_owned(),
            ..Default::default()
        };
        let answer = controller.controller_unpublish_volume(request(it)).await;
        answer.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    assert_eq!(unpublish().await, Code::Aborted);
    fake.lose_quorum(0);
    let mut code = Code::Aborted;
    while code == Code::Aborted {
        tokio::task::yield_now().await;
        code = unpublish().await;
    }
    assert_eq!(code, Code::Ok);
    let id = ControllerGetVolumeRequest { volume_id: volume.volume_id.clone() };
    let answer = controller.controller_get_volume(request(id)).await.expect("it is there");
    let status = answer.into_inner().status.expect("a status");
    assert!(status.published_node_ids.is_empty(), "{status:?}");
}

#[tokio::test]
async fn validation_confirms_or_says_why_not() {
    let (_fake, controller) = controller().await;
    let volume = create(&controller, "pvc-1").await;
    let validate = async |capability: VolumeCapability, parameters: &[(&str, &str)]| {
        let it = ValidateVolumeCapabilitiesRequest {
            volume_id: volume.volume_id.clone(),
            volume_capabilities: vec![capability],
            parameters: parameters.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            ..Default::default()
        };
        let answer = controller.validate_volume_capabilities(request(it)).await.expect("an answer");
        let answer = answer.into_inner();
        assert_eq!(answer.confirmed.is_none(), !answer.message.is_empty());
        answer.confirmed.is_some()
    };
    assert!(validate(block(Mode::SingleNodeWriter), &[("replicas", "3")]).await);
    assert!(!validate(mounted(Mode::MultiNodeMultiWriter), &[]).await);
    assert!(!validate(mounted(Mode::SingleNodeWriter), &[("replicas", "5")]).await);
}

/// The table of the capabilities: a call for each, which works.
#[tokio::test]
async fn every_advertised_capability_has_a_working_call() {
    let (_fake, controller) = controller().await;
    let answer = controller.controller_get_capabilities(request(Default::default())).await;
    assert_eq!(answer.expect("a list").into_inner().capabilities.len(), CAPABILITIES.len());
    for capability in CAPABILITIES {
        let name = format!("{capability:?}").to_lowercase();
        let volume = create(&controller, &name).await;
        let published = publish(&volume, "node-1", mounted(Mode::SingleNodeMultiWriter));
        let works = match capability {
            Capability::Unknown => false,
            Capability::CreateDeleteVolume => {
                let volume_id = volume.volume_id;
                let it = DeleteVolumeRequest { volume_id, ..Default::default() };
                controller.delete_volume(request(it)).await.is_ok()
            }
            Capability::PublishUnpublishVolume => {
                let it = ControllerUnpublishVolumeRequest {
                    volume_id: volume.volume_id,
                    node_id: "node-1".to_owned(),
                    ..Default::default()
                };
                publish_code(&controller, published).await == Code::Ok
                    && controller.controller_unpublish_volume(request(it)).await.is_ok()
            }
            Capability::PublishReadonly => {
                let it = ControllerPublishVolumeRequest { readonly: true, ..published };
                let answer = controller.controller_publish_volume(request(it)).await;
                let context = answer.expect("a lease").into_inner().publish_context;
                PublishContext::parse(&context).expect("our own").export().contains("@ro,")
            }
            Capability::SingleNodeMultiWriter => {
                publish_code(&controller, published).await == Code::Ok
            }
            Capability::ListVolumes | Capability::ListVolumesPublishedNodes => {
                assert_eq!(publish_code(&controller, published).await, Code::Ok);
                let list = controller.list_volumes(request(Default::default())).await;
                let entries = list.expect("a list").into_inner().entries;
                let entry = entries.into_iter().find(|it| it.volume.as_ref() == Some(&volume));
                entry.expect("it is listed").status.expect("a status").published_node_ids
                    == ["node-1"]
            }
            Capability::GetCapacity => {
                let answer = controller.get_capacity(request(Default::default())).await;
                let answer = answer.expect("a capacity").into_inner();
                let free = i64::try_from(fake::FREE).expect("small enough");
                assert_eq!(answer.minimum_volume_size, Some(MIB));
                (answer.available_capacity, answer.maximum_volume_size) == (free, Some(free))
            }
            Capability::ExpandVolume => {
                let it = ControllerExpandVolumeRequest {
                    volume_id: volume.volume_id,
                    capacity_range: Some(CapacityRange {
                        required_bytes: 65 * MIB,
                        limit_bytes: 0,
                    }),
                    ..Default::default()
                };
                controller.controller_expand_volume(request(it)).await.is_ok()
            }
            Capability::GetVolume => {
                let volume_id = volume.volume_id;
                let it = ControllerGetVolumeRequest { volume_id };
                controller.controller_get_volume(request(it)).await.is_ok()
            }
            other => panic!("{other:?} is advertised and not tried here"),
        };
        assert!(works, "{capability:?}");
    }
}

#[tokio::test]
async fn what_is_not_advertised_says_so() {
    let (_fake, controller) = controller().await;
    let codes = [
        controller.create_snapshot(request(Default::default())).await.map(drop),
        controller.delete_snapshot(request(Default::default())).await.map(drop),
        controller.list_snapshots(request(Default::default())).await.map(drop),
        controller.get_snapshot(request(Default::default())).await.map(drop),
        controller.controller_modify_volume(request(Default::default())).await.map(drop),
    ];
    for answer in codes {
        assert_eq!(answer.expect_err("not supported").code(), Code::Unimplemented);
    }
}
