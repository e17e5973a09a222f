//! A minimal NBD client: fixed newstyle, NBD_OPT_GO, simple replies, over TCP.
//!
//! Owns the wire format as the NBD protocol document has it, written down a second time so that a
//! mistake of our server cannot cancel out. Never retries and never interprets data.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

const INIT_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const CLIENT_FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const FLAG_READ_ONLY: u16 = 1 << 1;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one wait for bytes lasts before the waiter looks whether it should give up.
pub const TICK: Duration = Duration::from_millis(250);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest option reply that is believed, in bytes.
const MAX_OPTION_REPLY: u32 = 64 << 10;

/// NBD's errno for lack of space.
pub const NO_SPACE: u32 = 28;

/// What went wrong between us and a server.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection could not be made, or broke.
    #[error("{uri}: {problem}")]
    Connection {
        /// The address.
        uri: String,
        /// What the system said.
        problem: io::Error,
    },
    /// The server said something that the protocol does not allow here.
    #[error("{uri}: {problem}")]
    Protocol {
        /// The address.
        uri: String,
        /// What it said.
        problem: String,
    },
}

/// Where an export is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// Host and port, as `connect` wants them.
    pub address: String,
    /// Name of the export, not percent-decoded.
    pub export: String,
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nbd://{}/{}", self.address, self.export)
    }
}

impl FromStr for NbdUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text.strip_prefix("nbd://").ok_or("want nbd://HOST[:PORT]/EXPORT")?;
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let has_port = host.rsplit(']').next().unwrap_or(host).contains(':');
        let address = if has_port { host.to_string() } else { format!("{host}:10809") };
        Ok(NbdUri { address, export: export.to_string() })
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Data comes back.
    Read = 0,
    /// Data goes along.
    Write = 1,
    /// No answer; the server closes.
    Disconnect = 2,
    /// Everything answered before is durable.
    Flush = 3,
    /// The range holds nothing of interest.
    Trim = 4,
    /// The range holds zeroes.
    WriteZeroes = 6,
}

/// A connection in transmission phase.
pub struct Client {
    /// Where it leads.
    pub uri: NbdUri,
    /// Size of the export in bytes.
    pub size: u64,
    stream: TcpStream,
}

impl Client {
    /// Connects and negotiates the export, for reading and writing.
    ///
    /// # Errors
    /// When nobody listens, the export is not there, or it is read-only.
    pub fn connect(uri: &NbdUri) -> Result<Client, ClientError> {
        let io = |problem| ClientError::Connection { uri: uri.to_string(), problem };
        let address = uri.address.to_socket_addrs().map_err(io)?.next();
        let address = address.ok_or_else(|| io(io::ErrorKind::NotFound.into()))?;
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map_err(io)?;
        stream.set_nodelay(true).map_err(io)?;
        stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT)).map_err(io)?;
        let negotiated = negotiate(&mut stream, &uri.export).map_err(io)?;
        let protocol = |problem| ClientError::Protocol { uri: uri.to_string(), problem };
        let (size, flags) = negotiated.map_err(protocol)?;
        if flags & FLAG_READ_ONLY != 0 {
            return Err(protocol("the export is read-only".into()));
        }
        stream.set_read_timeout(Some(TICK)).map_err(io)?;
        Ok(Client { uri: uri.clone(), size, stream })
    }

    /// A second handle of the same connection, to receive while this one sends.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn receiver(&self) -> io::Result<Receiver> {
        Ok(Receiver { stream: self.stream.try_clone()? })
    }

    /// Sends one request; `data` is what a write carries.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn send(
        &mut self,
        command: Command,
        cookie: u64,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(28 + data.len());
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(0u16.to_be_bytes());
        message.extend((command as u16).to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(data);
        self.stream.write_all(&message)
    }

    /// Says goodbye; a server that is already gone is fine.
    pub fn disconnect(mut self) {
        let _ = self.send(Command::Disconnect, 0, 0, 0, &[]);
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Breaks the connection so that its receiver wakes up.
    pub fn abort(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// The receiving half of a connection.
pub struct Receiver {
    stream: TcpStream,
}

impl Receiver {
    /// The next answer: cookie and errno (0 for success).
    ///
    /// # Errors
    /// When the connection ends or breaks, or `give_up`, asked every [`TICK`], says so.
    pub fn reply(&mut self, give_up: &dyn Fn() -> bool) -> io::Result<(u64, u32)> {
        let mut header = [0; 16];
        self.fill(&mut header, give_up)?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        if word(0) != REPLY_MAGIC {
            return Err(invalid(format!("reply magic {:#x}", word(0))));
        }
        Ok((u64::from_be_bytes(header[8..].try_into().expect("8 bytes")), word(4)))
    }

    /// Fills the buffer with what follows.
    ///
    /// # Errors
    /// As [`Receiver::reply`].
    pub fn fill(&mut self, mut buffer: &mut [u8], give_up: &dyn Fn() -> bool) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => buffer = &mut buffer[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if give_up() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn invalid(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

fn take<const N: usize>(stream: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Size and transmission flags of the export; the inner error is what the server refused.
fn negotiate(stream: &mut TcpStream, export: &str) -> io::Result<Result<(u64, u16), String>> {
    let magic = u64::from_be_bytes(take(stream)?);
    let option_magic = u64::from_be_bytes(take(stream)?);
    let flags = u16::from_be_bytes(take(stream)?);
    if magic != INIT_MAGIC || option_magic != OPTION_MAGIC || flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Ok(Err("not a fixed newstyle NBD server".into()));
    }
    let mut hello = CLIENT_FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(OPTION_GO.to_be_bytes());
    hello.extend((export.len() as u32 + 6).to_be_bytes());
    hello.extend((export.len() as u32).to_be_bytes());
    hello.extend(export.as_bytes());
    hello.extend(0u16.to_be_bytes());
    stream.write_all(&hello)?;
    let mut found = None;
    loop {
        let magic = u64::from_be_bytes(take(stream)?);
        let _option: [u8; 4] = take(stream)?;
        let kind = u32::from_be_bytes(take(stream)?);
        let length = u32::from_be_bytes(take(stream)?);
        if magic != OPTION_REPLY_MAGIC || length > MAX_OPTION_REPLY {
            return Ok(Err(format!("broken option reply, {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match kind {
            REPLY_ACK => return Ok(found.ok_or("no size was announced".into())),
            REPLY_INFO if data.len() == 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                let size = u64::from_be_bytes(data[2..10].try_into().expect("8 bytes"));
                found = Some((size, u16::from_be_bytes([data[10], data[11]])));
            }
            REPLY_INFO => {}
            _ => {
                let error = kind & !REPLY_ERROR;
                let text = String::from_utf8_lossy(&data);
                return Ok(Err(format!("export {export:?} refused (error {error}): {text}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood() {
        let uri: NbdUri = "nbd://127.0.0.1:10810/demo".parse().unwrap();
        assert_eq!((uri.address.as_str(), uri.export.as_str()), ("127.0.0.1:10810", "demo"));
        let uri: NbdUri = "nbd://[::1]/a/b".parse().unwrap();
        assert_eq!((uri.address.as_str(), uri.export.as_str()), ("[::1]:10809", "a/b"));
        assert!("http://x/".parse::<NbdUri>().is_err());
    }
}
