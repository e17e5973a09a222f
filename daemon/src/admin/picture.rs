//! The cluster as this node sees it at one moment, in the words of the administration interface.

use std::collections::BTreeMap;
use std::time::Duration;

use ballast_api::v1 as api;
use ballast_block::{FamilyId, NodeId, PoolId, ShardId};
use ballast_node::calls::{NodeReportV1, ReplicaReportV1};
use ballast_node::cluster::{
    ClusterState, Node, NodeState, Pool, PoolState, Replica, ReplicaState, Volume, VolumePhase,
};

use super::{Access, leases};
use crate::shard::{Condition, LinuxNode, ShardEnded};

/// Entries that a replica may be behind its leader and still count as in sync: what is in flight
/// under load.
const IN_SYNC_ENTRIES: u64 = 256;

/// Longest wait for what a further shard has heard: one that hangs must not hide the others.
const FURTHER_MAX: Duration = Duration::from_secs(3);

/// What the nodes that answered report of one of their shards.
type Reports = BTreeMap<NodeId, NodeReportV1>;

/// The cluster's state and what every node that answered reports of itself.
pub struct Picture {
    /// The node that looks.
    pub own: NodeId,
    /// How many nodes the cluster group has.
    pub founders: usize,
    /// The state as applied here.
    pub state: ClusterState,
    /// Why the cluster does not take pools of the node that looks, for ever, by their shards.
    pub refused: BTreeMap<ShardId, String>,
    /// Why shards of the node that looks have ended.
    pub ended: BTreeMap<ShardId, String>,
    /// What the nodes that answered report, by shards. A shard hears of those with its number, so
    /// the shards that the node that looks does not serve are not there.
    pub reports: BTreeMap<ShardId, Reports>,
}

impl Picture {
    /// As it is now.
    ///
    /// # Errors
    /// [`ShardEnded`]: shard 0 does not serve.
    pub async fn take(access: &Access) -> Result<Self, ShardEnded> {
        let (first, further) = access.shards.split_first().expect("a node has a shard");
        let heard = async |node: LinuxNode| (node.refused(), node.reports().await);
        let looked = first.ask(async move |node: LinuxNode| {
            let (refused, reports) = heard(node.clone()).await;
            let state = node.cluster_state().clone();
            (node.founders(), state, refused, reports)
        });
        let others = further.iter().map(async |shard| {
            let asked = tokio::time::timeout(FURTHER_MAX, shard.ask(heard)).await;
            Some((shard.id(), asked.ok()?.ok()?))
        });
        let others = futures_util::future::join_all(others);
        let (looked, others) = futures_util::future::join(looked, others).await;
        let (founders, state, refused, reports) = looked?;
        let mut picture = Self {
            own: access.node,
            founders,
            state,
            refused: BTreeMap::new(),
            ended: BTreeMap::new(),
            reports: BTreeMap::new(),
        };
        let heard = [(first.id(), (refused, reports))].into_iter();
        for (shard, (refused, reports)) in heard.chain(others.into_iter().flatten()) {
            // A refused shard has no links: that it hears of nobody says nothing.
            if refused.is_none() || shard == first.id() {
                picture.reports.insert(shard, reports);
            }
            picture.refused.extend(refused.map(|reason| (shard, reason)));
        }
        for shard in further {
            if let Condition::Ended(error) = shard.condition() {
                picture.ended.insert(shard.id(), error.to_string());
            }
        }
        Ok(picture)
    }

    /// What a node reports of its shard 0: it answers if the node does.
    pub fn node_report(&self, node: NodeId) -> Option<&NodeReportV1> {
        self.reports.get(&ShardId(0))?.get(&node)
    }

    /// What a node's shards report.
    fn reports_of(&self, node: NodeId) -> impl Iterator<Item = &NodeReportV1> {
        self.reports.values().filter_map(move |reports| reports.get(&node))
    }

    /// What a replica's own node says of it.
    pub fn report(&self, replica: &Replica) -> Option<&ReplicaReportV1> {
        let mut replicas = self.reports_of(replica.node).flat_map(|report| &report.replicas);
        replicas.find(|live| live.replica == replica.id.0)
    }

    /// The node that leads a family and what it says of its replica: of two that think so, the
    /// one in the newer term.
    pub fn leader(&self, family: FamilyId) -> Option<(NodeId, &ReplicaReportV1)> {
        let all =
            self.reports.values().flatten().flat_map(|(node, report)| {
                report.replicas.iter().map(move |replica| (*node, replica))
            });
        all.filter(|(_, replica)| replica.family == family.0 && replica.role == "leader")
            .max_by_key(|(_, replica)| replica.term)
    }

    fn in_sync(&self, replica: &Replica) -> bool {
        self.report(replica).is_some_and(|live| self.is_level(replica.node, live))
    }

    /// Replicas of a volume that are in sync on other pools than that.
    pub fn in_sync_without(&self, volume: &Volume, pool: PoolId) -> usize {
        let others = self.state.replicas_of(volume.family).filter(|it| it.pool != pool);
        others.filter(|it| it.state == ReplicaState::Ready && self.in_sync(it)).count()
    }

