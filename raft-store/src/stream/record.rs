//! What is appended to a stream, and what comes back of it.

use std::fmt;

use ballast_block::ReplicaId;
use bytes::Bytes;
use thiserror::Error;

use crate::place::Place;

/// One of the three streams of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum StreamId {
    /// New data and the log's control records. The only stream that is replayed.
    Hot = 1,
    /// What the cleaner moves. Without meaning until a checkpoint refers to it.
    Cold = 2,
    /// Pages of the extent maps. Without meaning until a checkpoint refers to it.
    Meta = 3,
}

impl StreamId {
    /// All streams, in the order of their numbers.
    pub const ALL: [StreamId; 3] = [StreamId::Hot, StreamId::Cold, StreamId::Meta];

    /// The stream with this number on disk.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|stream| *stream as u8 == number)
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StreamId::Hot => "hot stream",
            StreamId::Cold => "cold stream",
            StreamId::Meta => "meta stream",
        })
    }
}

/// What a record is. The number is the one on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum RecordKind {
    /// A log entry: header in the body, payload beside it.
    Entry = 1,
    /// A vote; its second place is the replica's vote slot.
    Vote = 2,
    /// Log entries after an index are void.
    Truncate = 3,
    /// Log entries up to an index are no longer kept.
    Purge = 4,
    /// Hint: the log is known to be committed up to here.
    Committed = 5,
    /// A replica begins; the body is its descriptor.
    CreateReplica = 6,
    /// A replica ends; its id is never used again.
    DropReplica = 7,
    /// A retained log entry, relocated.
    MovedEntry = 8,
    /// Atomic switch to a resynchronised state.
    Install = 9,
    /// Cold stream: a moved payload, described for offline tools.
    Moved = 16,
    /// Meta stream: a page of an extent map.
    Page = 32,
}

impl RecordKind {
    const ALL: [RecordKind; 11] = [
        RecordKind::Entry,
        RecordKind::Vote,
        RecordKind::Truncate,
        RecordKind::Purge,
        RecordKind::Committed,
        RecordKind::CreateReplica,
        RecordKind::DropReplica,
        RecordKind::MovedEntry,
        RecordKind::Install,
        RecordKind::Moved,
        RecordKind::Page,
    ];

    /// The kind with this number on disk.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// A record as its writer gives it: all but the payload.
#[derive(Clone, Copy, Debug)]
pub struct RecordHead<'a> {
    /// What it is.
    pub kind: RecordKind,
    /// Whose it is; 0 for records that belong to no replica (cold and meta streams).
    pub replica: ReplicaId,
    /// The replica's operation number: gapless in the hot stream, from 1. The writer counts.
    pub op: u64,
    /// At most [`ballast_block::limits::RECORD_BODY_BYTES_MAX`] bytes.
    pub body: &'a [u8],
}

/// Number of a batch within its stream, from 1, without gaps. A record is durable when its batch
/// is, and a batch is durable only after every earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamPosition(pub u64);

/// Where an appended record will lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// First payload block; the header block when the record has no payload.
    pub place: Place,
    /// The header block of the record's batch: what a retained entry without payload pins.
    pub header: Place,
    /// The batch that the record is in.
    pub at: StreamPosition,
}

/// Which reserve of free segments an append may dip into. Each class may use what is free beyond
/// the reserves of the classes above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpaceClass {
    /// Votes, epochs, truncations, drops: the last to run dry.
    Control,
    /// Map pages and bodies of a checkpoint, which frees space.
    Checkpoint,
    /// What the cleaner moves, which frees space.
    Cleaner,
    /// Trim and delete, which let space be freed.
    Trim,
    /// Everything that only uses space.
    Normal,
}

/// Why nothing was appended.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AppendError {
    /// No segment is free beyond the reserves above the record's class. Nothing was queued.
    #[error(
        "pool has no free segment left for {class:?} records: trim or delete data, or give the node more space"
    )]
    OutOfSpace {
        /// The class that was asked for.
        class: SpaceClass,
    },
    /// The pool takes no more writes.
    #[error(transparent)]
    PoolFailed(#[from] PoolFailed),
}

/// The pool failed: some write of it returned an error or did not return in time. It is never
/// retried (hazard 22); the pool must be opened again, or replaced.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "pool failed at {operation}: {problem}; nothing unconfirmed was acknowledged; check the disk, then restart the node"
)]
pub struct PoolFailed {
    /// What was being written, and where.
    pub operation: String,
    /// The disk's answer.
    pub problem: String,
}

/// A payload in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredPayload {
    /// Its first block.
    pub place: Place,
    /// Its length in blocks, at least 1.
    pub blocks: u32,
    /// CRC-32 over the list of its blocks' CRC-32s (little-endian).
    pub digest: u32,
}

/// What recovery knows of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadState {
    /// There is none.
    None,
    /// Read, and its checksum holds.
    Good,
    /// Damaged, and a later write proves that it was durable once: the record stands, the payload
    /// is to be fetched from a peer (row R2 of the decision table).
    Damaged,
}

/// A record read back from a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed {
    /// What it is.
    pub kind: RecordKind,
    /// Whose it is.
    pub replica: ReplicaId,
    /// The replica's operation number.
    pub op: u64,
    /// The body as it was appended.
    pub body: Bytes,
    /// Where the payload lies, if there is one.
    pub payload: Option<StoredPayload>,
    /// Whether the payload is whole.
    pub payload_state: PayloadState,
    /// The header block of its batch.
    pub header: Place,
    /// Its batch.
    pub at: StreamPosition,
}
