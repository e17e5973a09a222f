//! The kernel's NBD client, configured over netlink.
//!
//! The handshake is ours, the socket then the kernel's: it needs this process no more until the
//! connection is lost. Then requests wait (`DEAD_CONNECTION`), and the watcher here gives the kernel a
//! connection to another server (`watch`). What is attached is told by each device's `backend` in /sys.

mod sockets;
mod sysfs;
mod watch;

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use super::{Attacher, Attachment, State};
use crate::context::Address;
use crate::host::netlink::{self, Family, attribute};
use crate::host::{HostError, disks, files, poll, tools, within};
use sockets::{NotOpen, Opened};
use sysfs::{backend, devices, path_of};

const FAMILY: &str = "nbd";
const NOTICES: &str = "nbd_mc_group";
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const LINK_DEAD: u8 = 4;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONNECTION_TIMEOUT: u16 = 8;
const BACKEND: u16 = 10;
const SOCKET_ITEM: u16 = 1;
const SOCKET_FD: u16 = 1;

/// Seconds without a connection after which requests fail: longer than any repair that a pod should
/// survive, short enough that a host which lost its cluster for good can be emptied.
const DEAD_CONNECTION: u64 = 600;

/// Seconds without an answer after which a connection counts as lost, and its requests are asked
/// again elsewhere: longer than a volume takes to go on when a node is lost. Also what a request
/// takes that was under way on a connection that is lost: only then does the kernel ask again.
const REQUEST: u64 = 10;

/// How long all servers together may take to open the export.
const OPEN_TIME: Duration = Duration::from_secs(20);

/// How long the kernel may take to take over, or let go of, a device.
const DEVICE_TIME: Duration = Duration::from_secs(20);

/// How long a block may take to be read from a server that is well.
const ANSWER_TIME: Duration = Duration::from_secs(3);

/// What the kernel takes to notice, on both of its sides, that a connection was hung up.
const NOTICE_TIME: Duration = Duration::from_millis(100);

const BLOCK: u64 = 4096;

/// Devices of the kernel.
#[derive(Debug)]
pub struct KernelAttacher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Where the addresses of attachments lie, for a watcher of a later life.
    folder: PathBuf,
    /// The sockets that this life of the process gave to the kernel, by device, to hang up with. Held
    /// through every change: two changes at a time would tear each other's connections.
    sockets: Mutex<BTreeMap<u32, Vec<TcpStream>>>,
    /// Connections that a device is to have.
    connections: u16,
}

/// Whether this kernel has the client.
pub fn is_there() -> bool {
    Path::new("/sys/module/nbd").exists() && Family::open(FAMILY).is_ok()
}

impl KernelAttacher {
    /// Keeps its files below `folder`, gives each device so many connections, and watches over them
    /// until the process ends.
    ///
    /// # Errors
    /// When the kernel has no NBD client.
    pub fn new(folder: &Path, connections: u16) -> Result<KernelAttacher, HostError> {
        let folder = folder.join("attach");
        files::make_folder(&folder)?;
        let none = |error: Errno| {
            HostError::Unexpected(format!(
                "the kernel's NBD client is not there ({error}): `modprobe nbd`, or use --nbd fuse"
            ))
        };
        let notices =
            Family::open(FAMILY).and_then(|family| family.listen(NOTICES)).map_err(none)?;
        let shared = Arc::new(Shared { folder, sockets: Mutex::default(), connections });
        let watcher = Arc::clone(&shared);
        std::thread::spawn(move || watch::watch(&watcher, &notices));
        Ok(KernelAttacher { shared })
    }
}

/// Has the kernel give a device up: what waits for a server fails, now and from now on.
fn disconnect(index: u32) -> Result<(), HostError> {
    let mut family = Family::open(FAMILY).map_err(refused("be asked"))?;
    match family.ask(DISCONNECT, &attribute(INDEX, &index.to_le_bytes())) {
        // Disconnected already.
        Ok(_) | Err(Errno::EINVAL | Errno::ENODEV) => Ok(()),
        Err(error) => Err(refused("disconnect")(error)),
    }
}

fn number(kind: u16, value: u64) -> Vec<u8> {
    attribute(kind, &value.to_le_bytes())
}

fn refused(what: &str) -> impl FnOnce(Errno) -> HostError {
    let what = what.to_owned();
    move |error| {
        HostError::Unexpected(format!("the kernel's NBD client refuses to {what} ({error})"))
    }
}

