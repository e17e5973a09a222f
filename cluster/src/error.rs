//! Why a command was refused. A refusal is a decision of the state machine, the same on every
//! replica, and changes nothing.

use std::collections::BTreeMap;

use ballast_block::limits::{
    HOST_NAME_BYTES_MAX, LABEL_BYTES_MAX, LEASE_REASON_BYTES_MAX, LEASES_PER_VOLUME_MAX,
    NAME_BYTES_MAX, NODE_LABELS_MAX, NODE_NAME_BYTES_MAX, NODE_POOLS_MAX, NODE_SHARDS_MAX,
    PEER_ADDRESS_BYTES_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN,
};
use ballast_block::{BLOCK_SIZE, FamilyId, NodeId, PoolId, ReplicaId, ShardId, VolumeId};
use thiserror::Error;

use crate::view::LeaseMode;

/// The kind of a refusal; each is the gRPC status code of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    /// The command can never be right.
    InvalidArgument,
    /// What it names does not exist.
    NotFound,
    /// It exists and is different.
    AlreadyExists,
    /// The cluster must be changed first.
    FailedPrecondition,
    /// A limit or the space is used up.
    ResourceExhausted,
    /// What it goes by is not so any more: look again.
    Aborted,
}

/// Why a command was refused: the thing, the problem, the remedy.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are what the messages name")]
pub enum Refusal {
    /// See the message.
    #[error(
        "volume name {name:?} is not valid: use 1 to {NAME_BYTES_MAX} of a-z, 0-9 and '-', \
         with a letter or digit at both ends, and not a UUID"
    )]
    VolumeNameInvalid { name: String },
    /// See [`SizeProblem`].
    #[error("size of {size_bytes} bytes for volume {name:?} is not valid: {problem}")]
    VolumeSizeInvalid { name: String, size_bytes: u64, problem: SizeProblem },
    /// See the message.
    #[error("{replicas} replicas for volume {name:?} are not valid: use 1, 3 or 5")]
    ReplicaCountInvalid { name: String, replicas: u32 },
    /// A volume of that name exists, with other parameters.
    #[error(
        "volume {name:?} exists and is different: {}; use another name, or ask for what it has",
        volume_difference(*size_bytes, *asked_bytes, *replicas, *asked_replicas)
    )]
    VolumeDiffers {
        name: String,
        size_bytes: u64,
        asked_bytes: u64,
        replicas: u32,
        asked_replicas: u32,
    },
    /// The proposer's random id is in use: it drew badly, or retries under a new name.
    #[error("volume id {volume} belongs to volume {name:?}: try again with a new id")]
    VolumeIdTaken { volume: VolumeId, name: String },
    /// See the message.
    #[error(
        "volume {name:?} wants {wanted} replicas and the cluster has {registered} nodes: \
         register more nodes, or ask for fewer replicas"
    )]
    TooFewNodes { name: String, wanted: u32, registered: u32 },
    /// See the message.
    #[error(
        "volume {name:?} wants {wanted} replicas and only {usable} nodes have a working pool: \
         bring back the failed pools (see `ballastctl pool list`), or ask for fewer replicas"
    )]
    TooFewUsableNodes { name: String, wanted: u32, usable: u32 },
    /// See the message.
    #[error(
        "volume {name:?} wants {wanted} replicas and only {usable} nodes have a pool with free \
         space: delete volumes or add pools"
    )]
    NoSpace { name: String, wanted: u32, usable: u32 },
    /// Pools on different shards can't be put together; see the message.
    #[error(
        "volume {name:?} wants {wanted} replicas, all on pools of one shard number, and none has \
         that many nodes with a working pool ({}): bring back the failed pools (see `ballastctl \
         pool list`), give the nodes equally many pools, or ask for fewer replicas",
        nodes_per_shard(usable)
    )]
    TooFewUsableNodesOnOneShard { name: String, wanted: u32, usable: BTreeMap<ShardId, u32> },
    /// Pools on different shards can't be put together; see the message.
    #[error(
        "volume {name:?} wants {wanted} replicas, all on pools of one shard number, and none has \
         that many nodes with a pool with free space ({}): delete volumes or add pools",
        nodes_per_shard(usable)
    )]
    NoSpaceOnOneShard { name: String, wanted: u32, usable: BTreeMap<ShardId, u32> },
    /// See the message.
    #[error("volume {volume} does not exist: see `ballastctl volume list`")]
    UnknownVolume { volume: VolumeId },
    /// See the message.
    #[error("volume {name:?} is still being created: try again when it is ready")]
    VolumeNotReady { name: String },
    /// See the message.
    #[error("volume {name:?} is being deleted: create another one")]
    VolumeBeingDeleted { name: String },
    /// See the message.
    #[error(
        "volume {name:?} has {size_bytes} bytes and can't shrink to {asked_bytes}: \
         create a smaller volume and copy"
    )]
    ShrinkRefused { name: String, size_bytes: u64, asked_bytes: u64 },
    /// See the message.
    #[error("{family} does not exist: its volume was deleted")]
    UnknownFamily { family: FamilyId },
    /// See the message.
    #[error("{replica} does not exist: its volume was deleted")]
    UnknownReplica { replica: ReplicaId },
    /// See the message.
    #[error("{replica} is lost: its pool may have forgotten what it acknowledged; remove its data")]
    ReplicaLost { replica: ReplicaId },
    /// See the message.
    #[error("{replica} is to be removed: remove its data and confirm")]
    ReplicaBeingRemoved { replica: ReplicaId },
    /// A node confirmed the removal of a replica that nobody asked it to remove.
    #[error("{replica} is not to be removed: keep its data, and report this as a bug")]
    ReplicaNotRemoving { replica: ReplicaId },
    /// See [`NodeProblem`].
    #[error("{node} can't be registered: {problem}")]
    NodeInvalid { node: NodeId, problem: NodeProblem },
    /// See the message.
    #[error("{node} is {name:?}, not {asked:?}: give one of the two another node id")]
    NodeDiffers { node: NodeId, name: String, asked: String },
    /// See the message.
    #[error("node name {name:?} belongs to {owner}: give {node} another name")]
    NodeNameTaken { node: NodeId, name: String, owner: NodeId },
    /// See the message.
    #[error("{node} can't be registered: the cluster has {limit} nodes, which is its limit")]
    TooManyNodes { node: NodeId, limit: usize },
    /// See the message.
    #[error("{node} is not registered: register it first")]
    UnknownNode { node: NodeId },
    /// See the message.
    #[error("pool {pool} is not known: its node has not reported a start with it")]
    UnknownPool { pool: PoolId },
    /// See the message.
    #[error("boot counter 0 of pool {pool} is not valid: a start raises it to 1 at least")]
    BootCounterInvalid { pool: PoolId },
    /// See the message.
    #[error(
        "{shard} of {node} can't serve pool {pool}: a node has {NODE_SHARDS_MAX} shards at most; \
         configure fewer pools"
    )]
    ShardInvalid { node: NodeId, pool: PoolId, shard: ShardId },
    /// See the message.
    #[error(
        "pool {pool} on {shard} of {node} has a member of the cluster group ({member}), which only \
         pools of shard-0 have: put the node's pools back in their order in the configuration"
    )]
    MemberOnOtherShard { node: NodeId, pool: PoolId, shard: ShardId, member: ReplicaId },
    /// See the message.
    #[error(
        "pool {pool} belongs to {known} of its node and was started on {reported}: put the node's \
         pools back in their order in the configuration"
    )]
    PoolShardDiffers { pool: PoolId, known: ShardId, reported: ShardId },
    /// See the message.
    #[error("pool {pool} belongs to {owner}, not to {node}: move the disk back")]
    PoolOnOtherNode { pool: PoolId, owner: NodeId, node: NodeId },
    /// See the message.
    #[error("pool {pool} was lost and never serves again: make a new pool on its disk")]
    PoolLost { pool: PoolId },
    /// See the message.
    #[error(
        "pool {pool} is not the one that {node} is known by ({known}): if that one is lost, say so \
         with `ballastctl pool replace`, and format this one as it tells you"
    )]
    PoolNotExpected { node: NodeId, pool: PoolId, known: PoolId },
    /// See the message.
    #[error(
        "pool {pool} knows of a start that the cluster does not know ({settled_boot}, the cluster \
         knows {known}): the cluster group went back in time; bring back its nodes"
    )]
    PoolAhead { pool: PoolId, settled_boot: u64, known: u64 },
    /// See the message.
    #[error(
        "{replica} can't be replaced now: it takes a majority of the other replicas to bring back \
         what it held; bring back their nodes"
    )]
    ReplicaNotReplaceable { replica: ReplicaId },
    /// See the message.
    #[error(
        "pool {pool} can't be replaced: {nodes} nodes can't bring back what it held; a cluster of 3 \
         or 5 nodes can"
    )]
    NotReplaceable { pool: PoolId, nodes: usize },
    /// See the message.
    #[error(
        "pool {pool} can't be given up: {left} of the {replicas} replicas of volume {name:?} would be \
         left, which is no majority, and without one nobody can say what it held; bring back its other \
         nodes first, delete the volume, or take its loss by force"
    )]
    PoolHoldsMajority { pool: PoolId, name: String, left: usize, replicas: usize },
    /// See the message.
    #[error(
        "pool {pool} can't be given up: {left} of the {nodes} nodes would be left in the cluster group, \
         which is no majority; bring back the others, or finish replacing their pools, first, or take the \
         loss by force"
    )]
    PoolHoldsClusterMajority { pool: PoolId, left: usize, nodes: usize },
    /// See the message.
    #[error("pool {pool} can't be added: {node} has {NODE_POOLS_MAX} pools, which is its limit")]
    TooManyPools { node: NodeId, pool: PoolId },
    /// See the message.
    #[error(
        "host name {host:?} is not valid: use 1 to {HOST_NAME_BYTES_MAX} of letters, digits, '.', \
         '-' and '_'"
    )]
    HostInvalid { host: String },
    /// See the message.
    #[error(
        "to take a lease of volume {name:?} by force, give a reason of 1 to \
         {LEASE_REASON_BYTES_MAX} bytes without control characters: it is kept with the lease"
    )]
    LeaseReasonInvalid { name: String },
    /// Another host's lease is in the way. `asked` says of what, and so what to do.
    #[error("volume {name:?} is leased to host {host:?} ({mode}): {asked}")]
    VolumeLeased { name: String, host: String, mode: LeaseMode, asked: Leased },
    /// See the message.
    #[error(
        "host {host:?} has a lease of volume {name:?} already, and a different one ({mode}{}): \
         release it first",
        if *read_only { ", read-only" } else { "" }
    )]
    LeaseDiffers { name: String, host: String, mode: LeaseMode, read_only: bool },
    /// See the message.
    #[error(
        "volume {name:?} has {LEASES_PER_VOLUME_MAX} leases, which is the limit: release one first"
    )]
    TooManyLeases { name: String },
    /// See the message.
    #[error(
        "leases of volume {name:?} have changed since the asker looked (revision {now}, not {seen}): \
         look at them again"
    )]
    LeasesMovedOn { name: String, seen: u64, now: u64 },
    /// A refusal that came from the node that leads the cluster group, as it was worded there.
    #[error("{message}")]
    Forwarded { code: RefusalCode, message: String },
}

