//! A replica: one family's log, map and state on one pool. Steps 5 (through [`Log`]) and 7 (apply)
//! of a write, and the disk part of a read.
//!
//! Owns what is applied, and which log id it corresponds to. Never decides what an entry means:
//! the layer above decides, then calls one `apply_*` per entry, in log order. Never talks to a
//! peer: damaged blocks are reported, and repaired with bytes that the caller fetched.

use std::rc::Rc;

use ballast_block::{BlockRange, BranchId, FamilyId, Payload, ReplicaId, Sequence};
use ballast_env::Env;
use bytes::Bytes;
use thiserror::Error;

use crate::log::Log;
use crate::pool::{PoolFailure, ReplicaDescriptor};
use crate::types::{LogId, Membership, StoredMembership};

/// One family's copy on this pool. A cheap handle: clones share everything.
pub struct Replica<E: Env> {
    inner: Rc<ReplicaInner<E>>,
}

impl<E: Env> Clone for Replica<E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

pub(crate) struct ReplicaInner<E: Env> {
    never: std::convert::Infallible,
    _env: E,
}

/// Whether a replica's memory of what it acknowledged can be trusted (hazard F6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It holds everything that it ever acknowledged.
    Good,
    /// It may have lost acknowledged entries: it must not vote, campaign or have its acks counted
    /// until [`Replica::clear_suspect`] succeeds.
    Suspect {
        /// Its vote may be lost too: it never becomes good again; replace it under a new id.
        vote_lost: bool,
        /// The highest term that it knows of: only a leader of a newer one can clear it.
        term: u64,
    },
}

/// What the checkpoint had: where apply resumes.
#[derive(Clone, Debug)]
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
    /// [`Replica::repair`] and read again.
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
    /// The pool has no room for it.
    #[error("the pool is too full to resync {0}")]
    Full(ReplicaId),
    /// The new state would be older than what is applied.
    #[error("install at index {install} is behind what is applied, {applied}")]
    Backwards {
        /// Asked for.
        install: u64,
        /// Applied.
        applied: u64,
    },
    /// Reading the map failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The pool stopped.
    #[error(transparent)]
    Pool(#[from] PoolFailure),
}

/// A frozen view of the map: what it shows is not freed until it is dropped.
pub struct Pin<E: Env> {
    replica: Replica<E>,
    applied: Option<LogId>,
    sequence: Sequence,
}

impl<E: Env> Pin<E> {
    /// The replica.
    pub fn replica(&self) -> &Replica<E> {
        &self.replica
    }

    /// The last entry that the view contains.
    pub fn applied(&self) -> Option<LogId> {
        self.applied
    }

    /// The sequence of the view.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }
}

/// A resync on its way into a replica: built aside, switched in by one record (hazard F9). Dropped
/// without [`Resync::install`] it leaves nothing.
pub struct Resync<E: Env> {
    replica: Replica<E>,
}

impl<E: Env> Resync<E> {
    /// The sequence after which changes are wanted: zero for [`ResyncBase::Empty`].
    pub fn since(&self) -> Sequence {
        match self.replica.inner.never {}
    }

    /// Takes some changes, checks their bytes and stores them aside. Returns when the pool has
    /// room for the next (back-pressure). Later changes of a block replace earlier ones.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn put(&self, _records: Vec<DiffRecord>) -> Result<(), ResyncError> {
        match self.replica.inner.never {}
    }

    /// Switches map, applied id, membership, state, purged id and log at once, durably.
    ///
    /// # Errors
    /// [`ResyncError`]; the replica is as before.
    pub async fn install(self, _state: InstallState) -> Result<(), ResyncError> {
        match self.replica.inner.never {}
    }
}

impl<E: Env> Replica<E> {
    /// Its id.
    pub fn id(&self) -> ReplicaId {
        match self.inner.never {}
    }

    /// Its family.
    pub fn family(&self) -> FamilyId {
        match self.inner.never {}
    }

    /// What it was created with.
    pub fn descriptor(&self) -> ReplicaDescriptor {
        match self.inner.never {}
    }

    /// Whether it may vote and have its acks counted.
    pub fn health(&self) -> Health {
        match self.inner.never {}
    }

    /// Makes a suspect good again: `term` is the term of a leader that has brought its log up,
    /// `commit` that leader's commit index. Kept by the next checkpoint.
    ///
    /// # Errors
    /// [`ClearSuspectError`]; it stays suspect.
    pub fn clear_suspect(&self, _term: u64, _commit: u64) -> Result<(), ClearSuspectError> {
        match self.inner.never {}
    }

    /// openraft's log storage of this replica.
    pub fn log(&self) -> Log<E> {
        match self.inner.never {}
    }

    /// What the last checkpoint (or install) had. The log holds the rest.
    pub fn restored(&self) -> Restored {
        match self.inner.never {}
    }

