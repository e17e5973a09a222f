//! Merging the changes of one range into its pages, and what falls out of it.
//!
//! All in memory and in one go, without an await: a look-up sees the range before or after. Moves
//! are applied before anything is pruned, so a version that goes takes its pending move with it.

use std::collections::BTreeMap;

use super::delta::{Change, ChangeKind, Delta};
use super::directory::{Range, Slot, Slots};
use super::lookup::{Loaded, Missing, page_of};
use super::page::{CHUNK_RECORDS_MAX, Page, PageKind};
use super::state::State;
use super::types::ROOT_BRANCH;
use super::version::{TOMBSTONE, Version};

/// Own blocks in a range from which on a branch other than the root gets a head page there.
const HEAD_BLOCKS_MIN: usize = 64;

/// Chunks of about one size that are merged into one.
const TIER_CHUNKS: usize = 8;

/// Comes from the delta.
const FRESH: usize = usize::MAX;

/// A version, and the number of the slot that it came from.
#[derive(Clone, Copy)]
struct Entry {
    version: Version,
    source: usize,
}

/// What a merge did.
#[derive(Default)]
pub(super) struct Merged {
    /// Places that no version refers to any more.
    pub freed: Vec<(u64, u32)>,
    /// Clean pages that left the cache, in bytes.
    pub uncached: usize,
}

/// What a merge works on.
struct Work {
    entries: Vec<Entry>,
    /// Slots that have to be written anew, or go.
    changed: Vec<bool>,
    /// All versions of the range are here.
    full: bool,
    freed: Vec<u64>,
}

impl State {
    /// Merges what is unmerged in `range`; `tidy` looks for dead history as well.
    pub fn merge_range(
        &mut self,
        range: u32,
        tidy: bool,
        loaded: &Loaded,
    ) -> Result<Merged, Vec<Missing>> {
        let wide: Vec<_> = self.wide.iter().filter(|wide| wide.within(range).is_some()).collect();
        if !tidy && wide.is_empty() && self.directory.delta(range).is_none() {
            return Ok(Merged::default());
        }
        let nothing = Range::default();
        let entry = self.directory.range(range).unwrap_or(&nothing);
        let delta = self.directory.delta(range);
        let full = tidy || !self.branches.is_single();
        let mut work = Work::gather(range, entry.slots(), full, loaded)?;
        let mut moved = work.apply(delta, !full && entry.has_history());
        if moved.is_err() {
            // A move of something in the history: only now are its pages needed.
            work = Work::gather(range, entry.slots(), true, loaded)?;
            moved = work.apply(delta, false);
        }
        moved.expect("with all pages there is no reason left");
        let mut trims: Vec<(u32, u64, u8, u8)> = wide
            .iter()
            .filter_map(|wide| {
                wide.within(range).map(|at| (wide.branch, wide.sequence, at.0, at.1))
            })
            .collect();
        let changes = delta.into_iter().flat_map(|delta| delta.changes());
        let narrow = changes.filter(|change| change.kind == ChangeKind::Trim);
        trims.extend(
            narrow.map(|change| (change.branch, change.sequence, change.start, change.last)),
        );
        trims.sort_unstable_by_key(|trim| trim.1);
        let touched = touched(delta, &trims, tidy);
        let has_chunks = entry.has_history();
        work.prune(self, &touched, &trims, work.full || !has_chunks);
        let newest = trims.iter().map(|trim| trim.1).max().unwrap_or(0);
        let newest = newest.max(delta.map_or(0, |delta| delta.newest)).max(entry.newest);
        let freed = std::mem::take(&mut work.freed);
        let slots = work.emit(range, entry.slots());
        Ok(self.replace(range, slots, newest, freed))
    }

