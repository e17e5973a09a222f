//! The toy's log: entry `i` in slot `i` of a file, the vote in block 0.
//!
//! A slot is a header block and the payload behind it. The header holds a checksum over everything
//! and the term of the entry before, so that recovery stops where the chain breaks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::path::Path;
use std::rc::Rc;

use ballast_block::checksum::crc32;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{AlignedBuf, BlockRange};
use ballast_env::disk::{Disk, File, OpenMode};
use ballast_env::spawn::Spawn;
use bytes::{Buf, BufMut, Bytes};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{EntryPayload, Membership, RaftLogReader};
use tokio::sync::{mpsc, oneshot};

use crate::env::SimEnv;
use crate::env::disk::SimFile;
use crate::toy::{Entry, LogId, Planted, ToyCommand, ToyConfig, Vote, WRITE_BLOCKS_MAX};

const SLOT: u64 = ((1 + WRITE_BLOCKS_MAX) * BLOCK_SIZE) as u64;
const SLOTS: u64 = 100_000;
/// Checksum, kind, index, term, previous term, start, count, payload length.
const HEADER: usize = 48;

const BLANK: u32 = 1;
const NORMAL: u32 = 2;
const MEMBERSHIP: u32 = 3;

#[derive(Clone)]
pub(crate) struct ToyLog {
    known: Rc<RefCell<Known>>,
    writes: mpsc::UnboundedSender<Write>,
    planted: Planted,
}

#[derive(Default)]
struct Known {
    vote: Option<Vote>,
    entries: BTreeMap<u64, Entry>,
}

/// One piece of work of the writer; they are done one after another.
struct Write {
    places: Vec<(u64, Vec<Bytes>)>,
    done: Done,
}

enum Done {
    Flushed(IOFlushed<ToyConfig>),
    Waiting(oneshot::Sender<io::Result<()>>),
}

impl ToyLog {
    pub(crate) async fn open(env: &SimEnv, planted: Planted) -> io::Result<Self> {
        let path = Path::new("toy.log");
        let file = match env.open(path, OpenMode::Exclusive).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let size = SLOT * SLOTS;
                env.open(path, OpenMode::CreateNew { size }).await?
            }
            opened => opened?,
        };
        let known = Rc::new(RefCell::new(recover(&file).await?));
        let (writes, queue) = mpsc::unbounded_channel();
        env.spawn(write_all(file, queue));
        Ok(Self { known, writes, planted })
    }

    pub(crate) fn is_empty(&self) -> bool {
        let known = self.known.borrow();
        known.vote.is_none() && known.entries.is_empty()
    }

    /// Term and first block of the write at `index`.
    pub(crate) fn logged(&self, index: u64) -> Option<(u64, u64)> {
        let known = self.known.borrow();
        let entry = known.entries.get(&index)?;
        match &entry.payload {
            EntryPayload::Normal(command) => {
                Some((entry.log_id.leader_id.term, command.range.start))
            }
            _ => None,
        }
    }

    async fn write(&self, places: Vec<(u64, Vec<Bytes>)>) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        let sent = self.writes.send(Write { places, done: Done::Waiting(sender) });
        sent.map_err(|_| io::Error::other("the writer has ended"))?;
        receiver.await.map_err(io::Error::other)?
    }
}

async fn write_all(file: SimFile, mut queue: mpsc::UnboundedReceiver<Write>) {
    while let Some(write) = queue.recv().await {
        let places = write.places.into_iter();
        let writes = places.map(|(offset, parts)| file.write_at(offset, parts));
        let outcomes = futures_util::future::join_all(writes).await;
        let outcome = outcomes.into_iter().collect::<io::Result<()>>();
        match write.done {
            Done::Flushed(callback) => callback.io_completed(outcome),
            Done::Waiting(sender) => drop(sender.send(outcome)),
        }
    }
}

fn slot(index: u64) -> u64 {
    (1 + index) * SLOT
}

fn encode(entry: &Entry, previous_term: u64) -> Vec<Bytes> {
    let (kind, range, payload) = match &entry.payload {
        EntryPayload::Blank => (BLANK, BlockRange::new(0, 0), Bytes::new()),
        EntryPayload::Normal(command) => (NORMAL, command.range, command.data.clone()),
        EntryPayload::Membership(membership) => {
            let ids = membership.voter_ids().flat_map(u64::to_le_bytes);
            (MEMBERSHIP, BlockRange::new(0, 0), ids.collect())
        }
    };
    let length = (HEADER + payload.len()).max(BLOCK_SIZE);
    let mut bytes = Vec::with_capacity(length + BLOCK_SIZE);
    bytes.put_u32_le(0);
    bytes.put_u32_le(kind);
    bytes.put_u64_le(entry.log_id.index);
    bytes.put_u64_le(entry.log_id.leader_id.term);
    bytes.put_u64_le(previous_term);
    bytes.put_u64_le(range.start);
    bytes.put_u32_le(range.count);
    bytes.put_u32_le(payload.len() as u32);
    bytes.extend_from_slice(&payload);
    let crc = crc32(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(BLOCK_SIZE), 0);
    vec![AlignedBuf::copy_of(&bytes).freeze()]
}

