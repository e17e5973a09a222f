//! Rot on the node that leads, while others need from it what is damaged: as scripts on the
//! production node. What one disk has lost must stop nobody while another replica has it.

use std::path::Path;

use ballast_block::{BlockRange, FamilyId, NodeId, ReplicaId};
use ballast_raft_store::format::batch::Batch;
use ballast_raft_store::stream::StreamId;
use ballast_sim::ballast::{POOL, Sizes, volume_name};
use ballast_sim::env::disk::DiskImage;
use ballast_sim::machine::Crash;
use ballast_sim::oracle::stamp::recognise;
use ballast_sim::oracle::{Outcome, Value};
use ballast_sim::scene::{Scene, play};
use openraft::async_runtime::WatchReceiver;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

const SEEDS: u64 = 3;

const BLOCK: usize = 4096;

const BLOCKS: BlockRange = BlockRange { start: 0, count: 4 };

/// The volume of scripts, for its stamps.
const VOLUME: u64 = 0;

/// What the entry writes whose payload rots; nothing else writes there.
const ROTTEN: BlockRange = BlockRange { start: 100, count: 4 };

/// Entries before it: a leader that looks for where a follower's log agrees comes to it from below.
const BEFORE: u64 = 24;

fn image_of_2(scene: &Scene) -> DiskImage {
    scene.world.disk(N2).image()
}

/// Where node 2's pool has the payload of the write to [`ROTTEN`] that came after `before`.
fn payload_at_2(scene: &Scene, before: &DiskImage) -> Vec<u64> {
    let pool = Path::new(POOL);
    let disk = scene.world.disk(N2);
    let is_payload = |at: &u64| {
        let bytes = disk.peek(pool, *at, BLOCK).expect("the pool is there");
        let mut blocks = ROTTEN.start..ROTTEN.end();
        blocks.any(|block| matches!(recognise(VOLUME, block, &bytes), Some(Value::Written(_))))
    };
    disk.image().changed_since(before, pool).into_iter().filter(is_payload).collect()
}

fn rot_at_2(scene: &Scene, before: &DiskImage) {
    let payload = payload_at_2(scene, before);
    assert_eq!(payload.len(), ROTTEN.count as usize, "{payload:?}");
    assert!(scene.world.disk(N2).rot(Path::new(POOL), payload[1]));
}

/// Node 1 keeps no entry up to `index`, as after many more writes.
async fn purge_at_1(scene: &Scene, index: u64) {
    let purged = scene.ask(N1, |node| async move { node.pool().checkpoint().await });
    purged.await.expect("a checkpoint is made");
    loop {
        let raft = scene.member(N1).group().raft().clone();
        let metrics = raft.metrics();
        if metrics.borrow_watched().purged.is_some_and(|id| id.index >= index) {
            return;
        }
        // It purges what it has a snapshot of, by the time that it is asked.
        let asked = scene.ask(N1, |_| async move {
            raft.trigger().snapshot().await.expect("it runs");
            raft.trigger().purge_log(index).await.expect("it runs");
        });
        asked.await;
        scene.world.sleep_ms(50).await;
    }
}

/// The payload of an entry rots on node 2, which leads later: node 1 has it applied, and purged; node
/// 3 was away. The leader can neither send the entry nor know that node 1 does not need it, and what
/// node 3 lacks has the damaged block in it.
async fn an_entry_rots(scene: Scene) {
    let writer = scene.host();
    writer.attach(N2).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N2)).await;
    scene.machine(N3).crash(Crash::Kill);
    for _ in 0..BEFORE {
        writer.must_write(BLOCKS).await;
    }
    scene.world.sleep_ms(50).await;
    let before = image_of_2(&scene);
    writer.must_write(ROTTEN).await;
    let rotten = scene.last_index(N2);
    writer.must_write(BLOCKS).await;
    scene.until("node 1 has all", || scene.last_index(N1) > rotten).await;
    purge_at_1(&scene, rotten).await;
    // Only its disk has the payload after that.
    scene.machine(N2).crash(Crash::Kill);
    rot_at_2(&scene, &before);
    scene.start_node(N2);
    let second = scene.host();
    second.attach(N2).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N2)).await;
    let write = second.write(BLOCKS).within(30_000).await;
    assert_eq!(write, Some(Outcome::Done), "two of three have all, but for one block");
    scene.start_node(N3);
    scene.level().await;
    assert!(scene.node(N3).resyncs().installed > 0, "it caught up from a log that can't be sent");
    let stats = scene.node(N2).pool().stats();
    assert!(stats.repaired_blocks > 0, "{stats:?}");
    scene.end().await;
}

#[test]
fn what_rots_on_a_leader_stops_nobody_while_another_replica_has_it() {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, an_entry_rots);
    }
}

