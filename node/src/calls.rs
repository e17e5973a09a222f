//! Calls between nodes: a tag byte, then a Raft message (peers/raft_codec.rs) or protobuf.
//!
//! Fields are only ever added; an unknown tag is refused by name.

use ballast_block::{BranchId, Sequence};
use ballast_raft_store::replica::{DiffChange, DiffPage, DiffRecord};
use bytes::{BufMut, Bytes};
use prost::Message;

use crate::peers::connection::PeerError;

/// What a call asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    /// Raft: a vote.
    Vote = 1,
    /// Raft: would you vote.
    PreVote = 2,
    /// Raft: take over leadership.
    Transfer = 3,
    /// Raft: one AppendEntries outside a stream (a heartbeat).
    Append = 4,
    /// Raft: a state is offered; the receiver pulls what differs and installs it.
    Offer = 5,
    /// One page of the difference that an offer named.
    Difference = 6,
    /// The bytes of one block, for a repair.
    Block = 7,
    /// An operation of a host on a volume, for the leader.
    Operate = 8,
    /// Make an attachment the writer of a volume.
    Attach = 9,
    /// End an attachment.
    Detach = 10,
    /// Whether an attachment is alive on this node.
    AttachmentAlive = 11,
    /// A command for the leader of the cluster group.
    Propose = 12,
    /// What this node knows of its pool and groups.
    NodeReport = 13,
    /// Hand the leadership of a family to another replica.
    MoveLeader = 14,
    /// What leaders elsewhere may count on in this node's pool.
    Room = 15,
    /// Sleep with this group, which is idle and in sync.
    Sleep = 16,
    /// The payload of one log entry, for a repair.
    Entry = 17,
    /// Take over the lead of a family: the asker can't reach its leader.
    TakeLead = 18,
    /// Take over the leases and the size of a family's volume that the cluster group knows.
    InstallLeases = 19,
    /// What a family's volume holds, or is to hold: a [`ContentAskV1`].
    Content = 20,
}

impl Tag {
    /// From its byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Tag::*;
        [
            Vote,
            PreVote,
            Transfer,
            Append,
            Offer,
            Difference,
            Block,
            Operate,
            Attach,
            Detach,
            AttachmentAlive,
            Propose,
            NodeReport,
            MoveLeader,
            Room,
            Sleep,
            Entry,
            TakeLead,
            InstallLeases,
            Content,
        ]
        .into_iter()
        .find(|&tag| tag as u8 == byte)
    }

    /// The body of a call.
    pub fn body(self, message: &[u8]) -> Bytes {
        let mut body = Vec::with_capacity(1 + message.len());
        body.put_u8(self as u8);
        body.put_slice(message);
        body.into()
    }

    /// The body of a call with a protobuf message.
    pub fn message(self, message: &impl Message) -> Bytes {
        self.body(&message.encode_to_vec())
    }
}

/// Decodes a protobuf body.
///
/// # Errors
/// [`PeerError::Refused`].
pub fn decode<M: Message + Default>(body: Bytes) -> Result<M, PeerError> {
    M::decode(body)
        .map_err(|error| PeerError::Refused(format!("message can't be decoded: {error}")))
}

/// Offers the sender's state.
#[derive(Clone, PartialEq, Message)]
pub struct OfferV1 {
    /// Names the pinned view for the pages to come.
    #[prost(uint64, tag = "1")]
    pub transfer: u64,
    /// Vote and snapshot description.
    #[prost(bytes = "bytes", tag = "2")]
    pub meta: Bytes,
    /// The machine's state.
    #[prost(bytes = "bytes", tag = "3")]
    pub state: Bytes,
    /// The family's sequence.
    #[prost(uint64, tag = "4")]
    pub sequence: u64,
}

/// Asks for a page of a difference.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct DifferenceV1 {
    /// The offer's name for the view.
    #[prost(uint64, tag = "1")]
    pub transfer: u64,
    /// Changes with a greater sequence are wanted.
    #[prost(uint64, tag = "2")]
    pub since: u64,
    /// From this block on.
    #[prost(uint64, tag = "3")]
    pub from_block: u64,
    /// Only what was trimmed is wanted; an older sender gives everything.
    #[prost(bool, tag = "4")]
    pub holes: bool,
}

