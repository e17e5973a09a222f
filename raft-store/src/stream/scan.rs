//! Reading the hot stream back when a pool is opened.
//!
//! Owns the decision what of the stream counts. Never writes. One write is in flight at a time, so
//! a batch whose `write_first` is above *n* proves that batch *n* was durable, and so does the
//! header of a later segment.
//!
//! | row | found in place of batch *n* | behind it | decision |
//! |---|---|---|---|
//! | R1 | whole | - | replayed |
//! | R2 | header whole, payload damaged | proof that *n* was durable | replayed; the payload is damaged and must come from a peer |
//! | R3 | no whole header | proof that *n* was durable | lost: the replicas that the next header lists, or all that can't be shown to be whole, are suspect |
//! | R4 | header or payload damaged | no such proof | torn, never acknowledged: it and all behind it are dropped, the stream goes on in a fresh segment |

use ballast_block::limits::{BATCH_WRITE_BYTES_MAX, RECOVERY_READ_BYTES};
use ballast_block::{AlignedBuf, BLOCK_SIZE, PoolId, ReplicaId};
use ballast_env::disk::File;
use bytes::Bytes;
use thiserror::Error;

use super::record::StreamId;
use super::verdict::Finding;
use crate::format::batch::{Batch, DecodeBatchError};
use crate::format::fields::{crc_of_block, digest_of};
use crate::format::segment_header::{SegmentHeader, SegmentUse};
use crate::format::superblock::StreamStart;
use crate::format::{PoolGeometry, SegmentNumber, pool_tag};
use crate::place::Place;

/// The stream holds what this program can't judge.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ScanError {
    /// Written by a newer program.
    #[error("{place}: {error}")]
    NewerProgram {
        /// The block.
        place: Place,
        /// What it needs.
        error: DecodeBatchError,
    },
    /// More of the stream's end can't be read than one write could have torn: the disk is failing,
    /// and what it holds can't be judged.
    #[error(
        "{blocks} blocks at the end of the stream, from {place} on, can't be read: check the disk"
    )]
    Unreadable {
        /// The first.
        place: Place,
        /// How many.
        blocks: usize,
    },
    /// No record names the segment that follows: the stream could not be followed again.
    #[error("{segment} names no segment to follow it")]
    NoNextSegment {
        /// The last segment of the stream.
        segment: SegmentNumber,
    },
    /// A later segment claims batches that an earlier one holds.
    #[error("{segment} starts at batch {first}, but the stream was followed up to batch {reached}")]
    Contradiction {
        /// The later segment.
        segment: SegmentNumber,
        /// The first batch that it claims.
        first: u64,
        /// The next batch that was expected.
        reached: u64,
    },
}

/// So few unreadable blocks may always be what a power loss left of a write.
const UNREADABLE_MIN: usize = 64;

/// A batch that counts.
#[derive(Clone, Debug)]
pub(crate) struct ScannedBatch {
    pub(crate) batch: Batch,
    /// By record: whether its payload is whole.
    pub(crate) payload_good: Vec<bool>,
}

impl ScannedBatch {
    fn is_whole(&self) -> bool {
        self.payload_good.iter().all(|&good| good)
    }
}

/// A segment that the stream was followed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WalkedSegment {
    pub(crate) segment: SegmentNumber,
    pub(crate) generation: u64,
    pub(crate) sequence: u64,
    pub(crate) next: Option<SegmentNumber>,
}

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) batches: Vec<ScannedBatch>,
    pub(crate) segments: Vec<WalkedSegment>,
    pub(crate) findings: Vec<Finding>,
    /// Number of the next batch.
    pub(crate) sequence: u64,
    /// The segment to go on in, and its number in the stream.
    pub(crate) planned: SegmentNumber,
    pub(crate) segment_sequence: u64,
    /// Batches below were durable before the last write began.
    pub(crate) proven: u64,
    pub(crate) blocks_read: u64,
}

/// What is known of a segment before its batches are read.
struct Successor {
    walked: WalkedSegment,
    /// Its first batch; unknown when both the header and that batch are lost.
    first: Option<u64>,
    /// Where to go on reading.
    block: u32,
    sequence: u64,
    /// Batches below it are proven by it.
    proven: u64,
    previous: Vec<(ReplicaId, u64)>,
    header_lost: bool,
}

