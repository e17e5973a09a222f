//! Pools that fail, fill, or fall far behind, as scripts on the production node.

use ballast_block::{BlockRange, NodeId};
use ballast_sim::ballast::Sizes;
use ballast_sim::env::disk::DiskFaults;
use ballast_sim::env::network::Link;
use ballast_sim::machine::Crash;
use ballast_sim::oracle::Outcome;
use ballast_sim::scene::{Scene, ScriptHost, play};
use ballast_sim::system::System;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

const SEEDS: u64 = 3;

const BLOCKS: BlockRange = BlockRange { start: 0, count: 4 };

/// A host that writes through node `through`, while node 2 leads.
async fn writer(scene: &Scene, through: NodeId) -> ScriptHost {
    let writer = scene.host();
    writer.attach(through).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(through)).await;
    if through != N2 {
        scene.move_leader(N2).await;
    }
    writer.must_write(BLOCKS).await;
    writer
}

/// The disk of `node` fails one write and works again: the pool must not.
async fn fail_one_write(scene: &Scene, node: NodeId) {
    let running = scene.node(node);
    let failure = running.failure();
    assert!(running.is_ready());
    scene.until_within(2_000, "the pool stops", || failure.borrow().is_some()).await;
    assert!(!running.is_ready(), "a node without a pool is not ready");
    scene.mend_disk(node);
}

fn failing() -> DiskFaults {
    DiskFaults { write_error_rate: 1_000_000, ..Default::default() }
}

/// Node 3's acknowledgement would complete a majority: its log was not written.
async fn a_follower_fails(scene: Scene) {
    let writer = writer(&scene, N2).await;
    scene.set_isolated(N1, true);
    scene.world.disk(N3).set_faults(failing());
    let write = writer.write(BLOCKS);
    fail_one_write(&scene, N3).await;
    scene.world.sleep_ms(3_000).await;
    assert!(!write.is_answered(), "only the leader's disk has it");
    assert!(scene.machine(N3).has_exited(), "a node whose pool failed ends");
    // The other two go on.
    scene.set_isolated(N1, false);
    assert_eq!(write.within(10_000).await, Some(Outcome::Done));
    for _ in 0..20 {
        assert_eq!(writer.write(BLOCKS).within(1_000).await, Some(Outcome::Done));
    }
    scene.end().await;
}

#[test]
fn a_follower_whose_disk_fails_acknowledges_nothing() {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, a_follower_fails);
    }
}

/// The leader's own disk would complete a majority with node 3.
async fn a_leader_fails(scene: Scene) {
    let writer = writer(&scene, N3).await;
    scene.set_isolated(N1, true);
    scene.world.disk(N2).set_faults(failing());
    let write = writer.write(BLOCKS);
    fail_one_write(&scene, N2).await;
    scene.world.sleep_ms(3_000).await;
    assert!(!write.is_answered(), "only one follower's disk has it");
    assert!(scene.machine(N2).has_exited(), "a node whose pool failed ends");
    scene.set_isolated(N1, false);
    assert_eq!(write.within(20_000).await, Some(Outcome::Done));
    assert_ne!(scene.leader(), Some(N2));
    for _ in 0..20 {
        assert_eq!(writer.write(BLOCKS).within(1_000).await, Some(Outcome::Done));
    }
    scene.end().await;
}

#[test]
fn a_leader_whose_disk_fails_acknowledges_nothing() {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, a_leader_fails);
    }
}

/// Not only the log: a checkpoint that can't be written stops the pool as well.
async fn a_checkpoint_fails(scene: Scene) {
    let writer = writer(&scene, N2).await;
    scene.world.sleep_ms(500).await;
    scene.world.disk(N3).set_faults(failing());
    scene.ballast.checkpoint(&scene.world, N3, || panic!("it can't be durable"));
    fail_one_write(&scene, N3).await;
    scene.until("a node whose pool failed ends", || scene.machine(N3).has_exited()).await;
    for _ in 0..20 {
        assert_eq!(writer.write(BLOCKS).within(1_000).await, Some(Outcome::Done));
    }
    scene.end().await;
}

#[test]
fn a_checkpoint_that_fails_stops_the_pool() {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, a_checkpoint_fails);
    }
}

/// Blocks of one write that fills a pool: the largest there is.
const LARGE: u32 = 256;

/// Fills all pools until a write is refused; answers how many blocks are written.
async fn fill(scene: &Scene, writer: &ScriptHost) -> u64 {
    let mut end = 0;
    loop {
        match writer.write(BlockRange::new(end, LARGE)).within(60_000).await {
            Some(Outcome::Done) => end += u64::from(LARGE),
            Some(Outcome::Refused) => return end,
            other => panic!("a write is done or refused: {other:?} at {} ms", scene.world.now_ms()),
        }
    }
}

