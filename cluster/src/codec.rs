//! The state as bytes, for checkpoints and for bringing a member up:
//! `"BLSTCLU1"`, CRC-32 of the rest (little-endian), then a `StateRecord`.

use std::collections::BTreeMap;

use ballast_block::checksum::crc32;
use ballast_block::limits::NODE_SHARDS_MAX;
use ballast_block::{ClusterId, Epoch, FamilyId, NodeId, PoolId, ReplicaId, ShardId, VolumeId};
use prost::Message;
use thiserror::Error;

use crate::command::READER_VERSION;
use crate::leases::are_sound;
use crate::state::{ClusterState, FIRST_REPLICA};
use crate::view::{Lease, Node, Pool, Replica, ReplicaState, Volume, VolumePhase};
use crate::wire::{
    LeaseRecord, NodeRecord, PoolRecord, ReplicaRecord, StateRecord, UnknownNumber, VolumeRecord,
};

const MAGIC: [u8; 8] = *b"BLSTCLU1";
const HEADER_BYTES: usize = MAGIC.len() + 4;

/// Bytes that are not a state this build can use.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StateError {
    /// Too short, or something else.
    #[error("cluster state is not one (its first bytes are wrong): give the right file")]
    NotAState,
    /// Damaged.
    #[error("cluster state fails its checksum: it is damaged; take it from another node")]
    Checksum,
    /// A newer build wrote it.
    #[error(
        "cluster state needs reader version {needs}, this build has {READER_VERSION}: \
         upgrade this node"
    )]
    TooNew {
        /// The version it needs.
        needs: u32,
    },
    /// The checksum is right and the contents are not: a bug of the build that wrote it.
    #[error("cluster state is not valid protobuf ({0}); take it from another node")]
    NotProtobuf(#[from] prost::DecodeError),
    /// The checksum is right and the contents contradict each other: a bug.
    #[error("cluster state contradicts itself: {0}; take it from another node")]
    Inconsistent(#[from] StateProblem),
}

/// A contradiction in a state. None can come about by [`ClusterState::apply`].
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum StateProblem {
    /// An id is not 16 bytes.
    #[error("an id is not 16 bytes")]
    IdLength,
    /// A state or phase has an unknown number.
    #[error("a state or phase has an unknown number")]
    UnknownNumber,
    /// Two records have one id, or two volumes one name.
    #[error("an id or a name occurs twice")]
    Duplicate,
    /// An id counter would give out an id that is in use, or 0.
    #[error("an id counter is behind the ids in use")]
    CounterBehind,
    /// A pool or replica is on a node that is not there.
    #[error("a pool or a replica is on an unknown node")]
    UnknownNode,
    /// A replica is in a pool that is not there, or on another node than its pool.
    #[error("a replica's pool is not on its node")]
    PoolMismatch,
    /// A volume's list of replicas and the replicas differ.
    #[error("a volume and its replicas disagree")]
    ReplicaMismatch,
    /// A shard's number is over the limit.
    #[error("a shard's number is over the limit")]
    ShardInvalid,
    /// A replica's pool is of another shard than its volume.
    #[error("a replica is on another shard than its volume")]
    ShardMismatch,
    /// Two replicas of one volume are on one node.
    #[error("two replicas of one volume are on one node")]
    SharedNode,
    /// A replica is being removed and its volume is not being deleted, or the reverse.
    #[error("a replica is in a state that its volume's phase rules out")]
    PhaseMismatch,
    /// A volume's leases can't stand beside each other, or have an epoch that was not given out.
    #[error("a volume's leases contradict each other")]
    LeaseMismatch,
}

impl From<UnknownNumber> for StateProblem {
    fn from(_: UnknownNumber) -> Self {
        StateProblem::UnknownNumber
    }
}

impl ClusterState {
    /// The whole state as bytes. Equal states give equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        let record = StateRecord {
            min_reader: self.min_reader(),
            cluster: self.cluster.as_bytes().to_vec(),
            generation: self.generation,
            revision: self.revision,
            next_family: self.next_family,
            next_replica: self.next_replica,
            nodes: self.nodes.values().map(NodeRecord::from).collect(),
            pools: self.pools.values().map(PoolRecord::from).collect(),
            volumes: self.volumes.values().map(VolumeRecord::from).collect(),
            replicas: self.replicas.values().map(ReplicaRecord::from).collect(),
        };
        let body = record.encode_to_vec();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&crc32(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// What is older must not meet what it would drop.
    fn min_reader(&self) -> u32 {
        let marked = self.pools.values().any(|pool| pool.mark != 0);
        let replaced = self.nodes.values().any(|node| node.member.is_some());
        // A volume's pools have its shard: looking at the pools is enough.
        // An older program takes an epoch for one that counts the leases of its volume.
        if self.volumes.values().any(|volume| volume.last_epoch.0 > volume.lease_revision) {
            6
        } else if self.volumes.values().any(|volume| volume.lease_revision != 0) {
            4
        } else if self.pools.values().any(|pool| pool.shard != ShardId(0)) {
            3
        } else if marked || replaced {
            2
        } else {
            1
        }
    }

    /// From what [`ClusterState::encode`] gave.
    ///
    /// # Errors
    /// [`StateError`]: the bytes are damaged, of a newer build, or contradict themselves.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (magic, rest) = bytes.split_first_chunk().ok_or(StateError::NotAState)?;
        if *magic != MAGIC {
            return Err(StateError::NotAState);
        }
        let (crc, body) = rest.split_first_chunk().ok_or(StateError::NotAState)?;
        if u32::from_le_bytes(*crc) != crc32(body) {
            return Err(StateError::Checksum);
        }
        let record = StateRecord::decode(body)?;
        if record.min_reader > READER_VERSION {
            return Err(StateError::TooNew { needs: record.min_reader });
        }
        let state = ClusterState::from_record(record)?;
        state.check()?;
        Ok(state)
    }

    fn from_record(record: StateRecord) -> Result<Self, StateProblem> {
        let mut state = ClusterState::new(ClusterId::from_bytes(id_bytes(&record.cluster)?));
        state.generation = record.generation;
        state.revision = record.revision;
        state.next_family = record.next_family;
        state.next_replica = record.next_replica;
        for node in record.nodes {
            let node = Node::try_from(node)?;
            insert(&mut state.nodes, node.id, node)?;
        }
        for pool in record.pools {
            let pool = Pool::try_from(pool)?;
            insert(&mut state.pools, pool.id, pool)?;
        }
        for replica in record.replicas {
            let replica = Replica::try_from(replica)?;
            insert(&mut state.replicas, replica.id, replica)?;
        }
        for volume in record.volumes {
            let volume = Volume::try_from(volume)?;
            if volume.phase != VolumePhase::Deleting {
                insert(&mut state.names, volume.name.clone(), volume.id)?;
            }
            insert(&mut state.families, volume.family, volume.id)?;
            insert(&mut state.volumes, volume.id, volume)?;
        }
        Ok(state)
    }

    /// Checks what holds after every command.
    ///
    /// # Errors
    /// The first [`StateProblem`] found.
    pub fn check(&self) -> Result<(), StateProblem> {
        let last_family = self.families.keys().next_back().map_or(0, |family| family.0);
        let members = self.nodes.values().filter_map(|node| node.member);
        let replicas = self.replicas.keys().copied().chain(members);
        let last_replica = replicas.max().map_or(0, |replica| replica.0);
        if self.next_family <= last_family
            || self.next_replica <= last_replica.max(FIRST_REPLICA - 1)
        {
            return Err(StateProblem::CounterBehind);
        }
        if self.pools.values().any(|pool| !self.nodes.contains_key(&pool.node)) {
            return Err(StateProblem::UnknownNode);
        }
        if self.pools.values().any(|pool| pool.shard.0 as usize >= NODE_SHARDS_MAX) {
            return Err(StateProblem::ShardInvalid);
        }
        let listed: usize = self.volumes.values().map(|volume| volume.replicas.len()).sum();
        if listed != self.replicas.len() {
            return Err(StateProblem::ReplicaMismatch);
        }
        self.volumes.values().try_for_each(|volume| self.check_volume(volume))
    }

    fn check_volume(&self, volume: &Volume) -> Result<(), StateProblem> {
        let mut nodes = Vec::with_capacity(volume.replicas.len());
        if !are_sound(volume) || volume.last_epoch.0 > self.revision {
            return Err(StateProblem::LeaseMismatch);
        }
        if !volume.replicas.is_sorted_by(|a, b| a < b) {
            return Err(StateProblem::ReplicaMismatch);
        }
        for id in &volume.replicas {
            let replica = self.replicas.get(id).ok_or(StateProblem::ReplicaMismatch)?;
            if replica.family != volume.family {
                return Err(StateProblem::ReplicaMismatch);
            }
            let pool = self.pools.get(&replica.pool).ok_or(StateProblem::PoolMismatch)?;
            if pool.node != replica.node {
                return Err(StateProblem::PoolMismatch);
            }
            if pool.shard != volume.shard {
                return Err(StateProblem::ShardMismatch);
            }
            let removal = matches!(replica.state, ReplicaState::Removing | ReplicaState::Removed);
            if removal != (volume.phase == VolumePhase::Deleting) {
                return Err(StateProblem::PhaseMismatch);
            }
            nodes.push(replica.node);
        }
        nodes.sort();
        if nodes.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(StateProblem::SharedNode);
        }
        Ok(())
    }
}