/// The payload of an entry that only node 2 has rots. With node 1 it leads again, for its log is the
/// longest, and can send neither that entry nor what is behind it.
async fn an_entry_that_nobody_else_has_rots(scene: Scene) {
    let writer = scene.host();
    writer.attach(N2).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N2)).await;
    writer.must_write(ROTTEN).await;
    scene.world.sleep_ms(50).await;
    scene.set_isolated(N2, true);
    let (before, index) = (image_of_2(&scene), scene.last_index(N2));
    let unanswered = writer.write(ROTTEN);
    scene.until("it has the entry", || scene.last_index(N2) > index).await;
    // Until the stream is sealed: what a later disk write proves is not taken for torn.
    scene.world.sleep_ms(200).await;
    assert!(!unanswered.is_answered(), "only one of three has it");
    for id in [N1, N2, N3] {
        scene.machine(id).crash(Crash::Kill);
    }
    rot_at_2(&scene, &before);
    scene.set_isolated(N2, false);
    scene.start_node(N1);
    scene.start_node(N2);
    scene.until("only it can be elected", || scene.leader() == Some(N2)).await;
    scene.start_node(N3);
    let second = scene.host();
    second.attach(N1).await;
    let write = second.write(BLOCKS).within(30_000).await;
    assert_eq!(write, Some(Outcome::Done), "two of three have all that was answered");
    scene.end().await;
}

#[test]
fn a_leader_that_can_not_send_its_log_steps_aside() {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, an_entry_that_nobody_else_has_rots);
    }
}

/// Blocks whose changes one page of the map has.
const RANGE: BlockRange = BlockRange { start: 0, count: 256 };
/// Trims of them, more than a pool of 96 MiB lets its maps have unmerged.
const TRIMS: usize = 24;

/// Pages of what is mapped on a node's pool can't be read any more; their directory can.
fn lose_pages(scene: &Scene, node: NodeId) {
    let pool = Path::new(POOL);
    let disk = scene.world.disk(node);
    let peek = |at: u64| disk.peek(pool, at, BLOCK).unwrap_or_default();
    let mut lost = 0;
    for at in disk.image().changed_since(&DiskImage::default(), pool) {
        let Ok(batch) = Batch::decode(&peek(at).into()) else { continue };
        let payload =
            (1..=u64::from(batch.fields.payload_blocks)).map(|nth| at + nth * BLOCK as u64);
        // docs/disk-format.md: the kind of a page is its fifth byte; 1 and 2 are heads.
        let is_head = |at: &u64| matches!(peek(*at).get(4), Some(1 | 2));
        let heads = payload.filter(|at| batch.fields.stream == StreamId::Meta && is_head(at));
        for at in heads {
            disk.fail_reads_of(pool, at);
            lost += 1;
        }
    }
    assert!(lost > 0, "there is no page");
}

/// Starts a node again that can't read the pages of what is mapped; answers its replica.
async fn restart_without_pages(scene: &Scene, node: NodeId) -> ReplicaId {
    let leader = scene.leader().expect("all is well");
    scene.until("it has all", || scene.last_index(node) == scene.last_index(leader)).await;
    scene.world.sleep_ms(500).await;
    let merged = scene.ask(node, |node| async move {
        node.pool().quiesce_maps().await.expect("its pages are whole");
        node.pool().checkpoint().await.expect("a checkpoint is made");
    });
    merged.await;
    scene.machine(node).crash(Crash::Kill);
    lose_pages(scene, node);
    scene.start_node(node);
    scene.until("it serves", || scene.is_ready(node)).await;
    scene.replica(node)
}

async fn until_replaced(scene: &Scene, node: NodeId, before: ReplicaId) {
    let there = || Some(scene.ballast.member(node, scene.volume())?.group().replica().id());
    let replaced = || there().is_some_and(|now| now != before && scene.voters().contains(&now));
    scene.until("its replica is replaced", replaced).await;
}

/// A map that can't be merged gets more changes than all maps of its pool may have. The node hears all
/// the same that its replica is replaced: that is an entry of the cluster group, on the same pool.
async fn a_map_page_rots_under_load(scene: Scene) {
    let writer = scene.host();
    writer.attach(N1).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N1)).await;
    writer.must_write(BLOCKS).await;
    let before = restart_without_pages(&scene, N3).await;
    // It gets them all at once, and applies them before its map is looked at.
    scene.set_isolated(N3, true);
    for _ in 0..TRIMS {
        assert_eq!(writer.trim(RANGE).within(30_000).await, Some(Outcome::Done));
    }
    scene.set_isolated(N3, false);
    until_replaced(&scene, N3, before).await;
    writer.must_write(BLOCKS).await;
    scene.end().await;
}

