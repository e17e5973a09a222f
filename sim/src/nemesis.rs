//! Who makes things go wrong during the safety phase, and who mends everything afterwards.
//!
//! Faults stay within what the product promises to survive: any number of nodes may be down or cut
//! off at once (then nothing is served, and nothing may be lost), disks keep what they reported
//! durable, and rot hits at most one node of a run.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;

use ballast_block::NodeId;

use crate::env::disk::DiskFaults;
use crate::env::network::Link;
use crate::machine::Crash;
use crate::rng::Rng;
use crate::system::System;
use crate::world::World;

/// Which faults happen, each with its weight (0: never), and how often any.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Mean time between two faults in milliseconds; 0: no faults.
    pub every_ms: u64,
    /// Weights of `FAULTS`, in its order.
    pub weights: Vec<u64>,
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// kill -9 of a node.
    Kill,
    /// A node loses power.
    PowerLoss,
    /// A node dies at one of its next effects on the outside world.
    KillSoon,
    /// All nodes lose power at once.
    PowerLossOfAll,
    /// SIGSTOP for a while.
    Stop,
    /// One direction between two machines is cut.
    CutOneWay,
    /// A node hears and is heard by nobody.
    Isolate,
    /// A link is slow.
    SlowLink,
    /// Connections between two machines are reset.
    ResetConnections,
    /// A disk answers nothing for a while.
    StallDisk,
    /// A disk is slow.
    SlowDisk,
    /// A bit of a stored block flips, on the rotten node.
    Rot,
    /// A node makes a checkpoint.
    Checkpoint,
    /// A node loses power when its checkpoint is durable.
    CheckpointAndCrash,
    /// A few operations of a disk take very long.
    SlowWrites,
    /// Writes to a disk fail.
    FailWrites,
    /// Reads of the rotten node's disk fail.
    ReadErrors,
    /// A node hears no other node, but its hosts.
    IsolateFromNodes,
    /// All nodes lose power at the moment of an answer, with slow disks.
    PowerLossAfterAnswer,
}

/// Longest that a node stays down while faults happen, in milliseconds: what [`Nemesis`] starts later
/// itself is up before.
const DOWN_MS_MAX: u64 = 31_000;

/// How long a process of which a part has ended is left alone, in milliseconds: a while in which
/// that part is missed.
const MAIMED_MS_MAX: u64 = 20_000;
/// The same when there are no more faults.
const MAIMED_CALM_MS: u64 = 2_000;

/// All kinds of faults.
const FAULTS: [Fault; 19] = [
    Fault::Kill,
    Fault::PowerLoss,
    Fault::KillSoon,
    Fault::PowerLossOfAll,
    Fault::Stop,
    Fault::CutOneWay,
    Fault::Isolate,
    Fault::SlowLink,
    Fault::ResetConnections,
    Fault::StallDisk,
    Fault::SlowDisk,
    Fault::Rot,
    Fault::Checkpoint,
    Fault::CheckpointAndCrash,
    Fault::SlowWrites,
    Fault::FailWrites,
    Fault::ReadErrors,
    Fault::IsolateFromNodes,
    Fault::PowerLossAfterAnswer,
];

impl Faults {
    /// A random choice.
    pub fn of(rng: &Rng) -> Self {
        let weight = |_| if rng.chance(500_000) { rng.between(1, 10) } else { 0 };
        let every_ms = *rng.pick(&[0, 300, 1_500, 6_000]);
        Self { every_ms, weights: FAULTS.iter().map(weight).collect() }
    }

    /// These, all with one weight.
    pub fn only(faults: &[Fault], every_ms: u64) -> Self {
        let weight = |fault| u64::from(faults.contains(fault));
        Self { every_ms, weights: FAULTS.iter().map(weight).collect() }
    }

    /// Whether there are any.
    pub fn happen(&self) -> bool {
        self.every_ms > 0 && self.weights.iter().any(|weight| *weight > 0)
    }

    fn pick(&self, rng: &Rng) -> Option<Fault> {
        let mut left = rng.below(self.weights.iter().sum::<u64>().max(1));
        FAULTS.iter().zip(&self.weights).find_map(|(fault, weight)| {
            let hit = left < *weight;
            left = left.saturating_sub(*weight);
            hit.then_some(*fault)
        })
    }
}

