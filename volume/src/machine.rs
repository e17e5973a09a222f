//! Step 7: apply. openraft's state machine over a replica, around a pure decision.
//!
//! Apply decides from replicated state alone, so every replica decides alike (guarantee
//! **fenced**); then the map points the blocks at the payload, in memory. Never does I/O, never
//! fails for want of space.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use ballast_block::{BranchId, Sequence};
use ballast_env::Env;
use ballast_raft_store::entry::{Body, Command};
use ballast_raft_store::replica::{InstallState, Replica};
use ballast_raft_store::types::{
    ApplyReply, Entry, EntryPayload, LogId, StoredMembership, TypeConfig,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use thiserror::Error;
use tokio::sync::watch;

use crate::snapshot::{GroupSnapshot, SnapshotBuilder};

/// State bytes that are not a state of a version that this program reads.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("replicated state can't be decoded: {0}")]
pub struct DecodeStateError(pub String);

/// What apply does with an entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Map the payload.
    Write {
        /// The branch that is written.
        branch: BranchId,
        /// The write's number.
        sequence: Sequence,
    },
    /// Unmap.
    Trim {
        /// The branch that is trimmed.
        branch: BranchId,
        /// The trim's number.
        sequence: Sequence,
    },
    /// No extents are touched; a payload the entry may have is dead.
    Nothing(ApplyReply),
    /// The command is of a newer program: this replica must stop before it, never skip it
    /// (hazard 31). The text says what to upgrade.
    Halt(String),
}

/// The replicated state of a group: pure, deterministic, the same on every replica.
pub trait Machine: 'static {
    /// Decides on a command and changes the state accordingly.
    fn decide(&mut self, command: &Command) -> Decision;

    /// The whole state, in a versioned encoding.
    fn encode(&self) -> Bytes;

    /// Becomes the encoded state; empty bytes mean the state at creation.
    ///
    /// # Errors
    /// [`DecodeStateError`]; the state is then unusable and the replica must not start.
    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeStateError>;

    /// The family's write counter.
    fn sequence(&self) -> Sequence;
}

/// openraft's state machine of one replica.
pub struct StateMachine<E: Env> {
    replica: Replica<E>,
    machine: Rc<RefCell<dyn Machine>>,
    applied: Rc<watch::Sender<Option<LogId>>>,
    checkpoint: crate::snapshot::Checkpoint,
}

impl<E: Env> StateMachine<E> {
    /// Over `replica`; restores `machine` from what the replica's last checkpoint has.
    ///
    /// # Errors
    /// [`DecodeStateError`].
    pub fn new<M: Machine>(
        replica: Replica<E>,
        machine: Rc<RefCell<M>>,
        applied: Rc<watch::Sender<Option<LogId>>>,
        checkpoint: crate::snapshot::Checkpoint,
    ) -> Result<Self, DecodeStateError> {
        let restored = replica.restored();
        machine.borrow_mut().restore(&restored.state)?;
        applied.send_replace(restored.applied);
        let source = machine.clone();
        replica.set_state_source(Rc::new(move || source.borrow().encode()));
        Ok(Self { replica, machine, applied, checkpoint })
    }

    fn apply_entry(&self, entry: &Entry) -> io::Result<ApplyReply> {
        let id = entry.log_id;
        match &entry.payload {
            EntryPayload::Blank => {
                self.replica.apply_other(id, None, None);
                Ok(ApplyReply::Applied(self.machine.borrow().sequence()))
            }
            EntryPayload::Membership(membership) => {
                self.replica.apply_other(id, Some(membership.clone()), None);
                Ok(ApplyReply::Applied(self.machine.borrow().sequence()))
            }
            EntryPayload::Normal(command) => self.apply_command(id, command),
        }
    }

    fn apply_command(&self, id: LogId, command: &Command) -> io::Result<ApplyReply> {
        let decision = self.machine.borrow_mut().decide(command);
        match (decision, &command.body) {
            (Decision::Write { branch, sequence }, Body::Write { .. }) => {
                self.replica.apply_write(id, branch, sequence);
                Ok(ApplyReply::Applied(sequence))
            }
            (Decision::Trim { branch, sequence }, &Body::Trim { start, count }) => {
                self.replica.apply_trim(id, branch, sequence, start, count);
                Ok(ApplyReply::Applied(sequence))
            }
            (Decision::Nothing(reply), Body::Write { .. }) => {
                self.replica.apply_rejected(id);
                Ok(reply)
            }
            (Decision::Nothing(reply), _) => {
                self.replica.apply_other(id, None, None);
                Ok(reply)
            }
            (Decision::Halt(reason), _) => {
                tracing::error!(replica = %self.replica.id(), index = id.index, reason, "halted");
                Err(io::Error::other(reason))
            }
            (decision, body) => unreachable!("decision {decision:?} does not fit {body:?}"),
        }
    }
}

impl<E: Env> RaftStateMachine<TypeConfig> for StateMachine<E> {
    type SnapshotData = GroupSnapshot<E>;
    type SnapshotBuilder = SnapshotBuilder<E>;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.replica.applied(), self.replica.membership()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin,
    {
        let mut last = None;
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            // Back-pressure, not failure: a full delta is merged meanwhile (hazard 23).
            self.replica.room_for(&entry).await.map_err(io::Error::other)?;
            let reply = self.apply_entry(&entry)?;
            last = Some(entry.log_id);
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        if last.is_some() {
            self.applied.send_replace(last);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder<E> {
        SnapshotBuilder::new(self.replica.clone(), self.checkpoint.clone())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        snapshot: GroupSnapshot<E>,
    ) -> io::Result<()> {
        let GroupSnapshot::Incoming { resync, state, sequence } = snapshot else {
            return Err(io::Error::other("a group's own view can't be installed into it"));
        };
        let Some(applied) = meta.last_log_id else {
            return Err(io::Error::other("an empty state can't be installed"));
        };
        let install = InstallState {
            applied,
            membership: meta.last_membership.clone(),
            state: state.clone(),
            sequence,
        };
        resync.install(install).await.map_err(io::Error::other)?;
        self.machine.borrow_mut().restore(&state).map_err(io::Error::other)?;
        self.applied.send_replace(Some(applied));
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<SnapshotOf<TypeConfig, GroupSnapshot<E>>>> {
        Ok(crate::snapshot::current(&self.replica, &*self.machine.borrow()))
    }
}
