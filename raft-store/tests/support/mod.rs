//! A disk in memory that remembers every write, so that a test can crash at any of them, and an
//! environment around it. Time is tokio's, paused.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::disallowed_methods, reason = "an environment, made of tokio's paused time")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::{AlignedBuf, BLOCK_SIZE};
use ballast_env::clock::{Clock, Instant};
use ballast_env::disk::{Disk, File, OpenMode};
use ballast_env::entropy::Entropy;
use ballast_env::network::{Address, Listener, Network};
use ballast_env::planted::Planted;
use ballast_env::spawn::{Spawn, Task};
use bytes::Bytes;
use tokio::io::DuplexStream;

pub mod crash;
pub mod pool;

pub const SECTOR: usize = 512;

/// What a disk holds: blocks that were never written are absent and read as zeroes.
#[derive(Clone, Default)]
pub struct Image {
    pub size: u64,
    blocks: BTreeMap<u64, Rc<[u8]>>,
    unreadable: BTreeMap<u64, ()>,
}

impl Image {
    pub fn new(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    pub fn block(&self, block: u64) -> Vec<u8> {
        self.blocks.get(&block).map_or_else(|| vec![0; BLOCK_SIZE], |bytes| bytes.to_vec())
    }

    pub fn set_block(&mut self, block: u64, bytes: &[u8]) {
        assert_eq!(bytes.len(), BLOCK_SIZE);
        self.unreadable.remove(&block);
        self.blocks.insert(block, bytes.into());
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (index, block) in bytes.chunks(BLOCK_SIZE).enumerate() {
            self.set_block(offset / BLOCK_SIZE as u64 + index as u64, block);
        }
    }

    /// Writes only the sectors that `keep` names.
    pub fn write_torn(&mut self, offset: u64, bytes: &[u8], mut keep: impl FnMut() -> bool) {
        for (index, new) in bytes.chunks(BLOCK_SIZE).enumerate() {
            let at = offset / BLOCK_SIZE as u64 + index as u64;
            let mut block = self.block(at);
            for sector in (0..BLOCK_SIZE).step_by(SECTOR) {
                if keep() {
                    block[sector..sector + SECTOR].copy_from_slice(&new[sector..sector + SECTOR]);
                }
            }
            self.set_block(at, &block);
        }
    }

    /// Flips a bit.
    pub fn rot(&mut self, block: u64, byte: usize) {
        let mut bytes = self.block(block);
        bytes[byte] ^= 0x10;
        self.set_block(block, &bytes);
    }

    /// Reads of it fail until it is written again.
    pub fn make_unreadable(&mut self, block: u64) {
        self.unreadable.insert(block, ());
    }

    /// It can be read again, and is what it was.
    pub fn make_readable(&mut self, block: u64) {
        self.unreadable.remove(&block);
    }

    /// Whether a block was ever written.
    pub fn is_written(&self, block: u64) -> bool {
        self.blocks.contains_key(&block)
    }

    /// Blocks that were ever written.
    pub fn written_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }
}

/// A write of the disk's history.
#[derive(Clone)]
pub struct WriteRecord {
    pub offset: u64,
    pub bytes: Bytes,
}

/// What happened, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Issued(usize),
    Completed(usize),
    /// Not of the disk.
    Nothing,
}

#[derive(Default)]
pub struct DiskState {
    pub images: BTreeMap<PathBuf, Image>,
    locked: BTreeMap<PathBuf, ()>,
    pub writes: Vec<WriteRecord>,
    pub events: Vec<Event>,
    /// Fails the write of this number, counted from now.
    pub fail_write: Option<usize>,
    /// Writes never return.
    pub hang: bool,
}

/// An environment with a disk in memory.
#[derive(Clone)]
pub struct MemoryEnv {
    pub disk: Rc<RefCell<DiskState>>,
    random: Rc<Cell<u64>>,
    start: tokio::time::Instant,
    /// How long a write takes, in milliseconds.
    pub latency_ms: u64,
}

impl Default for MemoryEnv {
    fn default() -> Self {
        Self {
            disk: Rc::default(),
            random: Rc::new(Cell::new(1)),
            start: tokio::time::Instant::now(),
            latency_ms: 1,
        }
    }
}

impl MemoryEnv {
    /// With one file.
    pub fn with_image(path: &Path, image: Image) -> Self {
        let env = Self::default();
        env.disk.borrow_mut().images.insert(path.to_owned(), image);
        env
    }

    pub fn image(&self, path: &Path) -> Image {
        self.disk.borrow().images[path].clone()
    }
}

pub struct MemoryFile {
    disk: Rc<RefCell<DiskState>>,
    path: PathBuf,
    size: u64,
    latency: Duration,
    locks: bool,
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        if self.locks {
            self.disk.borrow_mut().locked.remove(&self.path);
        }
    }
}

impl Disk for MemoryEnv {
    type File = MemoryFile;

