//! What a replica does about a disk that does not keep what it was given.

mod store;
mod support;

use ballast_block::{BLOCK_SIZE, ReplicaId};
use ballast_env::clock::Clock;
use ballast_raft_store::format::batch::Batch;
use ballast_raft_store::map::ROOT_BRANCH;
use ballast_raft_store::pool::{Pool, RecoveryReport};
use ballast_raft_store::replica::{
    ClearSuspectError, DamagedBlock, Health, InstallState, ReadError, RepairError, ResyncBase,
};
use ballast_raft_store::stream::StreamId;
use ballast_raft_store::types::{Entry, Vote, log_id};
use bytes::Bytes;
use openraft::storage::{RaftLogReader, RaftLogStorage};
use store::{Machine, append, blocks, read, write};
use support::pool::path;
use support::{Image, MemoryEnv, run};

type Opened = (MemoryEnv, Pool<MemoryEnv>, RecoveryReport, Machine<MemoryEnv>);

async fn fresh() -> (MemoryEnv, Pool<MemoryEnv>, Machine<MemoryEnv>) {
    let env = MemoryEnv::default();
    store::format(&env, &path()).await;
    let (pool, _) = store::open(&env, &path()).await.unwrap();
    let replica = pool.create_replica(store::descriptor(1)).await.unwrap();
    (env, pool.clone(), Machine::new(pool, replica))
}

async fn open(image: Image) -> Opened {
    let env = MemoryEnv::with_image(&path(), image);
    let (pool, report) = store::open(&env, &path()).await.unwrap();
    let machine = Machine::new(pool.clone(), pool.replica(ReplicaId(1)).unwrap());
    (env, pool, report, machine)
}

async fn apply(machine: &Machine<MemoryEnv>) {
    let from = machine.replica.applied().map_or(0, |id| id.index + 1);
    for entry in machine.replica.log().try_get_log_entries(from..).await.unwrap() {
        machine.apply_one(entry);
    }
}

/// Where the block with these bytes lies.
fn place_of(image: &Image, bytes: &[u8]) -> u64 {
    let found: Vec<u64> =
        image.written_blocks().filter(|block| image.block(*block) == bytes).collect();
    assert_eq!(found.len(), 1);
    found[0]
}

fn damaged_of(error: ReadError) -> Vec<DamagedBlock> {
    match error {
        ReadError::Damaged { blocks, .. } => blocks,
        other => panic!("{other}"),
    }
}

#[test]
fn a_rotten_block_is_named_and_repaired() {
    run(async {
        let (env, pool, machine) = fresh().await;
        append(&machine.replica, vec![write(0, 100, blocks(6, 5))]).await.unwrap();
        apply(&machine).await;
        pool.checkpoint().await.unwrap();
        let whole = blocks(6, 5);
        let block = |nth: usize| whole.slice(nth * BLOCK_SIZE..(nth + 1) * BLOCK_SIZE);
        let mut image = env.image(&path());
        image.rot(place_of(&image, &block(2)), 77);
        image.make_unreadable(place_of(&image, &block(4)));
        let (env, pool, _, machine) = open(image).await;
        let damaged = damaged_of(read(&machine.replica, 100, 6).await.unwrap_err());
        let named: Vec<u64> = damaged.iter().map(|one| one.block).collect();
        assert_eq!(named, [102, 104]);
        assert!(damaged.iter().all(|one| one.branch == ROOT_BRANCH && one.sequence.0 == 1));
        assert_eq!(read(&machine.replica, 100, 2).await.unwrap(), whole[..2 * BLOCK_SIZE]);
        let refused = machine.replica.repair(damaged[0], block(3)).await;
        assert!(matches!(refused, Err(RepairError::WrongBytes { block: 102 })));
        for (one, nth) in damaged.iter().zip([2, 4]) {
            machine.replica.repair(*one, block(nth)).await.unwrap();
        }
        assert_eq!(read(&machine.replica, 100, 6).await.unwrap(), whole);
        assert_eq!(machine.replica.read_record(damaged[0]).await.unwrap(), Some(block(2)));
        let other = DamagedBlock { sequence: ballast_block::Sequence(9), ..damaged[0] };
        assert_eq!(machine.replica.read_record(other).await.unwrap(), None);
        assert_eq!((pool.stats().damaged_blocks, pool.stats().repaired_blocks), (2, 2));
        pool.checkpoint().await.unwrap();
        let (_, _, _, machine) = open(env.image(&path())).await;
        assert_eq!(read(&machine.replica, 100, 6).await.unwrap(), whole);
    });
}

