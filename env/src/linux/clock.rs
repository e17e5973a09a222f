//! Real time.

use std::future::Future;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::LinuxEnv;
use crate::clock::{Clock, Instant};

impl Clock for LinuxEnv {
    /// CLOCK_BOOTTIME: it also counts the time in which the machine was suspended, so that a
    /// lease doesn't outlive a suspend. All shards of a process read the same clock.
    fn now(&self) -> Instant {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is valid for the write.
        let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
        assert_eq!(result, 0, "CLOCK_BOOTTIME exists since Linux 2.6.39");
        Instant(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    fn wall_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        tokio::time::sleep(duration)
    }
}
