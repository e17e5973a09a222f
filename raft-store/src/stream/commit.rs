//! Checkpoints, as far as the store knows them: a body of opaque bytes beside the table of
//! segments, made valid by the superblocks.
//!
//! Owns the order (hazards F3, F7): durable streams, body, both superblocks, and only then are
//! segments freed.

use ballast_block::limits::RECOVERY_READ_BYTES;
use ballast_block::{AlignedBuf, BLOCK_SIZE};
use ballast_env::Env;
use ballast_env::planted::PlantedBug;
use bytes::Bytes;
use thiserror::Error;
use tokio::sync::oneshot;

use super::record::{PoolFailed, SpaceClass, StreamId, StreamPosition};
use super::set::{Shared, StreamSet, closed};
use crate::format::SegmentNumber;
use crate::format::create::encoded;
use crate::format::geometry::SUPERBLOCK_OFFSETS;
use crate::format::segment_header::{SegmentHeader, SegmentUse};
use crate::format::superblock::{
    CHECKPOINT_SEGMENTS_MAX, CheckpointBody, Lineage, StreamStart, Superblock,
};
use crate::place::Place;
use crate::segment::{FrozenTable, SegmentState};

/// The store as it was at one moment, between two batches.
#[derive(Clone, Debug)]
pub struct FrozenSegments {
    table: FrozenTable,
    starts: [StreamStart; 3],
    /// Last batch before the freeze, by stream.
    last: [StreamPosition; 3],
}

/// A checkpoint was not made. The one before it stays valid.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CommitCheckpointError {
    /// The body needs more segments than the checkpoint's reserve has.
    #[error("no {needed} free segments for the body of a checkpoint: give the node more space")]
    OutOfSpace {
        /// Segments needed.
        needed: usize,
    },
    /// The body is longer than a superblock can point to.
    #[error("body of {bytes} bytes is too long for a checkpoint of this pool")]
    TooLong {
        /// Its length in bytes.
        bytes: u64,
    },
    /// The pool failed.
    #[error(transparent)]
    PoolFailed(#[from] PoolFailed),
}

/// What a checkpoint did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Its number.
    pub checkpoint: u64,
    /// Bytes of its body.
    pub bytes: u64,
    /// Segments that it freed.
    pub freed: usize,
}

impl<E: Env> StreamSet<E> {
    /// Captures the streams and segments at this moment. The caller captures its own state in the
    /// same breath, without an await in between.
    pub fn freeze(&self) -> FrozenSegments {
        let shared = self.shared();
        let starts = StreamId::ALL.map(|stream| shared.queue(stream).borrow_mut().freeze());
        let last = StreamId::ALL.map(|stream| self.position(stream));
        FrozenSegments { table: shared.table.begin_checkpoint(), starts, last }
    }

    /// Waits until everything appended before a freeze is durable: nothing that a checkpoint
    /// covers may be less durable than it (hazard F7).
    ///
    /// # Errors
    /// [`PoolFailed`].
    pub async fn frozen_durable(&self, frozen: &FrozenSegments) -> Result<(), PoolFailed> {
        if self.env().is_planted(PlantedBug::EarlyCheckpoint) {
            return Ok(());
        }
        for (stream, last) in StreamId::ALL.into_iter().zip(frozen.last) {
            self.durable(stream, last).await?;
        }
        Ok(())
    }

    /// Makes a checkpoint of `frozen` with `body`, which describes the caller's state at the same
    /// moment and may refer to pages appended to the meta stream until now. Then frees what
    /// nothing durable refers to any more. Goes on to its end if the future is dropped.
    ///
    /// # Errors
    /// [`CommitCheckpointError`]; the checkpoint before stays valid.
    ///
    /// # Panics
    /// When another one is being made.
    pub async fn commit_checkpoint(
        &self,
        frozen: FrozenSegments,
        body: Vec<Bytes>,
    ) -> Result<Committed, CommitCheckpointError> {
        let shared = self.shared();
        shared.check_failed()?;
        assert!(!shared.committing.replace(true), "one checkpoint at a time");
        let (send, receive) = oneshot::channel();
        let streams = self.clone();
        shared.env.spawn(async move {
            let result = streams.commit(frozen, body).await;
            streams.shared().committing.set(false);
            // Who asked may have gone.
            let _gone = send.send(result);
        });
        receive.await.unwrap_or_else(|_| Err(closed().into()))
    }

