//! Blocks, ranges, and checked conversions between bytes and blocks.

use std::fmt;

use thiserror::Error;

/// The unit of the extent map and of every checksum: 4 KiB, in bytes.
pub const BLOCK_SIZE: usize = 4096;

/// `BLOCK_SIZE` as a 64-bit number, for offsets.
pub const BLOCK_SIZE_U64: u64 = BLOCK_SIZE as u64;

/// A range of whole blocks of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    /// First block, counted from the start of the volume.
    pub start: u64,
    /// Number of blocks; may be 0.
    pub count: u32,
}

impl BlockRange {
    /// `count` blocks from `start`.
    pub fn new(start: u64, count: u32) -> Self {
        Self { start, count }
    }

    /// One past the last block.
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.count)
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.count) * BLOCK_SIZE_U64
    }

    /// Whether the two share a block.
    pub fn overlaps(&self, other: &BlockRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks {}+{}", self.start, self.count)
    }
}

/// A range of bytes of a volume, as hosts name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Length in bytes; may be 0.
    pub length: u64,
}

/// A byte range that does not fit the volume.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("range of {length} bytes at {offset} is outside the volume of {size} bytes")]
pub struct RangeOutsideVolume {
    /// First byte asked for.
    pub offset: u64,
    /// Bytes asked for.
    pub length: u64,
    /// Size of the volume in bytes.
    pub size: u64,
}

impl ByteRange {
    /// `length` bytes from `offset`.
    pub fn new(offset: u64, length: u64) -> Self {
        Self { offset, length }
    }

    /// One past the last byte; saturates, so that a hostile range can't wrap.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Whether both ends lie on block borders.
    pub fn is_block_aligned(&self) -> bool {
        self.offset.is_multiple_of(BLOCK_SIZE_U64) && self.length.is_multiple_of(BLOCK_SIZE_U64)
    }

    /// The smallest block range that covers it.
    ///
    /// The caller has checked the length against [`crate::limits::TRANSFER_BYTES_MAX`] or the
    /// volume's size in blocks: both fit `u32` by the assertion in `limits`.
    pub fn covering_blocks(&self) -> BlockRange {
        if self.length == 0 {
            return BlockRange::new(self.offset / BLOCK_SIZE_U64, 0);
        }
        let first = self.offset / BLOCK_SIZE_U64;
        let last = (self.end() - 1) / BLOCK_SIZE_U64;
        let count = u32::try_from(last - first + 1).expect("range length was checked");
        BlockRange::new(first, count)
    }

    /// The whole blocks inside it (may be none).
    pub fn inner_blocks(&self) -> BlockRange {
        let first = self.offset.div_ceil(BLOCK_SIZE_U64);
        let end = self.end() / BLOCK_SIZE_U64;
        let count = u32::try_from(end.saturating_sub(first)).expect("range length was checked");
        BlockRange::new(first, count)
    }

    /// Checks that the range lies in a volume of `size` bytes.
    ///
    /// # Errors
    /// [`RangeOutsideVolume`] when it does not, also when offset plus length overflows.
    pub fn check_inside(&self, size: u64) -> Result<(), RangeOutsideVolume> {
        match self.offset.checked_add(self.length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(RangeOutsideVolume { offset: self.offset, length: self.length, size }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_and_inner_blocks() {
        let range = ByteRange::new(4095, 4098);
        assert_eq!(range.covering_blocks(), BlockRange::new(0, 3));
        assert_eq!(range.inner_blocks(), BlockRange::new(1, 1));
        assert_eq!(ByteRange::new(1, 100).inner_blocks().count, 0);
        assert_eq!(ByteRange::new(8192, 0).covering_blocks().count, 0);
    }

    #[test]
    fn hostile_range_does_not_wrap() {
        assert!(ByteRange::new(u64::MAX, 2).check_inside(1 << 40).is_err());
        assert!(ByteRange::new(0, 1 << 40).check_inside(1 << 40).is_ok());
        assert!(ByteRange::new(1, 1 << 40).check_inside(1 << 40).is_err());
    }
}
