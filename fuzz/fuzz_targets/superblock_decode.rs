//! A block that the opener takes for a superblock or a vote slot: any bytes, with a checksum that
//! holds.
#![no_main]

use ballast_fuzz::store::{sealed_block, with_magic};
use ballast_raft_store::format::superblock::Superblock;
use ballast_raft_store::format::vote_slot::VoteSlot;
use libfuzzer_sys::fuzz_target;

/// Where both kinds have their checksum.
const CRC_AT: usize = 4;

fuzz_target!(|bytes: &[u8]| {
    let block = sealed_block(with_magic(bytes, b"BLST"), CRC_AT);
    if let Ok(superblock) = Superblock::decode(&block) {
        let mut again = vec![0; block.len()];
        superblock.encode(&mut again);
        assert_eq!(Superblock::decode(&again), Ok(superblock));
    }
    let block = sealed_block(with_magic(bytes, b"BVOT"), CRC_AT);
    if let Ok(slot) = VoteSlot::decode(&block) {
        let mut again = vec![0; block.len()];
        slot.encode(&mut again);
        assert_eq!(VoteSlot::decode(&again), Ok(slot));
    }
});
