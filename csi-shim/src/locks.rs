//! One call at a time for a volume, in this process.
//!
//! The specification lets a plugin answer a second one with ABORTED; the orchestrator tries again.
//! Between processes the cluster and the kernel decide.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Refusal;

/// The volumes with a running call.
#[derive(Clone, Debug, Default)]
pub struct Locks(Arc<Mutex<BTreeSet<String>>>);

/// Lets the next call in when dropped.
#[derive(Debug)]
pub struct Held {
    locks: Locks,
    volume: String,
}

impl Locks {
    /// Takes the lock of a volume (its id, or the name it is to have).
    ///
    /// # Errors
    /// [`Refusal::CallRunning`].
    pub fn hold(&self, volume: &str) -> Result<Held, Refusal> {
        let new = self.volumes().insert(volume.to_owned());
        match new {
            true => Ok(Held { locks: self.clone(), volume: volume.to_owned() }),
            false => Err(Refusal::CallRunning(volume.to_owned())),
        }
    }

    fn volumes(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.locks.volumes().remove(&self.volume);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_call_for_a_volume_is_turned_away_until_the_first_ends() {
        let locks = Locks::default();
        let held = locks.hold("a").unwrap();
        assert!(matches!(locks.hold("a"), Err(Refusal::CallRunning(volume)) if volume == "a"));
        let _other = locks.hold("b").unwrap();
        drop(held);
        locks.hold("a").unwrap();
    }
}