pub(crate) struct Scanner<'a, F: File> {
    reader: BlockReader<'a, F>,
    pool: PoolId,
    geometry: PoolGeometry,
    scan: Scan,
    /// The next batch expected.
    expected: u64,
    /// Checksum of the header before it, where that was read.
    previous_crc: Option<u32>,
}

/// How the walk through one segment ended.
enum SegmentEnd {
    /// The next one goes on.
    Continues,
    /// Here ends the stream.
    Tail,
}

impl<'a, F: File> Scanner<'a, F> {
    pub(crate) fn new(file: &'a F, pool: PoolId, geometry: PoolGeometry) -> Self {
        let reader = BlockReader::new(file, geometry);
        Self { reader, pool, geometry, scan: Scan::default(), expected: 0, previous_crc: None }
    }

    /// Follows the stream from `start` to its end.
    pub(crate) async fn run(mut self, start: StreamStart) -> Result<Scan, ScanError> {
        self.expected = start.sequence;
        self.scan.planned = start.segment;
        self.scan.segment_sequence = start.segment_sequence;
        let mut current = if start.generation == 0 {
            self.successor(start.segment, start.segment_sequence).await?
        } else {
            Some(self.first_segment(start).await)
        };
        while let Some(entered) = current.take() {
            if !self.enter(&entered)? {
                break;
            }
            let mut walked = entered.walked;
            let (end, next) = self.walk(&mut walked, entered.block).await?;
            let segment = walked.segment;
            self.scan.planned = walked.next.ok_or(ScanError::NoNextSegment { segment })?;
            self.scan.segment_sequence = walked.sequence + 1;
            self.scan.segments.push(walked);
            if let SegmentEnd::Continues = end {
                current = next;
            }
        }
        self.scan.blocks_read = self.reader.blocks_read;
        self.drop_torn_payload();
        Ok(self.scan)
    }

    /// The segment that recovery starts in.
    async fn first_segment(&mut self, start: StreamStart) -> Successor {
        let (segment, generation) = (start.segment, start.generation);
        let header = self.segment_header(segment, start.segment_sequence).await;
        let header_lost = header.is_none_or(|header| header.generation != generation);
        let walked = WalkedSegment {
            segment,
            generation,
            sequence: start.segment_sequence,
            next: start.next,
        };
        Successor {
            walked,
            first: Some(start.sequence),
            block: start.block,
            sequence: start.sequence,
            proven: start.sequence,
            previous: Vec::new(),
            header_lost,
        }
    }

    /// Goes on in a segment, if that is where the next batch must be. Notes what was lost before.
    fn enter(&mut self, entered: &Successor) -> Result<bool, ScanError> {
        let segment = entered.walked.segment;
        if entered.sequence < self.expected {
            let first = entered.sequence;
            return Err(ScanError::Contradiction { segment, first, reached: self.expected });
        }
        if entered.sequence > self.expected {
            if entered.proven <= self.expected {
                self.torn(self.geometry.place(segment, 1));
                return Ok(false);
            }
            self.lost(entered.sequence, &entered.previous);
        }
        if entered.header_lost {
            self.scan.findings.push(Finding::SegmentHeaderDamaged { segment });
        }
        self.scan.proven = self.scan.proven.max(entered.proven);
        Ok(true)
    }

    /// Row R3.
    fn lost(&mut self, resume: u64, previous: &[(ReplicaId, u64)]) {
        let count = resume - self.expected;
        let last_ops = (count == 1).then(|| previous.to_vec());
        self.scan.findings.push(Finding::BatchesLost { first: self.expected, count, last_ops });
        self.expected = resume;
        self.previous_crc = None;
    }

    /// Row R4.
    fn torn(&mut self, place: Place) {
        self.scan.findings.push(Finding::TornTail { place, sequence: self.expected });
    }

