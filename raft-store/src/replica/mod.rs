//! A replica: one family's log, map and state on one pool. Steps 5 (through [`Log`]) and 7 (apply)
//! of a write, and the disk part of a read.
//!
//! Owns what is applied, and which log id it corresponds to. Never decides what an entry means:
//! the layer above decides, then calls one `apply_*` per entry, in log order. Never talks to a
//! peer: damaged blocks are reported, and repaired with bytes that the caller fetched.

mod apply;
pub(crate) mod core;
mod install;
pub(crate) mod record;
mod repair;
pub(crate) mod resync;
pub(crate) mod saved;
mod transfer;
mod types;

use std::rc::Rc;

use ballast_block::{BlockRange, BranchId, FamilyId, Payload, ReplicaId, Sequence};
use ballast_env::Env;
use bytes::Bytes;

pub use resync::Resync;
pub use transfer::Pin;
pub use types::{
    ClearSuspectError, DamagedBlock, DiffChange, DiffPage, DiffRecord, Health, InstallState,
    ReadContent, ReadError, ReadPart, RepairError, Restored, ResyncBase, ResyncError,
};

use crate::log::Log;
use crate::map::RunContent;
use crate::pool::{PoolFailure, ReplicaDescriptor};
use crate::types::{Entry, LogId, Membership, StoredMembership};
use core::ReplicaInner;

/// One family's copy on this pool. A cheap handle: clones share everything.
pub struct Replica<E: Env> {
    pub(crate) inner: Rc<ReplicaInner<E>>,
}

impl<E: Env> Clone for Replica<E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<E: Env> Replica<E> {
    /// Its id.
    pub fn id(&self) -> ReplicaId {
        self.inner.descriptor.replica
    }

    /// Its family.
    pub fn family(&self) -> FamilyId {
        self.inner.descriptor.family
    }

    /// What it was created with.
    pub fn descriptor(&self) -> ReplicaDescriptor {
        self.inner.descriptor.clone()
    }

    /// Whether it may vote and have its acks counted.
    pub fn health(&self) -> Health {
        self.inner.health.borrow().clone()
    }

    /// Whether an installed difference still moves into the map: until it has, the map is older than
    /// what is applied.
    pub fn is_draining(&self) -> bool {
        self.inner.resync.borrow().as_ref().is_some_and(|resync| resync.installed.get())
    }

    /// Whether the extent map can't be read: reads fail, and only a resync from
    /// [`ResyncBase::Empty`] helps. The replica is a suspect until then.
    pub fn map_lost(&self) -> bool {
        self.inner.map_lost.get()
    }

    /// Whether a difference has begun to take the place of what it replaces, and neither its install
    /// nor the log has brought the replica to the end of it: blocks are of different moments, and
    /// reads are refused. It votes and acknowledges like any other: its log and votes are whole, and
    /// nobody is elected who has applied less than the difference.
    pub fn is_mixed(&self) -> bool {
        self.inner.is_mixed()
    }

    /// Whether it lacks a difference for which its pool has no room.
    pub fn is_cramped(&self) -> bool {
        self.inner.cramped_at.get() == Some(self.inner.progress())
    }

    /// Makes a suspect good again: `term` is the term of a leader that has brought its log up,
    /// `commit` that leader's commit index. A record says so; without it, after a crash, the replica
    /// is suspect again.
    ///
    /// # Errors
    /// [`ClearSuspectError`]; it stays suspect.
    pub fn clear_suspect(&self, term: u64, commit: u64) -> Result<(), ClearSuspectError> {
        let mut health = self.inner.health.borrow_mut();
        let Health::Suspect { vote_lost, term: known } = *health else { return Ok(()) };
        if vote_lost {
            return Err(ClearSuspectError::VoteLost(self.id()));
        }
        if self.inner.map_lost.get() {
            return Err(ClearSuspectError::MapLost(self.id()));
        }
        if term <= known {
            return Err(ClearSuspectError::OldTerm { term, known });
        }
        let durable = self.inner.durable.get().map(|id| id.index);
        if durable < Some(commit) {
            return Err(ClearSuspectError::Behind { durable, commit });
        }
        *health = Health::Good;
        self.inner.append_cleared();
        Ok(())
    }

    /// openraft's log storage of this replica.
    pub fn log(&self) -> Log<E> {
        Log::new(self.clone())
    }

    /// Waits until all that is in its log now is durable. Answers whether anything is.
    ///
    /// # Errors
    /// [`PoolFailure`].
    pub async fn settle_log(&self) -> Result<bool, PoolFailure> {
        self.inner.settle_log().await
    }

    /// What the last checkpoint (or install) had. The log holds the rest.
    pub fn restored(&self) -> Restored {
        self.inner.restored.borrow().clone()
    }

    /// Sets where a checkpoint gets the state of the layer above from: called synchronously, it
    /// answers the state at the last `apply_*` call. Must be set before the first of them.
    pub fn set_state_source(&self, source: Rc<dyn Fn() -> Bytes>) {
        *self.inner.state_source.borrow_mut() = Some(source);
    }

    /// Applies the write at `id`: `branch` points at its payload, under `sequence`. Memory only.
    ///
    /// # Panics
    /// When `id` is not a write in the log, or not above what is applied: a bug of the caller.
    pub fn apply_write(&self, id: LogId, branch: BranchId, sequence: Sequence) {
        self.inner.apply_write(id, branch, sequence);
    }

