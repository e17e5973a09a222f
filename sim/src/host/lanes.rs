//! A host's device with several connections, as Linux has it: each hardware queue sends on the
//! connection of its number, and asks again on another one what was on a connection that is dead.
//!
//! Owns which connection takes a request, and its handle. Never decides when they are made anew: its
//! user does, and gives up all connections at once.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use ballast_env::clock::{Clock, Instant};
use ballast_env::spawn::Spawn;
use tokio::sync::watch;

use crate::env::SimEnv;
use crate::host::nbd::{Command, NbdClient, NbdError};
use crate::rng::Rng;

/// Longest time until the driver hears of a dead connection and makes all of them anew.
const REACTION_MS_MAX: u64 = 300;

/// Longest time for which a server may still hold a connection that the host has given up.
const ZOMBIE_MS_MAX: u64 = 3_000;

/// Of a million requests, how many stay in the host's socket while their connection is given up.
const STUCK_RATE: u64 = 5_000;

/// A request of a device, through all its repetitions.
#[derive(Clone, Copy, Debug)]
pub struct Tag {
    /// The hardware queue that it belongs to.
    pub queue: u16,
    /// Its number there.
    pub tag: u16,
    /// How often it, or the one before it of this number, was sent.
    pub count: u32,
}

/// All connections that a device has at a time: one session.
pub struct Lanes {
    rng: Rng,
    lanes: Vec<Lane>,
    numbering: Numbering,
    /// When the driver makes them anew, once one of them is dead.
    replaced_at: Cell<Option<Instant>>,
}

/// How requests are named on the wire.
#[derive(Clone, Copy, Debug)]
pub enum Numbering {
    /// As Linux does since 6.4: a big-endian number.
    Big,
    /// As Linux did before, on a little-endian machine.
    Little,
    /// By the connection that they are sent on: a server can't tell that a request has moved, as if it
    /// did not look. With it a guarantee must break.
    Hidden,
}

struct Lane {
    client: RefCell<Option<Rc<NbdClient>>>,
    dead: watch::Sender<bool>,
}

impl Lanes {
    /// Made of connections that are open, the first for queue 0.
    pub fn new(rng: Rng, clients: Vec<NbdClient>, numbering: Numbering) -> Self {
        let lane = |client| Lane {
            client: RefCell::new(Some(Rc::new(client))),
            dead: watch::Sender::new(false),
        };
        let lanes = clients.into_iter().map(lane).collect();
        Self { rng, lanes, numbering, replaced_at: Cell::new(None) }
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.client(0).map_or(u64::MAX, |client| client.size())
    }

    /// Whether they are to be made anew.
    pub fn are_over(&self, env: &SimEnv) -> bool {
        let alive = (0..self.lanes.len()).filter(|index| self.client(*index).is_some()).count();
        if alive < self.lanes.len() {
            self.note_loss(env);
        }
        alive == 0 || self.replaced_at.get().is_some_and(|at| env.now() >= at)
    }

    fn note_loss(&self, env: &SimEnv) {
        if self.replaced_at.get().is_none() {
            let reaction = self.rng.between(0, REACTION_MS_MAX);
            self.replaced_at.set(Some(env.now().after(Duration::from_millis(reaction))));
        }
    }

    /// Gives all connections up: what is in flight has no answer.
    pub fn give_up(&self, env: &SimEnv) {
        (0..self.lanes.len()).for_each(|index| self.kill(env, index));
    }

    /// Now and then the host takes one of its connections for dead.
    pub fn lose_some(&self, env: &SimEnv) {
        if self.rng.chance(5_000) {
            self.kill(env, self.rng.below(self.lanes.len() as u64) as usize);
        }
    }

    /// Sends a request once, on its queue's connection or on another one that is alive.
    ///
    /// # Errors
    /// [`NbdError::Lost`]: it is to be sent again.
    pub async fn run(
        &self,
        env: &SimEnv,
        tag: &mut Tag,
        command: Command,
        patience: Duration,
    ) -> Result<Vec<u8>, NbdError> {
        let alive = |index: &usize| self.client(*index).is_some();
        let own = usize::from(tag.queue);
        let Some(index) = [own].into_iter().chain(0..self.lanes.len()).find(alive) else {
            return Err(NbdError::Lost);
        };
        let client = self.client(index).expect("it was looked for");
        tag.count = tag.count.wrapping_add(1);
        let named =
            |queue: usize| u64::from(tag.count) << 32 | (queue as u64) << 16 | u64::from(tag.tag);
        let handle = match self.numbering {
            Numbering::Big => named(own),
            Numbering::Little => named(own).swap_bytes(),
            Numbering::Hidden => named(index),
        };
        if self.rng.chance(STUCK_RATE) {
            self.stick(env, index, handle, command);
            return Err(NbdError::Lost);
        }
        let mut dead = self.lanes[index].dead.subscribe();
        let outcome = tokio::select! {
            biased;
            _ = dead.wait_for(|&dead| dead) => Err(NbdError::Lost),
            outcome = client.run_as(handle, command) => outcome,
            () = env.sleep(patience) => Err(NbdError::Lost),
        };
        if outcome == Err(NbdError::Lost) {
            self.kill(env, index);
        }
        outcome
    }

    /// The host gives a connection up whose request only then travels: TCP sends again what was written
    /// before the socket was shut, for minutes. Its copy on another connection may be answered first.
    fn stick(&self, env: &SimEnv, index: usize, handle: u64, command: Command) {
        let Some(client) = self.client(index) else { return };
        self.kill(env, index);
        let longest = if self.rng.chance(500_000) { REACTION_MS_MAX } else { ZOMBIE_MS_MAX };
        let late = Duration::from_millis(self.rng.between(0, longest));
        let later = env.clone();
        env.spawn(async move {
            later.sleep(late).await;
            // Nobody hears the answer.
            let _ = client.run_as(handle, command).await;
        });
    }

    fn client(&self, index: usize) -> Option<Rc<NbdClient>> {
        self.lanes[index].client.borrow().clone().filter(|client| !client.is_lost())
    }

    /// The host is through with a connection. The server hears of it sooner or later.
    fn kill(&self, env: &SimEnv, index: usize) {
        let Some(client) = self.lanes[index].client.take() else { return };
        self.lanes[index].dead.send_replace(true);
        self.note_loss(env);
        let late = Duration::from_millis(self.rng.between(0, ZOMBIE_MS_MAX));
        let later = env.clone();
        env.spawn(async move {
            later.sleep(late).await;
            drop(client);
        });
    }
}