    fn open(
        &self,
        path: &Path,
        mode: OpenMode,
    ) -> impl Future<Output = io::Result<MemoryFile>> + 'static {
        let (disk, path) = (self.disk.clone(), path.to_owned());
        let latency = Duration::from_millis(self.latency_ms);
        async move {
            let mut state = disk.borrow_mut();
            if let OpenMode::CreateNew { size } = mode {
                if state.images.contains_key(&path) {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                state.images.insert(path.clone(), Image::new(size));
            }
            let size = state.images.get(&path).ok_or(io::ErrorKind::NotFound)?.size;
            let locks = mode != OpenMode::ReadOnly;
            if locks && state.locked.insert(path.clone(), ()).is_some() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            drop(state);
            Ok(MemoryFile { disk, path, size, latency, locks })
        }
    }
}

impl File for MemoryFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(
        &self,
        offset: u64,
        mut buffer: AlignedBuf,
    ) -> impl Future<Output = (io::Result<()>, AlignedBuf)> + 'static {
        let (disk, path) = (self.disk.clone(), self.path.clone());
        async move {
            let state = disk.borrow();
            let image = &state.images[&path];
            if offset + buffer.len() as u64 > image.size {
                return (Err(io::ErrorKind::UnexpectedEof.into()), buffer);
            }
            assert!(offset.is_multiple_of(4096) && buffer.len().is_multiple_of(4096));
            for (index, block) in buffer.chunks_exact_mut(BLOCK_SIZE).enumerate() {
                let at = offset / BLOCK_SIZE as u64 + index as u64;
                if image.unreadable.contains_key(&at) {
                    return (Err(io::Error::other("medium error")), buffer);
                }
                match image.blocks.get(&at) {
                    Some(bytes) => block.copy_from_slice(bytes),
                    None => block.fill(0),
                }
            }
            (Ok(()), buffer)
        }
    }

    fn write_at(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
    ) -> impl Future<Output = io::Result<()>> + 'static {
        let (disk, path, latency) = (self.disk.clone(), self.path.clone(), self.latency);
        async move {
            assert!(parts.iter().all(|part| ballast_block::buffer::is_block_aligned(part)));
            let bytes = Bytes::from(parts.concat());
            let number = {
                let mut state = disk.borrow_mut();
                assert!(offset + bytes.len() as u64 <= state.images[&path].size);
                let number = state.writes.len();
                state.writes.push(WriteRecord { offset, bytes: bytes.clone() });
                state.events.push(Event::Issued(number));
                number
            };
            tokio::time::sleep(latency).await;
            if disk.borrow().hang {
                std::future::pending::<()>().await;
            }
            let mut state = disk.borrow_mut();
            match &mut state.fail_write {
                Some(0) => return Err(io::Error::other("medium error")),
                Some(left) => *left -= 1,
                None => {}
            }
            state.images.get_mut(&path).expect("open").write(offset, &bytes);
            state.events.push(Event::Completed(number));
            Ok(())
        }
    }

    fn discard(&self, _: u64, _: u64) -> impl Future<Output = io::Result<()>> + 'static {
        std::future::ready(Ok(()))
    }
}

impl Clock for MemoryEnv {
    fn now(&self) -> Instant {
        Instant(self.start.elapsed().as_nanos() as u64)
    }

    fn wall_ms(&self) -> u64 {
        0
    }

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        tokio::time::sleep(duration)
    }
}

impl Planted for MemoryEnv {}

impl Entropy for MemoryEnv {
    fn random_u64(&self) -> u64 {
        let next = splitmix(self.random.get());
        self.random.set(next.0);
        next.1
    }
}

/// A small generator of random numbers.
pub fn splitmix(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state, z ^ (z >> 31))
}

impl Spawn for MemoryEnv {
    fn spawn(&self, future: impl Future<Output = ()> + 'static) -> Task {
        Task::new(tokio::task::spawn_local(future).abort_handle())
    }
}

pub struct NoListener;

impl Listener for NoListener {
    type Stream = DuplexStream;

    async fn accept(&self) -> io::Result<(DuplexStream, String)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn address(&self) -> Address {
        Address::Unix(PathBuf::new())
    }
}

impl Network for MemoryEnv {
    type Stream = DuplexStream;
    type Detached = DuplexStream;
    type Listener = NoListener;

    fn listen(&self, _: &Address) -> impl Future<Output = io::Result<NoListener>> + 'static {
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    fn connect(&self, _: &Address) -> impl Future<Output = io::Result<DuplexStream>> + 'static {
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    fn detach(&self, stream: DuplexStream) -> io::Result<DuplexStream> {
        Ok(stream)
    }

    fn adopt(&self, detached: DuplexStream) -> io::Result<DuplexStream> {
        Ok(detached)
    }
}

/// Runs a test on one thread with paused time; writers of dropped pools end before it returns.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test)
}