/// Makes things go wrong.
pub struct Nemesis<S> {
    system: S,
    world: World,
    nodes: Vec<NodeId>,
    /// Machines that are no storage nodes.
    hosts: Vec<NodeId>,
    faults: Faults,
    rng: Rng,
    /// For nodes with several pools only.
    pool_rng: Rng,
    /// The one node of the run whose disk may rot.
    rotten: NodeId,
    /// Whether it did.
    has_rotted: Cell<bool>,
    calm: Rc<Cell<bool>>,
    made: Cell<u64>,
    /// Answers that hosts got so far.
    answered: Rc<dyn Fn() -> u64>,
}

impl<S: System> Nemesis<S> {
    /// For a run with these machines.
    pub fn new(
        system: S,
        world: World,
        nodes: Vec<NodeId>,
        hosts: Vec<NodeId>,
        faults: Faults,
        answered: Rc<dyn Fn() -> u64>,
    ) -> Self {
        let rng = world.rng("nemesis", 0);
        let rotten = *rng.pick(&nodes);
        Self {
            system,
            pool_rng: world.rng("pools", 0),
            world,
            nodes,
            hosts,
            faults,
            rng,
            rotten,
            has_rotted: Cell::new(false),
            calm: Rc::default(),
            made: Cell::new(0),
            answered,
        }
    }

    /// Makes faults until [`Nemesis::mend`] is called.
    pub async fn rage(&self) {
        while !self.calm.get() {
            let pause = match self.faults.every_ms {
                0 => 1_000,
                every => self.rng.between(1, 2 * every),
            };
            self.world.sleep_ms(pause).await;
            if self.faults.every_ms > 0
                && !self.calm.get()
                && let Some(fault) = self.faults.pick(&self.rng)
            {
                self.make(fault);
            }
        }
    }

    /// Faults so far.
    pub fn made(&self) -> u64 {
        self.made.get()
    }

    fn make(&self, fault: Fault) {
        self.made.set(self.made.get() + 1);
        let node = *self.rng.pick(&self.nodes);
        let machine = self.world.machine(node).expect("a node of the run");
        let duration = *self.rng.pick(&[1, 20, 300, 2_000, 10_000]);
        let duration = self.rng.between(1, 2 * duration);
        self.world.note(format!("fault {fault:?} {node} {duration} ms"));
        match fault {
            Fault::Kill => machine.crash(Crash::Kill),
            Fault::PowerLoss => machine.crash(Crash::PowerLoss),
            Fault::KillSoon => {
                let crash = *self.rng.pick(&[Crash::Kill, Crash::PowerLoss]);
                machine.crash_after_effects(self.rng.below(40), crash);
            }
            Fault::PowerLossOfAll => {
                for node in &self.nodes {
                    self.world.machine(*node).expect("a node").crash(Crash::PowerLoss);
                }
            }
            Fault::Stop => {
                machine.stop();
                self.world.after_ms(duration, move |_| machine.resume());
            }
            Fault::CutOneWay => self.cut(&self.one_way(node), duration),
            Fault::Isolate => {
                let others = self.nodes.iter().chain(&self.hosts).filter(|other| **other != node);
                let all = others.flat_map(|other| [(node, *other), (*other, node)]);
                self.cut(&all.collect::<Vec<_>>(), duration);
            }
            Fault::SlowLink => self.slow_link(node, duration),
            Fault::ResetConnections => {
                self.world.net().reset_between(&self.world, node, self.other(node));
            }
            Fault::StallDisk => {
                let until = self.world.now_ms() + duration;
                match self.one_pool() {
                    Some(pool) => machine.disk().stall_file_until(&pool, until),
                    None => machine.disk().stall_until(until),
                }
            }
            Fault::Rot => self.rot(),
            Fault::Checkpoint => self.system.checkpoint(&self.world, node, || {}),
            Fault::CheckpointAndCrash => self.crash_after_checkpoint(node),
            Fault::SlowDisk | Fault::SlowWrites | Fault::FailWrites | Fault::ReadErrors => {
                self.harm_disk(fault, node, duration);
            }
            Fault::IsolateFromNodes => {
                let others = self.nodes.iter().filter(|other| **other != node);
                let all = others.flat_map(|other| [(node, *other), (*other, node)]);
                self.cut(&all.collect::<Vec<_>>(), duration);
            }
            Fault::PowerLossAfterAnswer => self.lose_power_after_answer(),
        }
        let downs = [
            Fault::Kill,
            Fault::PowerLoss,
            Fault::KillSoon,
            Fault::PowerLossOfAll,
            Fault::CheckpointAndCrash,
            Fault::PowerLossAfterAnswer,
        ];
        if downs.contains(&fault) {
            self.restart_later();
        }
    }