    /// Reads the batches of one segment, from `block` on.
    async fn walk(
        &mut self,
        walked: &mut WalkedSegment,
        mut block: u32,
    ) -> Result<(SegmentEnd, Option<Successor>), ScanError> {
        let mut looked_for = walked.next;
        let mut next = self.next_of(walked).await?;
        loop {
            if looked_for != walked.next {
                looked_for = walked.next;
                next = self.next_of(walked).await?;
            }
            let limit = next.as_ref().and_then(|next| next.first).unwrap_or(u64::MAX);
            if limit == self.expected {
                return Ok((SegmentEnd::Continues, next));
            }
            if let Some(batch) = self.batch_at(walked, block, limit).await?
                && batch.fields.sequence == self.expected
                && self.previous_crc.is_none_or(|crc| crc == batch.fields.previous_crc)
            {
                walked.next = walked.next.or(batch.fields.next);
                block = self.accept(walked, block, batch).await;
                continue;
            }
            let behind = self.behind(walked, block, limit).await?;
            let proven = behind.iter().map(|batch| batch.fields.write_first).max().unwrap_or(0);
            let proven_by_next = next.as_ref().map_or(0, |next| next.proven);
            if proven.max(proven_by_next) <= self.expected {
                let place = self.geometry.place(walked.segment, 0).plus(u64::from(block));
                self.check_readable(walked, block, place).await?;
                if !behind.is_empty() || self.holds_something(walked, block).await {
                    self.torn(place);
                }
                return Ok((SegmentEnd::Tail, None));
            }
            let Some(resume) = behind.first() else { return Ok((SegmentEnd::Continues, next)) };
            block = resume.fields.block;
            walked.next = walked.next.or(resume.fields.next);
            let (sequence, previous) = (resume.fields.sequence, resume.previous.clone());
            self.lost(sequence, &previous);
        }
    }

    /// A torn write leaves a limited trace. A disk that reads nothing any more must not pass for
    /// one: all that was acknowledged would be forgotten.
    async fn check_readable(
        &mut self,
        walked: &WalkedSegment,
        block: u32,
        place: Place,
    ) -> Result<(), ScanError> {
        let mut blocks = 0;
        for at in block..self.geometry.segment_blocks {
            blocks += usize::from(self.reader.block(walked.segment, at).await.is_none());
        }
        let rest =
            (self.geometry.segment_blocks - block.min(self.geometry.segment_blocks)) as usize;
        let most = (BATCH_WRITE_BYTES_MAX / BLOCK_SIZE).min(rest / 2).max(UNREADABLE_MIN);
        if blocks > most {
            return Err(ScanError::Unreadable { place, blocks });
        }
        Ok(())
    }

    /// Row R1, or R2: its payload is looked at.
    async fn accept(&mut self, walked: &WalkedSegment, block: u32, batch: Batch) -> u32 {
        let mut payload_good = Vec::with_capacity(batch.records.len());
        for record in &batch.records {
            let first = block + 1 + record.payload_first;
            let mut crcs = Vec::with_capacity(record.payload_blocks as usize);
            for at in first..first + record.payload_blocks {
                crcs.extend(self.reader.block(walked.segment, at).await.map(crc_of_block));
            }
            let is_whole = crcs.len() == record.payload_blocks as usize;
            let expected = record.digest;
            payload_good
                .push(record.payload_blocks == 0 || is_whole && digest_of(crcs) == expected);
        }
        self.scan.proven = self.scan.proven.max(batch.fields.write_first);
        self.previous_crc = Some(batch.crc);
        self.expected += 1;
        let end = block + 1 + batch.fields.payload_blocks;
        self.scan.batches.push(ScannedBatch { batch, payload_good });
        end
    }

    /// The batch whose header is this block, if there is one that belongs here.
    async fn batch_at(
        &mut self,
        walked: &WalkedSegment,
        block: u32,
        limit: u64,
    ) -> Result<Option<Batch>, ScanError> {
        if block >= self.geometry.segment_blocks {
            return Ok(None);
        }
        let Some(bytes) = self.reader.block(walked.segment, block).await else { return Ok(None) };
        let place = self.geometry.place(walked.segment, block);
        let Some(batch) = decode_batch(bytes, place)? else { return Ok(None) };
        let fields = &batch.fields;
        let belongs = fields.stream == StreamId::Hot
            && fields.pool_tag == pool_tag(self.pool)
            && fields.segment == walked.segment
            && fields.generation == walked.generation
            && fields.segment_sequence == walked.sequence
            && fields.block == block
            && fields.write_first <= fields.sequence
            && fields.sequence < limit
            && block + 1 + fields.payload_blocks <= self.geometry.segment_blocks;
        Ok(belongs.then_some(batch))
    }

