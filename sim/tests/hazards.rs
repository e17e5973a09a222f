//! The hazards of the design's review (ARCHITECTURE.md, "Rules that hold everywhere"), each as a
//! script on the production node: the moment that a careless implementation would not survive, made
//! on purpose. Random runs meet them too, but seldom and unseen.
//!
//! Where the mistake can be planted, the same script must fail with it.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use ballast_block::{BlockRange, NodeId, ShardId};
use ballast_env::planted::PlantedBug;
use ballast_sim::ballast::{POOL, Sizes, pool_of};
use ballast_sim::env::disk::DiskFaults;
use ballast_sim::machine::Crash;
use ballast_sim::scene::{Scene, ScriptHost, failure, play};
use ballast_sim::system::System;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

/// Seeds of each script: delays and elections differ, the story does not.
const SEEDS: u64 = 3;

/// What most scripts write and read.
const BLOCKS: BlockRange = BlockRange { start: 0, count: 4 };

fn holds<F: Future<Output = ()>>(script: impl Fn(Scene) -> F) {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, &script);
    }
}

#[track_caller]
fn finds<F: Future<Output = ()> + 'static>(bug: PlantedBug, script: fn(Scene) -> F) {
    let found = failure(0, Sizes::default(), bug, script);
    println!("{bug:?}: {found:?}");
    assert!(found.is_some(), "{bug:?} was not found");
}

/// A host that writes through node 2, which leads.
async fn writer_at_2(scene: &Scene) -> ScriptHost {
    let writer = scene.host();
    writer.attach(N2).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N2)).await;
    writer.must_write(BLOCKS).await;
    writer
}

/// A host that writes through node 1 and believes that node 1 leads; node 2 does.
async fn writer_at_1_leader_2(scene: &Scene) -> ScriptHost {
    let writer = scene.host();
    writer.attach(N1).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N1)).await;
    writer.must_write(BLOCKS).await;
    scene.move_leader(N2).await;
    writer
}

/// A host that reads through one node, again and again, until it is told to stop or gets an error.
struct Watch {
    stop: Rc<Cell<bool>>,
    reads: Rc<Cell<u64>>,
}

impl Watch {
    async fn start(scene: &Scene, through: NodeId) -> Self {
        let reader = scene.host();
        reader.attach_reader(through).await;
        let watch = Self { stop: Rc::default(), reads: Rc::default() };
        let (stop, reads) = (watch.stop.clone(), watch.reads.clone());
        tokio::task::spawn_local(async move {
            while !stop.get() {
                let Some(Some(_)) = reader.read(BLOCKS).within(60_000).await else { return };
                reads.set(reads.get() + 1);
                reader.pause(1).await;
            }
        });
        watch
    }

    fn stop(&self) {
        assert!(self.reads.get() > 10, "it hardly read: {}", self.reads.get());
        self.stop.set(true);
    }
}

/// F1. A leader sends an entry, dies before its own flush, and is back at once. If it went on in its
/// old term it would give the entry's log id to another write; the follower that has the first
/// counts as having the second, which was answered: lost when that follower leads.
async fn a_leader_dies_before_its_own_flush(scene: Scene) {
    let first = writer_at_2(&scene).await;
    // Only node 1 gets the next entry, and node 2's disk never does.
    scene.set_isolated(N3, true);
    scene.hang_disk(N2);
    let before = scene.last_index(N1);
    let unanswered = first.write(BLOCKS);
    scene.until("node 1 has the entry", || scene.last_index(N1) > before).await;
    scene.world.sleep_ms(20).await;
    assert!(!unanswered.is_answered(), "one disk of three has it");
    scene.machine(N2).crash(Crash::Kill);
    // It is back before anyone noticed, with the node that never heard of that entry.
    scene.set_isolated(N1, true);
    scene.set_cut(&[(2, 3), (3, 2)], false);
    scene.start_node(N2);
    let second = scene.host();
    second.attach(N3).await;
    second.must_write(BLOCKS).await;
    scene.set_isolated(N1, false);
    scene.level().await;
    scene.move_leader(N1).await;
    scene.end().await;
}

