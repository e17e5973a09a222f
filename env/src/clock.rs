//! Time.

use std::future::Future;
use std::time::Duration;

/// A point of the monotonic clock: nanoseconds since an arbitrary start of this process.
///
/// It never goes back. It runs on while the process is stopped (SIGSTOP); whether it runs while
/// the machine is paused is the machine's choice (see `reads` in the node's settings).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// Time from `earlier` to this point; zero when `earlier` is later.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This point plus `duration`.
    pub fn after(self, duration: Duration) -> Instant {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Instant(self.0.saturating_add(nanos))
    }
}

/// Clocks of the node.
pub trait Clock {
    /// The monotonic clock.
    fn now(&self) -> Instant;

    /// The wall clock in milliseconds since 1970; for people only, never for a decision.
    fn wall_ms(&self) -> u64;

    /// Returns after `duration` of the monotonic clock.
    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static;
}
