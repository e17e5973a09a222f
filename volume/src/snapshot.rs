//! A group's state as Raft hands it over: by difference, never as a stream of bytes.
//!
//! The leader's side is a pinned view; the follower's is a resync that was put beside its map and
//! is switched in by one record (hazard F9). Building one names the last durable checkpoint: that is
//! what allows a purge of the log (hazard F8).

use std::io;
use std::rc::Rc;

use ballast_block::Sequence;
use ballast_env::Env;
use ballast_raft_store::replica::{Pin, Replica, Resync};
use ballast_raft_store::types::TypeConfig;
use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use openraft::RaftSnapshotBuilder;
use openraft::storage::{Snapshot, SnapshotMeta};
use openraft::type_config::alias::SnapshotOf;

use crate::machine::Machine;

/// Makes the pool checkpoint; shared by all groups of the pool.
pub type Checkpoint = Rc<dyn Fn() -> LocalBoxFuture<'static, io::Result<()>>>;

/// The state of a group at one log position.
pub enum GroupSnapshot<E: Env> {
    /// This replica's own state, to be offered to a peer.
    Own {
        /// The frozen map.
        pin: Rc<Pin<E>>,
        /// The state of the machine.
        state: Bytes,
        /// The family's sequence.
        sequence: Sequence,
    },
    /// A peer's state, pulled and put aside, to be switched in.
    Incoming {
        /// What was put aside.
        resync: Resync<E>,
        /// The state of the machine.
        state: Bytes,
        /// The family's sequence.
        sequence: Sequence,
    },
}

/// The view of `replica` as it is now; `None` before anything was applied.
pub fn current<E: Env>(
    replica: &Replica<E>,
    machine: &dyn Machine,
) -> Option<SnapshotOf<TypeConfig, GroupSnapshot<E>>> {
    let applied = replica.applied()?;
    let meta = SnapshotMeta { last_log_id: Some(applied), last_membership: replica.membership() };
    let snapshot = GroupSnapshot::Own {
        pin: Rc::new(replica.pin()),
        state: machine.encode(),
        sequence: machine.sequence(),
    };
    Some(Snapshot { meta, snapshot })
}

/// Answers openraft's wish for a snapshot with the last durable checkpoint: it covers all groups of
/// the pool, which therefore don't make one each.
pub struct SnapshotBuilder<E: Env> {
    replica: Replica<E>,
    checkpoint: Checkpoint,
}

impl<E: Env> SnapshotBuilder<E> {
    /// For `replica`, by `checkpoint` of its pool.
    pub fn new(replica: Replica<E>, checkpoint: Checkpoint) -> Self {
        Self { replica, checkpoint }
    }
}

impl<E: Env> RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder<E> {
    type SnapshotData = GroupSnapshot<E>;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<TypeConfig, GroupSnapshot<E>>> {
        if self.replica.checkpointed().is_none() {
            (self.checkpoint)().await?;
        }
        let pin = Rc::new(self.replica.pin());
        let (last_log_id, last_membership) = self
            .replica
            .checkpointed()
            .map_or_else(Default::default, |(id, membership)| (Some(id), membership));
        // The data is never sent from here: a transfer takes its own, newer view.
        let snapshot = GroupSnapshot::Own { sequence: pin.sequence(), pin, state: Bytes::new() };
        Ok(Snapshot { meta: SnapshotMeta { last_log_id, last_membership }, snapshot })
    }
}
