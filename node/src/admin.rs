//! What an administrator can ask of a node, free of any protocol: the daemon puts gRPC before it.

use std::collections::BTreeMap;
use std::time::Duration;

use ballast_block::{NodeId, PoolId, ReplicaId, ShardId, VolumeId};
use ballast_cluster::{
    ClusterState, Command, CreateVolume, PoolState, Refusal, Reply, Volume, VolumePhase,
};
use ballast_env::Env;
use thiserror::Error;

use crate::attach;
use crate::calls::{MoveLeaderV1, MovedV1, NodeReportV1, Tag, decode};
use crate::leases::LeaseError;
use crate::node::Node;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};
use crate::report;

/// Longest wait for a new volume to become usable.
pub const READY_MAX: Duration = Duration::from_secs(20);
/// Longest wait for a volume's leader to be where it was sent.
const MOVED_MAX: Duration = Duration::from_secs(5);
/// Longest that a node whose disk has failed goes on, to say so.
const FAILURE_REPORT_MAX: Duration = Duration::from_secs(2);
const CALL_MAX: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);

/// What takes the place of a pool that was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replacement {
    /// A pool that is to be formatted with this member of the cluster group: shard 0's.
    Member(ReplicaId),
    /// A pool that is to be formatted without one: another shard's.
    NoMember,
    /// One that serves already.
    Serves,
}

/// Why an administrator's request was not carried out.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AdminError {
    /// The cluster refused it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no such volume.
    #[error("there is no volume {0:?}: see the list of volumes")]
    VolumeUnknown(String),
    /// There is no such node.
    #[error("there is no {0}: see the list of nodes")]
    NodeUnknown(NodeId),
    /// No quorum.
    #[error(transparent)]
    NoQuorum(#[from] crate::cluster_group::ProposeClusterError),
    /// The volume was created, but is not usable yet.
    #[error("volume {0:?} is created but has no quorum of replicas yet; check its nodes")]
    NotReady(String),
    /// What is known here lags behind.
    #[error(
        "this node has not heard yet what was decided about volume {0:?}: ask again, here or at \
         another node"
    )]
    NotHeard(String),
    /// The family did not take over what was decided. That stands: asked again, it goes on.
    #[error(transparent)]
    NotTaken(#[from] LeaseError),
    /// The lease was granted and has ended before the answer: another host took it, or it was released.
    #[error(
        "lease of volume {volume:?} was granted to host {host:?} and taken away at once: see the \
             volume's leases"
    )]
    LeaseGone {
        /// The volume.
        volume: String,
        /// Who was to have it.
        host: String,
    },
    /// The leader can't be moved there.
    #[error("leader of {volume:?} can't move to {node}: {reason}")]
    CantMove {
        /// The volume.
        volume: String,
        /// Where to.
        node: NodeId,
        /// Why not.
        reason: String,
    },
}

