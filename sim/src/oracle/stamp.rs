//! What a simulated host writes into a block: which write it was, and bytes that follow from it.

use ballast_block::geometry::BLOCK_SIZE;

use crate::oracle::{Value, WriteId};
use crate::rng::Rng;

const MAGIC: u64 = 0x4241_4c4c_5354_4d50;
/// Magic, volume, block and write at the start of a block; pseudo-random bytes of them behind.
const HEADER: usize = 32;

/// The contents of block `block` of volume `volume` after the write `write`.
pub fn stamp(volume: u64, block: u64, write: WriteId) -> [u8; BLOCK_SIZE] {
    let mut bytes = [0; BLOCK_SIZE];
    for (place, number) in
        bytes.as_chunks_mut::<8>().0.iter_mut().zip([MAGIC, volume, block, write.0])
    {
        *place = number.to_le_bytes();
    }
    let fill = Rng::named(write.0, "stamp", block ^ volume.rotate_left(32));
    for place in bytes[HEADER..].as_chunks_mut::<8>().0 {
        *place = fill.draw().to_le_bytes();
    }
    bytes
}

/// Which write the contents of block `block` of volume `volume` come from; `None` when no write
/// made them.
pub fn recognise(volume: u64, block: u64, bytes: &[u8]) -> Option<Value> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(Value::Zero);
    }
    let write = WriteId(u64::from_le_bytes(*bytes.get(24..)?.first_chunk()?));
    (bytes == stamp(volume, block, write)).then_some(Value::Written(write))
}

/// The volume and the write whose whole stamp it is, of whatever block.
pub fn origin(bytes: &[u8]) -> Option<(u64, WriteId)> {
    let (numbers, _) = bytes.get(..HEADER)?.as_chunks::<8>();
    let [_, volume, block, write] = *numbers else { return None };
    let (volume, write) = (u64::from_le_bytes(volume), WriteId(u64::from_le_bytes(write)));
    (bytes == stamp(volume, u64::from_le_bytes(block), write)).then_some((volume, write))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_names_its_write_and_nothing_else_is_recognised() {
        let mut bytes = stamp(1, 2, WriteId(3));
        assert_eq!(recognise(1, 2, &bytes), Some(Value::Written(WriteId(3))));
        assert_eq!(recognise(1, 4, &bytes), None, "another block's");
        assert_eq!(recognise(2, 2, &bytes), None, "another volume's");
        assert_eq!(origin(&bytes), Some((1, WriteId(3))));
        bytes[4000] ^= 1;
        assert_eq!(recognise(1, 2, &bytes), None, "a flipped bit");
        assert_eq!(origin(&bytes), None, "nobody's");
        assert_eq!(recognise(1, 2, &[0; BLOCK_SIZE]), Some(Value::Zero));
    }
}
