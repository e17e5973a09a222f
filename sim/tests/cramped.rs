//! A replica that fell behind the log on a full pool, scripted: it must catch up although there is
//! no room for the difference beside what it holds, crash or not, and then be worth a majority.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::clock::Clock;
use ballast_sim::ballast::{Ballast, Sizes};
use ballast_sim::env::SimEnv;
use ballast_sim::host::nbd::{Command, NbdClient};
use ballast_sim::machine::{Crash, MachineOptions};
use ballast_sim::nemesis::start_if_down;
use ballast_sim::system::System;
use ballast_sim::world::{World, run};

/// Bytes of a request.
const REQUEST: u64 = 256 << 10;

/// Requests that nearly fill a pool of 96 MiB, whose capacity is 17 MiB.
const SLOTS: u64 = 64;

const BEHIND: NodeId = NodeId(3);

struct Scene {
    world: World,
    ballast: Ballast,
    hosts: Cell<u32>,
}

impl Scene {
    async fn start(world: World) -> Scene {
        let sizes = Sizes {
            pool_bytes: 96 << 20,
            retention_bytes: 1 << 20,
            volume_blocks: 16 << 10,
            ..Sizes::default()
        };
        let ballast = Ballast::new(world.seed(), sizes);
        for node in [1, 2, 3].map(NodeId) {
            world.add_machine(node, MachineOptions::default());
            start_if_down(&ballast, &world, node);
        }
        ballast.prepare(&world).await;
        Scene { world, ballast, hosts: Cell::new(1_000) }
    }

    /// Runs requests one after the other, through node 1; all must succeed within the time.
    async fn requests(&self, requests: Vec<Command>, limit_ms: u64) {
        self.hosts.set(self.hosts.get() + 1);
        let host = self.world.add_machine(NodeId(self.hosts.get()), MachineOptions::default());
        let target = self.ballast.nbd_address(NodeId(1));
        let done = Rc::new(RefCell::new(None));
        let answer = done.clone();
        let run = |env: SimEnv| async move {
            let client = NbdClient::connect(&env, &target, "vol-0", true).await.expect("a server");
            for request in requests {
                let what = format!("{request:?}").chars().take(60).collect::<String>();
                loop {
                    match client.run(request.clone()).await {
                        Ok(_) => break,
                        // A view for a peer that is gone may fill the leader's pool for a while.
                        Err(error) if error.is_refusal() => {
                            env.sleep(Duration::from_millis(500)).await;
                        }
                        Err(error) => {
                            answer.replace(Some(format!("{what}: {error}")));
                            return;
                        }
                    }
                }
            }
            answer.replace(Some(String::new()));
        };
        host.start(run);
        self.until(limit_ms, "requests are answered", async || done.borrow().is_some()).await;
        assert_eq!(done.take(), Some(String::new()), "seed {}", self.world.seed());
        self.until(10_000, "the host ends", async || !host.is_running()).await;
    }

    async fn until(&self, limit_ms: u64, what: &str, done: impl AsyncFn() -> bool) {
        let end = self.world.now_ms() + limit_ms;
        while !done().await {
            assert!(self.world.now_ms() < end, "seed {}: {what}", self.world.seed());
            self.world.sleep_ms(2).await;
        }
    }

    fn is_mixed(&self) -> bool {
        let Some(node) = self.ballast.running(BEHIND) else { return false };
        let family = node.cluster_state().volume_by_name("vol-0").map(|volume| volume.family);
        let family = family.and_then(|family| node.family(family));
        family.is_some_and(|family| family.group().replica().is_mixed())
    }

    fn crash(&self, node: NodeId) {
        self.world.machine(node).expect("a node").crash(Crash::PowerLoss);
    }

    async fn is_level(&self) -> bool {
        let first = self.ballast.replicas(&self.world, NodeId(1)).await;
        let behind = self.ballast.replicas(&self.world, BEHIND).await;
        !first.is_empty() && first == behind
    }
}

fn write(slot: u64, round: u8) -> Command {
    let data = (0..REQUEST).map(|at| (at >> 12) as u8 ^ round ^ slot as u8).collect();
    Command::Write { offset: slot * REQUEST, data }
}

fn zero(slot: u64) -> Command {
    Command::WriteZeroes { offset: slot * REQUEST, length: REQUEST as u32 }
}

/// `crashes`: how often the replica loses its power in the middle of the difference.
fn catches_up(seed: u64, crashes: u32) {
    run(seed, |world| async move {
        let scene = Scene::start(world.clone()).await;
        scene.requests((0..SLOTS).map(|slot| write(slot, 1)).collect(), 120_000).await;
        scene.crash(BEHIND);
        // A quarter is trimmed, as much is written elsewhere, the rest twice.
        let kept = SLOTS / 4..SLOTS;
        let moved = SLOTS..SLOTS + SLOTS / 4;
        let mut requests: Vec<Command> = (0..SLOTS / 4).map(zero).collect();
        for round in [2, 3] {
            requests.extend(kept.clone().chain(moved.clone()).map(|slot| write(slot, round)));
        }
        scene.requests(requests, 120_000).await;
        start_if_down(&scene.ballast, &world, BEHIND);
        for _ in 0..crashes {
            scene.until(60_000, "it begins", async || scene.is_mixed()).await;
            world.sleep_ms(world.rng("crash", 0).below(40)).await;
            scene.crash(BEHIND);
            start_if_down(&scene.ballast, &world, BEHIND);
        }
        let mixed = Cell::new(false);
        scene
            .until(60_000, "the replica behind catches up", async || {
                mixed.set(mixed.get() | scene.is_mixed());
                !scene.is_mixed() && scene.is_level().await
            })
            .await;
        assert!(mixed.get() || crashes > 0, "seed {seed}: there was room beside");
        // It is one of a majority now, and may have to lead.
        scene.crash(NodeId(2));
        scene.requests(vec![write(SLOTS - 1, 4)], 60_000).await;
        let level = async || scene.is_level().await;
        scene.until(20_000, "both have it", level).await;
    });
}

#[test]
fn a_replica_behind_catches_up_on_a_full_pool() {
    (0..3).for_each(|seed| catches_up(seed, 0));
}

#[test]
fn power_losses_in_the_middle_do_not_keep_it_from_it() {
    (0..4).for_each(|seed| catches_up(seed, 2));
}