    /// The one of a node's pools that a fault is to hit; `None`: all of them.
    fn one_pool(&self) -> Option<PathBuf> {
        let pools = self.system.pools();
        let one = pools.len() > 1 && self.pool_rng.chance(600_000);
        one.then(|| self.pool_rng.pick(&pools).clone())
    }

    /// Makes a disk slow, for all or for a few operations, or fail.
    fn harm_disk(&self, fault: Fault, node: NodeId, duration: u64) {
        let mut faults = DiskFaults { only: self.one_pool(), ..DiskFaults::default() };
        let mut node = node;
        let mut duration = duration;
        match fault {
            Fault::SlowDisk => faults.latency_max_ms = self.rng.between(5, 200),
            Fault::SlowWrites => {
                faults.tail_rate = self.rng.between(10_000, 300_000);
                faults.tail_ms = *self.rng.pick(&[30, 300, 3_000]);
            }
            Fault::FailWrites => {
                faults.write_error_rate = *self.rng.pick(&[100_000, 1_000_000]);
                duration = duration.min(500);
            }
            // A read that fails is damage to the node: only one may have any.
            _ if !self.system.survives_rot() => return,
            _ => {
                node = self.rotten;
                self.has_rotted.set(true);
                faults.read_error_rate = *self.rng.pick(&[10_000, 300_000]);
            }
        }
        let disk = self.world.disk(node);
        disk.set_faults(faults);
        self.world.after_ms(duration, move |_| disk.set_faults(DiskFaults::default()));
    }

    /// Loses the power of a node when its checkpoint is durable, mostly while a few writes hang: then
    /// the checkpoint must not cover them.
    fn crash_after_checkpoint(&self, node: NodeId) {
        let disk = self.world.disk(node);
        if self.rng.chance(700_000) {
            let (tail_rate, tail_ms) = (self.rng.between(50_000, 300_000), 3_000);
            let only = self.one_pool();
            disk.set_faults(DiskFaults { tail_rate, tail_ms, only, ..Default::default() });
        }
        let (system, calm) = (self.system.clone(), self.calm.clone());
        self.world.after_ms(self.rng.between(1, 300), move |world| {
            let machine = world.machine(node).expect("a node of the run");
            system.checkpoint(world, node, move || {
                disk.set_faults(DiskFaults::default());
                if !calm.get() {
                    machine.crash(Crash::PowerLoss);
                }
            });
        });
    }

    /// Loses the power of all nodes at the moment of an answer, while all disks are slow: what was
    /// answered and is not yet on a majority's disks is lost.
    fn lose_power_after_answer(&self) {
        let nodes: Vec<_> = self.nodes.iter().filter_map(|id| self.world.machine(*id)).collect();
        let faults = DiskFaults { latency_max_ms: self.rng.between(5, 100), ..Default::default() };
        nodes.iter().for_each(|node| node.disk().set_faults(faults.clone()));
        let (world, answered, calm) =
            (self.world.clone(), self.answered.clone(), self.calm.clone());
        let wanted = answered() + self.rng.between(1, 8);
        tokio::task::spawn_local(async move {
            let end = world.now_ms() + 3_000;
            while answered() < wanted && world.now_ms() < end && !calm.get() {
                world.sleep_ms(1).await;
            }
            for node in nodes {
                node.disk().set_faults(DiskFaults::default());
                if !calm.get() {
                    node.crash(Crash::PowerLoss);
                }
            }
        });
    }

    /// Restarts what ended by itself, as a supervisor does, for as long as the run lasts; and what
    /// died so late that nothing else will start it.
    pub async fn supervise(&self) {
        let mut down = vec![0_u64; self.nodes.len()];
        let mut maimed = vec![Maimed::default(); self.nodes.len()];
        loop {
            self.world.sleep_ms(500).await;
            for ((node, down), maimed) in self.nodes.iter().zip(&mut down).zip(&mut maimed) {
                let Some(machine) = self.world.machine(*node) else { continue };
                let is_maimed = machine.is_running() && self.system.wants_restart(*node);
                if maimed.is_due(is_maimed, self.calm.get()) {
                    machine.crash(Crash::Kill);
                    start_if_down(&self.system, &self.world, *node);
                }
                *down = if machine.is_running() { 0 } else { *down + 500 };
                let forgotten = *down > DOWN_MS_MAX && !self.calm.get();
                if machine.has_exited() || forgotten {
                    start_if_down(&self.system, &self.world, *node);
                }
            }
        }
    }

