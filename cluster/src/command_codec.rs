//! Commands to and from their replicated form, which `wire` has. Decides nothing.

use ballast_block::{Epoch, FamilyId, NodeId, PoolId, ReplicaId, ShardId, VolumeId};

use crate::command::{
    AcquireLease, Command, CommandError, CreateVolume, NodeBooted, PoolStart, RegisterNode,
};
use crate::view::{LeaseMode, PoolState};
use crate::wire::{self, CommandKind};

impl From<&Command> for CommandKind {
    fn from(command: &Command) -> Self {
        match command.clone() {
            Command::RegisterNode(it) => CommandKind::RegisterNode(it.into()),
            Command::NodeBooted(it) => CommandKind::NodeBooted(it.into()),
            Command::ReplacePool { node, pool, guarded } => {
                let (node, pool) = (node.0, pool.as_bytes().to_vec());
                CommandKind::ReplacePool(wire::ReplacePool { node, pool, guarded })
            }
            Command::ReplaceReplica { replica } => {
                CommandKind::ReplaceReplica(wire::ReplaceReplica { replica: replica.0 })
            }
            Command::ReportPool { pool, space, state } => {
                CommandKind::ReportPool(wire::ReportPool {
                    pool: pool.as_bytes().to_vec(),
                    space: Some(space.into()),
                    state: wire::PoolStateNumber::from(state).into(),
                })
            }
            Command::CreateVolume(it) => CommandKind::CreateVolume(it.into()),
            Command::ReplicaReady { replica } => {
                CommandKind::ReplicaReady(wire::ReplicaReady { replica: replica.0 })
            }
            Command::FamilyFormed { family } => {
                CommandKind::FamilyFormed(wire::FamilyFormed { family: family.0 })
            }
            Command::ResizeVolume { volume, size_bytes } => {
                let volume = volume.as_bytes().to_vec();
                CommandKind::ResizeVolume(wire::ResizeVolume { volume, size_bytes })
            }
            Command::DeleteVolume { volume } => {
                CommandKind::DeleteVolume(wire::DeleteVolume { volume: volume.as_bytes().to_vec() })
            }
            Command::ReplicaRemoved { replica } => {
                CommandKind::ReplicaRemoved(wire::ReplicaRemoved { replica: replica.0 })
            }
            Command::AcquireLease(it) => CommandKind::AcquireLease(it.into()),
            Command::ReleaseLease { volume, host, epoch, seen_revision } => {
                let (volume, epoch) = (volume.as_bytes().to_vec(), epoch.0);
                let released = wire::ReleaseLease { volume, host, epoch, seen_revision };
                CommandKind::ReleaseLease(released)
            }
        }
    }
}

impl TryFrom<CommandKind> for Command {
    type Error = CommandError;

    fn try_from(kind: CommandKind) -> Result<Self, CommandError> {
        Ok(match kind {
            CommandKind::RegisterNode(it) => Command::RegisterNode(it.into()),
            CommandKind::NodeBooted(it) => Command::NodeBooted(it.try_into()?),
            CommandKind::ReplacePool(it) => Command::ReplacePool {
                node: NodeId(it.node),
                pool: PoolId::from_bytes(id_bytes(&it.pool)?),
                guarded: it.guarded,
            },
            CommandKind::ReplaceReplica(it) => {
                Command::ReplaceReplica { replica: ReplicaId(it.replica) }
            }
            CommandKind::ReportPool(it) => Command::ReportPool {
                pool: PoolId::from_bytes(id_bytes(&it.pool)?),
                space: it.space.unwrap_or_default().into(),
                state: PoolState::try_from(it.state())
                    .map_err(|_| CommandError::Malformed("its pool state is unknown"))?,
            },
            CommandKind::CreateVolume(it) => Command::CreateVolume(it.try_into()?),
            CommandKind::ReplicaReady(it) => {
                Command::ReplicaReady { replica: ReplicaId(it.replica) }
            }
            CommandKind::FamilyFormed(it) => Command::FamilyFormed { family: FamilyId(it.family) },
            CommandKind::ResizeVolume(it) => Command::ResizeVolume {
                volume: VolumeId::from_bytes(id_bytes(&it.volume)?),
                size_bytes: it.size_bytes,
            },
            CommandKind::DeleteVolume(it) => {
                Command::DeleteVolume { volume: VolumeId::from_bytes(id_bytes(&it.volume)?) }
            }
            CommandKind::ReplicaRemoved(it) => {
                Command::ReplicaRemoved { replica: ReplicaId(it.replica) }
            }
            CommandKind::AcquireLease(it) => Command::AcquireLease(it.try_into()?),
            CommandKind::ReleaseLease(it) => Command::ReleaseLease {
                volume: VolumeId::from_bytes(id_bytes(&it.volume)?),
                host: it.host,
                epoch: Epoch(it.epoch),
                seen_revision: it.seen_revision,
            },
        })
    }
}

