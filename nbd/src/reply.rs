//! Replies: what goes back to the client, as headers and shared pieces of data.
//!
//! Owns the encoding of every answer in the transmission phase, and the queue of bytes to send.
//! Never copies the data of a read: it is queued by reference. Write path, step 8.

use std::collections::VecDeque;
use std::io::IoSlice;

use ballast_block::command::{ReadPart, StatusExtent};
use ballast_block::limits::NBD_STATUS_EXTENTS_MAX;
use ballast_block::{ByteRange, IoError};
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::wire::{self, Errno, STRING_BYTES_MAX, allocation, chunk};

/// Bytes to send, in order. Read it as a [`Buf`], best with [`Buf::chunks_vectored`].
#[derive(Debug)]
pub struct ReplyQueue {
    pieces: VecDeque<Bytes>,
    /// Follows the pieces: small things are gathered here.
    tail: BytesMut,
    remaining: usize,
}

/// Bytes that the tail allocates at once: a hundred headers share an allocation.
const TAIL_BYTES: usize = 4096;

/// Data up to this size is copied behind the header before it: cheaper than one more piece.
const COPIED_BYTES_MAX: usize = 512;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

impl Default for ReplyQueue {
    fn default() -> Self {
        let tail = BytesMut::with_capacity(TAIL_BYTES);
        Self { pieces: VecDeque::new(), tail, remaining: 0 }
    }
}

impl ReplyQueue {
    /// Appends what `encode` writes.
    pub(crate) fn put(&mut self, encode: impl FnOnce(&mut BytesMut)) {
        let before = self.tail.len();
        encode(&mut self.tail);
        self.remaining += self.tail.len() - before;
    }

    pub(crate) fn put_data(&mut self, data: Bytes) {
        if data.len() <= COPIED_BYTES_MAX {
            return self.put(|out| out.put_slice(&data));
        }
        self.remaining += data.len();
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.pieces.push_back(data);
    }

    fn put_zeroes(&mut self, mut length: u64) {
        while length > 0 {
            let part = length.min(ZEROES.len() as u64);
            self.put_data(Bytes::from_static(&ZEROES[..part as usize]));
            length -= part;
        }
    }

    fn put_part(&mut self, part: ReadPart) {
        match part {
            ReadPart::Data(data) => self.put_data(data),
            ReadPart::Hole(length) => self.put_zeroes(length),
        }
    }
}

impl Buf for ReplyQueue {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        match self.pieces.front() {
            Some(piece) => piece,
            None => &self.tail,
        }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pieces = self.pieces.iter().map(|piece| &piece[..]).chain([&self.tail[..]]);
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(pieces.filter(|piece| !piece.is_empty())) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.remaining, "more was sent than there was");
        self.remaining -= count;
        while count > 0 {
            let Some(front) = self.pieces.front_mut() else { return self.tail.advance(count) };
            let part = count.min(front.len());
            front.advance(part);
            count -= part;
            if front.is_empty() {
                self.pieces.pop_front();
            }
        }
    }
}

/// How replies of a connection look, from its negotiation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replier {
    pub(crate) structured: bool,
}

impl Replier {
    /// Success without data.
    pub(crate) fn done(self, out: &mut ReplyQueue, cookie: u64) {
        out.put(|out| wire::put_simple_reply(out, None, cookie));
    }

    /// Success of a read of no bytes: a structured reply needs its last chunk all the same.
    pub(crate) fn empty_read(self, out: &mut ReplyQueue, cookie: u64) {
        if self.structured {
            out.put(|out| wire::put_chunk(out, true, chunk::NONE, cookie, 0));
        } else {
            self.done(out, cookie);
        }
    }

    /// A failure, with words for people where the protocol has room for them.
    pub(crate) fn error(self, out: &mut ReplyQueue, cookie: u64, errno: Errno, message: &str) {
        if !self.structured {
            return out.put(|out| wire::put_simple_reply(out, Some(errno), cookie));
        }
        let message = clipped(message);
        out.put(|out| {
            let length = u32::try_from(6 + message.len()).expect("clipped");
            wire::put_chunk(out, true, chunk::ERROR, cookie, length);
            out.put_u32(errno as u32);
            out.put_u16(u16::try_from(message.len()).expect("clipped"));
            out.put_slice(message.as_bytes());
        });
    }

