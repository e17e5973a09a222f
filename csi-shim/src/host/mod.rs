//! The host: programs, mounts, block devices. Nothing in here knows of CSI or of the cluster.
//!
//! Blocking: called on threads of their own. Every wait has a bound, since a file system whose
//! server is gone can hold whoever touches it.

pub mod disks;
pub mod files;
pub mod mounts;
pub mod netlink;
pub mod release;
pub mod tools;

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use thiserror::Error;

/// Why the host did not do it.
#[derive(Debug, Error)]
pub enum HostError {
    /// A program failed.
    #[error("{program} failed ({status}): {output}")]
    Program {
        /// Its name.
        program: String,
        /// How it ended.
        status: String,
        /// What it said.
        output: String,
    },
    /// A program can't be started.
    #[error("{program} can't be run ({error}): install it on this host")]
    ProgramMissing {
        /// Its name.
        program: String,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// A program or system call did not end in time.
    #[error("{what} did not end within {} s: try again", .after.as_secs())]
    Slow {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// A file.
    #[error("{path:?} can't be {done} ({error})")]
    File {
        /// Which.
        path: PathBuf,
        /// What was to be done to it.
        done: &'static str,
        /// Why not.
        #[source]
        error: std::io::Error,
    },
    /// A mount.
    #[error("{path:?} can't be {done} ({error})")]
    Mount {
        /// Where.
        path: PathBuf,
        /// What was to be done to it.
        done: &'static str,
        /// Why not.
        #[source]
        error: Errno,
    },
    /// No server opens the export, now or later: its lease is over.
    #[error("{0}: publish the volume again")]
    LeaseOver(String),
    /// No server opens the export, now or later: there is no such volume any more.
    #[error("{0}; the cluster says that the volume is deleted: unpublish it")]
    VolumeDeleted(String),
    /// What the kernel says can't be understood.
    #[error("{0}")]
    Unexpected(String),
}

impl HostError {
    /// A file's.
    pub fn file(path: &Path, done: &'static str) -> impl FnOnce(std::io::Error) -> HostError {
        let path = path.to_owned();
        move |error| HostError::File { path, done, error }
    }

    /// A mount's.
    pub fn mount(path: &Path, done: &'static str) -> impl FnOnce(Errno) -> HostError {
        let path = path.to_owned();
        move |error| HostError::Mount { path, done, error }
    }
}

/// Runs what may never return on a thread of its own, and waits for it so long. A thread that never
/// returns stays until the kernel lets go.
///
/// # Errors
/// [`HostError::Slow`].
pub fn within<T: Send + 'static>(
    what: &str,
    time: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HostError> {
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Nobody may be waiting any more.
        let _ = done.send(work());
    });
    let slow = |_| HostError::Slow { what: what.to_owned(), after: time };
    wait.recv_timeout(time).map_err(slow)
}

/// Looks until there is an answer, or time is over. Most answers take some milliseconds, so looks are
/// that frequent at first; what takes long is looked at fifty times a second (`LONGEST_PAUSE`).
pub fn poll<T>(time: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = std::time::Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if start.elapsed() >= time {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause + pause / 4).min(LONGEST_PAUSE);
    }
}

const LONGEST_PAUSE: Duration = Duration::from_millis(20);
