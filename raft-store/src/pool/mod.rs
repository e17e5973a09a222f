//! A pool: one file or disk, one shard, one thread; the replicas on it, their log and map.
//!
//! Owns the pool's life (format, open, checkpoint, close), the set of its replicas and its space.
//! Never decides what an entry means, never talks to a peer. Not on the path of a write itself:
//! [`crate::log::Log`] is step 5, [`crate::replica::Replica`] step 7.

pub mod budget;
pub(crate) mod map_io;
mod open;
pub(crate) mod shared;
mod types;

use std::path::Path;
use std::rc::Rc;

use ballast_block::{PoolId, ReplicaId};
use ballast_env::Env;
use ballast_env::spawn::OwnedTask;
use prost::Message;
use tokio::sync::watch;

pub use types::{
    CheckpointError, CreateReplicaError, DESCRIPTOR_BYTES_MAX, DropReplicaError, FormatOptions,
    FormatPoolError, OpenPoolError, PoolExpectation, PoolFailure, PoolStats, RecoveryReport,
    ReplicaDescriptor, Room, Space,
};

use budget::Budget;

pub use crate::format::superblock::Lineage;

use crate::format::vote_slot::SlotNumber;
use crate::replica::core::ReplicaInner;
use crate::replica::record::DescriptorV1;
use crate::replica::{Health, Replica};
use crate::segment::SegmentTable;
use crate::stream::{PoolFailed, RecordKind, SpaceClass, StreamId};
use shared::Shared;

/// An open pool. A cheap handle: clones share everything; all of them live on one thread. The
/// pool stops with the last one, as if by a crash: [`Pool::close`] goes before.
pub struct Pool<E: Env> {
    inner: Rc<PoolInner<E>>,
}

impl<E: Env> Clone for Pool<E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

struct PoolInner<E: Env> {
    shared: Rc<Shared<E>>,
    /// Makes checkpoints, merges maps, cleans.
    _keeper: OwnedTask,
}

impl<E: Env> Drop for PoolInner<E> {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl<E: Env> Pool<E> {
    /// Makes a pool of a new file, or of an existing file or device. Answers its id.
    ///
    /// # Errors
    /// [`FormatPoolError`]; what ever was a Ballast pool is never formatted (guarantee
    /// **never-format-data**).
    pub async fn format(
        env: &E,
        path: &Path,
        options: FormatOptions,
    ) -> Result<PoolId, FormatPoolError> {
        crate::format::create::create(env, path, options).await
    }

    /// Refuses what [`Pool::format`] would refuse, but for a file to be created that exists. Writes
    /// nothing.
    ///
    /// # Errors
    /// [`FormatPoolError`].
    pub async fn check_format(
        env: &E,
        path: &Path,
        options: &FormatOptions,
    ) -> Result<(), FormatPoolError> {
        crate::format::create::check(env, path, options).await
    }

    /// Opens a pool, locks it, recovers every replica on it and raises its boot counter.
    ///
    /// # Errors
    /// [`OpenPoolError`]; a pool that can't be understood whole is refused, never re-made.
    pub async fn open(
        env: E,
        path: &Path,
        expect: PoolExpectation,
    ) -> Result<(Self, RecoveryReport), OpenPoolError> {
        let (shared, report) = open::open(env.clone(), path, expect).await?;
        let keeper = OwnedTask(env.spawn(crate::keeper::keep(shared.clone())));
        Ok((Self { inner: Rc::new(PoolInner { shared, _keeper: keeper }) }, report))
    }

    fn shared(&self) -> &Rc<Shared<E>> {
        &self.inner.shared
    }

    /// The pool's id.
    pub fn id(&self) -> PoolId {
        self.shared().streams.info().pool
    }

    /// How often the pool was opened, this time included; peers compare it (hazard F5).
    pub fn boot_counter(&self) -> u64 {
        self.shared().streams.info().boot_counter
    }

    /// The marks that tell this pool's past from any other (hazard F5).
    pub fn lineage(&self) -> Lineage {
        self.shared().streams.lineage()
    }

