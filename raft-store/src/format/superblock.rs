//! The superblock: what a pool is, and where its last checkpoint and the streams after it start.
//!
//! There are two copies. Both are rewritten, one after the other, at every open and at every
//! checkpoint, so that one damaged copy loses nothing.

use ballast_block::{BLOCK_SIZE, ClusterId, NodeId, PoolId};
use thiserror::Error;

use super::fields::{BlockProblem, Reader, Writer, check_block, seal_block};
use super::{NO_SEGMENT, PoolGeometry, SegmentNumber};

const MAGIC: u32 = u32::from_le_bytes(*b"BLST");
const CRC_AT: usize = 4;
const LINEAGE_AT: usize = 120;
const POSITIONS_AT: usize = 168;
const SEGMENTS_AT: usize = 512;

/// Version of the layout. Changed only when an older program must not even look at the bits below.
pub const SUPERBLOCK_VERSION: u32 = 1;

/// Incompat feature: the superblock has a [`Lineage`]. A program that does not know it would write
/// the block without, and the pool would look rolled back ever after.
pub const INCOMPAT_LINEAGE: u64 = 1;

/// Features (incompat) that this program knows; a pool with others is refused.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_LINEAGE;

/// Features (ro-compat) that this program knows; a pool with others may only be read.
pub const RO_COMPAT_KNOWN: u64 = 0;

/// Segments that the body of a checkpoint may span.
pub const CHECKPOINT_SEGMENTS_MAX: usize = (BLOCK_SIZE - SEGMENTS_AT) / 4;

/// Feature bits of a pool (hazard 31).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// An older program may ignore these.
    pub compat: u64,
    /// An older program may read, not write.
    pub ro_compat: u64,
    /// An older program must refuse.
    pub incompat: u64,
}

/// A place in a stream between two batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamStart {
    /// The segment; with `generation` 0 the one that the stream will open next.
    pub segment: SegmentNumber,
    /// The block within it at which the next batch starts.
    pub block: u32,
    /// The segment's generation; 0 = not opened yet.
    pub generation: u64,
    /// Number of the segment within the stream.
    pub segment_sequence: u64,
    /// Number of the next batch.
    pub sequence: u64,
    /// The segment that follows it.
    pub next: Option<SegmentNumber>,
}

/// The body of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckpointBody {
    /// Its segments, in order.
    pub segments: Vec<SegmentNumber>,
    /// Its length in bytes.
    pub length: u64,
    /// CRC-32 of all of it.
    pub crc: u32,
}

/// Which past of the pool the cluster has accepted (hazard F5). A pool whose contents went back in
/// time has the marks of that time: the cluster accepted another one since, and no number of starts
/// brings the two together again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// Random; the last mark that this pool knows the cluster has accepted. 0 = none yet.
    pub settled: u64,
    /// The start, by boot counter, that was accepted with it.
    pub settled_boot: u64,
    /// The mark that this start offers, or an earlier one that was not answered. As `settled` when
    /// nothing is open.
    pub offered: u64,
}

/// A superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The cluster that the pool belongs to.
    pub cluster: ClusterId,
    /// The pool.
    pub pool: PoolId,
    /// The node that the pool belongs to.
    pub node: NodeId,
    /// Its division.
    pub geometry: PoolGeometry,
    /// Its features.
    pub features: Features,
    /// Number of this superblock: the higher of two copies is the newer.
    pub generation: u64,
    /// How often the pool was opened.
    pub boot_counter: u64,
    /// Number of the last checkpoint; 0 = none yet.
    pub checkpoint: u64,
    /// Its body; empty when there is none.
    pub body: CheckpointBody,
    /// What the cluster knows the pool by.
    pub lineage: Lineage,
    /// Where each stream stood at the last checkpoint, by stream number - 1. The first is where
    /// recovery starts; the others only count on.
    pub starts: [StreamStart; 3],
}

/// Bytes that are not a superblock that this program can use.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeSuperblockError {
    /// Not one of Ballast.
    #[error("no Ballast superblock")]
    NotASuperblock,
    /// One of Ballast, damaged.
    #[error("superblock is damaged (checksum)")]
    Damaged,
    /// Made by a newer program.
    #[error(
        "superblock has version {0}, this program reads {SUPERBLOCK_VERSION}: upgrade this node"
    )]
    NewerVersion(u32),
    /// The checksum holds, but a field can't be right.
    #[error("superblock field {0} is out of range")]
    FieldOutOfRange(&'static str),
}

impl Superblock {
    /// One block.
    pub fn encode(&self, block: &mut [u8]) {
        assert!(block.len() == BLOCK_SIZE && self.body.segments.len() <= CHECKPOINT_SEGMENTS_MAX);
        block.fill(0);
        let mut out = Writer::new(block, 0);
        out.u32(MAGIC);
        out.u32(0);
        out.u32(SUPERBLOCK_VERSION);
        out.u32(self.node.0);
        out.u64(self.features.compat);
        out.u64(self.features.ro_compat);
        out.u64(self.features.incompat);
        out.bytes(self.cluster.as_bytes());
        out.bytes(self.pool.as_bytes());
        out.u32(self.geometry.segment_blocks);
        out.u32(self.geometry.segments);
        out.u64(self.generation);
        out.u64(self.boot_counter);
        out.u64(self.checkpoint);
        out.u64(self.body.length);
        out.u32(self.body.crc);
        out.u32(self.body.segments.len() as u32);
        let mut out = Writer::new(block, LINEAGE_AT);
        out.u64(self.lineage.settled);
        out.u64(self.lineage.settled_boot);
        out.u64(self.lineage.offered);
        let mut out = Writer::new(block, POSITIONS_AT);
        for start in &self.starts {
            out.u32(start.segment.0);
            out.u32(start.block);
            out.u64(start.generation);
            out.u64(start.segment_sequence);
            out.u64(start.sequence);
            out.u32(start.next.map_or(NO_SEGMENT, |next| next.0));
            out.u32(0);
        }
        let mut out = Writer::new(block, SEGMENTS_AT);
        self.body.segments.iter().for_each(|segment| out.u32(segment.0));
        seal_block(block, CRC_AT);
    }

