//! How a pool's file is divided into superblocks, vote slots and segments.

use std::fmt;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::limits::{
    POOL_REPLICAS_MAX, POOL_SEGMENTS_MIN, POOL_SEGMENTS_WANTED, SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
};

use crate::place::{PLACE_BITS, Place};

/// Where the two superblocks start, in bytes.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 64 << 10];

/// Where the table of vote slots starts, in bytes.
pub const VOTE_SLOTS_OFFSET: u64 = 1 << 20;

/// Where the segments start, in bytes: after the vote slots, aligned to the largest segment.
pub const SEGMENTS_OFFSET: u64 = 32 << 20;

const _: () =
    assert!(VOTE_SLOTS_OFFSET + POOL_REPLICAS_MAX as u64 * BLOCK_SIZE_U64 <= SEGMENTS_OFFSET);
// Counts of blocks within a segment are held in 16 bits on the way.
const _: () = assert!(SEGMENT_BYTES_MAX / BLOCK_SIZE_U64 <= u16::MAX as u64);

/// Number of a segment within its pool, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNumber(pub u32);

impl fmt::Display for SegmentNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "segment-{}", self.0)
    }
}

/// Sizes of a pool; fixed when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolGeometry {
    /// Blocks of one segment, its header block included.
    pub segment_blocks: u32,
    /// Number of segments.
    pub segments: u32,
}

impl PoolGeometry {
    /// Smallest file or device that can become a pool, in bytes.
    pub const BYTES_MIN: u64 = SEGMENTS_OFFSET + POOL_SEGMENTS_MIN * SEGMENT_BYTES_MIN;

    /// The geometry for `bytes` of file or device: segments as large as possible with enough of
    /// them. `None` when it is too small.
    pub fn for_size(bytes: u64) -> Option<Self> {
        let room = bytes.min(BLOCK_SIZE_U64 << PLACE_BITS).checked_sub(SEGMENTS_OFFSET)?;
        let mut segment = SEGMENT_BYTES_MAX;
        while segment > SEGMENT_BYTES_MIN && room / segment < POOL_SEGMENTS_WANTED {
            segment /= 2;
        }
        let segments = room / segment;
        (segments >= POOL_SEGMENTS_MIN).then(|| Self {
            segment_blocks: u32::try_from(segment / BLOCK_SIZE_U64).expect("at most 8192"),
            // 4 PiB of 32 MiB segments are 2^27.
            segments: u32::try_from(segments).expect("bounded by PLACE_BITS"),
        })
    }

    /// Whether the numbers could be a pool's on a file or device of `bytes`.
    pub fn fits(&self, bytes: u64) -> bool {
        let segment = self.segment_bytes();
        self.segment_blocks.is_power_of_two()
            && (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment)
            && u64::from(self.segments) >= POOL_SEGMENTS_MIN
            && segment
                .checked_mul(u64::from(self.segments))
                .and_then(|all| all.checked_add(SEGMENTS_OFFSET))
                .is_some_and(|all| all <= bytes.min(BLOCK_SIZE_U64 << PLACE_BITS))
    }

    /// Length of a segment in bytes.
    pub fn segment_bytes(&self) -> u64 {
        u64::from(self.segment_blocks) * BLOCK_SIZE_U64
    }

    /// Block `block` of a segment; block 0 is its header.
    pub fn place(&self, segment: SegmentNumber, block: u32) -> Place {
        assert!(segment.0 < self.segments && block < self.segment_blocks);
        let first = SEGMENTS_OFFSET / BLOCK_SIZE_U64;
        Place(first + u64::from(segment.0) * u64::from(self.segment_blocks) + u64::from(block))
    }

    /// The segment that a place lies in, and the block within it. `None` outside all segments.
    pub fn locate(&self, place: Place) -> Option<(SegmentNumber, u32)> {
        let block = place.0.checked_sub(SEGMENTS_OFFSET / BLOCK_SIZE_U64)?;
        let segment = u32::try_from(block / u64::from(self.segment_blocks)).ok()?;
        let within = (block % u64::from(self.segment_blocks)) as u32;
        (segment < self.segments).then_some((SegmentNumber(segment), within))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_size_follows_pool_size() {
        assert_eq!(PoolGeometry::for_size(PoolGeometry::BYTES_MIN - 1), None);
        let smallest = PoolGeometry::for_size(PoolGeometry::BYTES_MIN).unwrap();
        assert_eq!((smallest.segment_blocks, smallest.segments), (512, 32));
        let middle = PoolGeometry::for_size(SEGMENTS_OFFSET + (8 << 30)).unwrap();
        assert_eq!((middle.segment_bytes(), middle.segments), (16 << 20, 512));
        let large = PoolGeometry::for_size(4 << 40).unwrap();
        assert_eq!(large.segment_bytes(), 32 << 20);
        for geometry in [smallest, middle, large] {
            assert!(geometry.fits(4 << 40));
            assert!(!geometry.fits(PoolGeometry::BYTES_MIN - 1));
        }
    }

    #[test]
    fn places_and_segments() {
        let geometry = PoolGeometry { segment_blocks: 512, segments: 32 };
        let place = geometry.place(SegmentNumber(31), 511);
        assert_eq!(geometry.locate(place), Some((SegmentNumber(31), 511)));
        assert_eq!(geometry.locate(place.plus(1)), None);
        assert_eq!(geometry.locate(Place(0)), None);
        assert_eq!(geometry.place(SegmentNumber(0), 0).offset(), SEGMENTS_OFFSET);
    }
}