/// The entry in a slot and the term of the one before it.
fn decode(bytes: &[u8]) -> Option<(Entry, u64)> {
    let mut fields = bytes;
    let (crc, kind) = (fields.get_u32_le(), fields.get_u32_le());
    let (index, term, previous_term) =
        (fields.get_u64_le(), fields.get_u64_le(), fields.get_u64_le());
    let range = BlockRange::new(fields.get_u64_le(), fields.get_u32_le());
    let length = fields.get_u32_le() as usize;
    let payload = fields.get(..length)?;
    if crc != crc32(&bytes[4..HEADER + length]) {
        return None;
    }
    let payload = match kind {
        BLANK => EntryPayload::Blank,
        NORMAL => EntryPayload::Normal(ToyCommand { range, data: Bytes::copy_from_slice(payload) }),
        MEMBERSHIP => {
            let ids = payload.as_chunks::<8>().0.iter().map(|id| u64::from_le_bytes(*id));
            EntryPayload::Membership(Membership::new_with_defaults(vec![ids.collect()], []))
        }
        _ => return None,
    };
    Some((Entry { log_id: log_id(term, index), payload }, previous_term))
}

fn log_id(term: u64, index: u64) -> LogId {
    let leader_id = openraft::type_config::alias::CommittedLeaderIdOf::<ToyConfig>::new(term);
    LogId { leader_id, index }
}

async fn recover(file: &SimFile) -> io::Result<Known> {
    let mut known = Known::default();
    let (outcome, block) = file.read_at(0, AlignedBuf::zeroed(BLOCK_SIZE)).await;
    outcome?;
    let mut fields = &block[..];
    let (term, node, set) = (fields.get_u64_le(), fields.get_u64_le(), fields.get_u64_le());
    if set != 0 {
        let vote = Vote::new(term, node);
        known.vote = Some(if set == 2 { Vote::new_committed(term, node) } else { vote });
    }
    let mut last_term = 0;
    for index in 0.. {
        let (outcome, bytes) = file.read_at(slot(index), AlignedBuf::zeroed(SLOT as usize)).await;
        outcome?;
        match decode(&bytes) {
            Some((entry, previous)) if previous == last_term && entry.log_id.index == index => {
                last_term = entry.log_id.leader_id.term;
                known.entries.insert(index, entry);
            }
            _ => break,
        }
    }
    Ok(known)
}

impl RaftLogReader<ToyConfig> for ToyLog {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug>(
        &mut self,
        range: R,
    ) -> io::Result<Vec<Entry>> {
        Ok(self.known.borrow().entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.known.borrow().vote)
    }
}

impl RaftLogStorage<ToyConfig> for ToyLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<ToyConfig>> {
        let known = self.known.borrow();
        let last_log_id = known.entries.last_key_value().map(|(_, entry)| entry.log_id);
        Ok(LogState { last_purged_log_id: None, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.known.borrow_mut().vote = Some(*vote);
        if self.planted.forgets_votes {
            return Ok(());
        }
        let mut block = AlignedBuf::zeroed(BLOCK_SIZE);
        let mut fields = &mut block[..];
        fields.put_u64_le(vote.leader_id.term);
        fields.put_u64_le(vote.leader_id.voted_for);
        fields.put_u64_le(if vote.committed { 2 } else { 1 });
        self.write(vec![(0, vec![block.freeze()])]).await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<ToyConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry>,
    {
        let mut places = Vec::new();
        let mut known = self.known.borrow_mut();
        for entry in entries {
            let index = entry.log_id.index;
            let previous = index.checked_sub(1).and_then(|index| known.entries.get(&index));
            let previous_term = previous.map_or(0, |entry| entry.log_id.leader_id.term);
            places.push((slot(index), encode(&entry, previous_term)));
            known.entries.insert(index, entry);
        }
        let done = if self.planted.early_ack {
            callback.io_completed(Ok(()));
            Done::Waiting(oneshot::channel().0)
        } else {
            Done::Flushed(callback)
        };
        let sent = self.writes.send(Write { places, done });
        sent.map_err(|_| io::Error::other("the writer has ended"))
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let first = last.map_or(0, |last| last.index + 1);
        let gone = self.known.borrow_mut().entries.split_off(&first);
        let zeroes = || vec![AlignedBuf::zeroed(BLOCK_SIZE).freeze()];
        self.write(gone.keys().map(|index| (slot(*index), zeroes())).collect()).await
    }

    async fn purge(&mut self, _log_id: LogId) -> io::Result<()> {
        Ok(())
    }
}
