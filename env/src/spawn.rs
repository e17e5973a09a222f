//! Tasks of the shard.

use std::future::Future;

/// Starts tasks on the shard's thread.
pub trait Spawn {
    /// Runs `future` concurrently. Dropping the handle detaches it.
    fn spawn(&self, future: impl Future<Output = ()> + 'static) -> Task;
}

/// A running task.
#[derive(Debug)]
pub struct Task {
    abort: tokio::task::AbortHandle,
}

impl Task {
    /// Wraps a tokio task.
    pub fn new(abort: tokio::task::AbortHandle) -> Self {
        Self { abort }
    }

    /// Stops the task at its next await.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Whether the task has ended.
    pub fn is_finished(&self) -> bool {
        self.abort.is_finished()
    }
}

/// Aborts its task when dropped.
#[derive(Debug)]
pub struct OwnedTask(pub Task);

impl Drop for OwnedTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}
