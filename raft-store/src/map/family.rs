//! Branches and snapshots of a family. The commands of hosts and administrators that lead here are
//! the business of the layers above; keys, pages and liveness carry them from the start.

use ballast_block::{BranchId, Sequence};

use super::ExtentMap;
use super::state::range_of;
use super::types::{FreedSink, MapError, PageIo, PageSubject};

impl<I: PageIo + FreedSink + 'static> ExtentMap<I> {
    /// Keeps everything that `branch` shows at `sequence` (its newest now) until it is deleted;
    /// goes into every later root.
    pub fn add_snapshot(&self, branch: BranchId, sequence: Sequence) {
        self.state.borrow_mut().branches.add_snapshot(branch.0, sequence.0);
    }

    /// Deletes a snapshot; the space comes back with the next merge. Answers whether there was one.
    pub fn remove_snapshot(&self, branch: BranchId, sequence: Sequence) -> bool {
        let state = &mut *self.state.borrow_mut();
        let was = state.branches.remove_snapshot(branch.0, sequence.0);
        if was {
            state.look_for_dead();
        }
        was
    }

    /// A new branch that shows what `parent` shows at `sequence` (pinned, or its newest now) and is
    /// written to on its own: a clone; or the new head of a rollback, with [`Self::retire_branch`]
    /// of the old one.
    pub fn fork(&self, parent: BranchId, sequence: Sequence) -> BranchId {
        BranchId(self.state.borrow_mut().branches.fork(parent.0, sequence.0))
    }

    /// Nobody writes `branch` or reads its newest state any more: only its snapshots and what forked
    /// from it keep versions of it. Space comes back with the next merge.
    pub fn retire_branch(&self, branch: BranchId) {
        let state = &mut *self.state.borrow_mut();
        state.branches.retire(branch.0);
        state.look_for_dead();
    }

    /// Every replica of the family has all changes up to `sequence`: tombstones up to it are kept
    /// only where they hide something, and differences since anything older are refused.
    pub fn forget_tombstones(&self, sequence: Sequence) {
        let state = &mut *self.state.borrow_mut();
        state.floor = state.floor.max(sequence.0);
    }

    /// Ends the map: every place and every page of it is reported as freed. It must not be used
    /// afterwards, nor be part of a later checkpoint. For a dropped or replaced replica.
    ///
    /// # Errors
    /// The first [`MapError`], when pages can't be read: places of these ranges are not reported;
    /// everything else is, and all pages.
    ///
    /// # Panics
    /// Between [`Self::freeze`] and the end of [`Self::write_frozen`]: a bug of the caller.
    pub async fn wipe(&self) -> Result<(), MapError> {
        {
            let state = &mut *self.state.borrow_mut();
            assert!(!state.freezing, "a frozen map is being written");
            state.pins.clear();
            state.branches.let_go();
            state.look_for_dead();
        }
        let mut problem = Ok(());
        while let Err(error) = self.merge(0).await {
            let (MapError::DamagedPage { what, .. } | MapError::ReadPage { what, .. }) = error
            else {
                return Err(error);
            };
            let PageSubject::Blocks(first) = what else { return Err(error) };
            let uncached = self.state.borrow_mut().forget(range_of(first));
            self.cache.subtract(uncached);
            problem = problem.and(Err(error));
        }
        let pages = self.state.borrow_mut().give_up_pages();
        pages.into_iter().for_each(|at| self.io.page_freed(at));
        problem
    }
}
