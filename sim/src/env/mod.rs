//! The outside world of one simulated process: `ballast_env`'s traits on top of [`crate::world`].
//!
//! What a dead process still calls (from destructors, or after its chosen last effect) has no
//! effect and never completes.

pub mod disk;
pub mod network;
mod stream;

use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::clock::{Clock, Instant};
use ballast_env::disk::{Disk, OpenMode};
use ballast_env::entropy::Entropy;
use ballast_env::network::{Address, Network};
use ballast_env::planted::{Planted, PlantedBug};
use ballast_env::raft_runtime;
use ballast_env::spawn::{Spawn, Task};

use crate::env::disk::SimFile;
use crate::env::network::SimListener;
use crate::machine::{Machine, Process};
use crate::world::World;

pub use crate::env::stream::SimStream;

/// The outside world of one process; clones share it.
#[derive(Clone)]
pub struct SimEnv {
    world: World,
    machine: Machine,
    process: Rc<Process>,
}

impl SimEnv {
    pub(crate) fn new(world: World, machine: Machine, process: Rc<Process>) -> Self {
        Self { world, machine, process }
    }

    /// The machine that it is on.
    pub fn node(&self) -> NodeId {
        self.machine.id()
    }

    /// The world around it.
    pub fn world(&self) -> &World {
        &self.world
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(crate) fn process(&self) -> &Rc<Process> {
        &self.process
    }
}

const MILLION: u128 = 1_000_000;

impl Clock for SimEnv {
    fn now(&self) -> Instant {
        let options = self.machine.options();
        let rate = MILLION.checked_add_signed(i128::from(options.drift_ppm)).expect("small drift");
        let nanos = self.world.now().as_nanos() * rate / MILLION;
        let nanos = u64::try_from(nanos).expect("a run is short");
        Instant(options.clock_start_nanos.saturating_add(nanos))
    }

    fn wall_ms(&self) -> u64 {
        self.machine.options().wall_start_ms.saturating_add(self.world.now_ms())
    }

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        tokio::time::sleep(raft_runtime::to_tokio(duration))
    }
}

impl Entropy for SimEnv {
    fn random_u64(&self) -> u64 {
        self.machine.entropy().draw()
    }
}

impl Planted for SimEnv {
    fn is_planted(&self, bug: PlantedBug) -> bool {
        self.world.planted() == Some(bug)
    }
}

impl Spawn for SimEnv {
    fn spawn(&self, future: impl Future<Output = ()> + 'static) -> Task {
        Task::new(tokio::task::spawn_local(future).abort_handle())
    }
}

impl Disk for SimEnv {
    type File = SimFile;

    fn open(
        &self,
        path: &Path,
        mode: OpenMode,
    ) -> impl Future<Output = std::io::Result<SimFile>> + 'static {
        disk::open(self.clone(), path.to_owned(), mode)
    }
}

impl Network for SimEnv {
    type Stream = SimStream;
    /// All of a process is one thread here.
    type Detached = SimStream;
    type Listener = SimListener;

    fn listen(
        &self,
        address: &Address,
    ) -> impl Future<Output = std::io::Result<SimListener>> + 'static {
        network::listen(self.clone(), address.clone())
    }

    fn connect(
        &self,
        address: &Address,
    ) -> impl Future<Output = std::io::Result<SimStream>> + 'static {
        network::connect(self.clone(), address.clone())
    }

    fn detach(&self, stream: SimStream) -> std::io::Result<SimStream> {
        Ok(stream)
    }

    fn adopt(&self, detached: SimStream) -> std::io::Result<SimStream> {
        Ok(detached)
    }
}
