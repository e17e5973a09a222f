//! A difference that takes the place of what it replaces, because there is no room for both
//! (docs/decisions/0004-difference-in-place.md).

mod store;
mod support;

use std::rc::Rc;

use ballast_block::checksum::block_crcs;
use ballast_block::{BLOCK_SIZE, ReplicaId, Sequence};
use ballast_raft_store::map::ROOT_BRANCH;
use ballast_raft_store::replica::{
    DiffChange, DiffRecord, InstallState, Pin, ReadError, ResyncBase, ResyncError,
};
use openraft::storage::RaftLogStorage;
use store::node::{Node, carry, history};
use store::{append, blocks, write};
use support::{MemoryEnv, run};

/// A leader with 70 entries and what it offers; a follower gets the first 40.
struct Offer {
    leader: Node,
    pin: Pin<MemoryEnv>,
    state: InstallState,
    content: Vec<u8>,
}

impl Offer {
    async fn new() -> Self {
        let leader = Node::new().await;
        leader.take(&history(0, 70)).await;
        let (pin, state) = (leader.replica().pin(), leader.install_state());
        let content = leader.content().await;
        Self { leader, pin, state, content }
    }

    fn base(&self) -> ResyncBase {
        ResyncBase::InPlace(self.state.sequence)
    }

    /// A follower with the first 40 entries, and five of the next that it has not applied.
    async fn follower() -> Node {
        let follower = Node::new().await;
        follower.take(&history(0, 40)).await;
        append(follower.replica(), history(40, 5)).await.unwrap();
        follower
    }

    /// Carries all of it and installs it.
    async fn give(&self, follower: &Node) -> Result<(), ResyncError> {
        let resync = follower.replica().resync(self.base()).await?;
        self.put_holes(&resync).await?;
        let mut next = Some(0);
        while let Some(block) = next {
            let from = self.leader.replica();
            let page = from.diff(&self.pin, resync.since(), block, 32 * BLOCK_SIZE).await.unwrap();
            next = page.next;
            resync.put(page.records).await?;
            // As the keeper does.
            follower.pool.checkpoint().await?;
        }
        resync.install(self.state.clone()).await?;
        follower.load(&self.state);
        Ok(())
    }

    async fn put_holes(
        &self,
        resync: &ballast_raft_store::replica::Resync<MemoryEnv>,
    ) -> Result<(), ResyncError> {
        let from = self.leader.replica();
        let page = from.diff_holes(&self.pin, resync.since(), 0, 1 << 30).await.unwrap();
        assert!(page.next.is_none());
        assert!(page.records.iter().all(|record| record.change == DiffChange::Hole));
        assert!(!page.records.is_empty());
        resync.put(page.records).await
    }
}

async fn is_mixed(node: &Node) -> bool {
    let mixed = node.replica().is_mixed();
    let refused =
        matches!(store::read(node.replica(), 0, 1).await, Err(ReadError::Mixed(ReplicaId(1))));
    assert_eq!(mixed, refused);
    mixed
}

/// Nothing that it freed is used, nothing is kept twice.
async fn check_space(node: &Node, content: &[u8]) {
    node.pool.quiesce_maps().await.unwrap();
    let mapped = content.chunks(BLOCK_SIZE).filter(|block| block.iter().any(|byte| *byte != 0));
    let (mapped, live) = (mapped.count() as u64, node.pool.space().live / BLOCK_SIZE as u64);
    // Map pages are the rest.
    assert!((mapped..mapped + 40).contains(&live), "{mapped} blocks hold data, {live} are kept");
}

