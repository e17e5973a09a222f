//! Scripted scenarios: a whole cluster of the product, and hosts that do what a script says.
//!
//! Owns the cluster's life and the oracle that judges what the hosts see; faults are the script's,
//! which makes them by the world. Never part of a seed's random run.

mod host;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;

use ballast_block::{NodeId, PoolId, ReplicaId, ShardId};
use ballast_env::planted::PlantedBug;
use ballast_node::admin::Replacement;
use ballast_node::node::Node;
use ballast_volume::family::Family;
use futures_util::FutureExt;
use openraft::async_runtime::WatchReceiver;

use crate::ballast::{Ballast, Sizes, pool_of, volume_name};
use crate::env::SimEnv;
use crate::env::disk::DiskFaults;
use crate::env::network::Link;
use crate::machine::{Machine, MachineOptions};
use crate::nemesis::start_if_down;
use crate::oracle::{Oracle, Violation};
use crate::system::{System, VolumeView};
use crate::world::{World, run};

pub use crate::scene::host::ScriptHost;

/// First machine number of hosts.
const HOSTS: u32 = 1_000;

/// How long what must happen may take, in milliseconds of virtual time: failovers, detours and
/// reconnections together.
const PATIENCE_MS: u64 = 60_000;

/// Longer than any script, in milliseconds.
const FOR_EVER_MS: u64 = 1_000_000_000;

/// Blocks of one read when everything is read back.
const READ_BLOCKS: u32 = 64;

/// Runs `script` in a world of its own, with a planted bug or without. Panics when the script's
/// demands are not met, or a guarantee was broken.
pub fn play<F: Future<Output = ()>>(
    seed: u64,
    sizes: Sizes,
    planted: Option<PlantedBug>,
    script: impl FnOnce(Scene) -> F,
) {
    run(seed, |world| async move {
        world.plant(planted);
        let scene = Scene::start(world, sizes).await;
        // What it panics with is raised again when the world has ended in order.
        let _panic = AssertUnwindSafe(script(scene)).catch_unwind().await;
    });
}

/// Whether `script` fails with the bug planted, and how: the proof that it can fail.
pub fn failure<F: Future<Output = ()>>(
    seed: u64,
    sizes: Sizes,
    planted: PlantedBug,
    script: impl FnOnce(Scene) -> F + Send + 'static,
) -> Option<String> {
    // On a thread of its own: a panic is kept per thread.
    let playing = std::thread::spawn(move || play(seed, sizes, Some(planted), script));
    let panic = playing.join().err()?;
    let text = panic.downcast_ref::<String>().cloned();
    Some(
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default(),
    )
}

/// A running cluster with one script.
pub struct Scene {
    /// The world: time, faults.
    pub world: World,
    /// The product.
    pub ballast: Ballast,
    judge: Rc<Judge>,
    hosts: Cell<u32>,
    /// The volume that the script is about: the first one, unless it chose another.
    volume: Cell<u64>,
}

#[derive(Default)]
struct Judge {
    oracle: Oracle,
    violation: RefCell<Option<Violation>>,
}

impl Judge {
    fn note(&self, outcome: Result<(), Violation>) {
        if let Err(violation) = outcome {
            self.violation.borrow_mut().get_or_insert(violation);
        }
    }
}

impl Scene {
    /// Starts a cluster in which all is well.
    pub async fn start(world: World, sizes: Sizes) -> Self {
        let ballast = Ballast::new(world.seed(), sizes);
        for node in (1..=sizes.nodes).map(NodeId) {
            world.add_machine(node, MachineOptions::default());
            start_if_down(&ballast, &world, node);
        }
        ballast.prepare(&world).await;
        let (hosts, volume) = (Cell::new(HOSTS), Cell::new(0));
        Self { world, ballast, judge: Rc::default(), hosts, volume }
    }

    /// From now on all is about a volume on that shard: hosts that are made, members, leaders.
    pub fn use_shard(&self, shard: ShardId) {
        let on_shard = |volume: &usize| self.ballast.shard_of(NodeId(1), *volume) == Some(shard);
        let found = (0..self.ballast.volumes().len()).find(on_shard);
        self.volume.set(found.expect("each shard has a volume") as u64);
    }

