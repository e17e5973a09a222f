//! Bringing a replica to a peer's state: changes are collected in a map of their own, which
//! checkpoints keep, and one record switches them in (hazard F9).
//!
//! Order of an install: checkpoint (the changes are durable), Install record (the switch), then the
//! changes move into the replica's map, where the higher sequence wins whatever the order. A crash
//! before the record leaves the replica as it was; after it, opening the pool finishes the move.
//!
//! Where the pool has no room for both, each change takes the place of what it replaces as it comes:
//! docs/decisions/0004-difference-in-place.md says why that is safe. Then the install has nothing to
//! move, and a crash before it leaves a mixed replica, which the log or another difference completes.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::checksum::block_crcs;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::KEEPER_PERIOD_MS;
use ballast_block::{BlockRange, BranchId, Payload, Sequence};
use ballast_env::Env;
use prost::Message;

use crate::map::{ExtentMap, RunContent};
use crate::pool::PoolFailure;
use crate::replica::core::Map;
use crate::replica::record::{InstallV1, MembershipV1, MovedV1};
use crate::replica::{DiffChange, DiffRecord, InstallState, Replica, ResyncBase, ResyncError};
use crate::stream::{AppendError, Appended, SpaceClass, StreamId, StreamPosition};

/// A resync's changes.
pub(crate) struct ResyncState<E: Env> {
    pub id: u64,
    pub since: Sequence,
    pub from_empty: bool,
    /// Changes go into the replica's map at once; none is later than this. `map` stays empty.
    pub in_place: Option<Sequence>,
    pub map: Rc<Map<E>>,
    /// The install record is appended.
    pub installed: Cell<bool>,
}

/// A resync on its way into a replica: built aside, switched in by one record (hazard F9). Dropped
/// without [`Resync::install`] it leaves nothing, or, in place, a mixed replica.
pub struct Resync<E: Env> {
    replica: Replica<E>,
    state: Rc<ResyncState<E>>,
}

impl<E: Env> Resync<E> {
    /// The sequence after which changes are wanted: zero for [`ResyncBase::Empty`].
    pub fn since(&self) -> Sequence {
        self.state.since
    }

    /// Whether changes take the place of what they replace. What was trimmed should come first then:
    /// it makes room.
    pub fn is_in_place(&self) -> bool {
        self.state.in_place.is_some()
    }

    /// Takes some changes, checks their bytes and stores them. Returns when the pool has room for the
    /// next (back-pressure). Later changes of a block replace earlier ones.
    ///
    /// # Errors
    /// [`ResyncError`].
    pub async fn put(&self, records: Vec<DiffRecord>) -> Result<(), ResyncError> {
        let inner = &self.replica.inner;
        if records.is_empty() {
            return inner.alive().map_err(Into::into);
        }
        let mut end = None;
        for record in records {
            inner.alive()?;
            let DiffRecord { branch, start, count, sequence, change } = record;
            self.mix(start, sequence)?;
            match change {
                DiffChange::Hole => self.map().mark_hole(branch, sequence, start, count),
                DiffChange::Data { crcs, payload } => {
                    let whole = payload.len() == crcs.len() * BLOCK_SIZE
                        && count == crcs.len() as u64
                        && block_crcs(&payload).eq(crcs.iter().copied());
                    if !whole {
                        return Err(ResyncError::WrongBytes { block: start });
                    }
                    let range = BlockRange::new(start, crcs.len() as u32);
                    let taken = self.put_data((branch, sequence), range, payload, &crcs).await;
                    end = taken.inspect_err(|error| self.note_cramped(error))?.or(end);
                }
            }
            match self.is_in_place() {
                true => inner.note_changed(count),
                false => inner.note_delta(),
            }
        }
        if let Some(at) = end {
            let durable = inner.shared.streams.durable(StreamId::Cold, at).await;
            durable.map_err(PoolFailure::from)?;
        }
        inner.map_room().await?;
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
        inner.shared.checkpoint().await?;
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
        inner.cramped_at.set(None);
        Ok(())
    }

    /// The map that changes go into.
    fn map(&self) -> Rc<Map<E>> {
        match self.is_in_place() {
            true => self.replica.inner.map(),
            false => self.state.map.clone(),
        }
    }

    /// In place: from here on the replica is mixed. Set before the first change, in memory as they
    /// are: a checkpoint has both or neither.
    fn mix(&self, block: u64, sequence: Sequence) -> Result<(), ResyncError> {
        let Some(upto) = self.state.in_place else { return Ok(()) };
        if sequence > upto {
            return Err(ResyncError::TooLate { block, sequence, upto });
        }
        let mixed = &self.replica.inner.mixed_upto;
        mixed.set(mixed.get().max(upto));
        Ok(())
    }