#[test]
fn a_difference_in_place_brings_a_replica_up() {
    run(async {
        let offer = Offer::new().await;
        let follower = Offer::follower().await;
        let resync = follower.replica().resync(offer.base()).await.unwrap();
        assert!(!is_mixed(&follower).await, "nothing has changed yet");
        offer.put_holes(&resync).await.unwrap();
        assert!(is_mixed(&follower).await);
        // Nobody is brought up from what is of no single moment, whenever it is asked.
        let pin = follower.replica().pin();
        let refused = follower.replica().diff(&pin, Sequence(0), 0, BLOCK_SIZE).await;
        assert!(matches!(refused, Err(ReadError::Mixed(_))));
        carry(&offer.pin, &resync).await;
        assert!(is_mixed(&follower).await, "not before the install");
        resync.install(offer.state.clone()).await.unwrap();
        follower.load(&offer.state);
        assert!(!is_mixed(&follower).await);
        assert_eq!(follower.content().await, offer.content);
        let refused = follower.replica().diff(&pin, Sequence(0), 0, BLOCK_SIZE).await;
        assert!(matches!(refused, Err(ReadError::Mixed(_))));
        drop(pin);
        let log = follower.replica().log().get_log_state().await.unwrap();
        assert_eq!(log.last_log_id, Some(offer.state.applied));
        check_space(&follower, &offer.content).await;
        offer.leader.take(&history(70, 10)).await;
        follower.take(&history(70, 10)).await;
        let content = offer.leader.content().await;
        assert_eq!(follower.content().await, content);
        let again = follower.crash().await;
        again.apply().await;
        assert_eq!(again.content().await, content);
        check_space(&again, &content).await;
    });
}

/// The log alone completes it, too: a new leader may still have what the old one had purged.
#[test]
fn the_log_completes_what_a_difference_began() {
    run(async {
        let offer = Offer::new().await;
        for checkpoints in [false, true] {
            let follower = Offer::follower().await;
            let resync = follower.replica().resync(offer.base()).await.unwrap();
            carry(&offer.pin, &resync).await;
            if checkpoints {
                follower.pool.checkpoint().await.unwrap();
            }
            drop(resync);
            assert!(is_mixed(&follower).await, "what is put stays");
            let follower = if checkpoints { follower.crash().await } else { follower };
            follower.apply().await;
            assert!(is_mixed(&follower).await, "the log is not there yet");
            append(follower.replica(), history(45, 25)).await.unwrap();
            follower.apply().await;
            assert!(!is_mixed(&follower).await);
            assert_eq!(follower.content().await, offer.content);
            check_space(&follower, &offer.content).await;
            assert_eq!(*follower.machine.state.borrow(), *offer.leader.machine.state.borrow());
        }
    });
}

/// A crash at every write of an install in place: the replica is as before, mixed, or as the leader;
/// another difference and the log complete it alike.
#[test]
fn a_crash_in_the_middle_is_completed() {
    run(async {
        let offer = Offer::new().await;
        let mut seen = [0; 3];
        for crash_at in 0..400 {
            let follower = Offer::follower().await;
            let old = follower.content().await;
            // Some of it is in a checkpoint.
            if crash_at % 3 == 1 {
                follower.pool.checkpoint().await.unwrap();
            }
            follower.env.disk.borrow_mut().fail_write = Some(crash_at);
            let given = offer.give(&follower).await.is_ok();
            let again = follower.crash().await;
            let applied = again.replica().applied();
            if applied == Some(offer.state.applied) {
                seen[2] += 1;
                again.apply().await;
            } else {
                assert!(!given, "installed, then forgotten at {crash_at}");
                if is_mixed(&again).await {
                    seen[1] += 1;
                } else {
                    seen[0] += 1;
                    let entries = again.replica().applied().map_or(0, |id| id.index + 1);
                    assert!(entries <= 40);
                    // Up to where it had applied: the rest of its log is not known to be committed.
                    again.apply_upto(39).await;
                    assert_eq!(again.content().await, old, "crash at {crash_at}");
                }
                if crash_at % 2 == 0 {
                    again.apply_upto(39).await;
                    offer.give(&again).await.unwrap();
                } else {
                    append(again.replica(), history(45, 25)).await.unwrap();
                    again.apply().await;
                }
            }
            assert!(!is_mixed(&again).await);
            assert_eq!(again.content().await, offer.content, "crash at {crash_at}");
            check_space(&again, &offer.content).await;
            if given {
                break;
            }
            assert!(crash_at < 399, "it must end some time");
        }
        println!("as before, mixed, installed: {seen:?}");
        assert!(seen.iter().all(|&count| count > 0), "{seen:?}");
    });
}

