//! The streams of an open pool. Write path: step 5 (append).
//!
//! Owns the writers (one write in flight per stream), the durable watermark, reads of blocks, and
//! the pool's failure. Never decides what a record means; never retries a write (hazard 22).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::buffer::BufferPool;
use ballast_block::limits::{
    DISK_WRITE_OVERDUE_MS, DISK_WRITE_OVERDUE_STEP_MS, STREAM_SEAL_IDLE_MS,
};
use ballast_block::{AlignedBuf, BLOCK_SIZE};
use ballast_env::Env;
use ballast_env::disk::{Disk, File};
use ballast_env::spawn::OwnedTask;
use bytes::Bytes;
use thiserror::Error;
use tokio::sync::{Notify, oneshot, watch};

use super::open::PoolInfo;
use super::queue::{DiskWrite, DurableCallback, Queue, QueueStart, StreamStats};
use super::record::{
    AppendError, Appended, PoolFailed, RecordHead, SpaceClass, StreamId, StreamPosition,
};
use super::votes::VoteWriter;
use crate::format::superblock::Superblock;
use crate::place::Place;
use crate::segment::{SegmentPin, SegmentTable};

/// A block could not be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReadError {
    /// The disk answered with an error. The data may be fetched from a peer.
    #[error("can't read {count} blocks at {place}: {problem}")]
    Disk {
        /// First block.
        place: Place,
        /// Number of blocks.
        count: u32,
        /// The disk's answer.
        problem: String,
    },
    /// The pool has failed and these blocks were not durable.
    #[error(transparent)]
    PoolFailed(#[from] PoolFailed),
}

/// The streams of an open pool. A cheap handle: clones share everything. The writers end with the
/// last one.
pub struct StreamSet<E: Env> {
    shared: Rc<Shared<E>>,
    _writers: Rc<Vec<OwnedTask>>,
}

impl<E: Env> Clone for StreamSet<E> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), _writers: self._writers.clone() }
    }
}

/// What the handles and the writers share.
pub(super) struct Shared<E: Env> {
    pub(super) env: E,
    pub(super) file: <E as Disk>::File,
    pub(super) info: PoolInfo,
    pub(super) buffers: BufferPool,
    pub(super) table: Rc<SegmentTable>,
    streams: [Stream; 3],
    failed: watch::Sender<Option<PoolFailed>>,
    /// As both copies on disk stand.
    pub(super) superblock: RefCell<Superblock>,
    /// One change of the superblocks at a time.
    pub(super) superblock_writes: tokio::sync::Mutex<()>,
    /// A checkpoint is being written.
    pub(super) committing: Cell<bool>,
    pub(super) votes: VoteWriter,
}

struct Stream {
    id: StreamId,
    queue: RefCell<Queue>,
    wake: Notify,
}

impl<E: Env> StreamSet<E> {
    pub(super) fn start(
        env: E,
        file: <E as Disk>::File,
        info: PoolInfo,
        table: SegmentTable,
        superblock: Superblock,
        starts: [QueueStart; 3],
    ) -> Self {
        let blocks = info.geometry.segment_blocks;
        let mut starts = starts.into_iter();
        let streams = StreamId::ALL.map(|id| {
            let start = starts.next().expect("one per stream");
            let queue = RefCell::new(Queue::new(id, info.pool, blocks, start));
            Stream { id, queue, wake: Notify::new() }
        });
        let shared = Rc::new(Shared {
            env: env.clone(),
            file,
            info,
            buffers: BufferPool::default(),
            table: Rc::new(table),
            streams,
            failed: watch::Sender::new(None),
            superblock: RefCell::new(superblock),
            superblock_writes: tokio::sync::Mutex::new(()),
            committing: Cell::new(false),
            votes: VoteWriter::default(),
        });
        let writers = StreamId::ALL.map(|id| OwnedTask(env.spawn(write_all(shared.clone(), id))));
        Self { shared, _writers: Rc::new(writers.into()) }
    }

    pub(super) fn shared(&self) -> &Rc<Shared<E>> {
        &self.shared
    }

    /// What the pool is.
    pub fn info(&self) -> &PoolInfo {
        &self.shared.info
    }

    /// The environment.
    pub fn env(&self) -> &E {
        &self.shared.env
    }

    /// The buffers of this pool's shard.
    pub fn buffers(&self) -> &BufferPool {
        &self.shared.buffers
    }

    /// The segments: live blocks, retained entries, free space, victims for the cleaner.
    pub fn segments(&self) -> &Rc<SegmentTable> {
        &self.shared.table
    }