impl Shared {
    fn connect(&self, attachment: &Attachment) -> Result<u32, HostError> {
        let connections = self.connections.min(sysfs::processors());
        let opened = sockets::open(attachment, connections, OPEN_TIME)?;
        let backend = format!("{}\0", backend(attachment));
        let request = [
            number(SIZE_BYTES, opened.size()),
            number(BLOCK_SIZE_BYTES, BLOCK),
            number(TIMEOUT, REQUEST),
            number(DEAD_CONNECTION_TIMEOUT, DEAD_CONNECTION),
            number(SERVER_FLAGS, u64::from(opened.flags())),
            attribute(BACKEND, backend.as_bytes()),
            opened.attributes(),
        ]
        .concat();
        let mut family = Family::open(FAMILY).map_err(refused("be asked"))?;
        let answer = family.ask(CONNECT, &request).map_err(refused("connect"))?;
        let index = netlink::find(&answer, INDEX).and_then(|index| index.try_into().ok());
        let index = index.map(u32::from_le_bytes);
        let index = index.ok_or_else(|| refused("name its device")(Errno::EPROTO))?;
        self.keep(&mut self.sockets(), index, attachment, opened)?;
        Ok(index)
    }

    fn sockets(&self) -> MutexGuard<'_, BTreeMap<u32, Vec<TcpStream>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what a later change, in this life or the next, hangs up with.
    fn keep(
        &self,
        sockets: &mut BTreeMap<u32, Vec<TcpStream>>,
        index: u32,
        attachment: &Attachment,
        opened: Opened,
    ) -> Result<(), HostError> {
        let unknown = |error: std::io::Error| HostError::Unexpected(error.to_string());
        let streams = opened.into_streams().map_err(unknown)?;
        let locals: Result<Vec<_>, _> = streams.iter().map(TcpStream::local_addr).collect();
        let locals: Vec<String> =
            locals.map_err(unknown)?.iter().map(ToString::to_string).collect();
        sockets.insert(index, streams);
        let addresses: Vec<&str> = attachment.addresses.iter().map(Address::as_str).collect();
        let text = format!("{}\n{}\n", addresses.join(","), locals.join(","));
        files::write_atomically(&self.folder.join(&attachment.volume_id), text.as_bytes())
    }

    /// Servers of a volume, and the near ends of its connections.
    fn kept(&self, volume_id: &str) -> (Vec<Address>, Vec<String>) {
        let text = std::fs::read_to_string(self.folder.join(volume_id)).unwrap_or_default();
        let mut lines = text.lines();
        let addresses = crate::context::parse_addresses(lines.next().unwrap_or_default());
        let locals = lines.next().unwrap_or_default().split(',').filter(|local| !local.is_empty());
        (addresses.unwrap_or_default(), locals.map(str::to_owned).collect())
    }

    /// Ends a device's connections from this side: the kernel then asks on the next ones what had no
    /// answer.
    fn hang_up(&self, sockets: &mut BTreeMap<u32, Vec<TcpStream>>, index: u32, volume_id: &str) {
        if let Some(streams) = sockets.remove(&index) {
            sockets::hang_up(&streams);
            return;
        }
        for local in self.kept(volume_id).1 {
            let ended = tools::must("ss", &["--kill", "--tcp", "src", &local], DEVICE_TIME);
            if let Err(error) = ended {
                tracing::warn!(%error, index, "a connection of a former life can't be ended");
            }
        }
    }

    /// Gives the kernel new connections in the place of those that it had, and with them the size
    /// that the volume has now. Where there will never be one, because the lease has ended, the
    /// device is given up: its users hear of it at once, and not when the kernel's patience ends.
    fn reconnect(
        &self,
        sockets: &mut BTreeMap<u32, Vec<TcpStream>>,
        index: u32,
        attachment: &Attachment,
        connections: u16,
        time: Duration,
    ) -> Result<(), HostError> {
        self.hang_up(sockets, index, &attachment.volume_id);
        let backend = format!("{}\0", backend(attachment));
        let device =
            [attribute(INDEX, &index.to_le_bytes()), attribute(BACKEND, backend.as_bytes())]
                .concat();
        let reconfigure = |what: Vec<u8>| {
            let request = [device.clone(), what].concat();
            Family::open(FAMILY).and_then(|mut family| family.ask(RECONFIGURE, &request))
        };
        // First the sockets: a new size waits for requests under way, and they for a connection. The
        // kernel takes a socket only in the place of one that it knows to be lost, says yes either
        // way, and may end the new one when it notices the loss a second time: what counts is that
        // the device answers, and a socket that did not do is not offered again.
        let connected = poll(time, || {
            std::thread::sleep(NOTICE_TIME);
            let opened = match sockets::open(attachment, connections, Duration::ZERO) {
                Ok(opened) => opened,
                Err(NotOpen::LeaseOver(error)) => return Some(Err(error)),
                Err(NotOpen::Yet(_)) => return None,
            };
            if reconfigure(opened.attributes()).is_ok()
                && can_be_read(&path_of(index), 0, ANSWER_TIME)
            {
                return Some(Ok(opened));
            }
            opened.hang_up();
            None
        });
        let opened = match connected {
            Some(Ok(opened)) => opened,
            Some(Err(error)) => {
                tracing::error!(index, %error, "the lease is over: every request fails from now on");
                disconnect(index)?;
                return Err(NotOpen::LeaseOver(error).into());
            }
            None => {
                let what = format!("the new connection of {}", path_of(index).display());
                return Err(HostError::Slow { what, after: time });
            }
        };
        reconfigure(number(SIZE_BYTES, opened.size())).map_err(refused("take a new size"))?;
        self.keep(sockets, index, attachment, opened)
    }
}

