//! Bringing a replica to a peer's state: changes are collected in a map of their own, which
//! checkpoints keep, and one record switches them in (hazard F9).
//!
//! Order of an install: checkpoint (the changes are durable), Install record (the switch), then the
//! changes move into the replica's map, where the higher sequence wins whatever the order. A crash
//! before the record leaves the replica as it was; after it, opening the pool finishes the move.

use std::cell::Cell;
use std::rc::Rc;

use ballast_block::checksum::block_crcs;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{AlignedBuf, BlockRange, Sequence};
use ballast_env::Env;
use prost::Message;

use crate::entry::INLINE_BYTES_MAX;
use crate::map::{ExtentMap, MapError, ROOT_BRANCH};
use crate::pool::PoolFailure;
use crate::replica::core::{Map, ReplicaInner};
use crate::replica::record::{InstallV1, MembershipV1, MovedV1};
use crate::replica::{
    DiffChange, DiffRecord, InstallState, Replica, Restored, ResyncBase, ResyncError,
};
use crate::stream::{RecordKind, SpaceClass, StreamId};

/// Blocks that move into the replica's map at once.
const DRAIN_BLOCKS: usize = 4096;

/// A resync's changes.
pub(crate) struct ResyncState<E: Env> {
    pub id: u64,
    pub since: Sequence,
    pub from_empty: bool,
    pub map: Rc<Map<E>>,
    /// The install record is appended.
    pub installed: Cell<bool>,
}

/// A resync on its way into a replica: built aside, switched in by one record (hazard F9). Dropped
/// without [`Resync::install`] it leaves nothing.
pub struct Resync<E: Env> {
    replica: Replica<E>,
    state: Rc<ResyncState<E>>,
}

impl<E: Env> Resync<E> {
    /// The sequence after which changes are wanted: zero for [`ResyncBase::Empty`].
    pub fn since(&self) -> Sequence {
        self.state.since
    }

    /// Takes some changes, checks their bytes and stores them aside. Returns when the pool has
    /// room for the next (back-pressure). Later changes of a block replace earlier ones.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn put(&self, records: Vec<DiffRecord>) -> Result<(), ResyncError> {
        let inner = &self.replica.inner;
        let mut end = None;
        for record in records {
            inner.alive()?;
            let DiffRecord { branch, start, count, sequence, change } = record;
            match change {
                DiffChange::Hole => self.state.map.mark_hole(branch, sequence, start, count),
                DiffChange::Data { crcs, payload } => {
                    let whole = payload.len() == crcs.len() * BLOCK_SIZE
                        && count == crcs.len() as u64
                        && block_crcs(&payload).eq(crcs.iter().copied());
                    if !whole {
                        return Err(ResyncError::WrongBytes { block: start });
                    }
                    if inner.shared.is_full() {
                        return Err(ResyncError::Full(self.replica.id()));
                    }
                    let body = MovedV1::new(branch, start, sequence, &crcs).encode_to_vec();
                    let (place, at) =
                        inner.append_cold(SpaceClass::Normal, &body, payload, &crcs).await?;
                    let range = BlockRange::new(start, crcs.len() as u32);
                    self.state.map.write(branch, sequence, range, place, &crcs);
                    end = Some(at);
                }
            }
            inner.note_delta();
        }
        if let Some(at) = end {
            let durable = inner.shared.streams.durable(StreamId::Cold, at).await;
            durable.map_err(PoolFailure::from)?;
        }
        inner.map_room().await;
        Ok(())
    }

    /// Switches map, applied id, membership, state, purged id and log at once, durably. The layer
    /// above must load `state` before its next `apply_*`.
    ///
    /// # Errors
    /// [`ResyncError`]; the replica is as before.
    pub async fn install(self, state: InstallState) -> Result<(), ResyncError> {
        let inner = &self.replica.inner;
        if let Some(applied) = inner.applied.borrow().id
            && applied >= state.applied
        {
            let (install, applied) = (state.applied.index, applied.index);
            return Err(ResyncError::Backwards { install, applied });
        }
        inner.shared.checkpoint().await.map_err(|error| match error {
            crate::pool::CheckpointError::Pool(failure) => ResyncError::Pool(failure),
            other => ResyncError::Checkpoint(other.to_string()),
        })?;
        let record = InstallV1 {
            resync: self.state.id,
            from_empty: self.state.from_empty,
            applied: Some(state.applied.into()),
            membership: Some(MembershipV1::new(&state.membership)),
            state: state.state.clone(),
            sequence: state.sequence.0,
        };
        let at = inner.append_install(&record).await?;
        inner.switch(&state, &self.state);
        let durable = inner.shared.streams.durable(StreamId::Hot, at).await;
        durable.map_err(PoolFailure::from)?;
        inner.drain().await?;
        Ok(())
    }
}

impl<E: Env> Drop for Resync<E> {
    fn drop(&mut self) {
        let inner = &self.replica.inner;
        if !self.state.installed.get() {
            inner.abandon_resync();
        }
    }
}

