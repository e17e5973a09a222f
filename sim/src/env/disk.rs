//! The disk of a machine.
//!
//! Fault model:
//! - A write that was reported complete is durable, unless the planted bug
//!   [`DiskFaults::lose_completed`] is on (it exists to test the oracle).
//! - A write in flight at a crash, or one that failed, is there whole, not at all, or torn: any
//!   subset of its 512-byte sectors, or a prefix of them. Writes in flight land in any order.
//! - Reads see what is stored when they complete. Chosen ranges rot (a bit flips) or fail to read
//!   until they are written again; reads and writes fail with a chance.
//! - Latencies are whole milliseconds, longer on a slow disk, much longer for a few operations (a
//!   tail); a stall holds every completion.
//! - A discarded block reads as zeroes or as before.
//! - The disk, or one file of it, may be replaced by an empty one, or by an older copy of itself.
//! - Faults hit all files or a chosen one: each file stands for a disk of its own.
//! - A script may lose what is in flight at a crash for certain, and hold one chosen write.
//!
//! Space is not modelled: a pool is one file of fixed size, and full is the pool's own word.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ballast_block::geometry::{BLOCK_SIZE, BLOCK_SIZE_U64};
use ballast_block::{AlignedBuf, NodeId};
use ballast_env::disk::{File, OpenMode};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::env::SimEnv;
use crate::machine::{Crash, Process};
use crate::rng::Rng;
use crate::world::World;

/// What a disk writes whole or not at all, in bytes.
const SECTOR: usize = 512;

/// What goes wrong on a disk. Rates are chances in a million per operation.
#[derive(Clone, Debug)]
pub struct DiskFaults {
    /// Shortest latency in milliseconds.
    pub latency_min_ms: u64,
    /// Longest latency in milliseconds.
    pub latency_max_ms: u64,
    /// Operations that take [`DiskFaults::tail_ms`] longer.
    pub tail_rate: u64,
    /// How much longer, in milliseconds.
    pub tail_ms: u64,
    /// Reads that fail.
    pub read_error_rate: u64,
    /// Writes that fail, and may be there in part.
    pub write_error_rate: u64,
    /// Planted bug: writes that are reported complete and never land.
    pub lose_completed: u64,
    /// Nothing of what is in flight at a crash is there.
    pub lose_in_flight: bool,
    /// The one file that all this is about; all others are well. `None`: all files.
    pub only: Option<PathBuf>,
}

impl Default for DiskFaults {
    fn default() -> Self {
        Self {
            latency_min_ms: 1,
            latency_max_ms: 3,
            tail_rate: 0,
            tail_ms: 0,
            read_error_rate: 0,
            write_error_rate: 0,
            lose_completed: 0,
            lose_in_flight: false,
            only: None,
        }
    }
}

/// A copy of everything on a disk.
#[derive(Clone, Default)]
pub struct DiskImage(BTreeMap<PathBuf, (u64, Blocks)>);

type Blocks = BTreeMap<u64, Box<[u8]>>;

impl DiskImage {
    /// Offsets of the blocks of `path` that are others than in `before`, from the start of the file.
    pub fn changed_since(&self, before: &Self, path: &Path) -> Vec<u64> {
        let blocks = |image: &'_ Self| image.0.get(path).map(|(_, blocks)| blocks.clone());
        let (now, before) = (blocks(self).unwrap_or_default(), blocks(before).unwrap_or_default());
        let changed = now.iter().filter(|(number, block)| before.get(number) != Some(*block));
        changed.map(|(number, _)| number * BLOCK_SIZE_U64).collect()
    }
}

/// A machine's disk. Survives the machine's processes.
pub struct DiskState {
    node: NodeId,
    rng: Rng,
    faults: RefCell<DiskFaults>,
    stall: RefCell<Stall>,
    /// How much longer the next write takes, in milliseconds.
    next_write_ms: Cell<u64>,
    files: RefCell<BTreeMap<PathBuf, Rc<Content>>>,
}

/// Completions that are held, of one file or of all.
#[derive(Default)]
struct Stall {
    until_ms: u64,
    only: Option<PathBuf>,
}

struct Content {
    path: PathBuf,
    size: u64,
    blocks: RefCell<Blocks>,
    unreadable: RefCell<BTreeSet<u64>>,
    in_flight: RefCell<BTreeMap<u64, (u64, Vec<Bytes>)>>,
    numbered: Cell<u64>,
    locked: Cell<bool>,
}

impl DiskState {
    pub(crate) fn new(world: &World, node: NodeId) -> Rc<Self> {
        Rc::new(Self {
            node,
            rng: world.rng("disk", u64::from(node.0)),
            faults: RefCell::default(),
            stall: RefCell::default(),
            next_write_ms: Cell::new(0),
            files: RefCell::default(),
        })
    }

