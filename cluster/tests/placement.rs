//! Placement against a dumb model: every choice is compared with one that is made by trying all.

mod common;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use ballast_block::{ClusterId, NodeId, PoolId, ShardId};
use ballast_cluster::{
    ClusterState, Command, Pool, PoolState, Refusal, RefusalCode, ReplicaState, Reply,
};
use common::{
    booted_with, cluster_of_shards, create, created, on_shard, preferring, refused, register,
    report,
};
use proptest::prelude::*;

/// Free space to four binary digits.
fn step(free: u64) -> u64 {
    let mut unit = 1;
    while free / unit > 15 {
        unit *= 2;
    }
    free / unit * unit
}

type Rank = (Reverse<u64>, usize, NodeId, PoolId);

/// What the best pools of those given are, one of each node, best first: all there was before nodes
/// had shards.
fn best_of_each_node<'a>(
    state: &ClusterState,
    pools: impl Iterator<Item = &'a Pool>,
    wanted: usize,
) -> Option<Vec<Rank>> {
    let in_pool = |pool: &Pool| {
        let kept = |it: &&ballast_cluster::Replica| it.state != ReplicaState::Removed;
        state.replicas().filter(kept).filter(|it| it.pool == pool.id).count()
    };
    let usable = pools.filter(|it| it.state == PoolState::Ok && it.space.free_bytes() > 0);
    let mut ranks: Vec<Rank> = usable
        .map(|it| (Reverse(step(it.space.free_bytes())), in_pool(it), it.node, it.id))
        .collect();
    ranks.sort();
    let mut seen = BTreeSet::new();
    ranks.retain(|rank| seen.insert(rank.2));
    ranks.truncate(wanted);
    (ranks.len() == wanted).then_some(ranks)
}

fn expected(state: &ClusterState, wanted: usize) -> Option<(ShardId, Vec<PoolId>)> {
    let shards: BTreeSet<ShardId> = state.pools().map(|pool| pool.shard).collect();
    let choices = shards.into_iter().filter_map(|shard| {
        let pools = state.pools().filter(|pool| pool.shard == shard);
        Some((shard, best_of_each_node(state, pools, wanted)?))
    });
    let best = choices.min_by_key(|(shard, ranks)| {
        let least_free = ranks.iter().map(|rank| rank.0.0).min();
        let replicas: usize = ranks.iter().map(|rank| rank.1).sum();
        (Reverse(least_free), replicas, *shard)
    });
    best.map(|(shard, ranks)| (shard, ranks.into_iter().map(|rank| rank.3).collect()))
}

fn chosen(state: &ClusterState, reply: &Reply) -> Option<(ShardId, Vec<PoolId>)> {
    let Reply::Volume(volume) = reply else { return None };
    let pools = state.replicas_of(volume.family).map(|replica| replica.pool);
    Some((volume.shard, pools.collect()))
}

/// Pools by number: on which node and shard, how large, how much used, and whether it works.
fn pools(shards: u32) -> impl Strategy<Value = BTreeMap<u8, (u32, u32, u64, u64, bool)>> {
    let sizes = prop::sample::select(vec![1_u64, 15, 16, 17, 33, 1 << 20, (1 << 20) + 1]);
    let pool = (1..6_u32, 0..shards, sizes, 0..18_u64, prop::bool::weighted(0.9));
    prop::collection::btree_map(1..40_u8, pool, 1..16)
}

fn cluster(pools: &BTreeMap<u8, (u32, u32, u64, u64, bool)>) -> ClusterState {
    let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
    for node in 1..6 {
        state.apply(register(node));
    }
    for (&pool, &(node, shard, size, used, works)) in pools {
        state.apply(on_shard(shard, booted_with(node, pool, 1, 1, size)));
        let pool_state = if works { PoolState::Ok } else { PoolState::Failed };
        state.apply(report(pool, pool_state, size, used));
    }
    state
}

