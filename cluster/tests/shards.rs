//! Nodes with several shards: which pools come in, what replaces a lost one, what goes together.

mod common;

use ballast_block::limits::NODE_SHARDS_MAX;
use ballast_block::{NodeId, PoolId, ReplicaId, ShardId};
use ballast_cluster::{
    ClusterState, Command, NodeBooted, PoolState, Refusal, RefusalCode, ReplicaState, Reply, Volume,
};
use common::{
    alive, booted_with, cluster_of_shards, create, on_shard, pool_id, ready_volume, refused, report,
};

const NODE: NodeId = NodeId(2);

fn start(shard: u32, pool: u8, boot: u64) -> Command {
    on_shard(shard, booted_with(NODE.0, pool, boot, boot, 1 << 30))
}

fn with_member(command: Command, member: u64) -> Command {
    let Command::NodeBooted(booted) = command else { panic!("not a start") };
    Command::NodeBooted(NodeBooted { offered: 9, member: Some(ReplicaId(member)), ..booted })
}

fn replace(pool: u8) -> Command {
    Command::ReplacePool { node: NODE, pool: pool_id(pool), guarded: true }
}

fn ids(state: &ClusterState, shard: u32) -> Vec<PoolId> {
    state.pools_of(NODE, ShardId(shard)).map(|pool| pool.id).collect()
}

/// On each shard a ready volume of three replicas.
fn with_volumes(shards: u32) -> (ClusterState, Vec<Volume>) {
    let mut state = cluster_of_shards(3, shards);
    let names = ["first", "second", "third"];
    let volumes: Vec<Volume> = (0..shards)
        .map(|shard| ready_volume(&mut state, names[shard as usize], shard as u8 + 1, 3))
        .collect();
    for (shard, volume) in (0..).zip(&volumes) {
        assert_eq!(volume.shard, ShardId(shard));
    }
    (state, volumes)
}

#[test]
fn a_pool_keeps_its_shard() {
    let mut state = cluster_of_shards(3, 2);
    let before = state.clone();
    for (shard, pool) in [(1, 20), (0, 21)] {
        let refusal = refused(state.apply(start(shard, pool, 2)));
        let (known, reported) = (ShardId(1 - shard), ShardId(shard));
        assert_eq!(refusal, Refusal::PoolShardDiffers { pool: pool_id(pool), known, reported });
        assert_eq!(refusal.code(), RefusalCode::FailedPrecondition);
    }
    let text = refused(state.apply(start(0, 21, 2))).to_string();
    let remedy = "belongs to shard-1 of its node and was started on shard-0: put the node's pools \
                  back in their order in the configuration";
    assert!(text.ends_with(remedy), "{text}");
    assert_eq!(state, before);
    assert_eq!(state.apply(start(1, 21, 2)), Reply::Done);
}

#[test]
fn what_a_shard_can_not_be() {
    let mut state = cluster_of_shards(3, 1);
    let before = state.clone();
    for shard in [NODE_SHARDS_MAX as u32, u32::MAX] {
        let refusal = refused(state.apply(start(shard, 21, 1)));
        assert!(matches!(refusal, Refusal::ShardInvalid { .. }), "{refusal}");
        assert_eq!(refusal.code(), RefusalCode::InvalidArgument);
    }
    let refusal = refused(state.apply(with_member(start(1, 21, 1), 2)));
    assert!(matches!(refusal, Refusal::MemberOnOtherShard { .. }), "{refusal}");
    assert_eq!(refusal.code(), RefusalCode::InvalidArgument);
    assert_eq!(state, before);
    assert_eq!(state.apply(start(NODE_SHARDS_MAX as u32 - 1, 21, 1)), Reply::Done);
}

#[test]
fn no_second_pool_stands_in_for_one_that_may_serve() {
    for pool_state in [PoolState::Ok, PoolState::Failed] {
        let mut state = cluster_of_shards(3, 2);
        state.apply(report(21, pool_state, 1 << 30, 0));
        let refusal = refused(state.apply(start(1, 99, 1)));
        let (node, pool, known) = (NODE, pool_id(99), pool_id(21));
        assert_eq!(refusal, Refusal::PoolNotExpected { node, pool, known });
        assert_eq!(state.apply(start(2, 99, 1)), Reply::Done, "a shard of its own");
    }
}

