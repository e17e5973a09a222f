//! What happened in a run, as a running hash and the last lines of it.
//!
//! Two runs of one seed must give the same hash: that is the proof that a seed replays. Whatever
//! the world decides or delivers is noted; the nodes' own state is seen through what they send and
//! write. Never influences the run.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Lines kept for the report of a failure.
const LINES_KEPT: usize = 4000;

/// The events of a run so far.
#[derive(Debug, Default)]
pub struct Trace {
    hash: Cell<u64>,
    events: Cell<u64>,
    verbose: Cell<bool>,
    last: RefCell<VecDeque<String>>,
}

impl Trace {
    /// Prints every event to standard error as well.
    pub fn set_verbose(&self, verbose: bool) {
        self.verbose.set(verbose);
    }

    /// Notes an event at `at_ms` of virtual time.
    pub fn note(&self, at_ms: u64, text: String) {
        let mut hash = self.hash.get() ^ at_ms.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for byte in text.bytes() {
            hash = (hash.rotate_left(5) ^ u64::from(byte)).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        self.hash.set(hash);
        self.events.set(self.events.get() + 1);
        let line = format!("{at_ms:>8} ms  {text}");
        if self.verbose.get() {
            eprintln!("{line}");
        }
        let mut last = self.last.borrow_mut();
        if last.len() == LINES_KEPT {
            last.pop_front();
        }
        last.push_back(line);
    }

    /// The hash of all events so far.
    pub fn hash(&self) -> u64 {
        self.hash.get()
    }

    /// How many events there were.
    pub fn events(&self) -> u64 {
        self.events.get()
    }

    /// The last `count` events, oldest first.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let last = self.last.borrow();
        last.iter().skip(last.len().saturating_sub(count)).cloned().collect()
    }
}
