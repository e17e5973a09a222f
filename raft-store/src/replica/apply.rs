//! Apply: step 7 of a write. Memory only, no await: the map points at payload that lies in the log.

use ballast_block::{BranchId, Sequence};
use ballast_env::Env;

use crate::entry::Body;
use crate::log::index::Slot;
use crate::pool::PoolFailure;
use crate::replica::core::ReplicaInner;
use crate::types::{Entry, EntryPayload, LogId, Membership, StoredMembership};

impl<E: Env> ReplicaInner<E> {
    pub fn apply_write(&self, id: LogId, branch: BranchId, sequence: Sequence) {
        let log = self.log.borrow();
        let slot = log.get(id.index).filter(|slot| slot.entry.log_id == id);
        let Some(Slot { entry, place, .. }) = slot else {
            panic!("{}: apply of {id}, which the log does not hold", self.descriptor.replica)
        };
        let EntryPayload::Normal(command) = &entry.payload else {
            panic!("{}: apply of {id} as a write, which it is not", self.descriptor.replica)
        };
        let Body::Write { range, crcs, .. } = &command.body else {
            panic!("{}: apply of {id} as a write, which it is not", self.descriptor.replica)
        };
        self.map.borrow().write(branch, sequence, *range, *place, crcs);
        let blocks = u64::from(range.count);
        drop(log);
        self.note_changed(blocks);
        self.advance(id, Some(sequence));
    }

    pub fn apply_trim(
        &self,
        id: LogId,
        branch: BranchId,
        sequence: Sequence,
        start: u64,
        count: u64,
    ) {
        self.map.borrow().trim(branch, sequence, start, count);
        self.note_changed(count);
        self.advance(id, Some(sequence));
    }

    pub fn apply_rejected(&self, id: LogId) {
        let log = self.log.borrow();
        if let Some(slot) = log.get(id.index).filter(|slot| slot.entry.log_id == id)
            && slot.is_write()
        {
            self.shared.streams.segments().mark_dead(slot.place, slot.blocks);
        }
        drop(log);
        self.advance(id, None);
    }

    pub fn apply_other(
        &self,
        id: LogId,
        membership: Option<Membership>,
        sequence: Option<Sequence>,
    ) {
        if let Some(membership) = membership {
            self.applied.borrow_mut().membership = StoredMembership::new(Some(id), membership);
        }
        self.advance(id, sequence);
    }

    fn advance(&self, id: LogId, sequence: Option<Sequence>) {
        let mut applied = self.applied.borrow_mut();
        assert!(
            applied.id.is_none_or(|before| before.index < id.index),
            "{}: apply of {id} after {:?}",
            self.descriptor.replica,
            applied.id,
        );
        assert!(
            self.state_source.borrow().is_some(),
            "{}: apply before set_state_source: a checkpoint could not say what state belongs to it",
            self.descriptor.replica,
        );
        applied.id = Some(id);
        self.state_is_restored.set(false);
        if let Some(sequence) = sequence {
            assert!(sequence >= applied.sequence, "sequence goes back to {sequence}");
            applied.sequence = sequence;
        }
    }

    /// As [`Self::map_room`] for an entry that changes the map; the others wait for nothing. All maps
    /// of a pool share their room, and one that can't be merged may have all of it: the entry that has
    /// it replaced is of another group, the cluster's.
    pub async fn room_for(&self, entry: &Entry) -> Result<(), PoolFailure> {
        match &entry.payload {
            EntryPayload::Normal(command) if command.changes_map() => self.map_room().await,
            _ => self.alive(),
        }
    }

    /// Returns once the maps' unmerged changes leave room for more. What waited for an entry may find
    /// the replica gone: then its log and its space are others'.
    pub async fn map_room(&self) -> Result<(), PoolFailure> {
        while self.alive().is_ok() && self.shared.delta_is_full() {
            let mut failure = self.shared.failure.clone();
            let merged = self.shared.merged.notified();
            self.shared.work.notify_one();
            tokio::select! {
                biased;
                () = merged => {}
                _ended = failure.wait_for(Option::is_some) => {}
            }
        }
        self.alive()
    }
}
