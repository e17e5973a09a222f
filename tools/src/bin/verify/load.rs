//! Keeps requests in flight on one connection and feeds the journal with their answers.
//!
//! Two requests in flight never touch the same block, so that their order is known.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::client::{Client, Command, NO_SPACE, Receiver};
use crate::journal::Journal;
use crate::meter::Meter;
use crate::pattern::{self, BLOCK, Content};

/// Attempts to find a range that nothing in flight touches, before waiting for an answer.
const ATTEMPTS: usize = 8;

/// One request of this many is a flush.
const FLUSH_EVERY: u64 = 100;

/// How to load.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Blocks of the region.
    pub blocks: usize,
    /// Requests in flight.
    pub depth: usize,
    /// Longest request, in blocks.
    pub max_blocks: usize,
    /// Share of reads, in percent.
    pub read_percent: u32,
    /// Share of trims and zeroes, in percent.
    pub zero_percent: u32,
    /// Of offsets, sizes and contents.
    pub seed: u64,
    /// Whether the region holds zeroes at the start.
    pub expect_zeroes: bool,
    /// Whether a write may be refused for lack of space.
    pub allow_no_space: bool,
    /// How long to wait for an answer.
    pub patience: Duration,
}

/// Why [`Load::run`] came back.
#[derive(Debug)]
pub enum Ended {
    /// It was asked to stop, and all answers are there.
    Stopped,
    /// The connection broke, for this reason.
    Lost(String),
}

/// A request in flight.
#[derive(Debug, Clone)]
struct Request {
    command: Command,
    blocks: Range<usize>,
    content: Content,
    sent: Instant,
}

impl Request {
    fn changes(&self) -> bool {
        !matches!(self.command, Command::Read | Command::Flush)
    }
}

/// What sender, receiver and watcher share.
pub struct State {
    /// The model.
    pub journal: Journal,
    /// The counts.
    pub meter: Meter,
    in_flight: BTreeMap<u64, Request>,
    busy: Vec<bool>,
    next: u64,
    random: u64,
    stop: bool,
    broken: Option<String>,
}

/// A load, over as many connections as it takes.
pub struct Load {
    /// How it was asked to run.
    pub settings: Settings,
    state: Mutex<State>,
    changed: Condvar,
}

impl Load {
    /// A load that has not begun.
    pub fn new(settings: Settings) -> Load {
        let state = State {
            journal: Journal::new(settings.blocks, settings.expect_zeroes),
            meter: Meter::new(),
            in_flight: BTreeMap::new(),
            busy: vec![false; settings.blocks],
            next: 1,
            random: pattern::mix(settings.seed),
            stop: false,
            broken: None,
        };
        Load { settings, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The shared state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the state")
    }

    /// Asks [`Load::run`] to end when all is answered.
    pub fn stop(&self) {
        self.state().stop = true;
        self.changed.notify_all();
    }

    /// Loads over this connection until it breaks or the load is stopped.
    pub fn run(&self, mut client: Client) -> Ended {
        self.state().broken = None;
        let receiver = match client.receiver() {
            Ok(receiver) => receiver,
            Err(error) => return Ended::Lost(error.to_string()),
        };
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| self.receive(receiver));
            if let Err(error) = self.send(&mut client) {
                self.break_off(error.to_string());
            }
            if self.state().broken.is_some() {
                client.abort();
            } else {
                client.disconnect();
            }
            receiving.join().expect("the receiver does not panic");
        });
        let mut state = self.state();
        let Some(reason) = state.broken.take() else {
            state.meter.close();
            return Ended::Stopped;
        };
        for request in std::mem::take(&mut state.in_flight).into_values() {
            state.busy[request.blocks.clone()].fill(false);
            if request.changes() {
                state.meter.unanswered += 1;
                state.journal.unanswered(request.blocks, request.content);
            }
        }
        Ended::Lost(reason)
    }

    fn break_off(&self, reason: String) {
        self.state().broken.get_or_insert(reason);
        self.changed.notify_all();
    }

    /// Sends requests until told to stop, then waits for the last answers.
    fn send(&self, client: &mut Client) -> io::Result<()> {
        let mut data = Vec::new();
        while let Some((cookie, request)) = self.next_request() {
            let length = request.blocks.len() * BLOCK;
            let flush = request.command == Command::Flush;
            let offset = if flush { 0 } else { (request.blocks.start * BLOCK) as u64 };
            data.clear();
            if let (Command::Write, Content::Write(number)) = (request.command, request.content) {
                data.resize(length, 0);
                for (block, buffer) in request.blocks.clone().zip(data.chunks_exact_mut(BLOCK)) {
                    pattern::fill(buffer, self.settings.seed, number, block as u64);
                }
            }
            client.send(request.command, cookie, offset, length as u32, &data)?;
        }
        Ok(())
    }

    /// The next request, when one may be sent; none when all is done or the connection broke.
    fn next_request(&self) -> Option<(u64, Request)> {
        let mut state = self.state();
        loop {
            if state.broken.is_some() || (state.stop && state.in_flight.is_empty()) {
                return None;
            }
            if !state.stop
                && state.in_flight.len() < self.settings.depth
                && let Some(request) = state.choose(&self.settings)
            {
                return Some(request);
            }
            state = self.changed.wait(state).expect("no thread panics while it holds the state");
        }
    }

    /// Takes answers until the connection ends.
    fn receive(&self, mut receiver: Receiver) {
        let mut buffer = vec![0; self.settings.max_blocks * BLOCK];
        loop {
            if let Err(error) = self.receive_one(&mut receiver, &mut buffer) {
                let state = self.state();
                let finished = state.stop && state.in_flight.is_empty();
                drop(state);
                if !finished {
                    self.break_off(error.to_string());
                }
                return;
            }
            self.changed.notify_all();
        }
    }

    fn receive_one(&self, receiver: &mut Receiver, buffer: &mut [u8]) -> io::Result<()> {
        let (cookie, error) = receiver.reply(&|| self.gives_up())?;
        let request = self.state().in_flight.get(&cookie).cloned();
        let Some(request) = request else {
            self.state().journal.violation(format!("protocol: an answer to nothing, {cookie}"));
            return Err(io::Error::other("an answer to a request that was not sent"));
        };
        let blocks = request.blocks.clone();
        let mut found = Vec::new();
        if request.command == Command::Read && error == 0 {
            let data = &mut buffer[..blocks.len() * BLOCK];
            receiver.fill(data, &|| self.gives_up())?;
            let seed = self.settings.seed;
            let each = blocks.clone().zip(data.chunks_exact(BLOCK));
            found.extend(each.map(|(b, data)| pattern::recognise(data, seed, b as u64)));
        }
        let mut state = self.state();
        state.in_flight.remove(&cookie);
        state.busy[blocks.clone()].fill(false);
        state.answered(&request, error, &found, self.settings.allow_no_space);
        Ok(())
    }

    /// Whether an answer is overdue, or none is to come.
    fn gives_up(&self) -> bool {
        let state = self.state();
        let finished = state.stop && state.in_flight.is_empty();
        let overdue = |request: &Request| request.sent.elapsed() > self.settings.patience;
        finished || state.broken.is_some() || state.in_flight.values().any(overdue)
    }
}