    /// A direction from `node` to another machine; or all from it to the other nodes, or all to it,
    /// while hosts hear it and are heard.
    fn one_way(&self, node: NodeId) -> Vec<(NodeId, NodeId)> {
        let others = self.nodes.iter().copied().filter(|other| *other != node);
        match self.rng.below(3) {
            0 => others.map(|other| (node, other)).collect(),
            1 => others.map(|other| (other, node)).collect(),
            _ => vec![(node, self.other(node))],
        }
    }

    /// Another machine than `node`: a node or a host.
    fn other(&self, node: NodeId) -> NodeId {
        let others: Vec<NodeId> =
            self.nodes.iter().chain(&self.hosts).copied().filter(|other| *other != node).collect();
        *self.rng.pick(&others)
    }

    fn cut(&self, links: &[(NodeId, NodeId)], duration: u64) {
        for (from, to) in links.iter().copied() {
            let net = self.world.net();
            net.set_link(&self.world, from, to, Link { cut: true, ..net.link(from, to) });
            self.world.after_ms(duration, move |world| {
                let link = Link { cut: false, ..world.net().link(from, to) };
                world.net().set_link(world, from, to, link);
            });
        }
    }

    fn slow_link(&self, node: NodeId, duration: u64) {
        let other = self.other(node);
        let delay_max_ms = self.rng.between(2, 500);
        let bytes_per_ms = *self.rng.pick(&[0, 10, 1_000]);
        for (from, to) in [(node, other), (other, node)] {
            let link = Link { delay_max_ms, bytes_per_ms, ..self.world.net().link(from, to) };
            self.world.net().set_link(&self.world, from, to, link);
            self.world.after_ms(duration, move |world| {
                let cut = world.net().link(from, to).cut;
                world.net().set_link(world, from, to, Link { cut, ..Default::default() });
            });
        }
    }

    /// The node whose disk has rotted: with it, the run's budget of damaged nodes is spent.
    pub fn rotten(&self) -> Option<NodeId> {
        self.has_rotted.get().then_some(self.rotten)
    }

    fn rot(&self) {
        if !self.system.survives_rot() {
            return;
        }
        let pools = self.system.pools();
        let Some(pool) = self.one_pool().or_else(|| pools.first().cloned()) else { return };
        let disk = self.world.disk(self.rotten);
        let hit = disk.rot_any(&pool);
        self.has_rotted.set(self.has_rotted.get() || hit.is_some());
        self.world.note(format!("{} rots at {hit:?}", self.rotten));
    }

    /// Starts again, each after a while of its own, the nodes that are down then.
    fn restart_later(&self) {
        for node in self.nodes.clone() {
            let delay = *self.rng.pick(&[1, 50, 500, 3_000, 15_000]);
            let delay = self.rng.between(1, 2 * delay);
            let system = self.system.clone();
            self.world.after_ms(delay, move |world| start_if_down(&system, world, node));
        }
    }

    /// Ends all faults: links, disks, processes.
    pub fn mend(&self) {
        self.calm.set(true);
        self.world.note("mend everything");
        let machines = self.world.machines();
        for from in &machines {
            from.disk().set_faults(DiskFaults::default());
            from.disk().stall_until(0);
            from.cancel_doom();
            from.resume();
            for to in &machines {
                self.world.net().set_link(&self.world, from.id(), to.id(), Link::default());
            }
        }
        for node in &self.nodes {
            start_if_down(&self.system, &self.world, *node);
        }
    }
}

/// A process of which a part has ended: somebody looks after it and restarts it some time.
#[derive(Clone, Default)]
struct Maimed {
    for_ms: u64,
    restarted_in_calm: bool,
}

impl Maimed {
    /// Whether to restart it now; asked twice a second.
    fn is_due(&mut self, wants: bool, calm: bool) -> bool {
        self.for_ms = if wants { self.for_ms + 500 } else { 0 };
        let limit = if calm { MAIMED_CALM_MS } else { MAIMED_MS_MAX };
        // Without faults once is enough: what ends again then, rotten, would end each time.
        let due = self.for_ms > limit && !(calm && self.restarted_in_calm);
        if due {
            self.for_ms = 0;
            self.restarted_in_calm |= calm;
        }
        due
    }
}

/// Starts the program on `node` unless it runs.
pub fn start_if_down<S: System>(system: &S, world: &World, node: NodeId) {
    let machine = world.machine(node).expect("a node of the run");
    if !machine.is_running() {
        let system = system.clone();
        machine.start(move |env| async move { system.node(env).await });
    }
}