    /// The later batches of this segment behind a block that is not the expected one.
    async fn behind(
        &mut self,
        walked: &WalkedSegment,
        block: u32,
        limit: u64,
    ) -> Result<Vec<Batch>, ScanError> {
        let mut found: Vec<Batch> = Vec::new();
        for at in block + 1..self.geometry.segment_blocks {
            if let Some(batch) = self.batch_at(walked, at, limit).await?
                && batch.fields.sequence > found.last().map_or(self.expected, last_sequence)
                && batch.fields.sequence - self.expected <= u64::from(at - block)
            {
                found.push(batch);
            }
        }
        Ok(found)
    }

    /// Whether a write of this use of the segment left anything at `block`, or behind it: tells a
    /// torn tail from a clean end.
    async fn holds_something(&mut self, walked: &WalkedSegment, block: u32) -> bool {
        if block >= self.geometry.segment_blocks {
            return false;
        }
        let bytes = self.reader.block(walked.segment, block).await;
        match bytes.map(|bytes| Batch::decode(&Bytes::copy_from_slice(bytes))) {
            // Nothing, or the remains of an earlier use.
            Some(Err(DecodeBatchError::NotABatch)) => false,
            Some(Ok(batch)) => batch.fields.generation == walked.generation,
            Some(Err(_)) | None => true,
        }
    }

    async fn next_of(&mut self, walked: &WalkedSegment) -> Result<Option<Successor>, ScanError> {
        match walked.next {
            Some(next) => self.successor(next, walked.sequence + 1).await,
            None => Ok(None),
        }
    }

    /// What can be learnt of the segment that should be number `sequence` of the stream.
    async fn successor(
        &mut self,
        segment: SegmentNumber,
        sequence: u64,
    ) -> Result<Option<Successor>, ScanError> {
        if segment.0 >= self.geometry.segments {
            return Ok(None);
        }
        if let Some(header) = self.segment_header(segment, sequence).await {
            let generation = header.generation;
            let walked = WalkedSegment { segment, generation, sequence, next: header.next };
            return Ok(Some(Successor {
                walked,
                first: Some(header.first_sequence),
                block: 1,
                sequence: header.first_sequence,
                proven: header.first_sequence,
                previous: header.previous,
                header_lost: false,
            }));
        }
        let mut found: Option<Successor> = None;
        for block in 1..self.geometry.segment_blocks {
            let Some(bytes) = self.reader.block(segment, block).await else { continue };
            let place = self.geometry.place(segment, block);
            let Some(batch) = decode_batch(bytes, place)? else { continue };
            let fields = batch.fields;
            let belongs = fields.stream == StreamId::Hot
                && fields.pool_tag == pool_tag(self.pool)
                && (fields.segment, fields.block) == (segment, block)
                && fields.segment_sequence == sequence
                && found.as_ref().is_none_or(|found| found.walked.generation == fields.generation);
            if !belongs {
                continue;
            }
            let generation = fields.generation;
            let walked = WalkedSegment { segment, generation, sequence, next: fields.next };
            let successor = found.get_or_insert(Successor {
                walked,
                first: (block == 1).then_some(fields.sequence),
                block,
                sequence: fields.sequence,
                proven: 0,
                previous: batch.previous,
                header_lost: true,
            });
            successor.proven = successor.proven.max(fields.write_first);
        }
        Ok(found)
    }

    async fn segment_header(
        &mut self,
        segment: SegmentNumber,
        sequence: u64,
    ) -> Option<SegmentHeader> {
        let header = SegmentHeader::decode(self.reader.block(segment, 0).await?).ok()?;
        let belongs = header.pool == self.pool
            && header.used_for == SegmentUse::Stream(StreamId::Hot)
            && header.segment == segment
            && header.segment_sequence == sequence
            && header.next.is_none_or(|next| next.0 < self.geometry.segments);
        belongs.then_some(header)
    }

