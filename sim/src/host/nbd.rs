//! A small NBD client: newstyle handshake, many requests in flight, simple or structured replies.
//!
//! Never repeats a request and never reconnects: what was in flight when the connection broke has
//! no answer, and whoever asked decides. Layouts as in the NBD protocol document.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use ballast_env::network::{Address, Network};
use ballast_env::spawn::{OwnedTask, Spawn};
use bytes::{Buf, BufMut};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, oneshot};

use crate::env::{SimEnv, SimStream};

const GREETING: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED: u32 = 8;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_ERROR: u16 = 1 << 15;

/// `ENOSPC`: the server says that nothing was done.
const ENOSPC: u32 = 28;
/// `ESHUTDOWN`: never an answer, sessions that have ended are closed.
const ESHUTDOWN: u32 = 108;

/// A request without success.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NbdError {
    /// The connection broke before the answer.
    #[error("connection was lost before the answer")]
    Lost,
    /// The server answered with an error.
    #[error("server answered with error {0}")]
    Errno(u32),
}

impl NbdError {
    /// Whether the error says that the command had no effect and never will.
    pub fn is_refusal(&self) -> bool {
        matches!(self, NbdError::Errno(ENOSPC))
    }
}

/// A command of the transmission phase.
#[derive(Clone, Debug)]
pub enum Command {
    /// Read bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Write bytes.
    Write {
        /// First byte.
        offset: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Write zeroes, with a hole allowed.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Discard: reads as zeroes afterwards here, although NBD promises less.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Flush.
    Flush,
}

/// A connection in the transmission phase.
pub struct NbdClient {
    size: u64,
    writer: Mutex<WriteHalf<SimStream>>,
    shared: Rc<Shared>,
    _reader: OwnedTask,
}

#[derive(Default)]
struct Shared {
    next: Cell<u64>,
    lost: Cell<bool>,
    waiting: RefCell<BTreeMap<u64, Waiting>>,
}

struct Waiting {
    data: Vec<u8>,
    offset: u64,
    error: Option<u32>,
    answer: oneshot::Sender<Result<Vec<u8>, NbdError>>,
}

impl NbdClient {
    /// Connects to `address` and opens `export`.
    ///
    /// # Errors
    /// The network's, or `ConnectionRefused` with the server's option error.
    pub async fn connect(
        env: &SimEnv,
        address: &Address,
        export: &str,
        structured: bool,
    ) -> io::Result<Self> {
        let mut stream = env.connect(address).await?;
        let size = handshake(&mut stream, export, structured).await?;
        let (reader, writer) = tokio::io::split(stream);
        let shared = Rc::new(Shared::default());
        let receiving = shared.clone();
        let task = env.spawn(async move {
            let _broken = receiving.receive(reader).await;
            receiving.lost.set(true);
            for (_, waiting) in receiving.waiting.take() {
                let _ = waiting.answer.send(Err(NbdError::Lost));
            }
        });
        Ok(Self { size, writer: Mutex::new(writer), shared, _reader: OwnedTask(task) })
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it can't be used any more.
    pub fn is_lost(&self) -> bool {
        self.shared.lost.get()
    }

    /// Runs one command and returns the bytes read, if it reads.
    ///
    /// # Errors
    /// [`NbdError`].
    pub async fn run(&self, command: Command) -> Result<Vec<u8>, NbdError> {
        let handle = self.shared.next.replace(self.shared.next.get() + 1);
        self.run_as(handle, command).await
    }

    /// The same, under a handle that no other command in flight has.
    ///
    /// # Errors
    /// [`NbdError`].
    pub async fn run_as(&self, cookie: u64, command: Command) -> Result<Vec<u8>, NbdError> {
        let (code, offset, length, payload) = match command {
            Command::Read { offset, length } => (0, offset, length, Vec::new()),
            Command::Write { offset, data } => (1, offset, data.len() as u32, data),
            Command::Flush => (3, 0, 0, Vec::new()),
            Command::Trim { offset, length } => (4, offset, length, Vec::new()),
            Command::WriteZeroes { offset, length } => (6, offset, length, Vec::new()),
        };
        if self.shared.lost.get() {
            return Err(NbdError::Lost);
        }
        let (answer, answered) = oneshot::channel();
        let data = if code == 0 { vec![0; length as usize] } else { Vec::new() };
        let waiting = Waiting { data, offset, error: None, answer };
        self.shared.waiting.borrow_mut().insert(cookie, waiting);
        let mut request = Vec::with_capacity(28 + payload.len());
        request.put_u32(REQUEST);
        request.put_u16(0);
        request.put_u16(code);
        request.put_u64(cookie);
        request.put_u64(offset);
        request.put_u32(length);
        request.extend_from_slice(&payload);
        let sent = self.writer.lock().await.write_all(&request).await;
        if sent.is_err() {
            self.shared.lost.set(true);
            return Err(NbdError::Lost);
        }
        answered.await.unwrap_or(Err(NbdError::Lost))
    }
}

async fn handshake(stream: &mut SimStream, export: &str, structured: bool) -> io::Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await?;
    let mut fields = &greeting[..];
    if fields.get_u64() != GREETING || fields.get_u64() != OPTION {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // Fixed newstyle, no zeroes.
    stream.write_u32(3).await?;
    if structured {
        send_option(stream, OPTION_STRUCTURED, &[]).await?;
        read_option_reply(stream).await?;
    }
    let mut go = Vec::new();
    go.put_u32(export.len() as u32);
    go.extend_from_slice(export.as_bytes());
    go.put_u16(0);
    send_option(stream, OPTION_GO, &go).await?;
    let mut size = None;
    loop {
        let (kind, data) = read_option_reply(stream).await?;
        let mut fields = &data[..];
        match kind {
            REPLY_ACK => return size.ok_or_else(|| io::ErrorKind::InvalidData.into()),
            REPLY_INFO if fields.len() >= 12 && fields.get_u16() == 0 => {
                size = Some(fields.get_u64());
            }
            REPLY_INFO => {}
            error => {
                let text = String::from_utf8_lossy(&data).into_owned();
                let text = format!("option error {error:#x}: {text}");
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
            }
        }
    }
}

async fn send_option(stream: &mut SimStream, option: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.put_u64(OPTION);
    bytes.put_u32(option);
    bytes.put_u32(data.len() as u32);
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).await
}

async fn read_option_reply(stream: &mut SimStream) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    stream.read_exact(&mut header).await?;
    let mut fields = &header[..];
    if fields.get_u64() != OPTION_REPLY {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let (_option, kind, length) = (fields.get_u32(), fields.get_u32(), fields.get_u32());
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok((kind, data))
}

impl Shared {
    /// Reads replies until the connection ends or is out of step.
    async fn receive(&self, mut reader: ReadHalf<SimStream>) -> io::Result<()> {
        loop {
            match reader.read_u32().await? {
                SIMPLE_REPLY => self.simple(&mut reader).await?,
                STRUCTURED_REPLY => self.chunk(&mut reader).await?,
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    async fn simple(&self, reader: &mut ReadHalf<SimStream>) -> io::Result<()> {
        let error = reader.read_u32().await?;
        let cookie = reader.read_u64().await?;
        let mut waiting = self.take(cookie)?;
        if error == 0 {
            reader.read_exact(&mut waiting.data).await?;
        } else {
            waiting.error = Some(error);
        }
        waiting.finish();
        Ok(())
    }

    async fn chunk(&self, reader: &mut ReadHalf<SimStream>) -> io::Result<()> {
        let flags = reader.read_u16().await?;
        let kind = reader.read_u16().await?;
        let cookie = reader.read_u64().await?;
        let length = reader.read_u32().await?;
        let mut payload = vec![0; length as usize];
        reader.read_exact(&mut payload).await?;
        let mut waiting = self.take(cookie)?;
        let mut fields = &payload[..];
        match kind {
            CHUNK_DATA => {
                let start = waiting.place(fields.get_u64(), fields.len())?;
                waiting.data[start..start + fields.len()].copy_from_slice(fields);
            }
            CHUNK_HOLE => {
                let offset = fields.get_u64();
                waiting.place(offset, fields.get_u32() as usize)?;
            }
            kind if kind & CHUNK_ERROR != 0 => waiting.error = Some(fields.get_u32()),
            _ => {}
        }
        if flags & 1 != 0 {
            waiting.finish();
        } else {
            self.waiting.borrow_mut().insert(cookie, waiting);
        }
        Ok(())
    }

    fn take(&self, cookie: u64) -> io::Result<Waiting> {
        let taken = self.waiting.borrow_mut().remove(&cookie);
        taken.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an answer to nothing"))
    }
}

impl Waiting {
    fn place(&self, offset: u64, length: usize) -> io::Result<usize> {
        let start = offset.checked_sub(self.offset).map(|start| start as usize);
        let start = start.filter(|start| start + length <= self.data.len());
        start.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "data of another place"))
    }

    /// # Panics
    /// At an answer that no server gives: Linux would take it for an error of the disk.
    fn finish(self) {
        assert_ne!(self.error, Some(ESHUTDOWN), "a session that has ended is closed, not answered");
        let outcome = match self.error {
            None => Ok(self.data),
            Some(error) => Err(NbdError::Errno(error)),
        };
        // Whoever asked may have given up.
        let _ = self.answer.send(outcome);
    }
}
