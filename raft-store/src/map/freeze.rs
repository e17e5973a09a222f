//! Checkpoint of a map: captured at once, written at leisure, loaded at start.
//!
//! The root refers to directory leaves, these to pages; only what changed is written again. Changes
//! that are not merged are written as runs, once each; a range knows up to which run it is merged.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::delta::Delta;
use super::directory::{LEAF_RANGES, Range, decode_leaf, encode_leaf, split};
use super::page::{HEADER_BYTES, Page, PageHeader, PageKind};
use super::root::{PageRef, Root, WideTrim};
use super::state::{ChangesRun, State};
use super::types::{FreedSink, MapError, PageAddress, PageIo, PageSubject};
use super::version::{RANGE_BLOCKS, get32};
use super::{ExtentMap, PageCache, turn};

/// A page of changes ends before this many bytes.
const CHANGES_PAGE_BYTES: usize = 64 << 10;

/// Runs of changes on disk beyond which all that is unmerged is written again as one.
const RUNS_MAX: usize = 64;

/// Age of the oldest run, in generations, beyond which the same happens: the low bytes of their
/// generations must differ.
const GENERATIONS_MAX: u32 = 200;

/// Runs may hold this much that is merged, beside as much again as is not.
const RUNS_WASTE_BYTES: usize = 1 << 20;

/// Leaves read at a time at load.
const LOAD_DEPTH: usize = 16;

/// A map as it stood when it was frozen. Its memory is shared with the map until either changes.
pub struct FrozenMap {
    /// Without the leaves in `leaves` and the pages in `changes`.
    root: Root,
    leaves: Vec<(u32, Rc<Vec<Range>>)>,
    changes: Vec<Bytes>,
    superseded: Vec<PageAddress>,
    /// Of the oldest run that may be read at load.
    oldest: u32,
}

impl State {
    fn freeze(&mut self) -> FrozenMap {
        assert!(!self.freezing, "the frozen map before this one is not written yet");
        self.freezing = true;
        self.generation += 1;
        self.drop_runs();
        let changes = self.freeze_changes();
        let mut superseded = std::mem::take(&mut self.superseded);
        let (mut leaves, mut clean) = (Vec::new(), Vec::new());
        for (number, leaf) in self.directory.leaves.iter_mut().enumerate() {
            let number = number as u32;
            let Some(leaf) = leaf else { continue };
            if leaf.dirty {
                leaf.dirty = false;
                superseded.extend(leaf.at.drain(..).map(|(at, _)| at));
                leaves.push((number, leaf.ranges.clone()));
            } else if !leaf.at.is_empty() {
                clean.push((number, leaf.at.clone()));
            }
        }
        let wide = self.wide.iter();
        let wide = wide.map(|&super::state::Wide { branch, sequence, start, end, .. }| WideTrim {
            branch,
            sequence,
            start,
            end,
        });
        let root = Root {
            generation: self.generation,
            untidy: self.branches.has_volatile_pins() || !self.untidy.is_empty(),
            floor: self.floor,
            branches: self.branches.clone(),
            wide: wide.collect(),
            runs: self.runs.iter().map(|run| (run.generation, run.pages.clone())).collect(),
            leaves: clean,
        };
        let oldest = self.runs.first().map_or(self.generation, |run| run.generation);
        FrozenMap { root, leaves, changes, superseded, oldest }
    }

    /// Forgets runs of which everything is merged; all of them, when they hold mostly that.
    fn drop_runs(&mut self) {
        let bytes: usize = self.runs.iter().map(|run| run.bytes).sum();
        let oldest = self.runs.first().map_or(self.generation, |run| run.generation);
        let rewrite = std::mem::take(&mut self.rewrite_runs)
            || self.runs.len() >= RUNS_MAX
            || self.generation - oldest >= GENERATIONS_MAX
            || bytes > 2 * self.delta_bytes + RUNS_WASTE_BYTES;
        if rewrite {
            self.retag_all(self.generation as u8);
        }
        let Self { runs, live, superseded, .. } = self;
        runs.retain(|run| {
            let needed = !rewrite && live[usize::from(run.generation as u8)] > 0;
            if !needed {
                superseded.extend(run.pages.iter().map(|(at, _)| *at));
            }
            needed
        });
    }

    /// What came in since the last freeze and is not merged, as pages.
    fn freeze_changes(&mut self) -> Vec<Bytes> {
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        let mut pages = ChangesPages::new(self.generation);
        let mut records = 0;
        for range in touched {
            let delta = &mut self.directory.leaf_mut(range).deltas[split(range).1];
            if let Some(delta) = delta.as_deref_mut().filter(|delta| delta.unfrozen > 0) {
                records += delta.unfrozen;
                pages.push(range, delta);
                delta.freeze();
            }
        }
        self.live[usize::from(self.generation as u8)] = records;
        pages.finish()
    }

