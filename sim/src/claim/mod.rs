//! A claimed name: volumes that live under it one after another, hosts that make file systems on them as
//! the CSI driver does, and an administrator who deletes each and makes the next one.
//!
//! Owns the life of those volumes and how their hosts behave. Judges nothing itself: each life has an
//! oracle of its own, and stamps of its own, so that nothing of one can pass for another's. Hosts never
//! do what a right host would not, but for two things: they write on when their lease is gone, and they
//! do not wait for every answer.

mod ask;
mod session;
mod stager;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{NodeId, VolumeId};
use ballast_env::clock::Clock;

use crate::ballast::{Ballast, volume_name};
use crate::claim::stager::Stager;
use crate::env::SimEnv;
use crate::machine::MachineOptions;
use crate::oracle::{Oracle, Violation};
use crate::rng::Rng;
use crate::world::World;

/// Blocks that hosts use: so few that what lands where it must not is soon seen.
pub const USED_BLOCKS: u64 = 24;
/// Blocks of the first life; each life has one more than the last, so that who connects by the name alone
/// knows which one he got.
const BLOCKS: u64 = 1 << 10;
/// Hosts of a claim.
const HOSTS: u32 = 3;
/// Shortest and longest life, in milliseconds.
const LIFE_MS: (u64, u64) = (700, 4_000);
/// How long the administrator waits for an answer before he asks another node.
const PATIENCE_MS: u64 = 12_000;
/// How long he goes on with a next life once the run ends: a node that is damaged for ever may be missing.
const LAST_LIFE_MS: u64 = 20_000;

/// A name, and what lives under it.
pub struct Claim {
    ballast: Ballast,
    world: World,
    rng: Rng,
    /// The place of its name behind those of the system's volumes.
    index: usize,
    lives: RefCell<Vec<Rc<Life>>>,
    /// Whether the last life is one that hosts may begin to use.
    open: Cell<bool>,
    stopped_at: Cell<Option<u64>>,
    violation: RefCell<Option<Violation>>,
}

/// A volume from its creation to its deletion.
pub struct Life {
    /// The oracle's number of it, which no other life has.
    pub number: u64,
    /// Its history.
    pub oracle: Rc<Oracle>,
    id: VolumeId,
    bytes: u64,
}

impl Claim {
    /// The claim whose name has that place.
    pub fn new(ballast: Ballast, world: &World, index: usize) -> Rc<Self> {
        Rc::new(Self {
            ballast,
            world: world.clone(),
            rng: world.rng("claim", index as u64),
            index,
            lives: RefCell::default(),
            open: Cell::new(false),
            stopped_at: Cell::new(None),
            violation: RefCell::default(),
        })
    }

    /// Starts its hosts and its administrator on machines with numbers from `first` on; answers these, the
    /// administrator's last.
    pub fn start(self: &Rc<Self>, first: u32) -> Vec<NodeId> {
        let ids: Vec<NodeId> = (first..=first + HOSTS).map(NodeId).collect();
        for id in &ids[..HOSTS as usize] {
            let stager = Stager::new(self.clone(), *id);
            let machine = self.world.add_machine(*id, MachineOptions::default());
            machine.start(|env| stager.run(env));
        }
        let claim = self.clone();
        let machine = self.world.add_machine(ids[HOSTS as usize], MachineOptions::default());
        machine.start(|env| claim.administer(env));
        ids
    }

    /// Nothing new from now on: the last life goes on to live.
    pub fn stop(&self) {
        self.stopped_at.set(Some(self.world.now_ms()));
    }

    /// Its place behind the system's volumes.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its name.
    pub fn name(&self) -> String {
        volume_name(self.index)
    }

    /// What lives under it, once it was stopped.
    pub fn last(&self) -> Option<Rc<Life>> {
        self.lives.borrow().last().filter(|_| self.open.get()).cloned()
    }

    /// The first guarantee that its hosts saw broken.
    pub fn violation(&self) -> Option<Violation> {
        self.violation.borrow().clone()
    }

    /// Judges all lives once more.
    ///
    /// # Errors
    /// The first guarantee found broken.
    pub fn check_all(&self) -> Result<(), Violation> {
        self.lives.borrow().iter().try_for_each(|life| life.oracle.check_all())
    }

    fn is_stopping(&self) -> bool {
        self.stopped_at.get().is_some()
    }

    /// Whether hosts may begin to use that life.
    fn is_open(&self, life: &Rc<Life>) -> bool {
        self.last().is_some_and(|last| Rc::ptr_eq(&last, life))
    }

    fn judge(&self, outcome: Result<(), Violation>) {
        if let Err(violation) = outcome {
            self.world.note(format!("VIOLATION {violation}"));
            self.violation.borrow_mut().get_or_insert(violation);
        }
    }

    async fn administer(self: Rc<Self>, env: SimEnv) {
        while self.begin_life(&env).await {
            let end = self.world.now_ms() + self.rng.between(LIFE_MS.0, LIFE_MS.1);
            while self.world.now_ms() < end && !self.is_stopping() {
                env.sleep(Duration::from_millis(100)).await;
            }
            if self.is_stopping() {
                return;
            }
            self.end_life(&env).await;
        }
    }

    /// Makes the next volume; not when that goes on for too long at the end of a run.
    async fn begin_life(&self, env: &SimEnv) -> bool {
        let nth = self.lives.borrow().len() as u64;
        let bytes = (BLOCKS + nth) * BLOCK_SIZE_U64;
        loop {
            if let Some(id) = self.create(env, bytes).await {
                let number = 1_000 * (self.index as u64 + 1) + nth;
                self.world.note(format!("{} lives as {number}, {id}", self.name()));
                let life = Life { number, oracle: Rc::default(), id, bytes };
                self.lives.borrow_mut().push(Rc::new(life));
                self.open.set(true);
                return true;
            }
            let now = self.world.now_ms();
            if self.stopped_at.get().is_some_and(|at| now > at + LAST_LIFE_MS) {
                return false;
            }
            env.sleep(Duration::from_millis(self.rng.between(50, 500))).await;
        }
    }

    async fn end_life(&self, env: &SimEnv) {
        self.open.set(false);
        let life = self.lives.borrow().last().cloned().expect("it has begun");
        while !self.delete(env, life.id).await {
            env.sleep(Duration::from_millis(self.rng.between(50, 500))).await;
        }
        self.world.note(format!("{} is gone", life.number));
    }
}
