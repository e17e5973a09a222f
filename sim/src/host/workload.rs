//! What a simulated host does: reads, writes, trims of one volume at a queue depth, each told to the
//! oracle.
//!
//! A host tries its targets in turn until one takes it, keeps several requests in flight, gives up
//! on a request after a while, and goes on elsewhere when its connection breaks. It never repeats a
//! request, the next one is a new operation; but one with several connections does as Linux does.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{BlockRange, Epoch};
use ballast_env::clock::Clock;
use ballast_env::network::Address;
use futures_util::future::LocalBoxFuture;

use crate::env::SimEnv;
use crate::host::lanes::{Lanes, Numbering, Tag};
use crate::host::nbd::{Command, NbdClient, NbdError};
use crate::oracle::{Oracle, Outcome, Violation, WriteId, stamp};
use crate::rng::Rng;

/// How long a host waits for its lease before it asks again: longer than an election.
const LEASE_PATIENCE: Duration = Duration::from_secs(12);

/// What a host does, and how fast.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Requests in flight.
    pub depth: u64,
    /// Blocks of the volume that it uses, from the start: few make conflicts likely.
    pub blocks: u64,
    /// Largest request in blocks.
    pub request_blocks_max: u64,
    /// Of a million requests, how many read.
    pub read_rate: u64,
    /// Of a million requests, how many trim or write zeroes.
    pub zero_rate: u64,
    /// Longest pause between two requests of one slot, in milliseconds.
    pub pause_ms_max: u64,
    /// How long a host waits for an answer before it drops the connection, in milliseconds.
    pub patience_ms: u64,
    /// Whether a new connection fences what older ones left without answer.
    pub fenced: bool,
    /// Whether it only reads, through the export for readers.
    pub reader: bool,
    /// Answers after which it leaves the volume to another host for a while; 0: never.
    pub leave_after: u64,
    /// Connections that a writer has at a time, used as Linux uses them; 0: one, and no request is
    /// ever repeated.
    pub lanes: u64,
    /// Whether such a writer hides from servers that a request has moved to another connection.
    pub moves_hidden: bool,
    /// Whether writers take the volume's lease by force before they connect, from whoever has it.
    pub leased: bool,
}

/// Takes the lease of a volume for the host of that name, by force, and answers its epoch once the
/// earlier one is fenced; none when that did not work out. Stands for an administrator.
pub type Lessor = Rc<dyn Fn(&str) -> LocalBoxFuture<'static, Option<Epoch>>>;

/// How a host reaches its volume.
#[derive(Clone)]
enum Path {
    /// One connection.
    Plain(Rc<NbdClient>),
    /// Several, in one session.
    Lanes(Rc<Lanes>),
}

impl Path {
    fn is_lost(&self, env: &SimEnv) -> bool {
        match self {
            Path::Plain(client) => client.is_lost(),
            Path::Lanes(lanes) => lanes.are_over(env),
        }
    }

    fn size(&self) -> u64 {
        match self {
            Path::Plain(client) => client.size(),
            Path::Lanes(lanes) => lanes.size(),
        }
    }
}

/// A host's view of one volume, shared with the scenario that watches it.
pub struct Host {
    oracle: Rc<Oracle>,
    rng: Rng,
    volume: u64,
    export: String,
    targets: Vec<Address>,
    mix: Mix,
    lessor: Option<Lessor>,
    /// The lease that it believes to hold.
    epoch: Cell<Option<Epoch>>,
    /// The last one that it got.
    granted: Cell<Option<Epoch>>,
    path: RefCell<Option<(Path, u64)>>,
    /// Requests of the device that are not in use.
    tags: RefCell<Vec<Tag>>,
    /// What is being written: hosts that repeat requests keep overlapping ones apart.
    writing: RefCell<Vec<BlockRange>>,
    connecting: tokio::sync::Mutex<u64>,
    /// Requests that were answered with success.
    answered: Cell<u64>,
    /// Of these, writes and trims.
    written: Cell<u64>,
    /// Answers at which it leaves.
    leave_at: Cell<u64>,
    in_flight: Cell<u64>,
    stopping: Cell<bool>,
    violation: RefCell<Option<Violation>>,
}

