//! A vote slot: the second place of a replica's vote (hazard F5). Rewritten in place; all that
//! matters lies in the block's first 512 bytes, which no disk tears.

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::limits::{POOL_REPLICAS_MAX, VOTE_SLOT_BODY_BYTES_MAX};
use ballast_block::{BLOCK_SIZE, ReplicaId};
use bytes::Bytes;
use thiserror::Error;

use super::fields::{BlockProblem, Reader, Writer, check_block, seal_block};
use super::geometry::VOTE_SLOTS_OFFSET;

const MAGIC: u32 = u32::from_le_bytes(*b"BVOT");
const CRC_AT: usize = 4;
const BODY_AT: usize = 48;
const VERSION: u16 = 1;
const SECTOR: usize = 512;
const _: () = assert!(BODY_AT + VOTE_SLOT_BODY_BYTES_MAX <= SECTOR);

/// Number of a slot in the pool's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotNumber(pub u16);

impl SlotNumber {
    /// Its first byte in the pool.
    ///
    /// # Panics
    /// When the table has no such slot: a bug of the caller.
    pub fn offset(self) -> u64 {
        assert!(usize::from(self.0) < POOL_REPLICAS_MAX);
        VOTE_SLOTS_OFFSET + u64::from(self.0) * BLOCK_SIZE_U64
    }
}

/// The contents of a vote slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VoteSlot {
    /// First bytes of the pool's id.
    pub pool_tag: u64,
    /// Its own number.
    pub slot: SlotNumber,
    /// Whose vote it is.
    pub replica: ReplicaId,
    /// The replica's operation number of the vote record.
    pub op: u64,
    /// The vote, in the encoding of the log.
    pub body: Bytes,
}

/// What a slot is found to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Never written by this pool.
    Empty,
    /// A vote.
    Vote(VoteSlot),
    /// Something that was a vote and is damaged, or can't be read.
    Damaged,
}

/// A block that claims to be a vote slot and is not a whole one.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeVoteSlotError {
    /// Not written yet.
    #[error("no vote slot")]
    NotASlot,
    /// Checksum or fields are wrong.
    #[error("vote slot is damaged")]
    Damaged,
}

impl VoteSlot {
    /// One block.
    pub fn encode(&self, block: &mut [u8]) {
        assert!(block.len() == BLOCK_SIZE && self.body.len() <= VOTE_SLOT_BODY_BYTES_MAX);
        block.fill(0);
        let mut out = Writer::new(block, 0);
        out.u32(MAGIC);
        out.u32(0);
        out.u16(VERSION);
        out.u16(self.body.len() as u16);
        out.u16(self.slot.0);
        out.u16(0);
        out.u64(self.pool_tag);
        out.u64(self.replica.0);
        out.u64(self.op);
        Writer::new(block, BODY_AT).bytes(&self.body);
        seal_block(block, CRC_AT);
    }

    /// From one block.
    ///
    /// # Errors
    /// [`DecodeVoteSlotError`].
    pub fn decode(block: &[u8]) -> Result<Self, DecodeVoteSlotError> {
        check_block(block, MAGIC, CRC_AT).map_err(|problem| match problem {
            BlockProblem::Magic => DecodeVoteSlotError::NotASlot,
            BlockProblem::Checksum => DecodeVoteSlotError::Damaged,
        })?;
        Self::decode_fields(block).ok_or(DecodeVoteSlotError::Damaged)
    }

    fn decode_fields(block: &[u8]) -> Option<Self> {
        let fields = &mut Reader::new(block, 8);
        if fields.u16()? != VERSION {
            return None;
        }
        let length = usize::from(fields.u16()?);
        let slot = SlotNumber(fields.u16()?);
        fields.skip(2)?;
        let pool_tag = fields.u64()?;
        let replica = ReplicaId(fields.u64()?);
        let op = fields.u64()?;
        if length > VOTE_SLOT_BODY_BYTES_MAX {
            return None;
        }
        let body = Bytes::copy_from_slice(&block[BODY_AT..BODY_AT + length]);
        Some(Self { pool_tag, slot, replica, op, body })
    }
}
