//! Cuts a host's command into the operations that the log knows.
//!
//! An operation touches at most one entry's worth of blocks. Whole blocks of a trim become one
//! range; its parts of blocks become writes of zeroes, merged at the leader.

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::limits::TRANSFER_BYTES_MAX;
use ballast_block::{BlockRange, ByteRange};
use bytes::Bytes;

/// An operation on a volume, small enough for one entry or one answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read bytes.
    Read(ByteRange),
    /// Write bytes; parts of blocks are merged.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// Write that many zero bytes, less than a block at each end.
    Zero(ByteRange),
    /// Unmap whole blocks.
    Trim {
        /// First block.
        start: u64,
        /// Number of blocks.
        count: u64,
    },
    /// Which parts hold data.
    Status(BlockRange),
}

/// Pieces of `range` that each cover at most one transfer of blocks.
pub fn pieces(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let step = TRANSFER_BYTES_MAX as u64;
    let mut at = range.offset;
    std::iter::from_fn(move || {
        if at >= range.end() {
            return None;
        }
        // Cut on block borders, so that only the first and the last piece hold parts of blocks.
        let border = at - at % BLOCK_SIZE_U64 + step;
        let end = border.min(range.end());
        let piece = ByteRange::new(at, end - at);
        at = end;
        Some(piece)
    })
}

/// Whether [`pieces`] leaves `range` whole, as it does with nearly all of what hosts ask.
pub fn is_one_piece(range: ByteRange) -> bool {
    pieces(range).next() == Some(range)
}

/// A trim (or a write of zeroes) of `range`: whole blocks unmapped, the rest zeroed.
pub fn trim(range: ByteRange) -> Vec<Operation> {
    let first = range.offset.div_ceil(BLOCK_SIZE_U64);
    let end = range.end() / BLOCK_SIZE_U64;
    if first >= end {
        return pieces(range).map(Operation::Zero).collect();
    }
    let mut operations = Vec::with_capacity(3);
    let (head_end, tail_start) = (first * BLOCK_SIZE_U64, end * BLOCK_SIZE_U64);
    if range.offset < head_end {
        operations.push(Operation::Zero(ByteRange::new(range.offset, head_end - range.offset)));
    }
    operations.push(Operation::Trim { start: first, count: end - first });
    if tail_start < range.end() {
        operations.push(Operation::Zero(ByteRange::new(tail_start, range.end() - tail_start)));
    }
    operations
}

#[cfg(test)]
mod tests {
    use ballast_block::limits::TRANSFER_BLOCKS_MAX;

    use super::*;

    #[test]
    fn pieces_cover_and_fit() {
        for (offset, length) in [(0, 1), (4095, 2), (1, 3 << 20), (512, 1 << 20), (0, 32 << 20)] {
            let mut at = offset;
            for piece in pieces(ByteRange::new(offset, length)) {
                assert_eq!(piece.offset, at);
                assert!(piece.covering_blocks().count as usize <= TRANSFER_BLOCKS_MAX);
                at = piece.end();
            }
            assert_eq!(at, offset + length);
        }
    }

    #[test]
    fn trims_keep_the_edges() {
        assert_eq!(trim(ByteRange::new(10, 20)), [Operation::Zero(ByteRange::new(10, 20))]);
        let expected = [
            Operation::Zero(ByteRange::new(4000, 96)),
            Operation::Trim { start: 1, count: 2 },
            Operation::Zero(ByteRange::new(12288, 5)),
        ];
        assert_eq!(trim(ByteRange::new(4000, 8293)), expected);
        assert_eq!(trim(ByteRange::new(0, 8192)), [Operation::Trim { start: 0, count: 2 }]);
        let two = trim(ByteRange::new(4095, 2));
        assert_eq!(two, [Operation::Zero(ByteRange::new(4095, 2))]);
    }
}
