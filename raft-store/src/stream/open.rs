//! Opening a pool: superblock, checkpoint body, replay of the hot stream, boot counter.
//!
//! Owns the order: nothing is written before everything was understood, and no stream starts
//! before the boot counter is raised in both superblocks (hazard F5).

use std::path::Path;

use ballast_block::checksum::crc32;
use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::limits::{BATCH_WRITE_BYTES_MAX, RECOVERY_READ_BYTES};
use ballast_block::{AlignedBuf, BLOCK_SIZE, ClusterId, NodeId, PoolId};
use ballast_env::Env;
use ballast_env::disk::{File, OpenMode};
use bytes::Bytes;
use thiserror::Error;

use super::queue::QueueStart;
use super::record::{PayloadState, Replayed, StoredPayload, StreamId, StreamPosition};
use super::scan::{Scan, ScanError, ScannedBatch, Scanner};
use super::set::StreamSet;
use super::superblocks::{
    check_expected, check_usable, newest, raise_boot_counter, read_superblocks,
};
use super::verdict::Finding;
use crate::format::superblock::{DecodeSuperblockError, Features, Superblock};
use crate::format::{PoolGeometry, SegmentNumber};
use crate::pool::PoolExpectation;
use crate::segment::{DecodeTableError, SegmentState, SegmentTable};

/// What an open pool is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolInfo {
    /// The cluster that it belongs to.
    pub cluster: ClusterId,
    /// The pool.
    pub pool: PoolId,
    /// The node that it belongs to.
    pub node: NodeId,
    /// How often it was opened, this time included. Peers compare it: one that is not newer than
    /// they know means that the disk was rolled back (hazard F5).
    pub boot_counter: u64,
    /// Its division.
    pub geometry: PoolGeometry,
    /// Its features.
    pub features: Features,
}

/// An open pool, and all that recovery found.
pub struct Opened<E: Env> {
    /// Its streams.
    pub streams: StreamSet<E>,
    /// The body of the last checkpoint, as it was committed; `None` when there was none yet.
    pub checkpoint_body: Option<Bytes>,
    /// The records since, in order.
    pub replay: Vec<Replayed>,
    /// What was not as it was written.
    pub findings: Vec<Finding>,
    /// Bytes of the hot stream that were read.
    pub bytes_read: u64,
}

/// Opening a pool was refused or failed. Nothing was changed, but for `Io`.
#[derive(Debug, Error)]
pub enum OpenStoreError {
    /// The disk answered with an error.
    #[error("can't open pool: {0}")]
    Io(#[from] std::io::Error),
    /// It is no pool.
    #[error("no Ballast superblock: this is not a pool; format it first")]
    NotAPool,
    /// It was a pool. It is never made anew: its replicas must be replaced (hazard F5).
    #[error(
        "both superblocks are damaged ({first}; {second}): give this pool up with `ballastctl pool replace`; its replicas are brought back from the other nodes"
    )]
    SuperblocksDamaged {
        /// What is wrong with the first.
        first: DecodeSuperblockError,
        /// What is wrong with the second.
        second: DecodeSuperblockError,
    },
    /// Made by a newer program.
    #[error("pool needs a newer program ({0}): upgrade this node")]
    NewerProgram(String),
    /// The two superblocks are of different pools.
    #[error("the superblocks are of two pools, {0} and {1}: find out how before you touch it")]
    TwoPools(PoolId, PoolId),
    /// Another cluster's.
    #[error("pool is of cluster {found}, not of {expected}")]
    WrongCluster {
        /// Its cluster.
        found: ClusterId,
        /// The cluster expected.
        expected: ClusterId,
    },
    /// Another node's.
    #[error("pool is of {found}, not of {expected}: a disk moves with its node's number")]
    WrongNode {
        /// Its node.
        found: NodeId,
        /// The node expected.
        expected: NodeId,
    },
    /// Another pool.
    #[error("this is pool {found}, not {expected}")]
    WrongPool {
        /// Its id.
        found: PoolId,
        /// The id expected.
        expected: PoolId,
    },
    /// The file or device is smaller than it was.
    #[error("pool has {size} bytes, fewer than its superblock says: part of the disk is missing")]
    Shrunk {
        /// Its size now, in bytes.
        size: u64,
    },
    /// The body of the checkpoint can't be read or its checksum fails.
    #[error(
        "checkpoint {checkpoint} is damaged ({problem}): give this pool up with `ballastctl pool replace`; its replicas are brought back from the other nodes"
    )]
    CheckpointDamaged {
        /// Its number.
        checkpoint: u64,
        /// What is wrong.
        problem: String,
    },
    /// The checkpoint's table of segments is not one of this pool.
    #[error(transparent)]
    Table(#[from] DecodeTableError),
    /// The hot stream goes on in a segment that the checkpoint needs.
    #[error(
        "{segment} is claimed by the hot stream and by the checkpoint: report this, touch nothing"
    )]
    SegmentInUse {
        /// Which.
        segment: SegmentNumber,
    },
    /// The hot stream can't be judged.
    #[error("hot stream: {0}")]
    Stream(#[from] ScanError),
}