impl<E: Env> Node<E> {
    /// The cluster's state as this node knows it.
    pub fn cluster_state(&self) -> std::cell::Ref<'_, ClusterState> {
        self.inner.cluster.state()
    }

    /// Whether this node serves: its pool is open and the cluster has accepted it.
    pub fn is_ready(&self) -> bool {
        self.inner.announced.get() && self.inner.pool.failure().borrow().is_none()
    }

    /// Why the cluster does not take this node's pool, for ever, if so.
    pub fn refused(&self) -> Option<String> {
        self.inner.refused.borrow().clone()
    }

    /// Tells the cluster that this node's pool has failed, for others to see; best effort, the node
    /// is about to end.
    pub async fn report_failure(&self) {
        let inner = &self.inner;
        inner.stopping.send_replace(true);
        let id = inner.links.identity().pool;
        let space = inner.cluster.state().pool(id).map(|pool| pool.space);
        let Some(space) = space else { return };
        let failed = Command::ReportPool { pool: id, space, state: PoolState::Failed };
        tokio::select! {
            biased;
            _ = inner.cluster.propose(&failed) => {}
            () = inner.env.sleep(FAILURE_REPORT_MAX) => {}
        }
    }

    /// Tells the cluster that the pool of another shard of this node does not serve, for others to
    /// see and for placement to pass by. Answers whether the cluster knows now. Its next start says
    /// that it serves again.
    pub async fn report_ended(&self, shard: ShardId) -> bool {
        let pools: Vec<_> = {
            let state = self.cluster_state();
            let of_shard = state.pools_of(self.inner.config.node, shard);
            of_shard.filter(|pool| pool.state == PoolState::Ok).copied().collect()
        };
        for pool in pools {
            let (id, space) = (pool.id, pool.space);
            let failed = Command::ReportPool { pool: id, space, state: PoolState::Failed };
            if self.inner.cluster.propose(&failed).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Gives a node's pool up for ever, so that a fresh one can take its place. Refused when a volume
    /// or the cluster group had no majority without it, unless by force.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn replace_pool(
        &self,
        node: NodeId,
        pool: PoolId,
        force: bool,
    ) -> Result<Replacement, AdminError> {
        let replace = Command::ReplacePool { node, pool, guarded: !force };
        match self.inner.cluster.propose(&replace).await? {
            Reply::Replacing { member } => Ok(Replacement::Member(member)),
            Reply::GivenUp => Ok(Replacement::NoMember),
            Reply::Done => Ok(Replacement::Serves),
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => unreachable!("replacing a pool was answered {reply:?}"),
        }
    }

    /// How many nodes the cluster group has.
    pub fn founders(&self) -> usize {
        self.inner.config.founders.len()
    }

    /// What every node that answers reports of itself.
    pub async fn reports(&self) -> BTreeMap<NodeId, NodeReportV1> {
        report::all(&self.inner).await
    }

    /// Creates a volume and waits until it can be used.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn create_volume(
        &self,
        name: &str,
        size_bytes: u64,
        replicas: u32,
    ) -> Result<Volume, AdminError> {
        self.create_volume_near(name, size_bytes, replicas, Vec::new(), READY_MAX).await
    }

    /// As [`Node::create_volume`], with replicas on the preferred nodes if there is room, and answered
    /// after `ready_max` also if it can't be used yet: [`AdminError::NotReady`].
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn create_volume_near(
        &self,
        name: &str,
        size_bytes: u64,
        replicas: u32,
        preferred: Vec<NodeId>,
        ready_max: Duration,
    ) -> Result<Volume, AdminError> {
        let env = &self.inner.env;
        let end = env.now().after(ready_max);
        let command = Command::CreateVolume(CreateVolume {
            volume: VolumeId::from_random(env.random_16()),
            name: name.to_owned(),
            size_bytes,
            replicas,
            created_at_ms: env.wall_ms(),
            preferred,
            absent: self.absent(),
        });
        let volume = self.propose_about_volume(&command).await?;
        loop {
            let now = self.cluster_state().volume(volume.id).cloned();
            match now {
                Some(volume) if volume.phase == VolumePhase::Ready => return Ok(volume),
                None => return Err(AdminError::VolumeUnknown(name.to_owned())),
                Some(_) if env.now() >= end => {
                    return Err(AdminError::NotReady(name.to_owned()));
                }
                Some(_) => env.sleep(POLL).await,
            }
        }
    }

    /// Members of the cluster group that this node has no connection to now.
    fn absent(&self) -> Vec<NodeId> {
        let inner = &self.inner;
        let others = inner.config.founders.iter().map(|founder| founder.node);
        let others = others.filter(|&node| node != inner.config.node);
        others.filter(|&node| inner.links.peer(node).is_none()).collect()
    }

    /// The volume of that name or id.
    ///
    /// # Errors
    /// [`AdminError::VolumeUnknown`].
    pub fn find_volume(&self, name_or_id: &str) -> Result<Volume, AdminError> {
        let state = self.cluster_state();
        let found = state.find_volume(name_or_id).cloned();
        found.ok_or_else(|| AdminError::VolumeUnknown(name_or_id.to_owned()))
    }

    /// The volume of that name or id. Asks the cluster group before it says that there is none: what
    /// this node knows may be older than the volume.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn find_volume_surely(&self, name_or_id: &str) -> Result<Volume, AdminError> {
        if let Ok(known) = self.find_volume(name_or_id) {
            return Ok(known);
        }
        self.hear_all().await?;
        self.find_volume(name_or_id)
    }

    /// Waits until this node knows all that the cluster group had decided when it was asked.
    ///
    /// # Errors
    /// [`AdminError::NoQuorum`].
    pub async fn hear_all(&self) -> Result<(), AdminError> {
        // No volume has this id. When the entry is applied here, so is what was decided before.
        let nothing = Command::DeleteVolume { volume: VolumeId::from_bytes([0; 16]) };
        self.inner.cluster.propose(&nothing).await?;
        Ok(())
    }

    /// Deletes a volume; one that is gone is done. Answers whether it was there.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn delete_volume(&self, name_or_id: &str) -> Result<bool, AdminError> {
        let volume = match self.find_volume_surely(name_or_id).await {
            Ok(volume) => volume,
            Err(AdminError::VolumeUnknown(_)) => return Ok(false),
            Err(error) => return Err(error),
        };
        match self.inner.cluster.propose(&Command::DeleteVolume { volume: volume.id }).await? {
            Reply::Refused(refusal) => Err(refusal.into()),
            _ => Ok(volume.phase != VolumePhase::Deleting),
        }
    }

    /// Grows a volume and waits until its group has taken the size: from then on what lies beyond
    /// the old end can be written. For a node of the volume's shard.
    ///
    /// # Errors
    /// [`AdminError`]; [`AdminError::NotTaken`] when the size is decided and not in force yet.
    pub async fn resize_volume(
        &self,
        name_or_id: &str,
        size_bytes: u64,
    ) -> Result<Volume, AdminError> {
        let volume = self.find_volume_surely(name_or_id).await?.id;
        let command = Command::ResizeVolume { volume, size_bytes };
        let grown = self.propose_about_volume(&command).await?;
        self.take_over(&grown).await?;
        Ok(grown)
    }

    /// For commands that are answered with the volume.
    pub(crate) async fn propose_about_volume(
        &self,
        command: &Command,
    ) -> Result<Volume, AdminError> {
        match self.inner.cluster.propose(command).await? {
            Reply::Volume(volume) => Ok(volume),
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => unreachable!("{command} was answered {reply:?}"),
        }
    }

    /// Hands a volume's lead to a node and waits until it leads.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn move_leader(&self, name_or_id: &str, node: NodeId) -> Result<(), AdminError> {
        let volume = self.find_volume(name_or_id)?;
        if self.cluster_state().node(node).is_none() {
            return Err(AdminError::NodeUnknown(node));
        }
        let env = &self.inner.env;
        let end = env.now().after(MOVED_MAX);
        let mut reason = "no leader answers; check the volume's nodes".to_owned();
        while env.now() < end {
            for (leader, report) in self.reports().await {
                let leads = report
                    .replicas
                    .iter()
                    .any(|replica| replica.family == volume.family.0 && replica.role == "leader");
                if leads && leader == node {
                    return Ok(());
                }
                if leads
                    && let Some(moved) = self.ask_to_move(leader, &volume, node).await
                    && moved.code == attach::HELD
                {
                    reason = moved.reason;
                }
            }
            env.sleep(POLL * 5).await;
        }
        Err(AdminError::CantMove { volume: volume.name, node, reason })
    }

    async fn ask_to_move(&self, leader: NodeId, volume: &Volume, node: NodeId) -> Option<MovedV1> {
        if leader == self.inner.config.node {
            return Some(attach::move_leader_here(&self.inner, volume.family, node).await);
        }
        let ask = MoveLeaderV1 { node: node.0 };
        let plain = Frame::plain(Kind::Call, 0, Tag::MoveLeader.message(&ask));
        let frame = Frame { family: volume.family, ..plain };
        let reply = self.inner.links.call(leader, Lane::Control, frame, CALL_MAX).await.ok()?;
        decode(reply.body).ok()
    }
}
