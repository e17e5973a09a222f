//! One Raft group on this node: settings, start, propose, leadership.
//!
//! Step 4 of a write. Both the cluster group and every family is a `Group`; what differs is the
//! machine. Owns the rules that openraft leaves to its user: no leader restore (hazard F1), no vote
//! in the first lease of a process (hazard F4), no vote of a suspect (hazard F6).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ballast_block::{FamilyId, NodeId, ReplicaId};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_env::planted::PlantedBug;
use ballast_env::spawn::OwnedTask;
use ballast_raft_store::entry::Command;
use ballast_raft_store::replica::{Health, Replica};
use ballast_raft_store::types::{ApplyReply, LogId, Member, TypeConfig, term_of};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, ForwardReason, InitializeError, RaftError};
use openraft::impls::ProgressResponder;
use openraft::network::NetSnapshot;
use openraft::raft::ClientWriteResult;
use openraft::type_config::alias::OneshotReceiverOf;
use openraft::{Config, Raft, RaftNetworkFactory, SnapshotPolicy};
use thiserror::Error;
use tokio::sync::watch;

use crate::acks::{Acks, NotesAcks};
use crate::machine::{DecodeStateError, Machine, StateMachine};
use crate::read_gate::{self, ReadGate};
use crate::snapshot::{Checkpoint, GroupSnapshot};

/// A Raft handle of a group.
pub type GroupRaft<E> = Raft<TypeConfig, StateMachine<E>>;

/// Raft's times and sizes, the same for every member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftSettings {
    /// Time between heartbeats of an idle leader.
    pub heartbeat: Duration,
    /// Least time without a leader before a follower campaigns.
    pub election_min: Duration,
    /// Most; also the leader's lease.
    pub election_max: Duration,
}

impl Default for RaftSettings {
    /// A follower campaigns when the lease and an election timeout have passed without a sign of the
    /// leader: after 1.2 to 1.4 s. Three heartbeats may be lost without notice.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(150),
            election_min: Duration::from_millis(500),
            election_max: Duration::from_millis(700),
        }
    }
}

/// Longest time that a resync by difference may take before openraft calls it failed, in ms.
const RESYNC_MS_MAX: u64 = 6 * 3600 * 1000;

impl RaftSettings {
    /// `restore` is a planted bug, never on outside the simulator.
    fn config(&self, family: FamilyId, restore: bool) -> Arc<Config> {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).expect("short");
        let config = Config {
            cluster_name: family.to_string(),
            heartbeat_interval: ms(self.heartbeat),
            election_timeout_min: ms(self.election_min),
            election_timeout_max: ms(self.election_max),
            install_snapshot_timeout: RESYNC_MS_MAX,
            // Retention is ours, by bytes (hazard F8): openraft neither builds nor purges by itself.
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            replication_lag_threshold: u64::MAX,
            enable_elect: false,
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(restore),
            allow_log_reversion: Some(false),
            ..Config::default()
        };
        let config = config.validate().expect("settings are consistent");
        assert_eq!(config.enable_leader_restore, Some(restore), "hazard F1");
        Arc::new(config)
    }
}

/// A group could not be started.
#[derive(Debug, Error)]
pub enum StartGroupError {
    /// Its state can't be read.
    #[error("can't start {family}: {problem}")]
    StateUnreadable {
        /// The group.
        family: FamilyId,
        /// What is wrong with it.
        problem: DecodeStateError,
    },
    /// openraft refused its storage.
    #[error("can't start {family}: {problem}")]
    RaftRefused {
        /// The group.
        family: FamilyId,
        /// What openraft said.
        problem: String,
    },
}

/// A proposal that has no result here.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProposeError {
    /// Another replica leads, or none; the outcome of what was proposed is unknown.
    #[error("this replica does not lead")]
    NotLeader {
        /// The node to ask next, if it is known.
        hint: Option<NodeId>,
    },
    /// The group has stopped on this node.
    #[error("the group has stopped on this node")]
    Stopped,
}

type Written = ClientWriteResult<TypeConfig>;

