//! The cluster group as a shard has it: shard 0 its member, the others a copy of the state; the
//! group's machine, and how any node gets a command into its log.

use std::cell::{Ref, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ballast_block::{ClusterId, NodeId, ReplicaId, Sequence};
use ballast_cluster::{ClusterState, Command, Reply};
use ballast_env::Env;
use ballast_raft_store::entry::{Body, Command as LogCommand};
use ballast_raft_store::types::{ApplyReply, LogId, Member};
use ballast_volume::group::{Group, ProposeError};
use ballast_volume::machine::{Decision, DecodeStateError, Machine};
use bytes::Bytes;
use prost::Message;
use thiserror::Error;
use tokio::sync::watch;

use crate::calls::{ClusterCallV1, Tag, decode};
use crate::cluster_copy::ClusterCopy;
use crate::config::Founder;
use crate::peers::connection::PeerError;
use crate::peers::links::{Lane, Links};
use crate::peers::wire::{Frame, Kind};

/// Longest wait for a cluster command before its caller is told that there is no quorum.
pub const PROPOSE_MAX: Duration = Duration::from_secs(10);
const ATTEMPT_MAX: Duration = Duration::from_secs(3);
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The machine of the cluster group.
pub struct ClusterMachine {
    founding: ClusterId,
    state: ClusterState,
}

impl ClusterMachine {
    /// The state before the first command.
    pub fn new(cluster: ClusterId) -> Self {
        Self { founding: cluster, state: ClusterState::new(cluster) }
    }
}

impl Machine for ClusterMachine {
    fn decide(&mut self, command: &LogCommand) -> Decision {
        let Body::Control(bytes) = &command.body else {
            return Decision::Halt("the cluster group holds no blocks: the log is damaged".into());
        };
        match Command::decode(bytes) {
            Ok(command) => {
                let reply = self.state.apply(command);
                Decision::Nothing(ApplyReply::Control(reply.encode().into()))
            }
            Err(error) => Decision::Halt(error.to_string()),
        }
    }

    fn encode(&self) -> Bytes {
        self.state.encode().into()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeStateError> {
        self.state = if state.is_empty() {
            ClusterState::new(self.founding)
        } else {
            ClusterState::decode(state).map_err(|error| DecodeStateError(error.to_string()))?
        };
        Ok(())
    }

    fn sequence(&self) -> Sequence {
        Sequence(0)
    }
}

/// The replica id of the cluster group's member on a founding node. Volumes' replicas start far
/// above.
pub fn cluster_replica(node: NodeId) -> ReplicaId {
    ReplicaId(u64::from(node.0))
}

/// A cluster command could not be carried out; whether it was is unknown.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProposeClusterError {
    /// No leader answered in time.
    #[error(
        "the cluster group has no quorum at the moment; check that most nodes run and see each other"
    )]
    NoQuorum,
}

/// The cluster group, for the shard that has this.
pub(crate) enum ClusterGroup<E: Env> {
    /// On shard 0.
    Member(ClusterMember<E>),
    /// On the others.
    Copy(ClusterCopy<E>),
}

/// Tells when the state may have changed.
pub(crate) enum Changes {
    Applied(watch::Receiver<Option<LogId>>),
    Published(watch::Receiver<Arc<ClusterState>>),
}

impl Changes {
    /// What changed up to now is known.
    pub(crate) fn seen(&mut self) {
        match self {
            Self::Applied(applied) => drop(applied.borrow_and_update()),
            Self::Published(published) => drop(published.borrow_and_update()),
        }
    }

    /// Waits for the next change; `false`: there are no more.
    pub(crate) async fn next(&mut self) -> bool {
        match self {
            Self::Applied(applied) => applied.changed().await.is_ok(),
            Self::Published(published) => published.changed().await.is_ok(),
        }
    }
}

impl<E: Env> ClusterGroup<E> {
    /// The member, on shard 0.
    pub(crate) fn member(&self) -> Option<&ClusterMember<E>> {
        match self {
            Self::Member(member) => Some(member),
            Self::Copy(_) => None,
        }
    }

    /// The member's Raft group, on shard 0.
    pub(crate) fn group(&self) -> Option<&Group<E>> {
        self.member().map(ClusterMember::group)
    }

    /// The state as known here; may be behind the leader's.
    pub(crate) fn state(&self) -> Ref<'_, ClusterState> {
        match self {
            Self::Member(member) => member.state(),
            Self::Copy(copy) => copy.state(),
        }
    }

    /// Tells when the state may have changed.
    pub(crate) fn changes(&self) -> Changes {
        match self {
            Self::Member(member) => Changes::Applied(member.group.applied()),
            Self::Copy(copy) => Changes::Published(copy.published()),
        }
    }

    /// Gets `command` applied by the group, whichever node leads, and waits until it is known here
    /// too. Commands are idempotent: a retry does no harm.
    ///
    /// # Errors
    /// [`ProposeClusterError`].
    pub(crate) async fn propose(&self, command: &Command) -> Result<Reply, ProposeClusterError> {
        match self {
            Self::Member(member) => member.propose(command).await,
            Self::Copy(copy) => copy.propose(command).await,
        }
    }
}