    /// Queues a record and answers where it will lie. The payload, whole blocks, is not copied if
    /// it is block-aligned in memory; its blocks are live from now on. `crcs`: one CRC-32 per
    /// block of payload, or empty to have them taken here.
    ///
    /// # Errors
    /// [`AppendError`]; nothing was queued.
    ///
    /// # Panics
    /// When body or payload are longer than the limits allow, or not whole blocks.
    pub fn append(
        &self,
        stream: StreamId,
        class: SpaceClass,
        record: RecordHead<'_>,
        payload: Option<Bytes>,
        crcs: &[u32],
    ) -> Result<Appended, AppendError> {
        self.shared.check_failed()?;
        let stream = self.shared.stream(stream);
        let (table, buffers) = (&self.shared.table, &self.shared.buffers);
        let appended =
            stream.queue.borrow_mut().append(table, buffers, class, &record, payload, crcs)?;
        stream.wake.notify_one();
        Ok(appended)
    }

    /// Calls `callback` once when everything up to and including batch `at` is durable, or the
    /// pool has failed. Callbacks of one stream are called in the order of their batches; at once
    /// if the answer is known.
    pub fn on_durable(&self, stream: StreamId, at: StreamPosition, callback: DurableCallback) {
        let stream = self.shared.stream(stream);
        if stream.queue.borrow().is_durable(at) {
            return callback(Ok(()));
        }
        if let Err(failed) = self.shared.check_failed() {
            return callback(Err(failed));
        }
        let known = stream.queue.borrow_mut().on_durable(at, callback);
        assert!(known.is_ok(), "not durable, as was just seen");
    }

    /// Returns when everything up to and including batch `at` is durable.
    ///
    /// # Errors
    /// [`PoolFailed`].
    pub async fn durable(&self, stream: StreamId, at: StreamPosition) -> Result<(), PoolFailed> {
        let (send, receive) = oneshot::channel();
        let callback = move |result| {
            // Who waits may have gone.
            let _gone = send.send(result);
        };
        self.on_durable(stream, at, Box::new(callback));
        receive.await.unwrap_or_else(|_| Err(closed()))
    }

    /// The batch of the last appended record of a stream.
    pub fn position(&self, stream: StreamId) -> StreamPosition {
        self.shared.stream(stream).queue.borrow().last()
    }

    /// Whether the block lies at or below its stream's durable watermark (hazard F7).
    pub fn is_durable(&self, place: Place) -> bool {
        let table = &self.shared.table;
        !self.shared.streams.iter().any(|stream| stream.queue.borrow().is_pending(table, place))
    }

    /// The payload of `count` blocks at `place` while it is above the durable watermark and lies
    /// in one record.
    pub fn pending_payload(&self, place: Place, count: u32) -> Option<Bytes> {
        let mut whole = None;
        self.shared.pending(place, count, |offset, bytes| {
            if offset == 0 && bytes.len() == count as usize * BLOCK_SIZE {
                whole = Some(bytes);
            }
        });
        whole
    }

