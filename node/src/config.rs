//! What a node must be told to start.

use std::path::PathBuf;

use ballast_block::limits::{FAMILY_RETENTION_BYTES_MAX, REQUEST_MEMORY_BYTES};
use ballast_block::{ClusterId, NodeId};
use ballast_env::network::Address;
use ballast_volume::group::RaftSettings;

use crate::leases::LeasePolicy;

/// A node of the cluster's founding set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founder {
    /// Its id.
    pub node: NodeId,
    /// Its name, for people.
    pub name: String,
    /// Where it listens for peers.
    pub peer_address: Address,
}

/// Settings of a node.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeId,
    /// The pool: a file, partition or disk, formatted before.
    pub pool: PathBuf,
    /// All nodes of the cluster, this one among them: 1, 3 or 5.
    pub founders: Vec<Founder>,
    /// Where to listen for peers, if not at this node's address among the founders.
    pub peer_listen: Option<Address>,
    /// Where to listen for NBD clients.
    pub nbd_listen: Vec<Address>,
    /// Raft's times.
    pub raft: RaftSettings,
    /// Whether a volume's leader moves to the node that serves its writer.
    pub leader_follows_writer: bool,
    /// Whether an export needs a lease.
    pub leases: LeasePolicy,
    /// Log kept per family for followers that lag, in bytes.
    pub retention_bytes: u64,
    /// Memory for the requests of all clients of this shard together, in bytes, beyond the little
    /// that each has of its own.
    pub request_memory: usize,
}

impl NodeConfig {
    /// With defaults for everything that has one.
    pub fn new(cluster: ClusterId, node: NodeId, pool: PathBuf, founders: Vec<Founder>) -> Self {
        Self {
            cluster,
            node,
            pool,
            founders,
            peer_listen: None,
            nbd_listen: Vec::new(),
            raft: RaftSettings::default(),
            leader_follows_writer: true,
            leases: LeasePolicy::Required,
            retention_bytes: FAMILY_RETENTION_BYTES_MAX,
            request_memory: REQUEST_MEMORY_BYTES,
        }
    }

    /// This node among the founders.
    pub fn own(&self) -> Option<&Founder> {
        self.founders.iter().find(|founder| founder.node == self.node)
    }
}
