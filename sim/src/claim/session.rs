//! One use of a claimed volume by a host: attach, say what it is for, make a file system, write.
//!
//! Does what the CSI driver does (`csi-shim/src/node/content.rs`), in its order: attached first, then
//! asked under the lease that it is attached by, then written. A session ends with its lease; but it
//! only learns so by being refused, and tries for a while.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{BlockRange, Epoch};
use ballast_env::clock::Clock;
use ballast_node::content::Content;
use ballast_node::leases::ContentReply;
use futures_util::future::join_all;

use super::ask::Asking;
use super::{Claim, Life, USED_BLOCKS};
use crate::env::SimEnv;
use crate::host::nbd::{Command, NbdClient, NbdError};
use crate::oracle::{Author, Outcome, stamp};
use crate::rng::Rng;
use crate::system::System;

/// What making a file system writes: first blocks and counts.
const MADE: [(u64, u32); 5] = [(0, 1), (1, 3), (8, 4), (16, 1), (20, 4)];
/// How long a connection may take to be made.
const CONNECT_MS: u64 = 3_000;
const FS_TYPE: &str = "ext4";

/// What a host does with a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Makes a file system if it may, and uses one that is there.
    FileSystem,
    /// Says that it is a raw device, and uses it.
    Raw,
    /// Uses it without a word.
    Silent,
}

type Link = (Rc<NbdClient>, u64);

