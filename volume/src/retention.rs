//! How much of the log is kept for followers that lag: by bytes (hazard F8).
//!
//! openraft counts entries; it neither builds nor purges by itself here. Over the bound the log is
//! purged as far as the pool's last durable checkpoint covers it. What is on its way to a follower
//! holds the purge up: the network is told, and gives up on one that does not answer.

use std::time::Duration;

use ballast_env::Env;
use ballast_raft_store::types::{LogId, TypeConfig};
use openraft::RaftMetrics;
use openraft::async_runtime::WatchReceiver;

use crate::group::Group;

/// How long a purge waits for openraft before it is tried again.
const SNAPSHOT_WAIT_MAX: Duration = Duration::from_secs(5);

impl<E: Env> Group<E> {
    /// Purges the log down to about `keep` bytes, if it holds more. Answers whether it did.
    pub async fn trim_log(&self, env: &E, keep: u64) -> bool {
        // Below the bound, too: the pool may be short, or the entries be old (hazard F3).
        match self.replica().purge_target(keep) {
            Some(target) => self.purge_log(env, target).await,
            None => false,
        }
    }

    /// Purges the log up to `target`, which is applied and which the pool's last durable checkpoint
    /// covers. Who lacks any of it gets the difference. Answers whether it is asked for.
    pub async fn purge_log(&self, env: &E, target: LogId) -> bool {
        let raft = self.raft();
        let mut metrics = raft.metrics();
        let is_covered = |metrics: &RaftMetrics<TypeConfig>| {
            metrics.snapshot.is_some_and(|id| id.index >= target.index)
        };
        let known = is_covered(&metrics.borrow_watched());
        if !known && raft.trigger().snapshot().await.is_err() {
            return false;
        }
        let covered = async {
            loop {
                if is_covered(&metrics.borrow_watched()) {
                    return true;
                }
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
        };
        let covered = tokio::select! {
            biased;
            covered = covered => covered,
            () = env.sleep(SNAPSHOT_WAIT_MAX) => false,
        };
        if covered {
            self.inner.acks.want_gone(target.index);
        }
        covered && raft.trigger().purge_log(target.index).await.is_ok()
    }
}
