//! The link process: a volume as a file, for a loop device. For development.
//!
//! Started by the node service for each volume where the kernel has no NBD client, and independent
//! of it from then on. Turns each request of the kernel into one of NBD and back. When its server is
//! lost, it goes on at another one and asks again what had no answer: users see a pause. On SIGHUP it
//! opens the export anew, to learn the volume's new size.
//!
//! A process that serves its own host's file system can wait for itself when memory is short. That
//! is why this is not for production.

pub mod fuse;
pub mod nbd;
mod upstream;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use nix::errno::Errno;
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::context::Address;
use fuse::Operation;
use nbd::{Command, ConnectError, Meaning};
use upstream::{Event, Upstream};

/// The word on the command line that makes a link of this program.
pub const SUBCOMMAND: &str = "fuse-link";

/// The exit code of a link that was told that its lease is over.
pub const LEASE_OVER_EXIT: u8 = 3;

/// Requests without an answer, at most: above, nothing more is read from the kernel.
const WAITING_MAX: usize = 128;

/// The link's command line.
#[derive(Clone, Debug, Parser)]
#[command(name = "ballast-csi fuse-link", about = "Serves a volume as a file (internal)")]
pub struct LinkCli {
    /// The file to mount over.
    #[arg(long)]
    pub file: PathBuf,
    /// The NBD export.
    #[arg(long)]
    pub export: String,
    /// Servers, the best first.
    #[arg(long = "address", value_parser = crate::cli::parse_address, required = true)]
    pub addresses: Vec<Address>,
    /// For reading only.
    #[arg(long)]
    pub read_only: bool,
    /// Seconds without a server after which requests fail.
    #[arg(long, default_value_t = 600)]
    pub patience: u64,
}

/// Serves until the file is unmounted.
///
/// # Errors
/// When no server opens the export, or the file can't be mounted over.
pub fn run(cli: &LinkCli) -> Result<(), LinkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut upstream = Upstream::new(&cli.export, &cli.addresses);
        // The mount says that the link is ready: no sooner than a server is there.
        let size = upstream.first().await?;
        let device = fuse::mount_over(&cli.file, cli.read_only)?;
        // An unmount is told as an error. What the deprecation warns of, a descriptor that changes its owner, a `File` can't do.
        #[allow(deprecated)]
        let device = AsyncFd::with_interest(device, Interest::READABLE | Interest::ERROR)?;
        tracing::info!(file = %cli.file.display(), size, "serving");
        let patience = Duration::from_secs(cli.patience);
        let read_only = cli.read_only;
        let waiting = BTreeMap::new();
        let mut link = Link {
            device,
            upstream,
            waiting,
            sequence: 0,
            size,
            read_only,
            patience,
            ended: false,
        };
        link.serve().await?;
        Ok(())
    })
}

/// Why a link ends badly.
#[derive(Debug, Error)]
pub enum LinkError {
    /// No server opened the export.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The host refuses, or the device failed.
    #[error(transparent)]
    Host(#[from] io::Error),
}

impl LinkError {
    /// For the exit of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            LinkError::Connect(ConnectError::Refused { meaning: Meaning::LeaseOver, .. }) => {
                LEASE_OVER_EXIT
            }
            _ => 1,
        }
    }
}

struct Waiting {
    unique: u64,
    /// For the reply.
    written: Option<u32>,
    /// The whole request, to be sent again.
    bytes: Bytes,
}

struct Link {
    device: AsyncFd<File>,
    upstream: Upstream,
    /// By cookie. The lower half of a cookie is the length of the data that the reply brings.
    waiting: BTreeMap<u64, Waiting>,
    sequence: u32,
    size: u64,
    read_only: bool,
    patience: Duration,
    ended: bool,
}