fn can_be_read(device: &Path, offset: u64, time: Duration) -> bool {
    let device = device.to_owned();
    let read = move || disks::read_past_caches(&device, offset);
    within("reading the device", time, read).unwrap_or(false)
}

impl Attacher for KernelAttacher {
    fn name(&self) -> &'static str {
        "kernel"
    }

    fn state(&self, attachment: &Attachment) -> Result<State, HostError> {
        let of_volume = format!("ballast/{}/", attachment.volume_id);
        let found = devices().into_iter().find(|(_, backend)| backend.starts_with(&of_volume));
        Ok(match found {
            None => State::None,
            Some((index, it)) if it == backend(attachment) => State::Attached(path_of(index)),
            Some(_) => State::Broken,
        })
    }

    fn attach(&self, attachment: &Attachment) -> Result<PathBuf, HostError> {
        match self.state(attachment)? {
            State::Attached(device) if can_be_read(&device, 0, DEVICE_TIME) => return Ok(device),
            State::None => {}
            _ => self.detach(attachment)?,
        }
        let device = path_of(self.shared.connect(attachment)?);
        // The node in /dev and its size come a moment later.
        let there = || can_be_read(&device, 0, ANSWER_TIME).then_some(());
        poll(DEVICE_TIME, there).map(|()| device.clone()).ok_or_else(|| HostError::Slow {
            what: format!("the device {}", device.display()),
            after: DEVICE_TIME,
        })
    }

    fn grow(&self, attachment: &Attachment, at_least: u64) -> Result<u64, HostError> {
        let of_device = backend(attachment);
        let device = devices().into_iter().find(|(_, backend)| *backend == of_device);
        let missing = || HostError::Unexpected(format!("{} is not attached", attachment.export));
        let (index, _) = device.ok_or_else(missing)?;
        if disks::size(&path_of(index))? < at_least {
            let connections = if attachment.read_only { sysfs::queues(index) } else { 1 };
            let mut sockets = self.shared.sockets();
            self.shared.reconnect(&mut sockets, index, attachment, connections, DEVICE_TIME)?;
        }
        let grown = || disks::size(&path_of(index)).ok().filter(|size| *size >= at_least);
        poll(DEVICE_TIME, grown).ok_or_else(|| HostError::Slow {
            what: format!("the growth of {}", path_of(index).display()),
            after: DEVICE_TIME,
        })
    }

    fn answers(&self, attachment: &Attachment, time: Duration) -> bool {
        match self.state(attachment) {
            Ok(State::Attached(device)) => can_be_read(&device, 0, time),
            _ => false,
        }
    }

    fn abort(&self, attachment: &Attachment) -> Result<(), HostError> {
        let of_volume = format!("ballast/{}/", attachment.volume_id);
        for (index, _) in devices().iter().filter(|(_, it)| it.starts_with(&of_volume)) {
            disconnect(*index)?;
        }
        Ok(())
    }

    fn detach(&self, attachment: &Attachment) -> Result<(), HostError> {
        self.abort(attachment)?;
        let gone = || matches!(self.state(attachment), Ok(State::None)).then_some(());
        poll(DEVICE_TIME, gone).ok_or_else(|| HostError::Slow {
            what: format!("the disconnection of {}", attachment.export),
            after: DEVICE_TIME,
        })?;
        files::remove(&self.shared.folder.join(&attachment.volume_id))
    }
}
