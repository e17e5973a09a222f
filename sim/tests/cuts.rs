//! Cuts of single directions and single links between nodes, scripted: how long a host waits.
//!
//! Node 2 leads, the host uses node 1. What the host sees is measured in virtual time.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::clock::Clock;
use ballast_env::network::Address;
use ballast_sim::ballast::Sizes;
use ballast_sim::env::SimEnv;
use ballast_sim::host::nbd::{Command, NbdClient};
use ballast_sim::machine::{Crash, MachineOptions};
use ballast_sim::scene::Scene;
use ballast_sim::system::System;
use ballast_sim::world::run;

const HOST: NodeId = NodeId(1_001);
const OTHER_HOST: NodeId = NodeId(1_002);
const SEEDS: u64 = 2;

/// A host that writes, four requests at a time, through one node only.
#[derive(Default)]
struct Load {
    answers: RefCell<Vec<u64>>,
    errors: Cell<u64>,
}

impl Load {
    async fn run(self: Rc<Self>, env: SimEnv, target: Address) {
        loop {
            let Ok(client) = NbdClient::connect(&env, &target, "vol-0", true).await else {
                env.sleep(Duration::from_millis(200)).await;
                continue;
            };
            let client = Rc::new(client);
            futures_util::future::join_all((0..4).map(|slot| self.write(&env, &client, slot)))
                .await;
        }
    }

    async fn write(&self, env: &SimEnv, client: &NbdClient, slot: u64) {
        loop {
            let data = vec![slot as u8 + 1; 4096];
            if client.run(Command::Write { offset: slot * 4096, data }).await.is_err() {
                self.errors.set(self.errors.get() + 1);
                return;
            }
            self.answers.borrow_mut().push(env.world().now_ms());
            env.sleep(Duration::from_millis(20)).await;
        }
    }

    /// The longest time without an answer between two points in time.
    fn longest_stall(&self, from: u64, to: u64) -> u64 {
        let answers = self.answers.borrow();
        let inside = answers.iter().copied().filter(|at| (from..to).contains(at));
        let points: Vec<u64> = [from].into_iter().chain(inside).chain([to]).collect();
        points.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }
}

fn load(scene: &Scene, host: NodeId, through: u32) -> Rc<Load> {
    let load = Rc::new(Load::default());
    let target = scene.ballast.nbd_address(NodeId(through));
    let running = load.clone();
    let machine = scene.world.add_machine(host, MachineOptions::default());
    machine.start(move |env| running.run(env, target));
    load
}

/// Cuts these links for a while under load; answers the longest stalls during it and afterwards.
fn stalls(seed: u64, links: &'static [(u32, u32)]) -> (u64, u64) {
    run(seed, |world| async move {
        let scene = Scene::start(world.clone(), Sizes::default()).await;
        let load = load(&scene, HOST, 1);
        scene.world.sleep_ms(1_000).await;
        scene.move_leader(NodeId(2)).await;
        let from = world.now_ms();
        scene.set_cut(links, true);
        world.sleep_ms(12_000).await;
        let healed = world.now_ms();
        scene.set_cut(links, false);
        world.sleep_ms(6_000).await;
        assert_eq!(load.errors.get(), 0, "seed {seed}: a request failed");
        (load.longest_stall(from, healed), load.longest_stall(healed, world.now_ms()))
    })
}

fn check(links: &'static [(u32, u32)], limit_ms: u64) {
    let all: Vec<(u64, u64)> = (0..SEEDS).map(|seed| stalls(seed, links)).collect();
    println!("{links:?}: {all:?}");
    for (seed, (during, after)) in all.into_iter().enumerate() {
        assert!(during <= limit_ms, "seed {seed}: no answer for {during} ms during {links:?}");
        assert!(after <= limit_ms, "seed {seed}: no answer for {after} ms after {links:?}");
    }
}

#[test]
fn a_follower_that_cannot_send_stalls_nobody() {
    check(&[(3, 1), (3, 2)], 500);
}

#[test]
fn a_follower_that_cannot_hear_stalls_nobody() {
    check(&[(1, 3), (2, 3)], 500);
}

#[test]
fn a_leader_that_cannot_send_is_replaced() {
    check(&[(2, 1), (2, 3)], 6_000);
}

#[test]
fn a_leader_that_cannot_hear_is_replaced() {
    check(&[(1, 2), (3, 2)], 6_000);
}

/// The leader keeps its majority: only the node that serves the host can tell that it must move.
#[test]
fn a_leader_that_the_serving_node_cannot_hear_moves() {
    check(&[(2, 1)], 8_000);
}

#[test]
fn a_leader_that_cannot_hear_the_serving_node_moves() {
    check(&[(1, 2)], 8_000);
}

#[test]
fn a_leader_that_the_serving_node_cannot_reach_moves() {
    check(&[(1, 2), (2, 1)], 8_000);
}

#[test]
fn a_cut_between_followers_is_not_noticed() {
    check(&[(1, 3), (3, 1)], 500);
}

/// A host that lost its power says nothing for ever: another one gets the volume all the same.
#[test]
fn a_dead_host_keeps_nobody_out_for_long() {
    for seed in 0..SEEDS {
        run(seed, |world| async move {
            let scene = Scene::start(world.clone(), Sizes::default()).await;
            let first = load(&scene, HOST, 1);
            world.sleep_ms(1_000).await;
            world.machine(HOST).expect("the host").crash(Crash::PowerLoss);
            scene.world.net().set_cut(&world, HOST, NodeId(1), true);
            let from = world.now_ms();
            let second = load(&scene, OTHER_HOST, 3);
            world.sleep_ms(45_000).await;
            assert!(!first.answers.borrow().is_empty());
            let waited = second.answers.borrow().first().map(|at| at - from);
            println!("seed {seed}: taken over after {waited:?} ms");
            assert!(waited.is_some_and(|waited| waited < 40_000), "seed {seed}: {waited:?}");
        });
    }
}
