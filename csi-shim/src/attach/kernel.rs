//! The kernel's NBD client, configured over netlink.
//!
//! The handshake is ours, the socket then the kernel's: it needs this process no more until the
//! connection is lost. Then requests wait (`DEAD_CONNECTION_SECONDS`), and the watcher here gives the kernel a
//! connection to another server (`watch`). What is attached is told by each device's `backend` in /sys.

mod given_up;
mod grow;
mod kept;
mod sockets;
mod sysfs;
mod watch;

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use super::{Attacher, Attachment, IsDeleted, State};
use crate::host::netlink::{self, Family, attribute};
use crate::host::{HostError, disks, files, poll, tools, within};
use crate::limits::{
    ANSWER_TIME, DEAD_CONNECTION_SECONDS, DEVICE_TIME, NOTICE_TIME, OPEN_TIME, REQUEST_SECONDS,
};
use crate::steps::{self, Step};
use given_up::{GivenUp, disconnect_of};
use kept::{Ends, Keeper, Kept};
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

const BLOCK: u64 = 4096;

/// Devices of the kernel.
pub struct KernelAttacher {
    shared: Arc<Shared>,
}

struct Shared {
    /// What a later life has to know.
    keeper: Keeper,
    /// The devices that this life of the process has touched.
    held: Mutex<BTreeMap<u32, Arc<Mutex<Streams>>>>,
    given_up: GivenUp,
    /// Connections that a device is to have.
    connections: u16,
    is_deleted: IsDeleted,
}

/// The sockets that this life of the process gave to the kernel for a device, to hang up with: none,
/// when an earlier life did. Held through every change of the device: two changes at a time would tear
/// each other's connections.
type Streams = Vec<TcpStream>;

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
    pub fn new(
        folder: &Path,
        connections: u16,
        is_deleted: IsDeleted,
    ) -> Result<KernelAttacher, HostError> {
        let folder = folder.join("attach");
        files::make_folder(&folder)?;
        let none = |error: Errno| {
            HostError::Unexpected(format!(
                "the kernel's NBD client is not there ({error}): `modprobe nbd`, or use --nbd fuse"
            ))
        };
        let notices =
            Family::open(FAMILY).and_then(|family| family.listen(NOTICES)).map_err(none)?;
        let (held, keeper) = (Mutex::default(), Keeper::new(folder));
        let given_up = GivenUp::in_earlier_lives(&keeper);
        let shared = Arc::new(Shared { keeper, held, given_up, connections, is_deleted });
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
            number(TIMEOUT, REQUEST_SECONDS),
            number(DEAD_CONNECTION_TIMEOUT, DEAD_CONNECTION_SECONDS),
            number(SERVER_FLAGS, u64::from(opened.flags())),
            attribute(BACKEND, backend.as_bytes()),
            opened.attributes(),
        ]
        .concat();
        let kept = Kept { addresses: attachment.addresses.clone(), ..of_opened(&opened)? };
        self.keeper.begin(&attachment.volume_id, &kept)?;
        self.given_up.let_go(&attachment.volume_id);
        steps::reached(Step::ConnectionKept);
        let mut family = Family::open(FAMILY).map_err(refused("be asked"))?;
        let answer = family.ask(CONNECT, &request).map_err(refused("connect"))?;
        steps::reached(Step::KernelConnected);
        let index = netlink::find(&answer, INDEX).and_then(|index| index.try_into().ok());
        let index = index.map(u32::from_le_bytes);
        let index = index.ok_or_else(|| refused("name its device")(Errno::EPROTO))?;
        *locked(&self.device(index)) = opened.into_streams().map_err(unknown)?;
        Ok(index)
    }

    fn device(&self, index: u32) -> Arc<Mutex<Streams>> {
        Arc::clone(locked(&self.held).entry(index).or_default())
    }

    /// Ends a device's connections from this side: the kernel then asks on the next ones what had no
    /// answer.
    fn hang_up(&self, streams: &mut Streams, index: u32, volume_id: &str) {
        if !streams.is_empty() {
            sockets::hang_up(&std::mem::take(streams));
            return;
        }
        for Ends { near, far } in self.keeper.read(volume_id).ends {
            // Other connections of this host may have the same near end.
            let far = far.iter().flat_map(|far| ["and", "dst", far]);
            let which: Vec<&str> = ["src", near.as_str()].into_iter().chain(far).collect();
            let ended =
                tools::must("ss", &[&["--kill", "--tcp"], &which[..]].concat(), DEVICE_TIME);
            if let Err(error) = ended {
                tracing::warn!(%error, index, "a connection of a former life can't be ended");
            }
        }
    }

    /// Gives the kernel new connections in the place of those that it had, and with them the size
    /// that the volume has now. Where there will never be one, because the lease has ended or the
    /// volume is deleted, the device is given up: its users hear of it at once, and not when the
    /// kernel's patience ends.
    fn reconnect(
        &self,
        streams: &mut Streams,
        index: u32,
        attachment: &Attachment,
        connections: u16,
        time: Duration,
    ) -> Result<(), HostError> {
        self.hang_up(streams, index, &attachment.volume_id);
        let mut may_be_deleted = true;
        // First the sockets: a new size waits for requests under way, and they for a connection. The
        // kernel takes a socket only in the place of one that it knows to be lost, says yes either
        // way, and may end the new one when it notices the loss a second time: what counts is that
        // the device answers, and a socket that did not do is not offered again.
        let connected = poll(time, || {
            if self.keeper.has_ended(&attachment.volume_id) {
                return Some(Err(HostError::Unexpected("it is being taken away".to_owned())));
            }
            std::thread::sleep(NOTICE_TIME);
            let opened = match sockets::open(attachment, connections, Duration::ZERO) {
                Ok(opened) => opened,
                Err(over @ NotOpen::LeaseOver(_)) => return Some(Err(over.into())),
                Err(NotOpen::NoVolume(error)) if std::mem::take(&mut may_be_deleted) => {
                    let deleted = (self.is_deleted)(&attachment.volume_id);
                    return deleted.then(|| Err(HostError::VolumeDeleted(error.to_string())));
                }
                Err(NotOpen::NoVolume(_) | NotOpen::Yet(_)) => return None,
            };
            match self.hand_over(index, attachment, &opened) {
                Ok(true) => return Some(Ok(opened)),
                Ok(false) => opened.hang_up(),
                Err(error) => return Some(Err(error)),
            }
            None
        });
        let opened = match connected {
            Some(Ok(opened)) => opened,
            Some(Err(over @ (HostError::LeaseOver(_) | HostError::VolumeDeleted(_)))) => {
                tracing::error!(index, error = %over, "given up: every request fails from now on");
                self.given_up.add(&self.keeper, attachment, index)?;
                return Err(over);
            }
            Some(Err(error)) => return Err(error),
            None => {
                let what = format!("the new connection of {}", path_of(index).display());
                return Err(HostError::Slow { what, after: time });
            }
        };
        // A size that it has already would only hold up requests.
        if disks::size(&path_of(index))? != opened.size() {
            let size = number(SIZE_BYTES, opened.size());
            reconfigure(index, attachment, size).map_err(refused("take a new size"))?;
        }
        let kept = Kept { addresses: attachment.addresses.clone(), ..of_opened(&opened)? };
        self.keeper.write(&attachment.volume_id, &kept)?;
        *streams = opened.into_streams().map_err(unknown)?;
        Ok(())
    }

    /// Offers the kernel connections, and answers whether the device works with them. Their ends are
    /// kept before it has them.
    fn hand_over(
        &self,
        index: u32,
        attachment: &Attachment,
        opened: &Opened,
    ) -> Result<bool, HostError> {
        let before = self.keeper.read(&attachment.volume_id);
        let mut kept = before.clone();
        kept.ends.extend(of_opened(opened)?.ends);
        self.keeper.write(&attachment.volume_id, &kept)?;
        let works = reconfigure(index, attachment, opened.attributes()).is_ok()
            && can_be_read(&path_of(index), 0, ANSWER_TIME);
        if !works {
            self.keeper.write(&attachment.volume_id, &before)?;
        }
        Ok(works)
    }
}

