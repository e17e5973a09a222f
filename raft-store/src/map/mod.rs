//! The extent map of one family on one replica: which payload each version of each block has.
//!
//! Step 7 of a write ends here ([`ExtentMap::write`]: memory only, into a bounded delta), and a
//! read's map look-up ([`ExtentMap::lookup`]). Keyed (block, branch, sequence), one record per
//! payload. Owns delta, pages, history, branch table and pins. Touches the disk only through
//! [`PageIo`], never decides what a write means, never frees space: it says what is free
//! ([`FreedSink`]). Formats: docs/extent-map.md; reasons: docs/decisions/0002-extent-map.md.

use std::rc::Rc;

use ballast_block::{BlockRange, BranchId, Sequence};

use crate::place::Place;

mod types;

pub use types::{
    BlockVersion, DiffData, DiffPage, DiffRun, FreedSink, MapError, Move, PAGE_BYTES_MAX,
    PageAddress, PageIo, PageIoError, PageSubject, PinId, ROOT_BRANCH, Run, RunContent,
};

/// The extent map of one family on one replica. One thread, no clone: share it with `Rc`.
pub struct ExtentMap<I> {
    never: std::convert::Infallible,
    _io: Rc<I>,
}

/// Memory for clean pages, shared by the maps of a pool.
#[derive(Clone)]
pub struct PageCache {
    never: std::convert::Infallible,
}

/// A map as it stood when it was frozen; takes up memory until it is written.
pub struct FrozenMap {
    never: std::convert::Infallible,
}

impl PageCache {
    /// Holds at most `bytes_max` of clean pages.
    pub fn new(_bytes_max: usize) -> Self {
        unreachable!("this build has no extent map yet")
    }
}

impl<I: PageIo + FreedSink + 'static> ExtentMap<I> {
    /// An empty map.
    pub fn new(_io: Rc<I>, cache: &PageCache) -> Self {
        match cache.never {}
    }

    /// The map of a checkpoint; reads the directory and the unmerged changes.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn load(_root: &[u8], _io: Rc<I>, cache: &PageCache) -> Result<Self, MapError> {
        match cache.never {}
    }

    /// Points `range` of `branch` at payload that lies back to back from `first`. Memory only.
    /// Of two writes of a block the higher sequence wins, in whatever order they come; a repeated
    /// (block, branch, sequence) replaces the earlier one.
    pub fn write(
        &self,
        _branch: BranchId,
        _sequence: Sequence,
        _range: BlockRange,
        _first: Place,
        _crcs: &[u32],
    ) {
        match self.never {}
    }

    /// Unmaps blocks: they read as zeroes. Memory only, one record however long.
    pub fn trim(&self, _branch: BranchId, _sequence: Sequence, _start: u64, _count: u64) {
        match self.never {}
    }

    /// Records moves of the cleaner; each `from` is reported as freed at once. Each must still be
    /// live in the caller's accounting at this moment (no await since it was checked): a block that
    /// died while it was copied is no move, its copy is dead.
    pub fn relocate(&self, _moves: &[Move]) {
        match self.never {}
    }

    /// What `range` of `branch` holds, now or at a pinned sequence: runs in order, without gaps.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn lookup(
        &self,
        _branch: BranchId,
        _at: Option<Sequence>,
        _range: BlockRange,
    ) -> Result<Vec<Run>, MapError> {
        match self.never {}
    }

    /// As [`Self::lookup`] when every page that it needs is in memory.
    pub fn try_lookup(
        &self,
        _branch: BranchId,
        _at: Option<Sequence>,
        _range: BlockRange,
    ) -> Option<Vec<Run>> {
        match self.never {}
    }

    /// Memory of unmerged changes, in bytes.
    pub fn delta_bytes(&self) -> usize {
        match self.never {}
    }

    /// Memory of pages that only a checkpoint can release, in bytes.
    pub fn dirty_bytes(&self) -> usize {
        match self.never {}
    }

    /// Merges changes into pages, fullest page first, until at most `target_bytes` are left; with 0
    /// all accounting is exact afterwards (the quiet point). Also tidies after unpins.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn merge(&self, _target_bytes: usize) -> Result<(), MapError> {
        match self.never {}
    }

    /// Keeps everything that `branch` shows at `sequence`, which must be its newest now.
    pub fn pin(&self, _branch: BranchId, _sequence: Sequence) -> PinId {
        match self.never {}
    }

    /// Releases a view; the space comes back with later merges.
    pub fn unpin(&self, _pin: PinId) {
        match self.never {}
    }

    /// What a pinned view shows that is newer than `since`, from `from_block` on: about `max_blocks`
    /// blocks at most.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn diff(
        &self,
        _pin: PinId,
        _since: Sequence,
        _from_block: u64,
        _max_blocks: usize,
    ) -> Result<DiffPage, MapError> {
        match self.never {}
    }

    /// Which version of `block` has its payload at `place`, if any.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn holds(
        &self,
        _block: u64,
        _place: Place,
    ) -> Result<Option<(BranchId, Sequence)>, MapError> {
        match self.never {}
    }

    /// Captures the map as it stands, without I/O. The one before must be written first.
    pub fn freeze(&self) -> FrozenMap {
        match self.never {}
    }

    /// Writes what a frozen map has and no earlier one; answers the root for the checkpoint body.
    ///
    /// # Errors
    /// [`MapError`]; the pool must then fail: what was frozen is lost.
    pub async fn write_frozen(&self, frozen: FrozenMap) -> Result<Vec<u8>, MapError> {
        match frozen.never {}
    }
}