    /// From one block.
    ///
    /// # Errors
    /// [`DecodeSuperblockError`]. Unknown features are not an error here: the opener decides.
    pub fn decode(block: &[u8]) -> Result<Self, DecodeSuperblockError> {
        check_block(block, MAGIC, CRC_AT).map_err(|problem| match problem {
            BlockProblem::Magic => DecodeSuperblockError::NotASuperblock,
            BlockProblem::Checksum => DecodeSuperblockError::Damaged,
        })?;
        let fields = &mut Reader::new(block, 8);
        let version = fields.u32().expect(IN_BLOCK);
        if version != SUPERBLOCK_VERSION {
            return Err(DecodeSuperblockError::NewerVersion(version));
        }
        let node = NodeId(fields.u32().expect(IN_BLOCK));
        let features = Features {
            compat: fields.u64().expect(IN_BLOCK),
            ro_compat: fields.u64().expect(IN_BLOCK),
            incompat: fields.u64().expect(IN_BLOCK),
        };
        let cluster = ClusterId::from_bytes(fields.array().expect(IN_BLOCK));
        let pool = PoolId::from_bytes(fields.array().expect(IN_BLOCK));
        let geometry = PoolGeometry {
            segment_blocks: fields.u32().expect(IN_BLOCK),
            segments: fields.u32().expect(IN_BLOCK),
        };
        if !geometry.fits(u64::MAX) {
            return Err(DecodeSuperblockError::FieldOutOfRange("geometry"));
        }
        let generation = fields.u64().expect(IN_BLOCK);
        let boot_counter = fields.u64().expect(IN_BLOCK);
        let checkpoint = fields.u64().expect(IN_BLOCK);
        let body = decode_body(fields, block, geometry)?;
        let lineage = &mut Reader::new(block, LINEAGE_AT);
        let lineage = Lineage {
            settled: lineage.u64().expect(IN_BLOCK),
            settled_boot: lineage.u64().expect(IN_BLOCK),
            offered: lineage.u64().expect(IN_BLOCK),
        };
        let starts = decode_starts(block, geometry)?;
        Ok(Self {
            cluster,
            pool,
            node,
            geometry,
            features,
            generation,
            boot_counter,
            checkpoint,
            body,
            lineage,
            starts,
        })
    }
}

const IN_BLOCK: &str = "offset is inside the block";

fn decode_body(
    fields: &mut Reader<'_>,
    block: &[u8],
    geometry: PoolGeometry,
) -> Result<CheckpointBody, DecodeSuperblockError> {
    let length = fields.u64().expect(IN_BLOCK);
    let crc = fields.u32().expect(IN_BLOCK);
    let count = fields.u32().expect(IN_BLOCK) as usize;
    let room = (geometry.segment_bytes() - BLOCK_SIZE as u64) * count as u64;
    if count > CHECKPOINT_SEGMENTS_MAX || length > room {
        return Err(DecodeSuperblockError::FieldOutOfRange("checkpoint length"));
    }
    let mut list = Reader::new(block, SEGMENTS_AT);
    let segments: Vec<_> = (0..count).map(|_| SegmentNumber(list.u32().expect(IN_BLOCK))).collect();
    if segments.iter().any(|segment| segment.0 >= geometry.segments) {
        return Err(DecodeSuperblockError::FieldOutOfRange("checkpoint segment"));
    }
    Ok(CheckpointBody { segments, length, crc })
}

fn decode_starts(
    block: &[u8],
    geometry: PoolGeometry,
) -> Result<[StreamStart; 3], DecodeSuperblockError> {
    let fields = &mut Reader::new(block, POSITIONS_AT);
    let mut starts = [StreamStart::default(); 3];
    for start in &mut starts {
        start.segment = SegmentNumber(fields.u32().expect(IN_BLOCK));
        start.block = fields.u32().expect(IN_BLOCK);
        start.generation = fields.u64().expect(IN_BLOCK);
        start.segment_sequence = fields.u64().expect(IN_BLOCK);
        start.sequence = fields.u64().expect(IN_BLOCK);
        let next = fields.u32().expect(IN_BLOCK);
        start.next = (next != NO_SEGMENT).then_some(SegmentNumber(next));
        fields.skip(4).expect(IN_BLOCK);
        let segments = geometry.segments;
        if start.segment.0 >= segments || start.next.is_some_and(|next| next.0 >= segments) {
            return Err(DecodeSuperblockError::FieldOutOfRange("stream segment"));
        }
        // A full segment's position is one past its last block.
        if start.block == 0 || start.block > geometry.segment_blocks {
            return Err(DecodeSuperblockError::FieldOutOfRange("stream block"));
        }
        if start.sequence == 0 || start.sequence > 1 << 60 || start.segment_sequence > 1 << 60 {
            return Err(DecodeSuperblockError::FieldOutOfRange("stream sequence"));
        }
    }
    Ok(starts)
}