    /// Notes durably that the cluster has accepted this start with the mark that it offered.
    ///
    /// # Errors
    /// [`PoolFailed`].
    pub async fn settle_lineage(&self) -> Result<(), PoolFailed> {
        self.shared().streams.settle_lineage().await
    }

    /// Every replica, by id.
    pub fn replicas(&self) -> Vec<Replica<E>> {
        self.shared().all().into_iter().map(|inner| Replica { inner }).collect()
    }

    /// The replica with that id; never made by asking.
    pub fn replica(&self, id: ReplicaId) -> Option<Replica<E>> {
        self.shared().replicas.borrow().get(&id).map(|inner| Replica { inner: inner.clone() })
    }

    /// Ids of replicas that were here once and were dropped (hazard 28).
    pub fn dropped(&self) -> Vec<ReplicaId> {
        self.shared().dropped.borrow().iter().copied().collect()
    }

    /// Makes a replica with an empty log and map; durable when it returns.
    ///
    /// # Errors
    /// [`CreateReplicaError`]; an id seen before is refused, also a dropped one.
    pub async fn create_replica(
        &self,
        descriptor: ReplicaDescriptor,
    ) -> Result<Replica<E>, CreateReplicaError> {
        let shared = self.shared();
        let id = descriptor.replica;
        if descriptor.bytes.len() > DESCRIPTOR_BYTES_MAX {
            return Err(CreateReplicaError::DescriptorTooLong(descriptor.bytes.len()));
        }
        if shared.dropped.borrow().contains(&id) || shared.replicas.borrow().contains_key(&id) {
            return Err(CreateReplicaError::SeenBefore(id));
        }
        let most = shared.budget.replicas;
        let slot = shared.free_vote_slot().ok_or(CreateReplicaError::TooMany(most))?;
        let body = DescriptorV1::new(&descriptor, slot).encode_to_vec();
        let replica = Rc::new(ReplicaInner::empty(shared.clone(), descriptor, slot));
        // Known from here on, so that nobody else takes the id or the slot while this waits.
        shared.replicas.borrow_mut().insert(id, replica.clone());
        let (class, kind) = (SpaceClass::Control, RecordKind::CreateReplica);
        let appended = replica.append_or_wait(class, kind, &body, None, &[]).await?;
        shared.streams.durable(StreamId::Hot, appended.at).await.map_err(PoolFailure::from)?;
        Ok(Replica { inner: replica })
    }

    /// Drops a replica: its data is freed, its id stays known. Durable when it returns. Handles to
    /// it that are still around answer errors.
    ///
    /// # Errors
    /// [`DropReplicaError`].
    pub async fn drop_replica(&self, id: ReplicaId) -> Result<(), DropReplicaError> {
        let shared = self.shared();
        let known = shared.replicas.borrow().get(&id).cloned();
        let replica = known.ok_or(DropReplicaError::NotHere(id))?;
        let (class, kind) = (SpaceClass::Control, RecordKind::DropReplica);
        let appended = replica.append_or_wait(class, kind, &[], None, &[]).await?;
        shared.forget(&replica);
        shared.streams.durable(StreamId::Hot, appended.at).await.map_err(PoolFailure::from)?;
        shared.work.notify_one();
        Ok(())
    }

    /// Space, now.
    pub fn space(&self) -> Space {
        self.shared().space()
    }

    /// What leaders may count on, now.
    pub fn room(&self) -> Room {
        self.shared().room()
    }

    /// How the pool is divided.
    pub fn budget(&self) -> &Budget {
        &self.shared().budget
    }

    /// Returns when log should be purged, or can be that could not before.
    pub fn purge_wanted(&self) -> impl Future<Output = ()> + use<E> {
        let shared = self.shared().clone();
        async move { shared.purge.notified().await }
    }

    /// Turns `Some` when the pool stops; every replica of it has then failed.
    pub fn failure(&self) -> watch::Receiver<Option<PoolFailed>> {
        self.shared().failure.clone()
    }

    /// Makes a checkpoint now; returns when it is durable. What was applied and durable when it was
    /// called is covered by it.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub async fn checkpoint(&self) -> Result<(), CheckpointError> {
        self.shared().checkpoint().await
    }

