//! Append: step 5 of a write. One record per entry, queued for the stream's next disk write; one
//! push to the index; one reference in the cache. Also the log's control records.

use std::io;
use std::rc::Rc;

use ballast_block::checksum::block_crcs;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_env::Env;
use ballast_env::planted::PlantedBug;
use openraft::storage::IOFlushed;
use prost::Message;
use thiserror::Error;

use crate::entry::{self, Body, Command, WriteData};
use crate::log::index::Slot;
use crate::pool::{CheckpointError, PoolFailure};
use crate::replica::core::ReplicaInner;
use crate::replica::record::{LogPointV1, VoteV1};
use crate::replica::saved::without_payload;
use crate::stream::{AppendError, RecordKind, SpaceClass, StreamId, StreamPosition};
use crate::types::{Entry, EntryPayload, LogId, TypeConfig, Vote};

impl<E: Env> ReplicaInner<E> {
    /// Queues `entries`; they are readable when this returns, and durable when `flushed` is called.
    pub async fn append_entries(
        self: Rc<Self>,
        entries: impl IntoIterator<Item = Entry>,
        flushed: IOFlushed<TypeConfig>,
    ) -> Result<(), PoolFailure> {
        self.alive()?;
        let mut end: Option<(LogId, StreamPosition)> = None;
        for entry in entries {
            let id = entry.log_id;
            end = Some((id, self.append_entry(entry).await?));
        }
        let Some((last, at)) = end else {
            flushed.io_completed(Ok(()));
            return Ok(());
        };
        self.append_committed_hint();
        self.shared.note_append();
        let streams = self.shared.streams.clone();
        if streams.env().is_planted(PlantedBug::EarlyAck) {
            self.note_durable(last);
            flushed.io_completed(Ok(()));
            return Ok(());
        }
        let durable = Box::new(move |outcome: Result<(), _>| match outcome {
            Ok(()) => {
                self.note_durable(last);
                flushed.io_completed(Ok(()));
            }
            Err(failed) => {
                let failure = PoolFailure::from(failed);
                flushed.io_completed(Err(io::Error::other(failure)));
            }
        });
        streams.on_durable(StreamId::Hot, at, durable);
        Ok(())
    }

    /// Queues one entry. Waits only when the pool has no space at all.
    async fn append_entry(&self, entry: Entry) -> Result<StreamPosition, PoolFailure> {
        loop {
            match self.try_append_entry(&entry) {
                Ok((slot, at)) => {
                    self.retain(&slot);
                    self.log.borrow_mut().push(slot);
                    return Ok(at);
                }
                Err(AppendError::PoolFailed(failed)) => return Err(failed.into()),
                Err(AppendError::OutOfSpace { .. }) => self.shared.wait_for_space().await,
            }
            self.alive()?;
        }
    }

    fn try_append_entry(&self, entry: &Entry) -> Result<(Slot, StreamPosition), AppendError> {
        let mut header = self.shared.scratch.borrow_mut();
        header.clear();
        let payload = match entry::encode(entry, &mut header) {
            None => None,
            Some(WriteData::Memory(bytes)) => Some(bytes),
            Some(WriteData::Stored) => {
                panic!(
                    "{}: append of {} without its payload",
                    self.descriptor.replica, entry.log_id
                )
            }
        };
        let (class, kind) = (space_class(entry), RecordKind::Entry);
        let appended = match (&entry.payload, &payload) {
            (EntryPayload::Normal(Command { body: Body::Write { crcs, .. }, .. }), _) => {
                self.append(class, kind, &header, payload.clone(), crcs)?
            }
            (_, Some(bytes)) => {
                let crcs: Vec<u32> = block_crcs(bytes).collect();
                self.append(class, kind, &header, payload.clone(), &crcs)?
            }
            (_, None) => self.append(class, kind, &header, None, &[])?,
        };
        let blocks = payload.as_ref().map_or(0, |bytes| bytes.len() / BLOCK_SIZE);
        if let Some(bytes) = payload {
            self.shared.cache.borrow_mut().put(appended.place, bytes);
        }
        let slot = Slot {
            entry: without_payload(entry.clone()),
            place: appended.place,
            blocks: u32::try_from(blocks).expect("TRANSFER_BLOCKS_MAX fits"),
            damaged: false,
            born: self.shared.log_age(),
        };
        Ok((slot, appended.at))
    }

    /// Sends the commit hint along with what was just queued, if there is a new one. It may be left
    /// out: then it goes with the next.
    fn append_committed_hint(&self) {
        if !self.committed_unsaved.get() {
            return;
        }
        let body = LogPointV1::of(self.log.borrow().committed).encode_to_vec();
        let kind = RecordKind::Committed;
        if self.append(SpaceClass::Normal, kind, &body, None, &[]).is_ok() {
            self.committed_unsaved.set(false);
        }
    }

