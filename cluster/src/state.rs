//! The state, and the one way to change it.

use std::collections::BTreeMap;

use ballast_block::{ClusterId, FamilyId, NodeId, PoolId, ReplicaId, ShardId, VolumeId};

use crate::command::{Command, PoolStart};
use crate::error::Refusal;
use crate::view::{Node, Pool, Replica, Volume, VolumePhase};

/// Families are numbered from 1: 0 is the cluster group.
pub(crate) const FIRST_FAMILY: u64 = 1;

/// Replicas are numbered from 1000, so that none is mistaken for a node's number, which is the
/// member id in the cluster group.
pub(crate) const FIRST_REPLICA: u64 = 1000;

/// The replicated state of the cluster group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterState {
    pub(crate) cluster: ClusterId,
    pub(crate) generation: u64,
    pub(crate) revision: u64,
    pub(crate) next_family: u64,
    pub(crate) next_replica: u64,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) pools: BTreeMap<PoolId, Pool>,
    pub(crate) volumes: BTreeMap<VolumeId, Volume>,
    pub(crate) replicas: BTreeMap<ReplicaId, Replica>,
    /// Derived from `volumes`: the names in use.
    pub(crate) names: BTreeMap<String, VolumeId>,
    /// Derived from `volumes`.
    pub(crate) families: BTreeMap<FamilyId, VolumeId>,
}

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is so now, or was so before.
    Done,
    /// The volume that was created, resized, leased, or existed already, as it is now.
    Volume(Volume),
    /// A later start of the pool is known. If the process that reported this one lives, its pool went
    /// back in time: it says so by repeating its report with what it was told. Nothing was changed.
    PoolOlder {
        /// The start that is known.
        known: PoolStart,
    },
    /// The pool's contents went back in time: it and its replicas are lost. Its node must not use
    /// it; a new pool may be made on its disk.
    PoolRolledBack {
        /// The pool.
        pool: PoolId,
        /// The newest start that the cluster knows.
        known: u64,
        /// The start that was reported.
        reported: u64,
        /// Its replicas that are lost, now or since before.
        lost: Vec<ReplicaId>,
    },
    /// The node's pool is given up; a pool made with this member of the cluster group replaces it.
    Replacing {
        /// The id of the node's next member of the cluster group.
        member: ReplicaId,
    },
    /// The node's pool is given up; a pool made without a member of the cluster group replaces it:
    /// it is not of shard 0.
    GivenUp,
    /// Nothing was changed.
    Refused(Refusal),
}

/// A reply, and whether the state was changed.
pub(crate) struct Outcome {
    pub(crate) reply: Reply,
    pub(crate) changed: bool,
}

impl Outcome {
    pub(crate) fn done(changed: bool) -> Self {
        Self { reply: Reply::Done, changed }
    }
}

impl ClusterState {
    /// The state before the first command. All nodes must start with the same id.
    pub fn new(cluster: ClusterId) -> Self {
        Self {
            cluster,
            generation: 1,
            revision: 0,
            next_family: FIRST_FAMILY,
            next_replica: FIRST_REPLICA,
            nodes: BTreeMap::new(),
            pools: BTreeMap::new(),
            volumes: BTreeMap::new(),
            replicas: BTreeMap::new(),
            names: BTreeMap::new(),
            families: BTreeMap::new(),
        }
    }

    /// Applies a committed command. Raises the revision if it changed anything. To apply a command
    /// twice in a row is to apply it once; the second answer is a refusal where the command names a
    /// revision of leases that the first time left behind.
    pub fn apply(&mut self, command: Command) -> Reply {
        let outcome = match command {
            Command::RegisterNode(it) => self.register_node(it),
            Command::NodeBooted(it) => self.node_booted(&it),
            Command::ReplacePool { node, pool, guarded } => self.replace_pool(node, pool, guarded),
            Command::ReplaceReplica { replica } => self.replace_replica(replica),
            Command::ReportPool { pool, space, state } => self.report_pool(pool, space, state),
            Command::CreateVolume(it) => self.create_volume(it),
            Command::ReplicaReady { replica } => self.replica_ready(replica),
            Command::FamilyFormed { family } => self.family_formed(family),
            Command::ResizeVolume { volume, size_bytes } => self.resize_volume(volume, size_bytes),
            Command::DeleteVolume { volume } => self.delete_volume(volume),
            Command::ReplicaRemoved { replica } => self.replica_removed(replica),
            Command::AcquireLease(it) => self.acquire_lease(it),
            Command::ReleaseLease { volume, host, epoch, seen_revision } => {
                self.release_lease(volume, &host, epoch, seen_revision)
            }
        };
        match outcome {
            Ok(Outcome { reply, changed }) => {
                self.revision += u64::from(changed);
                reply
            }
            Err(refusal) => Reply::Refused(refusal),
        }
    }