    /// A page of a frozen leaf is on disk: it is clean, if it is still in use. Answers how much
    /// memory turned clean, and whether the cache has to learn of the range.
    fn installed(&mut self, range: u32, page: &Rc<Page>, at: PageAddress) -> (usize, bool) {
        let entry = self.directory.range_mut(range);
        let is_it = |slot: &&mut super::directory::Slot| {
            slot.dirty && slot.page.as_ref().is_some_and(|one| Rc::ptr_eq(one, page))
        };
        let Some(slot) = entry.slots.as_mut_slice().iter_mut().find(is_it) else {
            self.superseded.push(at);
            return (0, false);
        };
        slot.at = at;
        slot.dirty = false;
        let enlist = !std::mem::replace(&mut entry.ringed, true);
        self.dirty_bytes -= page.dirty_bytes();
        self.clean_bytes += page.memory();
        (page.memory(), enlist)
    }
}

/// Builds pages of changes.
struct ChangesPages {
    generation: u32,
    pages: Vec<Bytes>,
    page: Vec<u8>,
    count: u32,
}

impl ChangesPages {
    fn new(generation: u32) -> Self {
        Self { generation, pages: Vec::new(), page: PageHeader::space(0), count: 0 }
    }

    /// The records of `range` that no checkpoint has: an entry, or several when they are many.
    fn push(&mut self, range: u32, delta: &Delta) {
        let mut from = delta.frozen as usize;
        let bytes = delta.bytes();
        while from < bytes.len() {
            let fits = from + CHANGES_PAGE_BYTES / 2;
            let mut ends = delta.changes_from(from).map(|change| change.end());
            let first = ends.next().expect("there is a record at `from`");
            let end = ends.take_while(|&end| end <= fits).last().unwrap_or(first);
            if self.page.len() + 8 + end - from > CHANGES_PAGE_BYTES {
                self.close();
            }
            self.page.extend_from_slice(&range.to_le_bytes());
            self.page.extend_from_slice(&((end - from) as u32).to_le_bytes());
            self.page.extend_from_slice(&bytes[from..end]);
            self.count += 1;
            from = end;
        }
    }

    fn close(&mut self) {
        let header = PageHeader {
            kind: PageKind::Changes,
            first: 0,
            last: 0,
            subject: self.generation,
            branch: 0,
            count: self.count,
            newest: 0,
        };
        let page = std::mem::replace(&mut self.page, PageHeader::space(CHANGES_PAGE_BYTES));
        self.pages.push(header.seal(page));
        self.count = 0;
    }

    fn finish(mut self) -> Vec<Bytes> {
        if self.count > 0 {
            self.close();
        }
        self.pages
    }
}

