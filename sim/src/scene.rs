//! Scripted scenarios: a whole cluster of the product, and hosts that do what a script says.
//!
//! Owns the cluster's life and the oracle that judges what the hosts see; faults are the script's,
//! which makes them by the world. Never part of a seed's random run.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{BlockRange, NodeId};
use ballast_env::planted::PlantedBug;
use ballast_node::node::Node;
use ballast_volume::family::Family;
use futures_util::FutureExt;

use crate::ballast::{Ballast, Sizes};
use crate::env::SimEnv;
use crate::env::disk::DiskFaults;
use crate::env::network::Link;
use crate::host::nbd::{Command, NbdClient, NbdError};
use crate::machine::{Machine, MachineOptions};
use crate::nemesis::start_if_down;
use crate::oracle::{Oracle, Outcome, Value, Violation, stamp};
use crate::system::System;
use crate::world::{World, run};

/// The volume that scripts use: the first one.
const VOLUME: u64 = 0;
const EXPORT: &str = "vol-0";

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
        Self { world, ballast, judge: Rc::default(), hosts: Cell::new(HOSTS) }
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<NodeId> {
        (1..=System::nodes(&self.ballast)).map(NodeId).collect()
    }

    /// The node that runs there, which must be up.
    pub fn node(&self, id: NodeId) -> Node<SimEnv> {
        self.ballast.running(id).expect("the node is up")
    }

    /// Whether the node says that it serves.
    pub fn is_ready(&self, id: NodeId) -> bool {
        self.machine(id).is_running() && self.ballast.running(id).is_some_and(|one| one.is_ready())
    }

    /// Whether the node says that the cluster does not take its pool.
    pub fn is_refused(&self, id: NodeId) -> bool {
        let refused = |node: Node<SimEnv>| node.refused().is_some();
        self.machine(id).is_running() && self.ballast.running(id).is_some_and(refused)
    }

    /// The machine.
    pub fn machine(&self, id: NodeId) -> Machine {
        self.world.machine(id).expect("a machine of the scene")
    }

    /// The volume's member on that node, which must run.
    pub fn member(&self, id: NodeId) -> Family<SimEnv> {
        self.ballast.member(id, VOLUME as usize).expect("the volume's member runs there")
    }

    /// The last entry in that member's log.
    pub fn last_index(&self, id: NodeId) -> u64 {
        use openraft::async_runtime::WatchReceiver;
        let member = self.member(id);
        let metrics = member.group().raft().metrics();
        let last = metrics.borrow_watched().last_log_index;
        last.unwrap_or(0)
    }

    /// The node that leads the volume in the newest term, as far as the nodes that run know.
    pub fn leader(&self) -> Option<NodeId> {
        let leading = self.nodes().into_iter().filter_map(|id| {
            let running = self.machine(id).is_running();
            let member = self.ballast.member(id, VOLUME as usize).filter(|_| running)?;
            Some((member.group().leading_term()?, id))
        });
        leading.max().map(|(_, id)| id)
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
        let (judge, ballast) = (self.judge.clone(), self.ballast.clone());
        ScriptHost {
            world: self.world.clone(),
            machine,
            env,
            ballast,
            judge,
            client: RefCell::default(),
        }
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
        let answer = Asked::new(&self.world);
        let (state, call) = (answer.state.clone(), call(self.node(id)));
        self.machine(id).inject(async move {
            let told = call.await;
            state.replace(Some(told));
        });
        answer.within(PATIENCE_MS).await.expect("a call ends")
    }

    /// Hands the volume's lead to a node, while all is well.
    pub async fn move_leader(&self, to: NodeId) {
        let moved = self.ask(to, |node| async move { node.move_leader(EXPORT, to).await });
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
            views.retain(|view| view.volume == VOLUME as usize);
            let applied: BTreeSet<u64> = views.iter().map(|view| view.applied).collect();
            let digests: BTreeSet<u64> = views.iter().map(|view| view.digest).collect();
            let wanted = self.ballast.volumes()[VOLUME as usize].replicas as usize;
            if views.len() == wanted && applied.len() == 1 {
                assert_eq!(digests.len(), 1, "replicas at one log position differ: {views:?}");
                return;
            }
            assert!(self.world.now_ms() < end, "replicas do not come to one position: {views:?}");
            self.world.sleep_ms(50).await;
        }
    }

    /// Reads all that was ever written, through a node.
    pub async fn read_back(&self, through: NodeId) {
        let reader = self.host();
        reader.attach_reader(through).await;
        for range in self.judge.oracle.written(VOLUME, READ_BLOCKS) {
            let end = self.world.now_ms() + PATIENCE_MS;
            while reader.read(range).within(PATIENCE_MS).await.flatten().is_none() {
                assert!(self.world.now_ms() < end, "can't be read: {range}");
                reader.attach_reader(through).await;
            }
        }
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

/// A host that does what the script says; all that it sees is judged.
pub struct ScriptHost {
    world: World,
    machine: Machine,
    env: SimEnv,
    ballast: Ballast,
    judge: Rc<Judge>,
    client: RefCell<Option<(Rc<NbdClient>, u64)>>,
}

impl ScriptHost {
    /// Its machine.
    pub fn id(&self) -> NodeId {
        self.machine.id()
    }

    /// Lets time pass.
    pub async fn pause(&self, ms: u64) {
        self.world.sleep_ms(ms).await;
    }

    /// Becomes the volume's writer through a node; again and again until it is.
    pub async fn attach(&self, through: NodeId) {
        self.connect(through, EXPORT.to_owned(), true).await;
    }

    /// Reads the volume through a node from now on.
    pub async fn attach_reader(&self, through: NodeId) {
        self.connect(through, format!("{EXPORT}@ro"), false).await;
    }

    async fn connect(&self, through: NodeId, export: String, writes: bool) {
        self.client.replace(None);
        let end = self.world.now_ms() + PATIENCE_MS;
        loop {
            let began = self.judge.oracle.attach_begins();
            let made = Asked::new(&self.world);
            let (state, env, export) = (made.state.clone(), self.env.clone(), export.clone());
            let target = self.ballast.nbd_address(through);
            self.machine.inject(async move {
                let client = NbdClient::connect(&env, &target, &export, true).await;
                state.replace(Some(client.ok().map(Rc::new)));
            });
            if let Some(client) = made.within(PATIENCE_MS).await.flatten() {
                let attached = || self.judge.oracle.attached(VOLUME, began);
                let number = if writes { attached() } else { u64::MAX };
                self.client.replace(Some((client, number)));
                return;
            }
            assert!(self.world.now_ms() < end, "{through} lets no host in");
            self.world.sleep_ms(50).await;
        }
    }

    fn run(&self, command: Command, told: impl FnOnce(Result<Vec<u8>, NbdError>) + 'static) {
        let client = self.client.borrow().clone().expect("attached").0;
        self.machine.inject(async move { told(client.run(command).await) });
    }

    fn begin(&self, range: BlockRange, zeroes: bool) -> Asked<Outcome> {
        let attachment = self.client.borrow().as_ref().expect("attached").1;
        let oracle = &self.judge.oracle;
        let id = oracle.write_begins_under(attachment, VOLUME, range, zeroes);
        let (offset, length) = (range.start * BLOCK_SIZE_U64, range.bytes() as u32);
        let command = if zeroes {
            Command::Trim { offset, length }
        } else {
            let blocks = range.start..range.end();
            let data = blocks.flat_map(|block| stamp::stamp(VOLUME, block, id)).collect();
            Command::Write { offset, data }
        };
        let asked = Asked::new(&self.world);
        let (state, judge) = (asked.state.clone(), self.judge.clone());
        self.run(command, move |answer| {
            let outcome = match answer {
                Ok(_) => Outcome::Done,
                Err(error) if error.is_refusal() => Outcome::Refused,
                Err(_) => Outcome::Unknown,
            };
            judge.note(judge.oracle.write_ends(id, outcome));
            state.replace(Some(outcome));
        });
        asked
    }

    /// Begins to write a range.
    pub fn write(&self, range: BlockRange) -> Asked<Outcome> {
        self.begin(range, false)
    }

    /// Begins to trim a range.
    pub fn trim(&self, range: BlockRange) -> Asked<Outcome> {
        self.begin(range, true)
    }

    /// Writes a range, which must succeed.
    pub async fn must_write(&self, range: BlockRange) {
        let outcome = self.write(range).within(PATIENCE_MS).await;
        assert_eq!(outcome, Some(Outcome::Done), "write of {range}");
    }

    /// Begins to read a range; the answer is none after an error.
    pub fn read(&self, range: BlockRange) -> Asked<Option<Vec<Value>>> {
        let token = self.judge.oracle.read_begins(VOLUME, range);
        let (offset, length) = (range.start * BLOCK_SIZE_U64, range.bytes() as u32);
        let asked = Asked::new(&self.world);
        let (state, judge) = (asked.state.clone(), self.judge.clone());
        self.run(Command::Read { offset, length }, move |answer| {
            let values = answer.ok().map(|bytes| {
                judge.note(judge.oracle.read_ends(token, &bytes));
                let blocks = (range.start..).zip(bytes.chunks(BLOCK_SIZE_U64 as usize));
                let known = |(block, bytes)| stamp::recognise(VOLUME, block, bytes);
                // What no write made has been noted as a violation.
                blocks.map(|one| known(one).unwrap_or(Value::Zero)).collect()
            });
            state.replace(Some(values));
        });
        asked
    }
}