impl Refusal {
    /// Its kind.
    pub fn code(&self) -> RefusalCode {
        use RefusalCode as Code;
        match self {
            Refusal::VolumeNameInvalid { .. }
            | Refusal::VolumeSizeInvalid { .. }
            | Refusal::ReplicaCountInvalid { .. }
            | Refusal::ShrinkRefused { .. }
            | Refusal::HostInvalid { .. }
            | Refusal::LeaseReasonInvalid { .. }
            | Refusal::NodeInvalid { .. }
            | Refusal::ShardInvalid { .. }
            | Refusal::MemberOnOtherShard { .. }
            | Refusal::BootCounterInvalid { .. } => Code::InvalidArgument,
            Refusal::UnknownVolume { .. }
            | Refusal::UnknownFamily { .. }
            | Refusal::UnknownReplica { .. }
            | Refusal::UnknownNode { .. }
            | Refusal::UnknownPool { .. } => Code::NotFound,
            Refusal::VolumeDiffers { .. }
            | Refusal::VolumeIdTaken { .. }
            | Refusal::LeaseDiffers { .. }
            | Refusal::NodeDiffers { .. }
            | Refusal::NodeNameTaken { .. } => Code::AlreadyExists,
            Refusal::TooFewNodes { .. }
            | Refusal::TooFewUsableNodes { .. }
            | Refusal::TooFewUsableNodesOnOneShard { .. }
            | Refusal::VolumeNotReady { .. }
            | Refusal::VolumeBeingDeleted { .. }
            | Refusal::VolumeLeased { .. }
            | Refusal::ReplicaLost { .. }
            | Refusal::ReplicaBeingRemoved { .. }
            | Refusal::ReplicaNotRemoving { .. }
            | Refusal::PoolOnOtherNode { .. }
            | Refusal::PoolShardDiffers { .. }
            | Refusal::PoolLost { .. }
            | Refusal::PoolNotExpected { .. }
            | Refusal::PoolAhead { .. }
            | Refusal::NotReplaceable { .. }
            | Refusal::PoolHoldsMajority { .. }
            | Refusal::PoolHoldsClusterMajority { .. }
            | Refusal::ReplicaNotReplaceable { .. } => Code::FailedPrecondition,
            Refusal::NoSpace { .. }
            | Refusal::NoSpaceOnOneShard { .. }
            | Refusal::TooManyLeases { .. }
            | Refusal::TooManyNodes { .. }
            | Refusal::TooManyPools { .. } => Code::ResourceExhausted,
            Refusal::LeasesMovedOn { .. } => Code::Aborted,
            Refusal::Forwarded { code, .. } => *code,
        }
    }
}

