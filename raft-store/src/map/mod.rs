//! The extent map of one family on one replica: which payload each version of each block has.
//!
//! Step 7 of a write ends here ([`ExtentMap::write`]: memory only, into a bounded delta), and a
//! read's map look-up ([`ExtentMap::try_lookup`]). Keyed (block, branch, sequence), one record per
//! payload. Owns delta, pages, history, branch table and pins. Touches the disk only through
//! [`PageIo`], never decides what a write means, never frees space: it says what is free
//! ([`FreedSink`]). Formats: docs/extent-map.md; reasons: docs/decisions/0002-extent-map.md.
//!
//! All state is in one cell that is never borrowed over an await; what needs pages tries, names the
//! missing ones, reads them, and tries again, so every answer and every merge is of one moment.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::limits::VOLUME_BYTES_MAX;
use ballast_block::{BlockRange, BranchId, Sequence};
use bytes::Bytes;

use self::lookup::{Best, Loaded, Missing, View, runs_of};
use self::page::Page;
use self::state::State;
use self::version::{RANGE_BLOCKS, TOMBSTONE};
use crate::place::Place;

mod branch;
mod cache;
mod compact;
mod delta;
mod diff;
mod directory;
mod family;
mod freeze;
mod lookup;
mod merge;
mod page;
mod root;
mod state;
mod types;
mod version;

#[cfg(test)]
mod tests;

/// The pages that a map's root names, each with its checksum: not those that these lead to.
///
/// # Errors
/// What is wrong with the root.
pub(crate) fn pages_of(root: &[u8]) -> Result<Vec<(PageAddress, u32)>, &'static str> {
    let root = root::Root::decode(root)?;
    let lists = root.runs.into_iter().chain(root.leaves);
    Ok(lists.flat_map(|(_, pages)| pages).collect())
}

pub use cache::PageCache;
pub use freeze::FrozenMap;
pub use types::{
    BlockVersion, DiffData, DiffPage, DiffRun, FreedSink, MapError, Move, PAGE_BYTES_MAX,
    PageAddress, PageIo, PageIoError, PageSubject, PinId, ROOT_BRANCH, Run, RunContent,
};

/// Look-ups of up to this many blocks need no memory but for their answer.
const SMALL_LOOKUP: usize = 8;

/// The extent map of one family on one replica. One thread, no clone: share it with `Rc`.
pub struct ExtentMap<I> {
    state: Rc<RefCell<State>>,
    io: Rc<I>,
    cache: PageCache,
}

impl<I> Drop for ExtentMap<I> {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.state.borrow_mut().clean_bytes);
        self.cache.dismiss(&self.state, bytes);
    }
}