    /// Members of the cluster group that are in sync on other nodes than that.
    pub fn members_in_sync_without(&self, without: NodeId) -> usize {
        let all = self.reports.get(&ShardId(0)).into_iter().flatten();
        let others = all.filter(|(node, _)| **node != without);
        let is_level = |(node, report): (&NodeId, &NodeReportV1)| {
            let mut replicas = report.replicas.iter();
            replicas.any(|it| it.family == FamilyId::CLUSTER.0 && self.is_level(*node, it))
        };
        others.filter(|it| is_level(*it)).count()
    }

    /// Whether a replica of that node is a voter, and about as far as its leader.
    fn is_level(&self, at: NodeId, live: &ReplicaReportV1) -> bool {
        let Some((node, leader)) = self.leader(FamilyId(live.family)) else { return false };
        if live.suspect {
            return false;
        }
        // A learner counts for nothing yet, and neither does who is about to become a voter: should
        // another one be lost now, there might be no majority.
        if !leader.voters.contains(&live.replica) {
            return false;
        }
        if node == at {
            return leader.replica == live.replica;
        }
        let matched = leader.matched.get(&live.replica).copied().unwrap_or(0);
        let near = |index: u64| index + IN_SYNC_ENTRIES >= leader.last_index;
        live.term == leader.term && matched > 0 && near(matched) && near(live.applied_index)
    }

    /// A volume's health.
    pub fn health(&self, volume: &Volume) -> api::VolumeHealth {
        if volume.phase != VolumePhase::Ready || !self.reports.contains_key(&volume.shard) {
            return api::VolumeHealth::Unspecified;
        }
        if self.leader(volume.family).is_none() {
            return api::VolumeHealth::Unavailable;
        }
        let mut replicas = self.state.replicas_of(volume.family);
        match replicas.all(|replica| replica.state == ReplicaState::Ready && self.in_sync(replica))
        {
            true => api::VolumeHealth::Ok,
            false => api::VolumeHealth::Degraded,
        }
    }

    /// A volume.
    pub fn volume(&self, volume: &Volume) -> api::Volume {
        let phase = match volume.phase {
            VolumePhase::Creating => api::VolumePhase::Creating,
            VolumePhase::Ready => api::VolumePhase::Ready,
            VolumePhase::Deleting => api::VolumePhase::Deleting,
        };
        api::Volume {
            id: volume.id.to_string(),
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            replicas: volume.replica_count,
            phase: phase.into(),
            family: volume.family.0,
            created_at_ms: volume.created_at_ms,
            leader_node: self.leader(volume.family).map_or(0, |(node, _)| node.0),
            health: self.health(volume).into(),
            shard: volume.shard.0,
            leases: volume.leases.iter().map(|lease| leases::lease(volume, lease)).collect(),
            lease_revision: Some(volume.lease_revision),
        }
    }

    /// Who may write to a volume, as its leader says.
    pub fn writers_of(&self, volume: &Volume) -> Vec<api::Writer> {
        let leader = self.leader(volume.family).into_iter();
        let writers = leader.flat_map(|(_, report)| &report.writers);
        writers.map(|it| api::Writer { node: it.node, epoch: it.epoch }).collect()
    }

    /// A volume's replicas.
    pub fn replicas_of(&self, volume: &Volume) -> Vec<api::Replica> {
        self.state.replicas_of(volume.family).map(|replica| self.replica(replica)).collect()
    }

    /// A replica.
    pub fn replica(&self, replica: &Replica) -> api::Replica {
        let volume = self.state.volume_of_family(replica.family);
        let state = match replica.state {
            ReplicaState::Creating => api::ReplicaState::Creating,
            ReplicaState::Ready => api::ReplicaState::Ready,
            ReplicaState::Lost => api::ReplicaState::Lost,
            ReplicaState::Removing => api::ReplicaState::Removing,
            ReplicaState::Removed => api::ReplicaState::Removed,
        };
        let live = self.report(replica);
        api::Replica {
            id: replica.id.0,
            volume_id: volume.map(|volume| volume.id.to_string()).unwrap_or_default(),
            volume: volume.map(|volume| volume.name.clone()).unwrap_or_default(),
            node: replica.node.0,
            pool_id: replica.pool.to_string(),
            state: state.into(),
            role: live.map_or(api::ReplicaRole::Unspecified, role).into(),
            term: live.map_or(0, |live| live.term),
            last_log_index: live.map_or(0, |live| live.last_index),
            applied_index: live.map_or(0, |live| live.applied_index),
            lag_bytes: self.lag_bytes(replica),
            in_sync: self.in_sync(replica),
            live: live.is_some(),
        }
    }

