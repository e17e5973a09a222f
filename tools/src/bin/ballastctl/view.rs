//! What is shown of an answer. The field names are the JSON's, and are part of the interface: they
//! are only added. Sizes are bytes, times milliseconds since 1970; `null` is "not known".

use std::collections::BTreeMap;

use ballast_api::v1;
use serde::Serialize;

use crate::leases::Lease;

/// A volume.
#[derive(Debug, Serialize)]
pub struct Volume {
    pub id: String,
    pub name: String,
    pub size_bytes: u64,
    pub replicas: u32,
    pub phase: &'static str,
    pub health: &'static str,
    pub leader_node: Option<u32>,
    pub family: u64,
    pub shard: u32,
    pub created_at_ms: u64,
    pub leases: Vec<Lease>,
}

/// A replica; from `role` on it is what was last heard, `null` when nothing was.
#[derive(Debug, Serialize)]
pub struct Replica {
    pub id: u64,
    pub volume: String,
    pub volume_id: String,
    pub node: u32,
    pub pool_id: String,
    pub state: &'static str,
    pub role: &'static str,
    pub term: Option<u64>,
    pub last_log_index: Option<u64>,
    pub applied_index: Option<u64>,
    pub lag_bytes: Option<u64>,
    pub in_sync: Option<bool>,
}

/// A node.
#[derive(Debug, Serialize)]
pub struct Node {
    pub id: u32,
    pub name: String,
    pub peer_address: String,
    pub labels: BTreeMap<String, String>,
    pub state: &'static str,
    pub liveness: &'static str,
    pub pools: u32,
    pub replicas: u32,
    pub leaders: u32,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub version: Option<String>,
}

/// A pool.
#[derive(Debug, Serialize)]
pub struct Pool {
    pub id: String,
    pub node: u32,
    pub shard: u32,
    pub state: &'static str,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub replicas: u32,
    pub boot_counter: u64,
}

/// The cluster.
#[derive(Debug, Serialize)]
pub struct Status {
    pub health: &'static str,
    pub reasons: Vec<Reason>,
    pub cluster_id: String,
    pub generation: u64,
    pub leader_node: Option<u32>,
    pub answering_node: u32,
    pub revision: u64,
    pub counts: Counts,
}

/// Why the cluster is not well.
#[derive(Debug, Serialize)]
pub struct Reason {
    pub severity: &'static str,
    pub code: String,
    pub object: String,
    pub message: String,
}

/// How many there are.
#[derive(Debug, Serialize)]
pub struct Counts {
    pub nodes: u32,
    pub nodes_up: u32,
    pub pools: u32,
    pub pools_ok: u32,
    pub volumes: u32,
    pub volumes_ok: u32,
    pub volumes_degraded: u32,
    pub volumes_unavailable: u32,
    pub volumes_deleting: u32,
    pub replicas: u32,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
}

/// `ballastctl volume create`, `volume resize`.
#[derive(Debug, Serialize)]
pub struct OneVolume {
    pub volume: Volume,
}

/// `ballastctl volume show`.
#[derive(Debug, Serialize)]
pub struct VolumeDetail {
    pub volume: Volume,
    pub replicas: Vec<Replica>,
    pub writers: Vec<Writer>,
}

/// Who has a volume open for writing.
#[derive(Debug, Serialize)]
pub struct Writer {
    /// The node that serves it.
    pub node: u32,
    /// Its lease and the host that has that; `null`: it has the volume open without one.
    pub epoch: Option<u64>,
    pub host: Option<String>,
}

/// `ballastctl volume list`.
#[derive(Debug, Serialize)]
pub struct Volumes {
    pub volumes: Vec<Volume>,
}

/// `ballastctl volume delete`.
#[derive(Debug, Serialize)]
pub struct Deleted {
    pub deleted: bool,
}

/// `ballastctl volume move-leader`.
#[derive(Debug, Serialize)]
pub struct LeaderMoved {
    pub leader_node: u32,
}

/// `ballastctl pool replace`.
#[derive(Debug, Serialize)]
pub struct PoolReplaced {
    /// The pool that was given up.
    pub pool: String,
    pub node: u32,
    pub shard: u32,
    /// 0 = replaced already, or a new one is made without a number.
    pub replacement: u64,
    /// A new one is to be made without a number.
    pub without_number: bool,
}

/// `ballastctl node list`.
#[derive(Debug, Serialize)]
pub struct Nodes {
    pub nodes: Vec<Node>,
}

/// `ballastctl node show`.
#[derive(Debug, Serialize)]
pub struct NodeDetail {
    pub node: Node,
    pub pools: Vec<Pool>,
}

/// `ballastctl pool list`.
#[derive(Debug, Serialize)]
pub struct Pools {
    pub pools: Vec<Pool>,
}

impl From<v1::Volume> for Volume {
    fn from(it: v1::Volume) -> Self {
        let phase = match it.phase() {
            v1::VolumePhase::Unspecified => "unknown",
            v1::VolumePhase::Creating => "creating",
            v1::VolumePhase::Ready => "ready",
            v1::VolumePhase::Deleting => "deleting",
        };
        let health = match it.health() {
            v1::VolumeHealth::Unspecified => "unknown",
            v1::VolumeHealth::Ok => "ok",
            v1::VolumeHealth::Degraded => "degraded",
            v1::VolumeHealth::Unavailable => "unavailable",
        };
        Self {
            phase,
            health,
            leader_node: known(it.leader_node),
            id: it.id,
            name: it.name,
            size_bytes: it.size_bytes,
            replicas: it.replicas,
            family: it.family,
            shard: it.shard,
            created_at_ms: it.created_at_ms,
            leases: it.leases.into_iter().map(Lease::from).collect(),
        }
    }
}

