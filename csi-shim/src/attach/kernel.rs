//! The kernel's NBD client, configured over netlink.
//!
//! The handshake is ours, the socket then the kernel's: it needs this process no more until the
//! connection is lost. Then requests wait (`DEAD_CONNECTION`), and the watcher here gives the kernel a
//! connection to another server. What is attached is told by each device's `backend` in /sys.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::{Attacher, Attachment, State};
use crate::context::Address;
use crate::host::netlink::{self, Family, attribute, nested};
use crate::host::{HostError, disks, files, poll, tools, within};
use crate::link::nbd::{self, ConnectError, Export};

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

/// How long the watcher waits for a notice, with nothing to do and with a device that has no server.
const QUIET_TIME: Duration = Duration::from_secs(60);
const RETRY_TIME: Duration = Duration::from_secs(1);

/// How long one look for a server takes at most, but for servers that do not answer: others wait.
const REPAIR_TIME: Duration = Duration::from_secs(2);

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
    sockets: Mutex<BTreeMap<u32, TcpStream>>,
}

/// Whether this kernel has the client.
pub fn is_there() -> bool {
    Path::new("/sys/module/nbd").exists() && Family::open(FAMILY).is_ok()
}

impl KernelAttacher {
    /// Keeps its files below `folder`, and watches over connections until the process ends.
    ///
    /// # Errors
    /// When the kernel has no NBD client.
    pub fn new(folder: &Path) -> Result<KernelAttacher, HostError> {
        let folder = folder.join("attach");
        files::make_folder(&folder)?;
        let none = |error: Errno| {
            HostError::Unexpected(format!(
                "the kernel's NBD client is not there ({error}): `modprobe nbd`, or use --nbd fuse"
            ))
        };
        let notices =
            Family::open(FAMILY).and_then(|family| family.listen(NOTICES)).map_err(none)?;
        let shared = Arc::new(Shared { folder, sockets: Mutex::default() });
        let watcher = Arc::clone(&shared);
        std::thread::spawn(move || watcher.watch(&notices));
        Ok(KernelAttacher { shared })
    }
}

/// What `backend` says of a device of ours.
fn backend(attachment: &Attachment) -> String {
    format!("ballast/{}/{}", attachment.volume_id, attachment.export)
}

/// The devices that the kernel has, with what their `backend` says.
fn devices() -> Vec<(u32, String)> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let device = |entry: std::fs::DirEntry| {
        let number = entry.file_name().to_str()?.strip_prefix("nbd")?.parse().ok()?;
        let backend = std::fs::read_to_string(entry.path().join("backend")).ok()?;
        // Only a connected device has a pid.
        entry.path().join("pid").exists().then(|| (number, backend.trim().to_owned()))
    };
    let mut found: Vec<(u32, String)> = entries.filter_map(device).collect();
    found.sort();
    found
}

/// The volume's id and the export of a device, if it is one of ours.
fn ours(index: u32) -> Option<(String, String)> {
    let (_, backend) = devices().into_iter().find(|(it, _)| *it == index)?;
    let (volume_id, export) = backend.strip_prefix("ballast/")?.split_once('/')?;
    Some((volume_id.to_owned(), export.to_owned()))
}

