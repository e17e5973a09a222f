//! The inside of a pool: what all its replicas share.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::{
    LOG_CACHE_BYTES_MAX, MAP_CACHE_BYTES_MAX, MAP_DELTA_BYTES_MAX, POOL_RETENTION_BYTES_MAX,
    RETENTION_SHORT_BYTES,
};
use ballast_block::{Payload, ReplicaId};
use ballast_env::Env;
use tokio::sync::{Mutex, Notify, watch};

use crate::log::cache::PayloadCache;
use crate::map::PageCache;
use crate::place::Place;
use crate::pool::map_io::MapIo;
use crate::pool::{PoolFailure, Space};
use crate::replica::core::{Map, ReplicaInner};
use crate::segment::SegmentCounts;
use crate::stream::{PoolFailed, SpaceClass, StreamId, StreamSet};

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
    /// Unmerged changes of all maps.
    pub delta_bytes: Cell<usize>,
    /// Maps that nothing uses any more and whose blocks are to be freed.
    pub abandoned: RefCell<Vec<Rc<Map<E>>>>,
    /// One checkpoint at a time.
    pub checkpointing: Mutex<()>,
    /// Rung when the keeper has something to look at.
    pub work: Notify,
    /// Rung when segments became free.
    pub freed: Notify,
    /// Rung when maps merged changes.
    pub merged: Notify,
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
            delta_bytes: Cell::new(0),
            abandoned: RefCell::default(),
            checkpointing: Mutex::new(()),
            work: Notify::new(),
            freed: Notify::new(),
            merged: Notify::new(),
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
        self.delta_bytes.get() > MAP_DELTA_BYTES_MAX
    }

    /// Whether nothing that only uses space should be taken any more.
    pub fn is_full(&self) -> bool {
        self.space().free == 0
    }

    pub fn space(&self) -> Space {
        let segments = self.streams.segments();
        let SegmentCounts { total, free, live_blocks, .. } = segments.counts();
        let segment_bytes = segments.geometry().segment_bytes();
        Space {
            total: u64::from(total) * segment_bytes,
            used: u64::from(total - free) * segment_bytes,
            live: live_blocks * BLOCK_SIZE as u64,
            free: segments.free_bytes(SpaceClass::Normal),
        }
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

    /// How many bytes of log a replica may retain that would like to retain `bytes`, and the age,
    /// in bytes of the hot stream since the pool was opened, before which it may retain nothing.
    pub fn retention(&self, bytes: u64) -> (u64, u64) {
        let most = POOL_RETENTION_BYTES_MAX.min(self.space().total / 8);
        let all: u64 = self.all().iter().map(|one| one.log.borrow().bytes()).sum();
        let share = match all > most {
            true => u64::try_from(u128::from(bytes) * u128::from(most) / u128::from(all))
                .expect("less than bytes"),
            false => bytes,
        };
        let share = if self.is_short() { share.min(RETENTION_SHORT_BYTES) } else { share };
        (share, self.streams.stats(StreamId::Hot).bytes.saturating_sub(most))
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
