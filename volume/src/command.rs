//! Control commands of a family's log: protobuf, fields are only ever added (hazard 32).

use ballast_block::{AttachmentId, Epoch, Generation, NodeId};
use bytes::Bytes;
use prost::Message;

/// A control command as it stands in the log.
#[derive(Clone, PartialEq, Message)]
pub struct FamilyCommandV1 {
    /// What is asked; an unknown command halts the replica, it is never skipped.
    #[prost(oneof = "FamilyCommand", tags = "1, 2, 3, 4, 5, 6, 7")]
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
    /// Takes over a revision of the volume's leases.
    #[prost(message, tag = "4")]
    SetLeases(SetLeasesV1),
    /// Says what the volume holds. Of earlier programs: now [`FamilyCommand::SayContent`] does.
    #[prost(message, tag = "5")]
    SetContent(SetContentV1),
    /// Says it under a lease. Of earlier programs, too.
    #[prost(message, tag = "6")]
    SetContentUnder(SetContentUnderV1),
    /// Says it, under a lease or as an administrator (epoch 0), and who says that it is being formatted
    /// is remembered. A command of its own: a replica of an older build, which remembers nobody, must
    /// halt rather than take what others refuse.
    #[prost(message, tag = "7")]
    SayContent(SetContentUnderV1),
}

/// Makes an attachment a writer: under a lease in place of the one that its holder had before, and of
/// all others where the lease is not shared; without a lease in place of the one that the proposer saw.
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
    /// The lease under which it is made; 0 = none.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
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

/// The leases of the family's volume, all of them, as the cluster group knows them.
#[derive(Clone, PartialEq, Message)]
pub struct SetLeasesV1 {
    /// Which state of them: only a newer one than the family has is taken.
    #[prost(uint64, tag = "1")]
    pub revision: u64,
    /// What each allows. Attachments under others end with it.
    #[prost(message, repeated, tag = "2")]
    pub grants: Vec<GrantV1>,
}

/// What one lease allows.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct GrantV1 {
    /// Names the lease.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// Whether its holder may write.
    #[prost(bool, tag = "2")]
    pub writes: bool,
    /// Whether others may write beside it.
    #[prost(bool, tag = "3")]
    pub shared: bool,
}

/// Says what the volume holds.
#[derive(Clone, PartialEq, Message)]
pub struct SetContentV1 {
    /// 1 blank, 2 being formatted, 3 a file system, 4 raw.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    /// The file system's type, for 2 and 3.
    #[prost(string, tag = "2")]
    pub fs_type: String,
}

/// Says what the volume holds, by who may write to it.
#[derive(Clone, PartialEq, Message)]
pub struct SetContentUnderV1 {
    /// What it holds.
    #[prost(message, optional, tag = "1")]
    pub content: Option<SetContentV1>,
    /// The lease: one that is in force and lets its holder write, or nothing is changed. 0, for
    /// [`FamilyCommand::SayContent`] only: an administrator says it.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
}

/// Why an attachment, or what a volume is said to hold, was refused.
pub mod refusal {
    /// Another attachment came between: look again.
    pub const RACED: u32 = 1;
    /// The family knows no lease of that epoch that lets its holder write.
    pub const NOT_LEASED: u32 = 2;
    /// The volume is leased, and the attachment names no lease.
    pub const LEASED: u32 = 3;
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
    /// Why it was refused: one of [`refusal`]; 0 for everything else.
    #[prost(uint32, tag = "6")]
    pub why: u32,
    /// What the volume holds after it: its kind.
    #[prost(uint32, tag = "7")]
    pub content: u32,
    /// The type of its file system, if it is one.
    #[prost(string, tag = "8")]
    pub fs_type: String,
    /// Whether anything was ever written to it.
    #[prost(bool, tag = "9")]
    pub ever_written: bool,
}

impl FamilyCommand {
    /// As bytes of the log.
    pub fn to_log(self) -> Bytes {
        FamilyCommandV1 { command: Some(self) }.encode_to_vec().into()
    }
}

/// A writer of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Its attachment.
    pub attachment: AttachmentId,
    /// The attachment's generation.
    pub generation: Generation,
    /// The node that serves it.
    pub node: NodeId,
    /// The lease that it was made under; 0 = none.
    pub epoch: Epoch,
}
