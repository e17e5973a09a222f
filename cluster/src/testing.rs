//! Small clusters for the unit tests.

use std::collections::BTreeMap;

use ballast_block::{ClusterId, NodeId, PoolId, VolumeId};

use crate::{ClusterState, Command, CreateVolume, NodeBooted, PoolSpace, RegisterNode, Reply};

pub const MIB: u64 = 1 << 20;

pub fn pool_id(number: u8) -> PoolId {
    PoolId::from_bytes([number; 16])
}

pub fn register(node: u32) -> Command {
    Command::RegisterNode(RegisterNode {
        node: NodeId(node),
        name: format!("n{node}"),
        peer_address: format!("10.0.0.{node}:7100"),
        labels: BTreeMap::from([("zone".to_owned(), format!("z{node}"))]),
    })
}

pub fn booted(node: u32, boot_counter: u64, incarnation: u64, free_bytes: u64) -> Command {
    let space = PoolSpace { capacity_bytes: free_bytes, used_bytes: 0 };
    let pool = pool_id(node as u8);
    Command::NodeBooted(NodeBooted { node: NodeId(node), pool, boot_counter, incarnation, space })
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

pub fn volume_id(number: u8) -> VolumeId {
    VolumeId::from_bytes([number; 16])
}

pub fn create(name: &str, id: u8, replicas: u32) -> Command {
    Command::CreateVolume(CreateVolume {
        volume: volume_id(id),
        name: name.to_owned(),
        size_bytes: 16 * MIB,
        replicas,
        created_at_ms: 1_700_000_000_000,
    })
}
