//! Waiting for conditions, never for time.

use std::time::{Duration, Instant};

/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// Looks again and again until there is an answer.
///
/// # Panics
/// When there is none in this many seconds; the message says what was waited for.
#[track_caller]
pub fn until<T>(what: &str, seconds: u64, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed().as_secs() < seconds, "{what} did not come in {seconds} s");
        std::thread::sleep(POLL);
    }
}

/// As [`until`], for a condition that has nothing to give.
///
/// # Panics
/// As [`until`].
#[track_caller]
pub fn until_true(what: &str, seconds: u64, mut look: impl FnMut() -> bool) {
    until(what, seconds, || look().then_some(()));
}
