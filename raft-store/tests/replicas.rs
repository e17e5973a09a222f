//! Replicas end to end: append, apply, read, checkpoint, reopen.

mod store;
mod support;

use std::path::Path;

use ballast_block::{BLOCK_SIZE, ReplicaId};
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::pool::{CreateReplicaError, Pool};
use ballast_raft_store::replica::{Health, Replica};
use ballast_raft_store::types::{EntryPayload, Vote, log_id};
use openraft::storage::{RaftLogReader, RaftLogStorage};
use store::{Machine, append, blocks, descriptor, entry, read, write};
use support::{MemoryEnv, run};

const POOL: &str = "/pool";

async fn fresh() -> (MemoryEnv, Pool<MemoryEnv>, Machine<MemoryEnv>) {
    let env = MemoryEnv::default();
    store::format(&env, Path::new(POOL)).await;
    let (pool, report) = store::open(&env, Path::new(POOL)).await.unwrap();
    assert_eq!(report.replicas, 0);
    let replica = pool.create_replica(descriptor(1)).await.unwrap();
    let machine = Machine::new(pool.clone(), replica);
    (env, pool, machine)
}

/// The pool as it would be found after a crash right now.
async fn crash(env: &MemoryEnv) -> (Pool<MemoryEnv>, Machine<MemoryEnv>) {
    let image = env.image(Path::new(POOL));
    let env = MemoryEnv::with_image(Path::new(POOL), image);
    let (pool, report) = store::open(&env, Path::new(POOL)).await.unwrap();
    assert_eq!((report.replicas, report.suspects.len()), (1, 0));
    let machine = Machine::new(pool.clone(), pool.replica(ReplicaId(1)).unwrap());
    (pool, machine)
}

async fn apply_all(machine: &Machine<MemoryEnv>) {
    let from = machine.replica.applied().map_or(0, |id| id.index + 1);
    for entry in machine.replica.log().try_get_log_entries(from..).await.unwrap() {
        machine.apply_one(entry);
    }
}

fn sequence(machine: &Machine<MemoryEnv>) -> u64 {
    machine.state.borrow().sequence
}

#[test]
fn what_was_appended_is_applied_and_read() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let replica = &machine.replica;
        let entries = vec![
            entry(0, EntryPayload::Blank),
            write(1, 10, blocks(4, 1)),
            write(2, 12, blocks(1, 2)),
        ];
        append(replica, entries).await.unwrap();
        apply_all(&machine).await;
        let expected =
            [&blocks(4, 1)[..2 * BLOCK_SIZE], &blocks(1, 2), &blocks(4, 1)[3 * BLOCK_SIZE..]];
        assert_eq!(read(replica, 10, 4).await.unwrap(), expected.concat());
        assert_eq!(read(replica, 9, 1).await.unwrap(), vec![0; BLOCK_SIZE]);
        let trim = Command { origin: Origin::default(), body: Body::Trim { start: 0, count: 12 } };
        append(replica, vec![entry(3, EntryPayload::Normal(trim))]).await.unwrap();
        apply_all(&machine).await;
        assert_eq!(read(replica, 10, 2).await.unwrap(), vec![0; 2 * BLOCK_SIZE]);
        let allocation = replica.allocation(ballast_raft_store::map::ROOT_BRANCH, range(0, 20));
        assert_eq!(allocation.await.unwrap(), [(false, 12), (true, 2), (false, 6)]);

        // Replayed from the log alone, then from a checkpoint and the log behind it.
        let digest = *machine.state.borrow();
        let (pool2, machine2) = crash(&env).await;
        assert_eq!(machine2.replica.applied(), None);
        apply_all(&machine2).await;
        assert_eq!(*machine2.state.borrow(), digest);
        assert_eq!(read(&machine2.replica, 12, 1).await.unwrap(), blocks(1, 2));
        drop((pool2, machine2));

        pool.checkpoint().await.unwrap();
        append(replica, vec![write(4, 13, blocks(1, 9))]).await.unwrap();
        let (pool3, machine3) = crash(&env).await;
        assert_eq!(machine3.replica.applied(), Some(log_id(1, 3)));
        assert_eq!(sequence(&machine3), 3);
        apply_all(&machine3).await;
        assert_eq!(read(&machine3.replica, 12, 1).await.unwrap(), blocks(1, 2));
        assert_eq!(read(&machine3.replica, 13, 1).await.unwrap(), blocks(1, 9));
        assert_eq!(pool3.boot_counter(), pool.boot_counter() + 1);
    });
}

