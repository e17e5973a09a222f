//! Waiting for conditions, never for time.

use std::time::{Duration, Instant};

/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// Looks again and again until there is an answer.
///
/// # Panics
/// When there is none in this many seconds; the message says what was waited for.
#[track_caller]
pub fn until<T>(what: &str, seconds: u64, look: impl FnMut() -> Option<T>) -> T {
    within(seconds, look).unwrap_or_else(|| panic!("{what} did not come in {seconds} s"))
}

/// As [`until`], but answers nothing when there is no answer in time: who asked may know more.
pub fn within<T>(seconds: u64, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if start.elapsed().as_secs() >= seconds {
            return None;
        }
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
