//! Nodes with two shards, as scripts on the production node: what happens to one shard, and what
//! the other must not notice.

use std::path::Path;

use ballast_block::{BlockRange, NodeId, ShardId};
use ballast_sim::ballast::{POOL, Sizes, pool_of};
use ballast_sim::env::disk::DiskFaults;
use ballast_sim::env::network::Link;
use ballast_sim::machine::Crash;
use ballast_sim::oracle::Outcome;
use ballast_sim::scene::{Scene, ScriptHost, play};

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

const FIRST: ShardId = ShardId(0);
const FURTHER: ShardId = ShardId(1);

const SEEDS: u64 = 3;

const BLOCKS: BlockRange = BlockRange { start: 0, count: 4 };

/// How long a write may take that nothing is in the way of, in milliseconds.
const UNDISTURBED_MS: u64 = 1_000;

fn holds<F: Future<Output = ()>>(script: impl Fn(Scene) -> F) {
    for seed in 0..SEEDS {
        let sizes = Sizes { shards: 2, volumes: 2, ..Sizes::default() };
        play(seed, sizes, None, &script);
    }
}

/// A host that writes to the volume of a shard through a node, which leads it.
async fn writer(scene: &Scene, shard: ShardId, through: NodeId) -> ScriptHost {
    scene.use_shard(shard);
    let writer = scene.host();
    writer.attach(through).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(through)).await;
    writer.must_write(BLOCKS).await;
    writer
}

/// Writes for a while, with nothing in the way.
async fn goes_on(writer: &ScriptHost, what: &str) {
    for _ in 0..20 {
        let written = writer.write(BLOCKS).within(UNDISTURBED_MS).await;
        assert_eq!(written, Some(Outcome::Done), "{what}");
        writer.pause(100).await;
    }
}

/// A further shard's disk fails a write: its thread ends, and nothing else of the process.
async fn a_further_shard_fails(scene: Scene) {
    let first = writer(&scene, FIRST, N1).await;
    let second = writer(&scene, FURTHER, N1).await;
    let starts = scene.machine(N1).starts();
    let faults = DiskFaults {
        write_error_rate: 1_000_000,
        only: Some(pool_of(FURTHER)),
        ..DiskFaults::default()
    };
    scene.world.disk(N1).set_faults(faults);
    let failure = scene.shard(N1, FURTHER).failure();
    let write = second.write(BLOCKS);
    scene.until_within(2_000, "its pool stops", || failure.borrow().is_some()).await;
    scene.mend_disk(N1);
    let ended = || scene.ballast.shard(N1, FURTHER).is_none();
    scene.until("its thread ends", ended).await;
    goes_on(&first, "shard 0 of the same process").await;
    // Its client is cut off; another node serves the volume, and this one refuses it.
    assert_ne!(write.within(1_000).await, None, "the connection ended with the shard");
    let second = scene.host();
    second.attach(N2).await;
    goes_on(&second, "the volume elsewhere").await;
    assert!(!second.can_attach_reader(N1).await, "a node without the shard can't serve it");
    assert!(scene.serves(N1, FIRST) && ended());
    assert_eq!(scene.machine(N1).starts(), starts, "the process goes on");
    // Only a new process brings it back.
    scene.machine(N1).crash(Crash::Kill);
    scene.start_node(N1);
    scene.until("it is back", || scene.is_ready(N1)).await;
    scene.end().await;
}

#[test]
fn a_further_shard_that_fails_ends_alone() {
    holds(a_further_shard_fails);
}

/// A further shard's disk hangs: the volumes of shard 0 must not notice.
async fn a_further_shard_hangs(scene: Scene) {
    let first = writer(&scene, FIRST, N1).await;
    let second = writer(&scene, FURTHER, N1).await;
    let hung_until = scene.world.now_ms() + 20_000;
    scene.world.disk(N1).stall_file_until(&pool_of(FURTHER), hung_until);
    let _write = second.write(BLOCKS);
    goes_on(&first, "shard 0 beside it").await;
    assert!(scene.world.now_ms() < hung_until);
    scene.end().await;
}

#[test]
fn a_further_shard_that_hangs_holds_up_nobody_else() {
    holds(a_further_shard_hangs);
}

/// A further shard's pool is lost with its disk, and replaced.
async fn a_further_pool_is_lost(scene: Scene) {
    let first = writer(&scene, FIRST, N2).await;
    let second = writer(&scene, FURTHER, N2).await;
    let pool = scene.shard(N1, FURTHER).identity().pool;
    scene.machine(N1).crash(Crash::PowerLoss);
    scene.world.disk(N1).restore_file(&pool_of(FURTHER), None);
    scene.start_node(N1);
    scene.until("its first shard is back", || scene.serves(N1, FIRST)).await;
    goes_on(&first, "shard 0").await;
    goes_on(&second, "a majority of shard 1").await;
    assert!(scene.ballast.shard(N1, FURTHER).is_none(), "nobody makes a pool by itself");
    scene.replace_pool(N1, FURTHER, pool).await;
    goes_on(&first, "shard 0 when the other pool was given up").await;
    // The process must be restarted; on its new pool it is given replicas anew.
    scene.machine(N1).crash(Crash::Kill);
    scene.start_node(N1);
    scene.until("the new pool serves", || scene.is_ready(N1)).await;
    assert_ne!(scene.shard(N1, FURTHER).identity().pool, pool);
    scene.level().await;
    goes_on(&first, "shard 0 beside the new pool").await;
    // It counts as soon as it votes: then there is a majority without node 3.
    let votes = || scene.voters().len() == 3 && scene.voters().contains(&scene.replica(N1));
    scene.until("the replacement votes", votes).await;
    scene.machine(N3).crash(Crash::Kill);
    second.must_write(BlockRange::new(16, 4)).await;
    scene.end().await;
}

