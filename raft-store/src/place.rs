//! Where a block lies in a pool.

use std::fmt;

use ballast_block::geometry::BLOCK_SIZE_U64;

/// Bits of a place on disk: 2^40 blocks of 4 KiB are 4 PiB, more than one disk will be.
pub const PLACE_BITS: u32 = 40;

/// A block of the pool's file or disk, counted from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(pub u64);

impl Place {
    /// The block that starts at byte `offset`.
    ///
    /// # Panics
    /// When `offset` is not on a block border: a bug of the caller.
    pub fn from_offset(offset: u64) -> Self {
        assert!(offset.is_multiple_of(BLOCK_SIZE_U64));
        Self(offset / BLOCK_SIZE_U64)
    }

    /// Its first byte in the pool.
    pub fn offset(self) -> u64 {
        self.0 * BLOCK_SIZE_U64
    }

    /// The place `blocks` further on.
    pub fn plus(self, blocks: u64) -> Self {
        Self(self.0 + blocks)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "place-{}", self.0)
    }
}