/// What is wrong with a volume's size.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SizeProblem {
    /// It is 0.
    #[error("it is 0; the smallest volume has {VOLUME_BYTES_MIN} bytes")]
    Zero,
    /// It is not whole blocks.
    #[error("it is not a multiple of {BLOCK_SIZE}")]
    NotWholeBlocks,
    /// It is under the limit.
    #[error("the smallest volume has {VOLUME_BYTES_MIN} bytes")]
    TooSmall,
    /// It is over the limit.
    #[error("the largest volume has {VOLUME_BYTES_MAX} bytes")]
    TooLarge,
}

/// What another host's lease stands in the way of.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Leased {
    /// A lease that can't stand beside it.
    #[error(
        "release it there first (unpublish it), or, if that host is gone or cut off, take it over \
         by force, with a reason"
    )]
    Acquire,
    /// The deletion of the volume.
    #[error(
        "a volume in use is not deleted; release its leases first (see `ballastctl lease list`)"
    )]
    Delete,
}

/// What is wrong with a node's registration.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NodeProblem {
    /// Node ids start at 1.
    #[error("its id is 0; number nodes from 1")]
    IdZero,
    /// Its name is not a DNS subdomain.
    #[error("its name is not a DNS name of 1 to {NODE_NAME_BYTES_MAX} of a-z, 0-9, '-' and '.'")]
    Name,
    /// Its address is not `host:port`.
    #[error("its peer address is not host:port of at most {PEER_ADDRESS_BYTES_MAX} bytes")]
    PeerAddress,
    /// Its labels are too many, too long, or have an empty key.
    #[error(
        "its labels are not at most {NODE_LABELS_MAX}, each with a key that is not empty and at \
         most {LABEL_BYTES_MAX} bytes in key and in value"
    )]
    Labels,
}

fn nodes_per_shard(usable: &BTreeMap<ShardId, u32>) -> String {
    let parts: Vec<String> =
        usable.iter().map(|(shard, nodes)| format!("{shard}: {nodes}")).collect();
    parts.join(", ")
}

fn volume_difference(size: u64, asked_size: u64, replicas: u32, asked_replicas: u32) -> String {
    let mut parts = Vec::new();
    if size != asked_size {
        parts.push(format!("it has {size} bytes, not {asked_size}"));
    }
    if replicas != asked_replicas {
        parts.push(format!("it has {replicas} replicas, not {asked_replicas}"));
    }
    parts.join(", and ")
}
