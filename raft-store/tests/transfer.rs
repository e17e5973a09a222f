//! Bringing a replica to a peer's state: by difference and from nothing, through crashes.

mod store;
mod support;

use ballast_block::{BLOCK_SIZE, ReplicaId, Sequence};
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::pool::Pool;
use ballast_raft_store::replica::{
    DiffChange, InstallState, Pin, Replica, Resync, ResyncBase, ResyncError,
};
use ballast_raft_store::types::{Entry, EntryPayload};
use openraft::storage::{RaftLogReader, RaftLogStorage};
use store::{Machine, State, append, blocks, entry, read, write};
use support::pool::path;
use support::{Image, MemoryEnv, run};

const VOLUME: u32 = 400;

struct Node {
    env: MemoryEnv,
    pool: Pool<MemoryEnv>,
    machine: Machine<MemoryEnv>,
}

impl Node {
    async fn new() -> Self {
        let env = MemoryEnv::default();
        store::format(&env, &path()).await;
        let (pool, _) = store::open(&env, &path()).await.unwrap();
        let replica = pool.create_replica(store::descriptor(1)).await.unwrap();
        let machine = Machine::new(pool.clone(), replica);
        Self { env, pool, machine }
    }

    /// Crashes with what is durable.
    async fn crash(self) -> Self {
        let image = self.env.image(&path());
        drop(self);
        Self::on(image).await
    }

    async fn on(image: Image) -> Self {
        let env = MemoryEnv::with_image(&path(), image);
        let (pool, report) = store::open(&env, &path()).await.unwrap();
        assert!(report.suspects.is_empty());
        let machine = Machine::new(pool.clone(), pool.replica(ReplicaId(1)).unwrap());
        Self { env, pool, machine }
    }

    fn replica(&self) -> &Replica<MemoryEnv> {
        &self.machine.replica
    }

    /// Appends and applies.
    async fn take(&self, entries: &[Entry]) {
        append(self.replica(), entries.to_vec()).await.unwrap();
        self.apply().await;
    }

    async fn apply(&self) {
        let from = self.replica().applied().map_or(0, |id| id.index + 1);
        for entry in self.replica().log().try_get_log_entries(from..).await.unwrap() {
            self.machine.apply_one(entry);
        }
    }

    async fn content(&self) -> Vec<u8> {
        read(self.replica(), 0, VOLUME).await.unwrap()
    }

    fn install_state(&self) -> InstallState {
        let state = *self.machine.state.borrow();
        InstallState {
            applied: self.replica().applied().unwrap(),
            membership: self.replica().membership(),
            state: [state.sequence.to_le_bytes(), state.digest.to_le_bytes()].concat().into(),
            sequence: Sequence(state.sequence),
        }
    }

    fn load(&self, state: &InstallState) {
        let number = |at: usize| u64::from_le_bytes(state.state[at..at + 8].try_into().unwrap());
        *self.machine.state.borrow_mut() = State { sequence: number(0), digest: number(8) };
    }
}

fn trim(index: u64, start: u64, count: u64) -> Entry {
    let body = Body::Trim { start, count };
    entry(index, EntryPayload::Normal(Command { origin: Origin::default(), body }))
}

/// Some writes and trims from `index` on.
fn history(index: u64, count: u64) -> Vec<Entry> {
    let one = |index: u64| match index % 7 {
        3 => trim(index, index * 13 % 300, 40),
        5 => entry(index, EntryPayload::Blank),
        _ => write(index, index * 37 % 390, blocks(1 + (index % 9) as u32, index)),
    };
    (index..index + count).map(one).collect()
}

