//! The batches of one stream that are not durable yet. Write path: step 5 (append).
//!
//! Owns where the next record goes, and the payloads above the durable watermark. Never does I/O:
//! the writer takes what is waiting and says when it is durable.

use std::collections::VecDeque;

use ballast_block::buffer::{BufferPool, is_block_aligned};
use ballast_block::checksum::block_crcs;
use ballast_block::limits::{
    BATCH_REPLICAS_MAX, BATCH_WRITE_BYTES_MAX, BATCH_WRITE_PARTS_MAX, RECORD_BODY_BYTES_MAX,
    TRANSFER_BLOCKS_MAX,
};
use ballast_block::{AlignedBuf, BLOCK_SIZE, PoolId, ReplicaId};
use bytes::Bytes;

use super::record::{
    AppendError, Appended, PoolFailed, RecordHead, SpaceClass, StreamId, StreamPosition,
};
use crate::format::batch::{BatchFields, BatchWriter, note_op};
use crate::format::fields::digest_of;
use crate::format::segment_header::{SegmentHeader, SegmentUse};
use crate::format::superblock::StreamStart;
use crate::format::{SegmentNumber, pool_tag};
use crate::place::Place;
use crate::segment::{SegmentState, SegmentTable};

/// Called once, when its batch is durable or the pool has failed.
pub type DurableCallback = Box<dyn FnOnce(Result<(), PoolFailed>)>;

/// The segment that a stream appends to.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    segment: SegmentNumber,
    /// Next free block in it.
    block: u32,
    generation: u64,
    segment_sequence: u64,
    next: Option<SegmentNumber>,
}

/// A batch that is not durable.
struct Batch {
    at: Cursor,
    sequence: u64,
    /// The header of a segment that this batch opens.
    opens: Option<Bytes>,
    /// Taken when it is sealed for the disk.
    header: Option<AlignedBuf>,
    /// Takes no more records.
    closed: bool,
    writer: BatchWriter,
    payload: Vec<(u32, Bytes)>,
    payload_blocks: u32,
    last_ops: Vec<(ReplicaId, u64)>,
    callbacks: Vec<DurableCallback>,
}

impl Batch {
    /// Completes the header, now that its disk write is known, and adds the batch to that write.
    /// Answers the header's checksum.
    fn seal(
        &mut self,
        stream: StreamId,
        pool: PoolId,
        write_first: u64,
        previous_crc: u32,
        write: &mut DiskWrite,
    ) -> u32 {
        let mut header = self.header.take().expect("sealed once");
        let fields = BatchFields {
            stream,
            pool_tag: pool_tag(pool),
            segment: self.at.segment,
            next: self.at.next,
            generation: self.at.generation,
            segment_sequence: self.at.segment_sequence,
            sequence: self.sequence,
            write_first,
            block: self.at.block,
            payload_blocks: self.payload_blocks,
            previous_crc,
        };
        let crc = self.writer.finish(&mut header, &fields);
        let opens = self.opens.take();
        let payload = self.payload.iter().map(|(_, bytes)| bytes.clone());
        let parts = opens.into_iter().chain([header.freeze()]).chain(payload);
        let before = write.parts.len();
        write.parts.extend(parts);
        write.bytes += write.parts[before..].iter().map(Bytes::len).sum::<usize>();
        crc
    }
}

/// One disk write: batches back to back.
pub(super) struct DiskWrite {
    pub(super) place: Place,
    pub(super) parts: Vec<Bytes>,
    pub(super) bytes: usize,
    /// Its last batch.
    pub(super) last: u64,
    /// It consists of one empty batch.
    pub(super) is_seal: bool,
}

/// Counters of a stream since the pool was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamStats {
    /// Disk writes.
    pub writes: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Batches.
    pub batches: u64,
    /// Records.
    pub records: u64,
}

/// The state of one stream.
pub(super) struct Queue {
    stream: StreamId,
    pool: PoolId,
    segment_blocks: u32,
    cursor: Option<Cursor>,
    /// The segment to open next: bespoken, its number known to recovery.
    planned: Option<SegmentNumber>,
    next_segment_sequence: u64,
    next_sequence: u64,
    durable: u64,
    /// Not durable, oldest first; only the last can be open.
    batches: VecDeque<Batch>,
    /// Last operations of the last closed batch.
    last_ops: Vec<(ReplicaId, u64)>,
    last_crc: u32,
    pub(super) stats: StreamStats,
}

