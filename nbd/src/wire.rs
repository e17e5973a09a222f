//! Layouts and numbers of the NBD protocol, as its document `doc/proto.md` defines them.
//!
//! Owns encoding and decoding of fixed headers, all big-endian. Never decides anything.

use bytes::BufMut;

/// First magic of the server's greeting ("NBDMAGIC").
pub(crate) const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Magic of the newstyle greeting and of every option ("IHAVEOPT").
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of every answer to an option.
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of every request.
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of one chunk of a structured reply.
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Bytes of the client's flags, its first message.
pub(crate) const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes of an option before its data.
pub(crate) const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a request before its payload.
pub(crate) const REQUEST_BYTES: usize = 28;
/// Reserved zeroes that end the answer to `NBD_OPT_EXPORT_NAME`.
pub(crate) const EXPORT_NAME_PADDING_BYTES: usize = 124;
/// Longest string the protocol allows, in bytes.
pub(crate) const STRING_BYTES_MAX: usize = 4096;

/// Handshake flags of the greeting, which are also the client flags that answer them.
pub(crate) mod handshake_flag {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub(crate) const NO_ZEROES: u16 = 1 << 1;
}

/// What an export supports.
pub(crate) mod transmission_flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Types of an answer to an option.
pub(crate) mod option_reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(crate) const ERR_POLICY: u32 = (1 << 31) + 2;
    pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub(crate) const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub(crate) const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information in an `NBD_REP_INFO`.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Types of a request.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub(crate) mod command_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
}

/// Types of a chunk of a structured reply.
pub(crate) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
}

/// Flag of the last chunk of a structured reply.
pub(crate) const CHUNK_DONE: u16 = 1 << 0;

/// Extent flags of the context `base:allocation`.
pub(crate) mod allocation {
    pub(crate) const HOLE: u32 = 1 << 0;
    pub(crate) const ZERO: u32 = 1 << 1;
}

/// The only metadata context there is.
pub(crate) const ALLOCATION_CONTEXT: &str = "base:allocation";
/// The id under which the context's extents are sent.
pub(crate) const ALLOCATION_CONTEXT_ID: u32 = 1;

/// Error numbers of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Errno {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
}

/// An option before its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionHeader {
    pub(crate) option: u32,
    /// Bytes of data that follow.
    pub(crate) length: u32,
}

impl OptionHeader {
    /// # Errors
    /// The magic found when it is not that of an option.
    pub(crate) fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<Self, u64> {
        let mut fields = Fields(bytes);
        match fields.u64() {
            Some(OPTION_MAGIC) => {}
            found => return Err(found.unwrap_or_default()),
        }
        let option = fields.u32().expect("16 bytes hold it");
        Ok(Self { option, length: fields.u32().expect("16 bytes hold it") })
    }
}

/// A request before its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    /// The client's number for it, sent back in each reply.
    pub(crate) cookie: u64,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes of the volume, and of payload for a write.
    pub(crate) length: u32,
}

impl Request {
    /// # Errors
    /// The magic found when it is not that of a request.
    pub(crate) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, u32> {
        const FITS: &str = "28 bytes hold it";
        let mut fields = Fields(bytes);
        let magic = fields.u32().expect(FITS);
        if magic != REQUEST_MAGIC {
            return Err(magic);
        }
        Ok(Self {
            flags: fields.u16().expect(FITS),
            command: fields.u16().expect(FITS),
            cookie: fields.u64().expect(FITS),
            offset: fields.u64().expect(FITS),
            length: fields.u32().expect(FITS),
        })
    }
}

/// The server's greeting.
pub(crate) fn put_greeting(out: &mut impl BufMut) {
    out.put_u64(GREETING_MAGIC);
    out.put_u64(OPTION_MAGIC);
    out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
}

/// The head of an answer to an option; `length` bytes follow.
pub(crate) fn put_option_reply(out: &mut impl BufMut, option: u32, reply: u32, length: usize) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(reply);
    out.put_u32(u32::try_from(length).expect("answers are small"));
}

/// A simple reply; the data of a successful read follows.
pub(crate) fn put_simple_reply(out: &mut impl BufMut, error: Option<Errno>, cookie: u64) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error.map_or(0, |errno| errno as u32));
    out.put_u64(cookie);
}

/// The head of a chunk of a structured reply; `length` bytes follow.
pub(crate) fn put_chunk(out: &mut impl BufMut, done: bool, kind: u16, cookie: u64, length: u32) {
    out.put_u32(STRUCTURED_REPLY_MAGIC);
    out.put_u16(if done { CHUNK_DONE } else { 0 });
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(length);
}

/// Reads fields from the front of bytes; `None` when they are too short.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(front)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*front)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length in 32 bits before it, of at most [`STRING_BYTES_MAX`].
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        if length > STRING_BYTES_MAX { None } else { self.bytes(length) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_golden_vector() {
        let mut out = Vec::new();
        put_greeting(&mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn option_golden_vectors() {
        let header = *b"IHAVEOPT\0\0\0\x07\0\0\x01\x02";
        let decoded = OptionHeader { option: option::GO, length: 0x102 };
        assert_eq!(OptionHeader::decode(&header), Ok(decoded));
        assert_eq!(OptionHeader::decode(b"NBDMAGIC\0\0\0\x07\0\0\0\0"), Err(GREETING_MAGIC));

        let mut out = Vec::new();
        put_option_reply(&mut out, option::LIST, option_reply::ERR_UNSUP, 5);
        assert_eq!(out, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x03\x80\0\0\x01\0\0\0\x05");
    }

    #[test]
    fn request_golden_vector() {
        let bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
            \0\0\0\x01\0\0\x10\0\0\0\x02\0";
        let request = Request {
            flags: command_flag::FUA,
            command: command::WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1_0000_1000,
            length: 512,
        };
        assert_eq!(Request::decode(&bytes), Ok(request));
        assert_eq!(Request::decode(&[0x67; REQUEST_BYTES]), Err(0x6767_6767));
    }

    #[test]
    fn reply_golden_vectors() {
        let mut out = Vec::new();
        put_simple_reply(&mut out, Some(Errno::NoSpace), 0xab);
        assert_eq!(out, b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\xab");

        let mut out = Vec::new();
        put_chunk(&mut out, true, chunk::ERROR, 0xab, 6);
        assert_eq!(out, b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\xab\0\0\0\x06");
    }

    #[test]
    fn short_fields_are_none() {
        let mut fields = Fields(&[0, 0, 0, 9, 1]);
        assert_eq!(fields.string(), None);
        assert_eq!(Fields(&[1]).u16(), None);
        assert_eq!(Fields(&[0, 0, 0, 1, 7]).string(), Some(&[7][..]));
        let mut long = vec![0, 0, 0x10, 1];
        long.resize(4 + 4097, 0);
        assert_eq!(Fields(&long).string(), None);
    }
}