    /// Sorts damaged payload into rows R2 and R4, now that it is known what is proven.
    fn drop_torn_payload(&mut self) {
        let scan = &mut self.scan;
        let proven = scan.proven;
        let torn = scan
            .batches
            .iter()
            .position(|scanned| scanned.batch.fields.sequence >= proven && !scanned.is_whole());
        if let Some(torn) = torn {
            let fields = scan.batches[torn].batch.fields;
            let place = self.geometry.place(fields.segment, fields.block);
            scan.findings.retain(|finding| !matches!(finding, Finding::TornTail { .. }));
            scan.findings.push(Finding::TornTail { place, sequence: fields.sequence });
            scan.batches.truncate(torn);
            self.expected = fields.sequence;
        }
        for scanned in &scan.batches {
            let fields = &scanned.batch.fields;
            let records = scanned.batch.records.iter().zip(&scanned.payload_good);
            for (record, _) in records.filter(|(_, good)| !**good) {
                scan.findings.push(Finding::PayloadDamaged {
                    place: self
                        .geometry
                        .place(fields.segment, fields.block + 1 + record.payload_first),
                    replica: record.replica,
                    op: record.op,
                });
            }
        }
        scan.sequence = self.expected;
    }
}

fn last_sequence(batch: &Batch) -> u64 {
    batch.fields.sequence
}

/// A whole batch header, `None` for anything else, an error for what only a newer program knows.
fn decode_batch(bytes: &[u8], place: Place) -> Result<Option<Batch>, ScanError> {
    // Most blocks are payload: no copy of those.
    if !crate::format::batch::may_be_header(bytes) {
        return Ok(None);
    }
    match Batch::decode(&Bytes::copy_from_slice(bytes)) {
        Ok(batch) => Ok(Some(batch)),
        Err(error) if error.needs_newer_program() => Err(ScanError::NewerProgram { place, error }),
        Err(_) => Ok(None),
    }
}

/// Reads single blocks through a large window.
struct BlockReader<'a, F: File> {
    file: &'a F,
    geometry: PoolGeometry,
    segment: SegmentNumber,
    first: u32,
    window: AlignedBuf,
    /// By block of the window: whether the disk gave it.
    readable: Vec<bool>,
    blocks_read: u64,
}

impl<'a, F: File> BlockReader<'a, F> {
    fn new(file: &'a F, geometry: PoolGeometry) -> Self {
        let mut window = AlignedBuf::zeroed(RECOVERY_READ_BYTES);
        window.set_len(0);
        let segment = SegmentNumber(u32::MAX);
        Self { file, geometry, segment, first: 0, window, readable: Vec::new(), blocks_read: 0 }
    }

    /// A block, or `None` when the disk can't read it.
    async fn block(&mut self, segment: SegmentNumber, block: u32) -> Option<&[u8]> {
        let is_inside = self.segment == segment
            && (self.first..self.first + self.readable.len() as u32).contains(&block);
        if !is_inside {
            self.fill(segment, block).await;
        }
        let index = (block - self.first) as usize;
        self.readable[index].then(|| &self.window[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE])
    }

    async fn fill(&mut self, segment: SegmentNumber, block: u32) {
        // A look at a header alone does not need the rest.
        let most = if block == 0 { 1 } else { RECOVERY_READ_BYTES / BLOCK_SIZE };
        let blocks = (self.geometry.segment_blocks - block).min(most as u32);
        let place = self.geometry.place(segment, block);
        let mut buffer = std::mem::replace(&mut self.window, AlignedBuf::zeroed(0));
        buffer.set_len(blocks as usize * BLOCK_SIZE);
        let (result, buffer) = self.file.read_at(place.offset(), buffer).await;
        self.window = buffer;
        (self.segment, self.first) = (segment, block);
        self.readable = vec![result.is_ok(); blocks as usize];
        self.blocks_read += u64::from(blocks);
        if result.is_ok() {
            return;
        }
        for index in 0..blocks as usize {
            let at = place.plus(index as u64).offset();
            let (result, one) = self.file.read_at(at, AlignedBuf::zeroed(BLOCK_SIZE)).await;
            self.readable[index] = result.is_ok();
            self.window[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE].copy_from_slice(&one);
        }
    }
}
