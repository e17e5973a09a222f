//! A machine of the simulated world, and the process that runs on it.
//!
//! Owns the life of a process: start, stop (SIGSTOP), crash, exit. A process is a `LocalSet` of its
//! own, polled as one future: dropping it is a crash, every task of it ends at the await where it
//! is. What the process did to the outside before that moment stays (see the fault models of
//! [`crate::env::disk`] and [`crate::env::network`]). Never reads what the process thinks.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use ballast_block::NodeId;
use ballast_env::raft_runtime::RateScope;
use tokio::task::LocalSet;

use crate::env::SimEnv;
use crate::env::disk::DiskState;
use crate::rng::Rng;
use crate::world::World;

/// What makes this machine's clocks differ from true time.
#[derive(Clone, Copy, Debug, Default)]
pub struct MachineOptions {
    /// How much faster its monotonic clock runs, in parts per million.
    pub drift_ppm: i32,
    /// What its monotonic clock showed at the start of the run, in nanoseconds.
    pub clock_start_nanos: u64,
    /// What its wall clock showed at the start of the run, in milliseconds since 1970.
    pub wall_start_ms: u64,
}

/// How a process ends against its will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// kill -9: the kernel lives on, closes its sockets and refuses new connections.
    Kill,
    /// The machine loses power: peers hear nothing any more.
    PowerLoss,
}

/// A handle to a machine; clones share it.
#[derive(Clone)]
pub struct Machine(Rc<Inner>);

struct Inner {
    world: World,
    id: NodeId,
    options: MachineOptions,
    disk: Rc<DiskState>,
    entropy: Rng,
    powered: Cell<bool>,
    starts: Cell<u64>,
    exited: Cell<bool>,
    process: RefCell<Option<Rc<Process>>>,
}

/// One life of the program on a machine.
pub(crate) struct Process {
    number: u64,
    alive: Cell<bool>,
    stopped: Cell<bool>,
    /// Effects on the outside world that it may still have before it dies, and how it dies then.
    doom: Cell<Option<(u64, Crash)>>,
    tasks: RefCell<Option<LocalSet>>,
    waker: RefCell<Option<Waker>>,
}

impl Process {
    /// Whether what it does still has an effect.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.get()
    }

    /// Which start of the program on its machine it is, from 1.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Counts an effect on the outside world; at the chosen one the process is dead.
    pub(crate) fn count_effect(&self) {
        match self.doom.get() {
            Some((0, _)) => self.alive.set(false),
            Some((left, crash)) => self.doom.set(Some((left - 1, crash))),
            None => {}
        }
    }
}

impl Machine {
    pub(crate) fn new(world: World, id: NodeId, options: MachineOptions) -> Self {
        let disk = DiskState::new(&world, id);
        let entropy = world.rng("entropy", u64::from(id.0));
        Self(Rc::new(Inner {
            world,
            id,
            options,
            disk,
            entropy,
            powered: Cell::new(true),
            starts: Cell::new(0),
            exited: Cell::new(false),
            process: RefCell::new(None),
        }))
    }

    /// Its number.
    pub fn id(&self) -> NodeId {
        self.0.id
    }

    /// Its address on the simulated network.
    pub fn ip(&self) -> IpAddr {
        ip_of(self.0.id)
    }

    /// Its disk.
    pub fn disk(&self) -> Rc<DiskState> {
        self.0.disk.clone()
    }

    pub(crate) fn entropy(&self) -> &Rng {
        &self.0.entropy
    }

    pub(crate) fn options(&self) -> MachineOptions {
        self.0.options
    }

    /// Whether its kernel answers on the network.
    pub fn is_powered(&self) -> bool {
        self.0.powered.get()
    }

    /// Whether a process runs on it (it may be stopped).
    pub fn is_running(&self) -> bool {
        self.0.process.borrow().as_ref().is_some_and(|process| process.is_alive())
    }

    /// Whether its last process ended by itself, and none was started since.
    pub fn has_exited(&self) -> bool {
        self.0.exited.get() && !self.is_running()
    }

    /// How often a process was started on it.
    pub fn starts(&self) -> u64 {
        self.0.starts.get()
    }