#[test]
fn f1_a_leader_that_dies_before_its_own_flush_never_resumes_its_term() {
    holds(a_leader_dies_before_its_own_flush);
    finds(PlantedBug::LeaderRestore, a_leader_dies_before_its_own_flush);
}

/// Guarantee **durable-on-majority**: two of three have the write in memory, none on its disk. Answered
/// now, it would be lost with the power.
async fn disks_hang(scene: Scene) {
    let writer = writer_at_2(&scene).await;
    scene.set_isolated(N1, true);
    scene.hang_disk(N2);
    scene.hang_disk(N3);
    let write = writer.write(BLOCKS);
    scene.world.sleep_ms(1_000).await;
    let answered = write.is_answered();
    for id in scene.nodes() {
        scene.machine(id).crash(Crash::PowerLoss);
    }
    scene.end().await;
    assert!(!answered, "no disk had it");
}

#[test]
fn an_answer_needs_a_majority_of_disks() {
    holds(disks_hang);
    finds(PlantedBug::EarlyAck, disks_hang);
}

/// F4, as plain as it gets: the leader is cut off from the others and still reached by hosts.
async fn a_leader_is_cut_off(scene: Scene) {
    let _first = writer_at_2(&scene).await;
    let watch = Watch::start(&scene, N2).await;
    scene.world.sleep_ms(300).await;
    scene.set_isolated(N2, true);
    let second = scene.host();
    second.attach(N1).await;
    second.must_write(BLOCKS).await;
    scene.world.sleep_ms(1_000).await;
    watch.stop();
    scene.check();
    scene.end().await;
}

#[test]
fn f4_a_leader_that_was_cut_off_answers_no_read() {
    holds(a_leader_is_cut_off);
    finds(PlantedBug::SkippedReadGate, a_leader_is_cut_off);
}

/// F4a. The leader's lease rests on node 3, which restarts: if it forgot that and voted at once, node
/// 1 would commit a write while node 2 still reads on its lease.
async fn a_voter_restarts(scene: Scene) {
    let writer = writer_at_1_leader_2(&scene).await;
    let watch = Watch::start(&scene, N2).await;
    scene.world.sleep_ms(1_000).await;
    scene.set_cut(&[(1, 2), (2, 1)], true);
    scene.world.sleep_ms(800).await;
    scene.machine(N3).crash(Crash::Kill);
    scene.set_cut(&[(2, 3), (3, 2)], true);
    scene.start_node(N3);
    // Node 1 campaigns as often as it can.
    let candidate = scene.member(N1).group().raft().clone();
    let elected = || scene.leader().is_some_and(|leader| leader != N2);
    while !elected() {
        let raft = candidate.clone();
        scene.machine(N1).inject(async move {
            let _stopped = raft.trigger().elect(true).await;
        });
        scene.world.sleep_ms(30).await;
        assert!(scene.world.now_ms() < 60_000, "nobody is elected");
    }
    writer.must_write(BLOCKS).await;
    scene.world.sleep_ms(1_000).await;
    watch.stop();
    scene.check();
    scene.end().await;
}

#[test]
fn f4_a_restarted_voter_waits_out_the_lease_it_may_have_granted() {
    holds(a_voter_restarts);
}

