//! Generic netlink, as far as the kernel's NBD client needs it: requests with attributes, their
//! answers, and one group of notices.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, connect, recv,
    send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const GROUPS: u16 = 7;
const GROUP_NAME: u16 = 1;
const GROUP_ID: u16 = 2;
const ERROR: u16 = 2;
const REQUEST_AND_ACK: u16 = 5;
const NESTED: u16 = 0x8000;
/// The kernel answers at once; a notice may never come.
const ANSWER_TIME: Duration = Duration::from_secs(20);
const MESSAGE_BYTES: usize = 64 << 10;

/// A connection to one family.
#[derive(Debug)]
pub struct Family {
    socket: OwnedFd,
    id: u16,
    groups: Vec<(String, u32)>,
    sequence: u32,
}

impl Family {
    /// Connects to a family by its name.
    ///
    /// # Errors
    /// `ENOENT` when the kernel has none.
    pub fn open(name: &str) -> Result<Family, Errno> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let wait = TimeVal::new(ANSWER_TIME.as_secs() as i64, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &wait)?;
        let mut family = Family { socket, id: CONTROL, groups: Vec::new(), sequence: 0 };
        let asked = attribute(FAMILY_NAME, format!("{name}\0").as_bytes());
        let answer = family.ask(GET_FAMILY, &asked)?;
        let id = find(&answer, FAMILY_ID).and_then(|id| id.try_into().ok()).ok_or(Errno::EPROTO)?;
        family.id = u16::from_le_bytes(id);
        for (_, group) in attributes(find(&answer, GROUPS).unwrap_or_default()) {
            let name = find(group, GROUP_NAME).unwrap_or_default();
            let number = find(group, GROUP_ID).and_then(|id| id.try_into().ok());
            if let Some(number) = number {
                let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
                family.groups.push((name, u32::from_le_bytes(number)));
            }
        }
        Ok(family)
    }

    /// Sends a command and returns the attributes of its answer, none if there is only a yes.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn ask(&mut self, command: u8, attributes: &[u8]) -> Result<Vec<u8>, Errno> {
        self.sequence += 1;
        let mut message = Vec::new();
        message.extend(((20 + attributes.len()) as u32).to_le_bytes());
        message.extend(self.id.to_le_bytes());
        message.extend(REQUEST_AND_ACK.to_le_bytes());
        message.extend(self.sequence.to_le_bytes());
        message.extend(0u32.to_le_bytes());
        message.extend([command, 1, 0, 0]);
        message.extend(attributes);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = Vec::new();
        loop {
            for (kind, sequence, body) in self.receive()? {
                if sequence != self.sequence {
                    continue;
                }
                if kind != ERROR {
                    answer = body.get(4..).unwrap_or_default().to_vec();
                    continue;
                }
                let code = body.first_chunk::<4>().map_or(0, |code| i32::from_le_bytes(*code));
                return if code == 0 { Ok(answer) } else { Err(Errno::from_raw(-code)) };
            }
        }
    }

    /// Listens to a group from now on. This connection is for nothing else then.
    ///
    /// # Errors
    /// `ENOENT` when the family has no such group.
    pub fn listen(self, group: &str) -> Result<Notices, Errno> {
        let number = self.groups.iter().find(|(name, _)| name == group).ok_or(Errno::ENOENT)?.1;
        // Groups up to 32 are a bit mask of the address.
        let mask = 1u32.checked_shl(number.wrapping_sub(1)).ok_or(Errno::ENOENT)?;
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, mask))?;
        Ok(Notices { family: Family { socket, ..self } })
    }

    fn receive(&self) -> Result<Vec<(u16, u32, Vec<u8>)>, Errno> {
        let mut buffer = vec![0; MESSAGE_BYTES];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        let mut messages = Vec::new();
        while let Some(header) = rest.first_chunk::<16>() {
            let number = |at: usize| {
                u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
            };
            let length = number(0) as usize;
            let body = rest.get(16..length).ok_or(Errno::EPROTO)?;
            messages.push((number(4) as u16, number(8), body.to_vec()));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(messages)
    }
}

/// Notices of a group.
#[derive(Debug)]
pub struct Notices {
    family: Family,
}

impl Notices {
    /// Waits for the next ones, so long: commands and their attributes.
    ///
    /// # Errors
    /// `EAGAIN` when there were none, `ENOBUFS` when some were lost.
    pub fn next(&self, time: Duration) -> Result<Vec<(u8, Vec<u8>)>, Errno> {
        let wait = TimeVal::new(time.as_secs() as i64, 0);
        setsockopt(&self.family.socket, sockopt::ReceiveTimeout, &wait)?;
        let messages = self.family.receive()?.into_iter();
        let ours = messages.filter(|(kind, _, _)| *kind == self.family.id);
        let notice =
            |(_, _, body): (u16, u32, Vec<u8>)| Some((*body.first()?, body.get(4..)?.to_vec()));
        Ok(ours.filter_map(notice).collect())
    }
}

/// One attribute with its padding.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = (length as u16).to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

/// An attribute that holds others.
pub fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    attribute(kind | NESTED, value)
}

/// The attributes in these bytes, in their order.
pub fn attributes(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut rest = bytes;
    let mut found = Vec::new();
    while let Some([low, high, kind_low, kind_high]) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        let Some(value) = rest.get(4..length) else { break };
        found.push((u16::from_le_bytes([*kind_low, *kind_high]) & 0x3fff, value));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The first attribute of a kind.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).into_iter().find(|(it, _)| *it == kind).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let bytes =
            [attribute(2, b"nbd\0"), attribute(1, b"x"), nested(7, &attribute(1, &[9]))].concat();
        assert_eq!(bytes.len(), 8 + 8 + 12);
        assert_eq!(find(&bytes, 1), Some(&b"x"[..]));
        assert_eq!(find(&bytes, 7).and_then(|inner| find(inner, 1)), Some(&[9][..]));
        assert_eq!(find(&bytes, 3), None);
        assert!(attributes(&bytes[..7]).is_empty());
    }

    #[test]
    fn the_kernel_knows_its_control_family_and_not_others() {
        Family::open("nlctrl").unwrap();
        assert_eq!(Family::open("no-such").unwrap_err(), Errno::ENOENT);
    }
}
