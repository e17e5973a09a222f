//! A block that recovery takes for a batch header or a segment header: any bytes, with a checksum
//! that holds.
#![no_main]

use ballast_fuzz::store::{sealed_block, with_magic};
use ballast_raft_store::format::batch::Batch;
use ballast_raft_store::format::segment_header::SegmentHeader;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

/// Where both kinds have their checksum.
const CRC_AT: usize = 92;

fuzz_target!(|bytes: &[u8]| {
    let block = sealed_block(with_magic(bytes, b"BBAT"), CRC_AT);
    if let Ok(batch) = Batch::decode(&Bytes::from(block)) {
        let payload: u32 = batch.records.iter().map(|record| record.payload_blocks).sum();
        assert_eq!(payload, batch.fields.payload_blocks);
        assert!(batch.last_ops().len() <= batch.records.len());
    }
    let block = sealed_block(with_magic(bytes, b"BSEG"), CRC_AT);
    if let Ok(header) = SegmentHeader::decode(&block) {
        let mut again = vec![0; block.len()];
        header.encode(&mut again);
        assert_eq!(SegmentHeader::decode(&again), Ok(header));
    }
});
