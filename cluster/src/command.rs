//! What can be asked of the cluster group, and its replicated form.

use std::collections::BTreeMap;

use ballast_block::{Epoch, FamilyId, NodeId, PoolId, ReplicaId, ShardId, VolumeId};
use prost::Message;
use thiserror::Error;

use crate::view::{LeaseMode, PoolSpace, PoolState};
use crate::wire::{CommandKind, CommandRecord};

/// The newest commands and states that this build understands.
pub const READER_VERSION: u32 = 6;

/// One entry of the cluster group's log. Each may be applied twice: the second time changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Make a node known, or change its address and labels. Same id and name = the same node.
    RegisterNode(RegisterNode),
    /// A node's process opened a pool, before it uses any replica of it.
    NodeBooted(NodeBooted),
    /// Give up a node's pool and let a freshly made one take its place. The pool named is lost from
    /// then on. Asked again with the same pool = the same answer. One of shard 0 takes a member of
    /// the cluster group with it: its successor needs the new one that is answered.
    ReplacePool {
        /// Whose.
        node: NodeId,
        /// The pool that is given up.
        pool: PoolId,
        /// Refused if a volume, or the cluster group, has no majority without it. Not set: somebody
        /// takes that loss on purpose; and so did every build before reader version 5.
        guarded: bool,
    },
    /// A replica can't be mended: its vote or its extent map is lost. One with a new id takes its
    /// place in the same pool. One that was replaced is no change.
    ReplaceReplica {
        /// Which.
        replica: ReplicaId,
    },
    /// A pool's use or health changed.
    ReportPool {
        /// Which.
        pool: PoolId,
        /// Its size and use now.
        space: PoolSpace,
        /// Its health now. `Lost` is final and loses its replicas.
        state: PoolState,
    },
    /// Create a volume and place its replicas. Same name, size and replica count = the same volume.
    CreateVolume(CreateVolume),
    /// A node has made a replica in its pool.
    ReplicaReady {
        /// Which.
        replica: ReplicaId,
    },
    /// The Raft group of a family was initialised.
    FamilyFormed {
        /// Which.
        family: FamilyId,
    },
    /// Grow a volume. The size it has already is no change.
    ResizeVolume {
        /// Which.
        volume: VolumeId,
        /// Its new size in bytes.
        size_bytes: u64,
    },
    /// Delete a volume that nobody has a lease of. One that is gone is no change.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
    },
    /// A pool holds nothing of a removed replica any more.
    ReplicaRemoved {
        /// Which.
        replica: ReplicaId,
    },
    /// Let a host use a volume. Same host, mode and access = the same lease.
    AcquireLease(AcquireLease),
    /// A host does not use a volume any more. What is not there is no change, nor is a lease that is
    /// not the one named: a release that comes late must not end a later lease.
    ReleaseLease {
        /// Of which volume.
        volume: VolumeId,
        /// Whose.
        host: String,
        /// Which one; 0 = whichever the host has.
        epoch: Epoch,
        /// The [`crate::Volume::lease_revision`] that the asker goes by: where it has moved on, nothing
        /// is done, else it moves on, also when there is nothing to end. So of what was asked before,
        /// nothing is granted after. None = end it whatever happened meanwhile.
        seen_revision: Option<u64>,
    },
}

/// See [`Command::RegisterNode`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterNode {
    /// Its number, from 1.
    pub node: NodeId,
    /// Its name: a DNS subdomain.
    pub name: String,
    /// Where peers reach it: `host:port`.
    pub peer_address: String,
    /// Topology and the like.
    pub labels: BTreeMap<String, String>,
}

/// See [`Command::NodeBooted`].
///
/// A counter that is not newer than the one known says that the pool's contents went back in time
/// (hazard F5): the pool and its replicas are lost. So that a *repeated* report is not taken for
/// that, it names its process. And a report of an earlier process may arrive after the one of a
/// later: so it is first answered with what is known, and only a process that is alive to repeat
/// that ([`NodeBooted::told`]) loses its pool.
///
/// The counter alone is not enough: it grows with each start, also of a pool that was refused. The
/// marks do not: see [`crate::view::Pool::mark`] and docs/disk-format.md.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeBooted {
    /// The node.
    pub node: NodeId,
    /// Its pool.
    pub pool: PoolId,
    /// The node's shard that serves the pool.
    pub shard: ShardId,
    /// The counter that this start wrote to the pool's superblocks, from 1.
    pub boot_counter: u64,
    /// Random, drawn once per process start.
    pub incarnation: u64,
    /// The pool's size and use.
    pub space: PoolSpace,
    /// The last mark that the pool knows to be accepted; 0 = none.
    pub settled: u64,
    /// The boot counter of the start that was accepted with it.
    pub settled_boot: u64,
    /// The mark that it offers; 0 = an older program reports.
    pub offered: u64,
    /// The pool's member of the cluster group, if it has one: only pools of shard 0 do.
    pub member: Option<ReplicaId>,
    /// The start that this process was told is known of its pool: it is alive after that one.
    pub told: Option<PoolStart>,
}

/// A start of a pool by a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolStart {
    /// The counter that it wrote to the pool's superblocks, from 1.
    pub boot_counter: u64,
    /// Random, drawn once per process start.
    pub incarnation: u64,
}