    async fn commit(
        &self,
        mut frozen: FrozenSegments,
        body: Vec<Bytes>,
    ) -> Result<Committed, CommitCheckpointError> {
        let shared = self.shared();
        self.frozen_durable(&frozen).await?;
        let meta = self.position(StreamId::Meta);
        shared.table.renew_meta(&mut frozen.table);
        let replayed_from = frozen.starts[0].segment_sequence;
        let unreferenced = frozen.table.drop_unreferenced(replayed_from);
        self.durable(StreamId::Meta, meta).await?;

        let mut table = vec![0; 8];
        frozen.table.encode(&mut table);
        let length = (table.len() - 8) as u64;
        table[..8].copy_from_slice(&length.to_le_bytes());
        let pieces: Vec<Bytes> = [Bytes::from(table)].into_iter().chain(body).collect();

        let segments = allocate(shared, &pieces)?;
        let written = write_body(shared, self.checkpoint() + 1, &segments, &pieces).await;
        let (length, crc) = match written {
            Ok(written) => written,
            Err(failed) => {
                segments.iter().for_each(|&segment| shared.table.give_back(segment));
                return Err(failed.into());
            }
        };
        let body = CheckpointBody { segments, length, crc };
        let old = self
            .rewrite_superblocks(|superblock| {
                superblock.checkpoint += 1;
                superblock.starts = frozen.starts;
                superblock.body = body;
            })
            .await?;
        let committed = old.checkpoint + 1;
        old.body.segments.iter().for_each(|&segment| shared.table.give_back(segment));
        let freed = shared.table.free_all(&unreferenced, replayed_from);
        Ok(Committed { checkpoint: committed, bytes: length, freed })
    }

    /// Changes both superblocks, durably; answers what was there before. One change at a time.
    async fn rewrite_superblocks(
        &self,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<Superblock, PoolFailed> {
        let shared = self.shared();
        let _one = shared.superblock_writes.lock().await;
        let mut superblock = shared.superblock.borrow().clone();
        change(&mut superblock);
        superblock.generation += 1;
        write_superblocks(shared, &superblock).await?;
        Ok(shared.superblock.replace(superblock))
    }

    /// The marks that tell this pool's past from any other (hazard F5).
    pub fn lineage(&self) -> Lineage {
        self.shared().superblock.borrow().lineage
    }

    /// Notes durably that the cluster has accepted this start with the mark that it offered.
    ///
    /// # Errors
    /// [`PoolFailed`].
    pub async fn settle_lineage(&self) -> Result<(), PoolFailed> {
        let boot = self.info().boot_counter;
        let settle = |superblock: &mut Superblock| {
            superblock.lineage.settled = superblock.lineage.offered;
            superblock.lineage.settled_boot = boot;
        };
        self.rewrite_superblocks(settle).await.map(drop)
    }

    /// Number of the last durable checkpoint; 0 = none yet.
    pub fn checkpoint(&self) -> u64 {
        self.shared().superblock.borrow().checkpoint
    }

    /// Where the hot stream ends, in bytes of whole segments since the pool was made.
    pub fn hot_position(&self) -> u64 {
        let shared = self.shared();
        let (segment, block) = shared.queue(StreamId::Hot).borrow().end();
        (segment * u64::from(shared.info.geometry.segment_blocks) + u64::from(block))
            * BLOCK_SIZE as u64
    }

    /// Bytes of the hot stream that recovery would read if the pool were opened now, at most.
    pub fn log_since_checkpoint(&self) -> u64 {
        let shared = self.shared();
        let start = shared.superblock.borrow().starts[0];
        let now = shared.queue(StreamId::Hot).borrow().end();
        let segments = now.0.saturating_sub(start.segment_sequence);
        let blocks = u64::from(shared.info.geometry.segment_blocks);
        (segments * blocks + u64::from(now.1)).saturating_sub(u64::from(start.block))
            * BLOCK_SIZE as u64
    }
}

fn allocate<E: Env>(
    shared: &Shared<E>,
    pieces: &[Bytes],
) -> Result<Vec<SegmentNumber>, CommitCheckpointError> {
    let bytes: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
    let room = shared.info.geometry.segment_bytes() - BLOCK_SIZE as u64;
    let needed = bytes.div_ceil(room) as usize;
    if needed > CHECKPOINT_SEGMENTS_MAX {
        return Err(CommitCheckpointError::TooLong { bytes });
    }
    let mut segments = Vec::with_capacity(needed);
    while segments.len() < needed {
        let state = SegmentState::Checkpoint;
        match shared.table.allocate(SpaceClass::Checkpoint, state) {
            Some(segment) => segments.push(segment),
            None => {
                segments.iter().for_each(|&segment| shared.table.give_back(segment));
                return Err(CommitCheckpointError::OutOfSpace { needed });
            }
        }
    }
    Ok(segments)
}

/// Writes the pieces back to back; answers their length and checksum.
async fn write_body<E: Env>(
    shared: &Shared<E>,
    checkpoint: u64,
    segments: &[SegmentNumber],
    pieces: &[Bytes],
) -> Result<(u64, u32), PoolFailed> {
    let mut hasher = crc32fast::Hasher::new();
    let mut length = 0;
    let mut input = Pieces { pieces, at: 0 };
    let geometry = shared.info.geometry;
    for (number, &segment) in segments.iter().enumerate() {
        let header = body_header(shared, checkpoint, segment, number as u64, segments);
        shared.write("checkpoint", geometry.place(segment, 0), vec![header]).await?;
        let mut block = 1;
        while block < geometry.segment_blocks && !input.is_empty() {
            let most = (RECOVERY_READ_BYTES / BLOCK_SIZE) as u32;
            let blocks = most.min(geometry.segment_blocks - block) as usize;
            let mut buffer = shared.buffers.get(blocks * BLOCK_SIZE);
            let used = input.fill(&mut buffer);
            hasher.update(&buffer[..used]);
            length += used as u64;
            let padded = used.next_multiple_of(BLOCK_SIZE);
            buffer[used..padded].fill(0);
            buffer.set_len(padded);
            let place = geometry.place(segment, block);
            shared.write("checkpoint", place, vec![buffer.freeze()]).await?;
            block += (padded / BLOCK_SIZE) as u32;
        }
    }
    Ok((length, hasher.finalize()))
}

struct Pieces<'a> {
    pieces: &'a [Bytes],
    at: usize,
}