impl<E: Env> Replica<E> {
    /// Starts to bring the replica to a peer's state. Until [`Resync::install`] it stays as it is.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn resync(&self, base: ResyncBase) -> Result<Resync<E>, ResyncError> {
        let inner = &self.inner;
        inner.alive()?;
        if inner.resync.borrow().is_some() {
            return Err(ResyncError::Running(self.id()));
        }
        let id = inner.resyncs.get() + 1;
        inner.resyncs.set(id);
        let (since, from_empty) = match base {
            ResyncBase::Applied => (inner.applied.borrow().sequence, false),
            ResyncBase::Empty => (Sequence(0), true),
        };
        let shared = &inner.shared;
        let map = Rc::new(ExtentMap::new(shared.map_io.clone(), &shared.pages));
        let state = ResyncState { id, since, from_empty, map, installed: Cell::new(false) };
        let state = Rc::new(state);
        *inner.resync.borrow_mut() = Some(state.clone());
        Ok(Resync { replica: self.clone(), state })
    }
}

impl<E: Env> ReplicaInner<E> {
    async fn append_install(
        &self,
        record: &InstallV1,
    ) -> Result<crate::stream::StreamPosition, PoolFailure> {
        let (class, kind) = (SpaceClass::Control, RecordKind::Install);
        let encoded = record.encode_to_vec();
        let appended = if encoded.len() <= INLINE_BYTES_MAX {
            self.append_or_wait(class, kind, &encoded, None, &[]).await?
        } else {
            let mut padded = AlignedBuf::zeroed(encoded.len().next_multiple_of(BLOCK_SIZE));
            padded[..encoded.len()].copy_from_slice(&encoded);
            let payload = padded.freeze();
            let crcs: Vec<u32> = block_crcs(&payload).collect();
            let body = (encoded.len() as u64).to_le_bytes();
            let appended = self.append_or_wait(class, kind, &body, Some(payload), &crcs).await?;
            // Nothing refers to it once a checkpoint has the state.
            self.shared.streams.segments().mark_dead(appended.place, crcs.len() as u32);
            appended
        };
        Ok(appended.at)
    }

    /// The switch itself: memory only, no await.
    pub fn switch(&self, state: &InstallState, resync: &ResyncState<E>) {
        resync.installed.set(true);
        {
            let mut applied = self.applied.borrow_mut();
            applied.membership = state.membership.clone();
        }
        let held = self.log.borrow().get(state.applied.index).map(|slot| slot.entry.log_id);
        if held != Some(state.applied) {
            // The log goes another way, or does not reach so far: none of it is kept. The payload of
            // what was applied is the map's, which a difference leaves as it is where nothing changed.
            let applied = self.applied.borrow().id;
            if let Some(applied) = applied {
                self.purge_index(applied);
            }
            let purged = self.log.borrow().purged;
            self.truncate_index(purged);
        }
        self.purge_index(state.applied);
        let mut applied = self.applied.borrow_mut();
        applied.id = Some(state.applied);
        applied.sequence = state.sequence;
        self.durable.set(self.durable.get().max(Some(state.applied)));
        let mut log = self.log.borrow_mut();
        log.committed = log.committed.max(Some(state.applied));
        *self.restored.borrow_mut() = Restored {
            applied: applied.id,
            membership: applied.membership.clone(),
            state: state.state.clone(),
            sequence: state.sequence,
        };
        self.state_is_restored.set(true);
    }

    /// Moves the changes of an installed resync into the map.
    pub async fn drain(&self) -> Result<(), ResyncError> {
        let Some(resync) = self.resync.borrow().clone() else { return Ok(()) };
        assert!(resync.installed.get());
        let problem = |error: MapError| ResyncError::Read(self.map_error(&error));
        if resync.from_empty {
            let old = self.map.replace(resync.map.clone());
            *self.resync.borrow_mut() = None;
            self.map_lost.set(false);
            self.note_delta();
            self.shared.abandoned.borrow_mut().push(old);
            self.shared.work.notify_one();
            return Ok(());
        }
        // What was put twice is reported as freed, before its record is gone.
        resync.map.merge(0).await.map_err(problem)?;
        let newest = self.applied.borrow().sequence;
        let pin = resync.map.pin(ROOT_BRANCH, newest);
        let mut from = Some(0);
        while let Some(block) = from {
            let page = resync.map.diff(pin, Sequence(0), block, DRAIN_BLOCKS).await;
            let page = page.map_err(problem)?;
            for run in page.runs {
                let map = self.map.borrow();
                match run.data {
                    None => map.mark_hole(run.branch, run.sequence, run.start, run.count.into()),
                    Some(data) => {
                        let range = BlockRange::new(run.start, run.count);
                        map.write(run.branch, run.sequence, range, data.first, &data.crcs);
                    }
                }
            }
            from = page.next;
            self.note_delta();
            self.map_room().await;
            self.alive()?;
        }
        resync.map.unpin(pin);
        *self.resync.borrow_mut() = None;
        self.shared.drained.borrow_mut().push(resync.map.clone());
        self.note_delta();
        Ok(())
    }

    /// Forgets the changes of a resync that will not be installed.
    pub fn abandon_resync(&self) {
        let Some(resync) = self.resync.borrow_mut().take() else { return };
        self.note_delta();
        self.shared.abandoned.borrow_mut().push(resync.map.clone());
        self.shared.work.notify_one();
    }
}
