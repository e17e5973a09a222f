//! Frames between nodes: layout, reading, writing. docs/peer-wire.md describes it.
//!
//! Step 5 of a write on its way to the followers. A frame is a fixed header, a body (protobuf or a
//! frozen binary encoding) and a payload of whole blocks, which lands in block-aligned memory so
//! that it goes to the disk without a copy. Never interprets a body.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::Poll;

use ballast_block::buffer::BufferPool;
use ballast_block::checksum::crc32;
use ballast_block::limits::PEER_FRAME_BYTES_MAX;
use ballast_block::{FamilyId, ReplicaId};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

/// The version of the frames that this program speaks.
pub const WIRE_VERSION: u8 = 1;

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 56;

const MAGIC: u16 = 0x4c42;

/// Read buffer of a peer connection, in bytes: small frames arrive many at a time. What it holds of
/// a payload is copied, so it is not larger.
const READ_BUFFER_BYTES: usize = 16 << 10;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// First frame of a connection, from the side that dialled.
    Hello = 1,
    /// Its answer.
    HelloReply = 2,
    /// One AppendEntries of a stream (`id` = stream).
    Append = 3,
    /// One answer of a stream.
    AppendReply = 4,
    /// The sender of a stream has no more.
    AppendEnd = 5,
    /// A request (`id` = call); the body names it.
    Call = 6,
    /// The answer of a call.
    CallReply = 7,
    /// A call or stream that failed at the receiver: the body is an error code.
    Failed = 8,
    /// Liveness of the connection.
    Ping = 9,
    /// Its answer.
    Pong = 10,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [Hello, HelloReply, Append, AppendReply, AppendEnd, Call, CallReply, Failed, Ping, Pong]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }
}

/// A frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The call or stream it belongs to.
    pub id: u64,
    /// The family it speaks of (0 also where it speaks of none).
    pub family: FamilyId,
    /// The sender's replica.
    pub from: ReplicaId,
    /// The receiver's replica: an unknown one is answered "not here", never made (hazard F5).
    pub to: ReplicaId,
    /// The message.
    pub body: Bytes,
    /// Blocks, in parts when sent, one part when received.
    pub payload: Vec<Bytes>,
}

impl Frame {
    /// A frame without family and payload.
    pub fn plain(kind: Kind, id: u64, body: Bytes) -> Self {
        let none = ReplicaId(0);
        Self { kind, id, family: FamilyId(0), from: none, to: none, body, payload: Vec::new() }
    }

    /// Bytes on the wire.
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.body.len() + self.payload.iter().map(Bytes::len).sum::<usize>()
    }

    /// Header and body as one buffer; the payload parts follow it on the wire.
    pub fn encode_head(&self) -> Bytes {
        let payload: usize = self.payload.iter().map(Bytes::len).sum();
        assert!(self.body.len() + payload <= PEER_FRAME_BYTES_MAX);
        let mut head = BytesMut::with_capacity(HEADER_BYTES + self.body.len());
        head.put_u16_le(MAGIC);
        head.put_u8(WIRE_VERSION);
        head.put_u8(self.kind as u8);
        head.put_u32_le(u32::try_from(self.body.len()).expect("asserted"));
        head.put_u32_le(u32::try_from(payload).expect("asserted"));
        head.put_u32_le(crc32(&self.body));
        head.put_u64_le(self.id);
        head.put_u64_le(self.family.0);
        head.put_u64_le(self.from.0);
        head.put_u64_le(self.to.0);
        head.put_u32_le(0);
        let crc = crc32(&head);
        head.put_u32_le(crc);
        head.put_slice(&self.body);
        head.freeze()
    }
}