    /// Data of a successful read of `range`.
    ///
    /// # Panics
    /// When the parts do not add up to the range: a bug of the caller.
    pub(crate) fn data(self, out: &mut ReplyQueue, read: ReadRequest, parts: Vec<ReadPart>) {
        let total: u64 = parts.iter().map(ReadPart::len).sum();
        assert_eq!(total, read.range.length, "parts of a read must add up to its length");
        if !self.structured {
            out.put(|out| wire::put_simple_reply(out, None, read.cookie));
            parts.into_iter().for_each(|part| out.put_part(part));
        } else if read.one_chunk {
            one_chunk(out, read, parts);
        } else {
            chunks(out, read, parts);
        }
    }

    /// Extents of a successful block status of `range`: merged, clipped to the range.
    ///
    /// # Panics
    /// When there are none: a bug of the caller.
    pub(crate) fn status(self, out: &mut ReplyQueue, ask: StatusRequest, all: &[StatusExtent]) {
        let extents = merged(ask, all);
        assert!(!extents.is_empty(), "a block status must cover the start of its range");
        out.put(|out| {
            let length = u32::try_from(4 + 8 * extents.len()).expect("bounded by limits");
            wire::put_chunk(out, true, chunk::BLOCK_STATUS, ask.cookie, length);
            out.put_u32(wire::ALLOCATION_CONTEXT_ID);
            for extent in &extents {
                out.put_u32(u32::try_from(extent.length).expect("clipped to a 32-bit length"));
                let hole = allocation::HOLE | allocation::ZERO;
                out.put_u32(if extent.allocated { 0 } else { hole });
            }
        });
    }
}

/// What the reply to a read needs to know of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadRequest {
    pub(crate) cookie: u64,
    pub(crate) range: ByteRange,
    /// The client asked not to have it in fragments.
    pub(crate) one_chunk: bool,
}

/// What the reply to a block status needs to know of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StatusRequest {
    pub(crate) cookie: u64,
    pub(crate) range: ByteRange,
    /// The client asked for the first extent only.
    pub(crate) one_extent: bool,
}

/// One chunk per run of data and per hole, the last one marked as such.
fn chunks(out: &mut ReplyQueue, read: ReadRequest, mut parts: Vec<ReadPart>) {
    parts.retain(|part| !part.is_empty());
    let mut offset = read.range.offset;
    let mut parts = parts.into_iter();
    while let Some(first) = parts.as_slice().first() {
        let hole = is_hole(first);
        let run = parts.as_slice().iter().take_while(|part| is_hole(part) == hole);
        let (count, length) = run.fold((0, 0), |(count, sum), part| (count + 1, sum + part.len()));
        let done = count == parts.len();
        let run = parts.by_ref().take(count);
        if hole {
            run.for_each(drop);
            put_hole(out, done, read.cookie, offset, length);
        } else {
            put_data_head(out, done, read.cookie, offset, length);
            run.for_each(|part| out.put_part(part));
        }
        offset += length;
    }
}

fn is_hole(part: &ReadPart) -> bool {
    matches!(part, ReadPart::Hole(_))
}

/// All in one chunk: a hole only when it is nothing else, zeroes in full otherwise.
fn one_chunk(out: &mut ReplyQueue, read: ReadRequest, parts: Vec<ReadPart>) {
    let ByteRange { offset, length } = read.range;
    if parts.iter().all(|part| part.is_empty() || is_hole(part)) {
        return put_hole(out, true, read.cookie, offset, length);
    }
    put_data_head(out, true, read.cookie, offset, length);
    parts.into_iter().for_each(|part| out.put_part(part));
}

fn put_hole(out: &mut ReplyQueue, done: bool, cookie: u64, offset: u64, length: u64) {
    out.put(|out| {
        wire::put_chunk(out, done, chunk::OFFSET_HOLE, cookie, 12);
        out.put_u64(offset);
        out.put_u32(u32::try_from(length).expect("a read is within the request limit"));
    });
}

fn put_data_head(out: &mut ReplyQueue, done: bool, cookie: u64, offset: u64, length: u64) {
    out.put(|out| {
        let length = u32::try_from(8 + length).expect("a read is within the request limit");
        wire::put_chunk(out, done, chunk::OFFSET_DATA, cookie, length);
        out.put_u64(offset);
    });
}

