//! The keeper of a pool: merges map changes, makes checkpoints, has the log purged, cleans segments.
//! Not on the path of a write.
//!
//! Owns when each is done, by the pool's budget ([`crate::pool::budget`]). In the order of what it
//! costs: a checkpoint frees segments that are dead already; log that followers may miss is given
//! up, they catch up by difference; what lives is moved together. It is rung when a segment is taken
//! and few are left, when changes wait to be merged, and looks by itself once a second.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::limits::{
    CLEANER_VICTIM_LIVE_PERCENT_EARLY, CLEANER_VICTIM_LIVE_PERCENT_MAX, CLEANER_VICTIMS_MIN,
    CLEANER_VICTIMS_ONE_IN, KEEPER_PERIOD_MS,
};
use ballast_env::Env;

use crate::cleaner::{Cleaned, map_failed};
use crate::format::SegmentNumber;
use crate::place::Place;
use crate::pool::budget::Pressure;
use crate::pool::shared::{Shared, count};
use crate::pool::{CheckpointError, PoolFailure};
use crate::replica::core::ReplicaInner;
use crate::segment::Victim;
use crate::stream::SpaceClass;

/// Victims that could not be emptied, with what lived in them: not tried again until it changes.
type Stuck = BTreeSet<(SegmentNumber, u32)>;

