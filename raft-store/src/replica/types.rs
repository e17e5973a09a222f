//! What a replica takes, answers and complains about.

use std::rc::Rc;

use ballast_block::{BranchId, Payload, ReplicaId, Sequence};
use bytes::Bytes;
use thiserror::Error;

use crate::pool::{CheckpointError, PoolFailure};
use crate::types::{LogId, StoredMembership};

/// Whether a replica's memory of what it acknowledged can be trusted (hazard F6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It holds everything that it ever acknowledged.
    Good,
    /// It may have lost acknowledged entries: it must not vote, campaign or have its acks counted
    /// until `Replica::clear_suspect` succeeds.
    Suspect {
        /// Its vote may be lost too: it never becomes good again; replace it under a new id.
        vote_lost: bool,
        /// The highest term that it knows of: only a leader of a newer one can clear it.
        term: u64,
    },
}

/// What the checkpoint had: where apply resumes.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// The last entry that map and state contain.
    pub applied: Option<LogId>,
    /// The last membership applied.
    pub membership: StoredMembership,
    /// The state of the layer above at `applied`; empty if it never gave one.
    pub state: Bytes,
    /// The highest sequence given to an `apply_*` up to `applied`.
    pub sequence: Sequence,
}

/// A piece of a range that was read, in order; pieces cover the range without gaps.
#[derive(Clone, Debug)]
pub struct ReadPart {
    /// Number of blocks.
    pub count: u32,
    /// What they hold.
    pub content: ReadContent,
}

/// What blocks hold.
#[derive(Clone, Debug)]
pub enum ReadContent {
    /// Never written or trimmed: zeroes.
    Hole,
    /// Bytes, checked; block-aligned in memory.
    Data(Payload),
}

/// A block whose bytes on this disk fail their checksum, named so that a peer can give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DamagedBlock {
    /// The branch whose record it is (an ancestor of the branch read, maybe).
    pub branch: BranchId,
    /// The block.
    pub block: u64,
    /// The write that made it.
    pub sequence: Sequence,
    /// The checksum that its bytes must have.
    pub crc: u32,
}

/// A read failed.
#[derive(Clone, Debug, Error)]
pub enum ReadError {
    /// Bytes on this disk are not what was written: fetch them from a peer, then
    /// `Replica::repair` and read again.
    #[error("{} blocks of {replica} are damaged on this disk", blocks.len())]
    Damaged {
        /// Whose.
        replica: ReplicaId,
        /// Which, all that the range has.
        blocks: Vec<DamagedBlock>,
    },
    /// The disk answered with an error that names no block.
    #[error("can't read {replica}: {problem}")]
    Disk {
        /// Whose.
        replica: ReplicaId,
        /// What the disk said.
        problem: String,
    },
    /// The replica was dropped.
    #[error("{0} was dropped")]
    Dropped(ReplicaId),
    /// Its extent map was damaged when the pool was opened.
    #[error("the extent map of {0} can't be read: resync it from nothing")]
    MapLost(ReplicaId),
    /// A difference takes the place of what it replaces, and is not whole yet.
    #[error("{0} is being brought up in place: its blocks are of different moments")]
    Mixed(ReplicaId),
    /// The difference reaches too far back: what was trimmed since is forgotten.
    #[error("no difference since {since} any more, only since {floor}: resync from nothing")]
    DiffTooOld {
        /// What was asked for.
        since: Sequence,
        /// The oldest that can be answered.
        floor: Sequence,
    },
    /// The pool stopped.
    #[error(transparent)]
    Pool(#[from] PoolFailure),
}

/// A repair was refused or failed.
#[derive(Clone, Debug, Error)]
pub enum RepairError {
    /// The bytes given are not what was written.
    #[error("bytes given to repair block {block} do not have its checksum")]
    WrongBytes {
        /// The block.
        block: u64,
    },
    /// The bytes given are not those of the entry.
    #[error("bytes given to repair log entry {index} do not have its checksums")]
    WrongEntry {
        /// Its index.
        index: u64,
    },
    /// Reading the map failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The pool stopped.
    #[error(transparent)]
    Pool(#[from] PoolFailure),
}

/// Why a suspect stays one.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ClearSuspectError {
    /// Its vote may be lost.
    #[error("the vote of {0} may be lost: replace it by a replica with a new id")]
    VoteLost(ReplicaId),
    /// Its extent map is lost.
    #[error("the extent map of {0} can't be read: resync it from nothing first")]
    MapLost(ReplicaId),
    /// The leader's term is not newer than what the replica knew when it was opened.
    #[error("a leader of a term above {known} must bring it up; this one has {term}")]
    OldTerm {
        /// The leader's term.
        term: u64,
        /// The replica's.
        known: u64,
    },
    /// Its durable log does not reach the leader's commit index yet.
    #[error("the durable log reaches {durable:?}, not yet the leader's commit {commit}")]
    Behind {
        /// Index of the last durable entry.
        durable: Option<u64>,
        /// The leader's commit index.
        commit: u64,
    },
}

/// A change of a block or of a run of blocks with consecutive numbers, all made by one write.
#[derive(Clone, Debug, PartialEq)]
pub struct DiffRecord {
    /// The branch.
    pub branch: BranchId,
    /// First block.
    pub start: u64,
    /// Number of blocks; for a hole it may be the whole volume.
    pub count: u64,
    /// The write or trim that made it.
    pub sequence: Sequence,
    /// What the blocks hold since.
    pub change: DiffChange,
}

/// What blocks hold since a change.
#[derive(Clone, Debug, PartialEq)]
pub enum DiffChange {
    /// Trimmed.
    Hole,
    /// Written: one checksum per block, and the bytes.
    Data {
        /// One CRC-32 per block.
        crcs: Rc<[u32]>,
        /// The bytes, checked.
        payload: Payload,
    },
}

/// Some of a difference, ordered by block.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DiffPage {
    /// The changes.
    pub records: Vec<DiffRecord>,
    /// The block to ask from next; `None` when this was the last page.
    pub next: Option<u64>,
}