#[test]
fn a_map_that_can_not_be_merged_is_replaced_although_all_room_is_taken() {
    let sizes = Sizes { pool_bytes: 96 << 20, volume_blocks: 1 << 10, ..Sizes::default() };
    for seed in 0..SEEDS {
        play(seed, sizes, None, a_map_page_rots_under_load);
    }
}

/// Who leads the cluster group.
async fn cluster_leader(scene: &Scene) -> Option<NodeId> {
    let reports = scene.ask(N1, |node| async move { node.reports().await }).await;
    let leads = |node: &NodeId| {
        let mut replicas = reports[node].replicas.iter();
        replicas.any(|one| one.family == FamilyId::CLUSTER.0 && one.role == "leader")
    };
    reports.keys().copied().find(leads)
}

/// A replica is lost while its group is led by a node that does not hear the cluster group, and never
/// learns that there is another one to be taken in.
async fn a_replica_rots_under_a_deaf_leader(scene: Scene) {
    let has_replica = |node: &NodeId| scene.ballast.member(*node, scene.volume()).is_some();
    let (members, others): (Vec<_>, Vec<_>) = scene.nodes().into_iter().partition(has_replica);
    let mut speaker = cluster_leader(&scene).await;
    while !speaker.is_some_and(|node| others.contains(&node)) {
        if let Some(node) = speaker {
            scene.machine(node).crash(Crash::Kill);
            scene.world.sleep_ms(3_000).await;
            scene.start_node(node);
            scene.until("it serves", || scene.is_ready(node)).await;
        }
        scene.world.sleep_ms(500).await;
        speaker = cluster_leader(&scene).await;
    }
    let (speaker, deaf, rotten) = (speaker.expect("asked above"), members[0], members[1]);
    let writer = scene.host();
    writer.attach(deaf).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(deaf)).await;
    writer.must_write(BLOCKS).await;
    let before = restart_without_pages(&scene, rotten).await;
    scene.move_leader(deaf).await;
    let links = [(deaf.0, speaker.0), (speaker.0, deaf.0)];
    scene.set_cut(&links, true);
    for _ in 0..TRIMS {
        assert_eq!(writer.trim(RANGE).within(30_000).await, Some(Outcome::Done));
    }
    scene.until("another leads", || scene.leader().is_some_and(|leader| leader != deaf)).await;
    // As when its writer comes back to it, before the change is made.
    scene.move_leader(deaf).await;
    until_replaced(&scene, rotten, before).await;
    assert_ne!(scene.leader(), Some(deaf), "it did not hear of it");
    scene.set_cut(&links, false);
    writer.must_write(BLOCKS).await;
    scene.end().await;
}

#[test]
fn a_leader_that_does_not_hear_of_a_new_member_gives_the_lead_away() {
    let small = Sizes { pool_bytes: 96 << 20, volume_blocks: 1 << 10, ..Sizes::default() };
    let sizes = Sizes { nodes: 5, ..small };
    for seed in 0..SEEDS {
        play(seed, sizes, None, a_replica_rots_under_a_deaf_leader);
    }
}

/// The lead is handed to a replica that was found damaged a moment ago. The library would have it
/// campaign; it may have lost what it acknowledged, and may not.
async fn a_suspect_is_handed_the_lead(scene: Scene) {
    let writer = scene.host();
    writer.attach(N1).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N1)).await;
    writer.must_write(BLOCKS).await;
    let before = restart_without_pages(&scene, N3).await;
    assert_eq!(writer.trim(RANGE).within(30_000).await, Some(Outcome::Done));
    scene.until("node 3 has it", || scene.last_index(N3) == scene.last_index(N1)).await;
    scene.world.sleep_ms(50).await;
    let merged = scene.ask(N3, |node| async move { node.pool().quiesce_maps().await });
    assert!(merged.await.is_err(), "its map is lost");
    let name = volume_name(scene.volume());
    let asked = scene.ask(N1, |node| async move { node.move_leader(&name, N3).await });
    let watched = async {
        for _ in 0..1_500 {
            let now = scene.ballast.member(N3, scene.volume());
            let same = now.is_some_and(|member| member.group().replica().id() == before);
            assert!(!same || scene.leader() != Some(N3), "a suspect leads");
            scene.world.sleep_ms(1).await;
        }
    };
    let _moved = futures_util::join!(asked, watched).0;
    until_replaced(&scene, N3, before).await;
    writer.must_write(BLOCKS).await;
    scene.end().await;
}

#[test]
fn a_suspect_takes_no_lead_that_it_is_handed() {
    let sizes = Sizes { pool_bytes: 96 << 20, volume_blocks: 1 << 10, ..Sizes::default() };
    for seed in 0..SEEDS {
        play(seed, sizes, None, a_suspect_is_handed_the_lead);
    }
}
