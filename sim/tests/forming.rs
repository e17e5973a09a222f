//! A volume whose first replica loses power while it forms the volume's group: whoever was told that the
//! volume is there can use it, and who was not can ask again.

use std::cell::RefCell;
use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{BlockRange, NodeId};
use ballast_cluster::LeaseMode;
use ballast_sim::ballast::{Sizes, volume_name};
use ballast_sim::machine::Crash;
use ballast_sim::scene::{Scene, play};

const PATIENCE_MS: u64 = 60_000;
/// Longer than it takes to form a group while all is well.
const FORMED_MS: u64 = 24;

/// The node that forms the group of the volume of that name, once the cluster has the volume.
fn former(scene: &Scene, asked: NodeId, name: &str) -> Option<NodeId> {
    let node = scene.node(asked);
    let state = node.cluster_state();
    let family = state.volume_by_name(name)?.family;
    state.replicas_of(family).next().map(|replica| replica.node)
}

/// The disk of the one that forms it answers nothing from `after_ms` on; then its power is gone.
async fn is_usable(scene: Scene, after_ms: u64) {
    let name = volume_name(scene.volume());
    let asked = NodeId(2);
    let deleted = name.clone();
    let deleted = scene.ask(asked, |node| async move { node.delete_volume(&deleted).await });
    assert_eq!(deleted.await, Ok(true));
    let bytes = 1_024 * BLOCK_SIZE_U64;
    let made = Rc::new(RefCell::new(None));
    let (told, node, created) = (made.clone(), scene.node(asked), name.clone());
    scene.machine(asked).inject(async move {
        told.replace(Some(node.create_volume(&created, bytes, 3).await));
    });
    scene.until("it is placed", || former(&scene, asked, &name).is_some()).await;
    let first = former(&scene, asked, &name).expect("it is placed");
    scene.world.sleep_ms(after_ms).await;
    scene.hang_disk(first);
    scene.world.sleep_ms(500).await;
    scene.machine(first).crash(Crash::PowerLoss);
    scene.start_node(first);
    scene.until("the node serves", || scene.is_ready(first)).await;
    let again = name.clone();
    let node = if first == asked { NodeId(1) } else { asked };
    let asked = scene.ask(node, |node| async move { node.create_volume(&again, bytes, 3).await });
    assert!(asked.await.is_ok(), "after {after_ms} ms: it can't be made");
    let host = scene.host();
    let end = scene.world.now_ms() + PATIENCE_MS;
    while !host.take_lease(node, LeaseMode::SingleNodeWriter, false, PATIENCE_MS).await {
        assert!(scene.world.now_ms() < end, "after {after_ms} ms: nobody can use it");
    }
    host.attach(node).await;
    host.must_write(BlockRange::new(0, 4)).await;
    scene.end().await;
}

#[test]
fn a_volume_is_there_when_its_first_entry_is_durable() {
    for seed in 0..2 {
        for after_ms in 0..FORMED_MS {
            play(seed, Sizes::default(), None, |scene| is_usable(scene, after_ms));
        }
    }
}
