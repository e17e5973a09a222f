//! One run: a cluster of a [`System`], hosts that use it, faults, and the judgement.
//!
//! Phases: *start* (form the cluster), *safety* (hosts work while the nemesis rages), *liveness*
//! (everything is mended; every host must get answers again within a bounded time, and all must
//! finish), *read back* (every block that was ever written), *power loss* (all nodes at once; a
//! random majority comes back, and every block is read again), *compare* (replicas at one log
//! position have one content).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use ballast_block::NodeId;
use thiserror::Error;

use crate::claim::{Claim, USED_BLOCKS};
use crate::host::workload::Host;
use crate::machine::{Crash, MachineOptions};
use crate::nemesis::{Nemesis, start_if_down};
use crate::oracle::{Oracle, Violation};
use crate::panics;
use crate::plan::Plan;
use crate::system::{ReplicaView, System};
use crate::world::{World, run};

/// First machine number of hosts.
const HOSTS: u32 = 1_000;

/// First machine number of hosts of claims.
const CLAIMANTS: u32 = 2_000;

/// How long replicas are compared before a rotten one is left out, in milliseconds of virtual time.
const ROTTEN_MS: u64 = 15_000;

/// How long the first start may take, in milliseconds of virtual time.
const START_MS: u64 = 60_000;

/// A run that failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Failure {
    /// A guarantee was broken.
    #[error("{0}")]
    Violated(#[from] Violation),
    /// Something did not come to its end in time although nothing was broken any more.
    #[error("no progress within {limit_ms} ms of virtual time: {what}")]
    Stuck {
        /// What should have happened.
        what: String,
        /// How long was waited.
        limit_ms: u64,
    },
    /// A node found damage on a disk that nothing had harmed.
    #[error("{node} has damage although no disk was harmed: {what}")]
    Damaged {
        /// The node.
        node: NodeId,
        /// What it counted.
        what: String,
    },
    /// An assertion of the program failed.
    #[error("panic: {0}")]
    Panicked(String),
    /// Guarantee **bounded**.
    #[error("{node} is over a limit: {what}")]
    OverLimit {
        /// The node.
        node: NodeId,
        /// What, and how far.
        what: String,
    },
    /// Two replicas at one log position have different contents.
    #[error("volume {volume} at index {applied}: {a} and {b} differ")]
    Diverged {
        /// The volume's place in the system's list.
        volume: usize,
        /// The log position.
        applied: u64,
        /// One node.
        a: NodeId,
        /// The other.
        b: NodeId,
    },
}

/// What a run was.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Hash of everything that happened.
    pub hash: u64,
    /// How many events there were.
    pub events: u64,
    /// Virtual time in milliseconds.
    pub virtual_ms: u64,
    /// Requests of hosts that were answered with success.
    pub answered: u64,
    /// Starts of node processes.
    pub starts: u64,
    /// The end of the trace.
    pub tail: Vec<String>,
    /// What was wrong.
    pub failure: Option<Failure>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, hash, events, virtual_ms, answered, starts, .. } = self;
        let verdict = if self.failure.is_none() { "ok" } else { "FAILED" };
        write!(
            f,
            "seed {seed} {verdict} hash {hash:016x} events {events} virtual {virtual_ms} ms \
             answered {answered} starts {starts}"
        )
    }
}

/// Runs the plan of `seed` on `system`.
pub fn simulate<S: System>(system: S, seed: u64, plan: Plan, verbose: bool) -> Report {
    run(seed, |world| async move {
        world.trace().set_verbose(verbose);
        world.plant(plan.planted);
        world.note(format!("{plan:?}"));
        let cluster = Cluster::new(system, world.clone(), plan);
        let failure = cluster.phases().await.err();
        if let Some(failure) = &failure {
            world.note(format!("FAILURE {failure}"));
        }
        Report {
            seed,
            hash: world.trace().hash(),
            events: world.trace().events(),
            virtual_ms: world.now_ms(),
            answered: cluster.answered(),
            starts: cluster
                .nodes
                .iter()
                .filter_map(|id| world.machine(*id))
                .map(|m| m.starts())
                .sum(),
            tail: world.trace().tail(60),
            failure,
        }
    })
}

struct Cluster<S> {
    system: S,
    world: World,
    plan: Plan,
    nodes: Vec<NodeId>,
    oracle: Rc<Oracle>,
    hosts: RefCell<Vec<(NodeId, Rc<Host>)>>,
    claims: Vec<Rc<Claim>>,
    /// Machines of their hosts.
    claimants: RefCell<Vec<NodeId>>,
    /// No disk was harmed so far: damage would be our own.
    unharmed: Cell<bool>,
}