impl Pieces<'_> {
    fn is_empty(&self) -> bool {
        self.pieces.iter().map(Bytes::len).sum::<usize>() == self.at
    }

    /// Fills the buffer from its start; answers how much there was.
    fn fill(&mut self, buffer: &mut [u8]) -> usize {
        let mut used = 0;
        while used < buffer.len() {
            let Some(piece) = self.pieces.first() else { break };
            let rest = &piece[self.at..];
            let take = rest.len().min(buffer.len() - used);
            buffer[used..used + take].copy_from_slice(&rest[..take]);
            used += take;
            self.at += take;
            if self.at == piece.len() {
                (self.pieces, self.at) = (&self.pieces[1..], 0);
            }
        }
        used
    }
}

/// Tells what the segment is to whoever looks at the bare disk.
fn body_header<E: Env>(
    shared: &Shared<E>,
    checkpoint: u64,
    segment: SegmentNumber,
    number: u64,
    segments: &[SegmentNumber],
) -> Bytes {
    let header = SegmentHeader {
        pool: shared.info.pool,
        used_for: SegmentUse::Checkpoint,
        segment,
        next: segments.get(number as usize + 1).copied(),
        generation: shared.table.next_generation(),
        segment_sequence: number,
        first_sequence: checkpoint,
        segment_blocks: shared.info.geometry.segment_blocks,
        previous: Vec::new(),
    };
    let mut block = AlignedBuf::zeroed(BLOCK_SIZE);
    header.encode(&mut block);
    block.freeze()
}

/// Both copies, one after the other: only then is the older checkpoint given up.
async fn write_superblocks<E: Env>(
    shared: &Shared<E>,
    superblock: &Superblock,
) -> Result<(), PoolFailed> {
    let block = encoded(superblock);
    // Which one goes first alternates: both are equally good before.
    let first = (superblock.generation % 2) as usize;
    for copy in [first, 1 - first] {
        let place = Place::from_offset(SUPERBLOCK_OFFSETS[copy]);
        shared.write("superblock", place, vec![block.clone()]).await?;
    }
    Ok(())
}