    /// The volume that all is about now.
    pub fn volume(&self) -> usize {
        self.volume.get() as usize
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<NodeId> {
        (1..=System::nodes(&self.ballast)).map(NodeId).collect()
    }

    /// The node that runs there, which must be up.
    pub fn node(&self, id: NodeId) -> Node<SimEnv> {
        self.ballast.running(id).expect("the node is up")
    }

    /// The shard of the node there, which must be up.
    pub fn shard(&self, id: NodeId, shard: ShardId) -> Node<SimEnv> {
        self.ballast.shard(id, shard).expect("the shard is up")
    }

    /// Whether all shards of the node say that they serve.
    pub fn is_ready(&self, id: NodeId) -> bool {
        self.ballast.shards().all(|shard| self.serves(id, shard))
    }

    /// Whether a shard of the node says that it serves.
    pub fn serves(&self, id: NodeId, shard: ShardId) -> bool {
        let ready = |node: Node<SimEnv>| node.is_ready();
        self.machine(id).is_running() && self.ballast.shard(id, shard).is_some_and(ready)
    }

    /// Whether a shard of the node says that the cluster does not take its pool.
    pub fn is_refused(&self, id: NodeId, shard: ShardId) -> bool {
        let refused = |node: Node<SimEnv>| node.refused().is_some();
        self.machine(id).is_running() && self.ballast.shard(id, shard).is_some_and(refused)
    }

    /// The machine.
    pub fn machine(&self, id: NodeId) -> Machine {
        self.world.machine(id).expect("a machine of the scene")
    }

    /// The volume's member on that node, which must run.
    pub fn member(&self, id: NodeId) -> Family<SimEnv> {
        self.ballast.member(id, self.volume()).expect("the volume's member runs there")
    }

    /// The last entry in that member's log.
    pub fn last_index(&self, id: NodeId) -> u64 {
        let member = self.member(id);
        let metrics = member.group().raft().metrics();
        let last = metrics.borrow_watched().last_log_index;
        last.unwrap_or(0)
    }

    /// The node that leads the volume in the newest term, as far as the nodes that run know.
    pub fn leader(&self) -> Option<NodeId> {
        let leading = self.nodes().into_iter().filter_map(|id| {
            let running = self.machine(id).is_running();
            let member = self.ballast.member(id, self.volume()).filter(|_| running)?;
            Some((member.group().leading_term()?, id))
        });
        leading.max().map(|(_, id)| id)
    }

    /// The volume's replica on that node.
    pub fn replica(&self, id: NodeId) -> ReplicaId {
        self.member(id).group().replica().id()
    }

    /// The voters of the volume's group, as its leader has them; none during a change.
    pub fn voters(&self) -> Vec<ReplicaId> {
        let Some(leader) = self.leader() else { return Vec::new() };
        let metrics = self.member(leader).group().raft().metrics();
        let metrics = metrics.borrow_watched();
        match metrics.membership_config.membership().get_joint_config().as_slice() {
            [voters] => voters.iter().copied().map(ReplicaId).collect(),
            _ => Vec::new(),
        }
    }

    /// A host that is switched on and uses nothing yet.
    pub fn host(&self) -> ScriptHost {
        let id = NodeId(self.hosts.replace(self.hosts.get() + 1) + 1);
        let machine = self.world.add_machine(id, MachineOptions::default());
        let env = Rc::new(RefCell::new(None));
        let given = env.clone();
        machine.start(move |env| {
            given.replace(Some(env));
            std::future::pending()
        });
        let env = env.take().expect("a process starts at once");
        ScriptHost::new(self, machine, env)
    }

    /// Waits until `done`, which must be within `limit_ms`.
    pub async fn until_within(&self, limit_ms: u64, what: &str, mut done: impl FnMut() -> bool) {
        let end = self.world.now_ms() + limit_ms;
        while !done() {
            assert!(self.world.now_ms() < end, "not within {limit_ms} ms: {what}");
            self.world.sleep_ms(1).await;
        }
    }

    /// Waits until `done`, as long as anything may take.
    pub async fn until(&self, what: &str, done: impl FnMut() -> bool) {
        self.until_within(PATIENCE_MS, what, done).await;
    }

    /// Runs an administrator's call on a node and waits for its end.
    pub async fn ask<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        id: NodeId,
        call: impl FnOnce(Node<SimEnv>) -> F,
    ) -> T {
        self.run_there(id, call(self.node(id))).await
    }