/// A session of a host.
pub(super) struct Session<'a> {
    claim: &'a Claim,
    rng: &'a Rng,
    env: &'a SimEnv,
    life: Rc<Life>,
    /// Its lease; 0: without one.
    epoch: Epoch,
    /// How long it waits for an answer before it gives the connection up.
    patience: Duration,
    link: RefCell<Option<Link>>,
    /// How often it will still try to connect.
    tries: Cell<u64>,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        claim: &'a Claim,
        rng: &'a Rng,
        env: &'a SimEnv,
        life: Rc<Life>,
        epoch: Epoch,
    ) -> Self {
        let patience = Duration::from_millis(*rng.pick(&[100, 3_000, 15_000]));
        let tries = Cell::new(*rng.pick(&[2, 8, 30]));
        Self { claim, rng, env, life, epoch, patience, link: RefCell::default(), tries }
    }

    /// Until it is over, one way or another.
    pub(super) async fn run(&self, what: Use) {
        if self.connected().await.is_none() {
            return;
        }
        let may_use = match what {
            Use::FileSystem => self.make_file_system().await,
            // Refused where a file system is known to be: that is never formatted either.
            Use::Raw => self.say(Content::Raw).await.is_some(),
            Use::Silent => true,
        };
        if may_use {
            self.use_it().await;
        }
    }

    /// Whether there is a file system afterwards that this host may use.
    async fn make_file_system(&self) -> bool {
        let fs_type = || FS_TYPE.to_owned();
        let Some(answer) = self.say(Content::Formatting(fs_type())).await else { return false };
        if answer.refused {
            return answer.content == Content::Filesystem(fs_type());
        }
        if self.rng.chance(300_000) {
            // The host is switched off.
            return false;
        }
        // Where somebody began before, nobody may take what is there for zeroes.
        let all = BlockRange::new(0, USED_BLOCKS as u32);
        if answer.ever_written && !self.make(all, true).await {
            return false;
        }
        for (start, count) in MADE {
            self.pause(60).await;
            if self.rng.chance(60_000) || !self.make(BlockRange::new(start, count), false).await {
                return false;
            }
        }
        let made = self.say(Content::Filesystem(fs_type())).await;
        made.is_some_and(|answer| !answer.refused)
    }

    /// Whether that part of the file system is made: written again until it was answered.
    async fn make(&self, range: BlockRange, zeroes: bool) -> bool {
        while let Some(link) = self.connected().await {
            match self.write(&link, range, zeroes, true).await {
                Outcome::Done => return true,
                Outcome::Refused => return false,
                Outcome::Unknown => {}
            }
        }
        false
    }

    async fn use_it(&self) {
        let mut left = self.rng.between(1, 12);
        while left > 0 && !self.claim.is_stopping() {
            let Some(link) = self.connected().await else { return };
            let at_once = self.rng.between(1, 3).min(left);
            left -= at_once;
            join_all((0..at_once).map(|_| self.one_request(&link))).await;
            self.pause(80).await;
        }
    }

    async fn one_request(&self, link: &Link) {
        let count = self.rng.between(1, 4);
        let range = BlockRange::new(self.rng.below(USED_BLOCKS - count + 1), count as u32);
        if self.rng.chance(400_000) {
            self.read(link, range).await;
        } else {
            self.write(link, range, self.rng.chance(100_000), false).await;
        }
    }

    /// Says what the volume holds until somebody answers; nothing when the lease is gone, or nobody does.
    async fn say(&self, content: Content) -> Option<ContentReply> {
        for _ in 0..4 {
            let asked = self.life.oracle.formatting_asked();
            let patience_ms = *self.rng.pick(&[30, 1_000, 6_000]);
            let asking = Asking { env: self.env, rng: self.rng, patience_ms };
            let said = self.claim.say(&asking, &self.life, content.clone(), self.epoch).await;
            self.claim
                .world
                .note(format!("{} {}: {content:?}: {said:?}", self.life.number, self.epoch));
            match said {
                Some(Ok(answer)) => {
                    if matches!(content, Content::Formatting(_)) && !answer.refused {
                        let oracle = &self.life.oracle;
                        let blank = !answer.ever_written;
                        let granted = oracle.formatting_granted(self.life.number, asked, blank);
                        self.claim.judge(granted);
                    }
                    return Some(answer);
                }
                Some(Err(_)) => return None,
                None if self.claim.is_stopping() => return None,
                None => self.pause(300).await,
            }
        }
        None
    }

    async fn write(&self, link: &Link, range: BlockRange, zeroes: bool, formats: bool) -> Outcome {
        let (oracle, volume) = (&self.life.oracle, self.life.number);
        let author = Author { attachment: link.1, epoch: self.epoch.0, formats };
        let id = oracle.write_begins_by(author, volume, range, zeroes);
        self.claim.world.note(format!("{volume} {} {id:?} begins {range}", self.epoch));
        let (offset, length) = (range.start * BLOCK_SIZE_U64, range.bytes() as u32);
        let command = if zeroes {
            Command::Trim { offset, length }
        } else {
            let blocks = range.start..range.end();
            let data = blocks.flat_map(|block| stamp::stamp(volume, block, id)).collect();
            Command::Write { offset, data }
        };
        let outcome = match self.request(link, command).await {
            Ok(_) => Outcome::Done,
            Err(error) if error.is_refusal() => Outcome::Refused,
            Err(_) => Outcome::Unknown,
        };
        self.claim.world.note(format!("{volume} {} {id:?} ends {outcome:?}", self.epoch));
        self.claim.judge(oracle.write_ends(id, outcome));
        outcome
    }

    async fn read(&self, link: &Link, range: BlockRange) {
        let (oracle, volume) = (&self.life.oracle, self.life.number);
        let read = oracle.read_begins(volume, range);
        let (offset, length) = (range.start * BLOCK_SIZE_U64, range.bytes() as u32);
        if let Ok(bytes) = self.request(link, Command::Read { offset, length }).await {
            self.claim.judge(oracle.read_ends(read, &bytes));
        }
    }

    /// Runs one command; out of patience, or after an error, the connection is given up.
    async fn request(&self, link: &Link, command: Command) -> Result<Vec<u8>, NbdError> {
        let outcome = tokio::select! {
            biased;
            outcome = link.0.run(command) => outcome,
            () = self.env.sleep(self.patience) => Err(NbdError::Lost),
        };
        if outcome.as_ref().is_err_and(|error| !error.is_refusal()) {
            let mut current = self.link.borrow_mut();
            current.take_if(|current| Rc::ptr_eq(&current.0, &link.0));
        }
        outcome
    }

    /// The connection, made anew under the same lease when there is none. Without a lease it is never
    /// made anew: somebody else may have been there meanwhile.
    async fn connected(&self) -> Option<Link> {
        let current = self.link.borrow().clone();
        if let Some(link) = current.filter(|link| !link.0.is_lost()) {
            return Some(link);
        }
        self.link.take();
        while self.tries.get() > 0 && !self.claim.is_stopping() {
            self.tries.set(self.tries.get() - 1);
            let link = self.connect().await;
            if link.is_some() {
                if self.epoch == Epoch(0) {
                    self.tries.set(0);
                }
                self.link.replace(link.clone());
                return link;
            }
            self.pause(500).await;
        }
        None
    }

    async fn connect(&self) -> Option<Link> {
        let nodes = self.claim.ballast.any_node(self.rng);
        let target = self.claim.ballast.nbd_address(nodes);
        let (name, structured) = (self.claim.name(), self.rng.chance(500_000));
        let leased = self.epoch != Epoch(0);
        let export = if leased { format!("{name}@lease={}", self.epoch.0) } else { name };
        if !leased && !self.claim.is_open(&self.life) {
            return None;
        }
        let began = self.life.oracle.attach_begins();
        let made = tokio::select! {
            biased;
            made = NbdClient::connect(self.env, &target, &export, structured) => made,
            () = self.env.sleep(Duration::from_millis(CONNECT_MS)) => return None,
        };
        let client = made.ok()?;
        // Who names no lease names no volume either: a node that is behind may have another one.
        let is_other = client.size() != self.life.bytes || !self.claim.is_open(&self.life);
        if !leased && is_other {
            return None;
        }
        self.claim.world.note(format!("{export} of {} connected to {target}", self.life.number));
        Some((Rc::new(client), self.life.oracle.attached(self.life.number, began)))
    }

    async fn pause(&self, ms_max: u64) {
        self.env.sleep(Duration::from_millis(self.rng.between(1, ms_max))).await;
    }
}
