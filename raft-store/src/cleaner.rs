//! The keeper of a pool: merges map changes, makes checkpoints, cleans segments. Not on the path of a
//! write.
//!
//! Cleaning: the emptiest full segments that hold no retained entry and lie before the recovery
//! start give their live blocks, checksums checked, to the cold stream; the maps are told; the next
//! checkpoint makes it durable and frees the segment. A crash before that leaves the segment as it
//! was. Who owns a block is read from the batch headers of its segment, and believed only if the
//! owner's map agrees.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::{
    CHECKPOINT_LOG_BYTES, CLEANER_VICTIM_LIVE_PERCENT_MAX, KEEPER_PERIOD_MS, MAP_DELTA_BYTES_MAX,
    MAP_DIRTY_BYTES_MAX, TRANSFER_BLOCKS_MAX,
};
use ballast_block::{BranchId, Payload, ReplicaId, Sequence};
use ballast_env::Env;
use ballast_env::planted::PlantedBug;
use prost::Message;

use crate::entry::{self, Body, Command, WriteData};
use crate::format::SegmentNumber;
use crate::format::batch::{Batch, BatchRecord};
use crate::map::{MapError, Move, ROOT_BRANCH};
use crate::place::Place;
use crate::pool::shared::{Shared, count};
use crate::pool::{CheckpointError, PoolFailure};
use crate::replica::core::{Map, ReplicaInner};
use crate::replica::record::{MovedEntryV1, MovedV1};
use crate::segment::Victim;
use crate::stream::RecordKind;
use crate::types::EntryPayload;

/// Segments emptied between two checkpoints, at most: what they free is free only after it.
const VICTIMS_AT_ONCE: usize = 4;

/// Runs until the pool stops.
pub(crate) async fn keep<E: Env>(shared: Rc<Shared<E>>) {
    // Victims that could not be emptied, with what lived in them: not tried again until it changes.
    let mut stuck: BTreeSet<(SegmentNumber, u32)> = BTreeSet::new();
    let env = shared.streams.env().clone();
    while shared.check().is_ok() {
        match shared.keep_once(&mut stuck).await {
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "pool housekeeping failed"),
        }
        tokio::select! {
            biased;
            () = shared.work.notified() => {}
            () = env.sleep(Duration::from_millis(KEEPER_PERIOD_MS)) => {}
        }
    }
}

impl<E: Env> Shared<E> {
    /// Does what is most urgent; answers whether there may be more.
    async fn keep_once(
        self: &Rc<Self>,
        stuck: &mut BTreeSet<(SegmentNumber, u32)>,
    ) -> Result<bool, CheckpointError> {
        if self.delta_bytes.get() > MAP_DELTA_BYTES_MAX / 2 && self.merge_some().await {
            return Ok(true);
        }
        if self.wants_checkpoint() {
            self.checkpoint().await?;
            return Ok(true);
        }
        if self.is_short() {
            return self.make_space(stuck).await;
        }
        stuck.clear();
        Ok(false)
    }

    /// Whether log or dirty map pages have grown to where a checkpoint is due.
    pub fn wants_checkpoint(&self) -> bool {
        let dirty = || self.all().iter().map(|one| one.map().dirty_bytes()).sum::<usize>();
        self.streams.log_since_checkpoint() >= CHECKPOINT_LOG_BYTES
            || !self.abandoned.borrow().is_empty()
            || dirty() >= MAP_DIRTY_BYTES_MAX
    }

    /// Whether free space is so little that cleaning pays.
    pub fn is_short(&self) -> bool {
        let counts = self.streams.segments().counts();
        // A quarter: leaders stop at a sixteenth of the pool's bytes, counted as what surely fits,
        // which is an eighth of its segments when those are small. Cleaning must start well before,
        // or nothing would ever make room again.
        counts.free_normal < (counts.total / 4).max(VICTIMS_AT_ONCE as u32)
    }

    /// Frees segments: first by what is dead already, then by moving what lives.
    async fn make_space(
        self: &Rc<Self>,
        stuck: &mut BTreeSet<(SegmentNumber, u32)>,
    ) -> Result<bool, CheckpointError> {
        let before = self.streams.segments().counts().free;
        if let Err(error) = self.merge_all(0).await {
            tracing::error!(%error, "a map can't be merged: its dead blocks stay taken");
        }
        self.checkpoint().await?;
        if !self.is_short() {
            return Ok(true);
        }
        let most = self.streams.segments().geometry().segment_blocks / 100
            * CLEANER_VICTIM_LIVE_PERCENT_MAX;
        let victims = self.streams.segments().victims(VICTIMS_AT_ONCE + stuck.len());
        let mut moved = false;
        for victim in victims.into_iter().filter(|victim| victim.live_blocks <= most) {
            let key = (victim.segment, victim.live_blocks);
            if stuck.contains(&key) {
                continue;
            }
            match self.clean(victim).await {
                Ok(true) => {
                    moved = true;
                    count(&self.counters.cleaner_segments, 1);
                }
                Ok(false) | Err(CheckpointError::Map { .. }) => _ = stuck.insert(key),
                Err(error) => return Err(error),
            }
        }
        if moved {
            self.checkpoint().await?;
        }
        Ok(moved || self.streams.segments().counts().free > before)
    }