impl From<RegisterNode> for wire::RegisterNode {
    fn from(it: RegisterNode) -> Self {
        let RegisterNode { node, name, peer_address, labels } = it;
        Self { node: node.0, name, peer_address, labels }
    }
}

impl From<wire::RegisterNode> for RegisterNode {
    fn from(it: wire::RegisterNode) -> Self {
        let wire::RegisterNode { node, name, peer_address, labels } = it;
        Self { node: NodeId(node), name, peer_address, labels }
    }
}

impl From<NodeBooted> for wire::NodeBooted {
    fn from(it: NodeBooted) -> Self {
        Self {
            node: it.node.0,
            pool: it.pool.as_bytes().to_vec(),
            shard: it.shard.0,
            boot_counter: it.boot_counter,
            incarnation: it.incarnation,
            space: Some(it.space.into()),
            settled: it.settled,
            settled_boot: it.settled_boot,
            offered: it.offered,
            member: it.member.map_or(0, |member| member.0),
            told_boot: it.told.map_or(0, |told| told.boot_counter),
            told_incarnation: it.told.map_or(0, |told| told.incarnation),
        }
    }
}

impl TryFrom<wire::NodeBooted> for NodeBooted {
    type Error = CommandError;

    fn try_from(it: wire::NodeBooted) -> Result<Self, CommandError> {
        Ok(Self {
            node: NodeId(it.node),
            pool: PoolId::from_bytes(id_bytes(&it.pool)?),
            shard: ShardId(it.shard),
            boot_counter: it.boot_counter,
            incarnation: it.incarnation,
            space: it.space.unwrap_or_default().into(),
            settled: it.settled,
            settled_boot: it.settled_boot,
            offered: it.offered,
            member: (it.member != 0).then_some(ReplicaId(it.member)),
            told: (it.told_boot != 0).then_some(PoolStart {
                boot_counter: it.told_boot,
                incarnation: it.told_incarnation,
            }),
        })
    }
}

impl From<CreateVolume> for wire::CreateVolume {
    fn from(it: CreateVolume) -> Self {
        Self {
            volume: it.volume.as_bytes().to_vec(),
            name: it.name,
            size_bytes: it.size_bytes,
            replicas: it.replicas,
            created_at_ms: it.created_at_ms,
            preferred: it.preferred.into_iter().map(|node| node.0).collect(),
            absent: it.absent.into_iter().map(|node| node.0).collect(),
        }
    }
}

impl TryFrom<wire::CreateVolume> for CreateVolume {
    type Error = CommandError;

    fn try_from(it: wire::CreateVolume) -> Result<Self, CommandError> {
        Ok(Self {
            volume: VolumeId::from_bytes(id_bytes(&it.volume)?),
            name: it.name,
            size_bytes: it.size_bytes,
            replicas: it.replicas,
            created_at_ms: it.created_at_ms,
            preferred: it.preferred.into_iter().map(NodeId).collect(),
            absent: it.absent.into_iter().map(NodeId).collect(),
        })
    }
}

impl From<AcquireLease> for wire::AcquireLease {
    fn from(it: AcquireLease) -> Self {
        Self {
            volume: it.volume.as_bytes().to_vec(),
            host: it.host,
            mode: wire::LeaseModeNumber::from(it.mode).into(),
            read_only: it.read_only,
            force: it.force,
            reason: it.reason,
            at_ms: it.at_ms,
            unique_epoch: it.unique_epoch,
            seen_revision: it.seen_revision,
        }
    }
}

impl TryFrom<wire::AcquireLease> for AcquireLease {
    type Error = CommandError;

    fn try_from(it: wire::AcquireLease) -> Result<Self, CommandError> {
        let mode = LeaseMode::try_from(it.mode());
        Ok(Self {
            volume: VolumeId::from_bytes(id_bytes(&it.volume)?),
            mode: mode.map_err(|_| CommandError::Malformed("its lease mode is unknown"))?,
            host: it.host,
            read_only: it.read_only,
            force: it.force,
            reason: it.reason,
            at_ms: it.at_ms,
            unique_epoch: it.unique_epoch,
            seen_revision: it.seen_revision,
        })
    }
}

fn id_bytes(bytes: &[u8]) -> Result<[u8; 16], CommandError> {
    bytes.try_into().map_err(|_| CommandError::Malformed("an id is not 16 bytes"))
}
