//! What the state consists of, as plain types. Their replicated form is in `wire`.

use std::collections::BTreeMap;

use ballast_block::{Epoch, FamilyId, NodeId, PoolId, ReplicaId, ShardId, VolumeId};

/// A storage node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its name: in Kubernetes, the node's name. Never changes for an id.
    pub name: String,
    /// Where its peers reach it: `host:port`.
    pub peer_address: String,
    /// Topology and whatever else the administrator says of it.
    pub labels: BTreeMap<String, String>,
    /// How far it got.
    pub state: NodeState,
    /// The id of its member in the cluster group, where that is not its number: the node has lost
    /// its first pool.
    pub member: Option<ReplicaId>,
    /// Its pool was given up, and no pool with the new `member` was seen yet.
    pub replacing: bool,
}

impl Node {
    /// The id of its member in the cluster group.
    pub fn cluster_member(&self) -> ReplicaId {
        self.member.unwrap_or(ReplicaId(u64::from(self.id.0)))
    }
}

/// How far a node got. Whether it is alive now is not replicated: that is for its peers to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Known by name, has never started with a pool.
    Registered,
    /// Has started with a pool at least once.
    Active,
}

/// A pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its id, from its superblock.
    pub id: PoolId,
    /// The node it lies on.
    pub node: NodeId,
    /// The node's shard that serves it, as at its first start. Never changes.
    pub shard: ShardId,
    /// The start counter of its superblock, as last accepted. Only grows.
    pub boot_counter: u64,
    /// The process that reported that start; tells a repeated report from a second start.
    pub incarnation: u64,
    /// The mark that was last accepted for it: a pool that has it neither as settled nor as offered
    /// went back in time (hazard F5). 0 = none: an older program reported it.
    pub mark: u64,
    /// Its size and use, as last reported.
    pub space: PoolSpace,
    /// Whether it may be used.
    pub state: PoolState,
}

/// Size and use of a pool, coarse: for placement and for people, not for admission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolSpace {
    /// Bytes that volumes can ever use: reserves are subtracted.
    pub capacity_bytes: u64,
    /// Bytes of these that can't be given to new writes now.
    pub used_bytes: u64,
}

impl PoolSpace {
    /// Bytes left.
    pub fn free_bytes(&self) -> u64 {
        self.capacity_bytes.saturating_sub(self.used_bytes)
    }

    /// Whether `now` differs enough from what was last reported to be worth a replicated command:
    /// by 1/64 of the capacity, or the pool has just become full or stopped being so.
    pub fn worth_reporting(&self, now: &PoolSpace) -> bool {
        self.capacity_bytes != now.capacity_bytes
            || self.used_bytes.abs_diff(now.used_bytes) >= (now.capacity_bytes / 64).max(1)
            || (self.free_bytes() == 0) != (now.free_bytes() == 0)
    }
}

/// Whether a pool may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolState {
    /// Works.
    Ok,
    /// Its last write failed or was overdue. Its replicas keep their ids: it may come back.
    Failed,
    /// Gone, or may have forgotten what it acknowledged: it and its replicas never serve again.
    Lost,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its id; NVMe NQN and NGUID derive from it.
    pub id: VolumeId,
    /// Its name: unique among the volumes that are not being deleted.
    pub name: String,
    /// Its size in bytes: whole blocks.
    pub size_bytes: u64,
    /// The size that it was created with: every replica starts from it, also one that is made long
    /// after, or it would decide otherwise on what the log holds.
    pub founded_bytes: u64,
    /// Its family: the Raft group that replicates it.
    pub family: FamilyId,
    /// The shard, on every node, that its replicas' pools belong to. Never changes.
    pub shard: ShardId,
    /// How many replicas it is to have.
    pub replica_count: u32,
    /// Its replicas, lost ones included, in rising order.
    pub replicas: Vec<ReplicaId>,
    /// When its creation was asked for, milliseconds since 1970 by the proposer's wall clock.
    pub created_at_ms: u64,
    /// How far it got.
    pub phase: VolumePhase,
    /// Who may use it, by host.
    pub leases: Vec<Lease>,
    /// The epoch of its last lease; 0 = it never had one. Only grows.
    pub last_epoch: Epoch,
    /// Raised with every change of `leases`, so that of two copies the newer one is known, and by a
    /// release that names it.
    pub lease_revision: u64,
}

impl Volume {
    /// The lease of a host.
    pub fn lease(&self, host: &str) -> Option<&Lease> {
        self.leases.iter().find(|lease| lease.host == host)
    }

    /// The lease with that epoch.
    pub fn lease_of_epoch(&self, epoch: Epoch) -> Option<&Lease> {
        self.leases.iter().find(|lease| lease.epoch == epoch)
    }
}

/// Which host may use a volume, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The host: in Kubernetes, the node that the pod runs on.
    pub host: String,
    /// In which way, and beside whom.
    pub mode: LeaseMode,
    /// Whether its writes are refused.
    pub read_only: bool,
    /// Names the lease in the whole cluster, for ever, also when its volume is gone: a later one, of
    /// whichever volume, has a higher epoch. What programs before reader version 6 gave out is unique
    /// within its volume.
    pub epoch: Epoch,
    /// When it was asked for, milliseconds since 1970 by the proposer's wall clock. For people only.
    pub acquired_at_ms: u64,
    /// Why it was taken by force; else empty.
    pub reason: String,
}

/// What a lease is for. Only leases of one of the last two modes may stand beside each other, and
/// only with their like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeaseMode {
    /// One host, one use of it there.
    SingleNodeWriter,
    /// One host, several uses of it there.
    SingleNodeMultiWriter,
    /// One host, and one publish target on it: ReadWriteOncePod.
    SingleNodePublisher,
    /// Many hosts that read. Always read-only.
    Readers,
    /// Many hosts that write: raw blocks only, they must agree among themselves.
    Writers,
}

impl LeaseMode {
    /// Whether several hosts may have a lease of this mode at a time.
    pub fn is_shared(self) -> bool {
        matches!(self, LeaseMode::Readers | LeaseMode::Writers)
    }

    /// Whether a lease of this mode may stand beside another host's of that mode.
    pub fn goes_with(self, other: LeaseMode) -> bool {
        self == other && self.is_shared()
    }

    /// Its name, for people and for the command line.
    pub fn name(self) -> &'static str {
        match self {
            LeaseMode::SingleNodeWriter => "single-node-writer",
            LeaseMode::SingleNodeMultiWriter => "single-node-multi-writer",
            LeaseMode::SingleNodePublisher => "single-node-publisher",
            LeaseMode::Readers => "readers",
            LeaseMode::Writers => "writers",
        }
    }
}

impl std::fmt::Display for LeaseMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a volume got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumePhase {
    /// Placed; its Raft group is not formed yet.
    Creating,
    /// Its Raft group was formed: it can be used.
    Ready,
    /// Its data is being removed; its name is free again.
    Deleting,
}

/// A replica: one node's copy of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Its id, which is its Raft member id too.
    pub id: ReplicaId,
    /// Its family.
    pub family: FamilyId,
    /// The node it lies on.
    pub node: NodeId,
    /// The pool it lies in.
    pub pool: PoolId,
    /// How far it got.
    pub state: ReplicaState,
}

/// How far a replica got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    /// Its node is to make it.
    Creating,
    /// It exists in its pool.
    Ready,
    /// Its pool was lost. It never votes again.
    Lost,
    /// Its node is to remove it, then to confirm.
    Removing,
    /// Its pool confirmed the removal. Kept until all replicas of the family got here, so that a
    /// node that was away learns of the removal.
    Removed,
}
