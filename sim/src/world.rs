//! The simulated world: virtual time, the queue of what is to happen, machines, and the trace.
//!
//! One thread, one current-thread runtime with a paused clock, one seed. Everything that takes time
//! outside of a node (a disk write, bytes on a wire) is an event of the queue in here, so it goes
//! on when the node that began it is gone. Never looks inside a node.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::planted::PlantedBug;
use ballast_env::raft_runtime;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::Instant;

use crate::env::disk::DiskState;
use crate::env::network::NetState;
use crate::machine::{Machine, MachineOptions};
use crate::rng::Rng;
use crate::trace::Trace;
use crate::{os_entropy, panics};

/// A handle to the world; clones share it.
#[derive(Clone)]
pub struct World(Rc<Inner>);

type Action = Box<dyn FnOnce(&World)>;

struct Inner {
    seed: u64,
    start: Instant,
    trace: Trace,
    queue: RefCell<BTreeMap<(Instant, u64), Action>>,
    queued: Cell<u64>,
    earlier: Notify,
    machines: RefCell<BTreeMap<NodeId, Machine>>,
    net: NetState,
    planted: Cell<Option<PlantedBug>>,
}

/// Builds a world from `seed`, runs `scenario` in it and returns what that returns.
///
/// A task of the world that panics fails the run: the panic is raised again at the end.
///
/// A run repeats exactly only when it is the first of its process, because the libraries below
/// keep random state per process: the `simulate` binary runs each seed in a process of its own.
pub fn run<T, F: Future<Output = T>>(seed: u64, scenario: impl FnOnce(World) -> F) -> T {
    os_entropy::seed(seed);
    raft_runtime::seed_thread(seed);
    panics::watch();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing of the system");
    let outcome = LocalSet::new().block_on(&runtime, async {
        let world = World::new(seed);
        tokio::task::spawn_local(world.clone().pump());
        let outcome = scenario(world.clone()).await;
        world.power_off();
        outcome
    });
    if let Some(text) = panics::first() {
        panic!("a task of the simulated world panicked: {text}");
    }
    outcome
}

impl World {
    fn new(seed: u64) -> Self {
        Self(Rc::new(Inner {
            seed,
            start: Instant::now(),
            trace: Trace::default(),
            queue: RefCell::default(),
            queued: Cell::new(0),
            earlier: Notify::new(),
            machines: RefCell::default(),
            net: NetState::new(Rng::named(seed, "network", 0)),
            planted: Cell::new(None),
        }))
    }

    /// Adds a machine that is up but runs nothing.
    pub fn add_machine(&self, id: NodeId, options: MachineOptions) -> Machine {
        let machine = Machine::new(self.clone(), id, options);
        let previous = self.0.machines.borrow_mut().insert(id, machine.clone());
        assert!(previous.is_none(), "{id} exists already");
        machine
    }

    /// The machine `id`, if there is one.
    pub fn machine(&self, id: NodeId) -> Option<Machine> {
        self.0.machines.borrow().get(&id).cloned()
    }

    /// All machines, by number.
    pub fn machines(&self) -> Vec<Machine> {
        self.0.machines.borrow().values().cloned().collect()
    }

    /// The disk of the machine `id`, which must exist.
    pub fn disk(&self, id: NodeId) -> Rc<DiskState> {
        self.machine(id).expect("the machine was added").disk()
    }

    /// The network between the machines.
    pub fn net(&self) -> &NetState {
        &self.0.net
    }

    /// Plants a bug in every program of the world.
    pub fn plant(&self, bug: Option<PlantedBug>) {
        self.0.planted.set(bug);
    }

    /// The planted bug.
    pub fn planted(&self) -> Option<PlantedBug> {
        self.0.planted.get()
    }

    /// The seed of the run.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// A stream of random numbers for `name`.
    pub fn rng(&self, name: &str, number: u64) -> Rng {
        Rng::named(self.0.seed, name, number)
    }

    /// The trace.
    pub fn trace(&self) -> &Trace {
        &self.0.trace
    }

    /// Notes an event now.
    pub fn note(&self, text: impl Into<String>) {
        self.0.trace.note(self.now_ms(), text.into());
    }

    /// True time since the start of the run.
    pub fn now(&self) -> Duration {
        self.0.start.elapsed()
    }

    /// True time since the start of the run in milliseconds.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.now().as_millis()).expect("a run is short")
    }

    /// Waits for `ms` milliseconds of true time.
    pub fn sleep_ms(&self, ms: u64) -> impl Future<Output = ()> + 'static {
        tokio::time::sleep(Duration::from_millis(ms))
    }

    /// Runs `action` in `delay_ms` milliseconds; actions of one point in time run in the order in
    /// which they were asked for.
    pub fn after_ms(&self, delay_ms: u64, action: impl FnOnce(&World) + 'static) {
        let at = Instant::now() + Duration::from_millis(delay_ms);
        let number = self.0.queued.replace(self.0.queued.get() + 1);
        let mut queue = self.0.queue.borrow_mut();
        let is_first = queue.first_key_value().is_none_or(|(key, _)| at < key.0);
        queue.insert((at, number), Box::new(action));
        if is_first {
            self.0.earlier.notify_one();
        }
    }

    async fn pump(self) {
        loop {
            while let Some(action) = self.next_due() {
                action(&self);
            }
            let next = self.0.queue.borrow().first_key_value().map(|(key, _)| key.0);
            let earlier = self.0.earlier.notified();
            match next {
                None => earlier.await,
                Some(at) => tokio::select! {
                    biased;
                    () = earlier => {}
                    () = tokio::time::sleep_until(at) => {}
                },
            }
        }
    }

    fn next_due(&self) -> Option<Action> {
        let mut queue = self.0.queue.borrow_mut();
        let entry = queue.first_entry()?;
        (entry.key().0 <= Instant::now()).then(|| entry.remove())
    }

    /// Ends every machine's processes, so that nothing outlives the runtime.
    fn power_off(&self) {
        for machine in self.machines() {
            machine.stop_quietly();
        }
        self.0.queue.borrow_mut().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_run_in_order_of_time_then_of_request() {
        let order = run(1, |world| async move {
            let order = Rc::new(RefCell::new(Vec::new()));
            for (delay, name) in [(5, "c"), (0, "a"), (5, "d"), (2, "b")] {
                let order = order.clone();
                world.after_ms(delay, move |world| {
                    order.borrow_mut().push((world.now_ms(), name));
                });
            }
            world.sleep_ms(10).await;
            order.take()
        });
        assert_eq!(order, [(0, "a"), (2, "b"), (5, "c"), (5, "d")]);
    }
}
