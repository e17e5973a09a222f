//! What lies on a pool's disk, block by block: superblocks, segment headers, batch headers, vote
//! slots (docs/disk-format.md).
//!
//! Owns the encodings, each with its golden file. Never does I/O, but for [`create`], which makes
//! a pool. Write path: step 5 (append) encodes a [`batch`] header.

pub mod batch;
pub mod create;
pub(crate) mod fields;
pub mod geometry;
pub mod segment_header;
pub mod superblock;
pub mod vote_slot;

pub use geometry::{PoolGeometry, SegmentNumber};

/// Number of a segment that stands for "none" on disk.
pub(crate) const NO_SEGMENT: u32 = u32::MAX;

/// What a pool's blocks carry of its id: its first 8 bytes. Tells apart blocks of a pool that used
/// the disk before.
pub fn pool_tag(pool: ballast_block::PoolId) -> u64 {
    let bytes = pool.as_bytes().first_chunk().expect("a UUID has 16 bytes");
    u64::from_le_bytes(*bytes)
}
