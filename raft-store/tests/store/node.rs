//! A replica on a pool of its own, and what another one gives it.

use ballast_block::{BLOCK_SIZE, ReplicaId, Sequence};
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::pool::Pool;
use ballast_raft_store::replica::{DiffChange, InstallState, Pin, Replica, Resync};
use ballast_raft_store::types::{Entry, EntryPayload};
use openraft::storage::RaftLogReader;

use super::{Machine, State, append, blocks, entry, read, write};
use crate::support::pool::path;
use crate::support::{Image, MemoryEnv};

/// Blocks of the volume.
pub const VOLUME: u32 = 400;

pub struct Node {
    pub env: MemoryEnv,
    pub pool: Pool<MemoryEnv>,
    pub machine: Machine<MemoryEnv>,
}

impl Node {
    pub async fn new() -> Self {
        let env = MemoryEnv::default();
        super::format(&env, &path()).await;
        let (pool, _) = super::open(&env, &path()).await.unwrap();
        let replica = pool.create_replica(super::descriptor(1)).await.unwrap();
        let machine = Machine::new(pool.clone(), replica);
        Self { env, pool, machine }
    }

    /// Crashes with what is durable.
    pub async fn crash(self) -> Self {
        let image = self.env.image(&path());
        drop(self);
        Self::on(image).await
    }

    pub async fn on(image: Image) -> Self {
        let env = MemoryEnv::with_image(&path(), image);
        let (pool, report) = super::open(&env, &path()).await.unwrap();
        assert!(report.suspects.is_empty());
        let machine = Machine::new(pool.clone(), pool.replica(ReplicaId(1)).unwrap());
        Self { env, pool, machine }
    }

    pub fn replica(&self) -> &Replica<MemoryEnv> {
        &self.machine.replica
    }

    /// Appends and applies.
    pub async fn take(&self, entries: &[Entry]) {
        append(self.replica(), entries.to_vec()).await.unwrap();
        self.apply().await;
    }

    pub async fn apply(&self) {
        let from = self.replica().applied().map_or(0, |id| id.index + 1);
        for entry in self.replica().log().try_get_log_entries(from..).await.unwrap() {
            self.machine.apply_one(entry);
        }
    }

    /// Applies what the log has up to this index.
    pub async fn apply_upto(&self, last: u64) {
        let from = self.replica().applied().map_or(0, |id| id.index + 1);
        for entry in self.replica().log().try_get_log_entries(from..last + 1).await.unwrap() {
            self.machine.apply_one(entry);
        }
    }

    pub async fn content(&self) -> Vec<u8> {
        read(self.replica(), 0, VOLUME).await.unwrap()
    }

    pub fn install_state(&self) -> InstallState {
        let state = *self.machine.state.borrow();
        InstallState {
            applied: self.replica().applied().unwrap(),
            membership: self.replica().membership(),
            state: [state.sequence.to_le_bytes(), state.digest.to_le_bytes()].concat().into(),
            sequence: Sequence(state.sequence),
        }
    }

    pub fn load(&self, state: &InstallState) {
        let number = |at: usize| u64::from_le_bytes(state.state[at..at + 8].try_into().unwrap());
        *self.machine.state.borrow_mut() = State { sequence: number(0), digest: number(8) };
    }
}

pub fn trim(index: u64, start: u64, count: u64) -> Entry {
    let body = Body::Trim { start, count };
    entry(index, EntryPayload::Normal(Command { origin: Origin::default(), body }))
}

/// Some writes and trims from `index` on.
pub fn history(index: u64, count: u64) -> Vec<Entry> {
    let one = |index: u64| match index % 7 {
        3 => trim(index, index * 13 % 300, 40),
        5 => entry(index, EntryPayload::Blank),
        _ => write(index, index * 37 % 390, blocks(1 + (index % 9) as u32, index)),
    };
    (index..index + count).map(one).collect()
}

/// Carries everything newer than the resync's start.
pub async fn carry(from: &Pin<MemoryEnv>, to: &Resync<MemoryEnv>) -> usize {
    let mut next = Some(0);
    let mut payload = 0;
    while let Some(block) = next {
        let page = from.replica().diff(from, to.since(), block, 32 * BLOCK_SIZE).await.unwrap();
        for record in &page.records {
            if let DiffChange::Data { payload: bytes, .. } = &record.change {
                payload += bytes.len();
            }
        }
        next = page.next;
        to.put(page.records).await.unwrap();
    }
    payload
}