/// A connection that can't be read on.
#[derive(Debug, Error)]
pub enum ReadFrameError {
    /// The other side closed it, or it broke.
    #[error("peer connection ended: {0}")]
    ConnectionEnded(#[from] std::io::Error),
    /// Not our protocol, or bytes damaged on the way.
    #[error("peer frame is damaged: {0}")]
    FrameDamaged(&'static str),
    /// The other side speaks another version.
    #[error("peer speaks wire version {0}, this node {WIRE_VERSION}: upgrade the older one")]
    VersionUnknown(u8),
    /// More than a frame may hold.
    #[error("peer frame of {0} bytes is over the limit")]
    FrameTooLarge(usize),
    /// What follows a frame that must be answered first was read along with it.
    #[error("peer sent {0} bytes more before the answer to its last frame: it must await that")]
    BytesReadAhead(usize),
}

/// Reads frames.
pub struct FrameReader<R> {
    inner: R,
    pool: BufferPool,
    /// `ahead[start..end]` is received and not taken.
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Over one half of a connection; payload memory comes from `pool`.
    pub fn new(inner: R, pool: BufferPool) -> Self {
        Self { inner, pool, ahead: vec![0; READ_BUFFER_BYTES].into(), start: 0, end: 0 }
    }

    /// Gives the connection back, for somebody else to read on behind the frames taken.
    ///
    /// # Errors
    /// [`ReadFrameError::BytesReadAhead`] when more was received than those frames: it would be
    /// lost.
    pub fn into_inner(self) -> Result<R, ReadFrameError> {
        match self.end - self.start {
            0 => Ok(self.inner),
            ahead => Err(ReadFrameError::BytesReadAhead(ahead)),
        }
    }

    /// Fills `target`. Where much is missing it is read in place, else along with what follows.
    async fn fill(&mut self, target: &mut [u8]) -> std::io::Result<()> {
        let mut filled = 0;
        loop {
            let step = (target.len() - filled).min(self.end - self.start);
            let ready = &self.ahead[self.start..self.start + step];
            target[filled..filled + step].copy_from_slice(ready);
            filled += step;
            self.start += step;
            let rest = &mut target[filled..];
            if rest.is_empty() {
                return Ok(());
            }
            let in_place = rest.len() >= READ_BUFFER_BYTES / 2;
            let count = match in_place {
                true => self.inner.read(rest).await?,
                false => self.inner.read(&mut self.ahead).await?,
            };
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if in_place {
                filled += count;
            } else {
                (self.start, self.end) = (0, count);
            }
        }
    }

    /// The next frame. Not cancel-safe: a caller that drops it drops the connection.
    ///
    /// # Errors
    /// [`ReadFrameError`]; the connection is of no further use.
    pub async fn next(&mut self) -> Result<Frame, ReadFrameError> {
        let mut fixed = [0; HEADER_BYTES];
        self.fill(&mut fixed).await?;
        let crc_at = HEADER_BYTES - 4;
        if crc32(&fixed[..crc_at]).to_le_bytes() != fixed[crc_at..] {
            return Err(ReadFrameError::FrameDamaged("header checksum"));
        }
        let mut input = &fixed[..];
        if input.get_u16_le() != MAGIC {
            return Err(ReadFrameError::FrameDamaged("magic"));
        }
        let version = input.get_u8();
        if version != WIRE_VERSION {
            return Err(ReadFrameError::VersionUnknown(version));
        }
        let kind = input.get_u8();
        let kind = Kind::from_byte(kind).ok_or(ReadFrameError::FrameDamaged("unknown kind"))?;
        let body_len = input.get_u32_le() as usize;
        let payload_len = input.get_u32_le() as usize;
        let body_crc = input.get_u32_le();
        let total = body_len.saturating_add(payload_len);
        if total > PEER_FRAME_BYTES_MAX {
            return Err(ReadFrameError::FrameTooLarge(total));
        }
        let id = input.get_u64_le();
        let family = FamilyId(input.get_u64_le());
        let from = ReplicaId(input.get_u64_le());
        let to = ReplicaId(input.get_u64_le());
        let mut body = vec![0; body_len];
        self.fill(&mut body).await?;
        if crc32(&body) != body_crc {
            return Err(ReadFrameError::FrameDamaged("body checksum"));
        }
        let mut payload = Vec::new();
        if payload_len > 0 {
            let mut buffer = self.pool.get(payload_len);
            self.fill(&mut buffer).await?;
            payload.push(buffer.freeze());
        }
        Ok(Frame { kind, id, family, from, to, body: body.into(), payload })
    }
}

/// Parts of frames on their way out, written many at a time.
#[derive(Default)]
pub struct OutQueue {
    parts: VecDeque<Bytes>,
    bytes: usize,
}

impl OutQueue {
    /// Adds a frame.
    pub fn push(&mut self, frame: Frame) {
        self.bytes += frame.wire_bytes();
        self.parts.push_back(frame.encode_head());
        self.parts.extend(frame.payload.into_iter().filter(|part| !part.is_empty()));
    }

    /// Bytes waiting.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Drops what waits.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.bytes = 0;
    }

    /// Writes some of what waits, as much as one system call takes.
    pub fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        writer: &mut W,
        context: &mut std::task::Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        const SLICES_MAX: usize = 64;
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut used = 0;
        for (slice, part) in slices.iter_mut().zip(&self.parts) {
            *slice = IoSlice::new(part);
            used += 1;
        }
        let written = match Pin::new(writer).poll_write_vectored(context, &slices[..used]) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(written)) => written,
        };
        self.advance(written);
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while written > 0 {
            let part = self.parts.front_mut().expect("no more was written than waited");
            let step = written.min(part.len());
            part.advance(step);
            written -= step;
            if part.is_empty() {
                self.parts.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn next(reader: &mut FrameReader<&[u8]>) -> Frame {
        match pin!(reader.next()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(frame) => frame.unwrap(),
            Poll::Pending => unreachable!("memory is always ready"),
        }
    }

    #[test]
    fn the_connection_is_given_back_where_nothing_was_read_ahead() {
        let frame = Frame::plain(Kind::Hello, 7, Bytes::from_static(b"who"));
        let bytes = frame.encode_head();
        let reader = FrameReader::new(&bytes[..], BufferPool::default());
        assert_eq!(reader.into_inner().unwrap(), &bytes[..]);

        let mut reader = FrameReader::new(&bytes[..], BufferPool::default());
        assert_eq!(next(&mut reader).body, frame.body);
        assert!(reader.into_inner().unwrap().is_empty());

        let two = [&bytes[..], &bytes[..]].concat();
        let mut reader = FrameReader::new(&two[..], BufferPool::default());
        next(&mut reader);
        match reader.into_inner().unwrap_err() {
            ReadFrameError::BytesReadAhead(ahead) => assert_eq!(ahead, bytes.len()),
            other => panic!("{other}"),
        }
        let mut reader = FrameReader::new(&two[..], BufferPool::default());
        next(&mut reader);
        next(&mut reader);
        assert!(reader.into_inner().is_ok());
    }
}
