//! What a replica must be: the operations that were asked of it, in order, and which of them were
//! acknowledged.

use std::collections::BTreeMap;

use ballast_block::{BLOCK_SIZE, Payload};
use ballast_raft_store::entry::Body;
use ballast_raft_store::types::{Entry, EntryPayload, LogId, Vote};

use super::{State, blocks};

/// Blocks of the test volumes.
pub const VOLUME: u64 = 600;

/// An operation on a log.
#[derive(Clone, Debug)]
pub enum Op {
    Append(Entry),
    Truncate(LogId),
    Purge(LogId),
}

/// A log: what was purged, and the entries that are retained.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogModel {
    pub purged: Option<LogId>,
    pub entries: BTreeMap<u64, Entry>,
}

impl LogModel {
    pub fn last(&self) -> Option<LogId> {
        self.entries.values().next_back().map(|entry| entry.log_id).or(self.purged)
    }

    pub fn next_index(&self) -> u64 {
        self.last().map_or(0, |last| last.index + 1)
    }

    fn perform(&mut self, op: &Op) {
        match op {
            Op::Append(entry) => {
                assert_eq!(entry.log_id.index, self.next_index());
                self.entries.insert(entry.log_id.index, entry.clone());
            }
            Op::Truncate(last) => self.entries.retain(|&index, _| index <= last.index),
            Op::Purge(upto) => {
                self.purged = self.purged.max(Some(*upto));
                self.entries.retain(|&index, _| index > upto.index);
            }
        }
    }
}

/// A replica.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The log before the first of `ops`.
    base: LogModel,
    ops: Vec<Op>,
    /// As many of `ops` are known to be durable.
    pub acked: usize,
    pub log: LogModel,
    /// Every entry ever applied, from index 0.
    pub applied: Vec<Entry>,
    /// Votes asked for, of which the first `votes_acked` were answered.
    pub votes: Vec<Vote>,
    pub votes_acked: usize,
    /// Crashes so far: an acknowledgement of an earlier life does not count in this one.
    pub life: u64,
}

impl Model {
    pub fn perform(&mut self, op: Op) {
        self.log.perform(&op);
        self.ops.push(op);
    }

    /// Number of operations so far: what an acknowledgement names.
    pub fn issued(&self) -> usize {
        self.ops.len()
    }

    /// After a crash: finds which prefix of the operations the recovered log shows, which must
    /// have all that were acknowledged, and goes on from there.
    pub fn recover(&mut self, found: &LogModel, vote: Option<Vote>) -> Result<(), String> {
        let mut log = self.base.clone();
        let mut matched = None;
        for (nth, op) in self.ops.iter().enumerate() {
            if nth >= self.acked && log == *found {
                matched = Some(nth);
            }
            log.perform(op);
        }
        if log == *found {
            matched = Some(self.ops.len());
        }
        if matched.is_none() {
            return Err(format!(
                "log {:?}..{:?} is none of the {} to {} operations asked for; asked last {:?}..{:?}",
                found.purged,
                found.last(),
                self.acked,
                self.ops.len(),
                self.log.purged,
                self.log.last(),
            ));
        }
        let acked = self.votes[..self.votes_acked].last();
        let known = vote.as_ref().map_or(Some(0), |vote| {
            self.votes.iter().position(|one| one == vote).map(|nth| nth + 1)
        });
        if known.is_none_or(|known| known < self.votes_acked) {
            return Err(format!("vote {vote:?} is found, {acked:?} was acknowledged"));
        }
        self.votes.truncate(known.expect("checked"));
        self.votes_acked = self.votes.len();
        *self = Self {
            base: found.clone(),
            ops: Vec::new(),
            acked: 0,
            log: found.clone(),
            applied: std::mem::take(&mut self.applied),
            votes: std::mem::take(&mut self.votes),
            votes_acked: self.votes_acked,
            life: self.life,
        };
        Ok(())
    }

    /// State of the layer above after the first `count` entries.
    pub fn state(&self, count: usize) -> State {
        let mut state = State::default();
        for entry in &self.applied[..count] {
            state.note(entry);
            if let EntryPayload::Normal(command) = &entry.payload {
                let counts = match command.body {
                    Body::Write { .. } => command.origin.key != 77,
                    Body::Trim { .. } => true,
                    Body::Control(_) => false,
                };
                state.sequence += u64::from(counts);
            }
        }
        state
    }

    /// What the volume holds after the first `count` entries.
    pub fn content(&self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; VOLUME as usize * BLOCK_SIZE];
        for entry in &self.applied[..count] {
            let EntryPayload::Normal(command) = &entry.payload else { continue };
            match &command.body {
                Body::Write { range, .. } if command.origin.key != 77 => {
                    let payload: Payload = blocks(range.count, stamp_of(entry));
                    let at = range.start as usize * BLOCK_SIZE;
                    bytes[at..at + payload.len()].copy_from_slice(&payload);
                }
                Body::Trim { start, count } => {
                    let range = *start as usize..(*start + *count) as usize;
                    bytes[range.start * BLOCK_SIZE..range.end * BLOCK_SIZE].fill(0);
                }
                _ => {}
            }
        }
        bytes
    }
}

/// What the payload of the entry with this id is made of.
pub fn stamp_of(entry: &Entry) -> u64 {
    ballast_raft_store::types::term_of(&entry.log_id) << 32 | entry.log_id.index
}