impl<S: System> Cluster<S> {
    fn new(system: S, world: World, plan: Plan) -> Self {
        let rng = world.rng("machines", 0);
        let nodes: Vec<NodeId> = (1..=plan.nodes).map(NodeId).collect();
        for id in &nodes {
            let ppm = rng.between(0, 2 * plan.drift_ppm) as i64 - plan.drift_ppm as i64;
            let options = MachineOptions {
                drift_ppm: i32::try_from(ppm).expect("a small drift"),
                clock_start_nanos: rng.below(1 << 50),
                wall_start_ms: rng.below(1 << 42),
            };
            world.add_machine(*id, options);
        }
        let (oracle, hosts, unharmed) = (Rc::default(), Default::default(), true.into());
        let (claims, claimants) = (system.claims(&world), RefCell::default());
        Self { system, world, plan, nodes, oracle, hosts, claims, claimants, unharmed }
    }

    async fn phases(&self) -> Result<(), Failure> {
        for node in &self.nodes {
            start_if_down(&self.system, &self.world, *node);
        }
        let prepared = self.system.prepare(&self.world);
        self.within(START_MS, "the cluster forms", prepared).await?;
        self.add_hosts();
        let nemesis = Rc::new(self.nemesis());
        let raging = nemesis.clone();
        tokio::task::spawn_local(async move { raging.rage().await });
        let supervising = nemesis.clone();
        tokio::task::spawn_local(async move { supervising.supervise().await });
        self.safety(&nemesis).await?;
        nemesis.mend();
        let rotten = nemesis.rotten();
        self.unharmed.set(rotten.is_none());
        self.liveness().await?;
        self.add_claim_readers();
        self.read_back("read back").await?;
        self.power_loss(rotten).await?;
        self.compare(rotten).await?;
        self.check_nodes(true)
    }

    fn nemesis(&self) -> Nemesis<S> {
        let hosts = self.hosts.borrow().clone();
        let mut machines: Vec<NodeId> = hosts.iter().map(|(id, _)| *id).collect();
        machines.extend(self.claimants.borrow().iter().copied());
        let answered = move || hosts.iter().map(|(_, host)| host.answered()).sum();
        let (system, world) = (self.system.clone(), self.world.clone());
        let (nodes, faults) = (self.nodes.clone(), self.plan.faults.clone());
        Nemesis::new(system, world, nodes, machines, faults, Rc::new(answered))
    }

    fn add_hosts(&self) {
        let mut number = HOSTS;
        for (index, volume) in self.system.volumes().into_iter().enumerate() {
            for nth in 0..self.plan.writers + self.plan.readers {
                number += 1;
                let id = NodeId(number);
                let machine = self.world.add_machine(id, MachineOptions::default());
                let targets = self.nodes.iter().map(|id| self.system.nbd_address(*id)).collect();
                let mut mix = self.plan.mix.clone();
                mix.blocks = mix.blocks.min(volume.blocks);
                mix.reader = nth >= self.plan.writers;
                let rng = self.world.rng("host", u64::from(number));
                let export = (index as u64, volume.name.as_str());
                let lessor = self.system.lessor(&self.world, index);
                let host = Host::new(self.oracle.clone(), rng, export, targets, mix, lessor);
                self.hosts.borrow_mut().push((id, host.clone()));
                machine.start(move |env| host.run(env));
            }
        }
        for (claim, nth) in self.claims.iter().zip(0..) {
            self.claimants.borrow_mut().extend(claim.start(CLAIMANTS + 10 * nth));
        }
    }

    /// Hosts that read what lives under claims at the end. Each takes the lease: whoever goes by the name
    /// alone may be shown, by a node that is behind, what had it before.
    fn add_claim_readers(&self) {
        let first = self.claimants.borrow().len() as u32;
        for (claim, nth) in self.claims.iter().zip(first..) {
            let Some(life) = claim.last() else { continue };
            let (id, name) = (NodeId(CLAIMANTS + 10 * nth), claim.name());
            self.world.add_machine(id, MachineOptions::default());
            let targets = self.nodes.iter().map(|id| self.system.nbd_address(*id)).collect();
            let mut mix = self.plan.mix.clone();
            (mix.leased, mix.fenced, mix.reader, mix.lanes) = (true, true, false, 0);
            (mix.blocks, mix.leave_after) = (USED_BLOCKS, 0);
            let rng = self.world.rng("host", u64::from(id.0));
            let lessor = self.system.lessor(&self.world, claim.index());
            let export = (life.number, name.as_str());
            let host = Host::new(life.oracle.clone(), rng, export, targets, mix, lessor);
            self.hosts.borrow_mut().push((id, host));
        }
    }