    /// Starts a process with `main` as its first task; when `main` returns, the process exits.
    /// Nothing may be running.
    pub fn start<F: Future<Output = ()> + 'static>(&self, main: impl FnOnce(SimEnv) -> F) {
        assert!(!self.is_running(), "{} runs already", self.0.id);
        let number = self.0.starts.get() + 1;
        self.0.starts.set(number);
        self.0.exited.set(false);
        self.0.powered.set(true);
        self.0.world.note(format!("{} start {number}", self.0.id));
        let process = Rc::new(Process {
            number,
            alive: Cell::new(true),
            stopped: Cell::new(false),
            doom: Cell::new(None),
            tasks: RefCell::new(None),
            waker: RefCell::new(None),
        });
        let env = SimEnv::new(self.0.world.clone(), self.clone(), process.clone());
        let tasks = LocalSet::new();
        let machine = self.clone();
        // Rate and tasks of the node also while its first future is built.
        let _rate = RateScope::enter(self.0.options.drift_ppm);
        let main = {
            let _tasks = tasks.enter();
            main(env)
        };
        let exiting = process.clone();
        tasks.spawn_local(async move {
            main.await;
            exiting.doom.set(Some((0, Crash::Kill)));
            exiting.count_effect();
            machine.0.exited.set(true);
            machine.0.world.note(format!("{} exit", machine.0.id));
        });
        process.tasks.replace(Some(tasks));
        *self.0.process.borrow_mut() = Some(process.clone());
        tokio::task::spawn_local(Runner { machine: self.clone(), process });
    }

    /// Runs `future` as a task of the process, as an administrator's call would; it is dropped when
    /// nothing runs, and dies with the process.
    pub fn inject(&self, future: impl Future<Output = ()> + 'static) {
        let process = self.0.process.borrow().clone();
        if let Some(process) = process {
            if let Some(tasks) = process.tasks.borrow().as_ref() {
                tasks.spawn_local(future);
            }
            if let Some(waker) = process.waker.borrow().as_ref() {
                waker.wake_by_ref();
            }
        }
    }

    /// Ends the process now, wherever its tasks are. Does nothing when none runs.
    pub fn crash(&self, crash: Crash) {
        if crash == Crash::PowerLoss {
            self.0.powered.set(false);
        }
        let Some(process) = self.0.process.borrow_mut().take() else { return };
        self.bury(&process, crash);
    }

    /// Lets the process die at its `effects`-th effect on the outside world from now (a disk
    /// write, bytes sent): a crash between two tasks that no virtual time separates.
    pub fn crash_after_effects(&self, effects: u64, crash: Crash) {
        if let Some(process) = self.0.process.borrow().as_ref() {
            process.doom.set(Some((effects, crash)));
        }
    }

    /// Takes [`Machine::crash_after_effects`] back.
    pub fn cancel_doom(&self) {
        if let Some(process) = self.0.process.borrow().as_ref() {
            process.doom.set(None);
        }
    }

    /// SIGSTOP: the process is not scheduled until [`Machine::resume`]. Its clock runs on.
    pub fn stop(&self) {
        if let Some(process) = self.0.process.borrow().as_ref() {
            self.0.world.note(format!("{} stopped", self.0.id));
            process.stopped.set(true);
        }
    }

    /// SIGCONT.
    pub fn resume(&self) {
        if let Some(process) = self.0.process.borrow().as_ref() {
            if process.stopped.replace(false) {
                self.0.world.note(format!("{} resumed", self.0.id));
            }
            if let Some(waker) = process.waker.borrow_mut().take() {
                waker.wake();
            }
        }
    }

    /// End of the run: no trace, no consequences.
    pub(crate) fn stop_quietly(&self) {
        let Some(process) = self.0.process.borrow_mut().take() else { return };
        process.alive.set(false);
        drop(process.tasks.take());
    }

    fn bury(&self, process: &Process, crash: Crash) {
        process.alive.set(false);
        self.0.world.note(format!("{} crash {crash:?}", self.0.id));
        drop(process.tasks.take());
        self.0.disk.crash(crash);
        self.0.world.net().crash(&self.0.world, self.0.id, process.number, crash);
        if let Some(waker) = process.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// The process died by its own doing or at its chosen effect.
    fn died(&self, process: &Rc<Process>) {
        let crash = process.doom.get().map_or(Crash::Kill, |(_, crash)| crash);
        let mut current = self.0.process.borrow_mut();
        if current.as_ref().is_some_and(|current| Rc::ptr_eq(current, process)) {
            *current = None;
        }
        drop(current);
        if crash == Crash::PowerLoss {
            self.0.powered.set(false);
        }
        self.bury(process, crash);
    }
}

/// The address of machine `id` on the simulated network.
pub fn ip_of(id: NodeId) -> IpAddr {
    let [_, a, b, c] = id.0.to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(10, a, b, c))
}

/// Polls the tasks of a process for as long as it lives.
struct Runner {
    machine: Machine,
    process: Rc<Process>,
}

impl Future for Runner {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let process = &self.process;
        if !process.is_alive() {
            return Poll::Ready(());
        }
        process.waker.replace(Some(cx.waker().clone()));
        if process.stopped.get() {
            return Poll::Pending;
        }
        let polled = {
            let _rate = RateScope::enter(self.machine.0.options.drift_ppm);
            let mut tasks = process.tasks.borrow_mut();
            let tasks = tasks.as_mut().expect("an alive process has tasks");
            Pin::new(tasks).poll(cx)
        };
        if polled.is_ready() || !process.is_alive() {
            self.machine.died(process);
            return Poll::Ready(());
        }
        Poll::Pending
    }
}