#[test]
fn a_lost_pool_of_a_further_shard_is_replaced() {
    holds(a_further_pool_is_lost);
}

/// The first pool goes back in time: the node takes no part in the cluster, so that its further
/// shards, whose pools are whole, know of no change any more; they take no part either.
async fn a_first_pool_goes_back(scene: Scene) {
    let copy_of = scene.machine(N1);
    copy_of.crash(Crash::PowerLoss);
    let copy = scene.world.disk(N1).image();
    scene.start_node(N1);
    scene.until("node 1 is back", || scene.is_ready(N1)).await;
    let first = writer(&scene, FIRST, N1).await;
    let second = writer(&scene, FURTHER, N1).await;
    let pool = scene.node(N1).identity().pool;
    scene.machine(N1).crash(Crash::PowerLoss);
    scene.world.disk(N1).restore_file(Path::new(POOL), Some(&copy));
    scene.start_node(N1);
    drop((first, second));
    for shard in [FIRST, FURTHER] {
        scene.until("it is refused", || scene.is_refused(N1, shard)).await;
        assert!(!scene.serves(N1, shard), "{shard}");
    }
    for shard in [FIRST, FURTHER] {
        scene.use_shard(shard);
        let host = scene.host();
        host.attach(N2).await;
        goes_on(&host, "the other nodes serve").await;
        assert!(!host.can_attach_reader(N1).await, "{shard} takes no part");
        assert!(scene.ballast.member(N1, scene.volume()).is_none(), "{shard}");
    }
    // With a new first pool the further one goes on as it was.
    scene.machine(N1).crash(Crash::Kill);
    scene.replace_pool(N1, FIRST, pool).await;
    scene.start_node(N1);
    scene.until("both shards serve", || scene.is_ready(N1)).await;
    scene.end().await;
}

#[test]
fn without_its_first_shard_a_node_takes_no_part() {
    holds(a_first_pool_goes_back);
}

/// A further shard's pool takes long to open. What other nodes said to it meanwhile, and have not lived
/// to stand by, must not be taken for a pool that went back in time (hazard F5).
async fn a_further_shard_opens_late(scene: Scene) {
    let second = writer(&scene, FURTHER, N3).await;
    scene.machine(N2).crash(Crash::PowerLoss);
    scene.start_node(N2);
    let opens_at = scene.world.now_ms() + 20_000;
    scene.world.disk(N2).stall_file_until(&pool_of(FURTHER), opens_at);
    scene.until("its first shard is back", || scene.serves(N2, FIRST)).await;
    // Node 1 greets both shards; then it is started again.
    scene.world.sleep_ms(3_000).await;
    scene.machine(N1).crash(Crash::Kill);
    scene.start_node(N1);
    scene.until("node 1 is back", || scene.is_ready(N1)).await;
    goes_on(&second, "two of three").await;
    assert!(scene.world.now_ms() < opens_at && !scene.serves(N2, FURTHER));
    scene.until("the other shard is back", || scene.is_ready(N2)).await;
    scene.world.sleep_ms(3_000).await;
    assert!(scene.is_ready(N1), "{:?}", scene.shard(N1, FURTHER).refused());
    scene.end().await;
}

#[test]
fn what_waited_for_a_shard_is_no_pool_that_went_back() {
    holds(a_further_shard_opens_late);
}

/// A connection is cut at each moment of its way from shard 0, which accepts it, to the volume's: what
/// was half-way is forgotten on both, and the next one is taken.
async fn a_hand_over_is_cut(scene: Scene) {
    let writer = writer(&scene, FURTHER, N1).await;
    let host = scene.host();
    let slow = Link { delay_max_ms: 5, ..Link::default() };
    for (from, to) in [(host.id(), N1), (N1, host.id())] {
        scene.world.net().set_link(&scene.world, from, to, slow);
    }
    for after_ms in 0..40 {
        let (from, to) = (host.id(), N1);
        scene.world.after_ms(after_ms, move |world| world.net().reset_between(world, from, to));
        host.attach_reader(N1).await;
        host.pause(after_ms).await;
    }
    host.attach_reader(N1).await;
    assert!(host.read(BLOCKS).within(UNDISTURBED_MS).await.flatten().is_some());
    goes_on(&writer, "who was there before").await;
    scene.end().await;
}

#[test]
fn a_hand_over_that_is_cut_leaves_nothing_behind() {
    holds(a_hand_over_is_cut);
}