impl Link {
    async fn serve(&mut self) -> io::Result<()> {
        let mut grown = signal(SignalKind::hangup())?;
        let mut buffer = vec![0; fuse::REQUEST_BYTES];
        while !self.ended {
            let out_of_patience = self.upstream.lost_at().map(|lost| lost + self.patience);
            let give_up = !self.waiting.is_empty() && out_of_patience.is_some();
            tokio::select! {
                biased;
                event = self.upstream.next() => self.event(event),
                _ = grown.recv() => self.upstream.reopen(),
                () = tokio::time::sleep_until(out_of_patience.unwrap_or_else(Instant::now)),
                    if give_up => self.fail_all(),
                ready = self.device.ready(Interest::READABLE | Interest::ERROR), if self.waiting.len() < WAITING_MAX => {
                    let mut ready = ready?;
                    match ready.try_io(|device| device.get_ref().read(&mut buffer)) {
                        Ok(Ok(length)) => self.request(&buffer[..length]),
                        Ok(Err(error)) => self.reading_failed(&error)?,
                        Err(_not_ready) => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn reading_failed(&mut self, error: &io::Error) -> io::Result<()> {
        match error.raw_os_error().map(Errno::from_raw) {
            // Unmounted.
            Some(Errno::ENODEV) => self.ended = true,
            // A request was taken back while it was read.
            Some(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => {}
            _ => return Err(io::Error::other(format!("/dev/fuse: {error}"))),
        }
        Ok(())
    }

    fn request(&mut self, bytes: &[u8]) {
        let Some(request) = fuse::parse(bytes) else { return };
        let unique = request.unique;
        match request.operation {
            Operation::Init { major, flags } => {
                let answer =
                    if major >= 7 { Ok(fuse::init_body(flags)) } else { Err(Errno::EPROTO) };
                self.reply(unique, answer);
            }
            Operation::GetAttributes => {
                self.reply(unique, Ok(fuse::attributes_body(self.size, self.read_only)));
            }
            Operation::Open => self.reply(unique, Ok(fuse::open_body())),
            Operation::StatFs => self.reply(unique, Ok(fuse::statfs_body(self.size))),
            Operation::Close => self.reply(unique, Ok(Vec::new())),
            Operation::Forget => {}
            Operation::Destroy => self.ended = true,
            Operation::Read { offset, length } => self.read(unique, offset, length),
            Operation::Write { .. } | Operation::Zero { .. } if self.read_only => {
                self.reply(unique, Err(Errno::EROFS));
            }
            Operation::Write { offset, data } => {
                let length = data.len() as u32;
                self.send(unique, Command::Write, offset, length, data);
            }
            Operation::Zero { offset, length } => match u32::try_from(length) {
                Ok(length) => self.send(unique, Command::WriteZeroes, offset, length, &[]),
                Err(_) => self.reply(unique, Err(Errno::EINVAL)),
            },
            Operation::Sync => self.send(unique, Command::Flush, 0, 0, &[]),
            Operation::Other(_) => self.reply(unique, Err(Errno::ENOSYS)),
        }
    }

    /// The page cache reads ahead of the end: what lies behind it is nothing.
    fn read(&mut self, unique: u64, offset: u64, length: u32) {
        let there = self.size.saturating_sub(offset).min(u64::from(length)) as u32;
        match there {
            0 => self.reply(unique, Ok(Vec::new())),
            there => self.send(unique, Command::Read, offset, there, &[]),
        }
    }

    fn send(&mut self, unique: u64, command: Command, offset: u64, length: u32, data: &[u8]) {
        if self.upstream.refused_for_good()
            || self.upstream.lost_at().is_some_and(|lost| lost.elapsed() > self.patience)
        {
            self.reply(unique, Err(Errno::EIO));
            return;
        }
        let answered = if command == Command::Read { length } else { 0 };
        self.sequence = self.sequence.wrapping_add(1);
        let cookie = u64::from(self.sequence) << 32 | u64::from(answered);
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend(nbd::request(command, cookie, offset, length));
        bytes.extend(data);
        let bytes = Bytes::from(bytes);
        self.upstream.send(bytes.clone());
        let written = (command == Command::Write).then_some(length);
        self.waiting.insert(cookie, Waiting { unique, written, bytes });
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Opened { size } => {
                self.size = size;
                for waiting in self.waiting.values() {
                    self.upstream.send(waiting.bytes.clone());
                }
            }
            Event::Reply { cookie, error, data } => {
                let Some(waiting) = self.waiting.remove(&cookie) else { return };
                let body = match waiting.written {
                    Some(length) => fuse::write_body(length),
                    None => data,
                };
                let answer = if error == 0 { Ok(body) } else { Err(local_error(error)) };
                self.reply(waiting.unique, answer);
            }
            Event::Refused => self.fail_all(),
        }
    }

    fn fail_all(&mut self) {
        tracing::error!(requests = self.waiting.len(), "no server for too long: I/O errors");
        for waiting in std::mem::take(&mut self.waiting).into_values() {
            self.reply(waiting.unique, Err(Errno::EIO));
        }
    }

    fn reply(&self, unique: u64, answer: Result<Vec<u8>, Errno>) {
        let answer = answer.as_deref().map_err(|errno| *errno as i32);
        if let Err(error) = fuse::reply(self.device.get_ref(), unique, answer) {
            // The kernel takes requests back that were interrupted, and all of them at the end.
            tracing::debug!(unique, %error, "a reply was not wanted");
        }
    }
}

/// NBD's error numbers are Linux's.
fn local_error(number: u32) -> Errno {
    match Errno::from_raw(i32::try_from(number).unwrap_or(0)) {
        known @ (Errno::EPERM | Errno::ENOSPC | Errno::EINVAL | Errno::ENOMEM) => known,
        _ => Errno::EIO,
    }
}