    /// Puts the new pages of a range in place of the old ones.
    fn replace(&mut self, range: u32, slots: Vec<Kept>, newest: u64, freed: Vec<u64>) -> Merged {
        self.take_delta(range);
        let generation = self.generation;
        let entry = self.directory.range_mut(range);
        let mut old: Vec<Option<Slot>> = match std::mem::take(&mut entry.slots) {
            Slots::None => Vec::new(),
            Slots::One(slot) => vec![Some(slot)],
            Slots::Many(slots) => slots.into_iter().map(Some).collect(),
        };
        let (mut dirtied, mut cleaned, mut uncached) = (0, 0, 0);
        let slots = slots.into_iter().map(|kept| match kept {
            Kept::Old(i) => old[i].take().expect("each is kept once"),
            Kept::Fresh(page) => {
                dirtied += page.dirty_bytes();
                Slot::fresh(page)
            }
        });
        entry.slots = Slots::from_vec(slots.collect());
        entry.newest = newest;
        entry.merged = generation;
        for slot in old.into_iter().flatten() {
            if slot.dirty {
                cleaned += slot.page.map_or(0, |page| page.dirty_bytes());
            } else {
                uncached += slot.page.map_or(0, |page| page.memory());
                self.superseded.push(slot.at);
            }
        }
        self.dirty_bytes = self.dirty_bytes + dirtied - cleaned;
        self.clean_bytes -= uncached;
        self.directory.leaf_mut(range).dirty = true;
        self.note_history(range);
        Merged { freed: in_runs(freed), uncached }
    }
}

/// Which blocks have to be judged.
fn touched(delta: Option<&Delta>, trims: &[(u32, u64, u8, u8)], tidy: bool) -> [bool; 256] {
    let mut touched = [tidy; 256];
    let changes = delta.into_iter().flat_map(|delta| delta.changes());
    let changes = changes.map(|change| (change.start, change.last));
    for (start, last) in changes.chain(trims.iter().map(|trim| (trim.2, trim.3))) {
        touched[usize::from(start)..=usize::from(last)].fill(true);
    }
    touched
}

impl Work {
    /// Heads always; history when it is needed, or when it is time to merge small chunks.
    fn gather(
        range: u32,
        slots: &[Slot],
        full: bool,
        loaded: &Loaded,
    ) -> Result<Self, Vec<Missing>> {
        let crowded = crowded(slots);
        let (mut entries, mut missing) = (Vec::new(), Vec::new());
        for (source, slot) in slots.iter().enumerate() {
            if !full && !slot.kind.is_head() && !crowded[source] {
                continue;
            }
            match page_of(slot, loaded) {
                Some(page) => {
                    page.for_each(0, 255, |version| entries.push(Entry { version, source }));
                }
                None => missing.push(Missing::of(range, slot)),
            }
        }
        if !missing.is_empty() {
            return Err(missing);
        }
        entries.sort_by_key(|entry| entry.version.key());
        Ok(Self { entries, changed: crowded, full, freed: Vec::new() })
    }

    /// Writes, marks and moves, in the order in which they came. `partial`: there is history that
    /// was not gathered; then a move that finds nothing is an error.
    fn apply(&mut self, delta: Option<&Delta>, partial: bool) -> Result<(), ()> {
        let mut added = Vec::new();
        for change in delta.into_iter().flat_map(|delta| delta.changes()) {
            match change.kind {
                ChangeKind::Write | ChangeKind::Mark => {
                    let versions = (change.start..=change.last).map(|block| change.version(block));
                    added.extend(versions.map(|version| Entry { version, source: FRESH }));
                }
                ChangeKind::Trim => {}
                ChangeKind::Move => {
                    if !self.relocate(&change, &mut added) {
                        if partial {
                            return Err(());
                        }
                        // The version went before the move came: its copy is nobody's.
                        self.freed.push(change.places().1);
                    }
                }
            }
        }
        self.entries.append(&mut added);
        self.entries.sort_by_key(|entry| entry.version.key());
        let Self { entries, changed, freed, .. } = self;
        // Of one key the last that came stays: `dedup_by` drops its first argument, the later one.
        entries.dedup_by(|later, earlier| {
            let same = later.version.key() == earlier.version.key();
            if same {
                let (old, new) = (earlier.version.place, later.version.place);
                if old != new && old != TOMBSTONE {
                    freed.push(old);
                }
                if let Some(changed) = changed.get_mut(earlier.source) {
                    *changed = true;
                }
                *earlier = *later;
            }
            same
        });
        Ok(())
    }

