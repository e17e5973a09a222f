//! The client's side of NBD: the handshake, and the layout of requests and replies.
//!
//! Fixed newstyle with `GO`, simple replies: all that a block device needs, and what the kernel's
//! client understands. See `docs/nbd.md` for the servers' side.

use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::context::Address;

const GREETING: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const ERROR_POLICY: u32 = REPLY_ERROR + 2;
const ERROR_UNKNOWN: u32 = REPLY_ERROR + 6;
/// In the words of a server that is asked for an export under a lease that has ended.
const LEASE_OVER: &str = "is not in force";
const INFO_EXPORT: u16 = 0;

/// An option's answer is words for people, at most.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;

/// How long one server may take to accept a connection and finish the handshake: longer than a
/// volume's leader is elected in, short enough to go on to the next server.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);

/// Bytes of a simple reply's header.
pub const REPLY_BYTES: usize = 16;

/// The export can be written.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// Several connections may share the export.
pub const FLAG_MULTI_CONN: u16 = 1 << 8;

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The network, or a server that went away.
    #[error("{0}: {1}")]
    Io(Address, #[source] std::io::Error),
    /// No answer in time.
    #[error(
        "{0} did not open the export within {secs} s: it hangs, or the volume has no leader",
        secs = HANDSHAKE_TIME.as_secs()
    )]
    Silent(Address),
    /// Not what NBD says.
    #[error("{0} is no NBD server of the kind that is needed: {1}")]
    Protocol(Address, &'static str),
    /// The server does not open the export.
    #[error("{address} refuses the export {export:?}: {message}")]
    Refused {
        /// Who refuses.
        address: Address,
        /// What was asked for.
        export: String,
        /// Why, in the server's words.
        message: String,
        /// What that means.
        meaning: Meaning,
    },
}

/// What a refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The lease is over: the same question will have the same answer for ever.
    LeaseOver,
    /// The server knows no volume of this name. It may be one that has just started.
    NoVolume,
    /// Not now, or not here.
    NotNow,
}

/// An open export.
#[derive(Debug)]
pub struct Export {
    /// Past the handshake.
    pub stream: TcpStream,
    /// Where it leads.
    pub address: Address,
    /// Bytes of the volume.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
}

/// Opens an export at one server.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(address: &Address, export: &str) -> Result<Export, ConnectError> {
    let silent = || ConnectError::Silent(address.clone());
    tokio::time::timeout(HANDSHAKE_TIME, handshake(address, export)).await.map_err(|_| silent())?
}

async fn handshake(address: &Address, export: &str) -> Result<Export, ConnectError> {
    let failed = |error| ConnectError::Io(address.clone(), error);
    let wrong = |what| ConnectError::Protocol(address.clone(), what);
    let mut stream = TcpStream::connect(address.as_str()).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    if stream.read_u64().await.map_err(failed)? != GREETING
        || stream.read_u64().await.map_err(failed)? != OPTION_MAGIC
    {
        return Err(wrong("its greeting is another"));
    }
    let offered = stream.read_u16().await.map_err(failed)?;
    if offered & FIXED_NEWSTYLE == 0 {
        return Err(wrong("it does not speak fixed newstyle"));
    }
    let flags = u32::from(offered & (FIXED_NEWSTYLE | NO_ZEROES));
    let name_bytes = u32::try_from(export.len()).map_err(|_| wrong("the name is too long"))?;
    let mut hello = flags.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(OPTION_GO.to_be_bytes());
    hello.extend((name_bytes + 6).to_be_bytes());
    hello.extend(name_bytes.to_be_bytes());
    hello.extend(export.as_bytes());
    hello.extend(0u16.to_be_bytes());
    stream.write_all(&hello).await.map_err(failed)?;
    let mut found = None;
    loop {
        if stream.read_u64().await.map_err(failed)? != OPTION_REPLY_MAGIC {
            return Err(wrong("its answer to GO can't be read"));
        }
        let _option = stream.read_u32().await.map_err(failed)?;
        let kind = stream.read_u32().await.map_err(failed)?;
        let length = stream.read_u32().await.map_err(failed)?;
        if length > OPTION_REPLY_BYTES_MAX {
            return Err(wrong("its answer to GO is too long"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await.map_err(failed)?;
        match (kind, found) {
            (REPLY_INFO, _) => found = parse_export(&data).or(found),
            (REPLY_ACK, Some((size, flags))) => {
                return Ok(Export { stream, address: address.clone(), size, flags });
            }
            (kind, _) if kind & REPLY_ERROR != 0 => {
                let message = String::from_utf8_lossy(&data).into_owned();
                let meaning = meaning(kind, &message);
                let (address, export) = (address.clone(), export.to_owned());
                return Err(ConnectError::Refused { address, export, message, meaning });
            }
            _ => return Err(wrong("it answers GO with something else")),
        }
    }
}

fn meaning(kind: u32, message: &str) -> Meaning {
    match kind {
        ERROR_UNKNOWN => Meaning::NoVolume,
        // NBD has one number for all reasons of policy; epochs only grow, so this one stays.
        ERROR_POLICY if message.contains(LEASE_OVER) => Meaning::LeaseOver,
        _ => Meaning::NotNow,
    }
}

fn parse_export(data: &[u8]) -> Option<(u64, u16)> {
    let (kind, rest) = data.split_first_chunk::<2>()?;
    let (size, rest) = rest.split_first_chunk::<8>()?;
    let (flags, _) = rest.split_first_chunk::<2>()?;
    (u16::from_be_bytes(*kind) == INFO_EXPORT)
        .then(|| (u64::from_be_bytes(*size), u16::from_be_bytes(*flags)))
}

/// What can be asked of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Bytes.
    Read = 0,
    /// Bytes follow.
    Write = 1,
    /// Goodbye: no answer.
    Disconnect = 2,
    /// What was written is to be durable.
    Flush = 3,
    /// Zeroes, which need no room.
    WriteZeroes = 6,
}

/// A request's header.
pub fn request(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..28].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Error number and cookie of a simple reply; `None` when it is none.
pub fn parse_reply(header: &[u8; REPLY_BYTES]) -> Option<(u32, u64)> {
    let (magic, rest) = header.split_first_chunk::<4>()?;
    let (error, rest) = rest.split_first_chunk::<4>()?;
    let (cookie, _) = rest.split_first_chunk::<8>()?;
    (u32::from_be_bytes(*magic) == REPLY_MAGIC)
        .then(|| (u32::from_be_bytes(*error), u64::from_be_bytes(*cookie)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_protocol() {
        let header = request(Command::Write, 0x0102_0304_0506_0708, 0x1000, 0x200);
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
            0, 0, 2, 0,
        ];
        assert_eq!(header, expected);
        let mut reply = [0; REPLY_BYTES];
        reply[0..4].copy_from_slice(&[0x67, 0x44, 0x66, 0x98]);
        reply[7] = 5;
        reply[15] = 9;
        assert_eq!(parse_reply(&reply), Some((5, 9)));
        reply[0] = 0;
        assert_eq!(parse_reply(&reply), None);
        let mut info = vec![0, 0];
        info.extend(7u64.to_be_bytes());
        info.extend(3u16.to_be_bytes());
        assert_eq!(parse_export(&info), Some((7, 3)));
        assert_eq!(parse_export(&info[..11]), None);
    }
}
