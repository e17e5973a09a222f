//! What the machine itself does to a measurement: how long it ran nothing at all.
//!
//! A virtual machine may stand still for a second, and everything in it does. A test that bounds a stall
//! of the servers has to tell that one from theirs. Knows nothing of servers, and excuses no slow disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::verify::unix_ms;

/// Between two signs of life.
const TICK: Duration = Duration::from_millis(5);

/// A longer time without a sign of life is noted: schedulers do not let one that wakes up wait so long.
const NOTED: Duration = Duration::from_millis(50);

/// Beginnings and lengths, in milliseconds since 1970 and milliseconds.
type Pauses = Arc<Mutex<Vec<(u64, u64)>>>;

/// A watch over the machine, from its making to its end.
#[derive(Debug)]
pub struct Machine {
    pauses: Pauses,
    ended: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl Machine {
    /// Watches from now on.
    pub fn watch() -> Machine {
        let (pauses, ended) = (Pauses::default(), Arc::<AtomicBool>::default());
        let (noted, end) = (pauses.clone(), ended.clone());
        let watcher = std::thread::spawn(move || {
            let mut last = Instant::now();
            while !end.load(Ordering::Relaxed) {
                std::thread::sleep(TICK);
                let gap = last.elapsed();
                last = Instant::now();
                if gap >= NOTED {
                    let ms = gap.as_millis() as u64;
                    lock(&noted).push((unix_ms().saturating_sub(ms), ms));
                }
            }
        });
        Machine { pauses, ended, watcher: Some(watcher) }
    }

    /// For how many milliseconds the machine stood still between these times, in milliseconds since 1970.
    pub fn paused_between(&self, from: u64, to: u64) -> u64 {
        let pauses = lock(&self.pauses);
        let within =
            |(begin, ms): &(u64, u64)| (begin + ms).min(to).saturating_sub(from.max(*begin));
        pauses.iter().map(within).sum()
    }
}

fn lock(pauses: &Mutex<Vec<(u64, u64)>>) -> std::sync::MutexGuard<'_, Vec<(u64, u64)>> {
    pauses.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            // It has nothing to panic about.
            let _ = watcher.join();
        }
    }
}