/// Carries everything newer than the resync's start.
async fn carry(from: &Pin<MemoryEnv>, to: &Resync<MemoryEnv>) -> usize {
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

#[test]
fn a_difference_brings_a_replica_up() {
    run(async {
        let (leader, follower) = (Node::new().await, Node::new().await);
        let before = history(0, 40);
        leader.take(&before).await;
        follower.take(&before).await;
        leader.take(&history(40, 30)).await;
        // Entries that the leader does not have any more: they are voided by the install.
        append(follower.replica(), history(40, 5)).await.unwrap();
        let resync = follower.replica().resync(ResyncBase::Applied).await.unwrap();
        let other = follower.replica().resync(ResyncBase::Applied).await;
        assert!(matches!(other, Err(ResyncError::Running(ReplicaId(1)))));
        let pin = leader.replica().pin();
        let state = leader.install_state();
        // The view does not move with the leader.
        let expected = leader.content().await;
        leader.take(&history(70, 10)).await;
        let carried = carry(&pin, &resync).await;
        assert!(carried < 30 * 9 * BLOCK_SIZE, "only what changed");
        let old = follower.content().await;
        assert_ne!(old, expected, "nothing shows before the install");
        resync.install(state.clone()).await.unwrap();
        follower.load(&state);
        assert_eq!(follower.content().await, expected);
        let log = follower.replica().log().get_log_state().await.unwrap();
        assert_eq!(log.last_purged_log_id, Some(state.applied));
        assert_eq!(log.last_log_id, Some(state.applied));
        follower.take(&history(70, 10)).await;
        assert_eq!(follower.content().await, leader.content().await);
        assert_eq!(follower.replica().restored().applied, Some(state.applied));

        // From the install record, and from a checkpoint behind it.
        for _ in 0..2 {
            let image = follower.env.image(&path());
            let again = Node::on(image).await;
            again.apply().await;
            assert_eq!(again.content().await, leader.content().await);
            assert_eq!(*again.machine.state.borrow(), *leader.machine.state.borrow());
            follower.pool.checkpoint().await.unwrap();
        }
    });
}

#[test]
fn an_install_is_all_or_nothing() {
    run(async {
        let leader = Node::new().await;
        let before = history(0, 40);
        leader.take(&before).await;
        leader.take(&history(40, 30)).await;
        let state = leader.install_state();
        let expected = leader.content().await;
        let pin = leader.replica().pin();
        for base in [ResyncBase::Applied, ResyncBase::Empty] {
            for crash_at in 0..40 {
                let follower = Node::new().await;
                follower.take(&before).await;
                let old = follower.content().await;
                let resync = follower.replica().resync(base).await.unwrap();
                carry(&pin, &resync).await;
                let first = follower.env.disk.borrow().writes.len();
                let install = resync.install(state.clone());
                follower.env.disk.borrow_mut().fail_write = Some(crash_at);
                let installed = install.await.is_ok();
                let writes = follower.env.disk.borrow().writes.len() - first;
                let again = follower.crash().await;
                let applied = again.replica().applied();
                again.apply().await;
                let content = again.content().await;
                if applied == Some(state.applied) {
                    assert_eq!(content, expected, "{base:?} crash at {crash_at}");
                } else {
                    assert!(!installed, "{base:?}: installed, then forgotten at {crash_at}");
                    assert_eq!(content, old, "{base:?} crash at {crash_at}");
                }
                if installed {
                    assert!(crash_at >= writes, "{writes} writes");
                    break;
                }
                assert!(crash_at < 39, "it must end some time");
            }
        }
    });
}

#[test]
fn a_resync_that_is_dropped_leaves_nothing() {
    run(async {
        let (leader, follower) = (Node::new().await, Node::new().await);
        leader.take(&history(0, 60)).await;
        follower.take(&history(0, 10)).await;
        follower.pool.quiesce_maps().await.unwrap();
        let live = follower.pool.space().live;
        let old = follower.content().await;
        let pin = leader.replica().pin();
        let resync = follower.replica().resync(ResyncBase::Empty).await.unwrap();
        carry(&pin, &resync).await;
        assert!(follower.pool.space().live > live);
        drop(resync);
        follower.pool.checkpoint().await.unwrap();
        // Map pages that the checkpoint wrote are the rest.
        assert!(follower.pool.space().live < live + (64 << 10));
        assert_eq!(follower.content().await, old);
        let resync = follower.replica().resync(ResyncBase::Empty).await.unwrap();
        let page = leader.replica().diff(&pin, Sequence(0), 0, BLOCK_SIZE).await.unwrap();
        let mut records = page.records;
        for record in &mut records {
            if let DiffChange::Data { crcs, .. } = &mut record.change {
                *crcs = crcs.iter().map(|crc| crc ^ 1).collect();
            }
        }
        let refused = resync.put(records).await;
        assert!(matches!(refused, Err(ResyncError::WrongBytes { .. })));
        let backwards = InstallState {
            applied: follower.replica().applied().unwrap(),
            ..leader.install_state()
        };
        let refused = resync.install(backwards).await;
        assert!(matches!(refused, Err(ResyncError::Backwards { .. })));
    });
}

/// The log entries that an install throws away hold the payload of what was applied from them: where
/// the difference brings nothing new, it is still the volume's data.
#[test]
fn what_a_difference_leaves_as_it_is_stays_live() {
    run(async {
        let (leader, follower) = (Node::new().await, Node::new().await);
        let before = history(0, 40);
        leader.take(&before).await;
        follower.take(&before).await;
        leader.take(&history(40, 3)).await;
        let resync = follower.replica().resync(ResyncBase::Applied).await.unwrap();
        let pin = leader.replica().pin();
        let state = leader.install_state();
        carry(&pin, &resync).await;
        resync.install(state.clone()).await.unwrap();
        follower.load(&state);
        follower.pool.quiesce_maps().await.unwrap();
        let content = follower.content().await;
        let mapped = content.chunks(BLOCK_SIZE).filter(|block| block.iter().any(|byte| *byte != 0));
        let live = follower.pool.space().live / BLOCK_SIZE as u64;
        let mapped = mapped.count() as u64;
        assert!(live >= mapped, "{mapped} blocks hold data, {live} are kept");
        assert_eq!(content, leader.content().await);
    });
}