#[test]
fn a_rotten_entry_answers_nothing_until_it_is_repaired() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let entries = (0..5).map(|index| write(index, index * 10, blocks(2, index))).collect();
        append(&machine.replica, entries).await.unwrap();
        env.sleep(std::time::Duration::from_millis(300)).await;
        let mut image = env.image(&path());
        let rotten = blocks(2, 2).slice(BLOCK_SIZE..);
        image.rot(place_of(&image, &rotten), 9);
        drop((pool, machine));
        // The scan finds it, or a reader does after a checkpoint.
        for checkpointed in [false, true] {
            if checkpointed {
                let (env, pool, report, _) = open(image).await;
                assert_eq!((report.damaged_entries, report.suspects.len()), (1, 0));
                pool.checkpoint().await.unwrap();
                image = env.image(&path());
            }
            let (env, pool, _, machine) = open(image.clone()).await;
            let mut log = machine.replica.log();
            let before = log.limited_get_log_entries(0, 5).await.unwrap();
            assert_eq!(before.len(), 2);
            assert_eq!(log.limited_get_log_entries(2, 5).await.unwrap(), []);
            assert_eq!(log.try_get_log_entries(0..5).await.unwrap().len(), 5);
            assert_eq!(machine.replica.damaged_entries(), [log_id(1, 2)]);
            let refused = machine.replica.repair_entry(log_id(1, 2), blocks(2, 3)).await;
            assert!(matches!(refused, Err(RepairError::WrongEntry { index: 2 })));
            machine.replica.repair_entry(log_id(1, 2), blocks(2, 2)).await.unwrap();
            assert_eq!(machine.replica.damaged_entries(), []);
            apply(&machine).await;
            assert_eq!(read(&machine.replica, 20, 2).await.unwrap(), blocks(2, 2));
            let (_, _, report, machine) = open(env.image(&path())).await;
            assert_eq!(report.damaged_entries, 0);
            let mut log = machine.replica.log();
            let entries = log.limited_get_log_entries(2, 5).await.unwrap();
            assert_eq!(entries[0], write(2, 20, blocks(2, 2)));
            drop(pool);
        }
    });
}

#[test]
fn a_lost_batch_makes_a_suspect() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let other = pool.create_replica(store::descriptor(2)).await.unwrap();
        append(&other, vec![write(0, 0, blocks(1, 50))]).await.unwrap();
        let mut log = machine.replica.log();
        log.save_vote(&Vote::new(4, 1)).await.unwrap();
        for index in 0..4 {
            append(&machine.replica, vec![write(index, index, blocks(1, index))]).await.unwrap();
        }
        let mut image = env.image(&path());
        // The header in front of the payload of entry 2.
        let header = place_of(&image, &blocks(1, 2)) - 1;
        assert!(Batch::decode(&image.block(header).into()).is_ok());
        image.rot(header, 200);
        let (env, pool, report, machine) = open(image).await;
        assert_eq!(report.suspects, [ReplicaId(1)]);
        let suspect = Health::Suspect { vote_lost: false, term: 4 };
        assert_eq!(machine.replica.health(), suspect);
        assert_eq!(pool.replica(ReplicaId(2)).unwrap().health(), Health::Good);
        let mut log = machine.replica.log();
        assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(4, 1)));
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(1, 1)));
        let old = machine.replica.clear_suspect(4, 1);
        assert_eq!(old, Err(ClearSuspectError::OldTerm { term: 4, known: 4 }));
        let behind = machine.replica.clear_suspect(5, 3);
        assert_eq!(behind, Err(ClearSuspectError::Behind { durable: Some(1), commit: 3 }));
        // It stays one over checkpoints and openings, until it is brought up.
        pool.checkpoint().await.unwrap();
        assert_eq!(pool.stats().suspects, 1);
        let (env2, pool2, _, machine2) = open(env.image(&path())).await;
        assert_eq!(machine2.replica.health(), suspect);
        let entries = (2..4).map(|index| write(index, index, blocks(1, index))).collect();
        append(&machine2.replica, entries).await.unwrap();
        machine2.replica.clear_suspect(5, 3).unwrap();
        assert_eq!(machine2.replica.health(), Health::Good);
        pool2.checkpoint().await.unwrap();
        let (_, _, report, _) = open(env2.image(&path())).await;
        assert!(report.suspects.is_empty());
    });
}

