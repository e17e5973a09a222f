//! Cleaning: what lives in the emptiest segments is moved, so that they can be freed. Not on the path
//! of a write.
//!
//! The emptiest full segments that hold no retained entry and lie before the recovery start give
//! their live blocks, checksums checked, to the cold stream; the maps are told; the next checkpoint
//! makes it durable and frees the segment. A crash before that leaves the segment as it was. Who owns
//! a block is read from the batch headers of its segment, and believed only if the owner's map
//! agrees. Never waits for space or for a merge: only the keeper, which runs this, makes any.

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::{CLEANER_READ_BYTES, TRANSFER_BLOCKS_MAX};
use ballast_block::{BranchId, Payload, ReplicaId, Sequence};
use ballast_env::Env;
use ballast_env::planted::PlantedBug;
use bytes::Bytes;
use prost::Message;

use crate::entry::{self, Body, Command, WriteData};
use crate::format::batch::{Batch, BatchRecord};
use crate::map::{MapError, Move};
use crate::place::Place;
use crate::pool::shared::{Shared, count};
use crate::pool::{CheckpointError, PoolFailure};
use crate::replica::core::ReplicaInner;
use crate::replica::record::{MovedEntryV1, MovedV1};
use crate::segment::Victim;
use crate::stream::{AppendError, RecordKind, SpaceClass};
use crate::types::EntryPayload;

/// A run of moved blocks is at most this part of a segment: what does not fit the rest of one is
/// left unused.
const RUN_ONE_IN: u32 = 16;

/// What became of a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cleaned {
    /// Nothing lives in it.
    Empty,
    /// Something in it could not be moved.
    Stuck,
    /// There is no segment left to move to.
    NoSpace,
}

/// Blocks of a segment, read ahead.
struct Window {
    first: u32,
    bytes: Bytes,
}

impl<E: Env> Shared<E> {
    /// Moves what lives in a segment to the cold stream.
    pub(crate) async fn clean(&self, victim: Victim) -> Result<Cleaned, CheckpointError> {
        let segments = self.streams.segments().clone();
        let first = segments.geometry().place(victim.segment, 1);
        let _pin = self.streams.pin_segment(first);
        let mut window = Window { first: 1, bytes: Bytes::new() };
        let mut block = 1;
        while block < segments.geometry().segment_blocks && self.check().is_ok() {
            let header = segments.geometry().place(victim.segment, block);
            let Some(bytes) = self.header_at(&mut window, header, block).await else { break };
            let Ok(batch) = Batch::decode(&bytes) else { break };
            if (batch.fields.segment, batch.fields.block) != (victim.segment, block) {
                break;
            }
            for record in &batch.records {
                let place = header.plus(1 + u64::from(record.payload_first));
                if !self.clean_record(record, place).await? {
                    return Ok(Cleaned::NoSpace);
                }
            }
            block += 1 + batch.fields.payload_blocks;
        }
        self.check().map_err(CheckpointError::Pool)?;
        match segments.live_runs(victim.segment).is_empty() {
            true => Ok(Cleaned::Empty),
            false => Ok(Cleaned::Stuck),
        }
    }

    /// One block of a segment, by way of a larger read; alone where that one fails.
    async fn header_at(&self, window: &mut Window, place: Place, block: u32) -> Option<Bytes> {
        let held = |window: &Window| {
            let at = block.checked_sub(window.first)? as usize * BLOCK_SIZE;
            (at < window.bytes.len()).then(|| window.bytes.slice(at..at + BLOCK_SIZE))
        };
        if let Some(found) = held(window) {
            return Some(found);
        }
        let left = self.streams.segments().geometry().segment_blocks - block;
        for blocks in [left.min((CLEANER_READ_BYTES / BLOCK_SIZE) as u32), 1] {
            let buffer = self.streams.buffers().get(blocks as usize * BLOCK_SIZE);
            if let Ok(read) = self.streams.read_blocks(place, blocks, buffer).await {
                *window = Window { first: block, bytes: read.freeze() };
                return held(window);
            }
        }
        None
    }

    /// Moves what lives of one record's payload. Answers `false` when there is nowhere to move it.
    async fn clean_record(
        &self,
        record: &BatchRecord,
        place: Place,
    ) -> Result<bool, CheckpointError> {
        let segments = self.streams.segments();
        let blocks = record.payload_blocks;
        if (0..blocks).all(|nth| !segments.is_live(place.plus(nth.into()))) {
            return Ok(true);
        }
        let Some(replica) = self.replicas.borrow().get(&record.replica).cloned() else {
            return Ok(true);
        };
        let Some((start, crcs)) = owner_of(record) else { return Ok(true) };
        let mut nth = 0;
        while nth < blocks {
            match replica.move_run(start, &crcs, place, nth).await? {
                Some(count) => nth += count,
                None => return Ok(false),
            }
            if self.wants_merge() {
                self.merge_some().await;
            }
        }
        Ok(true)
    }
}

pub(crate) fn map_failed(replica: ReplicaId, error: &MapError) -> CheckpointError {
    CheckpointError::Map { replica, problem: error.to_string() }
}