impl State {
    fn random(&mut self, below: usize) -> usize {
        self.random = pattern::mix(self.random);
        (self.random % below as u64) as usize
    }

    /// A request on blocks that nothing in flight touches.
    fn choose(&mut self, settings: &Settings) -> Option<(u64, Request)> {
        for _ in 0..ATTEMPTS {
            let count = 1 + self.random(settings.max_blocks.min(settings.blocks));
            let first = self.random(settings.blocks - count + 1);
            let blocks = first..first + count;
            if self.busy[blocks.clone()].iter().any(|busy| *busy) {
                continue;
            }
            let number = self.next;
            self.next += 1;
            if number.is_multiple_of(FLUSH_EVERY) {
                let blocks = first..first;
                let request = Request {
                    command: Command::Flush,
                    blocks,
                    content: Content::Zero,
                    sent: Instant::now(),
                };
                self.in_flight.insert(number, request.clone());
                return Some((number, request));
            }
            let dice = self.random(100) as u32;
            let (command, content) = match dice {
                _ if dice < settings.read_percent => (Command::Read, Content::Zero),
                _ if dice >= settings.read_percent + settings.zero_percent => {
                    (Command::Write, Content::Write(number))
                }
                _ if dice.is_multiple_of(2) => (Command::WriteZeroes, Content::Zero),
                _ => (Command::Trim, Content::Zero),
            };
            self.busy[blocks.clone()].fill(true);
            let request = Request { command, blocks, content, sent: Instant::now() };
            self.in_flight.insert(number, request.clone());
            return Some((number, request));
        }
        None
    }

    fn answered(&mut self, request: &Request, error: u32, found: &[Content], no_space: bool) {
        self.meter.completed(request.sent);
        let blocks = request.blocks.clone();
        match (request.command, error) {
            (Command::Read, 0) => {
                self.meter.reads += 1;
                for (block, content) in blocks.zip(found) {
                    self.journal.observed(block, *content);
                }
            }
            (Command::Flush, 0) => {}
            (Command::Read | Command::Flush, _) => {
                let command = request.command;
                let what = format!("error {error} for {command:?} of blocks {blocks:?}");
                self.journal.violation(what);
            }
            (_, 0) => {
                self.meter.writes += 1;
                self.meter.bytes += (blocks.len() * BLOCK) as u64;
                self.journal.acknowledged(blocks, request.content);
            }
            (_, NO_SPACE) if no_space => self.meter.refused += 1,
            (command, _) => {
                let what = format!("error {error} for {command:?} of blocks {blocks:?}");
                self.journal.violation(what);
                self.journal.unanswered(blocks, request.content);
            }
        }
    }
}