/// Opens a pool, locks it, recovers its streams and raises its boot counter.
///
/// # Errors
/// [`OpenStoreError`]; a pool that can't be understood whole is refused, never re-made.
pub async fn open<E: Env>(
    env: E,
    path: &Path,
    expect: PoolExpectation,
) -> Result<Opened<E>, OpenStoreError> {
    let file = env.open(path, OpenMode::Exclusive).await?;
    let (copies, findings) = read_superblocks(&file).await?;
    let superblock = newest(&copies);
    check_expected(&superblock, &expect, file.size())?;
    let recovered = recover(&file, superblock, findings).await?;
    let Recovered { mut superblock, table, body, scan, replay, findings } = recovered;
    raise_boot_counter(&file, &mut superblock, &copies, env.random_u64()).await?;
    make_tail_durable(&file, &scan, superblock.geometry).await?;
    let info = PoolInfo::of(&superblock);
    let starts = queue_starts(&superblock, &scan);
    let bytes_read = scan.blocks_read * BLOCK_SIZE_U64;
    let streams = StreamSet::start(env, file, info, table, superblock, starts);
    Ok(Opened { streams, checkpoint_body: body, replay, findings, bytes_read })
}

/// What a pool holds, read without changing it.
pub struct Inspected {
    /// What it is; the boot counter is that of the last open.
    pub info: PoolInfo,
    /// Number of the last checkpoint; 0 = none yet.
    pub checkpoint: u64,
    /// Its body.
    pub checkpoint_body: Option<Bytes>,
    /// Its segments, in order.
    pub checkpoint_segments: Vec<SegmentNumber>,
    /// Its length in bytes.
    pub checkpoint_bytes: u64,
    /// The segments, as the next open would find them.
    pub segments: SegmentTable,
    /// The records since the checkpoint.
    pub replay: Vec<Replayed>,
    /// What is not as it was written.
    pub findings: Vec<Finding>,
}

/// Reads a pool for tools: any cluster's, any node's; not locked, nothing is written.
///
/// # Errors
/// [`OpenStoreError`].
pub async fn inspect<E: Env>(env: &E, path: &Path) -> Result<Inspected, OpenStoreError> {
    let file = env.open(path, OpenMode::ReadOnly).await?;
    let (copies, findings) = read_superblocks(&file).await?;
    let superblock = newest(&copies);
    check_usable(&superblock, file.size())?;
    let recovered = recover(&file, superblock, findings).await?;
    let Recovered { mut superblock, table, body, replay, findings, .. } = recovered;
    superblock.boot_counter -= 1;
    let info = PoolInfo::of(&superblock);
    Ok(Inspected {
        info,
        checkpoint: superblock.checkpoint,
        checkpoint_body: body,
        checkpoint_segments: superblock.body.segments,
        checkpoint_bytes: superblock.body.length,
        segments: table,
        replay,
        findings,
    })
}

impl PoolInfo {
    fn of(superblock: &Superblock) -> Self {
        Self {
            cluster: superblock.cluster,
            pool: superblock.pool,
            node: superblock.node,
            boot_counter: superblock.boot_counter,
            geometry: superblock.geometry,
            features: superblock.features,
        }
    }
}

