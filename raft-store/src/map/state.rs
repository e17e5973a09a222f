//! Everything that a map has in memory, and the changes to it that need no disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use super::branch::Branches;
use super::delta::{ChangeKind, Delta};
use super::directory::{Directory, split};
use super::page::Page;
use super::types::{Move, PageAddress, ROOT_BRANCH};
use super::version::{RANGE_BLOCKS, SEQUENCE_MAX};

/// Ranges from which on a trim is one record for all of them, not one each.
const WIDE_RANGES: u64 = 64;

/// What a wide trim counts for in the delta, in bytes: its record, and a push to get it merged,
/// because every look-up passes all of them.
const WIDE_BYTES: usize = 256;

/// A trim over many ranges. It stays until every range that it touches was merged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wide {
    pub id: u64,
    pub branch: u32,
    pub sequence: u64,
    pub start: u64,
    pub end: u64,
    /// The first range that was not merged since.
    pub cursor: u32,
}

impl Wide {
    /// The first and last block of `range` that it covers.
    #[inline]
    pub fn within(&self, range: u32) -> Option<(u8, u8)> {
        let first = u64::from(range) * RANGE_BLOCKS;
        let (start, end) = (self.start.max(first), self.end.min(first + RANGE_BLOCKS));
        (start < end).then(|| ((start - first) as u8, (end - 1 - first) as u8))
    }
}

/// Changes that a checkpoint wrote unmerged.
#[derive(Clone, Debug)]
pub(super) struct ChangesRun {
    pub generation: u32,
    pub pages: Vec<(PageAddress, u32)>,
    pub bytes: usize,
}

/// The map in memory.
pub(super) struct State {
    pub directory: Directory,
    pub branches: Branches,
    pub wide: Vec<Wide>,
    pub delta_bytes: usize,
    /// Pages that are not on disk yet: see `Page::dirty_bytes`.
    pub dirty_bytes: usize,
    /// Memory of pages that are.
    pub clean_bytes: usize,
    /// Number of the last freeze.
    pub generation: u32,
    /// Ascending by generation; at most 256 apart, so that their low bytes tell them apart.
    pub runs: Vec<ChangesRun>,
    /// Records that are neither merged nor replaced, by the low byte of their generation.
    pub live: Box<[u32; 256]>,
    /// Ranges with changes since the last freeze; some twice.
    pub touched: Vec<u32>,
    /// Pages of the last root that the next one does without.
    pub superseded: Vec<PageAddress>,
    /// Tombstones up to here are only kept over something.
    pub floor: u64,
    pub pins: BTreeMap<u64, (u32, u64)>,
    pub next_id: u64,
    /// Ranges with history chunks.
    pub history: BTreeSet<u32>,
    /// Ranges whose history may have something dead since an unpin.
    pub untidy: BTreeSet<u32>,
    /// A frozen map is not written yet.
    pub freezing: bool,
    /// Runs lie where they should not: the next freeze writes what is left of them anew.
    pub rewrite_runs: bool,
    /// Ranges with changes, by the size class of these; stale entries are skipped.
    classes: Vec<VecDeque<u32>>,
    classed: usize,
    deltas: usize,
}

fn class_of(bytes: usize) -> usize {
    (usize::BITS - bytes.leading_zeros()) as usize
}

impl State {
    pub fn new(branches: Branches) -> Self {
        Self {
            directory: Directory::default(),
            branches,
            wide: Vec::new(),
            delta_bytes: 0,
            dirty_bytes: 0,
            clean_bytes: 0,
            generation: 0,
            runs: Vec::new(),
            live: Box::new([0; 256]),
            touched: Vec::new(),
            superseded: Vec::new(),
            floor: 0,
            pins: BTreeMap::new(),
            next_id: 1,
            history: BTreeSet::new(),
            untidy: BTreeSet::new(),
            freezing: false,
            rewrite_runs: false,
            classes: vec![VecDeque::new(); usize::BITS as usize + 1],
            classed: 0,
            deltas: 0,
        }
    }

    pub fn with_root() -> Self {
        Self::new(Branches::with_root(ROOT_BRANCH.0))
    }