/// What is to be proposed.
pub(crate) struct Proposal {
    command: Command,
    /// The entry is made in this term, or not at all.
    term: Option<u64>,
    responder: ProgressResponder<TypeConfig, Written>,
}

/// What becomes of a proposal.
pub(crate) struct Answer(OneshotReceiverOf<TypeConfig, Written>);

impl Proposal {
    pub(crate) fn new(command: Command, term: Option<u64>) -> (Self, Answer) {
        let (responder, answer) = ProgressResponder::complete_only();
        (Self { command, term, responder }, Answer(answer))
    }
}

impl Answer {
    /// Returns when it is applied here.
    pub(crate) async fn wait(self) -> Result<(LogId, ApplyReply), ProposeError> {
        match self.0.await {
            Ok(Ok(done)) => Ok((done.log_id, done.data)),
            Ok(Err(ClientWriteError::ForwardToLeader(forward))) => {
                let hint = match forward.reason {
                    ForwardReason::LeaseExpired => None,
                    _ => forward.leader_node.map(|member| member.node),
                };
                Err(ProposeError::NotLeader { hint })
            }
            // Discarded, refused for another term, or forgotten by a core that stepped down or
            // stopped: it may still commit under the next leader.
            Ok(Err(_)) | Err(_) => Err(ProposeError::NotLeader { hint: None }),
        }
    }
}

/// One member of a Raft group. Clones share it.
pub struct Group<E: Env> {
    pub(crate) inner: Rc<Inner<E>>,
}

impl<E: Env> Clone for Group<E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

pub(crate) struct Inner<E: Env> {
    pub(crate) env: E,
    pub(crate) raft: GroupRaft<E>,
    pub(crate) replica: Replica<E>,
    pub(crate) settings: RaftSettings,
    pub(crate) gate: ReadGate<E>,
    pub(crate) acks: Acks,
    applied: Rc<watch::Sender<Option<LogId>>>,
    /// Until then this process neither votes nor campaigns (hazard F4a).
    quiet_until: Instant,
    /// When the group was last asked for something.
    pub(crate) used: Cell<Instant>,
    /// Whether ticks and heartbeats are off here (see `quiesce`).
    pub(crate) asleep: Cell<bool>,
    _tasks: RefCell<Vec<OwnedTask>>,
}

impl<E: Env> Group<E> {
    /// Starts the member `replica` of its group.
    ///
    /// # Errors
    /// [`StartGroupError`].
    pub async fn start<M, N>(
        env: E,
        replica: Replica<E>,
        machine: Rc<RefCell<M>>,
        network: N,
        settings: RaftSettings,
        checkpoint: Checkpoint,
    ) -> Result<Self, StartGroupError>
    where
        M: Machine,
        N: RaftNetworkFactory<TypeConfig> + NotesAcks,
        N::Network: NetSnapshot<TypeConfig, SnapshotData = GroupSnapshot<E>>,
    {
        let family = replica.family();
        let applied = Rc::new(watch::Sender::new(None));
        let machine = StateMachine::new(replica.clone(), machine, applied.clone(), checkpoint)
            .map_err(|problem| StartGroupError::StateUnreadable { family, problem })?;
        let refused = |problem: String| StartGroupError::RaftRefused { family, problem };
        let acks = network.acks();
        let fresh = is_fresh(&replica).await.map_err(|error| refused(error.to_string()))?;
        let config = settings.config(family, env.is_planted(PlantedBug::LeaderRestore));
        let raft = Raft::new(replica.id().0, config, network, replica.log(), machine)
            .await
            .map_err(|error| refused(error.to_string()))?;
        let start = env.now();
        // A replica without a vote has never granted a lease: it need not wait one out.
        // Spread, so that after a start of all nodes at once not all campaign at once.
        let spread = settings.election_max.saturating_sub(settings.election_min);
        let spread = spread.mul_f64((env.random_u64() % 1000) as f64 / 1000.0);
        let quiet = settings.election_max + spread;
        let quiet_until = if fresh { start } else { start.after(quiet) };
        let lease = settings.election_max;
        let gate = ReadGate::new(env.clone(), raft.clone(), replica.clone(), acks.clone(), lease);
        let inner = Inner {
            env,
            raft,
            replica,
            settings,
            gate,
            acks,
            applied,
            quiet_until,
            used: Cell::new(start),
            asleep: Cell::new(false),
            _tasks: RefCell::default(),
        };
        let group = Self { inner: Rc::new(inner) };
        let task = group.inner.env.spawn(guard_elections(Rc::downgrade(&group.inner)));
        group.inner._tasks.borrow_mut().push(OwnedTask(task));
        Ok(group)
    }

