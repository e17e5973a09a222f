//! A full pool: guarantee **nothing-lost-when-full**, and what the keeper frees by itself.

mod store;
mod support;

use std::pin::pin;

use ballast_block::{BLOCK_SIZE, ReplicaId, Sequence};
use ballast_env::clock::Clock;
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::format::batch::Batch;
use ballast_raft_store::pool::Pool;
use ballast_raft_store::replica::{InstallState, ResyncBase};
use ballast_raft_store::stream::StreamId;
use ballast_raft_store::types::{EntryPayload, Vote, log_id};
use bytes::Bytes;
use futures_util::{poll, stream};
use openraft::storage::{RaftLogReader, RaftLogStorage, RaftStateMachine};
use store::{Machine, append, blocks, entry, read, write};
use support::pool::path;
use support::{MemoryEnv, run};

/// Blocks of one write here.
const BLOCKS: u32 = 64;

async fn fresh() -> (MemoryEnv, Pool<MemoryEnv>, Machine<MemoryEnv>) {
    let env = MemoryEnv::default();
    store::format(&env, &path()).await;
    let (pool, _) = store::open(&env, &path()).await.unwrap();
    let replica = pool.create_replica(store::descriptor(1)).await.unwrap();
    (env, pool.clone(), Machine::new(pool, replica))
}

/// Whether leaders would send something.
fn admits(pool: &Pool<MemoryEnv>) -> bool {
    let room = pool.room();
    room.credit > 0 && !room.full
}

/// Appends, applies and purges as the layers above do.
async fn put(machine: &Machine<MemoryEnv>, index: u64, slot: u64) {
    let entry = write(index, slot * u64::from(BLOCKS), blocks(BLOCKS, index));
    append(&machine.replica, vec![entry]).await.unwrap();
    step(machine).await;
}

async fn apply_all(machine: &Machine<MemoryEnv>) {
    let from = machine.replica.applied().map_or(0, |id| id.index + 1);
    for entry in machine.replica.log().try_get_log_entries(from..).await.unwrap() {
        machine.apply_one(entry);
    }
}

async fn step(machine: &Machine<MemoryEnv>) {
    apply_all(machine).await;
    if let Some(target) = machine.replica.purge_target(2 << 20) {
        machine.replica.log().purge(target).await.unwrap();
    }
}

/// A view keeps what is overwritten: it may fill a pool. Once it is given up there is room again,
/// although nothing is written any more that would make the keeper merge.
#[test]
fn a_view_that_filled_a_pool_gives_its_room_back() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let slots = pool.space().capacity * 80 / 100 / u64::from(BLOCKS) / BLOCK_SIZE as u64;
        for index in 0..slots {
            put(&machine, index, index).await;
        }
        let pin = machine.replica.pin();
        let mut index = slots;
        while !pool.room().full {
            put(&machine, index, index % slots).await;
            index += 1;
            assert!(index < 3 * slots, "a view holds what it shows");
        }
        drop(pin);
        env.sleep(std::time::Duration::from_secs(5)).await;
        assert!(admits(&pool), "{:?} {:?}", pool.room(), pool.space());
    });
}

#[test]
fn overwriting_for_ever_never_fills_a_pool() {
    run(async {
        let (env, pool, machine) = fresh().await;
        // Nearly all that it takes, overwritten many times in an order that leaves holes everywhere.
        let slots = pool.space().capacity * 95 / 100 / u64::from(BLOCKS) / BLOCK_SIZE as u64;
        let mut newest = vec![None; slots as usize];
        for index in 0..slots * 16 {
            let slot = support::splitmix(index).1 % slots;
            put(&machine, index, slot).await;
            newest[slot as usize] = Some(index);
        }
        let stats = pool.stats();
        assert!(stats.log_bytes_written > 3 * stats.space.total, "{stats:?}");
        assert!(stats.cleaner_segments > 0, "{stats:?}");
        pool.quiesce_maps().await.unwrap();
        let live = newest.iter().flatten().count() as u64 * u64::from(BLOCKS) * BLOCK_SIZE as u64;
        // Map pages are the rest.
        assert!((live..live + (1 << 20)).contains(&pool.space().live), "{:?}", pool.space());
        for (slot, index) in newest.iter().enumerate() {
            let found = read(&machine.replica, slot as u64 * u64::from(BLOCKS), BLOCKS).await;
            match index {
                Some(index) => assert_eq!(found.unwrap(), blocks(BLOCKS, *index)),
                None => assert!(found.unwrap().iter().all(|&byte| byte == 0)),
            }
        }
        drop(env);
    });
}

