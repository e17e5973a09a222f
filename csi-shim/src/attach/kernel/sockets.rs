//! The connections of one device: opened together at one server, handed to the kernel together.
//!
//! Several that write are lanes of one session (docs/nbd.md): what the kernel asks again on another of
//! them the server recognises, and ends the session. Those that read need none.

use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::AsyncWriteExt;

use super::super::Attachment;
use super::kept::Ends;
use super::{SOCKET_FD, SOCKET_ITEM, SOCKETS};
use crate::context::Address;
use crate::host::HostError;
use crate::host::netlink::{attribute, nested};
use crate::link::nbd::{self, Command, ConnectError, Export, Meaning};

/// Connections to one server, past their handshakes, in the order of the kernel's queues.
pub(super) struct Opened(Vec<Export>);

/// Why no server opens an export.
pub(super) enum NotOpen {
    /// None ever will again: its lease has ended.
    LeaseOver(ConnectError),
    /// None does now, and one of them knows no such volume.
    NoVolume(ConnectError),
    /// None does now.
    Yet(HostError),
}

impl From<NotOpen> for HostError {
    fn from(not_open: NotOpen) -> HostError {
        match not_open {
            NotOpen::LeaseOver(error) => HostError::LeaseOver(error.to_string()),
            NotOpen::NoVolume(error) => failed(&error),
            NotOpen::Yet(error) => error,
        }
    }
}

/// Opens the export at the first server that does, so many times, within so much time, or in one
/// round over all servers.
pub(super) fn open(
    attachment: &Attachment,
    connections: u16,
    time: Duration,
) -> Result<Opened, NotOpen> {
    let runtime = runtime().map_err(NotOpen::Yet)?;
    let start = Instant::now();
    loop {
        let mut last = NotOpen::Yet(failed(&"no NBD address is known"));
        for address in &attachment.addresses {
            let names =
                names(attachment, connections).map_err(|error| NotOpen::Yet(failed(&error)))?;
            match runtime.block_on(open_at(address, &names)) {
                Ok(opened) => return Ok(opened),
                Err(error) => match error {
                    ConnectError::Refused { meaning: Meaning::LeaseOver, .. } => {
                        return Err(NotOpen::LeaseOver(error));
                    }
                    ConnectError::Refused { meaning: Meaning::NoVolume, .. } => {
                        last = NotOpen::NoVolume(error);
                    }
                    _ if matches!(last, NotOpen::NoVolume(_)) => {}
                    _ => last = NotOpen::Yet(failed(&error)),
                },
            }
        }
        if start.elapsed() >= time {
            return Err(last);
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn failed(error: &dyn std::fmt::Display) -> HostError {
    HostError::Unexpected(error.to_string())
}

fn runtime() -> Result<tokio::runtime::Runtime, HostError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| failed(&error))
}

/// Bytes that the volume has by now, asked of this server on a connection of its own, which reads
/// only and so leaves those of the device in peace.
pub(super) fn size_at(address: &Address, export: &str) -> Result<u64, HostError> {
    let good_bye = nbd::request(Command::Disconnect, 0, 0, 0);
    let size = async {
        let mut opened = nbd::connect(address, &reading(export)).await?;
        // The server has said what was asked; what it makes of this does not matter.
        let _ = opened.stream.write_all(&good_bye).await;
        Ok(opened.size)
    };
    runtime()?.block_on(size).map_err(|error: ConnectError| failed(&error))
}

/// The export for reading only, under the same lease.
fn reading(export: &str) -> String {
    match export.split_once('@') {
        None => format!("{export}@ro"),
        Some((_, words)) if words.split(',').any(|word| word == "ro") => export.to_owned(),
        Some((name, words)) => format!("{name}@ro,{words}"),
    }
}

async fn open_at(address: &Address, names: &[String]) -> Result<Opened, ConnectError> {
    let mut exports = Vec::new();
    for name in names {
        exports.push(nbd::connect(address, name).await?);
    }
    Ok(Opened(exports))
}

/// What the connections ask for, each time in a session that never was.
fn names(attachment: &Attachment, connections: u16) -> std::io::Result<Vec<String>> {
    let export = &attachment.export;
    if connections <= 1 || attachment.read_only {
        return Ok(vec![export.clone(); usize::from(connections.max(1))]);
    }
    let mut session = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut session)?;
    let session = u64::from_le_bytes(session);
    let joint = if export.contains('@') { ',' } else { '@' };
    let name = |lane| format!("{export}{joint}session={session:016x},lane={lane}");
    Ok((0..connections).map(name).collect())
}