fn of_term(term: u64, index: u64, block: u64, data: Bytes) -> Entry {
    Entry { log_id: log_id(term, index), ..write(index, block, data) }
}

/// What a leader of a newer term took out of the log is lost with what it put there instead. What
/// comes behind must neither be put after it, nor make it committed.
#[test]
fn what_was_replaced_is_not_committed_by_what_replaced_it() {
    run(async {
        let (env, _pool, machine) = fresh().await;
        append(&machine.replica, vec![write(0, 0, blocks(1, 10))]).await.unwrap();
        append(&machine.replica, vec![write(1, 1, blocks(1, 11))]).await.unwrap();
        let mut log = machine.replica.log();
        log.save_committed(Some(log_id(1, 0))).await.unwrap();
        append(&machine.replica, vec![write(2, 2, blocks(1, 12))]).await.unwrap();
        // A leader of term 3 has other entries from 2 on.
        log.truncate_after(Some(log_id(1, 1))).await.unwrap();
        append(&machine.replica, vec![of_term(3, 2, 2, blocks(1, 22))]).await.unwrap();
        log.save_committed(Some(log_id(3, 2))).await.unwrap();
        append(&machine.replica, vec![of_term(3, 3, 3, blocks(1, 23))]).await.unwrap();
        append(&machine.replica, vec![of_term(3, 4, 4, blocks(1, 24))]).await.unwrap();
        let mut image = env.image(&path());
        let header = place_of(&image, &blocks(1, 22)) - 1;
        assert!(Batch::decode(&image.block(header).into()).is_ok());
        image.rot(header, 200);
        let (env, pool, report, machine) = open(image).await;
        assert_eq!(report.suspects, [ReplicaId(1)]);
        let mut log = machine.replica.log();
        assert_eq!(log.read_committed().await.unwrap(), Some(log_id(1, 0)));
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(1, 2)));
        // The leader brings it up, and it is good again: nothing of that may be left out later.
        log.truncate_after(Some(log_id(1, 1))).await.unwrap();
        for (index, data) in [(2, 22), (3, 23), (4, 24)] {
            let entry = of_term(3, index, index, blocks(1, data));
            append(&machine.replica, vec![entry]).await.unwrap();
        }
        machine.replica.clear_suspect(4, 4).unwrap();
        for checkpointed in [false, true] {
            if checkpointed {
                pool.checkpoint().await.unwrap();
            }
            let (_, _, _, machine) = open(env.image(&path())).await;
            let mut log = machine.replica.log();
            assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(3, 4)));
        }
    });
}

/// The same without anything replaced: the log goes on behind what it kept, under another leader.
#[test]
fn what_comes_after_an_opening_with_a_hole_is_kept() {
    run(async {
        let (env, _pool, machine) = fresh().await;
        for index in 0..4 {
            append(&machine.replica, vec![write(index, index, blocks(1, index))]).await.unwrap();
        }
        let mut image = env.image(&path());
        image.rot(place_of(&image, &blocks(1, 2)) - 1, 200);
        let (env, _pool, report, machine) = open(image).await;
        assert_eq!(report.suspects, [ReplicaId(1)]);
        append(&machine.replica, vec![of_term(3, 2, 2, blocks(1, 32))]).await.unwrap();
        append(&machine.replica, vec![of_term(3, 3, 3, blocks(1, 33))]).await.unwrap();
        machine.replica.clear_suspect(4, 3).unwrap();
        let (_, _, _, machine) = open(env.image(&path())).await;
        let mut log = machine.replica.log();
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(3, 3)));
        assert_eq!(log.try_get_log_entries(0..4).await.unwrap().len(), 4);
    });
}

