//! Identities. Every id is its own type; none is ever used twice.

use std::fmt;

use uuid::Uuid;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl $name {
            /// From 16 random bytes: an RFC 9562 version 4 UUID.
            pub fn from_random(bytes: [u8; 16]) -> Self {
                Self(uuid::Builder::from_random_bytes(bytes).into_uuid())
            }

            /// The 16 bytes as they stand on disk and on the wire.
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// From the 16 bytes as they stand on disk and on the wire.
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_id!(
    /// One Ballast cluster, chosen at bootstrap.
    ClusterId
);
uuid_id!(
    /// One pool: a disk, partition or file that a node gives to Ballast.
    PoolId
);
uuid_id!(
    /// One volume. NVMe NQN and NGUID derive from it.
    VolumeId
);

number_id!(
    /// A storage node, numbered by the administrator from 1.
    NodeId(u32), "node-"
);
number_id!(
    /// A shard of a node: the thread that has one of its pools, numbered from 0 in the order of the
    /// node's pools. Replicas of a volume are all on shards of the same number.
    ShardId(u32), "shard-"
);
number_id!(
    /// A family: a volume, its snapshots and clones; one Raft group. 0 is the cluster group.
    FamilyId(u64), "family-"
);
number_id!(
    /// One node's copy of a family; also its Raft member id. Allocated once, never used twice.
    ReplicaId(u64), "replica-"
);
number_id!(
    /// A family's write counter, part of its replicated state. 48 bits on disk.
    Sequence(u64), "seq-"
);
number_id!(
    /// A line of versions within a family; a volume's head is one. 24 bits on disk.
    BranchId(u32), "branch-"
);
number_id!(
    /// A lease holder's fencing number; only grows.
    Epoch(u64), "epoch-"
);
number_id!(
    /// One initiator's association with a volume.
    AttachmentId(u64), "attachment-"
);
number_id!(
    /// Counts the attachments of a family; an entry under an older one is refused at apply.
    Generation(u64), "generation-"
);

impl FamilyId {
    /// The Raft group of nodes, pools, volumes, leases and policies.
    pub const CLUSTER: FamilyId = FamilyId(0);
}