impl Opened {
    /// Bytes of the volume.
    pub(super) fn size(&self) -> u64 {
        self.0.iter().map(|export| export.size).min().unwrap_or(0)
    }

    /// The server that they lead to.
    pub(super) fn server(&self) -> Option<&Address> {
        self.0.first().map(|export| &export.address)
    }

    /// The ends of all.
    pub(super) fn ends(&self) -> std::io::Result<Vec<Ends>> {
        let ends = |export: &Export| {
            let near = export.stream.local_addr()?.to_string();
            Ok(Ends { near, far: Some(export.stream.peer_addr()?.to_string()) })
        };
        self.0.iter().map(ends).collect()
    }

    /// Transmission flags.
    pub(super) fn flags(&self) -> u16 {
        self.0.first().map_or(0, |export| export.flags)
    }

    /// The attributes that hand the sockets over. The kernel takes references of its own.
    pub(super) fn attributes(&self) -> Vec<u8> {
        let item = |export: &Export| {
            let descriptor = export.stream.as_raw_fd() as u32;
            nested(SOCKET_ITEM, &attribute(SOCKET_FD, &descriptor.to_le_bytes()))
        };
        nested(SOCKETS, &self.0.iter().flat_map(item).collect::<Vec<u8>>())
    }

    /// The sockets, to hang up with later.
    pub(super) fn into_streams(self) -> std::io::Result<Vec<TcpStream>> {
        self.0.into_iter().map(|export| export.stream.into_std()).collect()
    }

    /// Ends the connections, wherever the sockets are by now.
    pub(super) fn hang_up(self) {
        hang_up(&self.into_streams().unwrap_or_default());
    }
}

/// Ends connections, also for the kernel that has them.
pub(super) fn hang_up(streams: &[TcpStream]) {
    for stream in streams {
        // It may be lost already.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Whether a connection that the kernel has is known to be lost.
pub(super) fn is_lost(stream: &TcpStream) -> bool {
    match recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => true,
        Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => false,
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(export: &str, read_only: bool) -> Attachment {
        let (volume_id, export) = ("v".to_owned(), export.to_owned());
        Attachment { volume_id, export, addresses: Vec::new(), read_only }
    }

    #[test]
    fn writers_have_a_session_that_never_was_and_readers_none() {
        let names =
            |export, read_only, count| names(&attachment(export, read_only), count).unwrap();
        assert_eq!(names("db@lease=7", false, 1), ["db@lease=7"]);
        assert_eq!(names("db@ro,lease=7", true, 2), ["db@ro,lease=7", "db@ro,lease=7"]);
        let lanes = names("db@lease=7", false, 3);
        let session = &lanes[0]["db@lease=7,session=".len()..][..16];
        for (lane, name) in lanes.iter().enumerate() {
            assert_eq!(name, &format!("db@lease=7,session={session},lane={lane}"));
        }
        assert_ne!(names("db@lease=7", false, 3), lanes);
        assert!(names("db", false, 2)[1].starts_with("db@session="));
    }

    #[test]
    fn the_size_is_asked_for_under_the_same_lease_without_writing() {
        assert_eq!(reading("db@lease=7"), "db@ro,lease=7");
        assert_eq!(reading("db@ro,lease=7"), "db@ro,lease=7");
        assert_eq!(reading("db"), "db@ro");
    }

    #[test]
    fn a_connection_is_lost_when_either_side_has_ended_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (near, listener.accept().unwrap().0)
        };
        let (near, far) = connect();
        assert!(!is_lost(&near));
        drop(far);
        crate::host::poll(Duration::from_secs(10), || is_lost(&near).then_some(())).unwrap();
        let (near, _far) = connect();
        hang_up(std::slice::from_ref(&near));
        assert!(is_lost(&near));
    }
}