/// A path that flaps: one opening can't read a batch, cuts the log there and says so; the next one can
/// read it again. Its log is short of what was acknowledged, and nothing on the disk is damaged.
#[test]
fn what_one_opening_could_not_read_is_suspect_to_the_next() {
    run(async {
        let (env, _pool, machine) = fresh().await;
        for index in 0..4 {
            append(&machine.replica, vec![write(index, index, blocks(1, index))]).await.unwrap();
        }
        let mut image = env.image(&path());
        let header = place_of(&image, &blocks(1, 2)) - 1;
        image.make_unreadable(header);
        let (env, _pool, report, _) = open(image).await;
        assert_eq!(report.suspects, [ReplicaId(1)]);
        env.sleep(std::time::Duration::from_millis(300)).await;

        let mut image = env.image(&path());
        image.make_readable(header);
        let (env, _pool, report, machine) = open(image).await;
        assert_eq!(report.suspects, [ReplicaId(1)], "it said that it had 2 and 3");
        let mut log = machine.replica.log();
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(1, 1)));
        let early = machine.replica.clear_suspect(1, 1);
        assert!(matches!(early, Err(ClearSuspectError::OldTerm { .. })), "{early:?}");

        append(&machine.replica, vec![of_term(3, 2, 2, blocks(1, 32))]).await.unwrap();
        append(&machine.replica, vec![of_term(3, 3, 3, blocks(1, 33))]).await.unwrap();
        machine.replica.clear_suspect(4, 3).unwrap();
        env.sleep(std::time::Duration::from_millis(300)).await;
        let (_, _, report, machine) = open(env.image(&path())).await;
        assert_eq!(report.suspects, [], "it was brought up");
        let mut log = machine.replica.log();
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(3, 3)));
    });
}

#[test]
fn a_lost_vote_is_never_made_good() {
    run(async {
        let (env, _pool, machine) = fresh().await;
        let mut log = machine.replica.log();
        append(&machine.replica, vec![write(0, 0, blocks(1, 9))]).await.unwrap();
        log.save_vote(&Vote::new(7, 1)).await.unwrap();
        append(&machine.replica, vec![write(1, 0, blocks(1, 1))]).await.unwrap();
        let mut image = env.image(&path());
        let vote_batch = place_of(&image, &blocks(1, 9)) + 1;
        assert!(Batch::decode(&image.block(vote_batch).into()).is_ok());
        // With one of its places left, the vote is known.
        image.rot(vote_batch, 200);
        let (_, _, _, machine) = open(image.clone()).await;
        assert_eq!(machine.replica.health(), Health::Suspect { vote_lost: false, term: 7 });
        assert_eq!(machine.replica.log().read_vote().await.unwrap(), Some(Vote::new(7, 1)));
        let slot = ballast_raft_store::format::vote_slot::SlotNumber(0).offset();
        image.rot(slot / BLOCK_SIZE as u64, 60);
        let (_, _, _, machine) = open(image).await;
        assert!(matches!(machine.replica.health(), Health::Suspect { vote_lost: true, .. }));
        let refused = machine.replica.clear_suspect(99, 0);
        assert_eq!(refused, Err(ClearSuspectError::VoteLost(ReplicaId(1))));
    });
}

#[test]
fn a_failed_write_stops_the_pool() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let other = pool.create_replica(store::descriptor(2)).await.unwrap();
        append(&machine.replica, vec![write(0, 0, blocks(1, 1))]).await.unwrap();
        apply(&machine).await;
        assert!(pool.failure().borrow().is_none());
        env.disk.borrow_mut().fail_write = Some(0);
        let lost = append(&machine.replica, vec![write(1, 0, blocks(1, 2))]).await;
        assert!(lost.unwrap_err().to_string().contains("pool failed"));
        assert!(pool.failure().borrow().is_some());
        assert!(append(&other, vec![write(0, 0, blocks(1, 1))]).await.is_err());
        assert!(other.log().save_vote(&Vote::new(1, 1)).await.is_err());
        assert!(pool.checkpoint().await.is_err());
        assert!(matches!(read(&machine.replica, 0, 1).await, Err(ReadError::Pool(_))));
        drop((pool, other, machine));
        let (_, _, report, machine) = open(env.image(&path())).await;
        assert!(report.suspects.is_empty());
        let state = machine.replica.log().get_log_state().await.unwrap();
        assert_eq!(state.last_log_id, Some(log_id(1, 0)));
    });
}