/// The first block of the volume that a record's payload is of, and the checksums of its blocks.
fn owner_of(record: &BatchRecord) -> Option<(u64, Vec<u32>)> {
    match record.kind {
        RecordKind::Entry => {
            let entry = entry::decode(&record.body, Some(WriteData::Stored)).ok()?;
            match entry.payload {
                EntryPayload::Normal(Command { body: Body::Write { range, crcs, .. }, .. }) => {
                    Some((range.start, crcs.to_vec()))
                }
                _ => None,
            }
        }
        RecordKind::Moved => {
            let moved = MovedV1::decode(&record.body[..]).ok()?;
            Some((moved.block, moved.crcs))
        }
        RecordKind::MovedEntry => {
            let moved = MovedEntryV1::decode(&record.body[..]).ok()?;
            Some((moved.block, moved.crcs))
        }
        _ => None,
    }
    .filter(|(_, crcs)| crcs.len() == record.payload_blocks as usize)
}

/// A version of consecutive blocks whose payload lies back to back.
struct RunToMove {
    branch: BranchId,
    sequence: Sequence,
    count: u32,
    of_resync: bool,
}

impl<E: Env> ReplicaInner<E> {
    /// Moves a run of blocks that one version owns, from the `nth` of a record's payload on. Answers
    /// how many blocks it got on by; `None` when there is nowhere to move them.
    async fn move_run(
        &self,
        start: u64,
        crcs: &[u32],
        place: Place,
        nth: u32,
    ) -> Result<Option<u32>, CheckpointError> {
        let Some(run) = self.run_to_move(start, crcs.len() as u32, place, nth).await? else {
            return Ok(Some(1));
        };
        let range = nth as usize..(nth + run.count) as usize;
        let (from, block) = (place.plus(nth.into()), start + u64::from(nth));
        let read = self.read_payload(from, &crcs[range.clone()]).await;
        let (payload, bad): (Payload, _) = match read {
            Ok(read) => read,
            Err(_) => return Ok(Some(run.count)),
        };
        if !bad.is_empty() {
            // Not moved: a read or a scrub will name it and have it repaired.
            count(&self.shared.counters.damaged_blocks, bad.len() as u64);
            tracing::error!(replica = %self.descriptor.replica, %from, block, count = bad.len(),
                "blocks are damaged: their segment can't be cleaned");
            return Ok(Some(run.count));
        }
        let body = MovedV1::new(run.branch, block, run.sequence, &crcs[range.clone()]);
        let body = body.encode_to_vec();
        let to = match self.try_append_cold(SpaceClass::Cleaner, &body, payload, &crcs[range]) {
            Ok(appended) => appended.place,
            Err(AppendError::OutOfSpace { .. }) => return Ok(None),
            Err(AppendError::PoolFailed(failed)) => return Err(PoolFailure::from(failed).into()),
        };
        let segments = self.shared.streams.segments();
        if self.shared.streams.env().is_planted(PlantedBug::LiveBlockFreed) {
            segments.mark_dead(from, 1);
        }
        let mut moves = Vec::with_capacity(run.count as usize);
        for offset in 0..u64::from(run.count) {
            let (from, to) = (from.plus(offset), to.plus(offset));
            // It may have died while it was copied.
            if !segments.is_live(from) {
                segments.mark_dead(to, 1);
                continue;
            }
            let (branch, sequence) = (run.branch, run.sequence);
            moves.push(Move { block: block + offset, branch, sequence, from, to });
        }
        count(&self.shared.counters.cleaner_bytes_moved, (moves.len() * BLOCK_SIZE) as u64);
        match &*self.resync.borrow() {
            Some(resync) if run.of_resync => resync.map.relocate(&moves),
            _ => self.map.borrow().relocate(&moves),
        }
        self.note_delta();
        Ok(Some(run.count))
    }

    /// The longest run, from the `nth` block of a payload on, that one version of one map owns.
    async fn run_to_move(
        &self,
        start: u64,
        blocks: u32,
        place: Place,
        nth: u32,
    ) -> Result<Option<RunToMove>, CheckpointError> {
        let mut run: Option<RunToMove> = None;
        let most = self.shared.streams.segments().geometry().segment_blocks / RUN_ONE_IN;
        for at in nth..blocks.min(nth + most.min(TRANSFER_BLOCKS_MAX as u32)) {
            let owner = self.owner(start + u64::from(at), place.plus(at.into())).await?;
            match (owner, &mut run) {
                (Some((branch, sequence, of_resync)), None) => {
                    run = Some(RunToMove { branch, sequence, count: 1, of_resync });
                }
                (Some(owner), Some(run)) if owner == (run.branch, run.sequence, run.of_resync) => {
                    run.count += 1;
                }
                _ => break,
            }
        }
        Ok(run)
    }

    /// Which version owns the payload at `place`, and whether it is one of a resync.
    async fn owner(
        &self,
        block: u64,
        place: Place,
    ) -> Result<Option<(BranchId, Sequence, bool)>, CheckpointError> {
        if !self.shared.streams.segments().is_live(place) {
            return Ok(None);
        }
        let failed = |error: MapError| map_failed(self.descriptor.replica, &error);
        let held = self.map().holds(block, place).await.inspect_err(|e| self.note_map_damage(e));
        if let Some((branch, sequence)) = held.map_err(failed)? {
            return Ok(Some((branch, sequence, false)));
        }
        let Some(resync) = self.resync.borrow().clone() else { return Ok(None) };
        let held = resync.map.holds(block, place).await.map_err(failed)?;
        Ok(held.map(|(branch, sequence)| (branch, sequence, true)))
    }
}
