//! A volume from creation to the last confirmed removal, and where it is placed.

mod common;

use ballast_block::{FamilyId, NodeId, ReplicaId};
use ballast_cluster::{
    ClusterState, Command, PoolState, Refusal, RefusalCode, ReplicaState, Reply, SizeProblem,
    VolumePhase,
};
use common::{
    MIB, booted, booted_with, cluster_of, create, create_sized, created, ready_volume, refused,
    register, report, volume_id,
};

fn nodes_of(state: &ClusterState, family: FamilyId) -> Vec<u32> {
    state.replicas_of(family).map(|replica| replica.node.0).collect()
}

#[test]
fn creation_to_ready() {
    let mut state = cluster_of(3);
    let volume = created(state.apply(create("data", 9, 3)));
    assert_eq!((volume.family, volume.id), (FamilyId(1), volume_id(9)));
    assert_eq!(volume.replicas, [1000, 1001, 1002].map(ReplicaId));
    assert_eq!(volume.phase, VolumePhase::Creating);
    assert_eq!(nodes_of(&state, volume.family), [1, 2, 3]);
    assert_eq!(state.former(volume.family).map(|it| it.node), Some(NodeId(1)));
    assert_eq!(state.replicas_on(NodeId(2)).map(|it| it.id).collect::<Vec<_>>(), [ReplicaId(1001)]);

    for &replica in &volume.replicas {
        assert_eq!(state.apply(Command::ReplicaReady { replica }), Reply::Done);
    }
    assert_eq!(state.apply(Command::FamilyFormed { family: FamilyId(1) }), Reply::Done);
    assert_eq!(state.find_volume("data").map(|it| it.phase), Some(VolumePhase::Ready));
    assert_eq!(state.former(volume.family), None);
    let by_id = volume.id.to_string();
    assert_eq!(state.find_volume(&by_id).map(|it| it.name.as_str()), Some("data"));
}

#[test]
fn creation_is_idempotent_by_name_and_names_the_difference() {
    let mut state = cluster_of(3);
    let first = created(state.apply(create("data", 1, 3)));
    let revision = state.revision();
    assert_eq!(created(state.apply(create("data", 2, 3))), first, "another proposer's retry");
    assert_eq!(state.revision(), revision);

    let refusal = refused(state.apply(create_sized("data", 2, 1, 32 * MIB)));
    assert_eq!(refusal.code(), RefusalCode::AlreadyExists);
    assert_eq!(
        refusal.to_string(),
        "volume \"data\" exists and is different: it has 16777216 bytes, not 33554432, \
         and it has 3 replicas, not 1; use another name, or ask for what it has"
    );
    let taken = refused(state.apply(create("other", 1, 3)));
    assert_eq!(taken, Refusal::VolumeIdTaken { volume: volume_id(1), name: "data".to_owned() });
}

#[test]
fn bad_parameters_are_refused() {
    let mut state = cluster_of(3);
    let before = state.clone();
    let mut refuse = |command| refused(state.apply(command));
    for name in ["", "Data", "a/b", "-a", "00000000-0000-4000-8000-000000000000"] {
        assert!(matches!(refuse(create(name, 1, 3)), Refusal::VolumeNameInvalid { .. }), "{name}");
    }
    for (size, expected) in [
        (0, SizeProblem::Zero),
        (MIB + 512, SizeProblem::NotWholeBlocks),
        (MIB - 4096, SizeProblem::TooSmall),
        ((64 << 40) + 4096, SizeProblem::TooLarge),
    ] {
        match refuse(create_sized("a", 1, 3, size)) {
            Refusal::VolumeSizeInvalid { problem, .. } => assert_eq!(problem, expected),
            other => panic!("{other}"),
        }
    }
    for replicas in [0, 2, 4, 6, u32::MAX] {
        let refusal = refuse(create("a", 1, replicas));
        assert!(matches!(refusal, Refusal::ReplicaCountInvalid { .. }), "{refusal}");
    }
    let refusal = refuse(create("a", 1, 5));
    assert_eq!(refusal.code(), RefusalCode::FailedPrecondition);
    assert_eq!(
        refusal.to_string(),
        "volume \"a\" wants 5 replicas and the cluster has 3 nodes: register more nodes, \
         or ask for fewer replicas"
    );
    assert_eq!(state, before);
}

#[test]
fn placement_needs_working_pools_with_space() {
    let mut state = cluster_of(3);
    state.apply(register(4));
    state.apply(report(1, PoolState::Failed, 1 << 30, 0));
    let refusal = refused(state.apply(create("a", 1, 3)));
    assert_eq!(refusal.code(), RefusalCode::FailedPrecondition);
    assert!(matches!(refusal, Refusal::TooFewUsableNodes { usable: 2, .. }), "{refusal}");

    state.apply(report(1, PoolState::Ok, 1 << 30, 1 << 30));
    let refusal = refused(state.apply(create("a", 1, 3)));
    assert_eq!(refusal.code(), RefusalCode::ResourceExhausted);
    assert!(matches!(refusal, Refusal::NoSpace { usable: 2, .. }), "{refusal}");

    state.apply(booted_with(1, 11, 1, 1, 1 << 20));
    let volume = created(state.apply(create("a", 1, 3)));
    assert_eq!(nodes_of(&state, volume.family), [2, 3, 1]);
}

