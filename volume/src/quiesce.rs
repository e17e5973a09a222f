//! Idle groups cost nothing: ticks and heartbeats are off until somebody wants something.
//!
//! A group sleeps only when its leader has every member in sync and all of them agree. Sleep never
//! changes what Raft decides, only who sends when: a sleeping leader answers no read and proposes
//! nothing before it has heard a quorum again (hazards 13 to 16), and a member that loses the link
//! to its leader's node wakes and campaigns after a full timeout.

use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_raft_store::replica::Health;
use openraft::async_runtime::WatchReceiver;

use crate::group::Group;
use crate::read_gate::GateShut;

impl<E: Env> Group<E> {
    /// Passes the read gate, after waking the group if it sleeps. Answers the leader's term.
    ///
    /// # Errors
    /// [`GateShut`].
    pub async fn pass(&self) -> Result<u64, GateShut> {
        self.inner.used.set(self.inner.env.now());
        self.wake();
        self.gate().pass().await
    }

    /// Before a proposal: a leader that slept hears a quorum first, else openraft refuses the
    /// proposal for its expired lease (hazard 14).
    pub(crate) async fn wake_to_lead(&self) {
        self.inner.used.set(self.inner.env.now());
        if self.wake() && self.leading_term().is_some() {
            // Its error is the proposal's to tell.
            let _ = self.gate().pass().await;
        }
    }

    /// Ends the sleep, if there is one. Answers whether there was.
    pub fn wake(&self) -> bool {
        if !self.inner.asleep.replace(false) {
            return false;
        }
        let raft = self.inner.raft.clone();
        raft.runtime_config().heartbeat(true);
        raft.runtime_config().tick(true);
        self.inner.env.spawn(async move {
            // A leader speaks at once; on a follower this does nothing.
            let _ = raft.trigger().heartbeat().await;
        });
        true
    }

    /// Whether the group sleeps here.
    pub fn is_asleep(&self) -> bool {
        self.inner.asleep.get()
    }

    /// On the leader: the term and last index that all members share, if the group has been idle
    /// since `since` and every member has everything.
    pub fn may_sleep(&self, since: Instant) -> Option<(u64, u64)> {
        if self.inner.asleep.get() || self.inner.used.get() > since {
            return None;
        }
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let replication = metrics.replication.as_ref()?;
        let last = metrics.last_log_index?;
        let mut matched = replication.values().map(|id| id.map(|id| id.index));
        let applied = metrics.last_applied.map(|id| id.index);
        let in_sync = applied == Some(last) && matched.all(|index| index == Some(last));
        in_sync.then_some((metrics.current_term, last))
    }

    /// On a follower: sleeps, if it follows the leader of `term` and has everything up to `last`.
    pub fn sleep_under(&self, term: u64, last: u64) -> bool {
        let agrees = {
            let metrics = self.inner.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.current_term == term
                && metrics.current_leader.is_some()
                && metrics.last_log_index == Some(last)
                && metrics.last_applied.is_some_and(|id| id.index == last)
        };
        if agrees {
            self.sleep();
        }
        agrees
    }

    /// On the leader, after every member agreed: sleeps, unless somebody wanted something
    /// meanwhile.
    pub fn sleep_as_leader(&self, term: u64, since: Instant) -> bool {
        let still = self.may_sleep(since).is_some_and(|(now, _)| now == term);
        if still {
            self.sleep();
        }
        still
    }

    fn sleep(&self) {
        self.inner.asleep.set(true);
        let config = self.inner.raft.runtime_config();
        config.heartbeat(false);
        config.tick(false);
    }

    /// The link to `node` is down: a sleeping member that follows a leader there wakes, and
    /// campaigns only after a full timeout without contact (hazard 14), spread over all groups of
    /// the node (hazard 15).
    pub fn lost_node(&self, node: NodeId) {
        if !self.inner.asleep.get() || self.leader_node() != Some(node) {
            return;
        }
        let inner = self.inner.clone();
        let (min, max) = (inner.settings.election_min, inner.settings.election_max);
        let spread = u64::try_from(max.saturating_sub(min).as_millis()).unwrap_or(0) + 1;
        let wait = min + Duration::from_millis(inner.env.random_u64() % spread);
        inner.raft.runtime_config().elect(false);
        self.wake();
        let env = inner.env.clone();
        env.spawn(async move {
            inner.env.sleep(wait).await;
            // A suspect never campaigns (hazard F6).
            if inner.replica.health() == Health::Good {
                inner.raft.runtime_config().elect(true);
            }
        });
    }
}
