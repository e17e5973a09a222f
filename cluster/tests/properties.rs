//! Random command sequences against what must always hold.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use ballast_block::{ClusterId, FamilyId, NodeId, ReplicaId};
use ballast_cluster::{ClusterState, Command, LeaseMode, PoolState, ReplicaState, Reply};
use common::{
    MIB, acquire, booted_with, create_sized, forced, on_shard, pool_id, preferring, register,
    release, report, volume_id,
};
use proptest::prelude::*;

const MODES: [LeaseMode; 5] = [
    LeaseMode::SingleNodeWriter,
    LeaseMode::SingleNodeMultiWriter,
    LeaseMode::SingleNodePublisher,
    LeaseMode::Readers,
    LeaseMode::Writers,
];

/// Few nodes, pools, names and counters, so that commands meet.
fn command() -> impl Strategy<Value = Command> {
    let pool_state = prop_oneof![
        6 => Just(PoolState::Ok),
        2 => Just(PoolState::Failed),
        1 => Just(PoolState::Lost),
    ];
    let replica = (998..1030_u64).prop_map(ReplicaId);
    prop_oneof![
        2 => (0..7_u32).prop_map(register),
        4 => (1..6_u32, 1..8_u8, 0..40_u64, 0..3_u64, 0..4_u64)
            .prop_map(|(node, pool, counter, incarnation, free)| {
                booted_with(node, pool, counter, incarnation, free << 30)
            }),
        4 => (1..6_u32, 1..16_u8, 0..40_u64, 0..3_u64, 0..4_u64)
            .prop_map(|(node, pool, counter, incarnation, free)| {
                // Mostly the pool's own shard: else nothing but refusals.
                let shard = if counter % 8 == 7 { 1 + pool % 2 } else { pool % 3 };
                let shard = u32::from(shard);
                on_shard(shard, booted_with(node, pool, counter, incarnation, free << 30))
            }),
        // None of shard 0: without a member of the cluster group it may have several pools.
        1 => (1..6_u32, prop::sample::select(vec![8, 10, 11, 13, 14]), any::<bool>())
            .prop_map(|(node, pool, guarded)| {
                Command::ReplacePool { node: NodeId(node), pool: pool_id(pool), guarded }
            }),
        1 => replica.clone().prop_map(|replica| Command::ReplaceReplica { replica }),
        2 => (1..16_u8, pool_state, 0..4_u64, 0..4_u64).prop_map(|(pool, state, capacity, used)| {
            report(pool, state, capacity << 30, used << 30)
        }),
        6 => ("[a-d]", 1..12_u8, prop::sample::select(vec![1, 1, 3, 3, 5, 2]), 1..3_u64)
            .prop_map(|(name, id, replicas, size)| {
                let create = create_sized(&name, id, replicas, size * MIB);
                if id % 3 == 0 { preferring(&[u32::from(id), 2], create) } else { create }
            }),
        6 => replica.clone().prop_map(|replica| Command::ReplicaReady { replica }),
        3 => (1..16_u64).prop_map(|family| Command::FamilyFormed { family: FamilyId(family) }),
        2 => (1..12_u8, 0..5_u64).prop_map(|(id, size)| Command::ResizeVolume {
            volume: volume_id(id),
            size_bytes: size * MIB,
        }),
        3 => (1..12_u8).prop_map(|id| Command::DeleteVolume { volume: volume_id(id) }),
        6 => replica.prop_map(|replica| Command::ReplicaRemoved { replica }),
        4 => (1..12_u8, "[a-c]", 0..5_usize, any::<bool>()).prop_map(|(id, host, mode, force)| {
            let lease = acquire(id, &host, MODES[mode]);
            Command::AcquireLease(if force { forced(lease, "in the way") } else { lease })
        }),
        3 => (1..12_u8, "[a-c]", 0..3_u64)
            .prop_map(|(id, host, epoch)| release(id, &host, epoch)),
    ]
}

/// What was ever seen, to compare each new state with.
#[derive(Default)]
struct History {
    families: BTreeMap<FamilyId, ballast_block::VolumeId>,
    shards: BTreeMap<FamilyId, ballast_block::ShardId>,
    replicas: BTreeMap<ReplicaId, FamilyId>,
    gone: BTreeSet<ReplicaId>,
    states: BTreeMap<ReplicaId, ReplicaState>,
}