impl VolumeDetail {
    /// Of what a node answered about a volume that is there.
    pub fn new(volume: v1::Volume, replicas: Vec<v1::Replica>, writers: Vec<v1::Writer>) -> Self {
        let volume = Volume::from(volume);
        let writer = |it: v1::Writer| {
            let lease = volume.leases.iter().find(|lease| lease.epoch == it.epoch);
            let host = lease.map(|lease| lease.host.clone());
            Writer { node: it.node, epoch: known(it.epoch), host }
        };
        let writers = writers.into_iter().map(writer).collect();
        Self { replicas: replicas.into_iter().map(Replica::from).collect(), writers, volume }
    }
}

impl From<v1::Replica> for Replica {
    fn from(it: v1::Replica) -> Self {
        let state = match it.state() {
            v1::ReplicaState::Unspecified => "unknown",
            v1::ReplicaState::Creating => "creating",
            v1::ReplicaState::Ready => "ready",
            v1::ReplicaState::Lost => "lost",
            v1::ReplicaState::Removing => "removing",
            v1::ReplicaState::Removed => "removed",
        };
        let role = match it.role() {
            v1::ReplicaRole::Unspecified => "unknown",
            v1::ReplicaRole::Leader => "leader",
            v1::ReplicaRole::Follower => "follower",
            v1::ReplicaRole::Learner => "learner",
            v1::ReplicaRole::Candidate => "candidate",
        };
        Self {
            state,
            role: if it.live { role } else { "unknown" },
            term: it.live.then_some(it.term),
            last_log_index: it.live.then_some(it.last_log_index),
            applied_index: it.live.then_some(it.applied_index),
            lag_bytes: it.live.then_some(it.lag_bytes),
            in_sync: it.live.then_some(it.in_sync),
            id: it.id,
            volume: it.volume,
            volume_id: it.volume_id,
            node: it.node,
            pool_id: it.pool_id,
        }
    }
}

impl From<v1::Node> for Node {
    fn from(it: v1::Node) -> Self {
        let state = match it.state() {
            v1::NodeState::Unspecified => "unknown",
            v1::NodeState::Registered => "registered",
            v1::NodeState::Active => "active",
        };
        let liveness = match it.liveness() {
            v1::NodeLiveness::Unspecified => "unknown",
            v1::NodeLiveness::Up => "up",
            v1::NodeLiveness::Down => "down",
        };
        Self {
            state,
            liveness,
            id: it.id,
            name: it.name,
            peer_address: it.peer_address,
            labels: it.labels,
            pools: it.pools,
            replicas: it.replicas,
            leaders: it.leaders,
            capacity_bytes: it.capacity_bytes,
            used_bytes: it.used_bytes,
            version: Some(it.version).filter(|version| !version.is_empty()),
        }
    }
}

impl From<v1::Pool> for Pool {
    fn from(it: v1::Pool) -> Self {
        let state = match it.state() {
            v1::PoolState::Unspecified => "unknown",
            v1::PoolState::Ok => "ok",
            v1::PoolState::Failed => "failed",
            v1::PoolState::Lost => "lost",
        };
        Self {
            state,
            id: it.id,
            node: it.node,
            shard: it.shard,
            capacity_bytes: it.capacity_bytes,
            used_bytes: it.used_bytes,
            replicas: it.replicas,
            boot_counter: it.boot_counter,
        }
    }
}

impl From<v1::GetStatusResponse> for Status {
    fn from(it: v1::GetStatusResponse) -> Self {
        let health = health_name(it.health());
        let reason = |reason: v1::HealthReason| Reason {
            severity: health_name(reason.severity()),
            code: reason.code,
            object: reason.object,
            message: reason.message,
        };
        let counts = it.counts.unwrap_or_default();
        Self {
            health,
            reasons: it.reasons.into_iter().map(reason).collect(),
            cluster_id: it.cluster_id,
            generation: it.generation,
            leader_node: known(it.leader_node),
            answering_node: it.answering_node,
            revision: it.revision,
            counts: Counts {
                nodes: counts.nodes,
                nodes_up: counts.nodes_up,
                pools: counts.pools,
                pools_ok: counts.pools_ok,
                volumes: counts.volumes,
                volumes_ok: counts.volumes_ok,
                volumes_degraded: counts.volumes_degraded,
                volumes_unavailable: counts.volumes_unavailable,
                volumes_deleting: counts.volumes_deleting,
                replicas: counts.replicas,
                capacity_bytes: counts.capacity_bytes,
                used_bytes: counts.used_bytes,
            },
        }
    }
}

fn health_name(health: v1::ClusterHealth) -> &'static str {
    match health {
        v1::ClusterHealth::Unspecified => "unknown",
        v1::ClusterHealth::Ok => "ok",
        v1::ClusterHealth::Degraded => "degraded",
        v1::ClusterHealth::Unavailable => "unavailable",
    }
}

fn known<N: Default + PartialEq>(number: N) -> Option<N> {
    Some(number).filter(|number| *number != N::default())
}