    /// Checkpoints and stops. Handles that are still around answer errors.
    ///
    /// # Errors
    /// [`CheckpointError`]: the pool is closed all the same; its log has everything.
    pub async fn close(&self) -> Result<(), CheckpointError> {
        let outcome = self.shared().checkpoint().await;
        self.shared().streams.close();
        outcome
    }

    /// Merges every map's changes: all accounting of space is exact afterwards, until the next
    /// apply.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub async fn quiesce_maps(&self) -> Result<(), CheckpointError> {
        self.shared().merge_all(0).await
    }

    /// The table of segments, for tools and tests: to look at, not to change.
    pub fn segments(&self) -> &Rc<SegmentTable> {
        self.shared().streams.segments()
    }

    /// Counters and gauges, now.
    pub fn stats(&self) -> PoolStats {
        let shared = self.shared();
        let counts = shared.streams.segments().counts();
        let written = shared.streams.stats(StreamId::Hot);
        let replicas = shared.all();
        let suspects = replicas.iter().filter(|one| *one.health.borrow() != Health::Good).count();
        let retained = replicas.iter().map(|one| one.log.borrow().bytes()).sum();
        let counters = &shared.counters;
        PoolStats {
            space: shared.space(),
            segments: counts.total.into(),
            segments_free: counts.free.into(),
            log_bytes_written: written.bytes,
            log_writes: written.writes,
            cleaner_bytes_moved: counters.cleaner_bytes_moved.get(),
            cleaner_segments: counters.cleaner_segments.get(),
            checkpoints: counters.checkpoints.get(),
            log_since_checkpoint: shared.streams.log_since_checkpoint(),
            retained_bytes: retained,
            retention_limit: shared.budget.retention,
            meta_segments: shared.streams.segments().meta().0.into(),
            cache_bytes: shared.cache.borrow().bytes() as u64,
            pending_bytes: shared.streams.pending_bytes(),
            map_delta_bytes: shared.delta_bytes.get() as u64,
            damaged_blocks: counters.damaged_blocks.get(),
            damaged_pages: counters.damaged_pages.get(),
            damaged_headers: counters.damaged_headers.get(),
            damaged_superblocks: counters.damaged_superblocks.get(),
            damaged_votes: counters.damaged_votes.get(),
            repaired_blocks: counters.repaired_blocks.get(),
            suspects: suspects as u64,
        }
    }
}

impl<E: Env> Shared<E> {
    /// A slot of the vote table that no replica has.
    fn free_vote_slot(&self) -> Option<SlotNumber> {
        let replicas = self.replicas.borrow();
        let mut taken: Vec<SlotNumber> = replicas.values().map(|one| one.vote_slot).collect();
        taken.sort_unstable();
        let gap = taken.iter().zip(0u16..).position(|(slot, number)| slot.0 != number);
        let number = gap.unwrap_or(taken.len());
        (number < self.budget.replicas).then_some(SlotNumber(number as u16))
    }

    /// The memory part of a drop.
    pub(crate) fn forget(&self, replica: &Rc<ReplicaInner<E>>) {
        let id = replica.descriptor.replica;
        self.replicas.borrow_mut().remove(&id);
        self.dropped.borrow_mut().insert(id);
        replica.dropped.set(true);
        // The payload of what was applied is the map's, and free only with it: a view may keep the
        // map for long, and its space must not be another's by then.
        let applied = replica.applied.borrow().id;
        if let Some(applied) = applied {
            replica.purge_index(applied);
        }
        let purged = replica.log.borrow().purged;
        replica.truncate_index(purged);
        replica.abandon_resync();
        self.delta_bytes.set(self.delta_bytes.get() - replica.delta_bytes.replace(0));
        let unmerged = self.unmerged_blocks.get() - replica.unmerged_blocks.replace(0);
        self.unmerged_blocks.set(unmerged);
        self.abandoned.borrow_mut().push(replica.map());
        // Whoever waits for room in a map has it, or waits for this one.
        self.merged.notify_waiters();
    }
}