#[test]
fn placement_goes_by_free_space_then_replicas_then_id() {
    let mut state = cluster_of(3);
    for node in 4..=5 {
        state.apply(register(node));
        state.apply(booted(node, 1, 1, 4 << 30));
    }
    let one = |state: &mut ClusterState, name: &str, id| {
        let volume = created(state.apply(create(name, id, 1)));
        nodes_of(state, volume.family)[0]
    };
    assert_eq!(one(&mut state, "a", 1), 4, "most free space, lower id");
    assert_eq!(one(&mut state, "b", 2), 5, "as much free space, fewer replicas");
    assert_eq!(one(&mut state, "c", 3), 4);
    state.apply(report(4, PoolState::Ok, 4 << 30, 1));
    state.apply(report(5, PoolState::Ok, 4 << 30, 2));
    assert_eq!(one(&mut state, "d", 4), 5, "a byte of difference is none");
    state.apply(report(5, PoolState::Ok, 4 << 30, 4 << 30));
    let volume = created(state.apply(create("e", 5, 3)));
    assert_eq!(nodes_of(&state, volume.family), [4, 1, 2]);
    state.apply(booted_with(3, 13, 1, 1, 8 << 30));
    state.apply(booted_with(3, 14, 1, 1, 8 << 30));
    let volume = created(state.apply(create("f", 6, 3)));
    assert_eq!(nodes_of(&state, volume.family), [3, 4, 1], "one replica per node");
}

#[test]
fn resize_grows_only() {
    let mut state = cluster_of(3);
    let creating = created(state.apply(create("a", 1, 3)));
    let resize = |size_bytes| Command::ResizeVolume { volume: volume_id(1), size_bytes };
    let refusal = refused(state.apply(resize(32 * MIB)));
    assert_eq!(refusal, Refusal::VolumeNotReady { name: "a".to_owned() });
    state.apply(Command::FamilyFormed { family: creating.family });

    assert_eq!(created(state.apply(resize(32 * MIB))).size_bytes, 32 * MIB);
    let revision = state.revision();
    assert_eq!(created(state.apply(resize(32 * MIB))).size_bytes, 32 * MIB);
    assert_eq!(state.revision(), revision);
    let refusal = refused(state.apply(resize(16 * MIB)));
    assert!(matches!(refusal, Refusal::ShrinkRefused { .. }), "{refusal}");
    let refusal = refused(state.apply(resize(32 * MIB + 1)));
    assert!(matches!(refusal, Refusal::VolumeSizeInvalid { .. }), "{refusal}");
    let unknown = Command::ResizeVolume { volume: volume_id(2), size_bytes: MIB };
    assert_eq!(refused(state.apply(unknown)).code(), RefusalCode::NotFound);
}

#[test]
fn deletion_waits_for_every_pool_and_frees_the_name_at_once() {
    let mut state = cluster_of(3);
    let volume = ready_volume(&mut state, "a", 1, 3);
    let delete = Command::DeleteVolume { volume: volume.id };
    assert_eq!(state.apply(delete.clone()), Reply::Done);
    assert_eq!(state.find_volume("a"), None);
    assert_eq!(state.volume(volume.id).map(|it| it.phase), Some(VolumePhase::Deleting));
    let resize = Command::ResizeVolume { volume: volume.id, size_bytes: 32 * MIB };
    let refusal = refused(state.apply(resize));
    assert_eq!(refusal, Refusal::VolumeBeingDeleted { name: "a".to_owned() });

    let again = created(state.apply(create("a", 2, 3)));
    assert_eq!((again.family, again.replicas[0]), (FamilyId(2), ReplicaId(1003)));
    assert_eq!(state.apply(delete.clone()), Reply::Done, "a repeated deletion");
    assert_eq!(state.find_volume("a").map(|it| it.id), Some(again.id), "spares the new volume");

    let removed = |replica| Command::ReplicaRemoved { replica };
    for &replica in &volume.replicas[..2] {
        assert_eq!(state.apply(removed(replica)), Reply::Done);
        assert_eq!(state.replica(replica).map(|it| it.state), Some(ReplicaState::Removed));
    }
    assert_eq!(state.apply(removed(volume.replicas[2])), Reply::Done);
    assert_eq!(state.volume(volume.id), None);
    assert_eq!(state.replicas().count(), 3);
    assert_eq!(state.apply(removed(volume.replicas[2])), Reply::Done, "a repeated confirmation");
    assert_eq!(state.apply(delete), Reply::Done, "what is gone is deleted");
    let formed = Command::FamilyFormed { family: volume.family };
    assert_eq!(refused(state.apply(formed)).code(), RefusalCode::NotFound);
}

#[test]
fn a_replica_in_use_can_not_be_confirmed_as_removed() {
    let mut state = cluster_of(1);
    let volume = ready_volume(&mut state, "a", 1, 1);
    let removed = Command::ReplicaRemoved { replica: volume.replicas[0] };
    let refusal = refused(state.apply(removed));
    assert_eq!(refusal, Refusal::ReplicaNotRemoving { replica: volume.replicas[0] });
    let ready = Command::ReplicaReady { replica: ReplicaId(1) };
    assert_eq!(refused(state.apply(ready)).code(), RefusalCode::NotFound);
}

#[test]
fn a_volume_whose_replicas_are_all_lost_is_deleted_at_once() {
    let mut state = cluster_of(1);
    let volume = ready_volume(&mut state, "a", 1, 1);
    state.apply(report(1, PoolState::Lost, 1 << 30, 0));
    assert_eq!(state.apply(Command::DeleteVolume { volume: volume.id }), Reply::Done);
    assert_eq!((state.volumes().count(), state.replicas().count()), (0, 0));
}