/// A page of a difference; the blocks travel as the frame's payload, in order.
#[derive(Clone, PartialEq, Message)]
pub struct DifferencePageV1 {
    /// The changes.
    #[prost(message, repeated, tag = "1")]
    pub records: Vec<ChangeV1>,
    /// Where to go on.
    #[prost(uint64, optional, tag = "2")]
    pub next: Option<u64>,
}

/// A change.
#[derive(Clone, PartialEq, Message)]
pub struct ChangeV1 {
    /// The branch.
    #[prost(uint32, tag = "1")]
    pub branch: u32,
    /// First block.
    #[prost(uint64, tag = "2")]
    pub start: u64,
    /// Number of blocks.
    #[prost(uint64, tag = "3")]
    pub count: u64,
    /// The write that made it.
    #[prost(uint64, tag = "4")]
    pub sequence: u64,
    /// One checksum per block; none = a hole.
    #[prost(fixed32, repeated, tag = "5")]
    pub crcs: Vec<u32>,
}

/// A page as message and payload.
pub fn encode_page(page: DiffPage) -> (DifferencePageV1, Vec<Bytes>) {
    let mut payload = Vec::new();
    let records = page.records.into_iter().map(|record| {
        let crcs = match record.change {
            DiffChange::Hole => Vec::new(),
            DiffChange::Data { crcs, payload: bytes } => {
                payload.push(bytes);
                crcs.to_vec()
            }
        };
        let (branch, sequence) = (record.branch.0, record.sequence.0);
        ChangeV1 { branch, start: record.start, count: record.count, sequence, crcs }
    });
    (DifferencePageV1 { records: records.collect(), next: page.next }, payload)
}

/// The reverse of [`encode_page`].
///
/// # Errors
/// [`PeerError::Refused`] when records and payload don't fit.
pub fn decode_page(page: DifferencePageV1, payload: &[Bytes]) -> Result<DiffPage, PeerError> {
    let mut blocks = payload.first().cloned().unwrap_or_default();
    let mut records = Vec::with_capacity(page.records.len());
    for change in page.records {
        let content = if change.crcs.is_empty() {
            DiffChange::Hole
        } else {
            let bytes = change.crcs.len() * ballast_block::BLOCK_SIZE;
            if bytes > blocks.len() || change.crcs.len() as u64 != change.count {
                return Err(PeerError::Refused("difference without its blocks".into()));
            }
            DiffChange::Data { crcs: change.crcs.into(), payload: blocks.split_to(bytes) }
        };
        records.push(DiffRecord {
            branch: BranchId(change.branch),
            start: change.start,
            count: change.count,
            sequence: Sequence(change.sequence),
            change: content,
        });
    }
    Ok(DiffPage { records, next: page.next })
}

/// Asks for the bytes of one block.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct BlockV1 {
    /// The branch.
    #[prost(uint32, tag = "1")]
    pub branch: u32,
    /// The block.
    #[prost(uint64, tag = "2")]
    pub block: u64,
    /// The write that made it.
    #[prost(uint64, tag = "3")]
    pub sequence: u64,
    /// Its checksum.
    #[prost(fixed32, tag = "4")]
    pub crc: u32,
}

/// An operation of a host; data travels as the frame's payload.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct OperateV1 {
    /// 1 read, 2 write, 3 zero, 4 trim, 5 status.
    #[prost(uint32, tag = "1")]
    pub operation: u32,
    /// First byte, or first block for trim and status.
    #[prost(uint64, tag = "2")]
    pub start: u64,
    /// Bytes, or blocks for trim and status.
    #[prost(uint64, tag = "3")]
    pub length: u64,
    /// The attachment.
    #[prost(uint64, tag = "4")]
    pub attachment: u64,
    /// Its generation.
    #[prost(uint64, tag = "5")]
    pub generation: u64,
    /// The request's number.
    #[prost(uint64, tag = "6")]
    pub request: u64,
    /// Requests below are answered.
    #[prost(uint64, tag = "7")]
    pub answered_below: u64,
    /// The node that serves the attachment.
    #[prost(uint32, tag = "8")]
    pub holder: u32,
    /// The lease that the attachment was made under; 0 = none.
    #[prost(uint64, tag = "9")]
    pub epoch: u64,
}

/// The answer to an operation; data travels as the frame's payload, padded to whole blocks.
#[derive(Clone, PartialEq, Message)]
pub struct OperateReplyV1 {
    /// 0 done, 1 not the leader, 2 stopped here, 16 and up a final error (see `operate.rs`).
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// The node to ask next; 0 = unknown.
    #[prost(uint32, tag = "2")]
    pub hint: u32,
    /// Runs of a read or a status: length, and whether it has data.
    #[prost(message, repeated, tag = "3")]
    pub runs: Vec<RunV1>,
}

