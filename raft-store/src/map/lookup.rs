//! What a view shows: step "map look-up" of a read. No disk here: pages that are missing are named.

use std::rc::Rc;

use ballast_block::{BlockRange, BranchId, Sequence};

use super::delta::{Change, ChangeKind};
use super::directory::Slot;
use super::page::{Page, PageKind};
use super::state::{State, range_of};
use super::types::{BlockVersion, PageAddress, Run, RunContent};
use super::version::{RANGE_BLOCKS, TOMBSTONE, Version};
use crate::place::Place;

/// A page that has to be read first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missing {
    pub range: u32,
    pub kind: PageKind,
    pub branch: u32,
    pub crc: u32,
    pub at: PageAddress,
}

impl Missing {
    pub fn of(range: u32, slot: &Slot) -> Self {
        let Slot { kind, branch, crc, at, .. } = *slot;
        Self { range, kind, branch, crc, at }
    }
}

/// Pages that were read for one operation: it keeps them, whatever the cache does.
pub(super) type Loaded = Vec<(PageAddress, Rc<Page>)>;

/// The page of a slot, if it is in memory.
#[inline]
pub(super) fn page_of<'a>(slot: &'a Slot, loaded: &'a Loaded) -> Option<&'a Rc<Page>> {
    let find = || loaded.iter().find(|(at, _)| *at == slot.at && !slot.dirty);
    slot.page.as_ref().or_else(|| find().map(|(_, page)| page))
}

/// A branch at a sequence; `u64::MAX` = now.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub branch: u32,
    pub at: u64,
}

/// The newest visible version of one block found so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Best {
    pub sequence: u64,
    /// 0 = none; may be a tombstone.
    pub place: u64,
    pub branch: u32,
    pub crc: u32,
}

impl Best {
    pub const NONE: Best = Best { sequence: 0, place: 0, branch: 0, crc: 0 };

    #[inline]
    fn offer(&mut self, version: &Version) {
        if version.sequence >= self.sequence {
            let Version { sequence, place, branch, crc, .. } = *version;
            *self = Best { sequence, place, branch, crc };
        }
    }
}

impl State {
    /// What `range` of `view` holds: one [`Best`] per block.
    pub fn look(
        &self,
        view: View,
        range: BlockRange,
        loaded: &Loaded,
        best: &mut [Best],
    ) -> Result<(), Vec<Missing>> {
        let (mut missing, mut block) = (Vec::new(), range.start);
        let mut rest = best;
        while !rest.is_empty() {
            let first = block % RANGE_BLOCKS;
            let count = rest.len().min((RANGE_BLOCKS - first) as usize);
            let (these, behind) = rest.split_at_mut(count);
            self.look_range(view, range_of(block), first as u8, loaded, these, &mut missing);
            (rest, block) = (behind, block + count as u64);
        }
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    }