/// F4b. A transfer asks for votes without regard to leases, and the old leader, which hears nothing
/// any more, has acknowledgements that are fresh.
async fn a_leader_hands_over_unheard(scene: Scene) {
    let writer = writer_at_1_leader_2(&scene).await;
    let watch = Watch::start(&scene, N2).await;
    scene.world.sleep_ms(1_000).await;
    let heir = scene.member(N1).group().replica().id();
    let leader = scene.member(N2).group().clone();
    scene.set_cut(&[(1, 2), (3, 2)], true);
    scene.machine(N2).inject(async move {
        leader.transfer(heir).await.expect("it leads");
    });
    // Mostly node 1 at once; where the network forgot its connection, whoever is elected later.
    scene.until("another one leads", || scene.leader().is_some_and(|id| id != N2)).await;
    // The first write of a leader that no majority has heard yet is sent elsewhere and waits there.
    scene.world.sleep_ms(30).await;
    writer.must_write(BLOCKS).await;
    scene.world.sleep_ms(1_000).await;
    watch.stop();
    scene.check();
    scene.end().await;
}

#[test]
fn f4_a_leader_that_hands_over_reads_no_more() {
    holds(a_leader_hands_over_unheard);
}

/// F4c. What the old leader answered is in the new one's log, but it does not know yet that it is
/// committed: until the first entry of its own term is, its state may be older.
async fn a_leader_dies_with_its_answer(scene: Scene) {
    let writer = writer_at_2(&scene).await;
    let watches = [Watch::start(&scene, N1).await, Watch::start(&scene, N3).await];
    scene.world.sleep_ms(300).await;
    let write = writer.write(BLOCKS);
    scene.until("the write is answered", || write.is_answered()).await;
    scene.machine(N2).crash(Crash::Kill);
    // Long enough for heartbeats to be answered before the new leader's first entry is durable.
    for id in [N1, N3] {
        let slow = DiskFaults { latency_min_ms: 300, latency_max_ms: 300, ..Default::default() };
        scene.world.disk(id).set_faults(slow);
    }
    scene.until("a new leader", || scene.leader().is_some_and(|id| id != N2)).await;
    scene.world.sleep_ms(3_000).await;
    watches.iter().for_each(Watch::stop);
    scene.check();
    scene.end().await;
}

#[test]
fn f4_a_new_leader_reads_only_after_its_first_entry() {
    holds(a_leader_dies_with_its_answer);
}

/// F4, a process that is stopped: when it goes on, a read that waited in its socket comes first.
async fn a_leader_is_stopped(scene: Scene) {
    let writer = writer_at_1_leader_2(&scene).await;
    let reader = scene.host();
    reader.attach_reader(N2).await;
    assert!(reader.read(BLOCKS).within(1_000).await.is_some());
    scene.machine(N2).stop();
    writer.must_write(BLOCKS).await;
    let read = reader.read(BLOCKS);
    scene.world.sleep_ms(100).await;
    scene.machine(N2).resume();
    assert!(read.within(10_000).await.is_some(), "it is answered by whoever leads, or refused");
    scene.check();
    scene.end().await;
}

#[test]
fn f4_a_leader_that_was_stopped_does_not_go_on_reading() {
    holds(a_leader_is_stopped);
    finds(PlantedBug::SkippedReadGate, a_leader_is_stopped);
}

/// F4 and F1. A volume with one replica: its leader is killed at the moment of an answer. Back again it
/// finds its own vote, and nobody to ask; until it leads a new term its state may lack the last answer.
async fn a_lone_leader_is_killed_with_its_answer(scene: Scene) {
    let writer = scene.host();
    writer.attach(N1).await;
    for _ in 0..5 {
        writer.must_write(BLOCKS).await;
        let write = writer.write(BLOCKS);
        scene.until("the write is answered", || write.is_answered()).await;
        scene.machine(N1).crash(Crash::Kill);
        scene.start_node(N1);
        scene.read_back(N1).await;
        writer.attach(N1).await;
    }
    scene.end().await;
}

#[test]
fn f4_a_lone_leader_that_restarts_reads_only_in_a_new_term() {
    for seed in 0..SEEDS {
        let sizes = Sizes { nodes: 1, replicas: 1, ..Sizes::default() };
        play(seed, sizes, None, a_lone_leader_is_killed_with_its_answer);
    }
}

