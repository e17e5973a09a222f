//! A host of a scripted scenario. Judges nothing itself: it tells the scene's oracle all it sees.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{BlockRange, Epoch, NodeId};
use ballast_cluster::LeaseMode;
use ballast_node::leasing::LeaseAsk;
use ballast_node::node::Node;

use super::{Asked, Judge, PATIENCE_MS, Scene};
use crate::ballast::{Ballast, volume_name};
use crate::env::SimEnv;
use crate::host::nbd::{Command, NbdClient, NbdError};
use crate::machine::Machine;
use crate::oracle::{Outcome, Value, stamp};
use crate::system::System;
use crate::world::World;

/// A host that does what the script says; all that it sees is judged.
pub struct ScriptHost {
    world: World,
    volume: u64,
    machine: Machine,
    env: SimEnv,
    ballast: Ballast,
    judge: Rc<Judge>,
    /// The lease that it attaches under; none before it has taken one.
    lease: Cell<Option<Taken>>,
    client: RefCell<Option<(Rc<NbdClient>, u64)>>,
}

#[derive(Clone, Copy)]
struct Taken {
    epoch: Epoch,
    shared: bool,
}

impl ScriptHost {
    /// On a machine of its own, for the volume that the script is about.
    pub(super) fn new(scene: &Scene, machine: Machine, env: SimEnv) -> Self {
        Self {
            world: scene.world.clone(),
            volume: scene.volume.get(),
            machine,
            env,
            ballast: scene.ballast.clone(),
            judge: scene.judge.clone(),
            lease: Cell::new(None),
            client: RefCell::default(),
        }
    }

    /// Takes the volume's lease through a node, or has not got it after `limit_ms`. By force:
    /// whoever had it before must be fenced when this returns.
    pub async fn take_lease(
        &self,
        through: NodeId,
        mode: LeaseMode,
        force: bool,
        limit_ms: u64,
    ) -> bool {
        let host = format!("host-{}", self.id().0);
        let by_force = force.then(|| "it moves".to_owned());
        let ask = LeaseAsk { host, mode, read_only: false, by_force, seen_revision: None };
        let began = self.judge.oracle.attach_begins();
        let asked = Asked::new(&self.world);
        let (state, ballast, world) = (asked.state.clone(), self.ballast.clone(), &self.world);
        let lease = ballast.lease(world.clone(), through, self.volume as usize, ask);
        self.machine.inject(async move {
            state.replace(Some(lease.await));
        });
        let Some(epoch) = asked.within(limit_ms).await.flatten() else { return false };
        let shared = mode == LeaseMode::Writers;
        if !shared {
            self.judge.oracle.attached(self.volume, began);
        }
        self.lease.set(Some(Taken { epoch, shared }));
        true
    }

    /// Ends its lease, through a node.
    pub async fn release_lease(&self, scene: &Scene, through: NodeId) {
        let epoch = self.lease.take().expect("it has one").epoch;
        let (host, name) = (format!("host-{}", self.id().0), volume_name(self.volume as usize));
        let release = move |node: Node<SimEnv>| async move {
            node.release_lease(&name, &host, epoch, None).await
        };
        assert_eq!(scene.ask(through, release).await, Ok(true));
    }

    fn export(&self) -> String {
        let name = volume_name(self.volume as usize);
        match self.lease.get() {
            None => name,
            Some(lease) => format!("{name}@lease={}", lease.epoch.0),
        }
    }

    /// Its link is made anew, as the client of a host does by itself that knows of nothing: asked once.
    /// It goes on under the attachment that it had, so a write that succeeds after a newer one was
    /// admitted is a violation.
    pub async fn reconnect(&self, through: NodeId) -> bool {
        let Some(client) = self.try_connect(through, &self.export()).await else { return false };
        let number = self.client.borrow().as_ref().expect("it was attached").1;
        self.client.replace(Some((client, number)));
        true
    }