fn compare(mut state: ClusterState, wanted: &[u32]) {
    for (id, &wanted) in (1..).zip(wanted) {
        let expected = expected(&state, wanted as usize);
        let reply = state.apply(create(&format!("v-{id}"), id, wanted));
        assert_eq!(chosen(&state, &reply), expected, "{reply:?}");
        assert_eq!(state.check(), Ok(()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn one_shard_is_placed_as_ever(
        pools in pools(1),
        wanted in prop::collection::vec(prop::sample::select(vec![1, 3, 5]), 1..12),
    ) {
        let state = cluster(&pools);
        // With one shard the shards' own rank has no say: `expected` is the old choice.
        prop_assert!(state.pools().all(|pool| pool.shard == ShardId(0)));
        compare(state, &wanted);
    }

    #[test]
    fn the_best_shard_is_chosen(
        pools in pools(4),
        wanted in prop::collection::vec(prop::sample::select(vec![1, 3, 5]), 1..12),
    ) {
        compare(cluster(&pools), &wanted);
    }
}

#[test]
fn preferred_nodes_come_first_and_are_no_reason_to_fail() {
    let nodes = |state: &ClusterState, reply: Reply| -> Vec<u32> {
        let volume = created(reply);
        state.replicas_of(volume.family).map(|replica| replica.node.0).collect()
    };
    let mut state = cluster_of_shards(4, 1);
    let reply = state.apply(preferring(&[3], create("a", 1, 1)));
    assert_eq!(nodes(&state, reply), [3]);
    let reply = state.apply(preferring(&[4, 2], create("b", 2, 3)));
    assert_eq!(nodes(&state, reply), [4, 2, 1], "in their order, then as ever");
    // Unknown ones, repeated ones and more than replicas.
    let reply = state.apply(preferring(&[9, 3, 3, 2, 1], create("c", 3, 1)));
    assert_eq!(nodes(&state, reply), [3]);
    state.apply(report(30, PoolState::Failed, 1 << 30, 0));
    state.apply(report(40, PoolState::Ok, 1 << 30, 1 << 30));
    let reply = state.apply(preferring(&[3, 4, 2], create("d", 4, 1)));
    assert_eq!(nodes(&state, reply), [2], "a failed pool and a full one are passed by");
    let reply = state.apply(preferring(&[3], create("e", 5, 1)));
    assert_eq!(nodes(&state, reply), [1]);
    let same = created(state.apply(preferring(&[1], create("d", 6, 1))));
    assert_eq!(nodes(&state, Reply::Volume(same)), [2], "no part of what makes it the same");
}

#[test]
fn absent_nodes_are_taken_last_even_if_preferred() {
    let mut state = cluster_of_shards(3, 1);
    let mut nodes = |id: u8, replicas: u32, absent: &[u32]| -> Vec<u32> {
        let asked = preferring(&[2], create(&format!("v{id}"), id, replicas));
        let Command::CreateVolume(mut asked) = asked else { unreachable!() };
        asked.absent = absent.iter().copied().map(NodeId).collect();
        let volume = created(state.apply(Command::CreateVolume(asked)));
        state.replicas_of(volume.family).map(|replica| replica.node.0).collect()
    };
    assert_eq!(nodes(1, 1, &[]), [2]);
    for id in 2..8 {
        assert!(matches!(nodes(id, 1, &[2]).as_slice(), [1 | 3]));
    }
    assert_eq!(nodes(8, 1, &[1, 2, 3, 9]), [2], "there is no other");
    assert_eq!(nodes(9, 3, &[1])[2], 1, "all are needed");
}

#[test]
fn preferred_nodes_choose_the_shard() {
    let mut state = cluster_of_shards(3, 2);
    // Shard 0 is better by space, and can't do without node 3.
    for pool in [10, 20] {
        state.apply(report(pool, PoolState::Ok, 1 << 31, 0));
    }
    state.apply(report(30, PoolState::Failed, 1 << 30, 0));
    assert_eq!(created(state.apply(create("a", 1, 1))).shard, ShardId(0));
    let volume = created(state.apply(preferring(&[3, 1], create("b", 2, 1))));
    assert_eq!(volume.shard, ShardId(1), "the first one counts more than the second");
    let nodes: Vec<u32> = state.replicas_of(volume.family).map(|it| it.node.0).collect();
    assert_eq!(nodes, [3]);
}

#[test]
fn volumes_go_around_the_shards() {
    let mut state = cluster_of_shards(3, 3);
    let shards: Vec<u32> =
        (1..7).map(|id| created(state.apply(create(&format!("v-{id}"), id, 3))).shard.0).collect();
    assert_eq!(shards, [0, 1, 2, 0, 1, 2]);
    for pool in [10, 20, 30] {
        state.apply(report(pool, PoolState::Ok, 1 << 31, 0));
    }
    assert_eq!(created(state.apply(create("v-7", 7, 3))).shard, ShardId(0), "more space");
    // The worst pool of the three counts.
    state.apply(report(30, PoolState::Ok, 1 << 29, 0));
    assert_eq!(created(state.apply(create("v-8", 8, 3))).shard, ShardId(1));
    assert_eq!(created(state.apply(create("v-9", 9, 1))).shard, ShardId(0), "the best one's");
}

#[test]
fn pools_of_different_shards_do_not_add_up() {
    let mut state = cluster_of_shards(3, 2);
    state.apply(report(10, PoolState::Failed, 1 << 30, 0));
    state.apply(report(31, PoolState::Failed, 1 << 30, 0));
    let refusal = refused(state.apply(create("a", 1, 3)));
    assert_eq!(refusal.code(), RefusalCode::FailedPrecondition);
    assert_eq!(
        refusal.to_string(),
        "volume \"a\" wants 3 replicas, all on pools of one shard number, and none has that many \
         nodes with a working pool (shard-0: 2, shard-1: 2): bring back the failed pools (see \
         `ballastctl pool list`), give the nodes equally many pools, or ask for fewer replicas"
    );
    state.apply(report(10, PoolState::Ok, 1 << 30, 1 << 30));
    let refusal = refused(state.apply(create("a", 1, 3)));
    assert_eq!(refusal.code(), RefusalCode::ResourceExhausted);
    assert!(matches!(refusal, Refusal::NoSpaceOnOneShard { .. }), "{refusal}");
    assert!(refusal.to_string().contains("(shard-0: 2, shard-1: 2)"), "{refusal}");

    // Too few altogether: shards have nothing to do with it.
    for pool in [10, 11] {
        state.apply(report(pool, PoolState::Ok, 1 << 30, 1 << 30));
    }
    let refusal = refused(state.apply(create("a", 1, 3)));
    assert!(matches!(refusal, Refusal::NoSpace { usable: 2, .. }), "{refusal}");
    for pool in [10, 11] {
        state.apply(report(pool, PoolState::Failed, 1 << 30, 0));
    }
    let refusal = refused(state.apply(create("a", 1, 3)));
    assert!(matches!(refusal, Refusal::TooFewUsableNodes { usable: 2, .. }), "{refusal}");
    assert_eq!(created(state.apply(create("a", 1, 1))).shard, ShardId(0));
}