    pub(crate) fn env(&self) -> &E {
        &self.inner.env
    }

    /// openraft's handle.
    pub fn raft(&self) -> &GroupRaft<E> {
        &self.inner.raft
    }

    /// The replica.
    pub fn replica(&self) -> &Replica<E> {
        &self.inner.replica
    }

    /// The read gate.
    pub fn gate(&self) -> &ReadGate<E> {
        &self.inner.gate
    }

    /// Raft's times.
    pub fn settings(&self) -> &RaftSettings {
        &self.inner.settings
    }

    /// Follows what is applied here.
    pub fn applied(&self) -> watch::Receiver<Option<LogId>> {
        self.inner.applied.subscribe()
    }

    /// Whether this replica may answer a vote request now; a transfer called by the leader itself
    /// does not wait out the first lease.
    pub fn may_vote(&self, transfer: bool) -> bool {
        let quiet = self.inner.env.now() < self.inner.quiet_until && !transfer;
        !quiet && self.inner.replica.health() == Health::Good
    }

    /// Whether this replica may take entries from a leader of `term`: a suspect waits for a newer
    /// one than it ever acknowledged to (hazard F6).
    pub fn may_acknowledge(&self, term: u64) -> bool {
        match self.inner.replica.health() {
            Health::Good => true,
            Health::Suspect { vote_lost, term: known } => !vote_lost && term > known,
        }
    }

    /// Notes how far a leader of `term` has committed: a suspect that has caught up is cleared.
    pub fn note_commit(&self, term: u64, commit: u64) {
        if self.inner.replica.health() != Health::Good
            && self.inner.replica.clear_suspect(term, commit).is_ok()
        {
            tracing::warn!(replica = %self.inner.replica.id(), term, "suspect replica caught up");
        }
    }