    fn relocate(&mut self, change: &Change<'_>, added: &mut [Entry]) -> bool {
        let (from, to) = change.places();
        let key = (change.start, change.branch, change.sequence);
        let is = |entry: &&mut Entry| entry.version.key() == key && entry.version.place == from;
        if let Some(entry) = added.iter_mut().rev().find(is) {
            entry.version.place = to;
            return true;
        }
        let at = self.entries.partition_point(|entry| entry.version.key() < key);
        let Some(entry) = self.entries[at..].iter_mut().next().filter(is) else { return false };
        entry.version.place = to;
        self.changed[entry.source] = true;
        true
    }

    /// Adds the tombstones of trims and drops what nothing needs, block by block. `whole`: there
    /// is no history elsewhere, so a tombstone over nothing may go.
    fn prune(
        &mut self,
        state: &State,
        touched: &[bool; 256],
        trims: &[(u32, u64, u8, u8)],
        whole: bool,
    ) {
        let floor = if whole { state.floor } else { 0 };
        let entries = std::mem::take(&mut self.entries);
        self.entries.reserve(entries.len());
        let (mut group, mut kept) = (Vec::new(), Vec::new());
        for block in entries.chunk_by(|a, b| a.version.block == b.version.block) {
            let number = block[0].version.block;
            if !touched[usize::from(number)] {
                self.entries.extend_from_slice(block);
                continue;
            }
            group.clear();
            group.extend_from_slice(block);
            for &(branch, sequence, start, last) in trims {
                if start <= number && number <= last {
                    bury(state, &mut group, branch, sequence);
                }
            }
            let versions: Vec<Version> = group.iter().map(|entry| entry.version).collect();
            state.branches.judge(&versions, floor, &mut kept);
            for (entry, &kept) in group.iter().zip(&kept) {
                if kept {
                    self.entries.push(*entry);
                    continue;
                }
                if let Some(changed) = self.changed.get_mut(entry.source) {
                    *changed = true;
                }
                if !entry.version.is_tombstone() {
                    self.freed.push(entry.version.place);
                }
            }
        }
    }

    /// Sorts what is left into pages: each branch's newest versions into its head, the rest into
    /// history; pages in which nothing changed stay.
    fn emit(mut self, range: u32, slots: &[Slot]) -> Vec<Kept> {
        let head = |branch: u32| {
            let is = |slot: &Slot| slot.kind.is_head() && slot.branch == branch;
            slots.iter().position(is)
        };
        let (mut tips, mut others) = self.tips();
        tips.retain(|&branch, tips| {
            let big = self.full && tips.len() >= HEAD_BLOCKS_MIN;
            let has_head = branch == ROOT_BRANCH.0 || big || head(branch).is_some();
            if !has_head {
                others.append(tips);
            }
            has_head
        });
        // What changes its page leaves a gap in the old one: that is written anew as well.
        let is_chunk = |entry: &Entry| {
            slots.get(entry.source).is_some_and(|slot| slot.kind == PageKind::Chunk)
        };
        for entry in others.iter().filter(|entry| entry.source != FRESH && !is_chunk(entry)) {
            self.changed[entry.source] = true;
        }
        let mut kept = Vec::new();
        for (&branch, tips) in &tips {
            let own = head(branch);
            let mut fresh = own.is_none_or(|own| self.changed[own]);
            for tip in tips.iter().filter(|tip| Some(tip.source) != own) {
                fresh = true;
                if tip.source != FRESH {
                    self.changed[tip.source] = true;
                }
            }
            kept.push(match own {
                Some(own) if !fresh => Kept::Old(own),
                _ => {
                    let tips: Vec<Version> = tips.iter().map(|tip| tip.version).collect();
                    Kept::Fresh(Page::head(range, branch, &tips))
                }
            });
        }
        let chunks = slots.iter().enumerate().filter(|(_, slot)| slot.kind == PageKind::Chunk);
        kept.extend(chunks.filter(|(i, _)| !self.changed[*i]).map(|(i, _)| Kept::Old(i)));
        let loose = others.iter().filter(|entry| !is_chunk(entry) || self.changed[entry.source]);
        let mut loose: Vec<Version> = loose.map(|entry| entry.version).collect();
        loose.sort_unstable_by_key(Version::key);
        let chunks = loose.chunks(CHUNK_RECORDS_MAX);
        kept.extend(chunks.map(|these| Kept::Fresh(Page::chunk(range, these))));
        kept
    }