    /// Applies a trim at `id`. Memory only, whatever its length.
    pub fn apply_trim(
        &self,
        id: LogId,
        branch: BranchId,
        sequence: Sequence,
        start: u64,
        count: u64,
    ) {
        self.inner.apply_trim(id, branch, sequence, start, count);
    }

    /// The layer above refused the entry at `id`: its payload is dead.
    pub fn apply_rejected(&self, id: LogId) {
        self.inner.apply_rejected(id);
    }

    /// Applies an entry that has no extents: blank, membership, control. `sequence` is the family's
    /// sequence after it, when it changed.
    pub fn apply_other(
        &self,
        id: LogId,
        membership: Option<Membership>,
        sequence: Option<Sequence>,
    ) {
        self.inner.apply_other(id, membership, sequence);
    }

    /// The last entry applied.
    pub fn applied(&self) -> Option<LogId> {
        self.inner.applied.borrow().id
    }

    /// The last membership applied.
    pub fn membership(&self) -> StoredMembership {
        self.inner.applied.borrow().membership.clone()
    }

    /// Returns once there is room for what the entry changes in the map (back-pressure). Call it
    /// before each entry that is applied, with no await between the two: a replica may be dropped
    /// while entries that were read from its log wait.
    ///
    /// # Errors
    /// [`PoolFailure`]: nothing may be applied any more.
    pub async fn room_for(&self, entry: &Entry) -> Result<(), PoolFailure> {
        self.inner.room_for(entry).await
    }

    /// Returns once the maps' unmerged changes leave room for more (back-pressure).
    ///
    /// # Errors
    /// [`PoolFailure`]: nothing may be applied any more.
    pub async fn map_room(&self) -> Result<(), PoolFailure> {
        self.inner.map_room().await
    }

    /// Reads the newest version of `range` on `branch`, checked.
    ///
    /// # Errors
    /// [`ReadError`]; no byte whose checksum failed is returned (guarantee **checked**).
    pub async fn read(
        &self,
        branch: BranchId,
        range: BlockRange,
    ) -> Result<Vec<ReadPart>, ReadError> {
        self.inner.whole()?;
        self.inner.read(branch, None, range).await
    }

    /// Reads `range` as it was on `branch` at `sequence`, which a pin or snapshot must hold.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_at(
        &self,
        branch: BranchId,
        sequence: Sequence,
        range: BlockRange,
    ) -> Result<Vec<ReadPart>, ReadError> {
        self.inner.whole()?;
        self.inner.read(branch, Some(sequence), range).await
    }

    /// The bytes of exactly that record, for a peer that repairs its own; `None` if this replica
    /// has no such record.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_record(&self, wanted: DamagedBlock) -> Result<Option<Payload>, ReadError> {
        self.inner.read_record(wanted).await
    }

    /// Replaces the bytes of a damaged block by `payload` (one block), wherever its record is by
    /// now; nothing happens if it was overwritten meanwhile. Returns when it is readable.
    ///
    /// # Errors
    /// [`RepairError`].
    pub async fn repair(&self, damaged: DamagedBlock, payload: Payload) -> Result<(), RepairError> {
        self.inner.repair(damaged, payload).await
    }

    /// Runs of allocated (true) and unallocated blocks that cover `range`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn allocation(
        &self,
        branch: BranchId,
        range: BlockRange,
    ) -> Result<Vec<(bool, u32)>, ReadError> {
        self.inner.whole()?;
        let runs = self.inner.lookup(branch, None, range).await?;
        let mut answer: Vec<(bool, u32)> = Vec::with_capacity(runs.len());
        for run in runs {
            let allocated = run.what != RunContent::Hole;
            match answer.last_mut() {
                Some((last, count)) if *last == allocated => *count += run.count,
                _ => answer.push((allocated, run.count)),
            }
        }
        Ok(answer)
    }

    /// Retained (unpurged) log entries, in bytes on disk: an upper bound.
    pub fn retained_bytes(&self) -> u64 {
        self.inner.log.borrow().bytes()
    }

    /// The log id to purge up to so that at most `bytes` of applied entries stay retained; `None`
    /// when there is nothing to purge that a durable checkpoint covers. The layer above passes it to openraft's purge trigger, for
    /// idle groups too: fewer bytes may stay when the pool retains too much or is short of space,
    /// and nothing that lies too far behind the end of the stream (hazard F3).
    pub fn purge_target(&self, bytes: u64) -> Option<LogId> {
        let (bytes, horizon) = self.inner.shared.retention(bytes);
        let covered = self.inner.checkpointed.get().min(self.applied());
        self.inner.log.borrow().purge_target(bytes, horizon, covered)
    }

    /// What the last durable checkpoint has of this replica: the last entry applied in it, and the
    /// membership as of it. `None` before the first that has anything.
    pub fn checkpointed(&self) -> Option<(LogId, StoredMembership)> {
        let id = self.inner.checkpointed.get()?;
        Some((id, self.inner.checkpointed_membership.borrow().clone()))
    }

    /// Ids of retained entries whose payload is damaged here: fetch them from a peer (hazard 20).
    pub fn damaged_entries(&self) -> Vec<LogId> {
        let log = self.inner.log.borrow();
        log.slots().filter(|slot| slot.damaged).map(|slot| slot.entry.log_id).collect()
    }

    /// Gives a damaged retained entry its payload back. Durable when it returns.
    ///
    /// # Errors
    /// [`RepairError`].
    pub async fn repair_entry(&self, id: LogId, payload: Payload) -> Result<(), RepairError> {
        self.inner.repair_entry(id, payload).await
    }
}