/// Guarantee **nothing-lost-when-full**: what is full refuses, reads go on, trims are taken, and
/// then writes go on.
async fn pools_fill_and_are_trimmed(scene: Scene) {
    let writer = writer(&scene, N2).await;
    let end = fill(&scene, &writer).await;
    let (written, capacity) = (end * 4096, scene.node(N2).pool().space().capacity);
    assert!(written + (1 << 20) > capacity, "refused after {written} bytes of {capacity}");
    let read = writer.read(BlockRange::new(end / 2, LARGE)).within(1_000).await;
    assert!(read.flatten().is_some(), "a full pool reads");
    let half = end / 2;
    for start in (0..half).step_by(LARGE as usize) {
        let trimmed = writer.trim(BlockRange::new(start, LARGE)).within(5_000).await;
        assert_eq!(trimmed, Some(Outcome::Done), "a full pool takes trims");
    }
    let trimmed_at = scene.world.now_ms();
    while writer.write(BlockRange::new(0, LARGE)).within(60_000).await != Some(Outcome::Done) {
        assert!(scene.world.now_ms() < trimmed_at + 20_000, "still refused after the trims");
        scene.world.sleep_ms(100).await;
    }
    println!("{written} bytes; goes on {} ms after the trims", scene.world.now_ms() - trimmed_at);
    // Half of what was trimmed fits again for sure.
    for start in (u64::from(LARGE)..half / 2).step_by(LARGE as usize) {
        writer.must_write(BlockRange::new(start, LARGE)).await;
    }
    scene.end().await;
}

#[test]
fn writes_go_on_after_trims() {
    let volume_blocks = (128 << 20) / 4096;
    let sizes = Sizes { pool_bytes: 96 << 20, volume_blocks, ..Sizes::default() };
    play(0, sizes, None, pools_fill_and_are_trimmed);
}

/// What the script of the difference writes, in blocks.
const CHANGED: u64 = 4096;

/// A difference breaks half-way: what has arrived need not travel again.
async fn a_difference_breaks(scene: Scene) {
    let writer = writer(&scene, N2).await;
    scene.machine(N3).crash(Crash::Kill);
    for start in (0..CHANGED).step_by(LARGE as usize) {
        writer.must_write(BlockRange::new(start, LARGE)).await;
    }
    // Until the log is gone.
    scene.world.sleep_ms(10_000).await;
    let slow = Link { bytes_per_ms: 1_000, ..Link::default() };
    for other in [N1, N2] {
        scene.world.net().set_link(&scene.world, other, N3, slow);
    }
    scene.start_node(N3);
    scene.until("it is back", || scene.is_ready(N3)).await;
    let bytes = CHANGED * 4096;
    for part in [4, 2] {
        let reached = || scene.node(N3).resyncs().received >= bytes / part;
        scene.until("a part of the difference is there", reached).await;
        assert_eq!(scene.node(N3).resyncs().installed, 0);
        for other in [N1, N2] {
            scene.world.net().reset_between(&scene.world, other, N3);
        }
        writer.must_write(BLOCKS).await;
    }
    scene.level().await;
    let resyncs = scene.node(N3).resyncs();
    println!("{resyncs:?} of {bytes} bytes");
    assert!(resyncs.installed > 0, "it caught up by the log");
    assert!(resyncs.received < bytes + bytes / 4, "{resyncs:?}: it began again, of {bytes} bytes");
    scene.end().await;
}

#[test]
fn a_broken_difference_goes_on_where_it_was() {
    for seed in 0..SEEDS {
        let volume_blocks = CHANGED;
        let sizes = Sizes { retention_bytes: 1 << 20, volume_blocks, ..Sizes::default() };
        play(seed, sizes, None, a_difference_breaks);
    }
}

/// Writes of the largest size while a disk hangs: more than may wait for it, there and here.
const WAITING: u64 = 120;

/// A follower appends what it gets before it is durable: what waits for its disk must have a bound,
/// and so must what waits on the leader.
async fn a_follower_is_stuck(scene: Scene) {
    let writer = writer(&scene, N2).await;
    scene.world.disk(N3).stall_until(scene.world.now_ms() + 8_000);
    let (mut pending, mut queued) = (0, 0);
    for round in 0..WAITING {
        writer.must_write(BlockRange::new(round % 4 * u64::from(LARGE), LARGE)).await;
        pending = pending.max(scene.node(N3).pool().stats().pending_bytes);
        queued = queued.max(scene.node(N2).peer_queue_bytes());
        for id in [N2, N3] {
            assert_eq!(scene.ballast.over_limit(id, false), None, "{id}");
        }
    }
    println!("of {WAITING} MiB, {pending} bytes wait for the disk, {queued} to be sent to it");
    assert!(pending > 8 << 20, "nothing waited: {pending}");
    scene.end().await;
}

#[test]
fn what_waits_for_a_disk_that_hangs_is_bounded() {
    play(0, Sizes::default(), None, a_follower_is_stuck);
}