    /// Merges part of the map with the most unmerged changes that can be merged. Answers whether
    /// one was.
    async fn merge_some(&self) -> bool {
        let mut replicas = self.all();
        replicas.sort_by_key(|one| std::cmp::Reverse(one.delta_bytes.get()));
        for replica in replicas.into_iter().filter(|one| one.delta_bytes.get() > 0) {
            match replica.merge(replica.delta_bytes.get() / 2).await {
                Ok(()) => {
                    self.merged.notify_waiters();
                    return true;
                }
                Err(error) => tracing::error!(%error, "a map can't be merged"),
            }
        }
        false
    }

    /// Merges every map down to `target` bytes. One that can't be merged does not keep the others
    /// from it.
    pub async fn merge_all(&self, target: usize) -> Result<(), CheckpointError> {
        let mut outcome = Ok(());
        for replica in self.all() {
            outcome = outcome.and(replica.merge(target).await);
        }
        self.merged.notify_waiters();
        outcome
    }

    /// Frees all that abandoned maps refer to. Part of a checkpoint, before its freeze: one that
    /// knows such a map no more knows its space as free.
    pub async fn wipe_abandoned(&self) -> Result<(), PoolFailure> {
        loop {
            let Some(map) = self.abandoned.borrow_mut().pop() else { return Ok(()) };
            if let Err(error) = wipe(&map).await {
                self.check()?;
                // A damaged page: what only it knew of stays taken.
                tracing::error!(%error, "space of a dropped map is lost");
            }
        }
    }

    /// Moves what lives in a segment to the cold stream. Answers whether all of it moved.
    async fn clean(&self, victim: Victim) -> Result<bool, CheckpointError> {
        let segments = self.streams.segments().clone();
        let first = segments.geometry().place(victim.segment, 1);
        let _pin = self.streams.pin_segment(first);
        let mut block = 1;
        while block < segments.geometry().segment_blocks && self.check().is_ok() {
            let header = segments.geometry().place(victim.segment, block);
            let buffer = self.streams.buffers().get(BLOCK_SIZE);
            let Ok(bytes) = self.streams.read_blocks(header, 1, buffer).await else { break };
            let Ok(batch) = Batch::decode(&bytes.freeze()) else { break };
            if (batch.fields.segment, batch.fields.block) != (victim.segment, block) {
                break;
            }
            for record in &batch.records {
                let place = header.plus(1 + u64::from(record.payload_first));
                self.clean_record(record, place).await?;
            }
            block += 1 + batch.fields.payload_blocks;
        }
        self.check().map_err(CheckpointError::Pool)?;
        Ok(segments.live_runs(victim.segment).is_empty())
    }

    /// Moves what lives of one record's payload.
    async fn clean_record(
        &self,
        record: &BatchRecord,
        place: Place,
    ) -> Result<(), CheckpointError> {
        let segments = self.streams.segments();
        let blocks = record.payload_blocks;
        if (0..blocks).all(|nth| !segments.is_live(place.plus(nth.into()))) {
            return Ok(());
        }
        let Some(replica) = self.replicas.borrow().get(&record.replica).cloned() else {
            return Ok(());
        };
        let Some((start, crcs)) = owner_of(record) else { return Ok(()) };
        let mut nth = 0;
        while nth < blocks {
            nth += replica.move_run(start, &crcs, place, nth).await?;
        }
        Ok(())
    }
}

fn map_failed(replica: ReplicaId, error: &MapError) -> CheckpointError {
    CheckpointError::Map { replica, problem: error.to_string() }
}

async fn wipe<E: Env>(map: &Map<E>) -> Result<(), MapError> {
    map.retire_branch(ROOT_BRANCH);
    map.merge(0).await?;
    // Its pages are reported as free by a root that does without them.
    map.write_frozen(map.freeze()).await?;
    Ok(())
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
    async fn merge(&self, target: usize) -> Result<(), CheckpointError> {
        let id = self.descriptor.replica;
        let merged = self.map().merge(target).await;
        self.note_delta();
        merged.map_err(|error| {
            self.note_map_damage(&error);
            map_failed(id, &error)
        })
    }

    /// Moves a run of blocks that one version owns, from the `nth` of a record's payload on. Answers
    /// how many blocks it got on by.
    async fn move_run(
        &self,
        start: u64,
        crcs: &[u32],
        place: Place,
        nth: u32,
    ) -> Result<u32, CheckpointError> {
        let Some(run) = self.run_to_move(start, crcs.len() as u32, place, nth).await? else {
            return Ok(1);
        };
        let range = nth as usize..(nth + run.count) as usize;
        let (from, block) = (place.plus(nth.into()), start + u64::from(nth));
        let read = self.read_payload(from, &crcs[range.clone()]).await;
        let (payload, bad): (Payload, _) = match read {
            Ok(read) => read,
            Err(_) => return Ok(run.count),
        };
        if !bad.is_empty() {
            // Not moved: a read or a scrub will name it and have it repaired.
            count(&self.shared.counters.damaged_blocks, bad.len() as u64);
            tracing::error!(replica = %self.descriptor.replica, %from, block, count = bad.len(),
                "blocks are damaged: their segment can't be cleaned");
            return Ok(run.count);
        }
        let body = MovedV1::new(run.branch, block, run.sequence, &crcs[range.clone()]);
        let body = body.encode_to_vec();
        let (to, _) = self.append_cold(&body, payload, &crcs[range]).await?;
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
        self.map_room().await;
        Ok(run.count)
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
        for at in nth..blocks.min(nth + TRANSFER_BLOCKS_MAX as u32) {
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
