//! The inside of a pool: what all its replicas share.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::{
    FULL_UNTIL_ONE_IN, KEEPER_PERIOD_MS, LOG_CACHE_BYTES_MAX, MAP_CACHE_BYTES_MAX,
};
use ballast_block::{Payload, ReplicaId};
use ballast_env::Env;
use ballast_env::clock::Instant;
use tokio::sync::{Mutex, Notify, watch};

use crate::log::cache::PayloadCache;
use crate::map::PageCache;
use crate::place::Place;
use crate::pool::budget::{Budget, Pressure};
use crate::pool::map_io::MapIo;
use crate::pool::{PoolFailure, Room, Space};
use crate::replica::core::{Map, ReplicaInner};
use crate::segment::SegmentCounts;
use crate::stream::{PoolFailed, StreamSet};

/// Shared by the pool's handles and its replicas. Borrows end before an await, always.
pub(crate) struct Shared<E: Env> {
    pub streams: StreamSet<E>,
    pub replicas: RefCell<BTreeMap<ReplicaId, Rc<ReplicaInner<E>>>>,
    /// Ids that were here once.
    pub dropped: RefCell<BTreeSet<ReplicaId>>,
    /// Recent payload.
    pub cache: RefCell<PayloadCache>,
    /// Clean map pages.
    pub pages: PageCache,
    /// The maps' way to disk and accounting.
    pub map_io: Rc<MapIo<E>>,
    /// What the segments are for.
    pub budget: Budget,
    /// Unmerged changes of all maps.
    pub delta_bytes: Cell<usize>,
    /// Blocks of them: what they overwrote still counts as live.
    pub unmerged_blocks: Cell<u64>,
    /// A view was given up: what only it showed is dead, and known to be with the next merge.
    pub untidy: Cell<bool>,
    /// Maps that nothing uses any more and whose blocks are to be freed.
    pub abandoned: RefCell<Vec<Rc<Map<E>>>>,
    /// Maps that nothing uses any more and whose blocks another map has: their pages are to be freed.
    pub drained: RefCell<Vec<Rc<Map<E>>>>,
    /// One checkpoint at a time.
    pub checkpointing: Mutex<()>,
    /// Rung when the keeper has something to look at.
    pub work: Notify,
    /// Rung when segments became free.
    pub freed: Notify,
    /// Rung when maps merged changes, or their replica was dropped.
    pub merged: Notify,
    /// Rung when log could be purged that could not before, or should be.
    pub purge: Notify,
    /// Segments opened when the append path last rang the keeper.
    pub rung_at: Cell<u64>,
    /// Since when the keeper can free nothing although it should.
    pub useless_since: Cell<Option<Instant>>,
    /// What lives reached the capacity, and did not get well below it since.
    full: Cell<bool>,
    /// Where the hot stream stood when the pool was opened.
    opened_at: u64,
    pub failure: watch::Receiver<Option<PoolFailed>>,
    pub counters: Counters,
    /// Encoded headers are built here, to save an allocation per entry.
    pub scratch: RefCell<Vec<u8>>,
}

/// Counters for metrics.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub cleaner_bytes_moved: Cell<u64>,
    pub cleaner_segments: Cell<u64>,
    pub checkpoints: Cell<u64>,
    pub damaged_blocks: Cell<u64>,
    pub damaged_pages: Cell<u64>,
    pub damaged_headers: Cell<u64>,
    pub damaged_superblocks: Cell<u64>,
    pub damaged_votes: Cell<u64>,
    pub repaired_blocks: Cell<u64>,
}

/// Adds to a counter.
pub(crate) fn count(counter: &Cell<u64>, more: u64) {
    counter.set(counter.get() + more);
}

impl<E: Env> Shared<E> {
    pub fn new(streams: StreamSet<E>) -> Self {
        Self {
            replicas: RefCell::default(),
            dropped: RefCell::default(),
            cache: RefCell::new(PayloadCache::new(LOG_CACHE_BYTES_MAX)),
            pages: PageCache::new(MAP_CACHE_BYTES_MAX),
            map_io: Rc::new(MapIo::new(streams.clone())),
            budget: Budget::new(streams.segments().geometry()),
            delta_bytes: Cell::new(0),
            unmerged_blocks: Cell::new(0),
            untidy: Cell::new(false),
            abandoned: RefCell::default(),
            drained: RefCell::default(),
            checkpointing: Mutex::new(()),
            work: Notify::new(),
            freed: Notify::new(),
            merged: Notify::new(),
            purge: Notify::new(),
            rung_at: Cell::new(0),
            useless_since: Cell::new(None),
            full: Cell::new(false),
            opened_at: streams.hot_position(),
            failure: streams.failure(),
            counters: Counters::default(),
            scratch: RefCell::new(Vec::with_capacity(BLOCK_SIZE)),
            streams,
        }
    }

    /// Why the pool takes no more work, if so.
    pub fn check(&self) -> Result<(), PoolFailure> {
        match &*self.failure.borrow() {
            None => Ok(()),
            Some(failed) => Err(failed.clone().into()),
        }
    }

    /// Payload that is in memory: not yet durable, or recent.
    pub fn payload_in_memory(&self, place: Place, count: u32) -> Option<Payload> {
        let recent = self.cache.borrow().get(place, count);
        recent.or_else(|| self.streams.pending_payload(place, count))
    }

