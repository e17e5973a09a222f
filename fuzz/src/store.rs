//! Blocks of a pool whose checksum holds, so that a target gets past it.

use ballast_block::BLOCK_SIZE;
use ballast_block::checksum::crc32;

/// One block: the magic, then as much of `bytes` as fits.
pub fn with_magic(bytes: &[u8], magic: &[u8; 4]) -> Vec<u8> {
    let mut block = magic.to_vec();
    block.extend_from_slice(&bytes[..bytes.len().min(BLOCK_SIZE - magic.len())]);
    block.resize(BLOCK_SIZE, 0);
    block
}

/// The block with a right checksum at `field`.
pub fn sealed_block(mut block: Vec<u8>, field: usize) -> Vec<u8> {
    block[field..field + 4].fill(0);
    let crc = crc32(&block);
    block[field..field + 4].copy_from_slice(&crc.to_le_bytes());
    block
}