    /// The tag of changes that come in now: of the generation that the next freeze begins.
    fn tag(&self) -> u8 {
        self.generation.wrapping_add(1) as u8
    }

    #[inline]
    fn change(&mut self, range: u32, push: impl FnOnce(&mut Delta, u8)) {
        let tag = self.tag();
        let entry = &mut self.directory.leaf_mut(range).deltas[split(range).1];
        let (mut memory, mut bytes) = (0, 0);
        if let Some(delta) = entry {
            (memory, bytes) = (delta.memory(), delta.bytes().len());
        } else {
            self.deltas += 1;
        }
        let delta = entry.get_or_insert_default();
        if delta.unfrozen == 0 {
            self.touched.push(range);
        }
        push(delta, tag);
        self.delta_bytes += delta.memory();
        self.delta_bytes -= memory;
        let class = class_of(delta.bytes().len());
        if class != class_of(bytes) {
            self.classes[class].push_back(range);
            self.classed += 1;
        }
    }

    pub fn write(&mut self, branch: u32, sequence: u64, start: u64, place: u64, crcs: &[u32]) {
        assert!(sequence <= SEQUENCE_MAX && self.branches.contains(branch));
        let (mut block, mut place, mut crcs) = (start, place, crcs);
        while !crcs.is_empty() {
            let within = block % RANGE_BLOCKS;
            let count = crcs.len().min((RANGE_BLOCKS - within) as usize);
            let (these, rest) = crcs.split_at(count);
            self.change(range_of(block), |delta, tag| {
                delta.push_write(within as u8, tag, branch, sequence, place, these);
            });
            (block, place, crcs) = (block + count as u64, place + count as u64, rest);
        }
    }

    /// `mark`: say so also where nothing is mapped.
    pub fn trim(&mut self, branch: u32, sequence: u64, start: u64, count: u64, mark: bool) {
        assert!(sequence <= SEQUENCE_MAX && self.branches.contains(branch));
        let end = start + count;
        let ranges = end.div_ceil(RANGE_BLOCKS) - start / RANGE_BLOCKS;
        if !mark && ranges > WIDE_RANGES {
            let last = ((end - 1) / RANGE_BLOCKS) as usize / 256;
            let mut leaves = self.directory.leaves.iter().skip(start as usize / 65536);
            if leaves.by_ref().take(last + 1 - start as usize / 65536).all(Option::is_none) {
                return;
            }
            self.trim_wide(branch, sequence, start, end);
            return;
        }
        let kind = if mark { ChangeKind::Mark } else { ChangeKind::Trim };
        let mut block = start;
        while block < end {
            let range = range_of(block);
            let stop = end.min((u64::from(range) + 1) * RANGE_BLOCKS);
            if mark || self.directory.next_present(range, range + 1).is_some() {
                let blocks = ((block % RANGE_BLOCKS) as u8, ((stop - 1) % RANGE_BLOCKS) as u8);
                self.change(range, |delta, tag| {
                    delta.push_hole(kind, blocks, tag, branch, sequence);
                });
            }
            block = stop;
        }
    }

    pub fn trim_wide(&mut self, branch: u32, sequence: u64, start: u64, end: u64) {
        let (id, cursor) = (self.next_id, range_of(start));
        self.next_id += 1;
        self.wide.push(Wide { id, branch, sequence, start, end, cursor });
        self.delta_bytes += WIDE_BYTES;
    }

    pub fn relocate(&mut self, one: &Move) {
        let block = (one.block % RANGE_BLOCKS) as u8;
        self.change(range_of(one.block), |delta, tag| {
            let places = (one.from.0, one.to.0);
            delta.push_move(block, tag, one.branch.0, one.sequence.0, places);
        });
    }

