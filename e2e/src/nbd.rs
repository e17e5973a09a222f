//! An NBD client that does one thing at a time: for what other projects' clients hide, such as the
//! handles of requests and the bytes that come after the last answer.
//!
//! Fixed newstyle with `GO`, simple replies, over TCP. Never connects again by itself.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// `READ`.
pub const READ: u16 = 0;
/// `WRITE`.
pub const WRITE: u16 = 1;
/// `DISC`.
pub const DISCONNECT: u16 = 2;
/// `FLUSH`.
pub const FLUSH: u16 = 3;

/// The export can be used over several connections.
pub const CAN_MULTI_CONN: u16 = 1 << 8;

/// A connection past its handshake.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Transmission flags.
    pub flags: u16,
}

/// What a server said in its last answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The handle that it is for.
    pub handle: u64,
    /// 0: done.
    pub error: u32,
}

impl Connection {
    /// Opens an export: `nbd://HOST:PORT/EXPORT`.
    ///
    /// # Errors
    /// The network's, or the server's words when it refuses.
    pub fn open(uri: &str) -> io::Result<Connection> {
        let rest = uri.strip_prefix("nbd://").expect("an address of this form");
        let (address, export) = rest.split_once('/').expect("an address of this form");
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let _greeting: [u8; 18] = take(&mut stream)?;
        let name = export.as_bytes();
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC);
        hello.extend(7u32.to_be_bytes());
        hello.extend((name.len() as u32 + 6).to_be_bytes());
        hello.extend((name.len() as u32).to_be_bytes());
        hello.extend(name);
        hello.extend([0, 0]);
        stream.write_all(&hello)?;
        let mut flags = 0;
        loop {
            let head: [u8; 20] = take(&mut stream)?;
            let word = |at: usize| {
                u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            let mut data = vec![0; word(16) as usize];
            stream.read_exact(&mut data)?;
            match word(12) {
                1 => return Ok(Connection { stream, flags }),
                3 if data[..2] == [0, 0] => flags = u16::from_be_bytes([data[10], data[11]]),
                3 => {}
                _ => return Err(io::Error::other(String::from_utf8_lossy(&data).into_owned())),
            }
        }
    }

    /// Sends a request; `data` is what a write carries.
    ///
    /// # Errors
    /// The network's.
    pub fn send(&mut self, command: u16, handle: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        self.send_head(command, handle, offset, data.len() as u32)?;
        self.send_more(data)
    }

    /// Sends a request without the data that it carries.
    ///
    /// # Errors
    /// The network's.
    pub fn send_head(
        &mut self,
        command: u16,
        handle: u64,
        offset: u64,
        length: u32,
    ) -> io::Result<()> {
        let mut message = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
        message.extend(command.to_be_bytes());
        message.extend(handle.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        self.stream.write_all(&message)
    }

    /// Sends data of a write.
    ///
    /// # Errors
    /// The network's.
    pub fn send_more(&mut self, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(data)
    }

    /// The next answer. What a read brings is to be taken by [`Connection::data`].
    ///
    /// # Errors
    /// `UnexpectedEof` when the server has closed instead.
    pub fn answer(&mut self) -> io::Result<Answer> {
        let head: [u8; 16] = take(&mut self.stream)?;
        assert_eq!(head[..4], [0x67, 0x44, 0x66, 0x98], "no answer begins like this");
        let (error, handle) = head[4..].split_at(4);
        let error = u32::from_be_bytes(error.try_into().expect("4 bytes"));
        Ok(Answer { handle: u64::from_be_bytes(handle.try_into().expect("8 bytes")), error })
    }

    /// What a read that was answered brings.
    ///
    /// # Errors
    /// The network's.
    pub fn data(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Everything that the server still sends before it closes its side.
    ///
    /// # Errors
    /// The network's: also when the server closes without saying so in order.
    pub fn rest(mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).map(|_| rest)
    }
}

fn take<const N: usize>(stream: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