/// F5. A copy of a pool comes back, all checksums right: what its replicas acknowledged since is
/// forgotten, and with it and a node that missed those writes there would be a majority without them.
async fn a_pool_goes_back(scene: Scene, shard: ShardId) {
    scene.use_shard(shard);
    let writer = writer_at_2(&scene).await;
    scene.machine(N1).crash(Crash::PowerLoss);
    let copy = scene.world.disk(N1).image();
    scene.start_node(N1);
    scene.until("node 1 is back", || scene.is_ready(N1)).await;
    let pool = scene.shard(N1, shard).identity().pool;
    scene.level().await;
    // Node 3 misses what nodes 1 and 2 acknowledge.
    scene.set_isolated(N3, true);
    writer.must_write(BLOCKS).await;
    writer.must_write(BlockRange::new(8, 8)).await;
    scene.machine(N1).crash(Crash::PowerLoss);
    scene.machine(N2).crash(Crash::PowerLoss);
    scene.world.disk(N1).restore_file(&pool_of(shard), Some(&copy));
    scene.set_isolated(N3, false);
    // However often it starts: its boot counter passes the one that is known.
    for _ in 0..4 {
        scene.start_node(N1);
        scene.until("node 1 is refused", || scene.is_refused(N1, shard)).await;
        assert!(!scene.serves(N1, shard));
        scene.world.sleep_ms(2_000).await;
        assert_eq!(scene.leader(), None, "no majority remembers what was acknowledged");
        scene.machine(N1).crash(Crash::Kill);
    }
    scene.start_node(N1);
    scene.start_node(N2);
    let writer = scene.host();
    writer.attach(N3).await;
    scene.read_back(N3).await;
    writer.must_write(BLOCKS).await;
    assert!(!scene.serves(N1, shard));
    scene.machine(N1).crash(Crash::Kill);
    scene.replace_pool(N1, shard, pool).await;
    scene.start_node(N1);
    scene.level().await;
    let votes = || scene.voters().len() == 3 && scene.voters().contains(&scene.replica(N1));
    scene.until("the replacement votes", votes).await;
    // It counts: without it there is no majority now.
    scene.machine(N2).crash(Crash::Kill);
    writer.must_write(BlockRange::new(16, 4)).await;
    scene.end().await;
}

#[test]
fn f5_a_pool_that_went_back_in_time_is_refused_and_replaced() {
    holds(|scene| a_pool_goes_back(scene, ShardId(0)));
}

#[test]
fn f5_of_a_further_shard() {
    for seed in 0..SEEDS {
        let sizes = Sizes { shards: 2, volumes: 2, ..Sizes::default() };
        play(seed, sizes, None, |scene| a_pool_goes_back(scene, ShardId(1)));
    }
}

/// F6. The last batch of node 1 rots while it is down. Taken for a torn write, which was never
/// acknowledged, it would be dropped; node 3 missed it, and the two are a majority.
async fn a_tail_rots(scene: Scene) {
    let writer = writer_at_2(&scene).await;
    scene.machine(N3).crash(Crash::PowerLoss);
    scene.world.sleep_ms(300).await;
    let before = scene.world.disk(N1).image();
    writer.must_write(BLOCKS).await;
    let after = scene.world.disk(N1).image();
    // A stream that is idle seals its last write.
    scene.world.sleep_ms(500).await;
    scene.machine(N1).crash(Crash::PowerLoss);
    scene.machine(N2).crash(Crash::PowerLoss);
    let pool = Path::new(POOL);
    let header = *after.changed_since(&before, pool).first().expect("the write is there");
    assert!(scene.world.disk(N1).rot(pool, header));
    scene.start_node(N1);
    scene.start_node(N3);
    let reader = scene.host();
    reader.attach_reader(N3).await;
    let read = reader.read(BLOCKS);
    for _ in 0..200 {
        scene.world.sleep_ms(100).await;
        assert_eq!(scene.leader(), None, "one of the two may have forgotten what it acknowledged");
    }
    assert!(!scene.node(N1).recovery().suspects.is_empty(), "{:?}", scene.node(N1).recovery());
    assert!(!read.is_answered());
    scene.start_node(N2);
    assert!(read.within(60_000).await.is_some());
    scene.end().await;
}

