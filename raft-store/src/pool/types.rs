//! What a pool takes, answers and complains about.

use ballast_block::{ClusterId, FamilyId, NodeId, PoolId, ReplicaId, VolumeId};
use bytes::Bytes;
use thiserror::Error;

use crate::stream::{CommitCheckpointError, OpenStoreError, PoolFailed};

/// How to make a pool.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// The cluster that the pool belongs to.
    pub cluster: ClusterId,
    /// The node that the pool belongs to.
    pub node: NodeId,
    /// `Some(bytes)`: create a regular file of that size, which must not exist.
    /// `None`: use an existing file or device as it is.
    pub create: Option<u64>,
    /// Format although the first MiB holds something that is not a Ballast pool. A Ballast pool is
    /// never formatted again, whatever this says.
    pub overwrite_foreign: bool,
}

/// What the opener expects to find: anything else is refused (hazard F5).
#[derive(Clone, Debug)]
pub struct PoolExpectation {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// The pool, where it is known.
    pub pool: Option<PoolId>,
}

/// What opening found and did.
#[derive(Clone, Debug, Default)]
pub struct RecoveryReport {
    /// Replicas on the pool.
    pub replicas: usize,
    /// Records replayed since the last checkpoint.
    pub replayed_records: u64,
    /// Bytes of log read to replay them.
    pub replayed_bytes: u64,
    /// A torn, never acknowledged tail was dropped.
    pub torn_tail: bool,
    /// Replicas that may have lost something that they acknowledged (hazard F6): see
    /// `Replica::health`.
    pub suspects: Vec<ReplicaId>,
    /// Log entries that are known but whose payload is damaged on this disk, all replicas.
    pub damaged_entries: u64,
}

/// What identifies a replica and what the layer above wants kept with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaDescriptor {
    /// The replica: also its Raft member id.
    pub replica: ReplicaId,
    /// Its family; [`FamilyId::CLUSTER`] for the cluster group.
    pub family: FamilyId,
    /// The volume that founded the family; zero for the cluster group.
    pub volume: VolumeId,
    /// Bytes of the layer above, in its own versioned encoding; at most
    /// [`DESCRIPTOR_BYTES_MAX`].
    pub bytes: Bytes,
}

/// Largest descriptor of the layer above, in bytes: it travels in one record header.
pub const DESCRIPTOR_BYTES_MAX: usize = 1024;

/// Space of a pool, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// All segments of the pool.
    pub total: u64,
    /// What may live on the pool, data and map: the rest is what makes overwriting it go on for
    /// ever (docs/disk-format.md, "Space").
    pub capacity: u64,
    /// In segments that hold live blocks, retained entries or dead ones not cleaned yet, or are being
    /// written.
    pub used: u64,
    /// Live blocks; exact at a quiet point (after the map's delta is merged), an upper bound
    /// otherwise.
    pub live: u64,
    /// Capacity that nothing lives in: what is shown as free.
    pub free: u64,
}

/// What leaders may count on (hazard F11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Bytes that can be appended at once: in free segments beyond all reserves. 0 = wait for the
    /// keeper.
    pub credit: u64,
    /// What lives is as much as the pool takes: waiting does not help, trims and deletes do.
    pub full: bool,
}

/// Why a replica takes no more work.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PoolFailure {
    /// The pool failed or was closed; its replicas are gone from this process until it is opened
    /// again.
    #[error(transparent)]
    Failed(#[from] PoolFailed),
    /// The replica was dropped.
    #[error("{0} was dropped")]
    ReplicaDropped(ReplicaId),
}

/// Formatting a pool was refused or failed.
#[derive(Debug, Error)]
pub enum FormatPoolError {
    /// The disk answered with an error.
    #[error("can't format pool: {0}")]
    Io(#[from] std::io::Error),
    /// There is, or was, a pool.
    #[error(
        "{path} holds a Ballast pool: it is never formatted again; wipe it by hand to reuse it"
    )]
    HoldsPool {
        /// The file or device.
        path: String,
    },
    /// There is something else.
    #[error("{path} is not empty; pass the overwrite option to destroy what it holds")]
    HoldsForeignData {
        /// The file or device.
        path: String,
    },
    /// Too small.
    #[error("{size} bytes are too few for a pool; the least is {least}")]
    TooSmall {
        /// Its size in bytes.
        size: u64,
        /// Least size in bytes.
        least: u64,
    },
}