    /// The cluster's id.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Raised whenever the control plane was rebuilt from the disks; 1 at first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The number of commands that changed something.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All nodes, by id.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// One node.
    pub fn node(&self, node: NodeId) -> Option<&Node> {
        self.nodes.get(&node)
    }

    /// The node of that name, or of that number (`2` or `node-2`) if no node has that name.
    pub fn find_node(&self, name_or_id: &str) -> Option<&Node> {
        let by_name = self.nodes.values().find(|node| node.name == name_or_id);
        by_name.or_else(|| {
            let number = name_or_id.strip_prefix("node-").unwrap_or(name_or_id);
            self.node(NodeId(number.parse().ok()?))
        })
    }

    /// All pools, by id.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.pools.values()
    }

    /// One pool.
    pub fn pool(&self, pool: PoolId) -> Option<&Pool> {
        self.pools.get(&pool)
    }

    /// All volumes, also those being deleted, by id.
    pub fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.values()
    }

    /// One volume, also one being deleted.
    pub fn volume(&self, volume: VolumeId) -> Option<&Volume> {
        self.volumes.get(&volume)
    }

    /// The volume of that name, not one that is being deleted.
    pub fn volume_by_name(&self, name: &str) -> Option<&Volume> {
        self.volume(*self.names.get(name)?)
    }

    /// The volume of that name, or of that id (a UUID; also one being deleted).
    pub fn find_volume(&self, name_or_id: &str) -> Option<&Volume> {
        self.volume_by_name(name_or_id)
            .or_else(|| self.volume(VolumeId(uuid::Uuid::try_parse(name_or_id).ok()?)))
    }

    /// The volume of a family, also one being deleted.
    pub fn volume_of_family(&self, family: FamilyId) -> Option<&Volume> {
        self.volume(*self.families.get(&family)?)
    }

    /// All replicas, by id, also those being removed (tombstones).
    pub fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.values()
    }

    /// One replica.
    pub fn replica(&self, replica: ReplicaId) -> Option<&Replica> {
        self.replicas.get(&replica)
    }

    /// The replicas of a family, by id; none if there is no such family.
    pub fn replicas_of(&self, family: FamilyId) -> impl Iterator<Item = &Replica> {
        let volume = self.volume_of_family(family);
        let ids = volume.map(|volume| volume.replicas.as_slice()).unwrap_or_default();
        ids.iter().map(|id| &self.replicas[id])
    }

    /// The replicas on a node, by id: what the node compares its pools with.
    pub fn replicas_on(&self, node: NodeId) -> impl Iterator<Item = &Replica> {
        self.replicas.values().filter(move |replica| replica.node == node)
    }

    /// The replicas in the pools of a node's shard, by id: what that shard compares its pool with.
    pub fn replicas_on_shard(
        &self,
        node: NodeId,
        shard: ShardId,
    ) -> impl Iterator<Item = &Replica> {
        // Mostly one: cheaper to compare with than to look up each replica's pool.
        let pools: Vec<PoolId> = self.pools_of(node, shard).map(|pool| pool.id).collect();
        self.replicas_on(node).filter(move |replica| pools.contains(&replica.pool))
    }

    /// The replica whose node initialises the family's Raft group, once all its replicas are ready:
    /// the one with the lowest id, always, so that no two nodes ever do. `None` when there is
    /// nothing to initialise: no such family, formed already, or being deleted.
    pub fn former(&self, family: FamilyId) -> Option<&Replica> {
        let volume = self.volume_of_family(family)?;
        if volume.phase != VolumePhase::Creating {
            return None;
        }
        self.replica(*volume.replicas.first()?)
    }
}