#[test]
fn f6_a_rotten_tail_is_not_taken_for_a_torn_one() {
    holds(a_tail_rots);
}

/// F7. The followers commit while the leader's own write hangs: what was applied is readable from
/// memory, and a checkpoint that covered it would point to nothing after a crash.
async fn an_answer_comes_before_the_own_flush(scene: Scene) {
    let writer = writer_at_2(&scene).await;
    scene.world.sleep_ms(300).await;
    scene.world.disk(N2).delay_next_write(15_000);
    writer.must_write(BLOCKS).await;
    assert!(writer.read(BLOCKS).within(1_000).await.flatten().is_some(), "it is in memory");
    let covered = Rc::new(Cell::new(false));
    let durable = covered.clone();
    scene.ballast.checkpoint(&scene.world, N2, move || durable.set(true));
    scene.world.sleep_ms(3_000).await;
    let lost = DiskFaults { lose_in_flight: true, ..Default::default() };
    scene.world.disk(N2).set_faults(lost);
    scene.machine(N2).crash(Crash::PowerLoss);
    scene.start_node(N2);
    scene.level().await;
    for id in scene.nodes() {
        assert_eq!(scene.ballast.damage(id), None, "{id}");
    }
    assert!(!covered.get(), "a checkpoint covered what was not durable");
    scene.end().await;
}

#[test]
fn f7_a_checkpoint_waits_for_what_it_covers() {
    holds(an_answer_comes_before_the_own_flush);
    finds(PlantedBug::EarlyCheckpoint, an_answer_comes_before_the_own_flush);
}

/// Log kept per family in F8, in bytes.
const RETENTION: u64 = 1 << 20;
/// Log that may be kept above it until the peer counts as gone and the next checkpoint is made: what
/// the script writes in two seconds.
const RETAINED_BEYOND: u64 = 4 << 20;

/// F8. A follower hangs with its connections open. Nothing is purged while the consensus library
/// streams to it: the log would grow without bound.
async fn a_follower_hangs(scene: Scene) {
    let writer = writer_at_2(&scene).await;
    scene.machine(N3).stop();
    let (mut most, mut slowest) = (0, 0);
    for round in 0..150 {
        let from = scene.world.now_ms();
        writer.must_write(BlockRange::new(round % 16 * 32, 32)).await;
        slowest = slowest.max(scene.world.now_ms() - from);
        scene.world.sleep_ms(100).await;
        // A checkpoint covers what is purged.
        for id in [N1, N2] {
            if round % 10 == 0 {
                scene.ballast.checkpoint(&scene.world, id, || {});
            }
        }
        // Until it counts as hanging its log is kept.
        if round > 50 {
            for id in [N1, N2] {
                most = most.max(scene.node(id).pool().stats().retained_bytes);
            }
        }
    }
    println!("kept at most {most} bytes, slowest write {slowest} ms");
    assert!(most < RETENTION + RETAINED_BEYOND, "{most} bytes of log are kept for it");
    assert!(slowest < 500, "a write took {slowest} ms");
    scene.machine(N3).resume();
    scene.level().await;
    assert!(scene.node(N3).resyncs().installed > 0, "it caught up from a log that should be gone");
    scene.end().await;
}

#[test]
fn f8_a_follower_that_hangs_pins_no_log() {
    for seed in 0..SEEDS {
        let sizes = Sizes { retention_bytes: RETENTION, ..Sizes::default() };
        play(seed, sizes, None, a_follower_hangs);
    }
}