    /// What goes wrong from now on.
    pub fn set_faults(&self, faults: DiskFaults) {
        self.faults.replace(faults);
    }

    /// What goes wrong now.
    pub fn faults(&self) -> DiskFaults {
        self.faults.borrow().clone()
    }

    /// What goes wrong now with a file.
    fn faults_of(&self, path: &Path) -> DiskFaults {
        let faults = self.faults.borrow();
        match &faults.only {
            Some(only) if only != path => DiskFaults::default(),
            _ => faults.clone(),
        }
    }

    /// Holds every completion until `world_ms` of true time.
    pub fn stall_until(&self, world_ms: u64) {
        self.stall.replace(Stall { until_ms: world_ms, only: None });
    }

    /// Holds the completions of one file until `world_ms` of true time, and no others.
    pub fn stall_file_until(&self, path: &Path, world_ms: u64) {
        self.stall.replace(Stall { until_ms: world_ms, only: Some(path.to_owned()) });
    }

    /// Makes the next write, and only that, take `ms` milliseconds longer.
    pub fn delay_next_write(&self, ms: u64) {
        self.next_write_ms.set(ms);
    }

    /// Flips one bit of the block that holds byte `offset` of `path`. Returns whether something
    /// was stored there (a block never written can't rot).
    pub fn rot(&self, path: &Path, offset: u64) -> bool {
        let Some(content) = self.file(path) else { return false };
        let mut blocks = content.blocks.borrow_mut();
        let Some(block) = blocks.get_mut(&(offset / BLOCK_SIZE_U64)) else { return false };
        let bit = self.rng.below(BLOCK_SIZE_U64 * 8);
        block[(bit / 8) as usize] ^= 1 << (bit % 8);
        true
    }

    /// Flips one bit of a stored block of `path` chosen by the seed; its offset, if there is one.
    pub fn rot_any(&self, path: &Path) -> Option<u64> {
        let content = self.file(path)?;
        let stored: Vec<u64> = content.blocks.borrow().keys().copied().collect();
        if stored.is_empty() {
            return None;
        }
        let offset = *self.rng.pick(&stored) * BLOCK_SIZE_U64;
        self.rot(path, offset).then_some(offset)
    }

    /// Makes the block that holds byte `offset` of `path` unreadable until it is written again.
    pub fn fail_reads_of(&self, path: &Path, offset: u64) {
        if let Some(content) = self.file(path) {
            content.unreadable.borrow_mut().insert(offset / BLOCK_SIZE_U64);
        }
    }

    /// What is stored, without latency and faults.
    pub fn peek(&self, path: &Path, offset: u64, length: usize) -> Option<Vec<u8>> {
        let content = self.file(path)?;
        let mut bytes = vec![0; length];
        content.copy_out(offset, &mut bytes);
        Some(bytes)
    }

    /// Everything on it. Nothing may be in flight that matters.
    pub fn image(&self) -> DiskImage {
        let files = self.files.borrow();
        let copy = |content: &Rc<Content>| (content.size, content.blocks.borrow().clone());
        DiskImage(files.iter().map(|(path, content)| (path.clone(), copy(content))).collect())
    }

    /// Replaces everything by `image`: a restored backup, or an empty disk. No process may run.
    pub fn restore(&self, image: Option<&DiskImage>) {
        self.files.borrow_mut().clear();
        for path in image.iter().flat_map(|image| image.0.keys()) {
            self.restore_file(path, image);
        }
    }

    /// Replaces one file by what it is in `image`, or takes it away. No process may have it open.
    pub fn restore_file(&self, path: &Path, image: Option<&DiskImage>) {
        let mut files = self.files.borrow_mut();
        files.remove(path);
        if let Some((size, blocks)) = image.and_then(|image| image.0.get(path)) {
            let content = Content::new(path, *size);
            content.blocks.replace(blocks.clone());
            files.insert(path.to_owned(), Rc::new(content));
        }
    }

    /// Decides what became of the writes in flight, and gives the locks back.
    pub(crate) fn crash(&self, crash: Crash) {
        for content in self.files.borrow().values() {
            content.locked.set(false);
            let mut left: Vec<_> = content.in_flight.take().into_values().collect();
            if self.faults_of(&content.path).lose_in_flight {
                left.clear();
            }
            while !left.is_empty() {
                let (offset, parts) = left.swap_remove(self.rng.below(left.len() as u64) as usize);
                // A kernel that lives on finishes most of what it was given.
                let whole = if crash == Crash::Kill { 700_000 } else { 250_000 };
                if self.rng.chance(whole) {
                    content.store(offset, &parts, |_| true);
                } else {
                    self.store_torn(content, offset, &parts);
                }
            }
        }
    }