    fn answered(&self) -> u64 {
        self.hosts.borrow().iter().map(|(_, host)| host.answered()).sum()
    }

    fn check_hosts(&self) -> Result<(), Failure> {
        for (_, host) in self.hosts.borrow().iter() {
            if let Some(violation) = host.violation() {
                return Err(violation.into());
            }
        }
        match self.claims.iter().find_map(|claim| claim.violation()) {
            Some(violation) => Err(violation.into()),
            None => Ok(()),
        }
    }

    /// What no host sees: damage that nobody made, limits.
    fn check_nodes(&self, calm: bool) -> Result<(), Failure> {
        if let Some(panic) = panics::first() {
            return Err(Failure::Panicked(panic));
        }
        for node in self.nodes.iter().copied() {
            if !self.world.machine(node).is_some_and(|machine| machine.is_running()) {
                continue;
            }
            if let Some(what) = self.system.over_limit(node, calm) {
                return Err(Failure::OverLimit { node, what });
            }
            if self.unharmed.get()
                && let Some(what) = self.system.damage(node)
            {
                return Err(Failure::Damaged { node, what });
            }
        }
        Ok(())
    }

    async fn safety(&self, nemesis: &Nemesis<S>) -> Result<(), Failure> {
        let end = self.world.now_ms() + self.plan.safety_ms;
        let enough = || {
            self.answered() >= self.plan.steps && nemesis.made() >= self.plan.fault_count
                || self.answered() >= 4 * self.plan.steps
        };
        while !enough() && self.world.now_ms() < end {
            self.world.sleep_ms(100).await;
            self.check_hosts()?;
            self.unharmed.set(nemesis.rotten().is_none());
            self.check_nodes(false)?;
        }
        Ok(())
    }

    async fn liveness(&self) -> Result<(), Failure> {
        let hosts: Vec<Rc<Host>> =
            self.hosts.borrow().iter().map(|(_, host)| host.clone()).collect();
        let before: Vec<u64> = hosts.iter().map(|host| host.answered()).collect();
        self.until("every host gets answers again", || {
            hosts.iter().zip(&before).all(|(host, before)| host.answered() >= before + 3)
        })
        .await?;
        hosts.iter().for_each(|host| host.stop());
        self.claims.iter().for_each(|claim| claim.stop());
        let mut machines: Vec<NodeId> = self.hosts.borrow().iter().map(|(id, _)| *id).collect();
        machines.extend(self.claimants.borrow().iter().copied());
        self.until("every host finishes", || {
            machines.iter().all(|id| self.world.machine(*id).is_some_and(|host| !host.is_running()))
        })
        .await
    }

    async fn read_back(&self, phase: &str) -> Result<(), Failure> {
        self.world.note(phase);
        let mut hosts = self.hosts.borrow().clone();
        // The first of each volume: one attachment writes.
        hosts.dedup_by_key(|(_, host)| host.volume());
        for (id, host) in &hosts {
            let machine = self.world.machine(*id).expect("a host of the run");
            let host = host.clone();
            machine.start(move |env| async move { host.read_back(&env).await });
        }
        let running = |(id, _): &(NodeId, Rc<Host>)| {
            self.world.machine(*id).is_some_and(|host| host.is_running())
        };
        let what = format!("{phase}: every written block can be read");
        // A volume that fills its pools takes its time.
        let reads: usize = hosts.iter().map(|(_, host)| host.unread()).sum();
        let limit = self.plan.liveness_ms + 200 * reads as u64;
        self.until_within(limit, &what, || !hosts.iter().any(running)).await?;
        self.oracle.check_all()?;
        self.claims.iter().try_for_each(|claim| claim.check_all())?;
        Ok(())
    }

