//! The blocks of the disk format, byte by byte: a change here is a change of the format
//! (docs/disk-format.md), and needs a new version or a feature bit.
//!
//! A golden file is a hex dump without the zeroes at the end of the block.

use std::fmt::Write;

use ballast_block::{BLOCK_SIZE, ClusterId, NodeId, PoolId, ReplicaId};
use ballast_raft_store::format::batch::{Batch, BatchFields, BatchWriter};
use ballast_raft_store::format::segment_header::{SegmentHeader, SegmentUse};
use ballast_raft_store::format::superblock::{
    CheckpointBody, Features, INCOMPAT_LINEAGE, Lineage, StreamStart, Superblock,
};
use ballast_raft_store::format::vote_slot::{SlotNumber, VoteSlot};
use ballast_raft_store::format::{PoolGeometry, SegmentNumber, pool_tag};
use ballast_raft_store::stream::{RecordHead, RecordKind, StreamId};
use bytes::Bytes;

fn pool() -> PoolId {
    PoolId::from_bytes(*b"pool-0123456789a")
}

/// 32 bytes a line, with their offset.
fn dump(block: &[u8]) -> String {
    let used = block.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let mut text = String::new();
    for (line, bytes) in block[..used].chunks(32).enumerate() {
        write!(text, "{:04x}:", line * 32).unwrap();
        bytes.iter().for_each(|byte| write!(text, " {byte:02x}").unwrap());
        text.push('\n');
    }
    text
}

fn undump(text: &str) -> Vec<u8> {
    let bytes = text.lines().flat_map(|line| line.split(' ').skip(1));
    let mut block: Vec<u8> = bytes.map(|hex| u8::from_str_radix(hex, 16).unwrap()).collect();
    block.resize(BLOCK_SIZE, 0);
    block
}

/// What is encoded now is what was encoded then; answers the golden block for decoding.
fn golden(name: &str, text: &str, block: &[u8]) -> Bytes {
    let now = dump(block);
    assert!(now == text, "{name} has changed; it would now be\n{now}");
    Bytes::from(undump(text))
}

fn superblock() -> Superblock {
    Superblock {
        cluster: ClusterId::from_bytes(*b"cluster-01234567"),
        pool: pool(),
        node: NodeId(3),
        geometry: PoolGeometry { segment_blocks: 8192, segments: 1000 },
        features: Features { compat: 1, ro_compat: 0, incompat: 0 },
        generation: 17,
        boot_counter: 5,
        checkpoint: 9,
        body: CheckpointBody {
            segments: vec![SegmentNumber(40), SegmentNumber(7)],
            length: 40_000_000,
            crc: 0x1234_5678,
        },
        lineage: Lineage::default(),
        starts: [1, 2, 3].map(|stream| StreamStart {
            segment: SegmentNumber(100 + stream),
            block: 20 + stream,
            generation: 5 << 32 | u64::from(stream),
            segment_sequence: 30 + u64::from(stream),
            sequence: 1000 + u64::from(stream),
            next: (stream == 1).then_some(SegmentNumber(300)),
        }),
    }
}

#[test]
fn superblock_bytes() {
    let mut block = vec![0xff; BLOCK_SIZE];
    superblock().encode(&mut block);
    let block = golden("superblock", include_str!("golden/superblock.hex"), &block);
    assert_eq!(Superblock::decode(&block), Ok(superblock()));
}

#[test]
fn superblock_with_lineage_bytes() {
    let mut superblock = superblock();
    superblock.features.incompat = INCOMPAT_LINEAGE;
    superblock.lineage =
        Lineage { settled: 0x1111_2222_3333_4444, settled_boot: 4, offered: 0x5555_6666_7777_8888 };
    let mut block = vec![0xff; BLOCK_SIZE];
    superblock.encode(&mut block);
    let text = include_str!("golden/superblock-lineage.hex");
    assert_eq!(Superblock::decode(&golden("superblock-lineage", text, &block)), Ok(superblock));
}

#[test]
fn segment_header_bytes() {
    let header = SegmentHeader {
        pool: pool(),
        used_for: SegmentUse::Stream(StreamId::Hot),
        segment: SegmentNumber(11),
        next: Some(SegmentNumber(12)),
        generation: 5 << 32 | 2,
        segment_sequence: 31,
        first_sequence: 1001,
        segment_blocks: 8192,
        previous: vec![(ReplicaId(70), 4), (ReplicaId(71), 900)],
    };
    let mut block = vec![0xff; BLOCK_SIZE];
    header.encode(&mut block);
    let block = golden("segment header", include_str!("golden/segment-header.hex"), &block);
    assert_eq!(SegmentHeader::decode(&block), Ok(header));
}

#[test]
fn batch_header_bytes() {
    let fields = BatchFields {
        stream: StreamId::Hot,
        pool_tag: pool_tag(pool()),
        segment: SegmentNumber(11),
        next: None,
        generation: 5 << 32 | 2,
        segment_sequence: 31,
        sequence: 1002,
        write_first: 1001,
        block: 44,
        payload_blocks: 16,
        previous_crc: 0x0bad_cafe,
    };
    let mut block = vec![0xff; BLOCK_SIZE];
    let mut writer = BatchWriter::start(&mut block, &[(ReplicaId(70), 5)]);
    let entry = RecordHead {
        kind: RecordKind::Entry,
        replica: ReplicaId(71),
        op: 901,
        body: b"an entry header",
    };
    writer.push(&mut block, &entry, 16, 0xfeed_f00d);
    let vote =
        RecordHead { kind: RecordKind::Vote, replica: ReplicaId(70), op: 6, body: b"a vote" };
    writer.push(&mut block, &vote, 0, 0);
    writer.finish(&mut block, &fields);
    let block = golden("batch header", include_str!("golden/batch-header.hex"), &block);
    let batch = Batch::decode(&block).unwrap();
    assert_eq!((batch.fields, batch.records.len()), (fields, 2));
    assert_eq!(batch.records[0].body, entry.body);
    assert_eq!(batch.records[1].op, 6);
}

#[test]
fn vote_slot_bytes() {
    let slot = VoteSlot {
        pool_tag: pool_tag(pool()),
        slot: SlotNumber(4095),
        replica: ReplicaId(70),
        op: 6,
        body: Bytes::from_static(b"a vote"),
    };
    let mut block = vec![0xff; BLOCK_SIZE];
    slot.encode(&mut block);
    let block = golden("vote slot", include_str!("golden/vote-slot.hex"), &block);
    assert_eq!(VoteSlot::decode(&block), Ok(slot));
}

/// Numbers on disk of streams and record kinds are never given to something else.
#[test]
fn numbers() {
    let streams = StreamId::ALL.map(|stream| stream as u8);
    assert_eq!(streams, [1, 2, 3]);
    let kinds: Vec<u8> =
        (0..=255).filter(|&number| RecordKind::from_number(number).is_some()).collect();
    assert_eq!(kinds, [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32]);
    let uses: Vec<u8> =
        (0..=255).filter(|&number| SegmentUse::from_number(number).is_some()).collect();
    assert_eq!(uses, [1, 2, 3, 4]);
}
