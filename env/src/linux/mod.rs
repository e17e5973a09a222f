//! The Linux implementation of the outside world, for one shard's thread.
//!
//! Owns the shard's runtime, its `io_uring` and every system call below the traits. Never shared
//! between threads: each shard builds its own [`LinuxEnv`].

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is what the replacements are made of"
)]

mod clock;
mod disk;
mod entropy;
mod flush;
mod memory;
mod network;
mod open;
mod operation;
mod reclaim;
mod ring;
mod spawn;

use std::future::Future;
use std::io;
use std::rc::Rc;

pub use disk::LinuxFile;
pub use flush::SyncBy;
pub use memory::keep_memory;
pub use network::{LinuxDetached, LinuxListener, LinuxStream};
pub use open::OpenError;
pub use reclaim::{lock_memory, mark_io_flusher};

use ring::Ring;

use crate::planted::Planted;

/// The real clock, disks and network, seen from one shard.
#[derive(Clone)]
pub struct LinuxEnv {
    ring: Rc<Ring>,
    sync_by: SyncBy,
}

impl Planted for LinuxEnv {}

impl LinuxEnv {
    /// The outside world of the calling thread, which must run a current-thread tokio runtime
    /// that can spawn local tasks. [`LinuxShard::run`] does all of that.
    ///
    /// # Errors
    /// When the kernel gives no `io_uring`: `Unsupported` (older than 5.15) or `PermissionDenied`
    /// (a seccomp profile, or the sysctl `kernel.io_uring_disabled`).
    ///
    /// # Panics
    /// Outside such a runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self { ring: Ring::start()?, sync_by: SyncBy::Disk })
    }

    /// The same environment, but files that it opens are made durable this way.
    pub fn sync_by(self, sync_by: SyncBy) -> Self {
        Self { sync_by, ..self }
    }
}

/// A shard: the calling thread, turned over to one runtime.
pub struct LinuxShard;

impl LinuxShard {
    /// Runs `main` and all that it spawns on the calling thread until `main` ends; what still
    /// runs then is dropped at its await, after the kernel has finished its disk operations.
    ///
    /// # Errors
    /// When the runtime or the ring can't be had.
    pub fn run<F, Fut>(main: F) -> io::Result<Fut::Output>
    where
        F: FnOnce(LinuxEnv) -> Fut,
        Fut: Future,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let tasks = tokio::task::LocalSet::new();
        tasks.block_on(&runtime, async { Ok(main(LinuxEnv::new()?).await) })
    }
}
