//! Pinned views and what changed between a sequence and one of them.

use ballast_block::{BlockRange, BranchId, Sequence};

use super::ExtentMap;
use super::lookup::{Best, Loaded, View};
use super::state::State;
use super::types::{DiffData, DiffPage, DiffRun, FreedSink, MapError, PageIo, PinId};
use super::version::{RANGE_BLOCKS, TOMBSTONE};
use crate::place::Place;

impl<I: PageIo + FreedSink + 'static> ExtentMap<I> {
    /// Keeps everything that `branch` shows at `sequence`, which must be its newest now: nothing
    /// that it needs has been dropped yet.
    pub fn pin(&self, branch: BranchId, sequence: Sequence) -> PinId {
        let state = &mut *self.state.borrow_mut();
        let id = state.next_id;
        state.next_id += 1;
        state.branches.pin(branch.0, sequence.0);
        state.pins.insert(id, (branch.0, sequence.0));
        PinId(id)
    }

    /// Releases a view; the space comes back with the next [`Self::merge`].
    pub fn unpin(&self, pin: PinId) {
        let state = &mut *self.state.borrow_mut();
        if let Some((branch, sequence)) = state.pins.remove(&pin.0) {
            state.branches.unpin(branch, sequence);
            state.look_for_dead();
        }
    }

    /// What a pinned view shows that is newer than `since`, from `from_block` on: about `max_blocks`
    /// blocks at most. Applied in any order to the view at `since`, it gives the pinned view.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn diff(
        &self,
        pin: PinId,
        since: Sequence,
        from_block: u64,
        max_blocks: usize,
    ) -> Result<DiffPage, MapError> {
        let mut page = DiffPage { runs: Vec::new(), next: None };
        let (mut block, mut blocks) = (from_block, 0);
        let mut loaded = Loaded::new();
        loop {
            let step = {
                let state = self.state.borrow();
                let view = state.pins.get(&pin.0).ok_or(MapError::NotPinned(pin))?;
                if since.0 > 0 && since.0 < state.floor {
                    let floor = Sequence(state.floor);
                    return Err(MapError::DiffTooOld { since, floor });
                }
                let view = View { branch: view.0, at: view.1 };
                state.diff_step(view, since.0, block, &loaded)
            };
            match step {
                Err(missing) => {
                    self.fetch(missing, &mut loaded).await?;
                    continue;
                }
                Ok(None) => return Ok(page),
                Ok(Some((next, runs))) => {
                    blocks += runs.iter().map(|run| run.count as usize).sum::<usize>();
                    page.runs.extend(runs);
                    block = next;
                }
            }
            loaded.clear();
            if blocks >= max_blocks {
                page.next = Some(block);
                return Ok(page);
            }
        }
    }
}

type Step = Option<(u64, Vec<DiffRun>)>;

impl State {
    /// The changes of the next range at or behind `block` that may have some, and where to go on.
    fn diff_step(
        &self,
        view: View,
        since: u64,
        block: u64,
        loaded: &Loaded,
    ) -> Result<Step, Vec<super::lookup::Missing>> {
        let mut from = super::state::range_of(block);
        loop {
            let Some(range) = self.directory.next_present(from, u32::MAX) else { return Ok(None) };
            let entry = self.directory.range(range).expect("present");
            let wide = self.wide.iter().any(|wide| wide.within(range).is_some());
            if !wide && self.directory.delta(range).is_none() && entry.newest <= since {
                from = range + 1;
                continue;
            }
            let start = block.max(u64::from(range) * RANGE_BLOCKS);
            let end = (u64::from(range) + 1) * RANGE_BLOCKS;
            let mut best = vec![Best::NONE; (end - start) as usize];
            self.look(view, BlockRange::new(start, best.len() as u32), loaded, &mut best)?;
            return Ok(Some((end, changes_of(start, since, &best))));
        }
    }
}

/// The blocks that are newer than `since`, by write.
fn changes_of(start: u64, since: u64, best: &[Best]) -> Vec<DiffRun> {
    let mut runs: Vec<DiffRun> = Vec::new();
    let newer = (start..).zip(best).filter(|(_, best)| best.place != 0 && best.sequence > since);
    for (block, best) in newer {
        if let Some(run) = runs.last_mut()
            && run.start + u64::from(run.count) == block
            && (run.branch.0, run.sequence.0) == (best.branch, best.sequence)
        {
            match &mut run.data {
                None if best.place == TOMBSTONE => {
                    run.count += 1;
                    continue;
                }
                Some(data)
                    if best.place != TOMBSTONE
                        && data.first.0 + u64::from(run.count) == best.place =>
                {
                    data.crcs.push(best.crc);
                    run.count += 1;
                    continue;
                }
                _ => {}
            }
        }
        let data = DiffData { first: Place(best.place), crcs: vec![best.crc] };
        runs.push(DiffRun {
            start: block,
            count: 1,
            branch: BranchId(best.branch),
            sequence: Sequence(best.sequence),
            data: (best.place != TOMBSTONE).then_some(data),
        });
    }
    runs
}