/// Runs until the pool stops.
pub(crate) async fn keep<E: Env>(shared: Rc<Shared<E>>) {
    let mut stuck = Stuck::new();
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
    async fn keep_once(self: &Rc<Self>, stuck: &mut Stuck) -> Result<bool, CheckpointError> {
        if self.wants_merge() && self.merge_some().await {
            return Ok(true);
        }
        let pressure = self.pressure();
        if self.wants_checkpoint(pressure) {
            self.checkpoint().await?;
            return Ok(true);
        }
        if self.compact_meta().await? {
            return Ok(true);
        }
        self.settle_accounts(pressure).await;
        if pressure == Pressure::None {
            stuck.clear();
            self.useless_since.set(None);
            return Ok(false);
        }
        let gained = self.make_space(pressure, stuck).await?;
        let since = self.useless_since.get().unwrap_or_else(|| self.streams.env().now());
        self.useless_since.set((!gained).then_some(since));
        Ok(gained)
    }

    /// Whether log or dirty map pages have grown to where a checkpoint is due.
    fn wants_checkpoint(&self, pressure: Pressure) -> bool {
        let log = match pressure >= Pressure::Pressed {
            true => self.budget.checkpoint_log / 2,
            false => self.budget.checkpoint_log,
        };
        let dirty = || self.all().iter().map(|one| one.dirty_bytes()).sum::<usize>();
        self.streams.log_since_checkpoint() >= log
            || self.abandoned.borrow().iter().any(|map| !map.is_pinned())
            || dirty() >= self.budget.dirty_bytes
    }

    /// Near the pool's capacity, and where every segment counts, what is dead has to be known.
    async fn settle_accounts(&self, pressure: Pressure) {
        let live = self.streams.segments().counts().live_blocks;
        let unknown = self.unmerged_blocks.get();
        let full = self.is_full() || live >= self.budget.capacity_blocks;
        let near = full || pressure == Pressure::Tight;
        // A view that was given up leaves dead versions, although nobody may write any more.
        let dead = unknown > self.budget.unmerged_blocks / 16 || self.untidy.get();
        if near && dead {
            self.untidy.set(false);
            if let Err(error) = self.merge_all(0).await {
                tracing::error!(%error, "a map can't be merged: its dead blocks stay taken");
            }
        }
    }

    /// Frees segments: first by what is dead already, then by moving what lives. Answers whether it
    /// did.
    async fn make_space(
        self: &Rc<Self>,
        pressure: Pressure,
        stuck: &mut Stuck,
    ) -> Result<bool, CheckpointError> {
        let segments = self.streams.segments().clone();
        let enough = match pressure {
            Pressure::None | Pressure::Low => (self.budget.working / 2).max(1),
            Pressure::Pressed | Pressure::Tight => 1,
        };
        if segments.reclaimable() >= enough {
            let before = segments.counts().free;
            self.checkpoint().await?;
            return Ok(segments.counts().free > before);
        }
        if pressure >= Pressure::Pressed {
            self.purge.notify_one();
        }
        let emptied = self.clean_some(pressure, stuck).await?;
        if emptied {
            self.checkpoint().await?;
        }
        Ok(emptied)
    }

    /// Empties some segments; answers whether it did.
    async fn clean_some(
        &self,
        pressure: Pressure,
        stuck: &mut Stuck,
    ) -> Result<bool, CheckpointError> {
        let segments = self.streams.segments().clone();
        let geometry = segments.geometry();
        let percent = match pressure {
            Pressure::Tight => CLEANER_VICTIM_LIVE_PERCENT_MAX,
            _ => CLEANER_VICTIM_LIVE_PERCENT_EARLY,
        };
        let most = (geometry.segments / CLEANER_VICTIMS_ONE_IN).max(CLEANER_VICTIMS_MIN) as usize;
        let live_max = geometry.segment_blocks / 100 * percent;
        let victims = segments.victims(most + stuck.len(), live_max);
        // Of the last one part stays in reserve: what is moved takes headers, too.
        let room = segments.free_for(SpaceClass::Cleaner).saturating_sub(1);
        let mut room = u64::from(room) * u64::from(geometry.segment_blocks);
        let mut emptied = false;
        for victim in victims.into_iter().take(most + stuck.len()) {
            let key = (victim.segment, victim.live_blocks);
            let Some(left) = room.checked_sub(victim.live_blocks.into()) else { break };
            if stuck.contains(&key) {
                continue;
            }
            room = left;
            match self.clean(victim).await {
                Ok(Cleaned::Empty) => {
                    emptied = true;
                    count(&self.counters.cleaner_segments, 1);
                }
                Ok(Cleaned::Stuck) | Err(CheckpointError::Map { .. }) => _ = stuck.insert(key),
                Ok(Cleaned::NoSpace) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(emptied)
    }

    /// Has the pages in mostly dead segments of the meta stream written anew, when there are many.
    /// Answers whether it did.
    async fn compact_meta(self: &Rc<Self>) -> Result<bool, CheckpointError> {
        let segments = self.streams.segments().clone();
        let geometry = segments.geometry();
        let (taken, live) = segments.meta();
        let needed = 2 * live.div_ceil(u64::from(geometry.segment_blocks));
        if u64::from(taken) <= needed + u64::from(self.budget.meta) {
            return Ok(false);
        }
        // As much as may be dirty in one checkpoint.
        let mut room = (self.budget.dirty_bytes / ballast_block::BLOCK_SIZE) as u64;
        let victims = segments.meta_victims(taken as usize, geometry.segment_blocks / 2);
        let fits = |victim: &Victim| match room.checked_sub(victim.live_blocks.into()) {
            Some(left) => {
                room = left;
                true
            }
            None => false,
        };
        let victims = victims.into_iter().take_while(fits).map(|victim| victim.segment);
        let victims: BTreeSet<SegmentNumber> = victims.collect();
        if victims.is_empty() {
            return Ok(false);
        }
        let there = |at: crate::map::PageAddress| {
            let found = geometry.locate(Place::from_offset(at.offset));
            found.is_some_and(|(segment, _)| victims.contains(&segment))
        };
        for replica in self.all() {
            let resync = replica.resync.borrow().as_ref().map(|resync| resync.map.clone());
            for map in [Some(replica.map()), resync].into_iter().flatten() {
                if let Err(error) = map.rewrite(there).await {
                    self.check()?;
                    tracing::error!(%error, "a page can't be moved: its segment stays taken");
                }
            }
        }
        let before = segments.meta().0;
        self.checkpoint().await?;
        Ok(segments.meta().0 < before)
    }

    /// Merges part of the map with the most unmerged changes that can be merged. Answers whether
    /// one was.
    pub(crate) async fn merge_some(&self) -> bool {
        let mut replicas = self.all();
        replicas.retain(|one| one.delta_bytes.get() > 0 || one.unmerged_blocks.get() > 0);
        replicas.sort_by_key(|one| std::cmp::Reverse(one.delta_bytes.get()));
        for replica in replicas {
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

    /// Frees all that abandoned maps refer to, but for those of which somebody still has a view. Part
    /// of a checkpoint, before its freeze: one that knows such a map no more knows its space as free.
    pub async fn wipe_abandoned(&self) -> Result<(), PoolFailure> {
        let abandoned = std::mem::take(&mut *self.abandoned.borrow_mut());
        for map in abandoned {
            if map.is_pinned() {
                self.abandoned.borrow_mut().push(map);
            } else if let Err(error) = map.wipe().await {
                self.check()?;
                // A damaged page: what only it knew of stays taken.
                tracing::error!(%error, "space of a dropped map is lost");
            }
        }
        Ok(())
    }
}

impl<E: Env> ReplicaInner<E> {
    async fn merge(&self, target: usize) -> Result<(), CheckpointError> {
        let before = self.map().delta_bytes();
        let mut merged = self.map().merge(target).await;
        let resync = self.resync.borrow().clone();
        if let Some(resync) = resync {
            merged = merged.and(resync.map.merge(target).await);
        }
        self.note_merged(before);
        merged.map_err(|error| {
            self.note_map_damage(&error);
            map_failed(self.descriptor.replica, &error)
        })
    }
}