    /// Stores none, a prefix, or any subset of the sectors.
    fn store_torn(&self, content: &Content, offset: u64, parts: &[Bytes]) {
        let sectors = (length_of(parts) / SECTOR) as u64;
        match self.rng.below(4) {
            0 => {}
            1 => {
                let kept = self.rng.below(sectors + 1);
                content.store(offset, parts, |sector| sector < kept);
            }
            _ => {
                let kept_rate = self.rng.between(10_000, 990_000);
                content.store(offset, parts, |_| self.rng.chance(kept_rate));
            }
        }
    }

    fn read(&self, content: &Content, offset: u64, into: &mut [u8]) -> io::Result<()> {
        content.check(offset, into.len(), io::ErrorKind::UnexpectedEof)?;
        let blocks = offset / BLOCK_SIZE_U64..(offset + into.len() as u64) / BLOCK_SIZE_U64;
        let unreadable = content.unreadable.borrow().range(blocks).next().is_some();
        if unreadable || self.rng.chance(self.faults_of(&content.path).read_error_rate) {
            return Err(input_output_error());
        }
        content.copy_out(offset, into);
        Ok(())
    }

    fn file(&self, path: &Path) -> Option<Rc<Content>> {
        self.files.borrow().get(path).cloned()
    }

    fn latency_ms(&self, world: &World, path: &Path) -> u64 {
        let faults = self.faults_of(path);
        let latency = self.rng.between(faults.latency_min_ms, faults.latency_max_ms);
        let tail = if faults.tail_rate > 0 && self.rng.chance(faults.tail_rate) {
            self.rng.between(1, faults.tail_ms)
        } else {
            0
        };
        let stall = self.stall.borrow();
        let held = stall.only.as_deref().is_none_or(|only| only == path);
        let until_ms = if held { stall.until_ms } else { 0 };
        latency + tail + until_ms.saturating_sub(world.now_ms())
    }
}

impl Content {
    fn new(path: &Path, size: u64) -> Self {
        Self {
            path: path.to_owned(),
            size,
            blocks: RefCell::default(),
            unreadable: RefCell::default(),
            in_flight: RefCell::default(),
            numbered: Cell::new(0),
            locked: Cell::new(false),
        }
    }

    /// Stores the sectors that `kept` names, counted from the start of the write.
    fn store(&self, offset: u64, parts: &[Bytes], mut kept: impl FnMut(u64) -> bool) {
        let mut blocks = self.blocks.borrow_mut();
        let sectors = parts.iter().flat_map(|part| part.chunks(SECTOR));
        for (number, sector) in sectors.enumerate() {
            if !kept(number as u64) {
                continue;
            }
            let at = offset + (number * SECTOR) as u64;
            let block = blocks
                .entry(at / BLOCK_SIZE_U64)
                .or_insert_with(|| vec![0; BLOCK_SIZE].into_boxed_slice());
            let inside = (at % BLOCK_SIZE_U64) as usize;
            block[inside..inside + SECTOR].copy_from_slice(sector);
            self.unreadable.borrow_mut().remove(&(at / BLOCK_SIZE_U64));
        }
    }

    fn copy_out(&self, offset: u64, into: &mut [u8]) {
        let blocks = self.blocks.borrow();
        let first = offset / BLOCK_SIZE_U64;
        for (number, chunk) in (first..).zip(into.chunks_mut(BLOCK_SIZE)) {
            match blocks.get(&number) {
                Some(block) => chunk.copy_from_slice(&block[..chunk.len()]),
                None => chunk.fill(0),
            }
        }
    }

    fn check(&self, offset: u64, length: usize, eof: io::ErrorKind) -> io::Result<()> {
        if !offset.is_multiple_of(BLOCK_SIZE_U64) || !length.is_multiple_of(BLOCK_SIZE) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "direct I/O is not aligned"));
        }
        if offset.checked_add(length as u64).is_none_or(|end| end > self.size) {
            return Err(io::Error::new(eof, "past the end of the file"));
        }
        Ok(())
    }
}

pub(crate) async fn open(env: SimEnv, path: PathBuf, mode: OpenMode) -> io::Result<SimFile> {
    let disk = env.machine().disk();
    let latency = disk.latency_ms(env.world(), &path);
    env.world().sleep_ms(latency).await;
    if !env.process().is_alive() {
        return std::future::pending().await;
    }
    let existing = disk.file(&path);
    let content = match (mode, existing) {
        (OpenMode::CreateNew { .. }, Some(_)) => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the file exists"));
        }
        (OpenMode::CreateNew { size }, None) => {
            let content = Rc::new(Content::new(&path, size));
            disk.files.borrow_mut().insert(path.clone(), content.clone());
            content
        }
        (_, Some(content)) => content,
        (_, None) => return Err(io::Error::new(io::ErrorKind::NotFound, "no such file")),
    };
    let writable = mode != OpenMode::ReadOnly;
    if writable && content.locked.replace(true) {
        return Err(io::Error::new(io::ErrorKind::WouldBlock, "the file is locked"));
    }
    let lock = Lock { content, process: env.process().clone(), writable };
    env.world().note(format!("{} open {} {mode:?}", env.node(), path.display()));
    Ok(SimFile { env, disk, lock: Rc::new(lock) })
}

