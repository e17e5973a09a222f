//! Frozen views and differences: what a peer is resynced from.

use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{Payload, Sequence};
use ballast_env::Env;
use futures_util::future::join_all;

use crate::map::{DiffRun, MapError, PinId, ROOT_BRANCH};
use crate::pool::shared::count;
use crate::replica::core::{Map, ReplicaInner};
use crate::replica::{DamagedBlock, DiffChange, DiffPage, DiffRecord, ReadError, Replica};
use crate::types::LogId;

/// A frozen view of the map: what it shows is not freed until it is dropped.
pub struct Pin<E: Env> {
    replica: Replica<E>,
    /// The map may be replaced by an install; the pin is of this one.
    map: Rc<Map<E>>,
    id: PinId,
    applied: Option<LogId>,
    sequence: Sequence,
    /// The replica was not mixed: the view is of one moment.
    whole: bool,
}

impl<E: Env> Pin<E> {
    /// The replica.
    pub fn replica(&self) -> &Replica<E> {
        &self.replica
    }

    /// The last entry that the view contains.
    pub fn applied(&self) -> Option<LogId> {
        self.applied
    }

    /// The sequence of the view.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }
}

impl<E: Env> Drop for Pin<E> {
    fn drop(&mut self) {
        self.map.unpin(self.id);
        let inner = &self.replica.inner;
        inner.note_delta();
        // Of what nobody has written since it kept nothing. To ring for such a one would go round in
        // a circle: the keeper has log purged, and for each purge openraft is shown a view.
        if inner.applied.borrow().sequence > self.sequence {
            inner.shared.untidy.set(true);
            inner.shared.work.notify_one();
        }
    }
}

impl<E: Env> Replica<E> {
    /// Freezes a view at what is applied, for a resync of a peer.
    pub fn pin(&self) -> Pin<E> {
        let (applied, sequence) = {
            let applied = self.inner.applied.borrow();
            (applied.id, applied.sequence)
        };
        let map = self.inner.map();
        let id = map.pin(ROOT_BRANCH, sequence);
        let whole = !self.is_mixed();
        Pin { replica: self.clone(), map, id, applied, sequence, whole }
    }

    /// Changes with a sequence above `since` that `pin` shows, from block `from_block`, at most
    /// about `max_bytes` of payload.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn diff(
        &self,
        pin: &Pin<E>,
        since: Sequence,
        from_block: u64,
        max_bytes: usize,
    ) -> Result<DiffPage, ReadError> {
        let page = self.inner.diff_runs(pin, since, from_block, max_bytes).await?;
        let next = page.next;
        let read = page.runs.into_iter().map(|run| self.inner.read_diff_run(run));
        let mut records = Vec::new();
        let mut damaged = Vec::new();
        for outcome in join_all(read).await {
            match outcome {
                Ok(record) => records.push(record),
                Err(ReadError::Damaged { blocks, .. }) => damaged.extend(blocks),
                Err(other) => return Err(other),
            }
        }
        if damaged.is_empty() {
            return Ok(DiffPage { records, next });
        }
        count(&self.inner.shared.counters.damaged_blocks, damaged.len() as u64);
        tracing::error!(replica = %self.id(), blocks = ?damaged, "blocks of a difference are damaged");
        Err(ReadError::Damaged { replica: self.id(), blocks: damaged })
    }

    /// As [`Self::diff`], but only what was trimmed: cheap, and it makes room for the rest.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn diff_holes(
        &self,
        pin: &Pin<E>,
        since: Sequence,
        from_block: u64,
        max_bytes: usize,
    ) -> Result<DiffPage, ReadError> {
        let page = self.inner.diff_runs(pin, since, from_block, max_bytes).await?;
        let holes = page.runs.into_iter().filter(|run| run.data.is_none());
        let records = holes.map(|DiffRun { start, count, branch, sequence, .. }| {
            let (count, change) = (count.into(), DiffChange::Hole);
            DiffRecord { branch, start, count, sequence, change }
        });
        Ok(DiffPage { records: records.collect(), next: page.next })
    }
}

impl<E: Env> ReplicaInner<E> {
    async fn diff_runs(
        &self,
        pin: &Pin<E>,
        since: Sequence,
        from_block: u64,
        max_bytes: usize,
    ) -> Result<crate::map::DiffPage, ReadError> {
        self.usable()?;
        if !pin.whole {
            return Err(ReadError::Mixed(self.descriptor.replica));
        }
        let max_blocks = (max_bytes / BLOCK_SIZE).max(1);
        let page = pin.map.diff(pin.id, since, from_block, max_blocks).await;
        page.map_err(|error| match error {
            MapError::DiffTooOld { floor, .. } => ReadError::DiffTooOld { since, floor },
            other => self.map_error(&other),
        })
    }

    async fn read_diff_run(&self, run: DiffRun) -> Result<DiffRecord, ReadError> {
        let DiffRun { start, count, branch, sequence, data } = run;
        let record = |change| DiffRecord { branch, start, count: count.into(), sequence, change };
        let Some(data) = data else { return Ok(record(DiffChange::Hole)) };
        let (payload, bad): (Payload, _) = self.read_payload(data.first, &data.crcs).await?;
        if bad.is_empty() {
            return Ok(record(DiffChange::Data { crcs: data.crcs.into(), payload }));
        }
        let name = |&nth: &usize| DamagedBlock {
            branch,
            block: start + nth as u64,
            sequence,
            crc: data.crcs[nth],
        };
        let blocks = bad.iter().map(name).collect();
        Err(ReadError::Damaged { replica: self.descriptor.replica, blocks })
    }
}
