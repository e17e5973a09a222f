//! Small clusters for the tests.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::collections::BTreeMap;

use ballast_block::{ClusterId, Epoch, NodeId, PoolId, ShardId, VolumeId};
use ballast_cluster::{
    AcquireLease, ClusterState, Command, CreateVolume, LeaseMode, NodeBooted, PoolSpace, PoolState,
    Refusal, RegisterNode, Reply, Volume,
};

pub const MIB: u64 = 1 << 20;
pub const CREATED_AT_MS: u64 = 1_700_000_000_000;

pub fn pool_id(number: u8) -> PoolId {
    PoolId::from_bytes([number; 16])
}

pub fn volume_id(number: u8) -> VolumeId {
    VolumeId::from_bytes([number; 16])
}

pub fn register(node: u32) -> Command {
    Command::RegisterNode(RegisterNode {
        node: NodeId(node),
        name: format!("n{node}"),
        peer_address: format!("10.0.0.{node}:7100"),
        labels: BTreeMap::from([("zone".to_owned(), format!("z{node}"))]),
    })
}

/// A start of node N with pool N.
pub fn booted(node: u32, boot_counter: u64, incarnation: u64, capacity_bytes: u64) -> Command {
    booted_with(node, node as u8, boot_counter, incarnation, capacity_bytes)
}

pub fn booted_with(
    node: u32,
    pool: u8,
    boot_counter: u64,
    incarnation: u64,
    capacity_bytes: u64,
) -> Command {
    let space = PoolSpace { capacity_bytes, used_bytes: 0 };
    let pool = pool_id(pool);
    Command::NodeBooted(NodeBooted {
        node: NodeId(node),
        pool,
        shard: ShardId(0),
        boot_counter,
        incarnation,
        space,
        settled: 0,
        settled_boot: 0,
        offered: 0,
        member: None,
        told: None,
    })
}

/// The same report, by a process that lives to repeat what it was told.
pub fn alive(state: &mut ClusterState, report: Command) -> Reply {
    let Reply::PoolOlder { known } = state.apply(report.clone()) else {
        panic!("a report of an older start is not believed at once")
    };
    let Command::NodeBooted(it) = report else { unreachable!() };
    state.apply(Command::NodeBooted(NodeBooted { told: Some(known), ..it }))
}

/// The same start, on another shard than the first.
pub fn on_shard(shard: u32, booted: Command) -> Command {
    let Command::NodeBooted(mut booted) = booted else { panic!("not a start: {booted}") };
    booted.shard = ShardId(shard);
    Command::NodeBooted(booted)
}

pub fn report(pool: u8, state: PoolState, capacity_bytes: u64, used_bytes: u64) -> Command {
    let space = PoolSpace { capacity_bytes, used_bytes };
    Command::ReportPool { pool: pool_id(pool), space, state }
}

pub fn create(name: &str, id: u8, replicas: u32) -> Command {
    create_sized(name, id, replicas, 16 * MIB)
}

pub fn create_sized(name: &str, id: u8, replicas: u32, size_bytes: u64) -> Command {
    Command::CreateVolume(CreateVolume {
        volume: volume_id(id),
        name: name.to_owned(),
        size_bytes,
        replicas,
        created_at_ms: CREATED_AT_MS,
        preferred: Vec::new(),
        absent: Vec::new(),
    })
}

/// The same volume, wished on those nodes.
pub fn preferring(nodes: &[u32], create: Command) -> Command {
    let Command::CreateVolume(mut create) = create else { panic!("not a creation: {create}") };
    create.preferred = nodes.iter().copied().map(NodeId).collect();
    Command::CreateVolume(create)
}

/// A lease of volume N for a host, not forced, not read-only.
pub fn acquire(id: u8, host: &str, mode: LeaseMode) -> AcquireLease {
    AcquireLease {
        volume: volume_id(id),
        host: host.to_owned(),
        mode,
        read_only: false,
        force: false,
        reason: String::new(),
        at_ms: CREATED_AT_MS,
        unique_epoch: true,
        seen_revision: None,
    }
}

/// The same, of leases at that revision only.
pub fn seen(revision: u64, command: Command) -> Command {
    let seen_revision = Some(revision);
    match command {
        Command::AcquireLease(it) => Command::AcquireLease(AcquireLease { seen_revision, ..it }),
        Command::ReleaseLease { volume, host, epoch, .. } => {
            Command::ReleaseLease { volume, host, epoch, seen_revision }
        }
        other => other,
    }
}

/// As programs before reader version 6 asked for it.
pub fn of_volume(lease: AcquireLease) -> AcquireLease {
    AcquireLease { unique_epoch: false, ..lease }
}

pub fn forced(lease: AcquireLease, reason: &str) -> AcquireLease {
    AcquireLease { force: true, reason: reason.to_owned(), ..lease }
}

/// `epoch` 0 = whichever it has.
pub fn release(id: u8, host: &str, epoch: u64) -> Command {
    let (volume, host) = (volume_id(id), host.to_owned());
    Command::ReleaseLease { volume, host, epoch: Epoch(epoch), seen_revision: None }
}

/// `nodes` nodes, each with one empty pool of 1 GiB.
pub fn cluster_of(nodes: u32) -> ClusterState {
    let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
    for node in 1..=nodes {
        assert_eq!(state.apply(register(node)), Reply::Done);
        assert_eq!(state.apply(booted(node, 1, u64::from(node), 1 << 30)), Reply::Done);
    }
    state
}

/// Of each node N the pool N * 10 + K on shard K, empty, of 1 GiB.
pub fn cluster_of_shards(nodes: u32, shards: u32) -> ClusterState {
    let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
    for node in 1..=nodes {
        assert_eq!(state.apply(register(node)), Reply::Done);
        for shard in 0..shards {
            let pool = (node * 10 + shard) as u8;
            let booted = on_shard(shard, booted_with(node, pool, 1, 1, 1 << 30));
            assert_eq!(state.apply(booted), Reply::Done);
        }
    }
    state
}

/// Creates a volume, makes its replicas, forms its group.
pub fn ready_volume(state: &mut ClusterState, name: &str, id: u8, replicas: u32) -> Volume {
    let volume = created(state.apply(create(name, id, replicas)));
    for &replica in &volume.replicas {
        assert_eq!(state.apply(Command::ReplicaReady { replica }), Reply::Done);
    }
    assert_eq!(state.apply(Command::FamilyFormed { family: volume.family }), Reply::Done);
    state.volume(volume.id).expect("it was created").clone()
}

pub fn created(reply: Reply) -> Volume {
    match reply {
        Reply::Volume(volume) => volume,
        other => panic!("not a volume: {other:?}"),
    }
}

pub fn refused(reply: Reply) -> Refusal {
    match reply {
        Reply::Refused(refusal) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}
