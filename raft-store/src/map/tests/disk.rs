//! A disk in memory, and the accounting that a pool would keep.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::map::{FreedSink, PageAddress, PageIo, PageIoError, turn};
use crate::place::Place;

/// What the pool counts.
#[derive(Clone, Default)]
pub struct Accounts {
    /// Places that hold live payload as far as was reported.
    pub live: BTreeSet<u64>,
}

#[derive(Default)]
pub struct Disk {
    pub pages: RefCell<BTreeMap<u64, Bytes>>,
    next: Cell<u64>,
    pub accounts: RefCell<Accounts>,
    /// Pages that go when the checkpoint being written is durable.
    pub doomed: RefCell<Vec<PageAddress>>,
    pub reads: Cell<usize>,
    pub written: Cell<u64>,
    /// Reads take that many turns.
    pub slow: Cell<usize>,
    /// Pages when the last checkpoint became durable: what a pool knows after a crash.
    durable: RefCell<BTreeSet<u64>>,
}

impl Disk {
    /// A crash: a new process sees the same pages.
    pub fn reboot(&self, accounts: Accounts) -> Self {
        let disk = Self::default();
        let mut pages = self.pages.borrow().clone();
        pages.retain(|offset, _| self.durable.borrow().contains(offset));
        disk.pages.replace(pages);
        disk.durable.replace(self.durable.borrow().clone());
        disk.next.set(self.next.get());
        disk.accounts.replace(accounts);
        disk.slow.set(self.slow.get());
        disk
    }

    /// Takes down which pages there are: the checkpoint is durable.
    pub fn remember(&self) {
        self.durable.replace(self.pages.borrow().keys().copied().collect());
    }

    /// The checkpoint is durable: pages that it does without are overwritten.
    pub fn checkpointed(&self) {
        for at in self.doomed.take() {
            let page = self.pages.borrow_mut().remove(&at.offset);
            assert_eq!(page.map(|page| page.len()), Some(at.length as usize), "freed twice: {at}");
        }
    }
}

impl PageIo for Disk {
    fn append_page(&self, page: Bytes) -> Result<PageAddress, PageIoError> {
        let offset = self.next.get().max(4096);
        self.next.set(offset + page.len() as u64);
        self.written.set(self.written.get() + page.len() as u64);
        let length = page.len() as u32;
        self.pages.borrow_mut().insert(offset, page);
        Ok(PageAddress { offset, length })
    }

    async fn read_page(&self, at: PageAddress) -> Result<Bytes, PageIoError> {
        self.reads.set(self.reads.get() + 1);
        for _ in 0..self.slow.get() {
            turn().await;
        }
        let pages = self.pages.borrow();
        let page = pages.get(&at.offset).ok_or_else(|| PageIoError("overwritten".into()))?;
        Ok(page.slice(..at.length as usize))
    }
}

impl FreedSink for Disk {
    fn freed(&self, place: Place, count: u32) {
        for place in place.0..place.0 + u64::from(count) {
            let was = self.accounts.borrow_mut().live.remove(&place);
            assert!(was, "place {place} was freed twice, or never written");
        }
    }

    fn page_freed(&self, at: PageAddress) {
        self.doomed.borrow_mut().push(at);
    }
}