/// All that can be learnt of a pool without writing to it; the superblock has the next boot
/// counter.
struct Recovered {
    superblock: Superblock,
    table: SegmentTable,
    body: Option<Bytes>,
    scan: Scan,
    replay: Vec<Replayed>,
    findings: Vec<Finding>,
}

async fn recover<F: File>(
    file: &F,
    mut superblock: Superblock,
    mut findings: Vec<Finding>,
) -> Result<Recovered, OpenStoreError> {
    superblock.boot_counter += 1;
    let body = read_body(file, &superblock).await?;
    let table = SegmentTable::new(superblock.geometry, superblock.boot_counter);
    let body = load_body(&table, &superblock, body)?;
    let scanner = Scanner::new(file, superblock.pool, superblock.geometry);
    let mut scan = scanner.run(superblock.starts[0]).await?;
    claim_walked(&table, &scan, superblock.starts[0].segment_sequence)?;
    findings.append(&mut scan.findings);
    let replay = replay_of(&scan, &table);
    Ok(Recovered { superblock, table, body, scan, replay, findings })
}

/// The whole body of the last checkpoint.
async fn read_body<F: File>(
    file: &F,
    superblock: &Superblock,
) -> Result<Option<Bytes>, OpenStoreError> {
    if superblock.checkpoint == 0 {
        return Ok(None);
    }
    let damaged = |problem: String| OpenStoreError::CheckpointDamaged {
        checkpoint: superblock.checkpoint,
        problem,
    };
    let geometry = superblock.geometry;
    let mut body = Vec::with_capacity(superblock.body.length as usize);
    for &segment in &superblock.body.segments {
        let mut block = 1;
        let mut left = superblock.body.length - body.len() as u64;
        while left > 0 && block < geometry.segment_blocks {
            let blocks =
                left.div_ceil(BLOCK_SIZE_U64).min((RECOVERY_READ_BYTES / BLOCK_SIZE) as u64);
            let blocks = (blocks as u32).min(geometry.segment_blocks - block);
            let buffer = AlignedBuf::zeroed(blocks as usize * BLOCK_SIZE);
            let offset = geometry.place(segment, block).offset();
            let (result, buffer) = file.read_at(offset, buffer).await;
            result.map_err(|error| damaged(error.to_string()))?;
            let used = (buffer.len() as u64).min(left);
            body.extend_from_slice(&buffer[..used as usize]);
            left -= used;
            block += blocks;
        }
    }
    if body.len() as u64 != superblock.body.length || crc32(&body) != superblock.body.crc {
        return Err(damaged("checksum".into()));
    }
    Ok(Some(Bytes::from(body)))
}

/// Takes over the table of segments; answers what the layer above put into the body.
fn load_body(
    table: &SegmentTable,
    superblock: &Superblock,
    body: Option<Bytes>,
) -> Result<Option<Bytes>, OpenStoreError> {
    let Some(mut body) = body else { return Ok(None) };
    let cut = OpenStoreError::Table(DecodeTableError::Damaged(0));
    let Some(length) = body.first_chunk().map(|length| u64::from_le_bytes(*length)) else {
        return Err(cut);
    };
    let mut table_bytes = body.split_off(8);
    if length > table_bytes.len() as u64 {
        return Err(cut);
    }
    let above = table_bytes.split_off(length as usize);
    table.load(&table_bytes)?;
    for (number, &segment) in superblock.body.segments.iter().enumerate() {
        table.claim(segment, SegmentState::Checkpoint, 0, number as u64);
    }
    Ok(Some(above))
}

