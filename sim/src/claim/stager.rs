//! A host that stages a claimed volume again and again: what it does in each session, under which lease.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::{Epoch, NodeId};
use ballast_env::clock::Clock;

use super::ask::Asking;
use super::session::{Session, Use};
use super::{Claim, Life};
use crate::env::SimEnv;
use crate::rng::Rng;

/// Longest pause between two sessions, in milliseconds.
const PAUSE_MS_MAX: u64 = 250;

/// A host.
pub(super) struct Stager {
    claim: Rc<Claim>,
    rng: Rng,
    name: String,
    /// The life and the lease that it got last.
    granted: Cell<Option<(u64, Epoch)>>,
    /// The life and the lease under which it asked last whether it may format.
    formats: Cell<Option<(u64, Epoch)>>,
}

impl Stager {
    /// On that machine.
    pub(super) fn new(claim: Rc<Claim>, machine: NodeId) -> Self {
        let rng = claim.world.rng("stager", u64::from(machine.0));
        let name = format!("host-{}", machine.0);
        Self { claim, rng, name, granted: Cell::new(None), formats: Cell::new(None) }
    }

    /// One session after the other, until the claim stops.
    pub(super) async fn run(self, env: SimEnv) {
        while !self.claim.is_stopping() {
            if let Some(life) = self.claim.last() {
                self.stage(&env, life).await;
            }
            env.sleep(Duration::from_millis(self.rng.between(1, PAUSE_MS_MAX))).await;
        }
    }

    async fn stage(&self, env: &SimEnv, life: Rc<Life>) {
        let mut epoch = Epoch(0);
        if self.rng.chance(850_000) {
            let Some(taken) = self.take_lease(env, &life).await else { return };
            epoch = taken;
        }
        let what = self.choose(&life, epoch);
        if what == Use::FileSystem && epoch != Epoch(0) {
            self.formats.set(Some((life.number, epoch)));
        }
        self.claim.world.note(format!("{} begins {what:?} of {}, {epoch}", self.name, life.number));
        let session = Session::new(&self.claim, &self.rng, env, life.clone(), epoch);
        session.run(what).await;
        self.claim.world.note(format!("{} ends", self.name));
        drop(session);
        if epoch != Epoch(0) && self.rng.chance(400_000) {
            let asking = Asking { env, rng: &self.rng, patience_ms: 1_000 };
            self.claim.release(&asking, &life, &self.name, epoch).await;
        }
    }

    fn choose(&self, life: &Life, epoch: Epoch) -> Use {
        let what = match self.rng.below(7) {
            0 => Use::Raw,
            1 | 2 => Use::Silent,
            _ => Use::FileSystem,
        };
        let formats = self.formats.get() == Some((life.number, epoch));
        // What it writes under the lease under which it may format counts as making the file system: it
        // says so before it does anything else with it.
        if formats && what == Use::Silent { Use::Raw } else { what }
    }

    async fn take_lease(&self, env: &SimEnv, life: &Life) -> Option<Epoch> {
        let began = life.oracle.attach_begins();
        let patience_ms = *self.rng.pick(&[500, 4_000, 12_000]);
        let asking = Asking { env, rng: &self.rng, patience_ms };
        let force = self.rng.chance(800_000);
        let taken = self.claim.take_lease(&asking, life, &self.name, force).await;
        self.claim.world.note(format!("{} lease of {} {taken:?}", self.name, life.number));
        let epoch = taken?;
        // Whoever held it before is fenced by now; but one that has it all the time goes on with what it
        // has begun.
        let now = Some((life.number, epoch));
        if self.granted.replace(now) != now {
            life.oracle.attached(life.number, began);
        }
        life.oracle.epoch_in_force(life.number, epoch.0);
        Some(epoch)
    }
}