#[test]
fn a_lost_map_is_resynced_from_nothing() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let entries = (0..9).map(|index| write(index, index * 300, blocks(2, index))).collect();
        append(&machine.replica, entries).await.unwrap();
        apply(&machine).await;
        pool.quiesce_maps().await.unwrap();
        pool.checkpoint().await.unwrap();
        let mut image = env.image(&path());
        let written: Vec<u64> = image.written_blocks().collect();
        for block in written {
            let batch = Batch::decode(&image.block(block).into());
            let Ok(batch) = batch else { continue };
            if batch.fields.stream == StreamId::Meta {
                (0..batch.fields.payload_blocks.into())
                    .for_each(|nth| image.rot(block + 1 + nth, 30));
            }
        }
        let (env, pool2, report, lost) = open(image).await;
        assert_eq!(report.suspects, [ReplicaId(1)]);
        assert!(lost.replica.map_lost());
        assert!(matches!(read(&lost.replica, 0, 1).await, Err(ReadError::MapLost(_))));
        let refused = lost.replica.clear_suspect(9, 0);
        assert_eq!(refused, Err(ClearSuspectError::MapLost(ReplicaId(1))));
        pool2.checkpoint().await.unwrap();
        let (env, pool2, _, lost) = open(env.image(&path())).await;
        assert!(lost.replica.map_lost());

        append(&machine.replica, vec![write(9, 0, blocks(1, 9))]).await.unwrap();
        apply(&machine).await;
        let pin = machine.replica.pin();
        let resync = lost.replica.resync(ResyncBase::Empty).await.unwrap();
        let mut next = Some(0);
        while let Some(block) = next {
            let page = machine.replica.diff(&pin, resync.since(), block, 1 << 20).await.unwrap();
            resync.put(page.records).await.unwrap();
            next = page.next;
        }
        let state = InstallState {
            applied: pin.applied().unwrap(),
            membership: machine.replica.membership(),
            state: Bytes::from(vec![7; 5000]),
            sequence: pin.sequence(),
        };
        resync.install(state).await.unwrap();
        lost.replica.clear_suspect(9, 9).unwrap();
        for opened_again in [false, true] {
            if opened_again {
                pool2.checkpoint().await.unwrap();
            }
            let env = MemoryEnv::with_image(&path(), env.image(&path()));
            let (pool, _) = store::open(&env, &path()).await.unwrap();
            let replica = pool.replica(ReplicaId(1)).unwrap();
            assert!(!replica.map_lost());
            assert_eq!(replica.restored().state, vec![7; 5000]);
            assert_eq!(read(&replica, 0, 1).await.unwrap(), blocks(1, 9));
            assert_eq!(read(&replica, 2400, 2).await.unwrap(), blocks(2, 8));
        }
    });
}

#[test]
fn a_purge_never_outruns_the_checkpoint() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let entries = (0..9).map(|index| write(index, index, blocks(1, index))).collect();
        append(&machine.replica, entries).await.unwrap();
        apply(&machine).await;
        let retained = machine.replica.retained_bytes();
        // Nothing is covered, so nothing is proposed; who asks all the same gets a checkpoint first.
        assert_eq!(machine.replica.purge_target(retained / 2), None);
        machine.replica.log().purge(log_id(1, 4)).await.unwrap();
        assert!(machine.replica.retained_bytes() <= retained / 2);
        assert_eq!(pool.stats().checkpoints, 1);
        append(&machine.replica, vec![write(9, 9, blocks(1, 9))]).await.unwrap();
        let (_, pool, _, machine) = open(env.image(&path())).await;
        assert_eq!(machine.replica.applied(), Some(log_id(1, 8)));
        apply(&machine).await;
        pool.quiesce_maps().await.unwrap();
        pool.checkpoint().await.unwrap();
        for index in 0..10 {
            assert_eq!(read(&machine.replica, index, 1).await.unwrap(), blocks(1, index));
        }
    });
}