    /// Whether a node lets it in as a writer, asked once.
    pub async fn can_attach(&self, through: NodeId) -> bool {
        self.try_connect(through, &self.export()).await.is_some()
    }

    /// Whether a node lets it in as a writer under that lease, whosever it is; asked once.
    pub async fn can_attach_under(&self, through: NodeId, epoch: Epoch) -> bool {
        let export = format!("{}@lease={}", volume_name(self.volume as usize), epoch.0);
        self.try_connect(through, &export).await.is_some()
    }

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
        // Of those who share a lease none fences another.
        let alone = self.lease.get().is_none_or(|lease| !lease.shared);
        self.connect(through, self.export(), alone).await;
    }

    /// Reads the volume through a node from now on.
    pub async fn attach_reader(&self, through: NodeId) {
        let export = format!("{}@ro", volume_name(self.volume as usize));
        self.connect(through, export, false).await;
    }

    /// Whether a node lets a reader of the volume in, asked once.
    pub async fn can_attach_reader(&self, through: NodeId) -> bool {
        let export = format!("{}@ro", volume_name(self.volume as usize));
        self.try_connect(through, &export).await.is_some()
    }

    async fn connect(&self, through: NodeId, export: String, fences: bool) {
        self.client.replace(None);
        let end = self.world.now_ms() + PATIENCE_MS;
        loop {
            let began = self.judge.oracle.attach_begins();
            if let Some(client) = self.try_connect(through, &export).await {
                let attached = || self.judge.oracle.attached(self.volume, began);
                let number = if fences { attached() } else { u64::MAX };
                self.client.replace(Some((client, number)));
                return;
            }
            assert!(self.world.now_ms() < end, "{through} lets no host in");
            self.world.sleep_ms(50).await;
        }
    }

    async fn try_connect(&self, through: NodeId, export: &str) -> Option<Rc<NbdClient>> {
        let made = Asked::new(&self.world);
        let (state, env, export) = (made.state.clone(), self.env.clone(), export.to_owned());
        let target = self.ballast.nbd_address(through);
        self.machine.inject(async move {
            let client = NbdClient::connect(&env, &target, &export, true).await;
            state.replace(Some(client.ok().map(Rc::new)));
        });
        made.within(PATIENCE_MS).await.flatten()
    }

    fn run(&self, command: Command, told: impl FnOnce(Result<Vec<u8>, NbdError>) + 'static) {
        let client = self.client.borrow().clone().expect("attached").0;
        self.machine.inject(async move { told(client.run(command).await) });
    }

    fn begin(&self, range: BlockRange, zeroes: bool) -> Asked<Outcome> {
        let attachment = self.client.borrow().as_ref().expect("attached").1;
        let oracle = &self.judge.oracle;
        let id = oracle.write_begins_under(attachment, self.volume, range, zeroes);
        let (offset, length) = (range.start * BLOCK_SIZE_U64, range.bytes() as u32);
        let command = if zeroes {
            Command::Trim { offset, length }
        } else {
            let blocks = range.start..range.end();
            let data = blocks.flat_map(|block| stamp::stamp(self.volume, block, id)).collect();
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
        let token = self.judge.oracle.read_begins(self.volume, range);
        let (offset, length) = (range.start * BLOCK_SIZE_U64, range.bytes() as u32);
        let asked = Asked::new(&self.world);
        let (state, judge, volume) = (asked.state.clone(), self.judge.clone(), self.volume);
        self.run(Command::Read { offset, length }, move |answer| {
            let values = answer.ok().map(|bytes| {
                judge.note(judge.oracle.read_ends(token, &bytes));
                let blocks = (range.start..).zip(bytes.chunks(BLOCK_SIZE_U64 as usize));
                let known = |(block, bytes)| stamp::recognise(volume, block, bytes);
                // What no write made has been noted as a violation.
                blocks.map(|one| known(one).unwrap_or(Value::Zero)).collect()
            });
            state.replace(Some(values));
        });
        asked
    }
}
