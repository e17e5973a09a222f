//! Damage by kind: each ends as the decision table (docs/disk-format.md) says.

mod support;

use std::collections::BTreeMap;

use ballast_block::ReplicaId;
use ballast_env::clock::Clock;
use ballast_raft_store::format::batch::Batch;
use ballast_raft_store::format::segment_header::SegmentHeader;
use ballast_raft_store::format::superblock::Superblock;
use ballast_raft_store::stream::{
    Finding, OpenStoreError, Opened, PayloadState, ScanError, StreamId, Suspicion, suspects,
};
use bytes::Bytes;
use support::pool::{append, format, ids, path, reopen};
use support::{Image, MemoryEnv, run};

/// Writes of the sample; each is one disk write of three batches.
const WRITES: u64 = 4;

/// A batch of the sample.
#[derive(Clone, Debug)]
struct Placed {
    /// Its header's block in the pool.
    header: u64,
    sequence: u64,
    write_first: u64,
    payload_blocks: u64,
    records: Vec<(u64, u64)>,
}

struct Sample {
    image: Image,
    batches: Vec<Placed>,
}

impl Sample {
    fn is_proven(&self, sequence: u64) -> bool {
        self.batches.iter().any(|batch| batch.write_first > sequence)
    }

    fn records(&self, keep: impl Fn(&Placed) -> bool) -> Vec<(u64, u64)> {
        let kept = self.batches.iter().filter(|batch| keep(batch));
        kept.flat_map(|batch| batch.records.clone()).collect()
    }
}

/// A pool with [`WRITES`] writes of three batches each. `entry` blocks per record: with 3 all lies
/// in one segment, with 60 it fills several.
async fn sample(entry: u32) -> Sample {
    let env = MemoryEnv::default();
    format(&env, &path()).await;
    let streams = reopen(&env, &path()).await.unwrap().streams;
    let mut op = BTreeMap::new();
    for write in 0..WRITES {
        // A batch holds 256 blocks, so a record of that size ends one.
        for batch in 0..3 {
            for record in 0..3 {
                let replica = 1 + (write + batch + record) % 5;
                let next = op.entry(replica).or_insert(0u64);
                *next += 1;
                let blocks = if record == 1 { 0 } else { entry };
                append(&streams, replica, *next, blocks);
            }
            streams.freeze();
        }
        streams.flush().await.unwrap();
    }
    drop(streams);
    let image = env.image(&path());
    let batches = batches_of(&image);
    assert_eq!(batches.len() as u64, WRITES * 3);
    Sample { image, batches }
}

fn batches_of(image: &Image) -> Vec<Placed> {
    let decode = |block: u64| {
        let batch = Batch::decode(&Bytes::from(image.block(block))).ok()?;
        Some(Placed {
            header: block,
            sequence: batch.fields.sequence,
            write_first: batch.fields.write_first,
            payload_blocks: u64::from(batch.fields.payload_blocks),
            records: batch.records.iter().map(|record| (record.replica.0, record.op)).collect(),
        })
    };
    let mut batches: Vec<_> = image.written_blocks().filter_map(decode).collect();
    batches.sort_by_key(|batch| batch.sequence);
    batches
}

async fn open_image(image: &Image) -> Result<Opened<MemoryEnv>, OpenStoreError> {
    reopen(&MemoryEnv::with_image(&path(), image.clone()), &path()).await
}

fn suspicious(opened: &Opened<MemoryEnv>) -> BTreeMap<ReplicaId, Suspicion> {
    suspects(&opened.findings, &opened.replay, &BTreeMap::new())
}

/// Ways in which a block goes bad.
fn spoil(image: &mut Image, block: u64, how: usize) {
    match how {
        0 => image.rot(block, 97),
        1 => image.set_block(block, &[0; 4096]),
        _ => image.make_unreadable(block),
    }
}

/// After any damage, a pool that goes on must still be readable with all that came later.
async fn goes_on(opened: Opened<MemoryEnv>) {
    let before = ids(&opened.replay);
    let streams = opened.streams;
    append(&streams, 77, 1, 5);
    append(&streams, 77, 2, 0);
    streams.flush().await.unwrap();
    let image = streams.env().image(&path());
    drop(streams);
    let again = open_image(&image).await.unwrap();
    let mut expected = before;
    expected.extend([(77, 1), (77, 2)]);
    assert_eq!(ids(&again.replay), expected);
}