/// A run of bytes (read) or blocks (status).
#[derive(Clone, Copy, PartialEq, Message)]
pub struct RunV1 {
    /// Its length.
    #[prost(uint64, tag = "1")]
    pub length: u64,
    /// Whether it holds data.
    #[prost(bool, tag = "2")]
    pub data: bool,
}

/// Asks for the writer's right.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct AttachV1 {
    /// The attachment: random, a retry repeats it.
    #[prost(uint64, tag = "1")]
    pub attachment: u64,
    /// The node that serves it.
    #[prost(uint32, tag = "2")]
    pub node: u32,
    /// Whether the leader should move to that node if it has a replica in sync.
    #[prost(bool, tag = "3")]
    pub follow: bool,
    /// The lease under which it asks; 0 = none.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// It only wants to read: nobody else has to leave, and the log need not know.
    #[prost(bool, tag = "5")]
    pub reads_only: bool,
}

/// The answer to attach and detach.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct AttachReplyV1 {
    /// 0 attached, 1 not the leader, 2 stopped here, 3 held by another, 4 no such lease is in force,
    /// 5 the volume is leased.
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// The node to ask next, or that holds it.
    #[prost(uint32, tag = "2")]
    pub node: u32,
    /// The attachment's generation.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// The volume's size in bytes.
    #[prost(uint64, tag = "4")]
    pub size: u64,
}

/// Asks the leader to take over what the cluster group decided about its volume.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct InstallLeasesV1 {
    /// The revision of the leases that the asker knows: this or a newer one.
    #[prost(uint64, tag = "1")]
    pub revision: u64,
    /// The size in bytes that the asker knows: this or a larger one.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// The lease whose holder waits for the answer; 0 = nobody's.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// The revision of the cluster's state that the leader is to have heard of; 0 = whichever it has.
    #[prost(uint64, tag = "4")]
    pub cluster_revision: u64,
}

/// What a volume is to hold.
#[derive(Clone, PartialEq, Message)]
pub struct ContentAskV1 {
    /// Its kind, as in the family's log; 0 only asks.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    /// The type of its file system, if it is to be one.
    #[prost(string, tag = "2")]
    pub fs_type: String,
    /// The lease under which it is said; 0 = by an administrator.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
}

/// The answer about leases and content.
#[derive(Clone, PartialEq, Message)]
pub struct ContentReplyV1 {
    /// 0 done, 1 not the leader, 2 stopped here.
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// The node to ask next.
    #[prost(uint32, tag = "2")]
    pub node: u32,
    /// What was asked would destroy something: nothing was changed.
    #[prost(bool, tag = "3")]
    pub refused: bool,
    /// What the volume holds: its kind.
    #[prost(uint32, tag = "4")]
    pub content: u32,
    /// The type of its file system, if it is one.
    #[prost(string, tag = "5")]
    pub fs_type: String,
    /// Whether anything was ever written to it.
    #[prost(bool, tag = "6")]
    pub ever_written: bool,
    /// The lease that was named is not in force, or what was said under it is refused because it
    /// only reads.
    #[prost(bool, tag = "7")]
    pub not_leased: bool,
}

/// Names an attachment.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct AttachmentV1 {
    /// The attachment.
    #[prost(uint64, tag = "1")]
    pub attachment: u64,
    /// Its generation (0 where it does not matter).
    #[prost(uint64, tag = "2")]
    pub generation: u64,
}

/// Yes or no.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct FlagV1 {
    /// The answer.
    #[prost(bool, tag = "1")]
    pub flag: bool,
}

/// What a pool has room for.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct RoomV1 {
    /// Something may be written: not full, and some credit.
    #[prost(bool, tag = "1")]
    pub flag: bool,
    /// Bytes that may be appended at once.
    #[prost(uint64, tag = "2")]
    pub credit: u64,
    /// What lives fills the pool.
    #[prost(bool, tag = "3")]
    pub full: bool,
}

impl From<ballast_raft_store::pool::Room> for RoomV1 {
    fn from(room: ballast_raft_store::pool::Room) -> Self {
        let flag = room.credit > 0 && !room.full;
        Self { flag, credit: room.credit, full: room.full }
    }
}