    /// Makes the group of these members; harmless when it is made already. When this returns, its first
    /// entry is durable here: the consensus library answers before, and takes a replica that has only
    /// voted for one whose group is made.
    ///
    /// # Errors
    /// [`ProposeError::Stopped`].
    pub async fn initialize(&self, members: BTreeMap<u64, Member>) -> Result<(), ProposeError> {
        let family = self.inner.replica.family();
        match self.inner.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(error) => {
                tracing::error!(%family, %error, "can't form group");
                return Err(ProposeError::Stopped);
            }
        }
        match self.inner.replica.settle_log().await {
            Ok(true) => Ok(()),
            Ok(false) => {
                tracing::error!(%family, "can't form group: this replica has a vote and no log");
                Err(ProposeError::Stopped)
            }
            Err(error) => {
                tracing::error!(%family, %error, "can't form group");
                Err(ProposeError::Stopped)
            }
        }
    }

    /// The term in which this replica leads, as far as it knows.
    pub fn leading_term(&self) -> Option<u64> {
        let metrics = self.inner.raft.metrics();
        read_gate::leading_term(&metrics.borrow_watched())
    }

    /// Whether the group has other voters than this replica.
    pub fn has_other_voters(&self) -> bool {
        let metrics = self.inner.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let own = self.inner.replica.id().0;
        metrics.membership_config.membership().voter_ids().any(|id| id != own)
    }

    /// The node of the leader, as far as this replica knows.
    pub fn leader_node(&self) -> Option<NodeId> {
        let metrics = self.inner.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader?;
        metrics.membership_config.membership().get_node(&leader).map(|member| member.node)
    }

    /// Proposes `command` and waits until it is applied here. With `term`, only if this replica
    /// still leads in exactly that term when the entry is made.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn propose(
        &self,
        command: Command,
        term: Option<u64>,
    ) -> Result<(LogId, ApplyReply), ProposeError> {
        self.wake_to_lead().await;
        let (proposal, answer) = Proposal::new(command, term);
        self.send(proposal).await;
        answer.wait().await
    }

    /// Gives a proposal to Raft; its answer tells what became of it.
    pub(crate) async fn send(&self, proposal: Proposal) {
        let Proposal { command, term, responder } = proposal;
        let mut request = self.inner.raft.write(command).responder(responder);
        if let Some(term) = term {
            request = request.with_leader(ballast_raft_store::types::log_id(term, 0).leader_id);
        }
        // A group that has stopped drops the responder.
        let _ = request.await;
    }

    /// Hands leadership to another member. Shuts the read gate for the rest of the term first.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn transfer(&self, to: ReplicaId) -> Result<(), ProposeError> {
        let term = self.leading_term().ok_or(ProposeError::NotLeader { hint: None })?;
        self.inner.gate.shut(term);
        self.inner.raft.trigger().transfer_leader(to.0).await.map_err(|_| ProposeError::Stopped)
    }

    /// Gives up the lead, to whoever is elected: the entry at `index` can't be sent from here, and
    /// nothing behind it. Members vote for another when they hear nothing more from this leader, in
    /// the streams that wait for the entry either; none of them needs to have all of its log.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn resign(&self, index: u64) -> Result<(), ProposeError> {
        let heir = {
            let metrics = self.inner.raft.metrics();
            let metrics = metrics.borrow_watched();
            let voters: BTreeSet<u64> =
                metrics.membership_config.membership().voter_ids().collect();
            let own = self.inner.replica.id().0;
            let others = metrics.replication.iter().flatten();
            let others = others.filter(|(id, _)| **id != own && voters.contains(id));
            others.max_by_key(|(_, matched)| **matched).map(|(&id, _)| ReplicaId(id))
        };
        let heir = heir.ok_or(ProposeError::NotLeader { hint: None })?;
        self.set_unsendable(index);
        self.transfer(heir).await
    }

    /// Notes that the entry at `index` can't be sent from here, so that no stream waits for it; with
    /// 0, that all can.
    pub fn set_unsendable(&self, index: u64) {
        self.inner.acks.set_unsendable(index);
    }

    /// Stops the member; its replica stays on disk. An entry that waits for room in the map may still
    /// be applied afterwards, unless the replica is dropped.
    pub async fn stop(&self) {
        self.inner._tasks.borrow_mut().clear();
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::error!(family = %self.inner.replica.family(), %error, "group ended badly");
        }
    }

    /// The last entry applied, as (term, index).
    pub fn applied_id(&self) -> Option<(u64, u64)> {
        self.inner.replica.applied().map(|id| (term_of(&id), id.index))
    }
}

async fn is_fresh<E: Env>(replica: &Replica<E>) -> std::io::Result<bool> {
    use openraft::storage::{RaftLogReader, RaftLogStorage};
    let mut log = replica.log();
    let state = log.get_log_state().await?;
    Ok(log.read_vote().await?.is_none() && state.last_log_id.is_none())
}

/// Lets the replica campaign when it may: after its first lease, and only while it is good.
async fn guard_elections<E: Env>(group: std::rc::Weak<Inner<E>>) {
    let mut enabled = false;
    loop {
        let (env, pause) = {
            let Some(group) = group.upgrade() else { return };
            let now = group.env.now();
            let good = group.replica.health() == Health::Good;
            let may = good && now >= group.quiet_until;
            if may != enabled {
                enabled = may;
                group.raft.runtime_config().elect(may);
            }
            let left = group.quiet_until.since(now);
            let pause = match (left.is_zero(), may) {
                (false, _) => left,
                (true, false) => group.settings.election_max,
                (true, true) => group.settings.election_max * 4,
            };
            (group.env.clone(), pause)
        };
        // Also when it may: a damaged map makes a good replica a suspect.
        env.sleep(pause).await;
    }
}
