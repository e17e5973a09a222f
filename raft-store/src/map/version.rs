//! One version of one block, and the packed integers of the formats.

/// The place that means: unmapped here, reads as zeroes.
pub(super) const TOMBSTONE: u64 = (1 << 40) - 1;

/// Sequences are 48 bits on disk.
pub(super) const SEQUENCE_MAX: u64 = (1 << 48) - 1;

/// Blocks of a range: the unit of pages and of the directory.
pub(super) const RANGE_BLOCKS: u64 = 256;

/// A version of a block within one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub sequence: u64,
    pub place: u64,
    pub branch: u32,
    pub crc: u32,
    /// Block within the range.
    pub block: u8,
}

impl Version {
    pub fn is_tombstone(&self) -> bool {
        self.place == TOMBSTONE
    }

    /// The order of history: by block, branch, oldest first.
    pub fn key(&self) -> (u8, u32, u64) {
        (self.block, self.branch, self.sequence)
    }
}

/// The low `N` bytes of `value`, little endian.
pub(super) fn put<const N: usize>(value: u64) -> [u8; N] {
    let bytes = value.to_le_bytes();
    assert!(bytes[N..].iter().all(|&byte| byte == 0), "{value} does not fit {N} bytes");
    bytes[..N].try_into().expect("N is at most 8")
}

/// The little-endian number in the `N` bytes at `at`.
#[inline]
pub(super) fn get<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(wide)
}

/// [`get`] of up to 4 bytes.
#[inline]
pub(super) fn get32<const N: usize>(bytes: &[u8], at: usize) -> u32 {
    let mut wide = [0; 4];
    wide[..N].copy_from_slice(&bytes[at..at + N]);
    u32::from_le_bytes(wide)
}
