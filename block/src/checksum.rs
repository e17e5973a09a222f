//! The checksum of everything on disk and between peers: CRC-32 (IEEE), one per block.

use crate::geometry::BLOCK_SIZE;

/// CRC-32 of `bytes`.
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// One CRC-32 per block of `payload`, in order.
///
/// # Panics
/// When `payload` is not whole blocks: a bug of the caller.
pub fn block_crcs(payload: &[u8]) -> impl Iterator<Item = u32> + '_ {
    assert!(payload.len().is_multiple_of(BLOCK_SIZE));
    payload.chunks_exact(BLOCK_SIZE).map(crc32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_vector() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(block_crcs(&[0; 8192]).collect::<Vec<_>>(), [0xc71c_0011, 0xc71c_0011]);
    }
}