fn path_of(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// Why no server opens an export.
enum NotOpen {
    /// None ever will again: its lease has ended.
    LeaseOver(ConnectError),
    /// None does now.
    Yet(HostError),
}

impl From<NotOpen> for HostError {
    fn from(not_open: NotOpen) -> HostError {
        match not_open {
            NotOpen::LeaseOver(error) => HostError::LeaseOver(error.to_string()),
            NotOpen::Yet(error) => error,
        }
    }
}

/// Opens the export at the first server that does, within so much time, or one round over all.
fn open_anywhere(attachment: &Attachment, time: Duration) -> Result<Export, NotOpen> {
    let failed = |error: &dyn std::fmt::Display| HostError::Unexpected(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| NotOpen::Yet(failed(&error)))?;
    let start = std::time::Instant::now();
    loop {
        let mut last = failed(&"no NBD address is known");
        for address in &attachment.addresses {
            match runtime.block_on(nbd::connect(address, &attachment.export)) {
                Ok(export) => return Ok(export),
                Err(error @ ConnectError::Refused { for_good: true, .. }) => {
                    return Err(NotOpen::LeaseOver(error));
                }
                Err(error) => last = failed(&error),
            }
        }
        if start.elapsed() >= time {
            return Err(NotOpen::Yet(last));
        }
        std::thread::sleep(Duration::from_millis(300));
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

/// The attributes that hand a socket over. The kernel takes a reference of its own.
fn socket_attributes(export: &Export) -> Vec<u8> {
    let descriptor = export.stream.as_raw_fd() as u32;
    let item = attribute(SOCKET_FD, &descriptor.to_le_bytes());
    nested(SOCKETS, &nested(SOCKET_ITEM, &item))
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
        let export = open_anywhere(attachment, OPEN_TIME)?;
        let backend = format!("{}\0", backend(attachment));
        let request = [
            number(SIZE_BYTES, export.size),
            number(BLOCK_SIZE_BYTES, BLOCK),
            number(TIMEOUT, REQUEST),
            number(DEAD_CONNECTION_TIMEOUT, DEAD_CONNECTION),
            number(SERVER_FLAGS, u64::from(export.flags)),
            attribute(BACKEND, backend.as_bytes()),
            socket_attributes(&export),
        ]
        .concat();
        let mut family = Family::open(FAMILY).map_err(refused("be asked"))?;
        let answer = family.ask(CONNECT, &request).map_err(refused("connect"))?;
        let index = netlink::find(&answer, INDEX).and_then(|index| index.try_into().ok());
        let index = index.map(u32::from_le_bytes);
        let index = index.ok_or_else(|| refused("name its device")(Errno::EPROTO))?;
        self.keep(&mut self.sockets(), index, attachment, export)?;
        Ok(index)
    }

    fn sockets(&self) -> MutexGuard<'_, BTreeMap<u32, TcpStream>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what a later change, in this life or the next, hangs up with.
    fn keep(
        &self,
        sockets: &mut BTreeMap<u32, TcpStream>,
        index: u32,
        attachment: &Attachment,
        export: Export,
    ) -> Result<(), HostError> {
        let unknown = |error: std::io::Error| HostError::Unexpected(error.to_string());
        let stream = export.stream.into_std().map_err(unknown)?;
        let local = stream.local_addr().map_err(unknown)?.to_string();
        sockets.insert(index, stream);
        self.keep_addresses(attachment, &local)
    }

    /// Ends a device's connection from this side: the kernel then asks on the next one what had no
    /// answer.
    fn hang_up(&self, sockets: &mut BTreeMap<u32, TcpStream>, index: u32, volume_id: &str) {
        if let Some(stream) = sockets.remove(&index) {
            // It may be lost already.
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
        let Some(local) = self.kept(volume_id).1 else { return };
        let ended = tools::must("ss", &["--kill", "--tcp", "src", &local], DEVICE_TIME);
        if let Err(error) = ended {
            tracing::warn!(%error, index, "the connection of a former life can't be ended");
        }
    }

    /// Gives the kernel a new connection in the place of the one that it had, and with it the size
    /// that the volume has now. Where there will never be one, because the lease has ended, the
    /// device is given up: its users hear of it at once, and not when the kernel's patience ends.
    fn reconnect(
        &self,
        sockets: &mut BTreeMap<u32, TcpStream>,
        index: u32,
        attachment: &Attachment,
        time: Duration,
    ) -> Result<(), HostError> {
        self.hang_up(sockets, index, &attachment.volume_id);
        let backend = format!("{}\0", backend(attachment));
        let device =
            [attribute(INDEX, &index.to_le_bytes()), attribute(BACKEND, backend.as_bytes())]
                .concat();
        // First the socket: a new size waits for requests under way, and they for a connection. The
        // kernel takes a socket only in the place of one that it knows to be lost, says yes either
        // way, and may end the new one when it notices the loss a second time: what counts is that
        // the device answers, and a socket that did not do is not offered again.
        let connected = poll(time, || {
            std::thread::sleep(NOTICE_TIME);
            let export = match open_anywhere(attachment, Duration::ZERO) {
                Ok(export) => export,
                Err(NotOpen::LeaseOver(error)) => return Some(Err(error)),
                Err(NotOpen::Yet(_)) => return None,
            };
            let socket = [device.clone(), socket_attributes(&export)].concat();
            Family::open(FAMILY).and_then(|mut family| family.ask(RECONFIGURE, &socket)).ok()?;
            can_be_read(&path_of(index), 0, ANSWER_TIME).then_some(Ok(export))
        });
        let export = match connected {
            Some(Ok(export)) => export,
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
        let size = [device, number(SIZE_BYTES, export.size)].concat();
        Family::open(FAMILY)
            .and_then(|mut family| family.ask(RECONFIGURE, &size))
            .map_err(refused("take a new size"))?;
        self.keep(sockets, index, attachment, export)
    }

    /// Looks after devices for ever: those that the kernel tells of, and again those that have found
    /// no server so far.
    fn watch(&self, notices: &netlink::Notices) {
        let all = || devices().into_iter().map(|(index, _)| index).collect::<BTreeSet<u32>>();
        let (mut suspects, mut lost) = (all(), BTreeSet::new());
        loop {
            lost.append(&mut suspects.into_iter().filter(|index| self.is_lost(*index)).collect());
            lost.retain(|index| !self.repair(*index));
            let time = if lost.is_empty() { QUIET_TIME } else { RETRY_TIME };
            suspects = match notices.next(time) {
                Ok(notices) => {
                    let dead = notices.iter().filter(|(command, _)| *command == LINK_DEAD);
                    let index = |attributes| netlink::find(attributes, INDEX)?.try_into().ok();
                    dead.filter_map(|(_, it)| index(it)).map(u32::from_le_bytes).collect()
                }
                // Some were lost: look at all.
                Err(Errno::ENOBUFS) => all(),
                Err(_) => BTreeSet::new(),
            };
        }
    }

    /// Whether a device has no connection that works.
    fn is_lost(&self, index: u32) -> bool {
        let hung_up = |stream: &TcpStream| {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            match recv(stream.as_raw_fd(), &mut [0], flags) {
                Ok(0) => true,
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => false,
                Err(_) => true,
            }
        };
        let known = self.sockets().get(&index).is_some_and(hung_up);
        ours(index).is_some() && (known || !can_be_read(&path_of(index), 0, ANSWER_TIME))
    }

    /// Finds a server for a device that has lost its own. Whether there is no more to do.
    fn repair(&self, index: u32) -> bool {
        let Some((volume_id, export)) = ours(index) else { return true };
        tracing::warn!(index, export, "connection lost: looking for a server");
        let attachment = Attachment {
            read_only: export.contains("@ro"),
            addresses: self.kept(&volume_id).0,
            volume_id,
            export,
        };
        let repaired = self.reconnect(&mut self.sockets(), index, &attachment, REPAIR_TIME);
        let export = attachment.export;
        match &repaired {
            Ok(()) => tracing::info!(index, export, "connected again"),
            Err(error) => tracing::error!(index, export, %error, "not connected"),
        }
        repaired.is_ok()
    }

    /// Servers of a volume, and the near end of its connection.
    fn kept(&self, volume_id: &str) -> (Vec<Address>, Option<String>) {
        let text = std::fs::read_to_string(self.folder.join(volume_id)).unwrap_or_default();
        let mut lines = text.lines();
        let addresses = crate::context::parse_addresses(lines.next().unwrap_or_default());
        (addresses.unwrap_or_default(), lines.next().map(str::to_owned))
    }

    fn keep_addresses(&self, attachment: &Attachment, local: &str) -> Result<(), HostError> {
        let addresses: Vec<&str> = attachment.addresses.iter().map(Address::as_str).collect();
        let path = self.folder.join(&attachment.volume_id);
        let text = format!("{}\n{local}\n", addresses.join(","));
        files::write_atomically(&path, text.as_bytes())
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
            self.shared.reconnect(&mut self.shared.sockets(), index, attachment, DEVICE_TIME)?;
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