/// Where a stream starts when a pool is opened.
pub(super) struct QueueStart {
    pub(super) planned: Option<SegmentNumber>,
    pub(super) segment_sequence: u64,
    pub(super) sequence: u64,
    pub(super) last_ops: Vec<(ReplicaId, u64)>,
    pub(super) last_crc: u32,
}

impl Queue {
    pub(super) fn new(
        stream: StreamId,
        pool: PoolId,
        segment_blocks: u32,
        start: QueueStart,
    ) -> Self {
        Self {
            stream,
            pool,
            segment_blocks,
            cursor: None,
            planned: start.planned,
            next_segment_sequence: start.segment_sequence,
            next_sequence: start.sequence,
            durable: start.sequence - 1,
            batches: VecDeque::new(),
            last_ops: start.last_ops,
            last_crc: start.last_crc,
            stats: StreamStats::default(),
        }
    }

    /// Queues a record; answers where it will lie. On an error nothing is queued.
    pub(super) fn append(
        &mut self,
        table: &SegmentTable,
        buffers: &BufferPool,
        class: SpaceClass,
        record: &RecordHead<'_>,
        payload: Option<Bytes>,
        crcs: &[u32],
    ) -> Result<Appended, AppendError> {
        let blocks = payload.as_ref().map_or(0, |payload| payload.len() / BLOCK_SIZE);
        assert!(payload.as_ref().is_none_or(|payload| payload.len() == blocks * BLOCK_SIZE));
        assert!(payload.is_none() || blocks > 0 && blocks <= TRANSFER_BLOCKS_MAX);
        assert!(record.body.len() <= RECORD_BODY_BYTES_MAX);
        assert!(crcs.is_empty() || crcs.len() == blocks, "one checksum per block, or none");
        let blocks = blocks as u32;
        if !self.open_batch_takes(record, blocks) {
            self.close_batch();
            self.make_room(table, class, blocks)?;
            self.open_batch(buffers);
        }
        let batch = self.batches.back_mut().expect("just opened");
        let digest = match &payload {
            Some(payload) if crcs.is_empty() => digest_of(block_crcs(payload)),
            Some(_) => digest_of(crcs.iter().copied()),
            None => 0,
        };
        let header = batch.header.as_mut().expect("an open batch is not sealed");
        batch.writer.push(header, record, blocks, digest);
        note_op(&mut batch.last_ops, record.replica, record.op);
        self.stats.records += 1;
        let geometry = table.geometry();
        let header = geometry.place(batch.at.segment, batch.at.block);
        let at = StreamPosition(batch.sequence);
        let Some(payload) = payload else { return Ok(Appended { place: header, header, at }) };
        let first = batch.at.block + 1 + batch.payload_blocks;
        let place = geometry.place(batch.at.segment, first);
        batch.payload.push((batch.payload_blocks, aligned(payload, buffers)));
        batch.payload_blocks += blocks;
        table.mark_live(place, blocks);
        Ok(Appended { place, header, at })
    }

    /// Queues an empty batch behind the last write: proof that it was durable.
    pub(super) fn append_seal(&mut self, table: &SegmentTable, buffers: &BufferPool) {
        assert!(self.batches.is_empty());
        // Without room for it there is no proof; that is a lesser evil than to use the reserve.
        if self.make_room(table, SpaceClass::Normal, 0).is_ok() {
            self.open_batch(buffers);
        }
    }

    fn open_batch_takes(&self, record: &RecordHead<'_>, blocks: u32) -> bool {
        let Some(batch) = self.batches.back() else { return false };
        let listed = batch.last_ops.len() < BATCH_REPLICAS_MAX
            || batch.last_ops.iter().any(|(replica, _)| *replica == record.replica);
        let payload = batch.payload_blocks + blocks;
        !batch.closed
            && listed
            && batch.writer.has_room(record.body.len())
            && payload as usize <= TRANSFER_BLOCKS_MAX
            && batch.at.block + 1 + payload <= self.segment_blocks
    }

    /// Nothing more is added to the last batch.
    fn close_batch(&mut self) {
        let Some(batch) = self.batches.back_mut().filter(|batch| !batch.closed) else { return };
        batch.closed = true;
        let cursor = self.cursor.as_mut().expect("an open batch lies in the cursor's segment");
        cursor.block += 1 + batch.payload_blocks;
        self.last_ops.clone_from(&batch.last_ops);
    }