impl History {
    fn look(&mut self, state: &ClusterState) {
        for volume in state.volumes() {
            let first = *self.families.entry(volume.family).or_insert(volume.id);
            assert_eq!(first, volume.id, "{} was used twice", volume.family);
            let nodes: BTreeSet<_> = state.replicas_of(volume.family).map(|it| it.node).collect();
            assert_eq!(nodes.len(), volume.replica_count as usize, "replicas share a node");
            for replica in state.replicas_of(volume.family) {
                let shard = state.pool(replica.pool).expect("its pool").shard;
                assert_eq!(shard, volume.shard, "{} is on another shard", replica.id);
            }
            let first = *self.shards.entry(volume.family).or_insert(volume.shard);
            assert_eq!(first, volume.shard, "{} changed its shard", volume.family);
        }
        let present: BTreeSet<ReplicaId> = state.replicas().map(|it| it.id).collect();
        for replica in state.replicas() {
            let first = *self.replicas.entry(replica.id).or_insert(replica.family);
            assert_eq!(first, replica.family, "{} was used twice", replica.id);
            assert!(!self.gone.contains(&replica.id), "{} came back", replica.id);
            let before = self.states.insert(replica.id, replica.state);
            let before = before.unwrap_or(ReplicaState::Creating);
            assert!(is_step(before, replica.state), "{before:?} -> {:?}", replica.state);
            let lost = state.pool(replica.pool).expect("its pool").state == PoolState::Lost;
            let unusable = matches!(replica.state, ReplicaState::Lost | ReplicaState::Removed);
            assert!(!lost || unusable, "{} is used in a lost pool", replica.id);
        }
        self.gone.extend(self.replicas.keys().filter(|id| !present.contains(id)));
    }
}

fn is_step(from: ReplicaState, to: ReplicaState) -> bool {
    use ReplicaState::*;
    from == to
        || matches!(
            (from, to),
            (Creating, Ready | Lost | Removing | Removed)
                | (Ready, Lost | Removing | Removed)
                | (Lost, Removed)
                | (Removing, Removed)
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_sequence_keeps_what_must_hold(commands in prop::collection::vec(command(), 1..150)) {
        let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
        for node in 1..4 {
            state.apply(register(node));
            state.apply(booted_with(node, node as u8, 1, 1, 1 << 30));
            state.apply(on_shard(1, booted_with(node, 4 + 3 * node as u8, 1, 1, 1 << 30)));
        }
        let mut other = state.clone();
        let mut history = History::default();
        for command in commands {
            prop_assert_eq!(Command::decode(&command.encode()), Ok(command.clone()));
            let before = state.clone();
            let reply = state.apply(command.clone());
            prop_assert_eq!(Reply::decode(&reply.encode()).is_ok(), true);

            let mut expected = before.clone();
            prop_assert_eq!(&expected.apply(command.clone()), &reply, "not deterministic");
            prop_assert_eq!(&expected, &state);
            let changed = u64::from(state != before);
            prop_assert_eq!(state.revision(), before.revision() + changed);
            if matches!(reply, Reply::Refused(_)) {
                prop_assert_eq!(&state, &before);
            }

            let mut twice = state.clone();
            prop_assert_eq!(twice.apply(command.clone()), reply, "another answer to a repetition");
            prop_assert_eq!(&twice, &state, "a repetition changed something");

            prop_assert_eq!(state.check(), Ok(()));
            history.look(&state);
            let bytes = state.encode();
            let decoded = ClusterState::decode(&bytes);
            prop_assert_eq!(decoded.as_ref(), Ok(&state));
            // A replica that was brought up by a checkpoint goes on like one that saw it all.
            other = if bytes.len().is_multiple_of(2) { decoded.expect("compared") } else {
                other.apply(command);
                other
            };
            prop_assert_eq!(&other, &state);
        }
    }

    #[test]
    fn hostile_bytes_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Command::decode(&bytes);
        let _ = Reply::decode(&bytes);
        prop_assert!(ClusterState::decode(&bytes).is_err());
    }
}