fn insert<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: V) -> Result<(), StateProblem> {
    match map.insert(key, value) {
        None => Ok(()),
        Some(_) => Err(StateProblem::Duplicate),
    }
}

fn id_bytes(bytes: &[u8]) -> Result<[u8; 16], StateProblem> {
    bytes.try_into().map_err(|_| StateProblem::IdLength)
}

impl From<&Node> for NodeRecord {
    fn from(node: &Node) -> Self {
        let mut record = NodeRecord {
            id: node.id.0,
            name: node.name.clone(),
            peer_address: node.peer_address.clone(),
            labels: node.labels.clone(),
            state: 0,
            member: node.member.map_or(0, |member| member.0),
            replacing: node.replacing,
        };
        record.set_state(node.state.into());
        record
    }
}

impl TryFrom<NodeRecord> for Node {
    type Error = StateProblem;

    fn try_from(record: NodeRecord) -> Result<Self, StateProblem> {
        let state = record.state().try_into()?;
        Ok(Node {
            id: NodeId(record.id),
            name: record.name,
            peer_address: record.peer_address,
            labels: record.labels,
            state,
            member: (record.member != 0).then_some(ReplicaId(record.member)),
            replacing: record.replacing,
        })
    }
}

impl From<&Pool> for PoolRecord {
    fn from(pool: &Pool) -> Self {
        let mut record = PoolRecord {
            id: pool.id.as_bytes().to_vec(),
            node: pool.node.0,
            shard: pool.shard.0,
            boot_counter: pool.boot_counter,
            incarnation: pool.incarnation,
            space: Some(pool.space.into()),
            state: 0,
            mark: pool.mark,
        };
        record.set_state(pool.state.into());
        record
    }
}