/// A command for the cluster group, or its answer.
#[derive(Clone, PartialEq, Message)]
pub struct ClusterCallV1 {
    /// 0 done, 1 not the leader, 2 stopped here.
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// The node to ask next.
    #[prost(uint32, tag = "2")]
    pub hint: u32,
    /// The command, or the machine's answer.
    #[prost(bytes = "bytes", tag = "3")]
    pub bytes: Bytes,
    /// The log index at which it was applied.
    #[prost(uint64, tag = "4")]
    pub index: u64,
}

/// Asks for a change of leader.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct MoveLeaderV1 {
    /// The node to lead.
    #[prost(uint32, tag = "1")]
    pub node: u32,
}

/// What a node knows of one of its replicas.
#[derive(Clone, PartialEq, Message)]
pub struct ReplicaReportV1 {
    /// The family.
    #[prost(uint64, tag = "1")]
    pub family: u64,
    /// The replica.
    #[prost(uint64, tag = "2")]
    pub replica: u64,
    /// "leader", "follower", "candidate", "learner", "stopped".
    #[prost(string, tag = "3")]
    pub role: String,
    /// Its term.
    #[prost(uint64, tag = "4")]
    pub term: u64,
    /// Last log index.
    #[prost(uint64, tag = "5")]
    pub last_index: u64,
    /// Last applied index.
    #[prost(uint64, tag = "6")]
    pub applied_index: u64,
    /// Retained log in bytes.
    #[prost(uint64, tag = "7")]
    pub retained_bytes: u64,
    /// Whether it is suspect.
    #[prost(bool, tag = "8")]
    pub suspect: bool,
    /// On the leader: (replica, matched index) of every member.
    #[prost(btree_map = "uint64, uint64", tag = "9")]
    pub matched: std::collections::BTreeMap<u64, u64>,
    /// The writer's node, 0 = none.
    #[prost(uint32, tag = "10")]
    pub writer_node: u32,
    /// The volume's size, in bytes, as applied here.
    #[prost(uint64, tag = "11")]
    pub size: u64,
    /// Last purged index.
    #[prost(uint64, tag = "12")]
    pub purged_index: u64,
    /// On the leader: the replicas that votes and majorities count, whoever leads next. While the
    /// members change, those that count before and after; none until the end of that is applied.
    #[prost(uint64, repeated, tag = "13")]
    pub voters: Vec<u64>,
    /// Who may write, as applied here.
    #[prost(message, repeated, tag = "14")]
    pub writers: Vec<WriterV1>,
}

/// An attachment that may write.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct WriterV1 {
    /// The node that serves it.
    #[prost(uint32, tag = "1")]
    pub node: u32,
    /// The lease that it was made under; 0 = none.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
}

/// What a node knows of itself.
#[derive(Clone, PartialEq, Message)]
pub struct NodeReportV1 {
    /// Its replicas.
    #[prost(message, repeated, tag = "1")]
    pub replicas: Vec<ReplicaReportV1>,
    /// Pool size in bytes.
    #[prost(uint64, tag = "2")]
    pub pool_total: u64,
    /// Pool bytes used.
    #[prost(uint64, tag = "3")]
    pub pool_used: u64,
    /// Pool bytes free.
    #[prost(uint64, tag = "4")]
    pub pool_free: u64,
    /// Why the pool stopped; empty = it runs.
    #[prost(string, tag = "5")]
    pub pool_failure: String,
    /// The nodes that this one has a link to.
    #[prost(uint32, repeated, tag = "6")]
    pub links: Vec<u32>,
}

/// The answer to a change of leader.
#[derive(Clone, PartialEq, Message)]
pub struct MovedV1 {
    /// 0 called for, 1 not the leader, 2 stopped here, 3 refused.
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// The node to ask next.
    #[prost(uint32, tag = "2")]
    pub node: u32,
    /// Why it was refused.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Asks a member to sleep.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct SleepV1 {
    /// The leader's term.
    #[prost(uint64, tag = "1")]
    pub term: u64,
    /// The last index that every member has.
    #[prost(uint64, tag = "2")]
    pub last: u64,
}

/// Names a log entry.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct EntryV1 {
    /// Its term.
    #[prost(uint64, tag = "1")]
    pub term: u64,
    /// Its index.
    #[prost(uint64, tag = "2")]
    pub index: u64,
}