    /// Guarantees **recoverable** and **durable-on-majority**.
    ///
    /// A majority must be enough; the node left off is the rotten one, if there is one: two
    /// replicas may be away or damaged only where five were kept.
    async fn power_loss(&self, rotten: Option<NodeId>) -> Result<(), Failure> {
        for node in &self.nodes {
            self.world.machine(*node).expect("a node").crash(Crash::PowerLoss);
        }
        let left = self.majority(rotten);
        for node in &left {
            start_if_down(&self.system, &self.world, *node);
        }
        self.read_back("read from a majority after power loss").await?;
        for node in &self.nodes {
            start_if_down(&self.system, &self.world, *node);
        }
        self.read_back("read with all nodes back").await
    }

    /// Enough nodes for every volume, the rotten one not among them if there is one.
    fn majority(&self, rotten: Option<NodeId>) -> Vec<NodeId> {
        let rng = self.world.rng("majority", 0);
        let mut left = self.nodes.clone();
        let replicas = self.system.volumes().iter().map(|volume| volume.replicas).min();
        let away = replicas.map_or(0, |replicas| (replicas - 1) / 2);
        for nth in 0..away as usize {
            let random = rng.below(left.len() as u64) as usize;
            let first = rotten.filter(|_| nth == 0);
            let first = first.and_then(|rotten| left.iter().position(|node| *node == rotten));
            left.remove(first.unwrap_or(random));
        }
        left
    }

    /// Replicas at one log position have one content.
    async fn compare(&self, rotten: Option<NodeId>) -> Result<(), Failure> {
        let what = "all replicas apply the same entries";
        let views = self.within(self.plan.liveness_ms, what, self.level_replicas(rotten)).await?;
        for (node, replica) in &views {
            let at_one_position = |other: &&(NodeId, ReplicaView)| {
                (other.1.volume, other.1.applied) == (replica.volume, replica.applied)
            };
            let twin = views.iter().find(at_one_position);
            let (other, twin) = twin.expect("it is among them itself");
            if twin.digest != replica.digest {
                let (volume, applied) = (replica.volume, replica.applied);
                return Err(Failure::Diverged { volume, applied, a: *other, b: *node });
            }
        }
        Ok(())
    }

    /// The replicas of all volumes on all nodes, once those of a volume stand at one position.
    ///
    /// A rotten node may be unable to open its pool or to read all of it: after a while it need not.
    async fn level_replicas(&self, rotten: Option<NodeId>) -> Vec<(NodeId, ReplicaView)> {
        let volumes = self.system.volumes();
        let claimed = self.claims.iter().filter(|claim| claim.last().is_some());
        let claimed = claimed.map(|claim| (claim.index(), volumes[0].replicas as usize));
        let counts = volumes.iter().map(|one| one.replicas as usize).enumerate();
        let replicas: BTreeMap<usize, usize> = counts.chain(claimed).collect();
        let start = self.world.now_ms();
        let mut said = false;
        loop {
            let mut views = Vec::new();
            for id in &self.nodes {
                let replicas = self.system.replicas(&self.world, *id).await;
                views.extend(replicas.into_iter().map(|replica| (*id, replica)));
            }
            let late = self.world.now_ms() > start + ROTTEN_MS;
            if late && !said {
                said = true;
                self.world.note(format!("replicas are not level yet: {views:?}"));
            }
            let is_level = |volume: usize| {
                let of_volume = || views.iter().map(|(_, one)| one).filter(|r| r.volume == volume);
                let newest = of_volume().map(|replica| replica.applied).max();
                let missing = usize::from(rotten.is_some() && late);
                let all = replicas[&volume];
                (all - missing..=all).contains(&of_volume().count())
                    && !of_volume().any(|replica| Some(replica.applied) != newest)
            };
            if replicas.keys().copied().all(is_level) {
                return views;
            }
            self.world.sleep_ms(100).await;
        }
    }

    async fn until(&self, what: &str, done: impl Fn() -> bool) -> Result<(), Failure> {
        self.until_within(self.plan.liveness_ms, what, done).await
    }

    async fn until_within(
        &self,
        limit_ms: u64,
        what: &str,
        done: impl Fn() -> bool,
    ) -> Result<(), Failure> {
        let waiting = async {
            while !done() {
                self.world.sleep_ms(50).await;
                self.check_hosts()?;
                self.check_nodes(false)?;
            }
            self.check_hosts()
        };
        self.within(limit_ms, what, waiting).await?
    }

    async fn within<T>(
        &self,
        limit_ms: u64,
        what: &str,
        waiting: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        tokio::select! {
            biased;
            outcome = waiting => Ok(outcome),
            () = self.world.sleep_ms(limit_ms) => {
                Err(Failure::Stuck { what: what.to_owned(), limit_ms })
            }
        }
    }
}
