//! The replicated and checkpointed form, as protobuf. Frozen: tags are never re-used, types never
//! changed; fields are only added, and a reader that must not ignore one is kept out by `min_reader`.

use std::collections::BTreeMap;

use prost::{Enumeration, Message, Oneof};

use crate::view;

#[derive(Clone, PartialEq, Message)]
pub struct CommandRecord {
    #[prost(uint32, tag = "1")]
    pub min_reader: u32,
    #[prost(oneof = "CommandKind", tags = "16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28")]
    pub kind: Option<CommandKind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum CommandKind {
    #[prost(message, tag = "16")]
    RegisterNode(RegisterNode),
    #[prost(message, tag = "17")]
    NodeBooted(NodeBooted),
    #[prost(message, tag = "18")]
    ReportPool(ReportPool),
    #[prost(message, tag = "19")]
    CreateVolume(CreateVolume),
    #[prost(message, tag = "20")]
    ReplicaReady(ReplicaReady),
    #[prost(message, tag = "21")]
    FamilyFormed(FamilyFormed),
    #[prost(message, tag = "22")]
    ResizeVolume(ResizeVolume),
    #[prost(message, tag = "23")]
    DeleteVolume(DeleteVolume),
    #[prost(message, tag = "24")]
    ReplicaRemoved(ReplicaRemoved),
    #[prost(message, tag = "25")]
    ReplacePool(ReplacePool),
    #[prost(message, tag = "26")]
    ReplaceReplica(ReplaceReplica),
    #[prost(message, tag = "27")]
    AcquireLease(AcquireLease),
    #[prost(message, tag = "28")]
    ReleaseLease(ReleaseLease),
}

#[derive(Clone, PartialEq, Message)]
pub struct RegisterNode {
    #[prost(uint32, tag = "1")]
    pub node: u32,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub peer_address: String,
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct NodeBooted {
    #[prost(uint32, tag = "1")]
    pub node: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub pool: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub boot_counter: u64,
    #[prost(fixed64, tag = "4")]
    pub incarnation: u64,
    #[prost(message, optional, tag = "5")]
    pub space: Option<SpaceRecord>,
    #[prost(fixed64, tag = "6")]
    pub settled: u64,
    #[prost(uint64, tag = "7")]
    pub settled_boot: u64,
    #[prost(fixed64, tag = "8")]
    pub offered: u64,
    #[prost(uint64, tag = "9")]
    pub member: u64,
    #[prost(uint32, tag = "10")]
    pub shard: u32,
    #[prost(uint64, tag = "11")]
    pub told_boot: u64,
    #[prost(fixed64, tag = "12")]
    pub told_incarnation: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReplaceReplica {
    #[prost(uint64, tag = "1")]
    pub replica: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReplacePool {
    #[prost(uint32, tag = "1")]
    pub node: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub pool: Vec<u8>,
    #[prost(bool, tag = "3")]
    pub guarded: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReportPool {
    #[prost(bytes = "vec", tag = "1")]
    pub pool: Vec<u8>,
    #[prost(message, optional, tag = "2")]
    pub space: Option<SpaceRecord>,
    #[prost(enumeration = "PoolStateNumber", tag = "3")]
    pub state: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct CreateVolume {
    #[prost(bytes = "vec", tag = "1")]
    pub volume: Vec<u8>,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(uint64, tag = "3")]
    pub size_bytes: u64,
    #[prost(uint32, tag = "4")]
    pub replicas: u32,
    #[prost(uint64, tag = "5")]
    pub created_at_ms: u64,
    #[prost(uint32, repeated, tag = "6")]
    pub preferred: Vec<u32>,
    #[prost(uint32, repeated, tag = "7")]
    pub absent: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReplicaReady {
    #[prost(uint64, tag = "1")]
    pub replica: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct FamilyFormed {
    #[prost(uint64, tag = "1")]
    pub family: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct ResizeVolume {
    #[prost(bytes = "vec", tag = "1")]
    pub volume: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct DeleteVolume {
    #[prost(bytes = "vec", tag = "1")]
    pub volume: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReplicaRemoved {
    #[prost(uint64, tag = "1")]
    pub replica: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct AcquireLease {
    #[prost(bytes = "vec", tag = "1")]
    pub volume: Vec<u8>,
    #[prost(string, tag = "2")]
    pub host: String,
    #[prost(enumeration = "LeaseModeNumber", tag = "3")]
    pub mode: i32,
    #[prost(bool, tag = "4")]
    pub read_only: bool,
    #[prost(bool, tag = "5")]
    pub force: bool,
    #[prost(string, tag = "6")]
    pub reason: String,
    #[prost(uint64, tag = "7")]
    pub at_ms: u64,
    #[prost(bool, tag = "8")]
    pub unique_epoch: bool,
    #[prost(uint64, optional, tag = "9")]
    pub seen_revision: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReleaseLease {
    #[prost(bytes = "vec", tag = "1")]
    pub volume: Vec<u8>,
    #[prost(string, tag = "2")]
    pub host: String,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    #[prost(uint64, optional, tag = "4")]
    pub seen_revision: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct StateRecord {
    #[prost(uint32, tag = "1")]
    pub min_reader: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub cluster: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    #[prost(uint64, tag = "4")]
    pub revision: u64,
    #[prost(uint64, tag = "5")]
    pub next_family: u64,
    #[prost(uint64, tag = "6")]
    pub next_replica: u64,
    #[prost(message, repeated, tag = "7")]
    pub nodes: Vec<NodeRecord>,
    #[prost(message, repeated, tag = "8")]
    pub pools: Vec<PoolRecord>,
    #[prost(message, repeated, tag = "9")]
    pub volumes: Vec<VolumeRecord>,
    #[prost(message, repeated, tag = "10")]
    pub replicas: Vec<ReplicaRecord>,
}

#[derive(Clone, PartialEq, Message)]
pub struct NodeRecord {
    #[prost(uint32, tag = "1")]
    pub id: u32,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub peer_address: String,
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
    #[prost(enumeration = "NodeStateNumber", tag = "5")]
    pub state: i32,
    #[prost(uint64, tag = "6")]
    pub member: u64,
    #[prost(bool, tag = "7")]
    pub replacing: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct PoolRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub node: u32,
    #[prost(uint64, tag = "3")]
    pub boot_counter: u64,
    #[prost(fixed64, tag = "4")]
    pub incarnation: u64,
    #[prost(message, optional, tag = "5")]
    pub space: Option<SpaceRecord>,
    #[prost(enumeration = "PoolStateNumber", tag = "6")]
    pub state: i32,
    #[prost(fixed64, tag = "7")]
    pub mark: u64,
    #[prost(uint32, tag = "8")]
    pub shard: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct SpaceRecord {
    #[prost(uint64, tag = "1")]
    pub capacity_bytes: u64,
    #[prost(uint64, tag = "2")]
    pub used_bytes: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct VolumeRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(uint64, tag = "3")]
    pub size_bytes: u64,
    #[prost(uint64, tag = "4")]
    pub family: u64,
    #[prost(uint32, tag = "5")]
    pub replica_count: u32,
    #[prost(uint64, repeated, tag = "6")]
    pub replicas: Vec<u64>,
    #[prost(uint64, tag = "7")]
    pub created_at_ms: u64,
    #[prost(enumeration = "VolumePhaseNumber", tag = "8")]
    pub phase: i32,
    /// Left out where it is `size_bytes`.
    #[prost(uint64, tag = "9")]
    pub founded_bytes: u64,
    #[prost(uint32, tag = "10")]
    pub shard: u32,
    #[prost(message, repeated, tag = "11")]
    pub leases: Vec<LeaseRecord>,
    #[prost(uint64, tag = "12")]
    pub last_epoch: u64,
    #[prost(uint64, tag = "13")]
    pub lease_revision: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct LeaseRecord {
    #[prost(string, tag = "1")]
    pub host: String,
    #[prost(enumeration = "LeaseModeNumber", tag = "2")]
    pub mode: i32,
    #[prost(bool, tag = "3")]
    pub read_only: bool,
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    #[prost(uint64, tag = "5")]
    pub acquired_at_ms: u64,
    #[prost(string, tag = "6")]
    pub reason: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReplicaRecord {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(uint64, tag = "2")]
    pub family: u64,
    #[prost(uint32, tag = "3")]
    pub node: u32,
    #[prost(bytes = "vec", tag = "4")]
    pub pool: Vec<u8>,
    #[prost(enumeration = "ReplicaStateNumber", tag = "5")]
    pub state: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReplyRecord {
    #[prost(oneof = "ReplyKind", tags = "1, 2, 3, 4, 5, 6, 7")]
    pub kind: Option<ReplyKind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum ReplyKind {
    #[prost(message, tag = "1")]
    Done(DoneReply),
    #[prost(message, tag = "2")]
    Volume(VolumeRecord),
    #[prost(message, tag = "3")]
    PoolRolledBack(PoolRolledBackReply),
    #[prost(message, tag = "4")]
    Refused(RefusedReply),
    #[prost(message, tag = "5")]
    Replacing(ReplacingReply),
    #[prost(message, tag = "6")]
    GivenUp(GivenUpReply),
    #[prost(message, tag = "7")]
    PoolOlder(PoolOlderReply),
}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct PoolOlderReply {
    #[prost(uint64, tag = "1")]
    pub boot_counter: u64,
    #[prost(fixed64, tag = "2")]
    pub incarnation: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct ReplacingReply {
    #[prost(uint64, tag = "1")]
    pub member: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct GivenUpReply {}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct DoneReply {}

#[derive(Clone, PartialEq, Message)]
pub struct PoolRolledBackReply {
    #[prost(bytes = "vec", tag = "1")]
    pub pool: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub known: u64,
    #[prost(uint64, tag = "3")]
    pub reported: u64,
    #[prost(uint64, repeated, tag = "4")]
    pub lost: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RefusedReply {
    #[prost(enumeration = "RefusalCodeNumber", tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// A number that no reader of this version knows.
#[derive(Clone, Copy, Debug)]
pub struct UnknownNumber;

macro_rules! numbers {
    ($name:ident for $view:ty { $($variant:ident = $number:literal),* $(,)? }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
        #[repr(i32)]
        pub enum $name {
            Unknown = 0,
            $($variant = $number),*
        }

        impl From<$view> for $name {
            fn from(value: $view) -> Self {
                match value {
                    $(<$view>::$variant => $name::$variant),*
                }
            }
        }

        impl TryFrom<$name> for $view {
            type Error = UnknownNumber;

            fn try_from(number: $name) -> Result<Self, UnknownNumber> {
                match number {
                    $name::Unknown => Err(UnknownNumber),
                    $($name::$variant => Ok(<$view>::$variant)),*
                }
            }
        }
    };
}

numbers!(NodeStateNumber for view::NodeState { Registered = 1, Active = 2 });
numbers!(PoolStateNumber for view::PoolState { Ok = 1, Failed = 2, Lost = 3 });
numbers!(VolumePhaseNumber for view::VolumePhase { Creating = 1, Ready = 2, Deleting = 3 });
numbers!(ReplicaStateNumber for view::ReplicaState {
    Creating = 1, Ready = 2, Lost = 3, Removing = 4, Removed = 5,
});
numbers!(LeaseModeNumber for view::LeaseMode {
    SingleNodeWriter = 1, SingleNodeMultiWriter = 2, SingleNodePublisher = 3, Readers = 4,
    Writers = 5,
});
numbers!(RefusalCodeNumber for crate::error::RefusalCode {
    InvalidArgument = 1, NotFound = 2, AlreadyExists = 3, FailedPrecondition = 4,
    ResourceExhausted = 5, Aborted = 6,
});

impl From<view::PoolSpace> for SpaceRecord {
    fn from(space: view::PoolSpace) -> Self {
        Self { capacity_bytes: space.capacity_bytes, used_bytes: space.used_bytes }
    }
}

impl From<SpaceRecord> for view::PoolSpace {
    fn from(record: SpaceRecord) -> Self {
        Self { capacity_bytes: record.capacity_bytes, used_bytes: record.used_bytes }
    }
}