/// What was put by a try that did not end is not stored again.
#[test]
fn a_second_try_stores_only_what_is_missing() {
    run(async {
        let offer = Offer::new().await;
        let follower = Offer::follower().await;
        let resync = follower.replica().resync(offer.base()).await.unwrap();
        carry(&offer.pin, &resync).await;
        drop(resync);
        follower.pool.quiesce_maps().await.unwrap();
        let live = follower.pool.space().live;
        let resync = follower.replica().resync(offer.base()).await.unwrap();
        let before = follower.pool.space().live;
        carry(&offer.pin, &resync).await;
        // Marks of holes, and no block.
        assert_eq!(follower.pool.space().live, before);
        assert!(before <= live + (64 << 10));
        let late = DiffRecord {
            branch: ROOT_BRANCH,
            start: 3,
            count: 1,
            sequence: Sequence(offer.state.sequence.0 + 1),
            change: DiffChange::Hole,
        };
        let refused = resync.put(vec![late]).await;
        assert!(matches!(refused, Err(ResyncError::TooLate { block: 3, .. })));
        resync.install(offer.state.clone()).await.unwrap();
        assert_eq!(follower.content().await, offer.content);
    });
}

/// Blocks of one write on a full pool.
const BLOCKS: u32 = 64;

fn record(slot: u64, sequence: u64) -> DiffRecord {
    let payload = blocks(BLOCKS, sequence);
    let crcs: Rc<[u32]> = block_crcs(&payload).collect();
    let (start, count) = (slot * u64::from(BLOCKS), u64::from(BLOCKS));
    let change = DiffChange::Data { crcs, payload };
    DiffRecord { branch: ROOT_BRANCH, start, count, sequence: Sequence(sequence), change }
}

/// A pool as full as writers may make it: every block of it replaced, and other blocks taken for those
/// that were trimmed.
#[test]
fn a_full_pool_takes_a_difference_in_place() {
    run(async {
        let follower = Node::new().await;
        let slots = follower.pool.space().capacity / u64::from(BLOCKS) / BLOCK_SIZE as u64;
        for index in 0..slots {
            follower.take(&[write(index, index * u64::from(BLOCKS), blocks(BLOCKS, index))]).await;
            let target = follower.replica().purge_target(2 << 20);
            if let Some(target) = target {
                follower.replica().log().purge(target).await.unwrap();
            }
        }
        let applied = follower.replica().applied().unwrap();
        let aside = follower.replica().resync(ResyncBase::Applied).await.unwrap();
        let refused = aside.put(vec![record(0, slots + 1)]).await;
        assert!(matches!(refused, Err(ResyncError::Full(_))), "{refused:?}");
        assert!(!follower.replica().is_cramped(), "in place there may be room");
        drop(aside);

        // The second half is trimmed; as much is written behind the end.
        let upto = Sequence(2 * slots + 1);
        let hole = DiffRecord {
            branch: ROOT_BRANCH,
            start: slots / 2 * u64::from(BLOCKS),
            count: (slots - slots / 2) * u64::from(BLOCKS),
            sequence: Sequence(slots + 1),
            change: DiffChange::Hole,
        };
        let moved = |nth: u64| if nth < slots / 2 { nth } else { nth + slots };
        let resync = follower.replica().resync(ResyncBase::InPlace(upto)).await.unwrap();
        resync.put(vec![hole]).await.unwrap();
        for nth in 0..slots {
            resync.put(vec![record(moved(nth), slots + 2 + nth)]).await.unwrap();
        }
        let state = InstallState {
            applied: ballast_raft_store::types::log_id(1, applied.index + 1000),
            sequence: upto,
            state: [upto.0.to_le_bytes(), [0; 8]].concat().into(),
            ..follower.install_state()
        };
        resync.install(state).await.unwrap();
        let again = follower.crash().await;
        for nth in 0..slots {
            let start = moved(nth) * u64::from(BLOCKS);
            let found = store::read(again.replica(), start, BLOCKS).await.unwrap();
            assert_eq!(found, blocks(BLOCKS, slots + 2 + nth), "{nth}");
        }

        // More than fits in any way is refused, is told, and can be given up.
        let upto = Sequence(10 * slots);
        let resync = again.replica().resync(ResyncBase::InPlace(upto)).await.unwrap();
        let mut refused = Ok(());
        for nth in 0..slots {
            refused = resync.put(vec![record(2 * slots + nth, 4 * slots + nth)]).await;
            if refused.is_err() {
                break;
            }
        }
        assert!(matches!(refused, Err(ResyncError::Full(_))), "{refused:?}");
        assert!(again.replica().is_cramped());
        drop(resync);
        again.pool.checkpoint().await.unwrap();
    });
}