    /// Fills `buffer` with `count` blocks from `place`: from the disk, and above the durable
    /// watermark from memory. Checks no checksum. The segment stays until it is done.
    ///
    /// # Errors
    /// [`ReadError`].
    ///
    /// # Panics
    /// When the buffer is smaller than `count` blocks.
    pub async fn read_blocks(
        &self,
        place: Place,
        count: u32,
        mut buffer: AlignedBuf,
    ) -> Result<AlignedBuf, ReadError> {
        let length = count as usize * BLOCK_SIZE;
        buffer.set_len(length);
        let _pin = self.pin_segment(place);
        let mut pending = Vec::new();
        self.shared.pending(place, count, |offset, bytes| pending.push((offset, bytes)));
        // A run that crosses the watermark starts below it.
        let on_disk = pending.iter().map(|(offset, _)| *offset).min().unwrap_or(count);
        if on_disk > 0 {
            buffer.set_len(on_disk as usize * BLOCK_SIZE);
            let (result, read) = self.shared.file.read_at(place.offset(), buffer).await;
            buffer = read;
            buffer.set_len(length);
            let problem = |error: std::io::Error| ReadError::Disk {
                place,
                count: on_disk,
                problem: error.to_string(),
            };
            result.map_err(problem)?;
        }
        for (offset, bytes) in pending {
            let start = offset as usize * BLOCK_SIZE;
            buffer[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(buffer)
    }

    /// Keeps the segment of `place` from being reused until the pin is dropped.
    pub fn pin_segment(&self, place: Place) -> SegmentPin {
        self.shared.table.pin(place)
    }

    /// Turns `Some` when the pool fails.
    pub fn failure(&self) -> watch::Receiver<Option<PoolFailed>> {
        self.shared.failed.subscribe()
    }

    /// Counters of a stream since the pool was opened.
    pub fn stats(&self, stream: StreamId) -> StreamStats {
        self.shared.stream(stream).queue.borrow().stats
    }

    /// What is appended and not yet durable, in all streams, in bytes.
    pub fn pending_bytes(&self) -> u64 {
        let queued = |stream: &Stream| stream.queue.borrow().pending_bytes();
        self.shared.streams.iter().map(queued).sum()
    }

    /// Returns when everything appended so far is durable, in all streams.
    ///
    /// # Errors
    /// [`PoolFailed`].
    pub async fn flush(&self) -> Result<(), PoolFailed> {
        for stream in StreamId::ALL {
            self.durable(stream, self.position(stream)).await?;
        }
        Ok(())
    }

    /// Stops the pool: appends and waiters answer an error from now on. What is not durable may
    /// be lost; [`StreamSet::flush`] goes before.
    pub fn close(&self) {
        self.shared.fail(closed());
    }
}

pub(super) fn closed() -> PoolFailed {
    PoolFailed { operation: "close".into(), problem: "the pool was closed".into() }
}

impl<E: Env> Shared<E> {
    fn stream(&self, id: StreamId) -> &Stream {
        self.streams.iter().find(|stream| stream.id == id).expect("all three exist")
    }

    pub(super) fn queue(&self, id: StreamId) -> &RefCell<Queue> {
        &self.stream(id).queue
    }

    fn pending(&self, place: Place, count: u32, mut found: impl FnMut(u32, Bytes)) {
        for stream in &self.streams {
            stream.queue.borrow().pending(&self.table, place, count, &mut found);
        }
    }

    pub(super) fn check_failed(&self) -> Result<(), PoolFailed> {
        match &*self.failed.borrow() {
            Some(failed) => Err(failed.clone()),
            None => Ok(()),
        }
    }

    /// The pool takes no more writes; everyone who waits hears it, in order.
    pub(super) fn fail(&self, failed: PoolFailed) {
        if self.check_failed().is_err() {
            return;
        }
        self.failed.send_replace(Some(failed.clone()));
        for stream in &self.streams {
            let callbacks = stream.queue.borrow_mut().fail();
            callbacks.into_iter().for_each(|callback| callback(Err(failed.clone())));
            stream.wake.notify_one();
        }
    }

    /// One durable write. An error, or no answer in time, fails the pool.
    pub(super) async fn write(
        &self,
        what: &str,
        place: Place,
        parts: Vec<Bytes>,
    ) -> Result<(), PoolFailed> {
        self.check_failed()?;
        let result = tokio::select! {
            biased;
            result = self.file.write_at(place.offset(), parts) => {
                result.map_err(|error| error.to_string())
            }
            () = self.overdue() => Err(format!("no answer in {DISK_WRITE_OVERDUE_MS} ms")),
        };
        if let Err(problem) = result {
            let operation = format!("write of the {what} at {place}");
            self.fail(PoolFailed { operation, problem });
        }
        self.check_failed()
    }
}

impl<E: Env> Shared<E> {
    /// Returns when a write begun now has had its time. Only time in which this process ran
    /// counts: it may have been stopped (SIGSTOP, a paused machine) while the disk answered, and
    /// one stop costs one step at most.
    async fn overdue(&self) {
        for _ in 0..DISK_WRITE_OVERDUE_MS / DISK_WRITE_OVERDUE_STEP_MS {
            self.env.sleep(Duration::from_millis(DISK_WRITE_OVERDUE_STEP_MS)).await;
        }
    }
}

/// The writer of one stream.
async fn write_all<E: Env>(shared: Rc<Shared<E>>, id: StreamId) {
    let stream = shared.stream(id);
    let took = (id == StreamId::Hot)
        .then(|| metrics::histogram!("ballast_stage_seconds", "stage" => "disk"));
    // A proof for what recovery accepted, too: the first write after an open names it.
    let mut unproven = false;
    while shared.check_failed().is_ok() {
        let write = stream.queue.borrow_mut().take_write(&shared.table);
        let Some(write) = write else {
            idle(&shared, stream, unproven).await;
            continue;
        };
        let DiskWrite { place, parts, last, is_seal, .. } = write;
        let start = shared.env.now();
        if shared.write(&id.to_string(), place, parts).await.is_err() {
            return;
        }
        if let Some(took) = &took {
            took.record(shared.env.now().since(start).as_secs_f64());
        }
        unproven = id == StreamId::Hot && !is_seal;
        let callbacks = stream.queue.borrow_mut().written(last);
        callbacks.into_iter().for_each(|callback| callback(Ok(())));
    }
}

/// Waits for something to write; makes a seal if nothing comes and the last write is unproven.
async fn idle<E: Env>(shared: &Shared<E>, stream: &Stream, unproven: bool) {
    if !unproven {
        return stream.wake.notified().await;
    }
    tokio::select! {
        biased;
        () = stream.wake.notified() => {}
        () = shared.env.sleep(Duration::from_millis(STREAM_SEAL_IDLE_MS)) => {
            let mut queue = stream.queue.borrow_mut();
            if queue.is_empty() {
                queue.append_seal(&shared.table, &shared.buffers);
            }
        }
    }
}