impl<I: PageIo + FreedSink + 'static> ExtentMap<I> {
    /// Captures the map as it stands, without I/O. The one before must be written first.
    pub fn freeze(&self) -> FrozenMap {
        self.state.borrow_mut().freeze()
    }

    /// Writes what a frozen map has and no earlier one; answers the root for the checkpoint body.
    ///
    /// # Errors
    /// [`MapError`]; the pool must then fail: what was frozen is lost.
    pub async fn write_frozen(&self, frozen: FrozenMap) -> Result<Vec<u8>, MapError> {
        let FrozenMap { mut root, leaves, changes, superseded, oldest } = frozen;
        for (number, ranges) in leaves {
            let pages = self.write_leaf(number, ranges, oldest)?;
            if !pages.is_empty() {
                root.leaves.push((number, pages));
            }
            self.cache.shrink();
            turn().await;
        }
        root.leaves.sort_unstable_by_key(|leaf| leaf.0);
        if !changes.is_empty() {
            let bytes = changes.iter().map(Bytes::len).sum();
            let pages = changes.into_iter().map(|page| self.append(page));
            let pages = pages.collect::<Result<Vec<_>, _>>()?;
            let generation = root.generation;
            root.runs.push((generation, pages.clone()));
            self.state.borrow_mut().runs.push(ChangesRun { generation, pages, bytes });
        }
        superseded.into_iter().for_each(|at| self.io.page_freed(at));
        self.state.borrow_mut().freezing = false;
        Ok(root.encode())
    }

    fn append(&self, page: Bytes) -> Result<PageRef, MapError> {
        let crc = get32::<4>(&page, 0);
        let at = self.io.append_page(page).map_err(MapError::WritePage)?;
        assert!(at.offset > 0 && at.offset < 1 << 56, "page addresses are 56 bits, never 0");
        Ok((at, crc))
    }

    /// Writes the dirty pages of a frozen leaf, then the leaf.
    fn write_leaf(
        &self,
        number: u32,
        ranges: Rc<Vec<Range>>,
        oldest: u32,
    ) -> Result<Vec<PageRef>, MapError> {
        let mut written = Vec::new();
        for (within, range) in ranges.iter().enumerate() {
            for slot in range.slots().iter().filter(|slot| slot.dirty) {
                let page = slot.page.as_ref().expect("a dirty page is in memory").clone();
                let (at, _) = self.append(page.bytes().clone())?;
                written.push((number * LEAF_RANGES as u32 + within as u32, page, at));
            }
        }
        let mut next = written.iter();
        let pages = encode_leaf(number, &ranges, oldest, |slot| match slot.dirty {
            true => next.next().expect("written in the same order").2,
            false => slot.at,
        });
        let pages: Vec<_> =
            pages.into_iter().map(|page| self.append(page)).collect::<Result<_, _>>()?;
        drop(ranges);
        let state = &mut *self.state.borrow_mut();
        state.directory.leaf_mut(number * LEAF_RANGES as u32).at.clone_from(&pages);
        for (range, page, at) in &written {
            let (bytes, enlist) = state.installed(*range, page, *at);
            self.cache.add(bytes);
            if enlist {
                self.cache.enlist(&self.state, *range);
            }
        }
        Ok(pages)
    }

    /// The map of a checkpoint; reads the directory and the unmerged changes.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn load(root: &[u8], io: Rc<I>, cache: &PageCache) -> Result<Self, MapError> {
        let root = Root::decode(root).map_err(MapError::DamagedRoot)?;
        let mut state = State::new(root.branches);
        state.generation = root.generation;
        state.floor = root.floor;
        let pages = root.leaves.iter();
        let pages = pages.flat_map(|(number, pages)| pages.iter().map(|page| (*number, *page)));
        let mut pages = stream::iter(pages)
            .map(|(number, page)| {
                let what =
                    PageSubject::Directory(u64::from(number) * LEAF_RANGES as u64 * RANGE_BLOCKS);
                let read = read(&*io, what, page.0);
                async move { Ok::<_, MapError>((number, page, what, read.await?)) }
            })
            .buffered(LOAD_DEPTH);
        while let Some((number, (at, crc), what, bytes)) = pages.try_next().await? {
            let leaf = state.directory.leaf_mut(number * LEAF_RANGES as u32);
            let ranges = Rc::get_mut(&mut leaf.ranges).expect("not shared yet");
            decode_leaf(number, &bytes, crc, ranges).map_err(|problem| MapError::DamagedPage {
                what,
                at,
                problem,
            })?;
            leaf.at.push((at, crc));
        }
        drop(pages);
        for (generation, pages) in root.runs {
            for &(at, crc) in &pages {
                let bytes = read(&*io, PageSubject::Changes, at).await?;
                restore(&mut state, generation, &bytes, crc).map_err(|problem| {
                    MapError::DamagedPage { what: PageSubject::Changes, at, problem }
                })?;
            }
            let bytes = pages.iter().map(|(at, _)| at.length as usize).sum();
            state.runs.push(ChangesRun { generation, pages, bytes });
        }
        for wide in root.wide {
            state.trim_wide(wide.branch, wide.sequence, wide.start, wide.end);
        }
        state.find_history();
        if root.untidy {
            state.look_for_dead();
        }
        Ok(Self { state: Rc::new(RefCell::new(state)), io, cache: cache.clone() })
    }
}

async fn read(io: &impl PageIo, what: PageSubject, at: PageAddress) -> Result<Bytes, MapError> {
    let read = io.read_page(at).await;
    read.map_err(|source| MapError::ReadPage { what, at, source })
}

/// Takes in a page of changes, but for ranges that have them merged.
fn restore(state: &mut State, generation: u32, page: &[u8], crc: u32) -> Result<(), &'static str> {
    let header = PageHeader::open(page, crc)?;
    if header.kind != PageKind::Changes || header.subject != generation {
        return Err("page of something else");
    }
    let mut rest = &page[HEADER_BYTES..];
    for _ in 0..header.count {
        let (entry, behind) = rest.split_at_checked(8).ok_or("length")?;
        let (range, length) = (get32::<4>(entry, 0), get32::<4>(entry, 4) as usize);
        let (records, behind) = behind.split_at_checked(length).ok_or("length")?;
        if u64::from(range) >= 1 << 26 {
            return Err("range number");
        }
        if state.directory.range(range).is_none_or(|entry| entry.merged < generation) {
            state.restore(range, records, generation as u8)?;
        }
        rest = behind;
    }
    if rest.is_empty() { Ok(()) } else { Err("length") }
}