impl Host {
    /// A host that will use `export` (the oracle's `volume`) at any of `targets`.
    pub fn new(
        oracle: Rc<Oracle>,
        rng: Rng,
        (volume, export): (u64, &str),
        targets: Vec<Address>,
        mix: Mix,
        lessor: Option<Lessor>,
    ) -> Rc<Self> {
        let first = rng.below(targets.len() as u64);
        Rc::new(Self {
            oracle,
            rng,
            volume,
            export: if mix.reader { format!("{export}@ro") } else { export.to_owned() },
            targets,
            lessor: lessor.filter(|_| mix.leased && !mix.reader),
            mix,
            epoch: Cell::new(None),
            granted: Cell::new(None),
            path: RefCell::new(None),
            tags: RefCell::default(),
            writing: RefCell::default(),
            connecting: tokio::sync::Mutex::new(first),
            answered: Cell::new(0),
            written: Cell::new(0),
            leave_at: Cell::new(u64::MAX),
            in_flight: Cell::new(0),
            stopping: Cell::new(false),
            violation: RefCell::new(None),
        })
    }

    /// The host's process: runs until [`Host::stop`] and then until nothing is in flight.
    pub async fn run(self: Rc<Self>, env: SimEnv) {
        let slots = (0..self.mix.depth).map(|_| {
            let (host, env) = (self.clone(), env.clone());
            async move {
                while !host.stopping.get() {
                    host.one_request(&env).await;
                    let pause = host.rng.between(0, host.mix.pause_ms_max);
                    env.sleep(Duration::from_millis(pause)).await;
                }
            }
        });
        futures_util::future::join_all(slots).await;
    }

    /// No new requests from now on.
    pub fn stop(&self) {
        self.stopping.set(true);
    }

    /// Requests that were answered with success.
    pub fn answered(&self) -> u64 {
        self.answered.get()
    }

    /// Of these, writes and trims.
    pub fn written(&self) -> u64 {
        self.written.get()
    }

    /// Whether it only reads.
    pub fn is_reader(&self) -> bool {
        self.mix.reader
    }

    /// The oracle's number of its volume.
    pub fn volume(&self) -> u64 {
        self.volume
    }

