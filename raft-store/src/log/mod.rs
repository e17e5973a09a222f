//! The Raft log of a replica: openraft's log storage. Step 5 (append) of a write.
//!
//! Owns the index of retained entries, vote, truncation, purge. `append` queues and returns;
//! `IOFlushed` comes from the stream's durable watermark. Never waits for a disk on the append path
//! and never answers "no space": space is a credit checked before propose (hazard F11).

pub(crate) mod append;
pub(crate) mod cache;
pub(crate) mod index;
mod reader;

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds, RangeInclusive};

use ballast_env::Env;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};

use crate::replica::Replica;
use crate::types::{Entry, LogId, TypeConfig, Vote};

/// openraft's log storage and log reader of a replica. A cheap handle: clones share everything.
///
/// As a reader: `entries_stream` and `try_get_log_entries` answer writes as `WriteData::Stored` and
/// touch no payload; `limited_get_log_entries` (the sender to peers) resolves payloads from memory or
/// disk, at most [`ballast_block::limits::APPEND_BYTES_MAX`] of them (at least one entry), and
/// answers nothing, never an error, where the next entry is damaged (hazard 20).
pub struct Log<E: Env> {
    replica: Replica<E>,
}

impl<E: Env> Log<E> {
    pub(crate) fn new(replica: Replica<E>) -> Self {
        Self { replica }
    }
}

impl<E: Env> Clone for Log<E> {
    fn clone(&self) -> Self {
        Self { replica: self.replica.clone() }
    }
}

/// `start..end` of any range of indexes.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&start) => start,
        Bound::Excluded(&start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&end) => end.saturating_add(1),
        Bound::Excluded(&end) => end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl<E: Env> RaftLogReader<TypeConfig> for Log<E> {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(&range);
        self.replica.inner.entries(start, end)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.replica.inner.log.borrow().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.replica.inner.entries_with_payload(start, end).await
    }

    async fn get_key_log_ids(&mut self, range: RangeInclusive<LogId>) -> io::Result<Vec<LogId>> {
        Ok(self.replica.inner.log.borrow().key_log_ids(range))
    }
}

impl<E: Env> RaftLogStorage<TypeConfig> for Log<E> {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let log = self.replica.inner.log.borrow();
        Ok(LogState { last_purged_log_id: log.purged, last_log_id: log.last() })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.replica.inner.save_vote(vote).await.map_err(io::Error::other)
    }

    /// A hint that travels with the next append: a write of its own would double the disk writes of
    /// a lone client.
    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        let inner = &self.replica.inner;
        inner.log.borrow_mut().committed = committed;
        inner.committed_unsaved.set(true);
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.replica.inner.log.borrow().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry>,
    {
        self.replica.inner.clone().append_entries(entries, callback).await.map_err(io::Error::other)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.replica.inner.truncate_after(last).await.map_err(io::Error::other)
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        self.replica.inner.purge(upto).await.map_err(io::Error::other)
    }
}
