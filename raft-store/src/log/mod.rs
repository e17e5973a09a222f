//! The Raft log of a replica: openraft's log storage. Step 5 (append) of a write.
//!
//! Owns the index of retained entries, vote, truncation, purge. `append` queues and returns;
//! `IOFlushed` comes from the stream's durable watermark. Never waits for a disk on the append path
//! and never answers "no space": space is a credit checked before propose (hazard F11).

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;

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

impl<E: Env> Clone for Log<E> {
    fn clone(&self) -> Self {
        Self { replica: self.replica.clone() }
    }
}

fn not_yet<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this build has no log yet"))
}

impl<E: Env> RaftLogReader<TypeConfig> for Log<E> {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug>(
        &mut self,
        _range: RB,
    ) -> io::Result<Vec<Entry>> {
        not_yet()
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        not_yet()
    }
}

impl<E: Env> RaftLogStorage<TypeConfig> for Log<E> {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        not_yet()
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, _vote: &Vote) -> io::Result<()> {
        not_yet()
    }

    async fn append<I>(&mut self, _entries: I, _callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry>,
    {
        not_yet()
    }

    async fn truncate_after(&mut self, _last: Option<LogId>) -> io::Result<()> {
        not_yet()
    }

    async fn purge(&mut self, _upto: LogId) -> io::Result<()> {
        not_yet()
    }
}