    fn look_range(
        &self,
        view: View,
        range: u32,
        first: u8,
        loaded: &Loaded,
        best: &mut [Best],
        missing: &mut Vec<Missing>,
    ) {
        if let Some(entry) = self.directory.range(range)
            && !entry.slots().is_empty()
        {
            entry.used.set(true);
            self.look_pages(view, range, entry.slots(), first, loaded, best, missing);
        }
        if !missing.is_empty() {
            return;
        }
        if let Some(delta) = self.directory.delta(range) {
            let indexed = view.at == u64::MAX && {
                let mut blocks = (first..=u8::MAX).zip(best.iter_mut());
                blocks.all(|(block, best)| match delta.newest_of(block) {
                    Ok(None) => true,
                    Ok(Some(change)) if change.branch == view.branch => {
                        best.offer(&change.version(block));
                        true
                    }
                    _ => false,
                })
            };
            if !indexed {
                let last = first + (best.len() - 1) as u8;
                delta
                    .for_each_in(first, last, |change| self.look_change(view, first, change, best));
            }
        }
        for wide in &self.wide {
            if let Some((start, last)) = wide.within(range) {
                self.look_hole(view, (wide.branch, wide.sequence), (start, last), first, best);
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one look-up, all of them needed")]
    fn look_pages(
        &self,
        view: View,
        range: u32,
        slots: &[Slot],
        first: u8,
        loaded: &Loaded,
        best: &mut [Best],
        missing: &mut Vec<Missing>,
    ) {
        let last = first + (best.len() - 1) as u8;
        let is_own = |slot: &Slot| slot.kind.is_head() && slot.branch == view.branch;
        // A branch's own newest version is newer than all else that it sees.
        let mut settled = self.branches.stands_alone(view.branch);
        if let Some(slot) = slots.iter().find(|slot| is_own(slot)) {
            let Some(page) = page_of(slot, loaded) else {
                missing.push(Missing::of(range, slot));
                return;
            };
            let root = settled;
            settled = true;
            for (block, best) in (first..=last).zip(best.iter_mut()) {
                match page.tip(block) {
                    Some(tip) if tip.sequence <= view.at => best.offer(&tip),
                    Some(_) => settled = false,
                    None => settled &= root,
                }
            }
        }
        if settled {
            return;
        }
        for slot in slots.iter().filter(|slot| !is_own(slot)) {
            let sees = slot.kind == PageKind::Chunk
                || self.branches.limit(view.branch, view.at, slot.branch).is_some();
            if !sees || slot.last < first || slot.first > last {
                continue;
            }
            let Some(page) = page_of(slot, loaded) else {
                missing.push(Missing::of(range, slot));
                continue;
            };
            page.for_each(first, last, |version| {
                if self.sees(view, version.branch, version.sequence) {
                    best[usize::from(version.block - first)].offer(&version);
                }
            });
        }
    }

    #[inline]
    fn sees(&self, view: View, branch: u32, sequence: u64) -> bool {
        let limit = self.branches.limit(view.branch, view.at, branch);
        limit.is_some_and(|limit| sequence <= limit)
    }

    /// A record that has one of the blocks from `first` on that are asked for.
    fn look_change(&self, view: View, first: u8, change: &Change<'_>, best: &mut [Best]) {
        let last = first + (best.len() - 1) as u8;
        match change.kind {
            ChangeKind::Move => {
                let best = &mut best[usize::from(change.start - first)];
                let (from, to) = change.places();
                if (best.branch, best.sequence, best.place)
                    == (change.branch, change.sequence, from)
                {
                    best.place = to;
                }
            }
            ChangeKind::Write if self.sees(view, change.branch, change.sequence) => {
                for block in change.start.max(first)..=change.last.min(last) {
                    best[usize::from(block - first)].offer(&change.version(block));
                }
            }
            ChangeKind::Write => {}
            ChangeKind::Trim | ChangeKind::Mark => {
                let version = (change.branch, change.sequence);
                self.look_hole(view, version, (change.start, change.last), first, best);
            }
        }
    }

    fn look_hole(
        &self,
        view: View,
        by: (u32, u64),
        blocks: (u8, u8),
        first: u8,
        best: &mut [Best],
    ) {
        let last = first + (best.len() - 1) as u8;
        let ((branch, sequence), (start, end)) = (by, blocks);
        if end < first || start > last || !self.sees(view, branch, sequence) {
            return;
        }
        for block in start.max(first)..=end.min(last) {
            let hole = Version { sequence, place: TOMBSTONE, branch, crc: 0, block };
            best[usize::from(block - first)].offer(&hole);
        }
    }

    /// Every version of `block`, moves applied: for the cleaner's question.
    pub fn versions_of(&self, block: u64, loaded: &Loaded) -> Result<Vec<Version>, Vec<Missing>> {
        let (range, within) = (range_of(block), (block % RANGE_BLOCKS) as u8);
        let (mut versions, mut missing) = (Vec::new(), Vec::new());
        let slots = self.directory.range(range).map_or(&[][..], |entry| entry.slots());
        for slot in slots.iter().filter(|slot| slot.first <= within && within <= slot.last) {
            match page_of(slot, loaded) {
                Some(page) => page.for_each(within, within, |version| versions.push(version)),
                None => missing.push(Missing::of(range, slot)),
            }
        }
        if !missing.is_empty() {
            return Err(missing);
        }
        let delta = self.directory.delta(range).into_iter().flat_map(|delta| delta.changes());
        for change in delta.filter(|change| change.start <= within && within <= change.last) {
            match change.kind {
                ChangeKind::Write => {
                    versions.retain(|old: &Version| {
                        (old.branch, old.sequence) != (change.branch, change.sequence)
                    });
                    versions.push(change.version(within));
                }
                ChangeKind::Move => {
                    let (from, to) = change.places();
                    let moved = (change.branch, change.sequence, from);
                    let is = |old: &&mut Version| (old.branch, old.sequence, old.place) == moved;
                    versions.iter_mut().filter(is).for_each(|old| old.place = to);
                }
                ChangeKind::Trim | ChangeKind::Mark => {}
            }
        }
        Ok(versions)
    }
}

/// The answer of a look-up, from one [`Best`] per block.
pub(super) fn runs_of(start: u64, best: &[Best]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(1);
    for (block, best) in (start..).zip(best) {
        let hole = best.place == 0 || best.place == TOMBSTONE;
        let version = BlockVersion {
            crc: best.crc,
            branch: BranchId(best.branch),
            sequence: Sequence(best.sequence),
        };
        if let Some(run) = runs.last_mut() {
            match &mut run.what {
                RunContent::Hole if hole => {
                    run.count += 1;
                    continue;
                }
                RunContent::Data { first, versions }
                    if !hole && first.0 + u64::from(run.count) == best.place =>
                {
                    versions.push(version);
                    run.count += 1;
                    continue;
                }
                _ => {}
            }
        }
        let what = match hole {
            true => RunContent::Hole,
            false => RunContent::Data { first: Place(best.place), versions: vec![version] },
        };
        runs.push(Run { start: block, count: 1, what });
    }
    runs
}