    /// Every replica, by id.
    pub fn all(&self) -> Vec<Rc<ReplicaInner<E>>> {
        self.replicas.borrow().values().cloned().collect()
    }

    /// Whether apply should wait for a merge.
    pub fn delta_is_full(&self) -> bool {
        self.delta_bytes.get() > self.budget.delta_bytes
            || self.unmerged_blocks.get() > self.budget.unmerged_blocks
    }

    /// Whether unmerged changes are so many that some should be merged.
    pub fn wants_merge(&self) -> bool {
        self.delta_bytes.get() > self.budget.delta_bytes / 2
            || self.unmerged_blocks.get() > self.budget.unmerged_blocks / 2
    }

    /// How few segments are free.
    pub fn pressure(&self) -> Pressure {
        self.budget.pressure(self.streams.segments().counts().free_normal)
    }

    /// What lives for certain: what is not merged may be dead already and does not count; the keeper
    /// merges until it is little.
    fn settled_live(&self) -> u64 {
        let live = self.streams.segments().counts().live_blocks;
        live.saturating_sub(self.unmerged_blocks.get())
    }

    /// Whether a difference finds no room beside what it replaces.
    pub fn is_crowded(&self) -> bool {
        self.settled_live() >= self.budget.aside_blocks
    }

    /// Whether more lives than what peers may have admitted: nothing may be added.
    pub fn is_overfull(&self) -> bool {
        self.settled_live() >= self.budget.most_blocks
    }

    /// Whether what lives is as much as the pool takes.
    pub fn is_full(&self) -> bool {
        let capacity = self.budget.capacity_blocks;
        // Once full, it takes some room to be it no more: writers should not flap at the border.
        let limit =
            if self.full.get() { capacity - capacity / FULL_UNTIL_ONE_IN } else { capacity };
        self.full.set(self.settled_live() >= limit);
        self.full.get()
    }

    pub fn space(&self) -> Space {
        let segments = self.streams.segments();
        let SegmentCounts { total, free, live_blocks, .. } = segments.counts();
        let segment_bytes = segments.geometry().segment_bytes();
        let blocks = |blocks: u64| blocks * BLOCK_SIZE as u64;
        Space {
            total: u64::from(total) * segment_bytes,
            capacity: blocks(self.budget.capacity_blocks),
            used: u64::from(total - free) * segment_bytes,
            live: blocks(live_blocks),
            free: blocks(self.budget.capacity_blocks.saturating_sub(live_blocks)),
        }
    }

    /// What leaders may count on, now.
    pub fn room(&self) -> Room {
        let segments = self.streams.segments();
        let free = segments.counts().free_normal.saturating_sub(self.budget.admitted);
        let usable = segments.geometry().segment_bytes() - BLOCK_SIZE as u64;
        let credit = u64::from(free) * usable;
        Room { credit, full: credit == 0 && self.is_stuck() || self.is_full() }
    }

    /// Whether the keeper has tried in vain to free segments: waiting for one is of no use.
    pub fn is_stuck(&self) -> bool {
        // For a while a purge of the log may be on its way.
        let now = self.streams.env().now();
        let patience = Duration::from_millis(2 * KEEPER_PERIOD_MS);
        self.useless_since.get().is_some_and(|since| now.since(since) > patience)
    }

    /// Stops the pool, as if by a crash, and lets go of what points back at it.
    pub fn stop(&self) {
        self.streams.close();
        let replicas = std::mem::take(&mut *self.replicas.borrow_mut());
        for replica in replicas.values() {
            let source = replica.state_source.borrow_mut().take();
            let resync = replica.resync.borrow_mut().take();
            drop((source, resync));
        }
    }

    /// Bytes of the hot stream, ends of segments that stay unused included, since the pool was
    /// opened.
    pub fn log_age(&self) -> u64 {
        self.streams.hot_position() - self.opened_at
    }

    /// What all replicas together may retain now, in bytes.
    pub fn retention_now(&self) -> u64 {
        match self.pressure() >= Pressure::Pressed {
            true => self.budget.retention_pressed,
            false => self.budget.retention,
        }
    }

    /// How many bytes of log a replica may retain that would like to retain `bytes`, and the age,
    /// as of [`Self::log_age`], before which it may retain nothing.
    pub fn retention(&self, bytes: u64) -> (u64, u64) {
        let most = self.retention_now();
        let all: u64 = self.all().iter().map(|one| one.log.borrow().bytes()).sum();
        let share = match all > most {
            true => u64::try_from(u128::from(bytes) * u128::from(most) / u128::from(all))
                .expect("less than bytes"),
            false => bytes,
        };
        (share, self.log_age().saturating_sub(most))
    }

    /// Rings the keeper when segments become few: once for each that is taken.
    pub fn note_append(&self) {
        let opened = self.streams.segments().opened();
        if self.rung_at.replace(opened) == opened {
            return;
        }
        let due = self.streams.log_since_checkpoint() >= self.budget.checkpoint_log;
        if due || self.pressure() > Pressure::None {
            self.work.notify_one();
        }
    }

    /// Returns when a segment became free, or the pool failed.
    pub async fn wait_for_space(&self) {
        let mut failure = self.failure.clone();
        let freed = self.freed.notified();
        self.work.notify_one();
        tokio::select! {
            biased;
            () = freed => {}
            _ended = failure.wait_for(Option::is_some) => {}
        }
    }
}