/// Opening a pool was refused or failed.
#[derive(Debug, Error)]
pub enum OpenPoolError {
    /// Its streams could not be recovered, or it is not the pool that was expected.
    #[error(transparent)]
    Store(#[from] OpenStoreError),
    /// What the checkpoint or the log says can't be understood.
    #[error("pool refused: {0}")]
    Refused(String),
}

/// Creating a replica was refused or failed.
#[derive(Debug, Error)]
pub enum CreateReplicaError {
    /// The id exists, or existed once: ids are never used twice (hazard F5).
    #[error("{0} exists or existed on this pool: allocate a new replica id")]
    SeenBefore(ReplicaId),
    /// Every slot of the vote table is taken, or there are as many as fit a checkpoint's body.
    #[error("the pool holds {0} replicas, its most: use another pool, or a larger one")]
    TooMany(usize),
    /// The descriptor is longer than a record holds.
    #[error("replica descriptor of {0} bytes is longer than {DESCRIPTOR_BYTES_MAX}")]
    DescriptorTooLong(usize),
    /// The pool stopped.
    #[error(transparent)]
    Pool(#[from] PoolFailure),
}

/// Dropping a replica failed.
#[derive(Debug, Error)]
pub enum DropReplicaError {
    /// There is no such replica here.
    #[error("{0} is not on this pool")]
    NotHere(ReplicaId),
    /// The pool stopped.
    #[error(transparent)]
    Pool(#[from] PoolFailure),
}

/// A checkpoint could not be made durable.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The pool stopped.
    #[error(transparent)]
    Pool(#[from] PoolFailure),
    /// The body could not be written.
    #[error(transparent)]
    Commit(CommitCheckpointError),
    /// A map could not be written or merged.
    #[error("map of {replica}: {problem}")]
    Map {
        /// Whose map.
        replica: ReplicaId,
        /// What failed.
        problem: String,
    },
}

impl From<CommitCheckpointError> for CheckpointError {
    fn from(error: CommitCheckpointError) -> Self {
        match error {
            CommitCheckpointError::PoolFailed(failed) => Self::Pool(failed.into()),
            other => Self::Commit(other),
        }
    }
}

/// Counters and gauges of a pool, for metrics. Counters count since the pool was opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolStats {
    /// Space.
    pub space: Space,
    /// Segments, all and free.
    pub segments: u64,
    /// Free segments.
    pub segments_free: u64,
    /// Bytes written for log entries, payload and headers.
    pub log_bytes_written: u64,
    /// Disk writes that carried them.
    pub log_writes: u64,
    /// Bytes that the cleaner moved.
    pub cleaner_bytes_moved: u64,
    /// Segments that the cleaner emptied.
    pub cleaner_segments: u64,
    /// Checkpoints made.
    pub checkpoints: u64,
    /// Log since the recovery start, in bytes.
    pub log_since_checkpoint: u64,
    /// Retained log entries, all replicas, in bytes.
    pub retained_bytes: u64,
    /// What they may be at most; fewer while free segments are few.
    pub retention_limit: u64,
    /// Segments of map pages.
    pub meta_segments: u64,
    /// Payload held by the log cache, in bytes.
    pub cache_bytes: u64,
    /// Appended and not yet durable, all streams, in bytes.
    pub pending_bytes: u64,
    /// Unmerged changes of all maps, in bytes.
    pub map_delta_bytes: u64,
    /// Blocks whose checksum failed.
    pub damaged_blocks: u64,
    /// Pages of extent maps that failed theirs: their replicas are to be replaced.
    pub damaged_pages: u64,
    /// Headers of batches and segments that recovery found damaged.
    pub damaged_headers: u64,
    /// Superblocks that opening the pool found damaged, and wrote anew.
    pub damaged_superblocks: u64,
    /// Vote slots that recovery found damaged.
    pub damaged_votes: u64,
    /// Blocks repaired.
    pub repaired_blocks: u64,
    /// Replicas that are suspect.
    pub suspects: u64,
}