/// What is kept of these connections.
fn of_opened(opened: &Opened) -> Result<Kept, HostError> {
    let (ends, server) = (opened.ends().map_err(unknown)?, opened.server().cloned());
    Ok(Kept { ends, server, ..Kept::default() })
}

fn unknown(error: std::io::Error) -> HostError {
    HostError::Unexpected(error.to_string())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn reconfigure(index: u32, attachment: &Attachment, what: Vec<u8>) -> Result<Vec<u8>, Errno> {
    let backend = format!("{}\0", backend(attachment));
    let device = [attribute(INDEX, &index.to_le_bytes()), attribute(BACKEND, backend.as_bytes())];
    Family::open(FAMILY)?.ask(RECONFIGURE, &[device.concat(), what].concat())
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

    fn devices(&self, attachment: &Attachment) -> Result<Vec<PathBuf>, HostError> {
        let of_volume = format!("ballast/{}/", attachment.volume_id);
        let found = devices().into_iter().filter(|(_, backend)| backend.starts_with(&of_volume));
        Ok(found.map(|(index, _)| path_of(index)).collect())
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
        self.shared.grow(index, attachment, at_least)
    }

    fn answers(&self, attachment: &Attachment, time: Duration) -> bool {
        match self.state(attachment) {
            Ok(State::Attached(device)) => can_be_read(&device, 0, time),
            _ => false,
        }
    }

    fn abort(&self, attachment: &Attachment) -> Result<(), HostError> {
        self.shared.keeper.end(&attachment.volume_id);
        let of_volume = format!("ballast/{}/", attachment.volume_id);
        let found = devices().into_iter().filter(|(_, backend)| backend.starts_with(&of_volume));
        let found: Vec<(u32, String)> = found.collect();
        for (index, backend) in &found {
            disconnect_of(backend, *index)?;
        }
        // A repair may be under way that has not seen this, and connect it again: wait for its end.
        for (index, backend) in &found {
            let held = self.shared.device(*index);
            let mut streams = locked(&held);
            disconnect_of(backend, *index)?;
            streams.clear();
        }
        Ok(())
    }

    fn detach(&self, attachment: &Attachment) -> Result<(), HostError> {
        self.abort(attachment)?;
        self.shared.given_up.let_go(&attachment.volume_id);
        steps::reached(Step::KernelDisconnected);
        let gone = || matches!(self.state(attachment), Ok(State::None)).then_some(());
        poll(DEVICE_TIME, gone).ok_or_else(|| HostError::Slow {
            what: format!("the disconnection of {}", attachment.export),
            after: DEVICE_TIME,
        })?;
        self.shared.keeper.remove(&attachment.volume_id)
    }
}