/// What a resync builds on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResyncBase {
    /// What the replica has applied: only changes since then are put.
    Applied,
    /// Nothing: everything is put. For a fresh replica, or one whose map is lost.
    Empty,
    /// As `Applied`, but each change takes the place of what it replaces at once, because the pool has
    /// no room for both. From the first change on the replica is mixed ([`Replica::is_mixed`]) until
    /// it has applied this sequence, that of the state which is put; crash or not.
    ///
    /// [`Replica::is_mixed`]: crate::replica::Replica::is_mixed
    InPlace(Sequence),
}

/// The state that an install switches to.
#[derive(Clone, Debug)]
pub struct InstallState {
    /// The last entry that the state contains; the log is purged up to it, and truncated if it
    /// does not contain it.
    pub applied: LogId,
    /// The membership at `applied`.
    pub membership: StoredMembership,
    /// State of the layer above at `applied`.
    pub state: Bytes,
    /// The family's sequence at `applied`.
    pub sequence: Sequence,
}

/// A resync failed; what was put is dropped.
#[derive(Clone, Debug, Error)]
pub enum ResyncError {
    /// Another one runs on the replica.
    #[error("{0} is being resynced already")]
    Running(ReplicaId),
    /// The bytes of a record do not have its checksum.
    #[error("resync record at block {block} is damaged in transfer")]
    WrongBytes {
        /// The block.
        block: u64,
    },
    /// The pool has no room for it; put aside, it may have some in place.
    #[error("the pool has no room for what {0} lacks")]
    Full(ReplicaId),
    /// A change is later than the state that is put.
    #[error("resync record at block {block} is of {sequence}, behind the {upto} announced")]
    TooLate {
        /// The block.
        block: u64,
        /// The change's.
        sequence: Sequence,
        /// The state's.
        upto: Sequence,
    },
    /// The new state would be older than what is applied.
    #[error("install at index {install} is behind what is applied, {applied}")]
    Backwards {
        /// Asked for.
        install: u64,
        /// Applied.
        applied: u64,
    },
    /// The changes could not be made durable.
    #[error("resync stopped: {0}")]
    Checkpoint(String),
    /// Reading the map failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The pool stopped.
    #[error(transparent)]
    Pool(#[from] PoolFailure),
}

impl From<CheckpointError> for ResyncError {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Pool(failure) => ResyncError::Pool(failure),
            other => ResyncError::Checkpoint(other.to_string()),
        }
    }
}