    /// Opens the next segment if a batch of so many blocks does not fit this one.
    fn make_room(
        &mut self,
        table: &SegmentTable,
        class: SpaceClass,
        blocks: u32,
    ) -> Result<(), AppendError> {
        if self.cursor.is_some_and(|cursor| cursor.block + 1 + blocks <= self.segment_blocks) {
            return Ok(());
        }
        let out_of_space = AppendError::OutOfSpace { class };
        let reserve = || table.allocate(class, SegmentState::Reserved(self.stream));
        // Only the hot stream is followed by recovery, so only it bespeaks segments.
        let is_hot = self.stream == StreamId::Hot;
        let planned = match self.planned {
            Some(planned) => planned,
            None => reserve().ok_or(out_of_space.clone())?,
        };
        self.planned = Some(planned);
        let next = if is_hot { Some(reserve().ok_or(out_of_space)?) } else { None };
        if let Some(cursor) = self.cursor.take() {
            table.close(cursor.segment, self.stream);
        }
        let segment_sequence = self.next_segment_sequence;
        self.next_segment_sequence += 1;
        let generation = table.open(planned, self.stream, segment_sequence);
        self.cursor =
            Some(Cursor { segment: planned, block: 0, generation, segment_sequence, next });
        self.planned = next;
        Ok(())
    }

    fn open_batch(&mut self, buffers: &BufferPool) {
        let opens = self.segment_header(buffers);
        let at = self.cursor.expect("make_room went before");
        let mut header = buffers.get(BLOCK_SIZE);
        let writer = BatchWriter::start(&mut header, &self.last_ops);
        self.batches.push_back(Batch {
            at,
            sequence: self.next_sequence,
            opens,
            header: Some(header),
            closed: false,
            writer,
            payload: Vec::new(),
            payload_blocks: 0,
            last_ops: Vec::new(),
            callbacks: Vec::new(),
        });
        self.next_sequence += 1;
    }

    /// The header of the cursor's segment, when nothing is in the segment yet.
    fn segment_header(&mut self, buffers: &BufferPool) -> Option<Bytes> {
        let cursor = self.cursor.as_mut().expect("make_room went before");
        if cursor.block > 0 {
            return None;
        }
        cursor.block = 1;
        let header = SegmentHeader {
            pool: self.pool,
            used_for: SegmentUse::Stream(self.stream),
            segment: cursor.segment,
            next: cursor.next,
            generation: cursor.generation,
            segment_sequence: cursor.segment_sequence,
            first_sequence: self.next_sequence,
            segment_blocks: self.segment_blocks,
            previous: self.last_ops.clone(),
        };
        let mut block = buffers.get(BLOCK_SIZE);
        header.encode(&mut block);
        Some(block.freeze())
    }

    /// Takes what is waiting as one disk write. They stay in the queue until it is durable.
    pub(super) fn take_write(&mut self, table: &SegmentTable) -> Option<DiskWrite> {
        self.close_batch();
        let first = self.batches.front()?;
        let write_first = first.sequence;
        let segment = first.at.segment;
        let place = match first.opens {
            Some(_) => table.geometry().place(segment, 0),
            None => table.geometry().place(segment, first.at.block),
        };
        let is_seal = first.writer.records() == 0;
        let mut write = DiskWrite { place, parts: Vec::new(), bytes: 0, last: 0, is_seal };
        for batch in &mut self.batches {
            let bytes = (1 + batch.payload_blocks as usize) * BLOCK_SIZE;
            let parts = write.parts.len() + 2 + batch.payload.len();
            let full = write.bytes + bytes > BATCH_WRITE_BYTES_MAX || parts > BATCH_WRITE_PARTS_MAX;
            if write.last != 0 && (full || batch.at.segment != segment) {
                break;
            }
            self.last_crc =
                batch.seal(self.stream, self.pool, write_first, self.last_crc, &mut write);
            write.last = batch.sequence;
            self.stats.batches += 1;
        }
        self.stats.writes += 1;
        self.stats.bytes += write.bytes as u64;
        Some(write)
    }