#[test]
fn a_shards_lost_pool_is_replaced_without_a_member() {
    let (mut state, volumes) = with_volumes(3);
    let node = state.node(NODE).cloned();
    assert_eq!(state.apply(replace(21)), Reply::GivenUp);
    let revision = state.revision();
    assert_eq!(state.apply(replace(21)), Reply::GivenUp);
    assert_eq!(state.revision(), revision);
    assert_eq!(state.node(NODE).cloned(), node, "no member is involved");
    assert_eq!(state.pool(pool_id(21)).map(|it| it.state), Some(PoolState::Lost));
    assert_eq!(refused(state.apply(start(1, 21, 2))), Refusal::PoolLost { pool: pool_id(21) });
    // Another shard's pool, lost too: what was in it waits for that shard's new pool.
    assert_eq!(state.apply(replace(22)), Reply::GivenUp);

    assert_eq!(state.apply(start(1, 99, 1)), Reply::Done);
    // The lost one stays known: it must not come back as a new one when this one is lost, too.
    assert_eq!(ids(&state, 1), [pool_id(21), pool_id(99)]);
    assert_eq!(refused(state.apply(start(1, 21, 3))), Refusal::PoolLost { pool: pool_id(21) });
    let on_new: Vec<_> = state.replicas_on_shard(NODE, ShardId(1)).copied().collect();
    let [new] = on_new.as_slice() else { panic!("{on_new:?}") };
    assert_eq!((new.family, new.pool), (volumes[1].family, pool_id(99)));
    assert_eq!(new.state, ReplicaState::Creating);
    let waits: Vec<_> = state.replicas_on_shard(NODE, ShardId(2)).copied().collect();
    let [waits] = waits.as_slice() else { panic!("{waits:?}") };
    assert_eq!((waits.state, waits.pool), (ReplicaState::Lost, pool_id(22)));
    let untouched = state.replicas_on_shard(NODE, ShardId(0)).next().copied();
    assert_eq!(untouched.map(|it| it.state), Some(ReplicaState::Ready));
    assert_eq!(ClusterState::decode(&state.encode()), Ok(state));
}

#[test]
fn a_replaced_pool_that_is_still_known_is_done() {
    let (mut state, _) = with_volumes(2);
    // With one replica nobody has what it held: it keeps the lost pool known.
    let single = loop {
        let id = 10 + state.volumes().count() as u8;
        let volume = ready_volume(&mut state, &format!("single-{id}"), id, 1);
        if state.replica(volume.replicas[0]).unwrap().pool == pool_id(21) {
            break volume;
        }
    };
    let forced = Command::ReplacePool { node: NODE, pool: pool_id(21), guarded: false };
    assert_eq!(state.apply(forced), Reply::GivenUp);
    assert_eq!(state.apply(start(1, 99, 1)), Reply::Done);
    assert_eq!(state.apply(replace(21)), Reply::Done);
    assert_eq!(state.replica(single.replicas[0]).unwrap().state, ReplicaState::Lost);
    assert_eq!(ids(&state, 1), [pool_id(21), pool_id(99)]);
    // Its successor can be given up in its turn, and is the one that counts.
    assert_eq!(state.apply(replace(99)), Reply::GivenUp);
    assert_eq!(state.apply(replace(21)), Reply::GivenUp);
}

#[test]
fn the_first_pools_replacement_leaves_other_shards_alone() {
    let (mut state, volumes) = with_volumes(2);
    state.apply(report(21, PoolState::Lost, 1 << 30, 0));
    // A pool that serves on another shard says nothing of shard 0.
    let Reply::Replacing { member } = state.apply(replace(20)) else { panic!() };
    assert_eq!(state.apply(replace(20)), Reply::Replacing { member });
    let stranger = refused(state.apply(with_member(start(0, 98, 1), 2)));
    assert!(matches!(stranger, Refusal::PoolNotExpected { .. }), "{stranger}");

    // Shard 1's new pool is not the one that the member is awaited with.
    assert_eq!(state.apply(start(1, 99, 1)), Reply::Done);
    assert!(state.node(NODE).unwrap().replacing);
    let lost: Vec<_> = state.replicas_on_shard(NODE, ShardId(0)).map(|it| it.state).collect();
    assert_eq!(lost, [ReplicaState::Lost]);

    assert_eq!(state.apply(with_member(start(0, 98, 1), member.0)), Reply::Done);
    assert!(!state.node(NODE).unwrap().replacing);
    let new: Vec<_> = state.replicas_on_shard(NODE, ShardId(0)).copied().collect();
    assert_eq!((new[0].family, new[0].pool), (volumes[0].family, pool_id(98)));
}

#[test]
fn a_node_starts_its_shards_in_any_order() {
    let mut state = cluster_of_shards(3, 0);
    assert_eq!(state.apply(start(1, 21, 1)), Reply::Done);
    assert_eq!(state.apply(with_member(start(0, 20, 1), 2)), Reply::Done);
    assert_eq!(state.apply(start(2, 22, 1)), Reply::Done);
    assert_eq!([ids(&state, 0), ids(&state, 1), ids(&state, 2)].concat().len(), 3);
}

#[test]
fn two_nodes_can_not_bring_a_shards_pool_back() {
    let mut state = cluster_of_shards(2, 2);
    let refusal = refused(state.apply(replace(21)));
    assert!(matches!(refusal, Refusal::NotReplaceable { nodes: 2, .. }), "{refusal}");
}

#[test]
fn a_rolled_back_pool_loses_its_shard_only() {
    let (mut state, volumes) = with_volumes(2);
    let reply = alive(&mut state, on_shard(1, booted_with(NODE.0, 21, 1, 77, 1 << 30)));
    let lost = vec![volumes[1].replicas[1]];
    assert_eq!(reply, Reply::PoolRolledBack { pool: pool_id(21), known: 1, reported: 1, lost });
    let first = state.replica(volumes[0].replicas[1]).unwrap();
    assert_eq!(first.state, ReplicaState::Ready);
}

#[test]
fn a_volume_keeps_its_shard_through_creation_asked_again() {
    let (mut state, volumes) = with_volumes(2);
    let again = state.apply(create("second", 77, 3));
    assert_eq!(again, Reply::Volume(volumes[1].clone()));
}