fn range(start: u64, count: u32) -> ballast_block::BlockRange {
    ballast_block::BlockRange::new(start, count)
}

#[test]
fn votes_truncations_and_purges_survive() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let mut log = machine.replica.log();
        for round in 0..2 {
            let first = round * 10 + 1;
            let entries = (first..first + 10).map(|index| write(index, index, blocks(1, index)));
            append(&machine.replica, entries.collect()).await.unwrap();
            log.truncate_after(Some(log_id(1, first + 5))).await.unwrap();
            let again = (first + 6..first + 10).map(|index| write(index, index, blocks(1, 7)));
            append(&machine.replica, again.collect()).await.unwrap();
            log.save_vote(&Vote::new(3 + round, 1)).await.unwrap();
            log.save_committed(Some(log_id(1, first + 2))).await.unwrap();
            if round == 0 {
                apply_all(&machine).await;
                pool.checkpoint().await.unwrap();
                log.purge(log_id(1, 3)).await.unwrap();
            }
        }
        append(&machine.replica, vec![write(21, 0, blocks(1, 1))]).await.unwrap();
        let (_pool, machine) = crash(&env).await;
        let mut log = machine.replica.log();
        assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(4, 1)));
        let state = log.get_log_state().await.unwrap();
        assert_eq!(state.last_purged_log_id, Some(log_id(1, 3)));
        assert_eq!(state.last_log_id, Some(log_id(1, 21)));
        assert_eq!(log.read_committed().await.unwrap(), Some(log_id(1, 13)));
        let entries = log.limited_get_log_entries(4, 22).await.unwrap();
        assert_eq!(entries.len(), 18);
        let with = |index: u64, stamp| write(index, index, blocks(1, stamp));
        assert_eq!(entries[0], with(4, 4));
        assert_eq!(entries[3], with(7, 7));
        assert_eq!(entries[9 - 4], with(9, 7));
        assert_eq!(entries[11 - 4], with(11, 11));
    });
}

#[test]
fn replica_ids_are_used_once() {
    run(async {
        let (env, pool, machine) = fresh().await;
        append(&machine.replica, vec![write(0, 0, blocks(8, 1))]).await.unwrap();
        apply_all(&machine).await;
        let again = pool.create_replica(descriptor(1)).await;
        assert!(matches!(again, Err(CreateReplicaError::SeenBefore(ReplicaId(1)))));
        assert_eq!(machine.replica.descriptor(), descriptor(1));
        assert_eq!(machine.replica.health(), Health::Good);
        pool.drop_replica(ReplicaId(1)).await.unwrap();
        assert!(pool.replica(ReplicaId(1)).is_none());
        assert!(append(&machine.replica, vec![write(1, 0, blocks(1, 1))]).await.is_err());
        assert!(read(&machine.replica, 0, 1).await.is_err());
        let again = pool.create_replica(descriptor(1)).await;
        assert!(matches!(again, Err(CreateReplicaError::SeenBefore(_))));
        pool.create_replica(descriptor(2)).await.unwrap();
        for with_checkpoint in [false, true] {
            let image = env.image(Path::new(POOL));
            let env = MemoryEnv::with_image(Path::new(POOL), image);
            let (reopened, _) = store::open(&env, Path::new(POOL)).await.unwrap();
            let ids: Vec<ReplicaId> = reopened.replicas().iter().map(Replica::id).collect();
            assert_eq!((ids, reopened.dropped()), (vec![ReplicaId(2)], vec![ReplicaId(1)]));
            let again = reopened.create_replica(descriptor(1)).await;
            assert!(matches!(again, Err(CreateReplicaError::SeenBefore(_))));
            if !with_checkpoint {
                pool.checkpoint().await.unwrap();
            }
        }
        pool.quiesce_maps().await.unwrap();
        assert_eq!(pool.space().live % BLOCK_SIZE as u64, 0);
    });
}

#[test]
fn a_pool_stops_with_its_last_handle_and_opens_again() {
    run(async {
        let (env, pool, machine) = fresh().await;
        append(&machine.replica, vec![write(0, 0, blocks(1, 1))]).await.unwrap();
        apply_all(&machine).await;
        let replica = machine.replica.clone();
        drop((pool, machine));
        assert!(append(&replica, vec![write(1, 0, blocks(1, 1))]).await.is_err());
        drop(replica);
        // Tasks of the old pool end at their next turn.
        tokio::task::yield_now().await;
        let (pool, _) = store::open(&env, Path::new(POOL)).await.unwrap();
        assert_eq!(pool.replicas().len(), 1);
    });
}
