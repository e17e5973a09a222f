//! The index of retained log entries of one replica: memory only.
//!
//! An entry without its payload stays in memory until it is purged: that is what apply and the
//! consensus library need. Bounded by the retention limit: every entry counts at least one block
//! there, and takes some 300 bytes here.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE_U64;

use crate::entry::{Body, Command};
use crate::place::Place;
use crate::types::{Entry, EntryPayload, LogId, Vote};

/// A retained entry.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// The entry; the payload of a write is `Stored`.
    pub entry: Entry,
    /// First block of its payload, if it has some.
    pub place: Place,
    /// Blocks of payload.
    pub blocks: u32,
    /// The payload on this disk is not what was written.
    pub damaged: bool,
    /// Bytes of the hot stream between the opening of the pool and it, unused ends of segments
    /// included: its age. 0 = from before.
    pub born: u64,
}

impl Slot {
    /// What it counts against the retention limit: its payload and, at most, a header block.
    fn charge(&self) -> u64 {
        (u64::from(self.blocks) + 1) * BLOCK_SIZE_U64
    }

    /// Whether its payload is data of blocks.
    pub fn is_write(&self) -> bool {
        matches!(
            &self.entry.payload,
            EntryPayload::Normal(Command { body: Body::Write { .. }, .. })
        )
    }

    /// First block and checksums of a write.
    pub fn write(&self) -> Option<(u64, Rc<[u32]>)> {
        match &self.entry.payload {
            EntryPayload::Normal(Command { body: Body::Write { range, crcs, .. }, .. }) => {
                Some((range.start, crcs.clone()))
            }
            _ => None,
        }
    }
}

/// The retained entries and what else belongs to the log.
#[derive(Debug, Default)]
pub(crate) struct LogIndex {
    slots: VecDeque<Slot>,
    bytes: u64,
    /// The last entry purged.
    pub purged: Option<LogId>,
    /// A hint: known to be committed.
    pub committed: Option<LogId>,
    /// The vote.
    pub vote: Option<Vote>,
}

impl LogIndex {
    /// The last entry, or where the log was purged up to.
    pub fn last(&self) -> Option<LogId> {
        self.slots.back().map(|slot| slot.entry.log_id).or(self.purged)
    }

    /// Which entry is at `index`, if that is known.
    fn id_at(&self, index: u64) -> Option<LogId> {
        let retained = self.get(index).map(|slot| slot.entry.log_id);
        retained.or(self.purged.filter(|purged| purged.index == index))
    }

    /// Whether exactly this entry is here: then those before it are its leader's, too.
    pub fn holds(&self, id: LogId) -> bool {
        self.id_at(id.index) == Some(id)
    }

    /// Whether what is before `id` here is what its leader had there: an entry of the same leader
    /// goes before it, or nothing does.
    pub fn is_followed_by(&self, id: LogId) -> bool {
        let Some(before) = id.index.checked_sub(1) else { return true };
        self.id_at(before).is_some_and(|before| before.leader_id == id.leader_id)
    }

