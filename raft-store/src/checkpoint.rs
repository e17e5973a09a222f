//! Checkpoints: freezing the pool between two batches, and making the frozen state durable.
//!
//! Owns the order of a checkpoint: freeze (memory, no await); wait until all that was appended before
//! is durable, so that no checkpoint covers an index above the durable watermark (hazard F7); write
//! what the maps changed; write the body and the superblocks; only then are segments freed (hazard
//! F3). Not on the path of a write.

use std::rc::Rc;

use ballast_block::ReplicaId;
use ballast_env::Env;
use bytes::Bytes;
use prost::Message;
use tokio::sync::oneshot;

use crate::map::FrozenMap;
use crate::pool::shared::{Shared, count};
use crate::pool::{CheckpointError, PoolFailure};
use crate::replica::Health;
use crate::replica::core::{Map, ReplicaInner};
use crate::replica::record::{DescriptorV1, MembershipV1};
use crate::replica::saved::{PoolV1, ReplicaV1, ResyncV1, SuspectV1, pack};
use crate::stream::PoolFailed;
use crate::types::{LogId, StoredMembership};

/// A replica as it was at the freeze.
struct Frozen<E: Env> {
    replica: Rc<ReplicaInner<E>>,
    applied: Option<LogId>,
    membership: StoredMembership,
    saved: ReplicaV1,
    map: Rc<Map<E>>,
    frozen: FrozenMap,
    resync: Option<(Rc<Map<E>>, FrozenMap)>,
}

impl<E: Env> Shared<E> {
    /// Makes a checkpoint; durable when it returns. Goes on to its end if the future is dropped:
    /// half of one would have taken changes out of the maps that nothing has written.
    pub async fn checkpoint(self: &Rc<Self>) -> Result<(), CheckpointError> {
        let (send, receive) = oneshot::channel();
        let shared = self.clone();
        self.streams.env().spawn(async move {
            // Who asked may have gone.
            let _gone = send.send(shared.make_checkpoint().await);
        });
        receive.await.unwrap_or_else(|_| {
            let problem = "the process ends".to_owned();
            let failed = PoolFailed { operation: "checkpoint".to_owned(), problem };
            Err(PoolFailure::Failed(failed).into())
        })
    }

    async fn make_checkpoint(&self) -> Result<(), CheckpointError> {
        let _one = self.checkpointing.lock().await;
        self.check()?;
        self.wipe_abandoned().await?;
        // Not earlier: a checkpoint that was being made may have referred to them.
        std::mem::take(&mut *self.drained.borrow_mut()).iter().for_each(|map| map.give_up());
        let streams = self.streams.freeze();
        let dropped = self.dropped.borrow().iter().map(|id| id.0).collect();
        let frozen: Vec<Frozen<E>> = self.all().into_iter().map(ReplicaInner::freeze).collect();
        // Everything that the frozen maps point at: entries, and what was moved.
        self.streams.frozen_durable(&streams).await.map_err(PoolFailure::from)?;
        let mut replicas = Vec::with_capacity(frozen.len());
        let mut covered = Vec::with_capacity(frozen.len());
        for Frozen { replica, applied, membership, mut saved, map, frozen, resync } in frozen {
            let id = replica.descriptor.replica;
            saved.map = self.write_map(id, &map, frozen).await?;
            if let (Some(saved), Some((map, frozen))) = (&mut saved.resync, resync) {
                saved.map = self.write_map(id, &map, frozen).await?;
            }
            replicas.push(saved);
            covered.push((replica, applied, membership));
        }
        let body = PoolV1 { replicas, dropped }.encode_to_vec();
        self.streams.commit_checkpoint(streams, vec![body.into()]).await?;
        for (replica, applied, membership) in covered {
            replica.checkpointed.set(applied);
            *replica.checkpointed_membership.borrow_mut() = membership;
        }
        count(&self.counters.checkpoints, 1);
        self.freed.notify_waiters();
        self.purge.notify_one();
        Ok(())
    }

    async fn write_map(
        &self,
        replica: ReplicaId,
        map: &Map<E>,
        frozen: FrozenMap,
    ) -> Result<Bytes, CheckpointError> {
        match map.write_frozen(frozen).await {
            Ok(root) => Ok(root.into()),
            Err(error) => {
                // What was frozen is lost to the map: the log has it, and the next open replays it.
                self.streams.close();
                Err(CheckpointError::Map { replica, problem: error.to_string() })
            }
        }
    }
}

impl<E: Env> ReplicaInner<E> {
    /// Captures everything a checkpoint keeps of the replica. No await, no I/O.
    fn freeze(self: Rc<Self>) -> Frozen<E> {
        let log = self.log.borrow();
        let applied = self.applied.borrow();
        let state = match (self.state_is_restored.get(), &*self.state_source.borrow()) {
            (false, Some(source)) => source(),
            _ => self.restored.borrow().state.clone(),
        };
        let mut entries = Vec::new();
        log.slots().for_each(|slot| pack(slot, &mut entries));
        let suspect = match *self.health.borrow() {
            Health::Good => None,
            Health::Suspect { vote_lost, term } => Some(SuspectV1 { vote_lost, term }),
        };
        let resync = self.resync.borrow().clone();
        let saved = ReplicaV1 {
            descriptor: Some(DescriptorV1::new(&self.descriptor, self.vote_slot)),
            op: self.op.get(),
            vote: log.vote.as_ref().map(Into::into),
            purged: log.purged.map(Into::into),
            committed: log.committed.map(Into::into),
            applied: applied.id.map(Into::into),
            membership: Some(MembershipV1::new(&applied.membership)),
            state,
            sequence: applied.sequence.0,
            suspect,
            entries: entries.into(),
            map: Bytes::new(),
            resync: resync.as_ref().map(|resync| ResyncV1 {
                id: resync.id,
                since: resync.since.0,
                installed: resync.installed.get(),
                map: Bytes::new(),
                from_empty: resync.from_empty,
            }),
            resyncs: self.resyncs.get(),
            map_lost: self.map_lost.get(),
            mixed_upto: self.mixed_upto.get().0,
        };
        let map = self.map();
        let frozen = map.freeze();
        let resync = resync.map(|resync| (resync.map.clone(), resync.map.freeze()));
        let (covered, membership) = (applied.id, applied.membership.clone());
        drop((log, applied));
        Frozen { replica: self, applied: covered, membership, saved, map, frozen, resync }
    }
}
