//! Little-endian fields of one block, and the checksum that covers it.

use ballast_block::BLOCK_SIZE;
use ballast_block::checksum::crc32;

/// Writes fields one after the other from the start of a block.
pub(crate) struct Writer<'a> {
    block: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    /// From byte `at` of `block`.
    pub(crate) fn new(block: &'a mut [u8], at: usize) -> Self {
        Self { block, at }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.block[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// Where the next field goes.
    pub(crate) fn at(&self) -> usize {
        self.at
    }
}

/// Reads fields one after the other; `None` past the end.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// From byte `at` of `bytes`.
    pub(crate) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let found = *self.bytes.get(self.at..)?.first_chunk()?;
        self.at += N;
        Some(found)
    }

    pub(crate) fn skip(&mut self, bytes: usize) -> Option<()> {
        self.at = self.at.checked_add(bytes).filter(|&at| at <= self.bytes.len())?;
        Some(())
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Where the next field starts.
    pub(crate) fn at(&self) -> usize {
        self.at
    }
}

/// The checksum of a block whose own checksum field, 4 bytes at `field`, counts as zero.
pub(crate) fn block_crc(block: &[u8], field: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&block[..field]);
    hasher.update(&[0; 4]);
    hasher.update(&block[field + 4..]);
    hasher.finalize()
}

/// Fills in the checksum field at `field`.
pub(crate) fn seal_block(block: &mut [u8], field: usize) -> u32 {
    let crc = block_crc(block, field);
    Writer::new(block, field).u32(crc);
    crc
}

/// Whether `block` is one whole block that starts with `magic` and whose checksum holds.
pub(crate) fn check_block(block: &[u8], magic: u32, field: usize) -> Result<u32, BlockProblem> {
    if block.len() != BLOCK_SIZE || block[..4] != magic.to_le_bytes() {
        return Err(BlockProblem::Magic);
    }
    let stored = Reader::new(block, field).u32().expect("inside the block");
    if block_crc(block, field) == stored { Ok(stored) } else { Err(BlockProblem::Checksum) }
}

/// Why a block is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockProblem {
    /// It does not even claim to be one.
    Magic,
    /// It claims, and is damaged.
    Checksum,
}

/// CRC-32 over a list of CRC-32s: the checksum of a payload by those of its blocks.
pub(crate) fn digest_of(crcs: impl IntoIterator<Item = u32>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    crcs.into_iter().for_each(|crc| hasher.update(&crc.to_le_bytes()));
    hasher.finalize()
}

/// The checksum of one block.
pub(crate) fn crc_of_block(block: &[u8]) -> u32 {
    crc32(block)
}
