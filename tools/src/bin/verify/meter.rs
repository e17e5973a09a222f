//! Counts and stalls: how much was done, and how long nothing was.
//!
//! A stall is the time between two completions while there was something to complete, whatever
//! the reason: a slow server, a broken connection, none to connect to.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The shortest gap between completions that is noted.
const NOTED: Duration = Duration::from_millis(100);

/// A time without completions.
#[derive(Debug, Clone, Copy)]
pub struct Stall {
    /// When it began, in milliseconds since 1970.
    pub unix_ms: u64,
    /// How long it was, in milliseconds.
    pub ms: u64,
}

/// What was done so far.
#[derive(Debug, Clone)]
pub struct Meter {
    /// Writes, trims and zeroes acknowledged.
    pub writes: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Reads answered and checked.
    pub reads: u64,
    /// Writes that got no answer.
    pub unanswered: u64,
    /// Writes refused for lack of space.
    pub refused: u64,
    /// Longest time from request to answer, in microseconds.
    pub longest_us: u64,
    /// Gaps of 100 ms and more, in order.
    pub stalls: Vec<Stall>,
    last: Instant,
    started: Instant,
}

impl Meter {
    /// Starts counting now.
    pub fn new() -> Meter {
        let now = Instant::now();
        Meter {
            writes: 0,
            bytes: 0,
            reads: 0,
            unanswered: 0,
            refused: 0,
            longest_us: 0,
            stalls: Vec::new(),
            last: now,
            started: now,
        }
    }

    /// A request that was sent then was completed now.
    pub fn completed(&mut self, sent: Instant) {
        self.longest_us = self.longest_us.max(sent.elapsed().as_micros() as u64);
        self.close();
    }

    /// Ends the current gap.
    pub fn close(&mut self) {
        let gap = self.last.elapsed();
        self.last = Instant::now();
        if gap >= NOTED {
            let ms = gap.as_millis() as u64;
            self.stalls.push(Stall { unix_ms: unix_ms().saturating_sub(ms), ms });
        }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Median and maximum of the noted stalls, in milliseconds; zeroes if there was none.
    pub fn summary(&self) -> (u64, u64) {
        let mut all: Vec<u64> = self.stalls.iter().map(|stall| stall.ms).collect();
        all.sort_unstable();
        (all.get(all.len() / 2).copied().unwrap_or(0), all.last().copied().unwrap_or(0))
    }
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_millis() as u64)
}
