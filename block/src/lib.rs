//! The nouns of Ballast: ids, geometry, commands, buffers, checksums, limits.
//!
//! Owns no state, does no I/O, knows no other Ballast crate. Every other crate may use it.

pub mod buffer;
pub mod checksum;
pub mod command;
pub mod geometry;
pub mod ids;
pub mod limits;

pub use buffer::{AlignedBuf, Payload};
pub use command::{IoCommand, IoError, IoReply};
pub use geometry::{BLOCK_SIZE, BlockRange, ByteRange};
pub use ids::{
    AttachmentId, BranchId, ClusterId, Epoch, FamilyId, Generation, NodeId, PoolId, ReplicaId,
    Sequence, ShardId, VolumeId,
};
