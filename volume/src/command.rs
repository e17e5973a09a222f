//! Control commands of a family's log: protobuf, fields are only ever added (hazard 32).

use ballast_block::{AttachmentId, Generation, NodeId};
use bytes::Bytes;
use prost::Message;

/// A control command as it stands in the log.
#[derive(Clone, PartialEq, Message)]
pub struct FamilyCommandV1 {
    /// What is asked; an unknown command halts the replica, it is never skipped.
    #[prost(oneof = "FamilyCommand", tags = "1, 2, 3")]
    pub command: Option<FamilyCommand>,
}

/// What a control command asks.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum FamilyCommand {
    /// Makes an attachment the volume's writer.
    #[prost(message, tag = "1")]
    Attach(AttachV1),
    /// Ends an attachment.
    #[prost(message, tag = "2")]
    Detach(DetachV1),
    /// Grows the volume.
    #[prost(message, tag = "3")]
    Resize(ResizeV1),
}

/// Makes an attachment the writer, in place of the one that the proposer saw.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct AttachV1 {
    /// The new attachment: random, so that a retry is recognised.
    #[prost(uint64, tag = "1")]
    pub attachment: u64,
    /// The node that serves it.
    #[prost(uint32, tag = "2")]
    pub node: u32,
    /// The generation that the proposer saw: apply refuses if there is a newer one by now.
    #[prost(uint64, tag = "3")]
    pub seen_generation: u64,
}

/// Ends an attachment.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct DetachV1 {
    /// The attachment.
    #[prost(uint64, tag = "1")]
    pub attachment: u64,
    /// Its generation.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
}

/// Grows the volume.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct ResizeV1 {
    /// The new size in bytes: never smaller than before.
    #[prost(uint64, tag = "1")]
    pub size: u64,
}

/// What apply answered to a control command.
#[derive(Clone, PartialEq, Message)]
pub struct FamilyReplyV1 {
    /// Whether it was refused.
    #[prost(bool, tag = "1")]
    pub refused: bool,
    /// The writer's attachment after it; 0 = none.
    #[prost(uint64, tag = "2")]
    pub attachment: u64,
    /// The writer's generation after it.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// The node of the writer.
    #[prost(uint32, tag = "4")]
    pub node: u32,
    /// The volume's size in bytes after it.
    #[prost(uint64, tag = "5")]
    pub size: u64,
}

impl FamilyCommand {
    /// As bytes of the log.
    pub fn to_log(self) -> Bytes {
        FamilyCommandV1 { command: Some(self) }.encode_to_vec().into()
    }
}

/// The volume's writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Its attachment.
    pub attachment: AttachmentId,
    /// The attachment's generation.
    pub generation: Generation,
    /// The node that serves it.
    pub node: NodeId,
}
