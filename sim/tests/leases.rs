//! Leases that move while the one who had them writes on (hazard F10): what he still sends is refused,
//! wherever he is and whenever it arrives.

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{BlockRange, NodeId};
use ballast_cluster::LeaseMode;
use ballast_sim::ballast::{Sizes, volume_name};
use ballast_sim::machine::Crash;
use ballast_sim::oracle::Outcome;
use ballast_sim::scene::{Scene, ScriptHost, play};
use ballast_sim::system::System;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

const SEEDS: u64 = 4;
const BLOCKS: BlockRange = BlockRange { start: 0, count: 4 };
const OTHERS: BlockRange = BlockRange { start: 8, count: 4 };

/// A new holder writes within so many milliseconds of being forced in.
const FORCED_MS_MAX: u64 = 10_000;
/// Longer than anything takes.
const PATIENCE_MS: u64 = 60_000;

fn holds<F: Future<Output = ()>>(script: impl Fn(Scene) -> F) {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, &script);
    }
}

/// A host that has the lease, writes through node 1, and has node 1 lead.
async fn holder_at_1(scene: &Scene) -> ScriptHost {
    let holder = scene.host();
    assert!(holder.take_lease(N2, LeaseMode::SingleNodeWriter, false, PATIENCE_MS).await);
    holder.attach(N1).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N1)).await;
    holder.must_write(BLOCKS).await;
    holder
}

/// Forces the lease over to a new host, through node 2, which must write soon.
async fn force(scene: &Scene) -> ScriptHost {
    let began = scene.world.now_ms();
    let next = scene.host();
    let end = began + FORCED_MS_MAX;
    while !next.take_lease(N2, LeaseMode::SingleNodeWriter, true, FORCED_MS_MAX).await {
        assert!(scene.world.now_ms() < end, "the lease can't be forced over");
    }
    next.attach(N2).await;
    next.must_write(BLOCKS).await;
    let took = scene.world.now_ms() - began;
    assert!(took < FORCED_MS_MAX, "the new holder wrote after {took} ms");
    next
}

/// The holder's node is cut off from the others and alive; the holder reaches it and writes on.
async fn holder_is_cut_off(scene: Scene, leader: NodeId) {
    let holder = holder_at_1(&scene).await;
    scene.move_leader(leader).await;
    holder.must_write(BLOCKS).await;
    scene.set_isolated(N1, true);
    let floating = holder.write(BLOCKS);
    let next = force(&scene).await;
    let late = holder.write(OTHERS);
    scene.world.sleep_ms(2_000).await;
    next.must_write(BLOCKS).await;
    scene.set_isolated(N1, false);
    for write in [floating, late] {
        // Its node ends the connection when it hears of the end of the lease.
        assert_ne!(write.within(PATIENCE_MS).await, Some(Outcome::Done));
    }
    assert!(!holder.can_attach(N1).await, "its lease has ended");
    next.must_write(BLOCKS).await;
    scene.end().await;
}

#[test]
fn a_holder_that_is_cut_off_with_the_leader_never_writes_again() {
    holds(|scene| holder_is_cut_off(scene, N1));
}

#[test]
fn a_holder_that_is_cut_off_from_the_leader_never_writes_again() {
    holds(|scene| holder_is_cut_off(scene, N3));
}

/// Nothing is cut: the holder writes all the while, and is out from one entry to the next.
#[test]
fn a_holder_that_writes_all_the_while_is_out_at_once() {
    holds(|scene| async move {
        let holder = holder_at_1(&scene).await;
        let next = scene.host();
        assert!(
            !next.take_lease(N3, LeaseMode::SingleNodeWriter, false, PATIENCE_MS).await,
            "it is held"
        );
        holder.must_write(BLOCKS).await;
        let writes: Vec<_> = (0..32).map(|_| holder.write(BLOCKS)).collect();
        let next = force(&scene).await;
        for write in writes {
            assert!(write.within(PATIENCE_MS).await.is_some(), "it ends one way or the other");
        }
        let late = holder.write(OTHERS);
        assert_ne!(late.within(PATIENCE_MS).await, Some(Outcome::Done));
        next.must_write(BLOCKS).await;
        scene.end().await;
    });
}

/// The one who forces the lease over dies with the node that he asked, half-way.
#[test]
fn a_forced_move_that_breaks_off_is_whole_or_can_be_made_again() {
    holds(|scene| async move {
        let holder = holder_at_1(&scene).await;
        let other = scene.host();
        let pause = 1 + scene.world.seed() * 7;
        let crash = async {
            scene.world.sleep_ms(pause).await;
            scene.machine(N3).crash(Crash::Kill);
        };
        let take = other.take_lease(N3, LeaseMode::SingleNodeWriter, true, 2_000);
        let (_, taken) = tokio::join!(crash, take);
        // Whoever has it now: the others have to agree on one.
        let write = holder.write(OTHERS).within(PATIENCE_MS).await;
        assert!(!(taken && write == Some(Outcome::Done)), "both have it");
        scene.start_node(N3);
        let next = force(&scene).await;
        let late = holder.write(OTHERS);
        assert_ne!(late.within(PATIENCE_MS).await, Some(Outcome::Done));
        next.must_write(BLOCKS).await;
        scene.end().await;
    });
}

/// Many writers, for raw devices: none is in another's way, and one that leaves is out alone.
#[test]
fn holders_of_a_shared_lease_come_and_go_alone() {
    holds(|scene| async move {
        let (first, second) = (scene.host(), scene.host());
        for (host, node) in [(&first, N1), (&second, N2)] {
            assert!(host.take_lease(N3, LeaseMode::Writers, false, PATIENCE_MS).await);
            host.attach(node).await;
        }
        for _ in 0..5 {
            first.must_write(BLOCKS).await;
            second.must_write(BLOCKS).await;
        }
        first.release_lease(&scene, N3).await;
        let late = first.write(OTHERS);
        assert_ne!(late.within(PATIENCE_MS).await, Some(Outcome::Done));
        second.must_write(BLOCKS).await;
        scene.end().await;
    });
}

/// A volume grows while its holder writes: what lies beyond the old end can be written when the
/// administrator has his answer, on the connection that was there before.
#[test]
fn a_volume_grows_under_its_writer() {
    holds(|scene| async move {
        let holder = holder_at_1(&scene).await;
        let old = scene.ballast.volumes()[scene.volume()].blocks;
        let beyond = BlockRange::new(old, 4);
        let refused = holder.write(beyond).within(PATIENCE_MS).await;
        assert_eq!(refused, Some(Outcome::Refused), "it lies outside");
        let bytes = (old + 1_024) * BLOCK_SIZE_U64;
        let name = volume_name(scene.volume());
        let grown = scene.ask(N3, |node| async move { node.resize_volume(&name, bytes).await });
        assert_eq!(grown.await.map(|volume| volume.size_bytes), Ok(bytes));
        scene.world.sleep_ms(100).await;
        holder.must_write(beyond).await;
        scene.end().await;
    });
}