    /// Stores one write's blocks; nothing when the replica has them already.
    async fn put_data(
        &self,
        (branch, sequence): (BranchId, Sequence),
        range: BlockRange,
        payload: Payload,
        crcs: &[u32],
    ) -> Result<Option<StreamPosition>, ResyncError> {
        let shared = &self.replica.inner.shared;
        let room = match self.is_in_place() {
            true => match self.lacks(branch, sequence, range).await? {
                Lacks::Nothing => return Ok(None),
                Lacks::Version => true,
                Lacks::Block => !shared.is_overfull(),
            },
            false => !shared.is_crowded(),
        };
        if !room {
            return Err(ResyncError::Full(self.replica.id()));
        }
        let body = MovedV1::new(branch, range.start, sequence, crcs).encode_to_vec();
        let Appended { place, at, .. } = self.append(&body, payload, crcs).await?;
        self.map().write(branch, sequence, range, place, crcs);
        Ok(Some(at))
    }

    /// What of a write the replica's map does not have.
    async fn lacks(
        &self,
        branch: BranchId,
        sequence: Sequence,
        range: BlockRange,
    ) -> Result<Lacks, ResyncError> {
        let mut lacks = Lacks::Nothing;
        for run in self.replica.inner.lookup(branch, None, range).await? {
            lacks = lacks.max(match run.what {
                RunContent::Hole => Lacks::Block,
                RunContent::Data { versions, .. } => {
                    match versions.iter().all(|version| version.sequence >= sequence) {
                        true => Lacks::Nothing,
                        false => Lacks::Version,
                    }
                }
            });
        }
        Ok(lacks)
    }

    /// Queues blocks, waiting for space as long as the keeper finds some.
    async fn append(
        &self,
        body: &[u8],
        payload: Payload,
        crcs: &[u32],
    ) -> Result<Appended, ResyncError> {
        let inner = &self.replica.inner;
        let period = Duration::from_millis(KEEPER_PERIOD_MS);
        loop {
            inner.alive()?;
            match inner.try_append_cold(SpaceClass::Normal, body, payload.clone(), crcs) {
                Ok(appended) => return Ok(appended),
                Err(AppendError::PoolFailed(failed)) => {
                    return Err(PoolFailure::from(failed).into());
                }
                Err(AppendError::OutOfSpace { .. }) if inner.shared.is_stuck() => {
                    return Err(ResyncError::Full(self.replica.id()));
                }
                Err(AppendError::OutOfSpace { .. }) => tokio::select! {
                    biased;
                    () = inner.shared.wait_for_space() => {}
                    () = inner.shared.streams.env().sleep(period) => {}
                },
            }
        }
    }

    /// Put aside, it is to be tried in place first.
    fn note_cramped(&self, error: &ResyncError) {
        let inner = &self.replica.inner;
        let last_resort = self.is_in_place() || self.state.from_empty;
        if matches!(error, ResyncError::Full(_)) && last_resort {
            inner.cramped_at.set(Some(inner.progress()));
        }
    }
}

/// How much of a write a replica lacks, in ascending order of what it needs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lacks {
    /// It has it, or what came later.
    Nothing,
    /// It has older blocks, which give their room.
    Version,
    /// It has nothing there.
    Block,
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
        if matches!(base, ResyncBase::InPlace(_)) {
            // What was put aside before gives its room.
            inner.shared.checkpoint().await?;
            if inner.resync.borrow().is_some() {
                return Err(ResyncError::Running(self.id()));
            }
        }
        let id = inner.resyncs.get() + 1;
        inner.resyncs.set(id);
        let (since, from_empty) = match base {
            ResyncBase::Applied | ResyncBase::InPlace(_) => {
                (inner.applied.borrow().sequence, false)
            }
            ResyncBase::Empty => (Sequence(0), true),
        };
        let in_place = match base {
            ResyncBase::InPlace(upto) => Some(upto),
            ResyncBase::Applied | ResyncBase::Empty => None,
        };
        let shared = &inner.shared;
        let map = Rc::new(ExtentMap::new(shared.map_io.clone(), &shared.pages));
        let installed = Cell::new(false);
        let state = ResyncState { id, since, from_empty, in_place, map, installed };
        let state = Rc::new(state);
        *inner.resync.borrow_mut() = Some(state.clone());
        Ok(Resync { replica: self.clone(), state })
    }
}
