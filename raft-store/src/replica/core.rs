//! The inside of a replica: its parts, and appending its records.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ballast_block::Sequence;
use ballast_env::Env;
use bytes::Bytes;

use crate::format::vote_slot::SlotNumber;
use crate::log::index::{LogIndex, Slot};
use crate::map::ExtentMap;
use crate::pool::map_io::MapIo;
use crate::pool::shared::Shared;
use crate::pool::{PoolFailure, ReplicaDescriptor};
use crate::replica::resync::ResyncState;
use crate::replica::saved::SuspectV1;
use crate::replica::{Health, Restored};
use crate::stream::{AppendError, Appended, RecordHead, RecordKind, SpaceClass, StreamId};
use crate::types::{LogId, StoredMembership};

/// The extent map of a replica.
pub(crate) type Map<E> = ExtentMap<MapIo<E>>;

/// What the map and the state of the layer above contain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Applied {
    pub id: Option<LogId>,
    pub membership: StoredMembership,
    pub sequence: Sequence,
}

/// What every handle of a replica shares. Borrows end before an await, always.
pub(crate) struct ReplicaInner<E: Env> {
    pub shared: Rc<Shared<E>>,
    pub descriptor: ReplicaDescriptor,
    pub vote_slot: SlotNumber,
    pub log: RefCell<LogIndex>,
    /// The last operation number used.
    pub op: Cell<u64>,
    /// The commit hint changed since it was last appended.
    pub committed_unsaved: Cell<bool>,
    /// The last entry that is durable here.
    pub durable: Cell<Option<LogId>>,
    pub map: RefCell<Rc<Map<E>>>,
    /// This replica's part of [`Shared::delta_bytes`].
    pub delta_bytes: Cell<usize>,
    /// This replica's part of [`Shared::unmerged_blocks`].
    pub unmerged_blocks: Cell<u64>,
    pub applied: RefCell<Applied>,
    pub state_source: RefCell<Option<StateSource>>,
    pub restored: RefCell<Restored>,
    /// Nothing was applied since: the state is the restored one, whatever the source says.
    pub state_is_restored: Cell<bool>,
    pub health: RefCell<Health>,
    /// While the pool is opened: records were lost, and those behind them are not known to go on
    /// where the log ends. What was between may have taken entries out of it and put others in.
    pub parted: Cell<bool>,
    /// While records are replayed: a suspicion of an earlier opening.
    pub marked: Cell<Option<SuspectV1>>,
    pub dropped: Cell<bool>,
    /// The extent map could not be loaded; the one here is empty.
    pub map_lost: Cell<bool>,
    /// Blocks of the map are as late as this, and others as early as what is applied: a difference
    /// that takes the place of what it replaces (docs/decisions/0004-difference-in-place.md).
    pub mixed_upto: Cell<Sequence>,
    /// Where the log was applied to when a difference found no room; see [`Self::progress`].
    pub cramped_at: Cell<Option<u64>>,
    /// The last entry that the last durable checkpoint has applied.
    pub checkpointed: Cell<Option<LogId>>,
    /// The membership as of it.
    pub checkpointed_membership: RefCell<StoredMembership>,
    pub resync: RefCell<Option<Rc<ResyncState<E>>>>,
    /// Resyncs begun so far.
    pub resyncs: Cell<u64>,
}

/// Answers the state of the layer above.
pub(crate) type StateSource = Rc<dyn Fn() -> Bytes>;

impl<E: Env> ReplicaInner<E> {
    /// A replica with nothing in it.
    pub fn empty(
        shared: Rc<Shared<E>>,
        descriptor: ReplicaDescriptor,
        vote_slot: SlotNumber,
    ) -> Self {
        let map = ExtentMap::new(shared.map_io.clone(), &shared.pages);
        Self::with_map(shared, descriptor, vote_slot, map)
    }

    /// A replica with nothing in it but a map.
    pub fn with_map(
        shared: Rc<Shared<E>>,
        descriptor: ReplicaDescriptor,
        vote_slot: SlotNumber,
        map: Map<E>,
    ) -> Self {
        let replica = Self {
            shared,
            descriptor,
            vote_slot,
            log: RefCell::default(),
            op: Cell::new(0),
            committed_unsaved: Cell::new(false),
            durable: Cell::new(None),
            map: RefCell::new(Rc::new(map)),
            delta_bytes: Cell::new(0),
            unmerged_blocks: Cell::new(0),
            applied: RefCell::default(),
            state_source: RefCell::new(None),
            restored: RefCell::default(),
            state_is_restored: Cell::new(true),
            health: RefCell::new(Health::Good),
            parted: Cell::new(false),
            marked: Cell::new(None),
            dropped: Cell::new(false),
            map_lost: Cell::new(false),
            mixed_upto: Cell::new(Sequence(0)),
            cramped_at: Cell::new(None),
            checkpointed: Cell::new(None),
            checkpointed_membership: RefCell::default(),
            resync: RefCell::new(None),
            resyncs: Cell::new(0),
        };
        replica.note_delta();
        replica
    }