/// Ten families take turns in no order; each gives up its log only when it is asked to, once in a
/// while. What they hold together is nearly what the pool takes, overwritten twenty times.
#[test]
fn several_families_overwrite_for_ever_and_the_log_stays_bounded() {
    run(async {
        let env = MemoryEnv::default();
        store::format(&env, &path()).await;
        let (pool, _) = store::open(&env, &path()).await.unwrap();
        let mut machines = Vec::new();
        for id in 1..=10 {
            let replica = pool.create_replica(store::descriptor(id)).await.unwrap();
            machines.push(Machine::new(pool.clone(), replica));
        }
        let count = 16;
        let slots = pool.space().capacity * 90 / 100 / (10 * 16 * BLOCK_SIZE as u64);
        let mut random = 7;
        let mut next = [0; 10];
        let (mut retained, mut used) = (0, 0);
        for step in 0..slots * 10 * 20 {
            let (state, number) = support::splitmix(random);
            random = state;
            // Half of the writes go to one family: the others retain old entries.
            let family = if number % 2 == 0 { 0 } else { (number >> 8) as usize % 10 };
            let (machine, slot) = (&machines[family], (number >> 32) % slots);
            let entry = write(next[family], slot * 16, blocks(count, number));
            next[family] += 1;
            append(&machine.replica, vec![entry]).await.unwrap();
            machine.replica.map_room().await.unwrap();
            apply_all(machine).await;
            if step % 20 == 0 {
                for machine in &machines {
                    if let Some(target) = machine.replica.purge_target(u64::MAX) {
                        machine.replica.log().purge(target).await.unwrap();
                    }
                }
            }
            let stats = pool.stats();
            (retained, used) = (stats.retained_bytes.max(retained), stats.space.used.max(used));
            assert!(!pool.room().full, "{stats:?}");
        }
        let stats = pool.stats();
        // What came since it was last asked, and what no checkpoint covered then, is on top.
        let limit = stats.retention_limit + pool.budget().checkpoint_log + (4 << 20);
        assert!(retained < limit, "{retained} of {limit}");
        assert!(used < stats.space.total, "{used}");
        assert!(stats.log_bytes_written > 4 * stats.space.total, "{stats:?}");
        assert!(stats.meta_segments < 6, "{stats:?}");
    });
}

#[test]
fn what_was_proposed_is_never_refused() {
    run(async {
        let (env, pool, machine) = fresh().await;
        let mut index = 0;
        while admits(&pool) {
            put(&machine, index, index).await;
            index += 1;
        }
        assert!(pool.room().full, "{:?}", pool.stats());
        // The pool is full. What others had been granted meanwhile still comes, and waits.
        for _ in 0..100 {
            let entry = write(index, index * u64::from(BLOCKS), blocks(BLOCKS, index));
            let waiting = append(&machine.replica, vec![entry]);
            let outcome = tokio::select! {
                biased;
                outcome = waiting => Some(outcome),
                () = env.sleep(std::time::Duration::from_secs(5)) => None,
            };
            let Some(outcome) = outcome else { break };
            outcome.unwrap();
            step(&machine).await;
            index += 1;
            assert!(index < 10_000);
        }
        let written = index;
        assert!(pool.failure().borrow().is_none());
        // Votes, a checkpoint and a trim get through; then there is room again.
        machine.replica.log().save_vote(&Vote::new(9, 1)).await.unwrap();
        pool.checkpoint().await.unwrap();
        let kept = written * 3 / 4;
        let count = kept * u64::from(BLOCKS);
        let body = Body::Trim { start: 0, count };
        let trim = EntryPayload::Normal(Command { origin: Origin::default(), body });
        append(&machine.replica, vec![entry(index, trim)]).await.unwrap();
        index += 1;
        step(&machine).await;
        for _ in 0..100 {
            env.sleep(std::time::Duration::from_millis(100)).await;
            // As the node does again and again.
            step(&machine).await;
        }
        assert!(admits(&pool), "{:?} {:?}", pool.room(), pool.stats());
        for _ in 0..10 {
            put(&machine, index, 0).await;
            index += 1;
        }
        for slot in kept..written {
            let found = read(&machine.replica, slot * u64::from(BLOCKS), BLOCKS).await.unwrap();
            assert_eq!(found, blocks(BLOCKS, slot));
        }
    });
}

#[test]
fn dropping_a_replica_frees_its_space() {
    run(async {
        let (env, pool, machine) = fresh().await;
        for index in 0..40 {
            put(&machine, index, index).await;
        }
        pool.quiesce_maps().await.unwrap();
        assert!(pool.space().live > 40 * u64::from(BLOCKS) * BLOCK_SIZE as u64);
        pool.drop_replica(ReplicaId(1)).await.unwrap();
        // The keeper does it.
        env.sleep(std::time::Duration::from_secs(2)).await;
        assert!(pool.space().live < 64 << 10, "{:?}", pool.space());
        pool.checkpoint().await.unwrap();
        let (total, used) = (pool.space().total, pool.space().used);
        assert!(used < total / 4, "{used} of {total}");
    });
}