/// The cluster group's member on this node.
pub struct ClusterMember<E: Env> {
    env: E,
    links: Rc<Links<E>>,
    group: Group<E>,
    machine: Rc<RefCell<ClusterMachine>>,
    nodes: Vec<NodeId>,
}

impl<E: Env> ClusterMember<E> {
    /// Around a running member.
    pub fn new(
        env: E,
        links: Rc<Links<E>>,
        group: Group<E>,
        machine: Rc<RefCell<ClusterMachine>>,
        founders: &[Founder],
    ) -> Self {
        let nodes = founders.iter().map(|founder| founder.node).collect();
        Self { env, links, group, machine, nodes }
    }

    /// The Raft group.
    pub fn group(&self) -> &Group<E> {
        &self.group
    }

    /// The state as applied here; may be behind the leader's.
    pub fn state(&self) -> Ref<'_, ClusterState> {
        Ref::map(self.machine.borrow(), |machine| &machine.state)
    }

    /// Forms the group of all founders; called on every node, done by the lowest.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn form(&self) -> Result<(), ProposeError> {
        let member = |&node: &NodeId| (cluster_replica(node).0, Member { node });
        let members: BTreeMap<u64, Member> = self.nodes.iter().map(member).collect();
        self.group.initialize(members).await
    }

    /// Gets `command` applied by the group, and waits until it is known here.
    ///
    /// # Errors
    /// [`ProposeClusterError`].
    pub async fn propose(&self, command: &Command) -> Result<Reply, ProposeClusterError> {
        let bytes: Bytes = command.encode().into();
        let attempts = async {
            let mut hint = None;
            let mut turn = 0;
            loop {
                let target =
                    hint.take().or_else(|| self.group.leader_node()).unwrap_or_else(|| {
                        turn += 1;
                        self.nodes[turn % self.nodes.len()]
                    });
                match self.propose_at(target, bytes.clone()).await {
                    Ok(reply) if reply.code == 0 => return reply,
                    Ok(reply) => hint = (reply.hint != 0).then_some(NodeId(reply.hint)),
                    Err(error) => {
                        tracing::debug!(%target, %error, "cluster command not taken");
                        turn += 1;
                    }
                }
                self.env.sleep(RETRY_PAUSE).await;
            }
        };
        let reply = tokio::select! {
            biased;
            reply = attempts => reply,
            () = self.env.sleep(PROPOSE_MAX) => return Err(ProposeClusterError::NoQuorum),
        };
        self.wait_applied(reply.index).await;
        Reply::decode(&reply.bytes).map_err(|error| {
            tracing::error!(%error, "reply of a newer cluster group");
            ProposeClusterError::NoQuorum
        })
    }

    /// Waits until this node has applied the entry at `index`, or too long.
    async fn wait_applied(&self, index: u64) {
        let mut applied = self.group.applied();
        let reached = applied.wait_for(|id| id.is_some_and(|id| id.index >= index));
        tokio::select! {
            biased;
            _ = reached => {}
            () = self.env.sleep(ATTEMPT_MAX) => {}
        }
    }

    async fn propose_at(&self, target: NodeId, bytes: Bytes) -> Result<ClusterCallV1, PeerError> {
        if target == self.links.identity().node {
            return Ok(self.propose_here(bytes).await);
        }
        let call = ClusterCallV1 { bytes, ..ClusterCallV1::default() };
        let frame = Frame::plain(Kind::Call, 0, Tag::Propose.message(&call));
        decode(self.links.call(target, Lane::Control, frame, ATTEMPT_MAX).await?.body)
    }

    /// Proposes here, if this member leads.
    pub async fn propose_here(&self, bytes: Bytes) -> ClusterCallV1 {
        match self.group.propose(LogCommand::control(bytes), None).await {
            Ok((id, ApplyReply::Control(bytes))) => {
                ClusterCallV1 { code: 0, hint: 0, bytes, index: id.index }
            }
            Ok((id, reply)) => unreachable!("control entry {id} was answered {reply}"),
            Err(ProposeError::NotLeader { hint }) => ClusterCallV1 {
                code: 1,
                hint: hint.map_or(0, |node| node.0),
                ..ClusterCallV1::default()
            },
            Err(ProposeError::Stopped) => ClusterCallV1 { code: 2, ..ClusterCallV1::default() },
        }
    }
}

/// The founding bytes of the cluster group's replicas.
#[derive(Clone, PartialEq, Message)]
pub struct ClusterFoundingV1 {
    /// The founding nodes.
    #[prost(uint32, repeated, tag = "1")]
    pub nodes: Vec<u32>,
}