    async fn run_there<T: 'static>(
        &self,
        id: NodeId,
        call: impl Future<Output = T> + 'static,
    ) -> T {
        let answer = Asked::new(&self.world);
        let state = answer.state.clone();
        self.machine(id).inject(async move {
            let told = call.await;
            state.replace(Some(told));
        });
        answer.within(PATIENCE_MS).await.expect("a call ends")
    }

    /// Gives the pool of a node's shard up, which must be down, and puts an empty disk in its place:
    /// the node's next start formats it.
    pub async fn replace_pool(&self, id: NodeId, shard: ShardId, pool: PoolId) {
        let other = self.nodes().into_iter().find(|other| self.is_ready(*other));
        let other = other.expect("a node that serves");
        let asked = move |node: Node<_>| async move { node.replace_pool(id, pool, false).await };
        let member = match self.ask(other, asked).await.expect("a lost pool is replaced") {
            Replacement::Member(member) => Some(member),
            Replacement::NoMember => None,
            Replacement::Serves => panic!("{pool} was replaced before"),
        };
        self.world.disk(id).restore_file(&pool_of(shard), None);
        self.ballast.reformat(id, shard, member);
    }

    /// Hands the volume's lead to a node, while all is well.
    pub async fn move_leader(&self, to: NodeId) {
        let shard = self.ballast.shard_of(to, self.volume()).expect("the node is up");
        let (node, name) = (self.shard(to, shard), volume_name(self.volume()));
        let moved = self.run_there(to, async move { node.move_leader(&name, to).await });
        moved.await.expect("all is well");
        self.until("the leader moved", || self.leader() == Some(to)).await;
    }

    /// Cuts or mends these directions.
    pub fn set_cut(&self, links: &[(u32, u32)], cut: bool) {
        let net = self.world.net();
        for (from, to) in links.iter().map(|&(from, to)| (NodeId(from), NodeId(to))) {
            net.set_link(&self.world, from, to, Link { cut, ..net.link(from, to) });
        }
    }

    /// Cuts or mends both directions between a node and all other nodes; hosts reach it.
    pub fn set_isolated(&self, node: NodeId, cut: bool) {
        for other in self.nodes().into_iter().filter(|other| *other != node) {
            self.world.net().set_cut(&self.world, node, other, cut);
        }
    }

    /// Starts the node's process, unless it runs, with a disk that works.
    pub fn start_node(&self, id: NodeId) {
        self.mend_disk(id);
        if !self.machine(id).is_running() {
            self.ballast.forget_dead(id);
        }
        start_if_down(&self.ballast, &self.world, id);
    }

    /// The disk works again.
    pub fn mend_disk(&self, id: NodeId) {
        self.world.disk(id).set_faults(DiskFaults::default());
        self.world.disk(id).stall_until(0);
    }

    /// The disk answers nothing any more, and what was given to it from now on is not there after a
    /// crash.
    pub fn hang_disk(&self, id: NodeId) {
        let faults = DiskFaults { lose_in_flight: true, ..DiskFaults::default() };
        self.world.disk(id).set_faults(faults);
        self.world.disk(id).stall_until(self.world.now_ms() + FOR_EVER_MS);
    }

    /// A guarantee was broken so far.
    pub fn check(&self) {
        if let Some(violation) = self.judge.violation.borrow().clone() {
            panic!("{violation}");
        }
        if let Err(violation) = self.judge.oracle.check_all() {
            panic!("{violation}");
        }
    }

    /// Mends links and disks, starts what is down.
    pub fn mend(&self) {
        let machines = self.world.machines();
        for from in &machines {
            for to in &machines {
                let net = self.world.net();
                net.set_link(&self.world, from.id(), to.id(), Link::default());
            }
        }
        for id in self.nodes() {
            self.machine(id).resume();
            self.start_node(id);
        }
    }

    /// The end of a script: mends everything, demands that all replicas have one content, and reads
    /// back all that was ever written.
    pub async fn end(self) {
        self.mend();
        self.level().await;
        self.read_back(NodeId(1)).await;
        for id in self.nodes() {
            assert_eq!(self.ballast.over_limit(id, true), None, "{id}");
        }
    }

    /// Waits until all replicas stand at one position; they must have one content there.
    pub async fn level(&self) {
        let end = self.world.now_ms() + PATIENCE_MS;
        loop {
            let mut views = Vec::new();
            for id in self.nodes() {
                views.extend(self.ballast.replicas(&self.world, id).await);
            }
            let is_level = |(volume, wanted): (usize, &VolumeView)| {
                let views: Vec<_> = views.iter().filter(|view| view.volume == volume).collect();
                let applied: BTreeSet<u64> = views.iter().map(|view| view.applied).collect();
                let digests: BTreeSet<u64> = views.iter().map(|view| view.digest).collect();
                let level = views.len() == wanted.replicas as usize && applied.len() == 1;
                assert!(!level || digests.len() == 1, "at one log position differ: {views:?}");
                level
            };
            if self.ballast.volumes().iter().enumerate().all(is_level) {
                return;
            }
            assert!(self.world.now_ms() < end, "replicas do not come to one position: {views:?}");
            self.world.sleep_ms(50).await;
        }
    }

    /// Reads all that was ever written, through a node.
    pub async fn read_back(&self, through: NodeId) {
        let chosen = self.volume.get();
        for volume in 0..self.ballast.volumes().len() as u64 {
            self.volume.set(volume);
            let reader = self.host();
            reader.attach_reader(through).await;
            for range in self.judge.oracle.written(volume, READ_BLOCKS) {
                let end = self.world.now_ms() + PATIENCE_MS;
                while reader.read(range).within(PATIENCE_MS).await.flatten().is_none() {
                    assert!(self.world.now_ms() < end, "can't be read: {range}");
                    reader.attach_reader(through).await;
                }
            }
        }
        self.volume.set(chosen);
        self.check();
    }
}

/// Something that a script began and that may have an answer.
pub struct Asked<T> {
    world: World,
    state: Rc<RefCell<Option<T>>>,
}

impl<T: 'static> Asked<T> {
    fn new(world: &World) -> Self {
        Self { world: world.clone(), state: Rc::default() }
    }

    /// Whether there is an answer.
    pub fn is_answered(&self) -> bool {
        self.state.borrow().is_some()
    }

    /// The answer, if it comes in time.
    pub async fn within(&self, limit_ms: u64) -> Option<T> {
        let end = self.world.now_ms() + limit_ms;
        loop {
            if let Some(answer) = self.state.take() {
                return Some(answer);
            }
            if self.world.now_ms() >= end {
                return None;
            }
            self.world.sleep_ms(1).await;
        }
    }
}