/// Writes the batches that are not proven once more, byte by byte the same: they may have been
/// read from a cache of the disk that a power loss would still empty, and count from now on.
async fn make_tail_durable<F: File>(
    file: &F,
    scan: &Scan,
    geometry: PoolGeometry,
) -> Result<(), OpenStoreError> {
    let is_unproven = |scanned: &&ScannedBatch| scanned.batch.fields.sequence >= scan.proven;
    let Some(first) = scan.batches.iter().find(is_unproven) else { return Ok(()) };
    let last = scan.batches.last().expect("the first is there").batch.fields;
    let first = first.batch.fields;
    assert_eq!(first.segment, last.segment, "one disk write lies in one segment");
    // The first batch of a segment is written together with the segment's header; a header that
    // can't be read is not needed.
    let header = geometry.place(first.segment, 0).offset();
    let has_header =
        first.block == 1 && file.read_at(header, AlignedBuf::zeroed(BLOCK_SIZE)).await.0.is_ok();
    let mut block = if has_header { 0 } else { first.block };
    let end = last.block + 1 + last.payload_blocks;
    while block < end {
        let blocks = (end - block).min((BATCH_WRITE_BYTES_MAX / BLOCK_SIZE) as u32);
        let offset = geometry.place(first.segment, block).offset();
        let buffer = AlignedBuf::zeroed(blocks as usize * BLOCK_SIZE);
        let (result, buffer) = file.read_at(offset, buffer).await;
        result?;
        file.write_at(offset, vec![buffer.freeze()]).await?;
        block += blocks;
    }
    Ok(())
}

/// Enters the segments of the replayed stream into the table. What lives in them by the
/// checkpoint's word under another use would be lost: refused.
fn claim_walked(
    table: &SegmentTable,
    scan: &Scan,
    replayed_from: u64,
) -> Result<(), OpenStoreError> {
    let full = SegmentState::Full(StreamId::Hot);
    let walked = scan.segments.iter();
    let walked = walked.map(|walked| (walked.segment, full, walked.generation, walked.sequence));
    let planned = (scan.planned, SegmentState::Reserved(StreamId::Hot), 0, 0);
    for (segment, state, generation, sequence) in walked.chain([planned]) {
        let is_walked = generation == 0 && scan.segments.iter().any(|w| w.segment == segment);
        if is_walked || !table.may_claim(segment, generation) {
            return Err(OpenStoreError::SegmentInUse { segment });
        }
        table.claim(segment, state, generation, sequence);
    }
    table.set_replayed_from(replayed_from);
    Ok(())
}

fn replay_of(scan: &Scan, table: &SegmentTable) -> Vec<Replayed> {
    let mut replay = Vec::new();
    for ScannedBatch { batch, payload_good } in &scan.batches {
        let fields = &batch.fields;
        let header = table.geometry().place(fields.segment, fields.block);
        for (record, &good) in batch.records.iter().zip(payload_good) {
            let payload = (record.payload_blocks > 0).then(|| StoredPayload {
                place: header.plus(u64::from(1 + record.payload_first)),
                blocks: record.payload_blocks,
                digest: record.digest,
            });
            if let Some(payload) = payload {
                table.mark_live(payload.place, payload.blocks);
            }
            replay.push(Replayed {
                kind: record.kind,
                replica: record.replica,
                op: record.op,
                body: record.body.clone(),
                payload,
                payload_state: match payload {
                    None => PayloadState::None,
                    Some(_) if good => PayloadState::Good,
                    Some(_) => PayloadState::Damaged,
                },
                header,
                at: StreamPosition(fields.sequence),
            });
        }
    }
    replay
}

fn queue_starts(superblock: &Superblock, scan: &Scan) -> [QueueStart; 3] {
    let last = scan.batches.last().map(|scanned| &scanned.batch);
    let before = last.filter(|batch| batch.fields.sequence + 1 == scan.sequence);
    let hot = QueueStart {
        planned: Some(scan.planned),
        segment_sequence: scan.segment_sequence,
        sequence: scan.sequence,
        last_ops: before.map(|batch| batch.last_ops()).unwrap_or_default(),
        last_crc: before.map_or(0, |batch| batch.crc),
    };
    // Nobody follows the other two: what came after the checkpoint is given up.
    let other = |index: usize| QueueStart {
        planned: None,
        segment_sequence: superblock.starts[index].segment_sequence + 1,
        sequence: superblock.starts[index].sequence,
        last_ops: Vec::new(),
        last_crc: 0,
    };
    [hot, other(1), other(2)]
}