fn merged(ask: StatusRequest, all: &[StatusExtent]) -> Vec<StatusExtent> {
    let limit = if ask.one_extent { 1 } else { NBD_STATUS_EXTENTS_MAX };
    let mut extents: Vec<StatusExtent> = Vec::new();
    let mut left = ask.range.length;
    for extent in all {
        let length = extent.length.min(left);
        if length == 0 {
            continue;
        }
        let full = extents.len() == limit;
        match extents.last_mut() {
            Some(last) if last.allocated == extent.allocated => last.length += length,
            _ if full => break,
            _ => extents.push(StatusExtent { length, ..*extent }),
        }
        left -= length;
    }
    extents
}

/// `message` as far as the protocol lets a string go.
pub(crate) fn clipped(message: &str) -> &str {
    let mut end = message.len().min(STRING_BYTES_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

/// The error number of a failed command, not of one that ends its session.
///
/// `beyond_end` is what the protocol asks for where the range is outside: it differs by command.
pub(crate) fn errno_of(error: &IoError, beyond_end: Errno) -> Errno {
    match error {
        IoError::RangeOutside => beyond_end,
        IoError::TooLarge { .. } => Errno::Invalid,
        IoError::ReadOnly => Errno::NotPermitted,
        IoError::NoSpace => Errno::NoSpace,
        IoError::Fenced | IoError::ShuttingDown => unreachable!("they end the session unanswered"),
        IoError::Damaged | IoError::TimedOut => Errno::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(queue: &mut ReplyQueue) -> Vec<u8> {
        queue.copy_to_bytes(queue.remaining()).to_vec()
    }

    fn read(offset: u64, length: u64, one_chunk: bool) -> ReadRequest {
        ReadRequest { cookie: 7, range: ByteRange::new(offset, length), one_chunk }
    }

    fn data(bytes: &'static [u8]) -> ReadPart {
        ReadPart::Data(Bytes::from_static(bytes))
    }

    const COOKIE: &[u8] = b"\0\0\0\0\0\0\0\x07";

    #[test]
    fn simple_read_spells_holes_out() {
        let mut queue = ReplyQueue::default();
        let parts = vec![data(b"ab"), ReadPart::Hole(3), data(b"c")];
        Replier { structured: false }.data(&mut queue, read(0, 6, false), parts);
        let expected = [b"\x67\x44\x66\x98\0\0\0\0", COOKIE, b"ab\0\0\0c"].concat();
        assert_eq!(sent(&mut queue), expected);
    }

    #[test]
    fn structured_read_has_a_chunk_per_run() {
        let mut queue = ReplyQueue::default();
        let parts = vec![data(b"a"), data(b"b"), ReadPart::Hole(3), data(b""), ReadPart::Hole(1)];
        Replier { structured: true }.data(&mut queue, read(0x1000, 6, false), parts);
        let expected = [
            b"\x66\x8e\x33\xef\0\0\0\x01",
            COOKIE,
            b"\0\0\0\x0a\0\0\0\0\0\0\x10\0ab",
            b"\x66\x8e\x33\xef\0\x01\0\x02",
            COOKIE,
            b"\0\0\0\x0c\0\0\0\0\0\0\x10\x02\0\0\0\x04",
        ]
        .concat();
        assert_eq!(sent(&mut queue), expected);
    }

    #[test]
    fn unfragmented_read_is_one_chunk() {
        let mut queue = ReplyQueue::default();
        let parts = vec![ReadPart::Hole(2), data(b"b")];
        Replier { structured: true }.data(&mut queue, read(0, 3, true), parts);
        let head: &[u8] = b"\x66\x8e\x33\xef\0\x01\0\x01";
        let expected = [head, COOKIE, b"\0\0\0\x0b\0\0\0\0\0\0\0\0\0\0b"].concat();
        assert_eq!(sent(&mut queue), expected);

        let parts = vec![ReadPart::Hole(2), ReadPart::Hole(1)];
        Replier { structured: true }.data(&mut queue, read(0, 3, true), parts);
        let head: &[u8] = b"\x66\x8e\x33\xef\0\x01\0\x02";
        let expected = [head, COOKIE, b"\0\0\0\x0c\0\0\0\0\0\0\0\0\0\0\0\x03"].concat();
        assert_eq!(sent(&mut queue), expected);
    }

    #[test]
    fn status_is_merged_and_clipped() {
        let extent = |length, allocated| StatusExtent { length, allocated };
        let all = [extent(1, true), extent(2, true), extent(0, false), extent(9, false)];
        let mut ask = StatusRequest { cookie: 7, range: ByteRange::new(0, 8), one_extent: false };
        let mut queue = ReplyQueue::default();
        Replier { structured: true }.status(&mut queue, ask, &all);
        let head: &[u8] = b"\x66\x8e\x33\xef\0\x01\0\x05";
        let allocated = b"\0\0\0\x03\0\0\0\0";
        let expected =
            [head, COOKIE, b"\0\0\0\x14\0\0\0\x01", allocated, b"\0\0\0\x05\0\0\0\x03"].concat();
        assert_eq!(sent(&mut queue), expected);

        ask.one_extent = true;
        Replier { structured: true }.status(&mut queue, ask, &all);
        let expected = [head, COOKIE, b"\0\0\0\x0c\0\0\0\x01", allocated].concat();
        assert_eq!(sent(&mut queue), expected);
    }

    #[test]
    fn status_of_a_shredded_range_is_bounded() {
        let all: Vec<_> = (0..NBD_STATUS_EXTENTS_MAX as u64 * 2)
            .map(|number| StatusExtent { length: 4096, allocated: number % 2 == 0 })
            .collect();
        let range = ByteRange::new(0, u64::from(u32::MAX));
        let ask = StatusRequest { cookie: 7, range, one_extent: false };
        assert_eq!(merged(ask, &all), all[..NBD_STATUS_EXTENTS_MAX]);
    }

    #[test]
    fn errors_carry_words_when_structured() {
        let mut queue = ReplyQueue::default();
        Replier { structured: true }.error(&mut queue, 7, Errno::NoSpace, "full");
        let head: &[u8] = b"\x66\x8e\x33\xef\0\x01\x80\x01";
        let expected = [head, COOKIE, b"\0\0\0\x0a\0\0\0\x1c\0\x04full"].concat();
        assert_eq!(sent(&mut queue), expected);
        Replier { structured: false }.error(&mut queue, 7, Errno::NoSpace, "full");
        assert_eq!(sent(&mut queue), [b"\x67\x44\x66\x98\0\0\0\x1c", COOKIE].concat());
    }

    #[test]
    fn errors_of_commands() {
        let at = |error| errno_of(&error, Errno::NoSpace);
        assert_eq!(at(IoError::RangeOutside), Errno::NoSpace);
        assert_eq!(errno_of(&IoError::RangeOutside, Errno::Invalid), Errno::Invalid);
        assert_eq!(at(IoError::TooLarge { limit: 1 }), Errno::Invalid);
        assert_eq!(at(IoError::ReadOnly), Errno::NotPermitted);
        assert_eq!(at(IoError::NoSpace), Errno::NoSpace);
        assert_eq!(at(IoError::Damaged), Errno::Io);
        assert_eq!(at(IoError::TimedOut), Errno::Io);
    }

    #[test]
    fn large_data_is_not_copied() {
        let block = Bytes::from(vec![9; 4096]);
        let mut queue = ReplyQueue::default();
        let part = ReadPart::Data(block.clone());
        Replier { structured: true }.data(&mut queue, read(0, 4096, false), vec![part]);
        Replier { structured: true }.done(&mut queue, 8);
        assert_eq!(queue.remaining(), 28 + 4096 + 16);
        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(queue.chunks_vectored(&mut slices), 3);
        assert_eq!(slices[1].as_ptr(), block.as_ptr());
        queue.advance(28 + 4000);
        assert_eq!(queue.chunk().len(), 96);
        queue.advance(96 + 16);
        assert!(!queue.has_remaining());
        assert!(queue.chunk().is_empty());
    }

    #[test]
    fn zeroes_of_a_large_simple_read_take_no_memory() {
        let length = 32 << 20;
        let mut queue = ReplyQueue::default();
        let hole = vec![ReadPart::Hole(length)];
        Replier { structured: false }.data(&mut queue, read(0, length, false), hole);
        assert_eq!(queue.remaining() as u64, 16 + length);
        assert!(queue.pieces.iter().skip(1).all(|piece| piece.as_ptr() == ZEROES.as_ptr()));
    }

    #[test]
    fn long_messages_are_clipped_at_a_character() {
        let message = format!("a{}", "é".repeat(STRING_BYTES_MAX));
        assert_eq!(clipped(&message).len(), STRING_BYTES_MAX - 1);
    }
}
