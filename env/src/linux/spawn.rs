//! Tasks of the shard's thread.

use std::future::Future;

use super::LinuxEnv;
use crate::spawn::{Spawn, Task};

impl Spawn for LinuxEnv {
    fn spawn(&self, future: impl Future<Output = ()> + 'static) -> Task {
        Task::new(tokio::task::spawn_local(future).abort_handle())
    }
}
