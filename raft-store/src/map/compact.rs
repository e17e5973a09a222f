//! Where the pages of a map lie, and moving them: a checkpoint writes only what changed, so pages of
//! ranges that nobody writes to would keep their segments, almost empty, for ever.

use super::ExtentMap;
use super::lookup::{Loaded, Missing};
use super::state::State;
use super::types::{FreedSink, MapError, PageAddress, PageIo};

impl State {
    /// Every page that the last root refers to, and what was written or replaced since.
    fn pages(&self) -> Vec<PageAddress> {
        let mut pages = self.superseded.clone();
        pages.extend(self.runs.iter().flat_map(|run| run.pages.iter().map(|(at, _)| *at)));
        for leaf in self.directory.leaves.iter().flatten() {
            pages.extend(leaf.at.iter().map(|(at, _)| *at));
            let slots = leaf.ranges.iter().flat_map(|range| range.slots());
            pages.extend(slots.filter(|slot| !slot.dirty).map(|slot| slot.at));
        }
        pages
    }

    /// Directory leaves and changes that lie there go with the next checkpoint; answers the ranges
    /// that have pages there.
    fn mark_for_rewrite(&mut self, there: &impl Fn(PageAddress) -> bool) -> Vec<u32> {
        let on_runs = self.runs.iter().flat_map(|run| &run.pages);
        self.rewrite_runs |= on_runs.into_iter().any(|(at, _)| there(*at));
        let mut ranges = Vec::new();
        for (number, leaf) in (0u32..).zip(self.directory.leaves.iter_mut()) {
            let Some(leaf) = leaf else { continue };
            leaf.dirty |= leaf.at.iter().any(|(at, _)| there(*at));
            for (within, range) in (0u32..).zip(leaf.ranges.iter()) {
                if range.slots().iter().any(|slot| !slot.dirty && there(slot.at)) {
                    ranges.push(number * leaf.ranges.len() as u32 + within);
                }
            }
        }
        ranges
    }

    /// Makes the pages of a range that lie there dirty. Answers the memory that left the cache, or
    /// which pages have to be read first.
    fn dirty_pages(
        &mut self,
        range: u32,
        there: &impl Fn(PageAddress) -> bool,
        loaded: &Loaded,
    ) -> Result<usize, Vec<Missing>> {
        let Some(entry) = self.directory.range(range) else { return Ok(0) };
        let wanted = |slot: &&super::directory::Slot| !slot.dirty && there(slot.at);
        let mut missing = Vec::new();
        let mut pages = Vec::new();
        for slot in entry.slots().iter().filter(wanted) {
            match super::lookup::page_of(slot, loaded) {
                Some(page) => pages.push((slot.at, slot.page.is_some(), page.clone())),
                None => missing.push(Missing::of(range, slot)),
            }
        }
        if !missing.is_empty() {
            return Err(missing);
        }
        let (mut uncached, mut dirtied) = (0, 0);
        let entry = self.directory.range_mut(range);
        for (at, cached, page) in pages {
            let slots = entry.slots.as_mut_slice().iter_mut();
            let Some(slot) = slots.into_iter().find(|slot| !slot.dirty && slot.at == at) else {
                continue;
            };
            uncached += if cached { page.memory() } else { 0 };
            dirtied += page.dirty_bytes();
            slot.dirty = true;
            slot.page = Some(page);
            self.superseded.push(at);
        }
        self.clean_bytes -= uncached;
        self.dirty_bytes += dirtied;
        self.directory.leaf_mut(range).dirty = true;
        Ok(uncached)
    }
}

impl<I: PageIo + FreedSink + 'static> ExtentMap<I> {
    /// Every page on disk that is part of the map: for whoever keeps account of them.
    pub fn pages(&self) -> Vec<PageAddress> {
        self.state.borrow().pages()
    }

    /// Ends a map whose blocks belong to another one now: every page of it is reported as freed, no
    /// block is. It must not be used afterwards.
    ///
    /// # Panics
    /// Between [`Self::freeze`] and the end of [`Self::write_frozen`]: a bug of the caller.
    pub fn give_up(&self) {
        assert!(!self.state.borrow().freezing, "a frozen map is being written");
        let pages = self.state.borrow_mut().give_up_pages();
        pages.into_iter().for_each(|at| self.io.page_freed(at));
    }

    /// Whether views of it are pinned.
    pub fn is_pinned(&self) -> bool {
        !self.state.borrow().pins.is_empty()
    }

    /// Makes the next checkpoint write anew every page that lies where `there` says.
    ///
    /// # Errors
    /// [`MapError`]: a page can't be read, and stays where it is.
    pub async fn rewrite(&self, there: impl Fn(PageAddress) -> bool) -> Result<(), MapError> {
        let ranges = self.state.borrow_mut().mark_for_rewrite(&there);
        for range in ranges {
            let mut loaded = Loaded::new();
            loop {
                let dirtied = self.state.borrow_mut().dirty_pages(range, &there, &loaded);
                match dirtied {
                    Ok(uncached) => break self.cache.subtract(uncached),
                    Err(missing) => self.fetch(missing, &mut loaded).await?,
                }
            }
            super::turn().await;
        }
        Ok(())
    }
}
