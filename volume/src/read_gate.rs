//! The read gate: whether this replica may answer a read from its own state (hazard F4).
//!
//! Closed by default. Opens when this term's blank entry is applied and now < send time of the last
//! quorum acknowledgement + 0.75 x lease; shut for the rest of the term when a transfer is called.
//! Assumes clocks of bounded rate drift (0.25 of a lease covers 25%) that run while the process is
//! stopped.

use std::cell::Cell;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::Env;
use ballast_env::planted::PlantedBug;
use ballast_raft_store::replica::Replica;
use ballast_raft_store::types::{TypeConfig, term_of};
use openraft::async_runtime::WatchReceiver;
use openraft::{RaftMetrics, ServerState};
use thiserror::Error;

use crate::acks::Acks;
use crate::group::GroupRaft;

/// How often a closed gate of a leader is looked at again.
const RECHECK: Duration = Duration::from_millis(2);

/// This replica must not answer reads.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("this replica does not lead")]
pub struct GateShut {
    /// The node to ask instead, if it is known.
    pub hint: Option<NodeId>,
}

/// One gate per group.
pub struct ReadGate<E: Env> {
    env: E,
    raft: GroupRaft<E>,
    replica: Replica<E>,
    acks: Acks,
    /// 0.75 of the lease.
    window: Duration,
    lease: Duration,
    /// The last term in which a transfer was called.
    shut_in: Cell<u64>,
}

enum State {
    Open(u64),
    Closed,
    NotLeader(Option<NodeId>),
}

/// The term in which the replica leads.
///
/// Not openraft's `as_leader`: that goes by the last vote on disk, and a leader that restarted has its
/// old one there until the next election, while it leads nothing (hazard F1).
pub(crate) fn leading_term(metrics: &RaftMetrics<TypeConfig>) -> Option<u64> {
    let leads = metrics.state == ServerState::Leader && metrics.current_leader == Some(metrics.id);
    leads.then_some(metrics.current_term)
}

fn other_leader(metrics: &RaftMetrics<TypeConfig>) -> Option<NodeId> {
    let leader = metrics.current_leader.filter(|leader| *leader != metrics.id)?;
    metrics.membership_config.membership().get_node(&leader).map(|member| member.node)
}

impl<E: Env> ReadGate<E> {
    /// Closed, for a group with that lease.
    pub fn new(
        env: E,
        raft: GroupRaft<E>,
        replica: Replica<E>,
        acks: Acks,
        lease: Duration,
    ) -> Self {
        Self { env, raft, replica, acks, window: lease * 3 / 4, lease, shut_in: Cell::new(0) }
    }

    /// Shuts the gate for the rest of `term`.
    pub fn shut(&self, term: u64) {
        self.shut_in.set(self.shut_in.get().max(term));
    }

    fn state(&self) -> State {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let term = match leading_term(&metrics) {
            Some(term) => term,
            None => return State::NotLeader(other_leader(&metrics)),
        };
        if self.env.is_planted(PlantedBug::SkippedReadGate) {
            return State::Open(term);
        }
        if self.shut_in.get() >= term {
            return State::NotLeader(None);
        }
        let now = self.env.now();
        let configs = metrics.membership_config.membership().get_joint_config();
        let followed = self.acks.quorum(self.replica.id(), term, configs, now);
        let fresh = followed.is_some_and(|at| now < at.after(self.window));
        // The log of a term starts with its blank entry: an applied entry of the term implies it.
        let settled = self.replica.applied().is_some_and(|id| term_of(&id) == term);
        if fresh && settled { State::Open(term) } else { State::Closed }
    }

    /// Whether the gate is open now.
    pub fn is_open(&self) -> bool {
        matches!(self.state(), State::Open(_))
    }

    /// Returns the term once the gate is open; waits at most a lease for it.
    ///
    /// # Errors
    /// [`GateShut`] when another replica leads, or this one can't reach a quorum.
    pub async fn pass(&self) -> Result<u64, GateShut> {
        let start = self.env.now();
        loop {
            match self.state() {
                State::Open(term) => return Ok(term),
                State::NotLeader(hint) => return Err(GateShut { hint }),
                State::Closed => {}
            }
            if self.env.now().since(start) > self.lease {
                return Err(GateShut { hint: None });
            }
            self.env.sleep(RECHECK).await;
        }
    }
}
