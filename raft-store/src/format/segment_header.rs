//! The first block of a segment: whose it is, and how it hangs on the segment before it.

use ballast_block::limits::BATCH_REPLICAS_MAX;
use ballast_block::{BLOCK_SIZE, PoolId, ReplicaId};
use thiserror::Error;

use super::fields::{Reader, Writer, check_block, seal_block};
use super::{NO_SEGMENT, SegmentNumber, pool_tag};
use crate::stream::StreamId;

const MAGIC: u32 = u32::from_le_bytes(*b"BSEG");
const CRC_AT: usize = 92;
const LIST_AT: usize = 96;
const VERSION: u16 = 1;
const CHECKPOINT_NUMBER: u8 = 4;

/// What a segment is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SegmentUse {
    /// Batches of a stream.
    Stream(StreamId),
    /// A part of the body of a checkpoint.
    Checkpoint,
}

impl SegmentUse {
    /// Its number on disk.
    pub fn number(self) -> u8 {
        match self {
            SegmentUse::Stream(stream) => stream as u8,
            SegmentUse::Checkpoint => CHECKPOINT_NUMBER,
        }
    }

    /// The use with this number on disk.
    pub fn from_number(number: u8) -> Option<Self> {
        if number == CHECKPOINT_NUMBER {
            return Some(SegmentUse::Checkpoint);
        }
        StreamId::from_number(number).map(SegmentUse::Stream)
    }
}

/// A segment's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The pool.
    pub pool: PoolId,
    /// What the segment is used for.
    pub used_for: SegmentUse,
    /// Its own number.
    pub segment: SegmentNumber,
    /// The segment reserved to follow it, if any.
    pub next: Option<SegmentNumber>,
    /// Differs at each use of any segment: boot counter and a count within the boot.
    pub generation: u64,
    /// Number of the segment within the stream, or within the checkpoint body.
    pub segment_sequence: u64,
    /// Number of its first batch; of a checkpoint: the checkpoint's number. All batches with lower
    /// numbers were durable, or had been given up, when this block was written.
    pub first_sequence: u64,
    /// Blocks of a segment.
    pub segment_blocks: u32,
    /// Last operation of each replica in the batch before the first one.
    pub previous: Vec<(ReplicaId, u64)>,
}

/// A block that is not a usable segment header.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("not a segment header of a version that this program reads")]
pub struct NotASegmentHeader;

impl SegmentHeader {
    /// One block.
    pub fn encode(&self, block: &mut [u8]) {
        assert!(block.len() == BLOCK_SIZE && self.previous.len() <= BATCH_REPLICAS_MAX);
        block.fill(0);
        let mut out = Writer::new(block, 0);
        out.u32(MAGIC);
        out.u16(VERSION);
        out.u8(self.used_for.number());
        out.u8(0);
        out.u64(pool_tag(self.pool));
        out.bytes(self.pool.as_bytes());
        out.u32(self.segment.0);
        out.u32(self.next.map_or(NO_SEGMENT, |next| next.0));
        out.u64(self.generation);
        out.u64(self.segment_sequence);
        out.u64(self.first_sequence);
        out.u32(self.segment_blocks);
        out.u32(self.previous.len() as u32);
        let mut out = Writer::new(block, LIST_AT);
        for (replica, op) in &self.previous {
            out.u64(replica.0);
            out.u64(*op);
        }
        seal_block(block, CRC_AT);
    }

    /// From one block.
    ///
    /// # Errors
    /// [`NotASegmentHeader`] for anything else, damaged ones too.
    pub fn decode(block: &[u8]) -> Result<Self, NotASegmentHeader> {
        check_block(block, MAGIC, CRC_AT).map_err(|_| NotASegmentHeader)?;
        Self::decode_fields(block).ok_or(NotASegmentHeader)
    }

    fn decode_fields(block: &[u8]) -> Option<Self> {
        let fields = &mut Reader::new(block, 4);
        if fields.u16()? != VERSION {
            return None;
        }
        let used_for = SegmentUse::from_number(fields.u8()?)?;
        fields.skip(1 + 8)?;
        let pool = PoolId::from_bytes(fields.array()?);
        let segment = SegmentNumber(fields.u32()?);
        let next = fields.u32()?;
        let next = (next != NO_SEGMENT).then_some(SegmentNumber(next));
        let generation = fields.u64()?;
        let segment_sequence = fields.u64()?;
        let first_sequence = fields.u64()?;
        let segment_blocks = fields.u32()?;
        let count = fields.u32()? as usize;
        if count > BATCH_REPLICAS_MAX {
            return None;
        }
        let mut list = Reader::new(block, LIST_AT);
        let previous = (0..count)
            .map(|_| Some((ReplicaId(list.u64()?), list.u64()?)))
            .collect::<Option<_>>()?;
        Some(Self {
            pool,
            used_for,
            segment,
            next,
            generation,
            segment_sequence,
            first_sequence,
            segment_blocks,
            previous,
        })
    }
}