    /// Retained entries in bytes on disk, an upper bound.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Retained entries, oldest first.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter()
    }

    fn first_index(&self) -> Option<u64> {
        self.slots.front().map(|slot| slot.entry.log_id.index)
    }

    /// Adds the next entry.
    pub fn push(&mut self, slot: Slot) {
        if let Some(last) = self.slots.back() {
            let (last, next) = (last.entry.log_id, slot.entry.log_id);
            assert!(next.index == last.index + 1, "log has a hole: {next} after {last}");
            assert!(next.leader_id >= last.leader_id, "log goes back: {next} after {last}");
        }
        self.bytes += slot.charge();
        self.slots.push_back(slot);
    }

    fn offset(&self, index: u64) -> Option<usize> {
        let offset = usize::try_from(index.checked_sub(self.first_index()?)?).ok()?;
        (offset < self.slots.len()).then_some(offset)
    }

    /// The entry at `index`.
    pub fn get(&self, index: u64) -> Option<&Slot> {
        self.slots.get(self.offset(index)?)
    }

    /// The entry at `index`, to change where its payload is.
    pub fn get_mut(&mut self, index: u64) -> Option<&mut Slot> {
        let offset = self.offset(index)?;
        self.slots.get_mut(offset)
    }

    /// The retained ones of the entries `start..end`.
    pub fn range(&self, start: u64, end: u64) -> impl Iterator<Item = &Slot> {
        let first = self.first_index().unwrap_or(0);
        let to_offset = |index: u64| {
            usize::try_from(index.saturating_sub(first))
                .map_or(self.slots.len(), |offset| offset.min(self.slots.len()))
        };
        let (from, to) = (to_offset(start), to_offset(end.max(start)));
        self.slots.range(from..to)
    }

    /// Removes the entries after `last` and answers them.
    pub fn truncate_after(&mut self, last: Option<LogId>) -> Vec<Slot> {
        let keep = match (last, self.first_index()) {
            (Some(last), Some(first)) => (last.index + 1).saturating_sub(first),
            _ => 0,
        };
        let keep = usize::try_from(keep).unwrap_or(usize::MAX).min(self.slots.len());
        let removed: Vec<Slot> = self.slots.drain(keep..).collect();
        self.bytes -= removed.iter().map(Slot::charge).sum::<u64>();
        removed
    }

    /// Removes the entries up to `upto`, inclusive, and answers them.
    pub fn purge(&mut self, upto: LogId) -> Vec<Slot> {
        self.purged = self.purged.max(Some(upto));
        let gone = match self.first_index() {
            Some(first) => (upto.index + 1).saturating_sub(first),
            None => 0,
        };
        let gone = usize::try_from(gone).unwrap_or(usize::MAX).min(self.slots.len());
        let removed: Vec<Slot> = self.slots.drain(..gone).collect();
        self.bytes -= removed.iter().map(Slot::charge).sum::<u64>();
        removed
    }

    /// The last entry to purge so that what stays is at most `bytes` and none of it was born before
    /// `horizon`; none above `applied`.
    pub fn purge_target(&self, bytes: u64, horizon: u64, applied: Option<LogId>) -> Option<LogId> {
        let applied = applied?;
        let mut left = self.bytes;
        let mut target = None;
        for slot in &self.slots {
            if (left <= bytes && slot.born >= horizon) || slot.entry.log_id > applied {
                break;
            }
            left -= slot.charge();
            target = Some(slot.entry.log_id);
        }
        target
    }

    /// The last retained entry of each leader in `range`. (openraft's documentation of the trait
    /// says "first"; its code and its suite say "last".)
    pub fn key_log_ids(&self, range: RangeInclusive<LogId>) -> Vec<LogId> {
        let mut keys: Vec<LogId> = Vec::new();
        let mut offset = self.offset(range.start().index).unwrap_or(0);
        let end = self.offset(range.end().index).map_or(self.slots.len(), |last| last + 1);
        while offset < end {
            let leader = self.slots[offset].entry.log_id.leader_id;
            // Leaders only grow along the log.
            offset += partition(end - offset, |nth| {
                self.slots[offset + nth].entry.log_id.leader_id == leader
            });
            keys.push(self.slots[offset - 1].entry.log_id);
        }
        keys
    }
}

/// The number of leading items, of `len`, for which `matches`; all that match come first.
fn partition(len: usize, matches: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low + (high - low) / 2;
        if matches(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::log_id;

    fn index_of(ids: &[(u64, u64)]) -> LogIndex {
        let mut index = LogIndex::default();
        for &(term, at) in ids {
            let entry = Entry { log_id: log_id(term, at), payload: EntryPayload::Blank };
            let (place, born) = (Place(0), at * 100);
            index.push(Slot { entry, place, blocks: 1, damaged: false, born });
        }
        index
    }

    #[test]
    fn keys_are_the_last_of_each_leader() {
        let index = index_of(&[(2, 2), (2, 3), (5, 4), (5, 5)]);
        let keys = index.key_log_ids(log_id(2, 2)..=log_id(5, 5));
        assert_eq!(keys, [log_id(2, 3), log_id(5, 5)]);
        let one = index.key_log_ids(log_id(5, 5)..=log_id(5, 5));
        assert_eq!(one, [log_id(5, 5)]);
    }

    #[test]
    fn truncate_and_purge_keep_the_count_of_bytes() {
        let mut index = index_of(&[(1, 5), (1, 6), (1, 7), (2, 8)]);
        assert_eq!(index.bytes(), 4 * 2 * BLOCK_SIZE_U64);
        assert_eq!(index.truncate_after(Some(log_id(1, 6))).len(), 2);
        assert_eq!(index.last(), Some(log_id(1, 6)));
        assert_eq!(index.purge(log_id(1, 5)).len(), 1);
        assert_eq!(index.range(0, 100).count(), 1);
        assert_eq!(index.purge(log_id(3, 50)).len(), 1);
        assert_eq!((index.bytes(), index.last()), (0, Some(log_id(3, 50))));
        assert!(index.truncate_after(None).is_empty());
    }

    #[test]
    fn purge_target_stops_at_applied() {
        let index = index_of(&[(1, 1), (1, 2), (1, 3), (1, 4)]);
        let target = |bytes, horizon| index.purge_target(bytes, horizon, Some(log_id(1, 3)));
        assert_eq!(target(0, 0), Some(log_id(1, 3)));
        assert_eq!(target(6 * BLOCK_SIZE_U64, 0), Some(log_id(1, 1)));
        assert_eq!(target(u64::MAX, 0), None);
        assert_eq!(target(u64::MAX, 300), Some(log_id(1, 2)));
        assert_eq!(target(u64::MAX, 1000), Some(log_id(1, 3)));
        assert_eq!(index.purge_target(0, 0, None), None);
    }
}