#[test]
fn one_damaged_header_anywhere() {
    run(async {
        for entry in [3, 60] {
            let sample = sample(entry).await;
            for (index, hit) in sample.batches.iter().enumerate() {
                for how in 0..3 {
                    let mut image = sample.image.clone();
                    spoil(&mut image, hit.header, how);
                    let opened = open_image(&image).await.unwrap();
                    let suspicious = suspicious(&opened);
                    if sample.is_proven(hit.sequence) {
                        // R3: lost, and the next header says whose it was.
                        assert_eq!(
                            ids(&opened.replay),
                            sample.records(|batch| batch.sequence != hit.sequence)
                        );
                        let lost: BTreeMap<u64, u64> = hit.records.iter().copied().collect();
                        let lost = lost.into_iter().map(|(replica, up_to)| {
                            (ReplicaId(replica), Suspicion::Lost { up_to })
                        });
                        assert_eq!(suspicious, lost.collect(), "batch {index}");
                    } else {
                        // R4: as if it and what follows had never been.
                        assert_eq!(
                            ids(&opened.replay),
                            sample.records(|batch| batch.sequence < hit.sequence)
                        );
                        assert!(suspicious.is_empty());
                    }
                    goes_on(opened).await;
                }
            }
        }
    });
}

#[test]
fn several_damaged_headers_in_a_row() {
    run(async {
        for entry in [3, 60] {
            let sample = sample(entry).await;
            let count = sample.batches.len();
            for first in 0..count {
                for last in first + 1..count {
                    let mut image = sample.image.clone();
                    for batch in &sample.batches[first..=last] {
                        image.rot(batch.header, 200);
                    }
                    let opened = open_image(&image).await.unwrap();
                    let lost = &sample.batches[first..=last];
                    let proven = survives_proof(&sample, lost, lost[0].sequence);
                    if !proven {
                        let expected = sample.records(|batch| batch.sequence < lost[0].sequence);
                        assert_eq!(ids(&opened.replay), expected);
                        assert!(suspicious(&opened).is_empty());
                        continue;
                    }
                    check_lost(&sample, &opened, first, last);
                }
            }
        }
    });
}

/// Whether something that is not lost proves that a batch was durable.
fn survives_proof(sample: &Sample, lost: &[Placed], sequence: u64) -> bool {
    let is_lost = |batch: &Placed| lost.iter().any(|lost| lost.sequence == batch.sequence);
    let mut whole = sample.batches.iter().filter(|batch| !is_lost(batch));
    let mut headers = sample
        .image
        .written_blocks()
        .filter_map(|block| SegmentHeader::decode(&sample.image.block(block)).ok());
    whole.any(|batch| batch.write_first > sequence)
        || headers.any(|header| header.first_sequence > sequence)
}

/// Every replica with a record in a lost batch is suspect; one that is not has none there.
fn check_lost(sample: &Sample, opened: &Opened<MemoryEnv>, first: usize, last: usize) {
    let known = (1..=5).map(|replica| (ReplicaId(replica), 0)).collect();
    let suspicious = suspects(&opened.findings, &opened.replay, &known);
    let replayed = ids(&opened.replay);
    let all = sample.records(|_| true);
    for replica in 1..=5 {
        let missing = all.iter().filter(|id| id.0 == replica && !replayed.contains(id)).count();
        let is_suspect = suspicious.contains_key(&ReplicaId(replica));
        // Beyond the last proof nothing tells a torn end from a rotten one.
        let lost = &sample.batches[first..=last];
        let mut durable = lost.iter().filter(|batch| survives_proof(sample, lost, batch.sequence));
        let has_lost = durable.any(|batch| batch.records.iter().any(|id| id.0 == replica));
        assert!(
            is_suspect || missing == 0 || !has_lost,
            "replica {replica} lost {missing} records of batches {first}..={last} unseen"
        );
    }
}

#[test]
fn damaged_payload_is_known_or_torn() {
    run(async {
        for entry in [3, 60] {
            let sample = sample(entry).await;
            for hit in &sample.batches {
                for how in 0..3 {
                    let mut image = sample.image.clone();
                    spoil(&mut image, hit.header + hit.payload_blocks, how);
                    let opened = open_image(&image).await.unwrap();
                    assert!(suspicious(&opened).is_empty());
                    if !sample.is_proven(hit.sequence) {
                        // R4.
                        let expected = sample.records(|batch| batch.sequence < hit.sequence);
                        assert_eq!(ids(&opened.replay), expected);
                        goes_on(opened).await;
                        continue;
                    }
                    // R2: all records are there, one payload is known to be damaged.
                    assert_eq!(ids(&opened.replay), sample.records(|_| true));
                    let damaged = opened
                        .replay
                        .iter()
                        .filter(|record| record.payload_state == PayloadState::Damaged);
                    let damaged: Vec<_> =
                        damaged.map(|record| (record.replica.0, record.op)).collect();
                    assert_eq!(damaged, [*hit.records.last().unwrap()]);
                    let found = opened.findings.iter().any(|finding| {
                        matches!(finding, Finding::PayloadDamaged { op, .. } if *op == damaged[0].1)
                    });
                    assert!(found);
                    goes_on(opened).await;
                }
            }
        }
    });
}