    /// Sets where a checkpoint gets the state of the layer above from: called synchronously, it
    /// answers the state at the last `apply_*` call. Must be set before the first of them.
    pub fn set_state_source(&self, _source: Rc<dyn Fn() -> Bytes>) {
        match self.inner.never {}
    }

    /// Applies the write at `id`: `branch` points at its payload, under `sequence`. Memory only.
    ///
    /// # Panics
    /// When `id` is not a write in the log, or not above what is applied: a bug of the caller.
    pub fn apply_write(&self, _id: LogId, _branch: BranchId, _sequence: Sequence) {
        match self.inner.never {}
    }

    /// Applies a trim at `id`. Memory only, whatever its length.
    pub fn apply_trim(
        &self,
        _id: LogId,
        _branch: BranchId,
        _sequence: Sequence,
        _start: u64,
        _count: u64,
    ) {
        match self.inner.never {}
    }

    /// The layer above refused the entry at `id`: its payload is dead.
    pub fn apply_rejected(&self, _id: LogId) {
        match self.inner.never {}
    }

    /// Applies an entry that has no extents: blank, membership, control. `sequence` is the family's
    /// sequence after it, when it changed.
    pub fn apply_other(
        &self,
        _id: LogId,
        _membership: Option<Membership>,
        _sequence: Option<Sequence>,
    ) {
        match self.inner.never {}
    }

    /// The last entry applied.
    pub fn applied(&self) -> Option<LogId> {
        match self.inner.never {}
    }

    /// The last membership applied.
    pub fn membership(&self) -> StoredMembership {
        match self.inner.never {}
    }

    /// Returns once the map's delta has room: call it before applying more (back-pressure).
    pub async fn map_room(&self) {
        match self.inner.never {}
    }

    /// Reads the newest version of `range` on `branch`, checked.
    ///
    /// # Errors
    /// [`ReadError`]; no byte whose checksum failed is returned (guarantee **checked**).
    pub async fn read(
        &self,
        _branch: BranchId,
        _range: BlockRange,
    ) -> Result<Vec<ReadPart>, ReadError> {
        match self.inner.never {}
    }

    /// Reads `range` as it was on `branch` at `sequence`, which a pin or snapshot must hold.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_at(
        &self,
        _branch: BranchId,
        _sequence: Sequence,
        _range: BlockRange,
    ) -> Result<Vec<ReadPart>, ReadError> {
        match self.inner.never {}
    }

    /// The bytes of exactly that record, for a peer that repairs its own; `None` if this replica
    /// has no such record.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_record(&self, _wanted: DamagedBlock) -> Result<Option<Payload>, ReadError> {
        match self.inner.never {}
    }

    /// Replaces the bytes of a damaged block by `payload` (one block), wherever its record is by
    /// now; nothing happens if it was overwritten meanwhile. Returns when it is readable.
    ///
    /// # Errors
    /// [`RepairError`].
    pub async fn repair(
        &self,
        _damaged: DamagedBlock,
        _payload: Payload,
    ) -> Result<(), RepairError> {
        match self.inner.never {}
    }

    /// Runs of allocated (true) and unallocated blocks that cover `range`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn allocation(
        &self,
        _branch: BranchId,
        _range: BlockRange,
    ) -> Result<Vec<(bool, u32)>, ReadError> {
        match self.inner.never {}
    }

    /// Retained (unpurged) log entries, in bytes on disk: an upper bound.
    pub fn retained_bytes(&self) -> u64 {
        match self.inner.never {}
    }

    /// The log id to purge up to so that at most `bytes` of applied entries stay retained; `None`
    /// when there is nothing to purge. The layer above passes it to openraft's purge trigger.
    pub fn purge_target(&self, _bytes: u64) -> Option<LogId> {
        match self.inner.never {}
    }

    /// Ids of retained entries whose payload is damaged here: fetch them from a peer (hazard 20).
    pub fn damaged_entries(&self) -> Vec<LogId> {
        match self.inner.never {}
    }

    /// Gives a damaged retained entry its payload back. Durable when it returns.
    ///
    /// # Errors
    /// [`RepairError`].
    pub async fn repair_entry(&self, _id: LogId, _payload: Payload) -> Result<(), RepairError> {
        match self.inner.never {}
    }

    /// Freezes a view at what is applied, for a resync of a peer.
    pub fn pin(&self) -> Pin<E> {
        match self.inner.never {}
    }

    /// Changes with a sequence above `since` that `pin` shows, from block `from_block`, at most
    /// about `max_bytes` of payload.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn diff(
        &self,
        _pin: &Pin<E>,
        _since: Sequence,
        _from_block: u64,
        _max_bytes: usize,
    ) -> Result<DiffPage, ReadError> {
        match self.inner.never {}
    }

    /// Starts to bring the replica to a peer's state.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn resync(&self, _base: ResyncBase) -> Result<Resync<E>, ResyncError> {
        match self.inner.never {}
    }
}