    /// Takes in what a checkpoint wrote unmerged.
    pub fn restore(&mut self, range: u32, records: &[u8], tag: u8) -> Result<(), &'static str> {
        let mut restored = Ok(0);
        self.change(range, |delta, _| restored = delta.restore(records, tag));
        self.live[usize::from(tag)] += restored?;
        Ok(())
    }

    /// Takes the changes of a range out: they are being merged.
    pub fn take_delta(&mut self, range: u32) -> Option<Box<Delta>> {
        self.directory.delta(range)?;
        let delta = self.directory.leaf_mut(range).deltas[split(range).1].take()?;
        self.delta_bytes -= delta.memory();
        self.deltas -= 1;
        for change in delta.changes().take_while(|change| change.offset < delta.frozen as usize) {
            self.live[usize::from(change.tag)] -= 1;
        }
        Some(delta)
    }

    /// The range with the most changes, up to a factor of two.
    pub fn fullest(&mut self) -> Option<u32> {
        if self.classed > 4 * self.deltas + 1024 {
            self.classify();
        }
        for class in (1..self.classes.len()).rev() {
            while let Some(range) = self.classes[class].pop_front() {
                self.classed -= 1;
                let delta = self.directory.delta(range);
                if delta.is_some_and(|delta| class_of(delta.bytes().len()) == class) {
                    // It stays listed until it is merged: reading its page may fail.
                    self.classes[class].push_front(range);
                    self.classed += 1;
                    return Some(range);
                }
            }
        }
        None
    }

    /// Lists ranges anew: ranges that were merged and refilled often leave stale entries.
    fn classify(&mut self) {
        self.classes.iter_mut().for_each(VecDeque::clear);
        self.classed = 0;
        let sized = self.changed().into_iter();
        let sized: Vec<_> =
            sized.map(|(range, delta)| (range, class_of(delta.bytes().len()))).collect();
        for (range, class) in sized {
            self.classed += 1;
            self.classes[class].push_back(range);
        }
    }

    /// Every range with changes.
    fn changed(&self) -> Vec<(u32, &Delta)> {
        let leaves = self.directory.leaves.iter().enumerate();
        let leaves = leaves.filter_map(|(i, leaf)| Some((i, leaf.as_ref()?)));
        let deltas = leaves.flat_map(|(i, leaf)| {
            let deltas = leaf.deltas.iter().enumerate();
            deltas.filter_map(move |(j, delta)| Some(((i * 256 + j) as u32, delta.as_deref()?)))
        });
        deltas.collect()
    }

    /// Everything unmerged goes into the next checkpoint again: its runs have become too many.
    pub fn retag_all(&mut self, tag: u8) {
        self.touched = self.changed().into_iter().map(|(range, _)| range).collect();
        self.live.fill(0);
        for i in 0..self.touched.len() {
            let range = self.touched[i];
            let delta = &mut self.directory.leaf_mut(range).deltas[split(range).1];
            delta.as_mut().expect("listed above").retag(tag);
        }
    }

    /// The next range that the oldest wide trim has to reach; finished trims are dropped.
    pub fn next_wide(&mut self) -> Option<(u64, u32)> {
        while let Some(wide) = self.wide.first() {
            let end = range_of(wide.end - 1) + 1;
            if let Some(range) = self.directory.next_present(wide.cursor, end) {
                return Some((wide.id, range));
            }
            self.wide.remove(0);
            self.delta_bytes -= WIDE_BYTES;
        }
        None
    }

    pub fn wide_reached(&mut self, id: u64, range: u32) {
        if let Some(wide) = self.wide.iter_mut().find(|wide| wide.id == id) {
            wide.cursor = wide.cursor.max(range + 1);
        }
    }

    /// Lets go of the clean pages of a range, unless it was used since the last time.
    pub fn evict(&mut self, range: u32) -> Evicted {
        let Some(entry) = self.directory.range(range) else { return Evicted::Bytes(0) };
        if entry.used.replace(false) {
            return Evicted::Used;
        }
        let entry = self.directory.range_mut(range);
        entry.ringed = false;
        let mut bytes = 0;
        for slot in entry.slots.as_mut_slice().iter_mut().filter(|slot| !slot.dirty) {
            bytes += slot.page.take().map_or(0, |page| page.memory());
        }
        self.clean_bytes -= bytes;
        Evicted::Bytes(bytes)
    }

    /// Counts the pages of a range anew after it changed.
    pub fn note_history(&mut self, range: u32) {
        let has = self.directory.range(range).is_some_and(|range| range.has_history());
        if has {
            self.history.insert(range);
        } else {
            self.history.remove(&range);
        }
    }

    /// Lists the ranges with history: after a load.
    pub fn find_history(&mut self) {
        let leaves = self.directory.leaves.iter().enumerate();
        for (number, leaf) in leaves.filter_map(|(i, leaf)| Some((i, leaf.as_ref()?))) {
            let ranges = leaf.ranges.iter().enumerate().filter(|(_, range)| range.has_history());
            self.history.extend(ranges.map(|(within, _)| (number * 256 + within) as u32));
        }
    }

    /// Something is not needed any more: says where to look for it. The newest versions of a
    /// lone branch that is written to are never dead, so only history is looked through then.
    pub fn look_for_dead(&mut self) {
        let mut ranges =
            match self.branches.stands_alone(ROOT_BRANCH.0) && self.branches.is_single() {
                true => self.history.clone(),
                false => self.all_mapped(),
            };
        self.untidy.append(&mut ranges);
    }

    /// Lets go of a range unseen: its pages can't be read. Answers the memory that left the cache.
    pub fn forget(&mut self, range: u32) -> usize {
        self.take_delta(range);
        let slots = std::mem::take(&mut self.directory.range_mut(range).slots);
        let mut uncached = 0;
        for slot in slots.as_slice() {
            let page = slot.page.as_ref();
            if slot.dirty {
                self.dirty_bytes -= page.map_or(0, |page| page.dirty_bytes());
            } else {
                uncached += page.map_or(0, |page| page.memory());
                self.superseded.push(slot.at);
            }
        }
        self.clean_bytes -= uncached;
        self.history.remove(&range);
        self.untidy.remove(&range);
        uncached
    }

    /// Every page on disk that is, or was since the last freeze, part of the map: no more.
    pub fn give_up_pages(&mut self) -> Vec<PageAddress> {
        let mut pages = std::mem::take(&mut self.superseded);
        pages.extend(self.runs.drain(..).flat_map(|run| run.pages).map(|(at, _)| at));
        for leaf in self.directory.leaves.iter_mut().flatten() {
            pages.extend(leaf.at.drain(..).map(|(at, _)| at));
            let slots = leaf.ranges.iter().flat_map(|range| range.slots());
            pages.extend(slots.filter(|slot| !slot.dirty).map(|slot| slot.at));
        }
        pages
    }

    /// Every range that has pages.
    fn all_mapped(&self) -> BTreeSet<u32> {
        let leaves = self.directory.leaves.iter().enumerate();
        let leaves = leaves.filter_map(|(i, leaf)| Some((i, leaf.as_ref()?)));
        let ranges = leaves.flat_map(|(i, leaf)| {
            let ranges = leaf.ranges.iter().enumerate();
            let mapped = ranges.filter(|(_, range)| !range.slots().is_empty());
            mapped.map(move |(j, _)| (i * 256 + j) as u32)
        });
        ranges.collect()
    }

    /// A page was read: puts it into its slot, if that is still there and empty. Answers the memory
    /// that it takes, and whether the cache has to learn of the range.
    pub fn cached(&mut self, range: u32, at: PageAddress, page: &Rc<Page>) -> (usize, bool) {
        if !self.has_page_at(range, at) {
            return (0, false);
        }
        let entry = self.directory.range_mut(range);
        let slots = entry.slots.as_mut_slice().iter_mut();
        let mut empty = slots.filter(|slot| !slot.dirty && slot.at == at && slot.page.is_none());
        let Some(slot) = empty.next() else { return (0, false) };
        slot.page = Some(page.clone());
        self.clean_bytes += page.memory();
        (page.memory(), !std::mem::replace(&mut entry.ringed, true))
    }

    /// The slot of `range` that lies at `at`.
    pub fn has_page_at(&self, range: u32, at: PageAddress) -> bool {
        let slots = self.directory.range(range).map_or(&[][..], |range| range.slots());
        slots.iter().any(|slot| !slot.dirty && slot.at == at)
    }
}

/// What an eviction did.
pub(super) enum Evicted {
    /// It let go of that many bytes.
    Bytes(usize),
    /// The range is in use: ask again later.
    Used,
}

/// The range of a block.
#[inline]
pub(super) fn range_of(block: u64) -> u32 {
    u32::try_from(block / RANGE_BLOCKS).expect("block numbers are below VOLUME_BYTES_MAX")
}