    /// Says that the replica is suspect no more. A record that finds no room is no loss: the next
    /// checkpoint says it, too.
    pub fn append_cleared(&self) {
        let point = LogPointV1::of(self.log.borrow().committed);
        let body = LogPointV1 { cleared: true, ..point }.encode_to_vec();
        let _ = self.append(SpaceClass::Control, RecordKind::Committed, &body, None, &[]);
    }

    /// The log up to `last` is durable, unless it was truncated since.
    fn note_durable(&self, last: LogId) {
        let log = self.log.borrow();
        let still_there = log.get(last.index).is_some_and(|slot| slot.entry.log_id == last);
        if still_there || log.purged >= Some(last) {
            self.durable.set(self.durable.get().max(Some(last)));
        }
    }

    /// Persists the vote in both of its places.
    pub async fn save_vote(&self, vote: &Vote) -> Result<(), PoolFailure> {
        self.alive()?;
        let body = VoteV1::from(vote).encode_to_vec();
        let kind = RecordKind::Vote;
        let appended = self.append_or_wait(SpaceClass::Control, kind, &body, None, &[]).await?;
        let op = self.op.get();
        self.log.borrow_mut().vote = Some(*vote);
        let streams = &self.shared.streams;
        let record = streams.durable(StreamId::Hot, appended.at);
        let slot =
            streams.write_vote_slot(self.vote_slot, self.descriptor.replica, op, body.into());
        if self.durable.get().is_none() {
            // A vote alone passes for a group that is formed: it must not outlive the group's first entry,
            // which is in the stream before its record.
            record.await?;
            return slot.await.map_err(PoolFailure::from);
        }
        let (record, slot) = futures_util::future::join(record, slot).await;
        record.and(slot).map_err(PoolFailure::from)
    }

    /// Waits until all that is in the log now is durable. Answers whether anything is.
    pub async fn settle_log(&self) -> Result<bool, PoolFailure> {
        self.alive()?;
        let streams = &self.shared.streams;
        streams.durable(StreamId::Hot, streams.position(StreamId::Hot)).await?;
        let log = self.log.borrow();
        Ok(log.last().is_some() || log.purged.is_some())
    }

    /// Voids the entries after `last`.
    pub async fn truncate_after(&self, last: Option<LogId>) -> Result<(), PoolFailure> {
        self.alive()?;
        let body = LogPointV1::of(last).encode_to_vec();
        self.append_or_wait(SpaceClass::Control, RecordKind::Truncate, &body, None, &[]).await?;
        self.truncate_index(last);
        Ok(())
    }

    /// The part of a truncation that is memory.
    pub fn truncate_index(&self, last: Option<LogId>) {
        let removed = self.log.borrow_mut().truncate_after(last);
        if self.durable.get() > last {
            self.durable.set(last);
        }
        self.release(&removed, true);
    }

    /// Forgets the entries up to `upto`. Not waited for: a purge that is lost is made again.
    ///
    /// What is applied but in no durable checkpoint would be lost with a crash: then a checkpoint is
    /// made first.
    pub async fn purge(&self, upto: LogId) -> Result<(), PurgeError> {
        self.alive()?;
        let applied = self.applied.borrow().id;
        if self.checkpointed.get() < applied.min(Some(upto)) {
            self.shared.checkpoint().await?;
        }
        let body = LogPointV1::of(Some(upto)).encode_to_vec();
        self.append_or_wait(SpaceClass::Control, RecordKind::Purge, &body, None, &[]).await?;
        self.purge_index(upto);
        Ok(())
    }

    /// The part of a purge that is memory. Entries that were never applied (an installed state
    /// covers them) leave payload that nothing will refer to.
    pub fn purge_index(&self, upto: LogId) {
        let removed = self.log.borrow_mut().purge(upto);
        let applied = self.applied.borrow().id;
        let applied_ones = removed.partition_point(|slot| Some(slot.entry.log_id) <= applied);
        self.release(&removed[..applied_ones], false);
        self.release(&removed[applied_ones..], true);
    }

    /// Whether the log may be written.
    pub fn alive(&self) -> Result<(), PoolFailure> {
        self.shared.check()?;
        match self.dropped.get() {
            true => Err(PoolFailure::ReplicaDropped(self.descriptor.replica)),
            false => Ok(()),
        }
    }
}

/// A purge failed.
#[derive(Debug, Error)]
pub(crate) enum PurgeError {
    #[error(transparent)]
    Pool(#[from] PoolFailure),
    #[error("purge waits for a checkpoint, which failed: {0}")]
    Checkpoint(#[from] CheckpointError),
}

/// Which reserve an entry may use: what frees space must get through when there is none.
fn space_class(entry: &Entry) -> SpaceClass {
    match &entry.payload {
        EntryPayload::Blank | EntryPayload::Membership(_) => SpaceClass::Control,
        EntryPayload::Normal(command) => match &command.body {
            Body::Write { .. } => SpaceClass::Normal,
            Body::Trim { .. } | Body::Control(_) => SpaceClass::Trim,
        },
    }
}
