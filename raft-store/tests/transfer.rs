//! Bringing a replica to a peer's state: by difference and from nothing, through crashes.

mod store;
mod support;

use ballast_block::{BLOCK_SIZE, ReplicaId, Sequence};
use ballast_env::clock::Clock;
use ballast_raft_store::map::ROOT_BRANCH;
use ballast_raft_store::replica::{DiffChange, DiffRecord, InstallState, ResyncBase, ResyncError};
use ballast_raft_store::types::log_id;
use bytes::Bytes;
use openraft::storage::RaftLogStorage;
use store::append;
use store::node::{Node, carry, history};
use support::pool::path;
use support::run;

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

/// More changes than maps may have unmerged: while a pool is opened nobody merges, and nobody may wait
/// for that.
#[test]
fn a_pool_opens_in_the_middle_of_a_large_install() {
    run(async {
        let follower = Node::new().await;
        follower.take(&history(0, 40)).await;
        let resync = follower.replica().resync(ResyncBase::Applied).await.unwrap();
        let pages = 14_000;
        for page in 0..pages {
            let (start, count) = (page * 256 + 7, 1);
            let (branch, sequence, change) = (ROOT_BRANCH, Sequence(50), DiffChange::Hole);
            let hole = DiffRecord { branch, start, count, sequence, change };
            resync.put(vec![hole]).await.unwrap();
        }
        let (applied, sequence) = (log_id(1, 50), Sequence(50));
        let state = Bytes::from([50_u64.to_le_bytes(), [0; 8]].concat());
        let state = InstallState { applied, sequence, state, ..follower.install_state() };
        resync.install(state).await.unwrap();
        let again = tokio::select! {
            biased;
            again = Node::on(follower.env.image(&path())) => again,
            () = follower.env.sleep(std::time::Duration::from_secs(60)) => panic!("it never opens"),
        };
        assert_eq!(again.replica().applied(), Some(applied));
        let unmerged = again.pool.stats().map_delta_bytes;
        assert!(unmerged > again.pool.budget().delta_bytes as u64, "{unmerged} wait for nothing");
        tokio::select! {
            biased;
            room = again.replica().map_room() => room.unwrap(),
            () = again.env.sleep(std::time::Duration::from_secs(60)) => panic!("nobody merges"),
        }
    });
}