#[test]
fn a_seal_makes_the_last_batch_provable() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        append(&streams, 1, 1, 1);
        let last = append(&streams, 2, 1, 1);
        streams.flush().await.unwrap();
        let unsealed = env.image(&path());
        env.sleep(std::time::Duration::from_millis(200)).await;
        drop(streams);
        for (mut image, is_sealed) in [(unsealed, false), (env.image(&path()), true)] {
            image.rot(last.header.0, 300);
            let opened = open_image(&image).await.unwrap();
            assert!(opened.replay.is_empty());
            assert_eq!(suspicious(&opened).len(), if is_sealed { 2 } else { 0 });
        }
    });
}

#[test]
fn damaged_segment_headers_lose_nothing() {
    run(async {
        let sample = sample(60).await;
        let headers: Vec<u64> = sample
            .image
            .written_blocks()
            .filter(|block| SegmentHeader::decode(&sample.image.block(*block)).is_ok())
            .collect();
        assert!(headers.len() >= 3);
        for &header in &headers {
            let mut image = sample.image.clone();
            image.rot(header, 30);
            let opened = open_image(&image).await.unwrap();
            assert_eq!(ids(&opened.replay), sample.records(|_| true));
            let is_found =
                |finding: &Finding| matches!(finding, Finding::SegmentHeaderDamaged { .. });
            assert!(opened.findings.iter().any(is_found));
            goes_on(opened).await;
            // The first batch behind it as well.
            image.rot(header + 1, 30);
            let hit = sample.batches.iter().find(|batch| batch.header == header + 1).unwrap();
            let opened = open_image(&image).await.unwrap();
            if sample.is_proven(hit.sequence) {
                let expected = sample.records(|batch| batch.sequence != hit.sequence);
                assert_eq!(ids(&opened.replay), expected);
                assert!(!suspicious(&opened).is_empty());
            } else {
                let expected = sample.records(|batch| batch.sequence < hit.sequence);
                assert_eq!(ids(&opened.replay), expected);
            }
            goes_on(opened).await;
        }
    });
}

#[test]
fn superblocks() {
    run(async {
        let sample = sample(3).await;
        for copy in [0, 16] {
            let mut image = sample.image.clone();
            image.rot(copy, 120);
            let opened = open_image(&image).await.unwrap();
            let copy = (copy / 16) as usize;
            assert_eq!(opened.findings[0], Finding::SuperblockDamaged { copy });
            assert_eq!(ids(&opened.replay), sample.records(|_| true));
            // It was written anew.
            let image = opened.streams.env().image(&path());
            assert_eq!(Superblock::decode(&image.block(copy as u64 * 16)).unwrap().boot_counter, 2);
            goes_on(opened).await;
        }
        let mut image = sample.image.clone();
        image.rot(0, 120);
        image.make_unreadable(16);
        let refused = open_image(&image).await.err().unwrap();
        assert!(matches!(refused, OpenStoreError::SuperblocksDamaged { .. }), "{refused}");
        let refused = open_image(&Image::new(64 << 20)).await.err().unwrap();
        assert!(matches!(refused, OpenStoreError::NotAPool), "{refused}");
    });
}

#[test]
fn a_damaged_checkpoint_is_refused() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        let place = append(&streams, 1, 1, 2).place;
        let body = vec![Bytes::from(vec![3; 9000])];
        streams.commit_checkpoint(streams.freeze(), body).await.unwrap();
        assert!(streams.segments().is_live(place));
        assert_eq!(streams.position(StreamId::Hot).0, 1);
        drop(streams);
        let image = env.image(&path());
        assert!(open_image(&image).await.is_ok());
        let is_body = |block: &u64| image.block(*block)[..100] == [3; 100];
        let body = image.written_blocks().find(is_body).unwrap();
        for how in 0..3 {
            let mut image = image.clone();
            spoil(&mut image, body, how);
            let refused = open_image(&image).await.err().unwrap();
            let as_expected =
                matches!(refused, OpenStoreError::CheckpointDamaged { checkpoint: 1, .. });
            assert!(as_expected, "{refused}");
        }
    });
}

#[test]
fn a_disk_that_reads_nothing_is_not_a_torn_tail() {
    run(async {
        let sample = sample(3).await;
        let mut image = sample.image.clone();
        let first = sample.batches[4].header;
        for block in first..first + 400 {
            image.make_unreadable(block);
        }
        let refused = open_image(&image).await.err().unwrap();
        assert!(
            matches!(refused, OpenStoreError::Stream(ScanError::Unreadable { .. })),
            "{refused}"
        );
    });
}