/// What a view shows is its replica's until it is given up, although the replica is dropped: space
/// that was given back twice would be somebody else's the second time.
#[test]
fn a_view_keeps_the_space_of_its_dropped_replica() {
    run(async {
        let (env, pool, machine) = fresh().await;
        for index in 0..40 {
            put(&machine, index, index).await;
        }
        assert!(machine.replica.retained_bytes() > 0);
        pool.quiesce_maps().await.unwrap();
        let shown = 40 * u64::from(BLOCKS) * BLOCK_SIZE as u64;
        let pin = machine.replica.pin();
        pool.drop_replica(ReplicaId(1)).await.unwrap();
        pool.checkpoint().await.unwrap();
        assert!(pool.space().live >= shown, "{:?}", pool.space());
        drop(pin);
        env.sleep(std::time::Duration::from_secs(2)).await;
        assert!(pool.space().live < 64 << 10, "{:?}", pool.space());
    });
}

/// Entries that were read from a log wait for room in the maps; meanwhile their replica is dropped.
/// Its log and its space are others' then, and so is the room: those who wait for it get it.
#[test]
fn what_waits_for_room_is_not_applied_to_a_dropped_replica() {
    run(async {
        let (env, pool, other) = fresh().await;
        let trim = |index| {
            let body = Body::Trim { start: 0, count: pool.budget().unmerged_blocks };
            entry(index, EntryPayload::Normal(Command { origin: Origin::default(), body }))
        };
        for (id, end) in [
            (2, vec![write(2, 0, blocks(1, 2))]),
            // Enough to leave no room, if they counted.
            (3, vec![trim(2), trim(3)]),
        ] {
            let replica = pool.create_replica(store::descriptor(id)).await.unwrap();
            let mut machine = Machine::new(pool.clone(), replica.clone());
            append(&replica, [vec![trim(0), trim(1)], end].concat()).await.unwrap();
            let entries = replica.log().try_get_log_entries(0..).await.unwrap();
            let entries = stream::iter(entries.into_iter().map(|entry| Ok((entry, None))));
            let mut applying = pin!(machine.apply(entries));
            assert!(poll!(applying.as_mut()).is_pending());
            assert_eq!(replica.applied(), Some(log_id(1, 1)), "two trims leave no room");
            let mut waiting = pin!(other.replica.map_room());
            assert!(poll!(waiting.as_mut()).is_pending());
            // It is gone before anything else runs: no map is merged.
            pool.drop_replica(ReplicaId(id)).await.unwrap();
            let ended = async { (applying.await, waiting.await, other.replica.map_room().await) };
            let (applied, waited, room) = tokio::select! {
                biased;
                ended = ended => ended,
                () = env.sleep(std::time::Duration::from_secs(60)) => panic!("no room"),
            };
            let refused = applied.unwrap_err().to_string();
            assert!(refused.ends_with("was dropped"), "{refused}");
            waited.and(room).unwrap();
            assert_eq!(pool.stats().map_delta_bytes, 0);
        }
    });
}

/// A map that can't be merged has all room there is. An install that changes no map, as those of the
/// cluster group, waits for none of it.
#[test]
fn an_install_without_changes_waits_for_no_room() {
    run(async {
        let (env, pool, machine) = fresh().await;
        put(&machine, 0, 0).await;
        pool.quiesce_maps().await.unwrap();
        pool.checkpoint().await.unwrap();
        let mut image = env.image(&path());
        let written: Vec<u64> = image.written_blocks().collect();
        for block in written {
            let Ok(batch) = Batch::decode(&image.block(block).into()) else { continue };
            let payload = (1..=u64::from(batch.fields.payload_blocks)).map(|nth| block + nth);
            for at in payload.filter(|_| batch.fields.stream == StreamId::Meta) {
                // A head: docs/disk-format.md.
                if matches!(image.block(at)[4], 1 | 2) {
                    image.make_unreadable(at);
                }
            }
        }
        let env = MemoryEnv::with_image(&path(), image);
        let (pool, _) = store::open(&env, &path()).await.unwrap();
        let machine = Machine::new(pool.clone(), pool.replica(ReplicaId(1)).unwrap());
        let other = pool.create_replica(store::descriptor(2)).await.unwrap();
        let _other = Machine::new(pool.clone(), other.clone());
        let body = Body::Trim { start: 0, count: pool.budget().unmerged_blocks };
        let trim = |index| {
            let body = body.clone();
            entry(index, EntryPayload::Normal(Command { origin: Origin::default(), body }))
        };
        append(&machine.replica, vec![trim(1), trim(2), trim(3)]).await.unwrap();
        apply_all(&machine).await;
        let resync = other.resync(ResyncBase::Applied).await.unwrap();
        let installed = async {
            resync.put(Vec::new()).await.unwrap();
            let membership = other.membership();
            let state = Bytes::from_static(b"state");
            let (applied, sequence) = (log_id(1, 5), Sequence(0));
            resync.install(InstallState { applied, membership, state, sequence }).await
        };
        tokio::select! {
            biased;
            installed = installed => installed.unwrap(),
            () = env.sleep(std::time::Duration::from_secs(60)) => panic!("it waits for room"),
        }
        assert!(machine.replica.map_lost(), "nobody merges it");
        let room = pin!(machine.replica.map_room());
        assert!(poll!(room).is_pending(), "there is no room");
    });
}
