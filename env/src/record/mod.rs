//! A record of what goes to disk, to check later what any power loss would have left.
//!
//! Owns the wrapper [`Recorder`] and the [`Log`] it fills; `replay` turns a prefix of the log into a
//! file. Never changes what passes through. A test, or a node that is told to, wraps its
//! environment; kill -9 can't find a missing flush, because the kernel keeps what it was given.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "images and saved records are ordinary files beside the environment, for tests"
)]

mod format;
mod replay;

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::AlignedBuf;
use bytes::Bytes;

pub use format::RecordError;

use crate::Env;
use crate::clock::{Clock, Instant};
use crate::disk::{Disk, File, OpenMode};
use crate::entropy::Entropy;
use crate::network::{Address, Network};
use crate::planted::Planted;
use crate::spawn::{Spawn, Task};

/// What happened, in the order in which it happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    files: Vec<PathBuf>,
    events: Vec<Event>,
    writes: usize,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A file was opened for writing.
    Opened {
        /// Its number: place in [`Log::files`].
        file: usize,
        /// Its size, in bytes.
        size: u64,
        /// Whether it was new, so all zeroes.
        new: bool,
    },
    /// A write was handed over: it may reach the disk from now on, whole, in part or not.
    Started {
        /// Its number, from 0 over all files.
        write: usize,
        /// The file's number.
        file: usize,
        /// Where, in bytes.
        offset: u64,
        /// What; shared with the write, not copied.
        parts: Vec<Bytes>,
    },
    /// A write returned.
    Finished {
        /// Its number.
        write: usize,
        /// Whether it was `Ok`, so that the whole write is durable.
        durable: bool,
    },
    /// A range was given back; from now on it may read as zeroes.
    Discarded {
        /// The file's number.
        file: usize,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        length: u64,
    },
}

impl Log {
    /// The files that were opened for writing, by number.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// What happened, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    fn opened(&mut self, path: &Path, size: u64, new: bool) -> usize {
        let known = self.files.iter().position(|file| file == path);
        let file = known.unwrap_or_else(|| {
            self.files.push(path.to_owned());
            self.files.len() - 1
        });
        self.events.push(Event::Opened { file, size, new });
        file
    }

    fn started(&mut self, file: usize, offset: u64, parts: Vec<Bytes>) -> usize {
        let write = self.writes;
        self.writes += 1;
        self.events.push(Event::Started { write, file, offset, parts });
        write
    }
}

/// An environment that records every write of the one inside.
///
/// The log keeps all that was written in memory: meant for runs of seconds to minutes.
#[derive(Clone)]
pub struct Recorder<E> {
    inner: E,
    log: Rc<RefCell<Log>>,
}

impl<E: Env> Recorder<E> {
    /// Records what goes through the result and its clones.
    pub fn new(inner: E) -> Self {
        Self { inner, log: Rc::default() }
    }

    /// How much happened so far.
    pub fn events(&self) -> usize {
        self.log.borrow().events.len()
    }

    /// The record so far.
    pub fn log(&self) -> Log {
        self.log.borrow().clone()
    }
}

impl<E: Env> Disk for Recorder<E> {
    type File = RecordedFile<E::File>;

    fn open(
        &self,
        path: &Path,
        mode: OpenMode,
    ) -> impl Future<Output = io::Result<Self::File>> + 'static {
        let opening = self.inner.open(path, mode);
        let (log, path) = (self.log.clone(), path.to_owned());
        async move {
            let inner = opening.await?;
            let new = matches!(mode, OpenMode::CreateNew { .. });
            let number = (mode != OpenMode::ReadOnly)
                .then(|| log.borrow_mut().opened(&path, inner.size(), new));
            Ok(RecordedFile { inner: Rc::new(inner), log, number })
        }
    }
}

/// A file whose writes are recorded.
pub struct RecordedFile<F> {
    inner: Rc<F>,
    log: Rc<RefCell<Log>>,
    /// None for a file that can't be written.
    number: Option<usize>,
}

impl<F: File> File for RecordedFile<F> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(
        &self,
        offset: u64,
        buffer: AlignedBuf,
    ) -> impl Future<Output = (io::Result<()>, AlignedBuf)> + 'static {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
    ) -> impl Future<Output = io::Result<()>> + 'static {
        let (log, number) = (self.log.clone(), self.number);
        let copy = parts.clone();
        let writing = self.inner.write_at(offset, parts);
        async move {
            let write = number.map(|file| log.borrow_mut().started(file, offset, copy));
            let result = writing.await;
            if let Some(write) = write {
                let durable = result.is_ok();
                log.borrow_mut().events.push(Event::Finished { write, durable });
            }
            result
        }
    }

    fn discard(&self, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> + 'static {
        let (log, number) = (self.log.clone(), self.number);
        let discarding = self.inner.discard(offset, length);
        async move {
            // Before it returns, even before it starts: it may happen at any time from now on.
            if let Some(file) = number {
                log.borrow_mut().events.push(Event::Discarded { file, offset, length });
            }
            discarding.await
        }
    }
}

impl<E: Env> Clock for Recorder<E> {
    fn now(&self) -> Instant {
        self.inner.now()
    }

    fn wall_ms(&self) -> u64 {
        self.inner.wall_ms()
    }

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        self.inner.sleep(duration)
    }
}

impl<E: Env> Planted for Recorder<E> {}

impl<E: Env> Entropy for Recorder<E> {
    fn random_u64(&self) -> u64 {
        self.inner.random_u64()
    }
}

impl<E: Env> Network for Recorder<E> {
    type Stream = E::Stream;
    type Detached = E::Detached;
    type Listener = E::Listener;

    fn listen(
        &self,
        address: &Address,
    ) -> impl Future<Output = io::Result<Self::Listener>> + 'static {
        self.inner.listen(address)
    }

    fn connect(
        &self,
        address: &Address,
    ) -> impl Future<Output = io::Result<Self::Stream>> + 'static {
        self.inner.connect(address)
    }

    fn detach(&self, stream: Self::Stream) -> io::Result<Self::Detached> {
        self.inner.detach(stream)
    }

    fn adopt(&self, detached: Self::Detached) -> io::Result<Self::Stream> {
        self.inner.adopt(detached)
    }
}

impl<E: Env> Spawn for Recorder<E> {
    fn spawn(&self, future: impl Future<Output = ()> + 'static) -> Task {
        self.inner.spawn(future)
    }
}