/// See [`Command::CreateVolume`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateVolume {
    /// Random, drawn by the proposer; unused when the volume exists.
    pub volume: VolumeId,
    /// A DNS label.
    pub name: String,
    /// Size in bytes: whole blocks.
    pub size_bytes: u64,
    /// 1, 3 or 5.
    pub replicas: u32,
    /// The proposer's wall clock, milliseconds since 1970. For people only.
    pub created_at_ms: u64,
    /// Nodes where replicas are to lie if a pool there has room, the most wanted first. A wish: never
    /// a reason to refuse, and no part of what makes a volume the same.
    pub preferred: Vec<NodeId>,
    /// Nodes that did not answer when the volume was asked for: they get a replica only where there
    /// are not enough others.
    pub absent: Vec<NodeId>,
}

/// See [`Command::AcquireLease`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcquireLease {
    /// Of which volume.
    pub volume: VolumeId,
    /// Who is to use it.
    pub host: String,
    /// How, and beside whom.
    pub mode: LeaseMode,
    /// Whether its writes are to be refused. Readers never write, whatever this says.
    pub read_only: bool,
    /// Take it from the hosts that stand in the way.
    pub force: bool,
    /// Why by force; means nothing without.
    pub reason: String,
    /// The proposer's wall clock, milliseconds since 1970. For people only.
    pub at_ms: u64,
    /// Whether its epoch is unique in the whole cluster, as every program since reader version 6 asks.
    /// An entry of an earlier one is applied as that would: with the next epoch of its volume.
    pub unique_epoch: bool,
    /// The [`crate::Volume::lease_revision`] that the asker goes by: where it has moved on, nothing is
    /// granted. So what comes late, when its asker has gone and others came, does nothing. None = grant
    /// it whatever happened meanwhile.
    pub seen_revision: Option<u64>,
}

/// Bytes of the log that are not a command this build can apply.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CommandError {
    /// A newer build wrote it. The replica must halt, not skip it.
    #[error(
        "cluster command needs reader version {needs}, this build has {READER_VERSION}: \
         upgrade this node"
    )]
    TooNew {
        /// The version it needs.
        needs: u32,
    },
    /// Not a command.
    #[error("cluster command is malformed ({0}): the log entry is damaged")]
    Malformed(&'static str),
    /// Not even protobuf.
    #[error("cluster command is not valid protobuf ({0}): the log entry is damaged")]
    NotProtobuf(#[from] prost::DecodeError),
}

impl Command {
    /// Its name, for logs and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Command::RegisterNode(_) => "register-node",
            Command::NodeBooted(_) => "node-booted",
            Command::ReplacePool { .. } => "replace-pool",
            Command::ReplaceReplica { .. } => "replace-replica",
            Command::ReportPool { .. } => "report-pool",
            Command::CreateVolume(_) => "create-volume",
            Command::ReplicaReady { .. } => "replica-ready",
            Command::FamilyFormed { .. } => "family-formed",
            Command::ResizeVolume { .. } => "resize-volume",
            Command::DeleteVolume { .. } => "delete-volume",
            Command::ReplicaRemoved { .. } => "replica-removed",
            Command::AcquireLease(_) => "acquire-lease",
            Command::ReleaseLease { .. } => "release-lease",
        }
    }

    /// The oldest reader version that applies it as meant. A command whose meaning changes gets a
    /// higher one: a node that is older halts when it meets one. Nothing keeps a newer node from proposing
    /// it before all others are new (docs/guide/install.md, "Update").
    pub fn min_reader(&self) -> u32 {
        match self {
            Command::AcquireLease(it) if it.unique_epoch || it.seen_revision.is_some() => 6,
            Command::ReleaseLease { seen_revision: Some(_), .. } => 6,
            Command::AcquireLease(_) | Command::ReleaseLease { .. } => 4,
            Command::CreateVolume(it) if !it.absent.is_empty() => 5,
            Command::CreateVolume(it) if !it.preferred.is_empty() => 4,
            Command::NodeBooted(it) if it.shard != ShardId(0) || it.told.is_some() => 3,
            Command::NodeBooted(it) if it.offered != 0 || it.member.is_some() => 2,
            Command::ReplacePool { guarded: true, .. } => 5,
            Command::ReplacePool { .. } | Command::ReplaceReplica { .. } => 2,
            _ => 1,
        }
    }

    /// Its replicated form.
    pub fn encode(&self) -> Vec<u8> {
        let record =
            CommandRecord { min_reader: self.min_reader(), kind: Some(CommandKind::from(self)) };
        record.encode_to_vec()
    }

    /// From its replicated form.
    ///
    /// # Errors
    /// [`CommandError::TooNew`] for one of a newer build, the others for damage.
    pub fn decode(bytes: &[u8]) -> Result<Self, CommandError> {
        let record = CommandRecord::decode(bytes)?;
        if record.min_reader > READER_VERSION {
            return Err(CommandError::TooNew { needs: record.min_reader });
        }
        let kind = record.kind.ok_or(CommandError::Malformed("its kind is unknown"))?;
        Command::try_from(kind)
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