    /// The newest version of each block in each branch, and all others.
    fn tips(&self) -> (BTreeMap<u32, Vec<Entry>>, Vec<Entry>) {
        let mut tips: BTreeMap<u32, Vec<Entry>> = BTreeMap::new();
        let mut others = Vec::new();
        for (i, entry) in self.entries.iter().enumerate() {
            let next = self.entries.get(i + 1).map(|next| &next.version);
            let is_tip = next.is_none_or(|next| {
                (next.block, next.branch) != (entry.version.block, entry.version.branch)
            });
            if is_tip {
                tips.entry(entry.version.branch).or_default().push(*entry);
            } else {
                others.push(*entry);
            }
        }
        (tips, others)
    }
}

/// A page of the range after a merge.
enum Kept {
    /// Number of the slot that stays as it is.
    Old(usize),
    Fresh(Page),
}

/// Adds a tombstone for a trim where it hides something.
fn bury(state: &State, group: &mut Vec<Entry>, branch: u32, sequence: u64) {
    let visible = group.iter().filter(|entry| {
        let limit = state.branches.limit(branch, sequence, entry.version.branch);
        limit.is_some_and(|limit| entry.version.sequence <= limit)
    });
    let Some(hidden) = visible.max_by_key(|entry| entry.version.sequence) else { return };
    if hidden.version.is_tombstone() || hidden.version.sequence == sequence {
        return;
    }
    let block = hidden.version.block;
    let version = Version { sequence, place: TOMBSTONE, branch, crc: 0, block };
    let at = group.partition_point(|entry| entry.version.key() < version.key());
    group.insert(at, Entry { version, source: FRESH });
}

/// Which chunks are to be merged: those of a size of which there are [`TIER_CHUNKS`]. Full ones
/// stay as they are.
fn crowded(slots: &[Slot]) -> Vec<bool> {
    const FULL: u32 = 3;
    let tier = |slot: &Slot| {
        let bytes = match &slot.page {
            Some(page) => page.bytes().len(),
            None => slot.at.length as usize,
        };
        match bytes {
            0..282 => 0,
            282..2032 => 1,
            2032..14_000 => 2,
            _ => FULL,
        }
    };
    let chunks = || slots.iter().filter(|slot| slot.kind == PageKind::Chunk);
    let full =
        |of: u32| of < FULL && chunks().filter(|slot| tier(slot) == of).count() >= TIER_CHUNKS;
    let crowded: Vec<u32> = (0..FULL).filter(|&of| full(of)).collect();
    let is = |slot: &Slot| slot.kind == PageKind::Chunk && crowded.contains(&tier(slot));
    slots.iter().map(is).collect()
}

/// Places as runs.
fn in_runs(mut places: Vec<u64>) -> Vec<(u64, u32)> {
    places.sort_unstable();
    let mut runs: Vec<(u64, u32)> = Vec::new();
    for place in places {
        match runs.last_mut() {
            Some((first, count)) if *first + u64::from(*count) == place => *count += 1,
            _ => runs.push((place, 1)),
        }
    }
    runs
}