/// An open file.
pub struct SimFile {
    env: SimEnv,
    disk: Rc<DiskState>,
    lock: Rc<Lock>,
}

/// Held by the open file and by its operations in flight, as a kernel does.
struct Lock {
    content: Rc<Content>,
    process: Rc<Process>,
    writable: bool,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A dead process gave its locks back when it died, and the next may hold them by now.
        if self.writable && self.process.is_alive() {
            self.content.locked.set(false);
        }
    }
}

impl SimFile {
    /// Runs `effect` when the disk gets to it; pending for ever when the process is dead by then.
    fn complete<T: 'static>(
        &self,
        longer_ms: u64,
        effect: impl FnOnce(&World, &DiskState, &Content) -> T + 'static,
    ) -> impl Future<Output = T> + 'static {
        let (sender, receiver) = oneshot::channel();
        let (disk, lock) = (self.disk.clone(), self.lock.clone());
        if lock.process.is_alive() {
            let latency = disk.latency_ms(self.env.world(), &lock.content.path) + longer_ms;
            self.env.world().after_ms(latency, move |world| {
                if lock.process.is_alive() {
                    // The caller may have dropped its future: the effect stands all the same.
                    let _ = sender.send(effect(world, &disk, &lock.content));
                }
            });
        }
        async move {
            match receiver.await {
                Ok(outcome) => outcome,
                Err(_) => std::future::pending().await,
            }
        }
    }
}

impl File for SimFile {
    fn size(&self) -> u64 {
        self.lock.content.size
    }

    fn read_at(
        &self,
        offset: u64,
        mut buffer: AlignedBuf,
    ) -> impl Future<Output = (io::Result<()>, AlignedBuf)> + 'static {
        self.complete(0, move |_, disk, content| {
            let outcome = disk.read(content, offset, &mut buffer);
            (outcome, buffer)
        })
    }

    fn write_at(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
    ) -> impl Future<Output = io::Result<()>> + 'static {
        let content = &self.lock.content;
        let number = content.numbered.replace(content.numbered.get() + 1);
        let length = length_of(&parts);
        let mut checked = content.check(offset, length, io::ErrorKind::InvalidInput);
        let misaligned = |part: &Bytes| {
            !part.len().is_multiple_of(BLOCK_SIZE)
                || !part.is_empty() && !part.as_ptr().addr().is_multiple_of(BLOCK_SIZE)
        };
        if parts.iter().any(misaligned) {
            checked = Err(io::Error::new(io::ErrorKind::InvalidInput, "memory is not aligned"));
        }
        if !self.lock.writable {
            checked = Err(opened_read_only());
        }
        if checked.is_ok() && self.env.process().is_alive() {
            content.in_flight.borrow_mut().insert(number, (offset, parts));
            self.env.process().count_effect();
        }
        let node = self.disk.node;
        let longer_ms = self.disk.next_write_ms.take();
        self.complete(longer_ms, move |world, disk, content| {
            checked?;
            let (_, parts) = content.in_flight.borrow_mut().remove(&number).expect("in flight");
            world.note(format!("{node} wrote {offset}+{length}"));
            let faults = disk.faults_of(&content.path);
            if disk.rng.chance(faults.write_error_rate) {
                disk.store_torn(content, offset, &parts);
                return Err(input_output_error());
            }
            if !disk.rng.chance(faults.lose_completed) {
                content.store(offset, &parts, |_| true);
            }
            Ok(())
        })
    }

    fn discard(&self, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> + 'static {
        let writable = self.lock.writable;
        self.complete(0, move |_, disk, content| {
            if !writable {
                return Err(opened_read_only());
            }
            let length = usize::try_from(length).map_err(io::Error::other)?;
            content.check(offset, length, io::ErrorKind::InvalidInput)?;
            let range = offset / BLOCK_SIZE_U64..(offset + length as u64) / BLOCK_SIZE_U64;
            let mut blocks = content.blocks.borrow_mut();
            let stored: Vec<u64> = blocks.range(range).map(|(number, _)| *number).collect();
            for number in stored {
                if disk.rng.chance(500_000) {
                    blocks.remove(&number);
                }
            }
            Ok(())
        })
    }
}

fn length_of(parts: &[Bytes]) -> usize {
    parts.iter().map(Bytes::len).sum()
}

fn opened_read_only() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "opened read-only")
}

fn input_output_error() -> io::Error {
    // EIO, as Linux numbers it.
    io::Error::from_raw_os_error(5)
}