    /// What the leader keeps of its log, in the part that the replica is not known to have: a good
    /// estimate while entries are alike.
    fn lag_bytes(&self, replica: &Replica) -> u64 {
        let Some((_, leader)) = self.leader(replica.family) else { return 0 };
        if leader.replica == replica.id.0 || leader.last_index == 0 {
            return 0;
        }
        let matched = leader.matched.get(&replica.id.0).copied().unwrap_or(0);
        let kept = leader.last_index.saturating_sub(leader.purged_index).max(1);
        let behind = leader.last_index.saturating_sub(matched).min(kept);
        let bytes = u128::from(leader.retained_bytes) * u128::from(behind) / u128::from(kept);
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// A node.
    pub fn node(&self, node: &Node) -> api::Node {
        let state = match node.state {
            NodeState::Registered => api::NodeState::Registered,
            NodeState::Active => api::NodeState::Active,
        };
        let liveness = match self.node_report(node.id) {
            Some(_) => api::NodeLiveness::Up,
            None => api::NodeLiveness::Down,
        };
        let kept = |replica: &&Replica| replica.state != ReplicaState::Removed;
        let leads = |replica: &ReplicaReportV1| replica.family != 0 && replica.role == "leader";
        let live = self.reports_of(node.id).flat_map(|report| &report.replicas);
        let leaders = live.filter(|replica| leads(replica)).count();
        let working = self.state.pools_on(node.id).filter(|pool| pool.state == PoolState::Ok);
        let (capacity, used) = working.fold((0, 0), |(capacity, used), pool| {
            (capacity + pool.space.capacity_bytes, used + self.used_bytes(pool))
        });
        let version = if node.id == self.own { env!("CARGO_PKG_VERSION") } else { "" };
        api::Node {
            id: node.id.0,
            name: node.name.clone(),
            peer_address: node.peer_address.clone(),
            labels: node.labels.clone().into_iter().collect(),
            state: state.into(),
            liveness: liveness.into(),
            pools: count(self.state.pools_on(node.id).count()),
            replicas: count(self.state.replicas_on(node.id).filter(kept).count()),
            leaders: count(leaders),
            capacity_bytes: capacity,
            used_bytes: used,
            version: version.to_owned(),
        }
    }

    /// A pool.
    pub fn pool(&self, pool: &Pool) -> api::Pool {
        let in_it = self.state.replicas_on(pool.node);
        let in_it = in_it.filter(|replica| replica.pool == pool.id);
        let replicas = in_it.filter(|replica| replica.state != ReplicaState::Removed).count();
        api::Pool {
            id: pool.id.to_string(),
            node: pool.node.0,
            state: self.pool_state(pool).into(),
            capacity_bytes: pool.space.capacity_bytes,
            used_bytes: self.used_bytes(pool),
            replicas: count(replicas),
            boot_counter: pool.boot_counter,
            shard: pool.shard.0,
        }
    }

    /// Whether a pool works: as its node says, or else as it said last.
    pub fn pool_state(&self, pool: &Pool) -> api::PoolState {
        let failed = self.live_pool(pool).is_some_and(|report| !report.pool_failure.is_empty());
        let failed = failed || self.is_silent(pool);
        match pool.state {
            PoolState::Lost => api::PoolState::Lost,
            PoolState::Failed => api::PoolState::Failed,
            PoolState::Ok if failed => api::PoolState::Failed,
            PoolState::Ok => api::PoolState::Ok,
        }
    }

    /// Bytes used: as its node says now, or else as it said last.
    pub fn used_bytes(&self, pool: &Pool) -> u64 {
        self.live_pool(pool).map_or(pool.space.used_bytes, |report| report.pool_used)
    }

    /// Bytes that volumes can still take.
    pub fn free_bytes(&self, pool: &Pool) -> u64 {
        self.live_pool(pool).map_or(pool.space.free_bytes(), |report| report.pool_free)
    }

    /// Whether a pool's node answers, and its shard does not.
    pub fn is_silent(&self, pool: &Pool) -> bool {
        if pool.node == self.own && self.ended.contains_key(&pool.shard) {
            return true;
        }
        let reports = self.reports.get(&pool.shard);
        let is_silent = reports.is_some_and(|reports| !reports.contains_key(&pool.node));
        is_silent && self.node_report(pool.node).is_some()
    }

    /// A node's shard has one pool that serves; its report is about that one.
    fn live_pool(&self, pool: &Pool) -> Option<&NodeReportV1> {
        let serves = |other: &&Pool| other.state != PoolState::Lost;
        let of_shard = self.state.pools_of(pool.node, pool.shard);
        let only = of_shard.filter(serves).count() == 1;
        let report = self.reports.get(&pool.shard)?.get(&pool.node);
        report.filter(|_| only && serves(&pool))
    }
}

fn role(replica: &ReplicaReportV1) -> api::ReplicaRole {
    match replica.role.as_str() {
        "leader" => api::ReplicaRole::Leader,
        "follower" => api::ReplicaRole::Follower,
        "learner" => api::ReplicaRole::Learner,
        "candidate" => api::ReplicaRole::Candidate,
        _ => api::ReplicaRole::Unspecified,
    }
}

/// A number of things as the interface has it.
pub fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