    /// Requests without answer yet.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.get()
    }

    /// The first guarantee that this host saw broken.
    pub fn violation(&self) -> Option<Violation> {
        self.violation.borrow().clone()
    }

    /// Reads everything that was ever written, until all of it could be read.
    pub async fn read_back(&self, env: &SimEnv) {
        for range in self.to_read_back() {
            while self.violation().is_none() && !self.read(env, range).await {
                env.sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Reads that [`Host::read_back`] makes.
    pub fn unread(&self) -> usize {
        self.to_read_back().len()
    }

    /// At least one block, so that the volume is in use.
    fn to_read_back(&self) -> Vec<BlockRange> {
        let written = self.oracle.written(self.volume, self.mix.request_blocks_max as u32);
        if written.is_empty() { vec![BlockRange::new(0, 1)] } else { written }
    }

    async fn one_request(&self, env: &SimEnv) {
        let count = self.rng.between(1, self.mix.request_blocks_max.min(self.mix.blocks));
        let start = self.rng.below(self.mix.blocks - count + 1);
        let range = BlockRange::new(start, count as u32);
        let kind = self.rng.below(1_000_000);
        if kind < self.mix.read_rate || self.mix.reader {
            self.read(env, range).await;
        } else {
            self.write(env, range, kind < self.mix.read_rate + self.mix.zero_rate).await;
        }
    }

    async fn read(&self, env: &SimEnv, range: BlockRange) -> bool {
        let Some((path, _)) = self.connected(env).await else { return false };
        let token = self.oracle.read_begins(self.volume, range);
        let offset = range.start * BLOCK_SIZE_U64;
        let command = Command::Read { offset, length: range.bytes() as u32 };
        let Ok(bytes) = self.ask(env, path, command).await else { return false };
        let ended = self.oracle.read_ends(token, &bytes);
        self.judge(env, ended);
        true
    }

    fn judge(&self, env: &SimEnv, outcome: Result<(), Violation>) {
        if let Err(violation) = outcome {
            env.world().note(format!("VIOLATION {violation}"));
            self.violation.borrow_mut().get_or_insert(violation);
        }
    }

    async fn write(&self, env: &SimEnv, range: BlockRange, zeroes: bool) {
        let Some((path, attachment)) = self.connected(env).await else { return };
        if self.mix.lanes > 0 && self.writing.borrow().iter().any(|busy| busy.overlaps(&range)) {
            return env.sleep(Duration::from_millis(1)).await;
        }
        self.writing.borrow_mut().push(range);
        let id = self.oracle.write_begins_under(attachment, self.volume, range, zeroes);
        env.world().note(format!("{} {id:?} begins {range}", self.export));
        let command = self.write_command(id, range, zeroes);
        let answer = self.ask(env, path, command).await;
        let at = self.writing.borrow().iter().position(|busy| *busy == range);
        self.writing.borrow_mut().swap_remove(at.expect("it is being written"));
        let outcome = match answer {
            Ok(_) => {
                self.written.set(self.written.get() + 1);
                Outcome::Done
            }
            Err(error) if error.is_refusal() => Outcome::Refused,
            Err(_) => Outcome::Unknown,
        };
        env.world().note(format!("{} {id:?} ends {outcome:?}", self.export));
        let ended = self.oracle.write_ends(id, outcome);
        self.judge(env, ended);
    }

    fn write_command(&self, id: WriteId, range: BlockRange, zeroes: bool) -> Command {
        let (offset, length) = (range.start * BLOCK_SIZE_U64, range.bytes() as u32);
        if zeroes && self.rng.chance(500_000) {
            return Command::Trim { offset, length };
        }
        if zeroes {
            return Command::WriteZeroes { offset, length };
        }
        let blocks = range.start..range.end();
        let data = blocks.flat_map(|block| stamp::stamp(self.volume, block, id)).collect();
        Command::Write { offset, data }
    }

    /// Runs one command; a host out of patience drops the connection and every answer on it.
    async fn ask(&self, env: &SimEnv, path: Path, command: Command) -> Result<Vec<u8>, NbdError> {
        self.in_flight.set(self.in_flight.get() + 1);
        let outcome = match &path {
            Path::Plain(client) => tokio::select! {
                biased;
                outcome = client.run(command) => outcome,
                () = env.sleep(self.patience()) => Err(NbdError::Lost),
            },
            Path::Lanes(_) => self.ask_again_and_again(env, command).await,
        };
        self.in_flight.set(self.in_flight.get() - 1);
        match (&outcome, path) {
            (Ok(_), _) => self.answered.set(self.answered.get() + 1),
            (Err(error), _) if error.is_refusal() => {}
            // An I/O error makes a host look for another path.
            (Err(_), Path::Plain(client)) => self.disconnect(&client),
            (Err(_), Path::Lanes(_)) => {}
        }
        outcome
    }

    /// What has no answer is sent again, on another connection of the device and on those of its next
    /// session, as long as the host has the lease under which it was asked first.
    async fn ask_again_and_again(
        &self,
        env: &SimEnv,
        command: Command,
    ) -> Result<Vec<u8>, NbdError> {
        let epoch = self.epoch.get();
        let known = self.tags.borrow_mut().pop();
        let mut tag = known.unwrap_or_else(|| self.new_tag());
        let mut repeated = false;
        let outcome = loop {
            let path = self.connected(env).await;
            if self.epoch.get() != epoch {
                break Err(NbdError::Lost);
            }
            let Some((Path::Lanes(lanes), _)) = path else { continue };
            lanes.lose_some(env);
            match lanes.run(env, &mut tag, command.clone(), self.patience()).await {
                Err(NbdError::Lost) => repeated = true,
                // It is the last copy that was refused; one before it may have been done.
                Err(_) if repeated => break Err(NbdError::Lost),
                outcome => break outcome,
            }
        };
        self.tags.borrow_mut().push(tag);
        outcome
    }

    fn new_tag(&self) -> Tag {
        let number = self.in_flight.get();
        let (queue, tag) = ((number % self.mix.lanes) as u16, number as u16);
        Tag { queue, tag, count: self.rng.draw() as u32 }
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.mix.patience_ms)
    }

    fn disconnect(&self, client: &Rc<NbdClient>) {
        let mut current = self.path.borrow_mut();
        if let Some((Path::Plain(used), _)) = current.as_ref()
            && Rc::ptr_eq(used, client)
        {
            *current = None;
        }
    }

    /// The connection, made anew when there is none. `None` when no target took it this time.
    async fn connected(&self, env: &SimEnv) -> Option<(Path, u64)> {
        let mut next = self.connecting.lock().await;
        if self.answered.get() >= self.leave_at.get() && !self.stopping.get() {
            self.leave_at.set(u64::MAX);
            self.path.replace(None);
            env.sleep(Duration::from_millis(self.rng.between(50, 1_000))).await;
        }
        let current = self.path.borrow().clone();
        match current {
            Some(current) if !current.0.is_lost(env) => return Some(current),
            Some((Path::Lanes(lanes), _)) => lanes.give_up(env),
            _ => {}
        }
        self.path.replace(None);
        let export = self.export_name(env).await?;
        let target = self.targets[*next as usize % self.targets.len()].clone();
        *next += 1;
        let began = self.oracle.attach_begins();
        let made = tokio::select! {
            biased;
            made = self.open(env, &target, &export) => {
                self.note_refusal(&made);
                made.ok()
            }
            () = env.sleep(self.patience()) => None,
        };
        let Some(path) = made else {
            env.sleep(Duration::from_millis(self.rng.between(1, 200))).await;
            return None;
        };
        assert!(path.size() >= self.mix.blocks * BLOCK_SIZE_U64, "the export is smaller");
        env.world().note(format!("{} connected to {target}", self.export));
        // What is asked again is not of one attachment only: each fences copies of it, not the request.
        let fences = self.mix.fenced && !self.mix.reader && self.mix.lanes == 0;
        let attached = || self.oracle.attached(self.volume, began);
        let attachment = if fences { attached() } else { u64::MAX };
        if self.mix.leave_after > 0 && self.mix.lanes == 0 {
            self.leave_at.set(self.answered.get() + self.mix.leave_after);
        }
        let made = (path, attachment);
        self.path.replace(Some(made.clone()));
        Some(made)
    }

    async fn open(&self, env: &SimEnv, target: &Address, export: &str) -> io::Result<Path> {
        let structured = self.rng.chance(500_000);
        if self.mix.lanes == 0 || self.mix.reader {
            let client = NbdClient::connect(env, target, export, structured).await?;
            return Ok(Path::Plain(Rc::new(client)));
        }
        let session = self.rng.draw();
        let joint = if export.contains('@') { ',' } else { '@' };
        let mut clients = Vec::new();
        for lane in 0..self.mix.lanes {
            let export = format!("{export}{joint}session={session:016x},lane={lane}");
            clients.push(NbdClient::connect(env, target, &export, false).await?);
        }
        let rng = Rng::new(self.rng.draw());
        let numbering = match self.rng.chance(250_000) {
            _ if self.mix.moves_hidden => Numbering::Hidden,
            true => Numbering::Little,
            false => Numbering::Big,
        };
        Ok(Path::Lanes(Rc::new(Lanes::new(rng, clients, numbering))))
    }

    /// The name to connect to; takes the lease first, where the host needs one and has none.
    async fn export_name(&self, env: &SimEnv) -> Option<String> {
        let Some(lessor) = &self.lessor else { return Some(self.export.clone()) };
        if self.epoch.get().is_none() {
            let began = self.oracle.attach_begins();
            let taken = tokio::select! {
                biased;
                taken = lessor(&format!("host-{}", env.node().0)) => taken,
                () = env.sleep(LEASE_PATIENCE) => None,
            };
            if taken.is_some() {
                // Whoever held it before is fenced by now, whether this host ever connects or not; but
                // one that held it itself all the time goes on with what it has begun.
                if self.granted.replace(taken) != taken {
                    self.oracle.attached(self.volume, began);
                }
            } else {
                env.sleep(Duration::from_millis(self.rng.between(50, 500))).await;
            }
            env.world().note(format!("{} lease {taken:?}", self.export));
            self.epoch.set(taken);
        }
        self.epoch.get().map(|epoch| format!("{}@lease={}", self.export, epoch.0))
    }

    /// A server that refuses the export may do so because another host has the lease now.
    fn note_refusal(&self, made: &io::Result<Path>) {
        if made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            self.epoch.set(None);
        }
    }
}
