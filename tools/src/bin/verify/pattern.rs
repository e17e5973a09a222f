//! What a written block holds: who wrote it, where, and bytes that follow from that.
//!
//! Never holds state: the content of a block is a function of seed, write number and block number.

/// Bytes in a block, the unit of bookkeeping.
pub const BLOCK: usize = 4096;
const MAGIC: u64 = u64::from_be_bytes(*b"BVERIFY1");
const HEAD: usize = 32;

/// What a block was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Content {
    /// Zeroes all over.
    Zero,
    /// What the write of this number put into this block of this run.
    Write(u64),
    /// A well-formed block that belongs elsewhere: other block (given), or other run.
    Misplaced(u64),
    /// None of these.
    Garbage,
}

/// Fills one block.
///
/// # Panics
/// When the buffer is not one block long.
pub fn fill(buffer: &mut [u8], seed: u64, write: u64, block: u64) {
    assert_eq!(buffer.len(), BLOCK);
    for (word, value) in buffer.chunks_exact_mut(8).zip([MAGIC, seed, write, block]) {
        word.copy_from_slice(&value.to_be_bytes());
    }
    let mut state = mix(seed ^ mix(write ^ mix(block)));
    for word in buffer[HEAD..].chunks_exact_mut(8) {
        state = mix(state);
        word.copy_from_slice(&state.to_ne_bytes());
    }
}

/// Says what a block holds, all of its bytes checked.
pub fn recognise(buffer: &[u8], seed: u64, block: u64) -> Content {
    if buffer.iter().all(|byte| *byte == 0) {
        return Content::Zero;
    }
    let word = |n: usize| {
        let bytes = buffer[n * 8..n * 8 + 8].try_into().expect("8 bytes");
        u64::from_be_bytes(bytes)
    };
    let mut expected = [0; BLOCK];
    fill(&mut expected, word(1), word(2), word(3));
    if buffer != expected {
        Content::Garbage
    } else if word(1) != seed || word(3) != block {
        Content::Misplaced(word(3))
    } else {
        Content::Write(word(2))
    }
}

/// The finaliser of SplitMix64, with its increment.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_recognised_only_where_it_belongs() {
        let mut block = vec![0; BLOCK];
        assert_eq!(recognise(&block, 1, 9), Content::Zero);
        fill(&mut block, 1, 77, 9);
        assert_eq!(recognise(&block, 1, 9), Content::Write(77));
        assert_eq!(recognise(&block, 1, 10), Content::Misplaced(9));
        assert_eq!(recognise(&block, 2, 9), Content::Misplaced(9));
        block[4095] ^= 1;
        assert_eq!(recognise(&block, 1, 9), Content::Garbage);
    }
}