    /// All batches up to `last` are durable: answers who wanted to know.
    pub(super) fn written(&mut self, last: u64) -> Vec<DurableCallback> {
        self.durable = last;
        let mut callbacks = Vec::new();
        while self.batches.front().is_some_and(|batch| batch.sequence <= last) {
            let batch = self.batches.pop_front().expect("just seen");
            callbacks.extend(batch.callbacks);
        }
        callbacks
    }

    /// The pool failed: forgets what waits, answers who waits. Payloads stay readable.
    pub(super) fn fail(&mut self) -> Vec<DurableCallback> {
        self.batches.iter_mut().flat_map(|batch| batch.callbacks.drain(..)).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// The batch of the last appended record.
    pub(super) fn last(&self) -> StreamPosition {
        StreamPosition(self.next_sequence - 1)
    }

    pub(super) fn is_durable(&self, at: StreamPosition) -> bool {
        at.0 <= self.durable
    }

    /// Calls back when `at` is durable. `Err` gives the callback back: it is.
    pub(super) fn on_durable(
        &mut self,
        at: StreamPosition,
        callback: DurableCallback,
    ) -> Result<(), DurableCallback> {
        assert!(at.0 < self.next_sequence, "only what was appended becomes durable");
        if self.is_durable(at) {
            return Err(callback);
        }
        let first = self.batches.front().expect("not durable").sequence;
        self.batches[(at.0 - first) as usize].callbacks.push(callback);
        Ok(())
    }

    /// Ends the open batch, so that a checkpoint can lie between two. Answers where the next
    /// batch will start.
    pub(super) fn freeze(&mut self) -> StreamStart {
        self.close_batch();
        match self.cursor {
            Some(cursor) => StreamStart {
                segment: cursor.segment,
                block: cursor.block,
                generation: cursor.generation,
                segment_sequence: cursor.segment_sequence,
                sequence: self.next_sequence,
                next: cursor.next,
            },
            None => StreamStart {
                segment: self.planned.unwrap_or_default(),
                block: 1,
                generation: 0,
                segment_sequence: self.next_segment_sequence,
                sequence: self.next_sequence,
                next: None,
            },
        }
    }

    /// Where the stream ends: segment's number in the stream, block.
    pub(super) fn end(&self) -> (u64, u32) {
        match self.cursor {
            Some(cursor) => (cursor.segment_sequence, cursor.block),
            None => (self.next_segment_sequence, 1),
        }
    }

    /// The part of each queued payload that lies in `count` blocks from `place`, with its offset
    /// from `place` in blocks.
    pub(super) fn pending(
        &self,
        table: &SegmentTable,
        place: Place,
        count: u32,
        mut found: impl FnMut(u32, Bytes),
    ) {
        let Some((segment, first)) = table.geometry().locate(place) else { return };
        let end = first + count;
        for batch in self.batches.iter().filter(|batch| batch.at.segment == segment) {
            let payload = batch.at.block + 1;
            if payload >= end || payload + batch.payload_blocks <= first {
                continue;
            }
            for (offset, bytes) in &batch.payload {
                let start = payload + offset;
                let stop = start + (bytes.len() / BLOCK_SIZE) as u32;
                let (from, to) = (start.max(first), stop.min(end));
                if from < to {
                    let within =
                        (from - start) as usize * BLOCK_SIZE..(to - start) as usize * BLOCK_SIZE;
                    found(from - first, bytes.slice(within));
                }
            }
        }
    }

    /// Bytes of the queued batches.
    pub(super) fn pending_bytes(&self) -> u64 {
        let blocks = self.batches.iter().map(|batch| 1 + u64::from(batch.payload_blocks));
        blocks.sum::<u64>() * BLOCK_SIZE as u64
    }

    /// Whether a header block or payload block is one of a queued batch.
    pub(super) fn is_pending(&self, table: &SegmentTable, place: Place) -> bool {
        let Some((segment, block)) = table.geometry().locate(place) else { return false };
        self.batches.iter().any(|batch| {
            let blocks = batch.at.block..=batch.at.block + batch.payload_blocks;
            batch.at.segment == segment && blocks.contains(&block)
        })
    }
}

/// `payload` itself if it can go to the disk as it is, else a copy that can.
fn aligned(payload: Bytes, buffers: &BufferPool) -> Bytes {
    if is_block_aligned(&payload) {
        return payload;
    }
    let mut copy = buffers.get(payload.len());
    copy.copy_from_slice(&payload);
    copy.freeze()
}