impl<I: PageIo + FreedSink + 'static> ExtentMap<I> {
    /// An empty map.
    pub fn new(io: Rc<I>, cache: &PageCache) -> Self {
        let state = Rc::new(RefCell::new(State::with_root()));
        Self { state, io, cache: cache.clone() }
    }

    /// Points `range` of `branch` at payload that lies back to back from `first`. Memory only.
    /// Of two writes of a block the higher sequence wins, in whatever order they come; a repeated
    /// (block, branch, sequence) replaces the earlier one.
    ///
    /// # Panics
    /// On an unknown branch or a block beyond [`VOLUME_BYTES_MAX`]: bugs of the caller.
    pub fn write(
        &self,
        branch: BranchId,
        sequence: Sequence,
        range: BlockRange,
        first: Place,
        crcs: &[u32],
    ) {
        assert!(crcs.len() == range.count as usize && range.end() <= BLOCKS_MAX);
        assert!(first.0 > 0 && first.0 + u64::from(range.count) <= TOMBSTONE);
        self.state.borrow_mut().write(branch.0, sequence.0, range.start, first.0, crcs);
    }

    /// Unmaps blocks: they read as zeroes. Memory only, one record however long. What is unmapped
    /// already leaves no trace: see [`Self::mark_hole`].
    ///
    /// # Panics
    /// As [`Self::write`].
    pub fn trim(&self, branch: BranchId, sequence: Sequence, start: u64, count: u64) {
        let end = start.saturating_add(count).min(BLOCKS_MAX);
        if start < end {
            self.state.borrow_mut().trim(branch.0, sequence.0, start, end - start, false);
        }
    }

    /// As [`Self::trim`], but it shows in differences also where nothing was mapped: for the holes
    /// of a difference that is applied to another map, which has to hand them on later.
    ///
    /// # Panics
    /// As [`Self::write`].
    pub fn mark_hole(&self, branch: BranchId, sequence: Sequence, start: u64, count: u64) {
        assert!(start.checked_add(count).is_some_and(|end| end <= BLOCKS_MAX));
        self.state.borrow_mut().trim(branch.0, sequence.0, start, count, true);
    }

    /// Records moves of the cleaner; each `from` is reported as freed at once. Each must still be
    /// live in the caller's accounting at this moment (no await since it was checked): a block that
    /// died while it was copied is no move, its copy is dead.
    pub fn relocate(&self, moves: &[Move]) {
        for one in moves {
            assert!(one.to.0 > 0 && one.to.0 < TOMBSTONE && one.block < BLOCKS_MAX);
            self.state.borrow_mut().relocate(one);
        }
        moves.iter().for_each(|one| self.io.freed(one.from, 1));
    }

    /// What `range` of `branch` holds, now or at a pinned sequence: runs in order, without gaps.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn lookup(
        &self,
        branch: BranchId,
        at: Option<Sequence>,
        range: BlockRange,
    ) -> Result<Vec<Run>, MapError> {
        let mut loaded = Loaded::new();
        loop {
            match self.attempt(branch, at, range, &loaded) {
                Ok(runs) => return Ok(runs),
                Err(missing) => self.fetch(missing, &mut loaded).await?,
            }
        }
    }

    /// As [`Self::lookup`] when every page that it needs is in memory.
    #[inline]
    pub fn try_lookup(
        &self,
        branch: BranchId,
        at: Option<Sequence>,
        range: BlockRange,
    ) -> Option<Vec<Run>> {
        self.attempt(branch, at, range, &Loaded::new()).ok()
    }

    fn attempt(
        &self,
        branch: BranchId,
        at: Option<Sequence>,
        range: BlockRange,
        loaded: &Loaded,
    ) -> Result<Vec<Run>, Vec<Missing>> {
        let view = View { branch: branch.0, at: at.map_or(u64::MAX, |at| at.0) };
        let count = range.count as usize;
        let (mut small, mut large);
        let best = if count <= SMALL_LOOKUP {
            small = [Best::NONE; SMALL_LOOKUP];
            &mut small[..count]
        } else {
            large = vec![Best::NONE; count];
            &mut large[..]
        };
        self.state.borrow().look(view, range, loaded, best)?;
        Ok(runs_of(range.start, best))
    }

    /// Which version of `block` has its payload at `place`, if any.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn holds(
        &self,
        block: u64,
        place: Place,
    ) -> Result<Option<(BranchId, Sequence)>, MapError> {
        let mut loaded = Loaded::new();
        loop {
            let versions = self.state.borrow().versions_of(block, &loaded);
            match versions {
                Ok(versions) => {
                    let found = versions.iter().find(|version| version.place == place.0);
                    return Ok(found.map(|one| (BranchId(one.branch), Sequence(one.sequence))));
                }
                Err(missing) => self.fetch(missing, &mut loaded).await?,
            }
        }
    }

    /// Memory of unmerged changes, in bytes.
    pub fn delta_bytes(&self) -> usize {
        self.state.borrow().delta_bytes
    }

    /// Pages that only a checkpoint can release from memory, in bytes on disk or in memory, whichever
    /// is more.
    pub fn dirty_bytes(&self) -> usize {
        self.state.borrow().dirty_bytes
    }

    /// Merges changes into pages, fullest page first, until at most `target_bytes` are left; with 0
    /// all accounting is exact afterwards (the quiet point). Trims over many ranges are worked off
    /// and unpinned history is tidied in any case.
    ///
    /// # Errors
    /// [`MapError`]; what could not be merged stays, look-ups of other ranges go on.
    pub async fn merge(&self, target_bytes: usize) -> Result<(), MapError> {
        while self.delta_bytes() > target_bytes {
            let fullest = self.state.borrow_mut().fullest();
            let Some(range) = fullest else { break };
            self.merge_range(range, false).await?;
        }
        loop {
            let next = self.state.borrow_mut().next_wide();
            let Some((id, range)) = next else { break };
            self.merge_range(range, false).await?;
            self.state.borrow_mut().wide_reached(id, range);
        }
        loop {
            let next = self.state.borrow_mut().untidy.pop_first();
            let Some(range) = next else { break };
            if let Err(error) = self.merge_range(range, true).await {
                self.state.borrow_mut().untidy.insert(range);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn merge_range(&self, range: u32, tidy: bool) -> Result<(), MapError> {
        let mut loaded = Loaded::new();
        loop {
            let merged = self.state.borrow_mut().merge_range(range, tidy, &loaded);
            match merged {
                Ok(merged) => {
                    self.cache.subtract(merged.uncached);
                    for (place, count) in merged.freed {
                        self.io.freed(Place(place), count);
                    }
                    turn().await;
                    return Ok(());
                }
                Err(missing) => self.fetch(missing, &mut loaded).await?,
            }
        }
    }

    /// Reads pages into the cache, and into `loaded` so that they stay for this operation.
    async fn fetch(&self, missing: Vec<Missing>, loaded: &mut Loaded) -> Result<(), MapError> {
        for one in missing {
            let what = PageSubject::Blocks(u64::from(one.range) * RANGE_BLOCKS);
            let at = one.at;
            let read = self.io.read_page(at).await;
            let opened = match read {
                Err(source) => Err(MapError::ReadPage { what, at, source }),
                Ok(bytes) => {
                    // A copy of just its size: what was read sits in whole blocks of a pool.
                    let bytes = Bytes::copy_from_slice(&bytes);
                    Page::open(bytes, one.kind, one.range, one.branch, one.crc)
                        .map_err(|problem| MapError::DamagedPage { what, at, problem })
                }
            };
            let mut state = self.state.borrow_mut();
            match opened {
                // Replaced while it was read: its space may be in use again. Whoever asked for it
                // tries again, and won't.
                Err(_) if !state.has_page_at(one.range, at) => continue,
                Err(error) => return Err(error),
                Ok(page) => {
                    let page = Rc::new(page);
                    let (bytes, enlist) = state.cached(one.range, at, &page);
                    self.cache.add(bytes);
                    if enlist {
                        self.cache.enlist(&self.state, one.range);
                    }
                    loaded.push((at, page));
                }
            }
        }
        self.cache.shrink();
        Ok(())
    }
}

const BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_SIZE_U64;

/// Lets the shard's other tasks run.
fn turn() -> impl Future<Output = ()> {
    let mut passed = false;
    poll_fn(move |context| {
        if std::mem::replace(&mut passed, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
}