impl TryFrom<PoolRecord> for Pool {
    type Error = StateProblem;

    fn try_from(record: PoolRecord) -> Result<Self, StateProblem> {
        Ok(Pool {
            id: PoolId::from_bytes(id_bytes(&record.id)?),
            node: NodeId(record.node),
            shard: ShardId(record.shard),
            boot_counter: record.boot_counter,
            incarnation: record.incarnation,
            mark: record.mark,
            space: record.space.unwrap_or_default().into(),
            state: record.state().try_into()?,
        })
    }
}

impl From<&Volume> for VolumeRecord {
    fn from(volume: &Volume) -> Self {
        let mut record = VolumeRecord {
            id: volume.id.as_bytes().to_vec(),
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            family: volume.family.0,
            shard: volume.shard.0,
            replica_count: volume.replica_count,
            replicas: volume.replicas.iter().map(|replica| replica.0).collect(),
            created_at_ms: volume.created_at_ms,
            phase: 0,
            founded_bytes: if volume.founded_bytes == volume.size_bytes {
                0
            } else {
                volume.founded_bytes
            },
            leases: volume.leases.iter().map(LeaseRecord::from).collect(),
            last_epoch: volume.last_epoch.0,
            lease_revision: volume.lease_revision,
        };
        record.set_phase(volume.phase.into());
        record
    }
}

impl TryFrom<VolumeRecord> for Volume {
    type Error = StateProblem;

    fn try_from(record: VolumeRecord) -> Result<Self, StateProblem> {
        let phase = record.phase().try_into()?;
        Ok(Volume {
            id: VolumeId::from_bytes(id_bytes(&record.id)?),
            name: record.name,
            size_bytes: record.size_bytes,
            founded_bytes: match record.founded_bytes {
                0 => record.size_bytes,
                founded => founded,
            },
            family: FamilyId(record.family),
            shard: ShardId(record.shard),
            replica_count: record.replica_count,
            replicas: record.replicas.into_iter().map(ReplicaId).collect(),
            created_at_ms: record.created_at_ms,
            phase,
            leases: record.leases.into_iter().map(Lease::try_from).collect::<Result<_, _>>()?,
            last_epoch: Epoch(record.last_epoch),
            lease_revision: record.lease_revision,
        })
    }
}

impl From<&Lease> for LeaseRecord {
    fn from(lease: &Lease) -> Self {
        let mut record = LeaseRecord {
            host: lease.host.clone(),
            mode: 0,
            read_only: lease.read_only,
            epoch: lease.epoch.0,
            acquired_at_ms: lease.acquired_at_ms,
            reason: lease.reason.clone(),
        };
        record.set_mode(lease.mode.into());
        record
    }
}

impl TryFrom<LeaseRecord> for Lease {
    type Error = StateProblem;

    fn try_from(record: LeaseRecord) -> Result<Self, StateProblem> {
        let mode = record.mode().try_into()?;
        Ok(Lease {
            host: record.host,
            mode,
            read_only: record.read_only,
            epoch: Epoch(record.epoch),
            acquired_at_ms: record.acquired_at_ms,
            reason: record.reason,
        })
    }
}

impl From<&Replica> for ReplicaRecord {
    fn from(replica: &Replica) -> Self {
        let mut record = ReplicaRecord {
            id: replica.id.0,
            family: replica.family.0,
            node: replica.node.0,
            pool: replica.pool.as_bytes().to_vec(),
            state: 0,
        };
        record.set_state(replica.state.into());
        record
    }
}

impl TryFrom<ReplicaRecord> for Replica {
    type Error = StateProblem;

    fn try_from(record: ReplicaRecord) -> Result<Self, StateProblem> {
        Ok(Replica {
            id: ReplicaId(record.id),
            family: FamilyId(record.family),
            node: NodeId(record.node),
            pool: PoolId::from_bytes(id_bytes(&record.pool)?),
            state: record.state().try_into()?,
        })
    }
}
