//! Memory for clean pages, shared by the maps of a pool.
//!
//! A second-chance ring of ranges: one that was used since the last round stays. Dirty pages are
//! not in it: they stay until a checkpoint has written them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

use super::state::{Evicted, State};

/// Memory for clean pages, shared by the maps of a pool. A cheap handle.
#[derive(Clone)]
pub struct PageCache {
    inner: Rc<RefCell<Ring>>,
}

struct Ring {
    bytes_max: usize,
    bytes: usize,
    ring: VecDeque<(Weak<RefCell<State>>, u32)>,
}

impl PageCache {
    /// Holds at most `bytes_max` of clean pages.
    pub fn new(bytes_max: usize) -> Self {
        let ring = Ring { bytes_max, bytes: 0, ring: VecDeque::new() };
        Self { inner: Rc::new(RefCell::new(ring)) }
    }

    /// Memory in use, in bytes.
    pub fn bytes(&self) -> usize {
        self.inner.borrow().bytes
    }

    pub(super) fn add(&self, bytes: usize) {
        self.inner.borrow_mut().bytes += bytes;
    }

    pub(super) fn subtract(&self, bytes: usize) {
        self.inner.borrow_mut().bytes -= bytes;
    }

    /// Puts a range on the round; its map marks it so.
    pub(super) fn enlist(&self, map: &Rc<RefCell<State>>, range: u32) {
        self.inner.borrow_mut().ring.push_back((Rc::downgrade(map), range));
    }

    /// A map ends, and with it its pages.
    pub(super) fn dismiss(&self, map: &Rc<RefCell<State>>, bytes: usize) {
        let inner = &mut *self.inner.borrow_mut();
        inner.bytes -= bytes;
        inner.ring.retain(|(other, _)| !std::ptr::eq(other.as_ptr(), Rc::as_ptr(map)));
    }

    /// Lets go of pages until the rest fits. Called with no map borrowed.
    pub(super) fn shrink(&self) {
        // Everything is passed twice at most: once to lose its mark, once to go.
        let mut chances = 2 * self.inner.borrow().ring.len();
        while chances > 0 && self.over() {
            chances -= 1;
            let next = self.inner.borrow_mut().ring.pop_front();
            let Some((map, range)) = next else { return };
            let Some(state) = map.upgrade() else { continue };
            let evicted = state.borrow_mut().evict(range);
            match evicted {
                Evicted::Bytes(bytes) => self.subtract(bytes),
                Evicted::Used => self.inner.borrow_mut().ring.push_back((map, range)),
            }
        }
    }

    fn over(&self) -> bool {
        let inner = self.inner.borrow();
        inner.bytes > inner.bytes_max
    }
}