    /// The map, to be used over an await.
    pub fn map(&self) -> Rc<Map<E>> {
        self.map.borrow().clone()
    }

    /// Whether the map shows no single moment: some of its blocks are later than what is applied.
    pub fn is_mixed(&self) -> bool {
        self.mixed_upto.get() > self.applied.borrow().sequence
    }

    /// Index behind the last entry applied.
    pub fn progress(&self) -> u64 {
        self.applied.borrow().id.map_or(0, |id| id.index + 1)
    }

    /// Keeps the pool's sum of unmerged changes right; call after every change of the map.
    pub fn note_delta(&self) {
        if self.dropped.get() {
            return;
        }
        let resync = self.resync.borrow().as_ref().map_or(0, |resync| resync.map.delta_bytes());
        let now = self.map.borrow().delta_bytes() + resync;
        let total = &self.shared.delta_bytes;
        total.set(total.get() + now - self.delta_bytes.replace(now));
    }

    /// Map pages that wait for a checkpoint, a resync's too.
    pub fn dirty_bytes(&self) -> usize {
        let resync = self.resync.borrow().as_ref().map_or(0, |resync| resync.map.dirty_bytes());
        self.map.borrow().dirty_bytes() + resync
    }

    /// Changes of so many blocks came into the map. Rings the keeper when it should merge.
    pub fn note_changed(&self, blocks: u64) {
        if self.dropped.get() {
            // The sum would never lose them again.
            return;
        }
        self.note_delta();
        // A trim of everything is one change: it calls for a merge, and blocks nobody.
        let blocks = blocks.min(self.shared.budget.unmerged_blocks / 2 + 1);
        self.unmerged_blocks.set(self.unmerged_blocks.get() + blocks);
        let total = &self.shared.unmerged_blocks;
        total.set(total.get() + blocks);
        if self.shared.wants_merge() {
            self.shared.work.notify_one();
        }
    }

    /// Changes were merged, of which there were `before` bytes.
    pub fn note_merged(&self, before: usize) {
        self.note_delta();
        let left = self.map.borrow().delta_bytes() as u64;
        let blocks = self.unmerged_blocks.get();
        // The changes are not told apart by age: as many blocks as bytes went.
        let now = blocks * left.min(before as u64) / (before as u64).max(1);
        self.unmerged_blocks.set(now);
        let total = &self.shared.unmerged_blocks;
        total.set(total.get() - blocks + now);
    }

    /// Appends a record of this replica, with its next operation number.
    pub fn append(
        &self,
        class: SpaceClass,
        kind: RecordKind,
        body: &[u8],
        payload: Option<Bytes>,
        crcs: &[u32],
    ) -> Result<Appended, AppendError> {
        let op = self.op.get() + 1;
        let head = RecordHead { kind, replica: self.descriptor.replica, op, body };
        let appended = self.shared.streams.append(StreamId::Hot, class, head, payload, crcs)?;
        self.op.set(op);
        Ok(appended)
    }

    /// As [`Self::append`]; where there is no space it waits for some instead: what was proposed is
    /// never refused (guarantee **nothing-lost-when-full**). A replica that was dropped meanwhile
    /// appends nothing more.
    pub async fn append_or_wait(
        &self,
        class: SpaceClass,
        kind: RecordKind,
        body: &[u8],
        payload: Option<Bytes>,
        crcs: &[u32],
    ) -> Result<Appended, PoolFailure> {
        loop {
            self.alive()?;
            match self.append(class, kind, body, payload.clone(), crcs) {
                Ok(appended) => return Ok(appended),
                Err(AppendError::PoolFailed(failed)) => return Err(failed.into()),
                Err(AppendError::OutOfSpace { .. }) => self.shared.wait_for_space().await,
            }
        }
    }

    /// Accounts for an entry that the index holds now: its payload stays while it is retained.
    pub fn retain(&self, slot: &Slot) {
        if slot.blocks == 0 {
            return;
        }
        let segments = self.shared.streams.segments();
        segments.retain(slot.place);
        if !slot.is_write() {
            // No map will ever refer to it.
            segments.mark_dead(slot.place, slot.blocks);
        }
    }

    /// Accounts for entries that left the index; `void` ones will never be applied.
    pub fn release(&self, slots: &[Slot], void: bool) {
        let segments = self.shared.streams.segments();
        for slot in slots.iter().filter(|slot| slot.blocks > 0) {
            segments.release(slot.place);
            if void && slot.is_write() {
                segments.mark_dead(slot.place, slot.blocks);
            }
        }
    }
}
