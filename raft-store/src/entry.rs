//! A log entry: what it carries, and its encoding, the same on disk and between peers.
//!
//! The encoding is frozen per version (docs/disk-format.md, "Entry"). A payload of blocks is never
//! part of the encoded header: it travels beside it, on its own pages, and is never copied.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use ballast_block::checksum::{block_crcs, crc32};
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::TRANSFER_BLOCKS_MAX;
use ballast_block::{
    AlignedBuf, AttachmentId, BlockRange, BranchId, Epoch, Generation, NodeId, Payload,
};
use bytes::{Buf, BufMut, Bytes};
use thiserror::Error;

use crate::types::{Entry, EntryPayload, Member, Membership, log_id, term_of};

/// The version of the encoding that this program writes, and the newest that it reads.
pub const ENTRY_VERSION: u16 = 1;

/// Largest encoded header, in bytes: a write of 256 blocks with a checksum each, with room.
pub const ENTRY_HEADER_BYTES_MAX: usize = 1536;

/// Bytes of a control command or membership that travel in the header; longer ones are payload.
pub const INLINE_BYTES_MAX: usize = 1024;

/// Application data of an entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    /// Who asks, and under which right.
    pub origin: Origin,
    /// What is asked.
    pub body: Body,
}

/// Who proposed a command and under which right; apply decides on it (hazard F10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The attachment; 0 for commands of Ballast itself.
    pub attachment: AttachmentId,
    /// Its generation.
    pub generation: Generation,
    /// Number of the request within the attachment; a retry of ours repeats it. 0 = not a request.
    pub request: u64,
    /// Every request below this one was answered to the host: apply forgets them.
    pub answered_below: u64,
    /// The node that holds the lease.
    pub holder: NodeId,
    /// The holder's epoch.
    pub epoch: Epoch,
    /// The branch that is written.
    pub branch: BranchId,
    /// The key that the payload is encrypted with; 0 = plain.
    pub key: u32,
}

/// What a command does.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Points blocks at new payload.
    Write {
        /// Which blocks.
        range: BlockRange,
        /// One CRC-32 per block, taken before the payload first left memory.
        crcs: Rc<[u32]>,
        /// The payload, or the knowledge that it is in the store.
        data: WriteData,
    },
    /// Unmaps blocks: they read as zeroes.
    Trim {
        /// First block.
        start: u64,
        /// Number of blocks; may be the whole volume.
        count: u64,
    },
    /// A command of the layer above, in its own versioned encoding.
    Control(Bytes),
}

/// Where the payload of a write is.
#[derive(Clone, PartialEq)]
pub enum WriteData {
    /// In memory: block-aligned, as long as the range.
    Memory(Payload),
    /// In the store, at the place that the log index has; only a sender to a peer resolves it.
    Stored,
}

impl fmt::Debug for WriteData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WriteData::Memory(bytes) => write!(f, "Memory({})", bytes.len()),
            WriteData::Stored => write!(f, "Stored"),
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.body {
            Body::Write { range, .. } => write!(f, "write {range}"),
            Body::Trim { start, count } => write!(f, "trim blocks {start}+{count}"),
            Body::Control(bytes) => write!(f, "control of {} bytes", bytes.len()),
        }
    }
}

impl Command {
    /// A write of `payload` at block `start`; takes the checksums.
    pub fn write(origin: Origin, start: u64, payload: Payload) -> Self {
        let crcs: Rc<[u32]> = block_crcs(&payload).collect();
        assert!(!crcs.is_empty() && crcs.len() <= TRANSFER_BLOCKS_MAX);
        let range = BlockRange::new(start, u32::try_from(crcs.len()).expect("asserted"));
        Self { origin, body: Body::Write { range, crcs, data: WriteData::Memory(payload) } }
    }

    /// A control command of Ballast itself.
    pub fn control(bytes: Bytes) -> Self {
        Self { origin: Origin::default(), body: Body::Control(bytes) }
    }

    /// Whether the extent map may change when it is applied.
    pub(crate) fn changes_map(&self) -> bool {
        !matches!(self.body, Body::Control(_))
    }
}

/// Bytes that are not an entry of a version that this program reads.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DecodeEntryError {
    /// Fewer bytes than the fields need.
    #[error("entry is cut short")]
    Short,
    /// A kind that this program does not know.
    #[error("entry has unknown kind {0}")]
    UnknownKind(u8),
    /// Written by a newer version in a way that this one must not skip (hazard 31).
    #[error(
        "entry needs a program that reads version {needed}; this one reads {ENTRY_VERSION}: upgrade this node"
    )]
    NewerVersion {
        /// The oldest version that understands it.
        needed: u16,
    },
    /// A field has a value that it can't have.
    #[error("entry field {0} is out of range")]
    FieldOutOfRange(&'static str),
    /// The payload beside the header does not match it.
    #[error("entry payload does not match its checksum or length")]
    PayloadMismatch,
}

const KIND_BLANK: u8 = 0;
const KIND_MEMBERSHIP: u8 = 1;
const KIND_WRITE: u8 = 2;
const KIND_TRIM: u8 = 3;
const KIND_CONTROL: u8 = 4;

/// Encodes the header of `entry` at the end of `out`; answers the payload that belongs beside it:
/// whole blocks, or nothing.
pub fn encode(entry: &Entry, out: &mut Vec<u8>) -> Option<WriteData> {
    let kind = match &entry.payload {
        EntryPayload::Blank => KIND_BLANK,
        EntryPayload::Membership(_) => KIND_MEMBERSHIP,
        EntryPayload::Normal(command) => match command.body {
            Body::Write { .. } => KIND_WRITE,
            Body::Trim { .. } => KIND_TRIM,
            Body::Control(_) => KIND_CONTROL,
        },
    };
    out.put_u8(kind);
    out.put_u8(0);
    out.put_u16_le(ENTRY_VERSION);
    out.put_u64_le(term_of(&entry.log_id));
    out.put_u64_le(entry.log_id.index);
    match &entry.payload {
        EntryPayload::Blank => None,
        EntryPayload::Membership(membership) => encode_long(&encode_membership(membership), out),
        EntryPayload::Normal(command) => {
            encode_origin(&command.origin, out);
            encode_body(&command.body, out)
        }
    }
}

fn encode_origin(origin: &Origin, out: &mut Vec<u8>) {
    out.put_u64_le(origin.attachment.0);
    out.put_u64_le(origin.generation.0);
    out.put_u64_le(origin.request);
    out.put_u64_le(origin.answered_below);
    out.put_u64_le(origin.epoch.0);
    out.put_u32_le(origin.holder.0);
    out.put_u32_le(origin.branch.0);
    out.put_u32_le(origin.key);
}

fn encode_body(body: &Body, out: &mut Vec<u8>) -> Option<WriteData> {
    match body {
        Body::Write { range, crcs, data } => {
            assert_eq!(range.count as usize, crcs.len());
            out.put_u64_le(range.start);
            out.put_u32_le(range.count);
            crcs.iter().for_each(|&crc| out.put_u32_le(crc));
            Some(data.clone())
        }
        Body::Trim { start, count } => {
            out.put_u64_le(*start);
            out.put_u64_le(*count);
            None
        }
        Body::Control(bytes) => encode_long(bytes, out),
    }
}

/// Length, checksum, then the bytes here if they are few, else padded to blocks as payload.
fn encode_long(bytes: &[u8], out: &mut Vec<u8>) -> Option<WriteData> {
    out.put_u32_le(u32::try_from(bytes.len()).expect("bounded by TRANSFER_BYTES_MAX"));
    out.put_u32_le(crc32(bytes));
    if bytes.len() <= INLINE_BYTES_MAX {
        out.put_slice(bytes);
        return None;
    }
    let mut padded = AlignedBuf::zeroed(bytes.len().next_multiple_of(BLOCK_SIZE));
    padded[..bytes.len()].copy_from_slice(bytes);
    Some(WriteData::Memory(padded.freeze()))
}

/// What follows from an encoded header alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Blocks of payload that belong beside the header.
    pub payload_blocks: u32,
}

/// Decodes an entry from its whole header and its payload.
///
/// `payload`: `Some(Memory)` when the bytes are at hand, `Some(Stored)` when they lie in the store
/// (allowed for writes only), `None` when the header calls for none. The checksums of a write's
/// payload are *not* checked here: its reader does, once.
///
/// # Errors
/// [`DecodeEntryError`]; nothing is skipped silently.
pub fn decode(mut header: &[u8], payload: Option<WriteData>) -> Result<Entry, DecodeEntryError> {
    let input = &mut header;
    let kind = u8_of(input)?;
    let _reserved = u8_of(input)?;
    let needed = u16_of(input)?;
    if needed > ENTRY_VERSION {
        return Err(DecodeEntryError::NewerVersion { needed });
    }
    let id = log_id(u64_of(input)?, u64_of(input)?);
    let payload = match kind {
        KIND_BLANK => EntryPayload::Blank,
        KIND_MEMBERSHIP => {
            EntryPayload::Membership(decode_membership(decode_long(input, payload)?)?)
        }
        KIND_WRITE | KIND_TRIM | KIND_CONTROL => {
            let origin = decode_origin(input)?;
            EntryPayload::Normal(Command { origin, body: decode_body(kind, input, payload)? })
        }
        unknown => return Err(DecodeEntryError::UnknownKind(unknown)),
    };
    Ok(Entry { log_id: id, payload })
}

/// What can be said of an entry from its header without its payload.
///
/// # Errors
/// As [`decode`].
pub fn outline(header: &[u8]) -> Result<Outline, DecodeEntryError> {
    const FIXED: usize = 20;
    const ORIGIN: usize = 52;
    let kind = *header.first().ok_or(DecodeEntryError::Short)?;
    let skip = match kind {
        KIND_BLANK | KIND_TRIM => return Ok(Outline { payload_blocks: 0 }),
        KIND_MEMBERSHIP => FIXED,
        KIND_WRITE => FIXED + ORIGIN + 8,
        KIND_CONTROL => FIXED + ORIGIN,
        unknown => return Err(DecodeEntryError::UnknownKind(unknown)),
    };
    let mut rest = header.get(skip..).ok_or(DecodeEntryError::Short)?;
    let number = u32_of(&mut rest)?;
    let payload_blocks = match kind {
        KIND_WRITE => number,
        _ if number as usize <= INLINE_BYTES_MAX => 0,
        _ => number.div_ceil(BLOCK_SIZE as u32),
    };
    if payload_blocks as usize > TRANSFER_BLOCKS_MAX {
        return Err(DecodeEntryError::FieldOutOfRange("payload length"));
    }
    Ok(Outline { payload_blocks })
}

/// Whether an encoded header is that of a write.
pub(crate) fn is_write(header: &[u8]) -> bool {
    header.first() == Some(&KIND_WRITE)
}

fn decode_origin(input: &mut &[u8]) -> Result<Origin, DecodeEntryError> {
    Ok(Origin {
        attachment: AttachmentId(u64_of(input)?),
        generation: Generation(u64_of(input)?),
        request: u64_of(input)?,
        answered_below: u64_of(input)?,
        epoch: Epoch(u64_of(input)?),
        holder: NodeId(u32_of(input)?),
        branch: BranchId(u32_of(input)?),
        key: u32_of(input)?,
    })
}

fn decode_body(
    kind: u8,
    input: &mut &[u8],
    payload: Option<WriteData>,
) -> Result<Body, DecodeEntryError> {
    match kind {
        KIND_WRITE => {
            let start = u64_of(input)?;
            let count = u32_of(input)?;
            if count == 0 || count as usize > TRANSFER_BLOCKS_MAX {
                return Err(DecodeEntryError::FieldOutOfRange("block count"));
            }
            if start.checked_add(u64::from(count)).is_none() {
                return Err(DecodeEntryError::FieldOutOfRange("start block"));
            }
            let crcs = (0..count).map(|_| u32_of(input)).collect::<Result<Rc<[u32]>, _>>()?;
            let data = payload.ok_or(DecodeEntryError::PayloadMismatch)?;
            if let WriteData::Memory(bytes) = &data
                && bytes.len() != count as usize * BLOCK_SIZE
            {
                return Err(DecodeEntryError::PayloadMismatch);
            }
            Ok(Body::Write { range: BlockRange::new(start, count), crcs, data })
        }
        KIND_TRIM => {
            let (start, count) = (u64_of(input)?, u64_of(input)?);
            if start.checked_add(count).is_none() {
                return Err(DecodeEntryError::FieldOutOfRange("block count"));
            }
            Ok(Body::Trim { start, count })
        }
        _ => Ok(Body::Control(decode_long(input, payload)?)),
    }
}

fn decode_long(input: &mut &[u8], payload: Option<WriteData>) -> Result<Bytes, DecodeEntryError> {
    let len = u32_of(input)? as usize;
    let crc = u32_of(input)?;
    let bytes = if len <= INLINE_BYTES_MAX {
        Bytes::copy_from_slice(input.get(..len).ok_or(DecodeEntryError::Short)?)
    } else {
        match payload {
            Some(WriteData::Memory(padded)) if padded.len() >= len => padded.slice(..len),
            _ => return Err(DecodeEntryError::PayloadMismatch),
        }
    };
    if crc32(&bytes) != crc {
        return Err(DecodeEntryError::PayloadMismatch);
    }
    Ok(bytes)
}

#[derive(Clone, PartialEq, prost::Message)]
struct MembershipV1 {
    #[prost(message, repeated, tag = "1")]
    configs: Vec<ConfigV1>,
    #[prost(btree_map = "uint64, uint32", tag = "2")]
    nodes: BTreeMap<u64, u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ConfigV1 {
    #[prost(uint64, repeated, tag = "1")]
    voters: Vec<u64>,
}

/// A membership in its replicated encoding (protobuf).
pub fn encode_membership(membership: &Membership) -> Vec<u8> {
    let configs = membership.get_joint_config().iter();
    let configs = configs.map(|set| ConfigV1 { voters: set.iter().copied().collect() }).collect();
    let nodes = membership.nodes().map(|(&id, member)| (id, member.node.0)).collect();
    prost::Message::encode_to_vec(&MembershipV1 { configs, nodes })
}

/// The reverse of [`encode_membership`].
///
/// # Errors
/// [`DecodeEntryError::FieldOutOfRange`] for anything else.
pub fn decode_membership(bytes: Bytes) -> Result<Membership, DecodeEntryError> {
    let invalid = || DecodeEntryError::FieldOutOfRange("membership");
    let message: MembershipV1 = prost::Message::decode(bytes).map_err(|_| invalid())?;
    let configs = message.configs.into_iter();
    let configs: Vec<BTreeSet<u64>> =
        configs.map(|config| config.voters.into_iter().collect()).collect();
    let nodes: BTreeMap<u64, Member> =
        message.nodes.into_iter().map(|(id, node)| (id, Member { node: NodeId(node) })).collect();
    if configs.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|_| invalid())
}

macro_rules! read_number {
    ($name:ident, $type:ty, $get:ident) => {
        fn $name(input: &mut &[u8]) -> Result<$type, DecodeEntryError> {
            if input.len() < size_of::<$type>() {
                return Err(DecodeEntryError::Short);
            }
            Ok(input.$get())
        }
    };
}
read_number!(u8_of, u8, get_u8);
read_number!(u16_of, u16, get_u16_le);
read_number!(u32_of, u32, get_u32_le);
read_number!(u64_of, u64, get_u64_le);

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(payload: EntryPayload) {
        let entry = Entry { log_id: log_id(3, 77), payload };
        let mut header = Vec::new();
        let data = encode(&entry, &mut header);
        assert!(header.len() <= ENTRY_HEADER_BYTES_MAX);
        let blocks = match &data {
            Some(WriteData::Memory(bytes)) => bytes.len() / BLOCK_SIZE,
            _ => 0,
        };
        assert_eq!(outline(&header).unwrap().payload_blocks as usize, blocks);
        assert_eq!(decode(&header, data).unwrap(), entry);
    }

    #[test]
    fn every_kind_survives() {
        let origin = Origin {
            attachment: AttachmentId(1),
            generation: Generation(2),
            request: 3,
            answered_below: 4,
            holder: NodeId(5),
            epoch: Epoch(6),
            branch: BranchId(7),
            key: 8,
        };
        round_trip(EntryPayload::Blank);
        let payload = AlignedBuf::zeroed(TRANSFER_BLOCKS_MAX * BLOCK_SIZE).freeze();
        round_trip(EntryPayload::Normal(Command::write(origin, 9, payload)));
        let body = Body::Trim { start: 1, count: 1 << 33 };
        round_trip(EntryPayload::Normal(Command { origin, body }));
        for len in [0, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1, 10_000] {
            round_trip(EntryPayload::Normal(Command::control(vec![7; len].into())));
        }
        let members =
            BTreeMap::from([(1001, Member { node: NodeId(1) }), (1002, Member::default())]);
        let configs = vec![BTreeSet::from([1001, 1002]), BTreeSet::from([1001])];
        round_trip(EntryPayload::Membership(Membership::new(configs, members).unwrap()));
    }

    #[test]
    fn cut_anywhere_is_an_error() {
        let payload = AlignedBuf::zeroed(BLOCK_SIZE).freeze();
        let command = Command::write(Origin::default(), 9, payload);
        let entry = Entry { log_id: log_id(1, 2), payload: EntryPayload::Normal(command) };
        let mut header = Vec::new();
        let data = encode(&entry, &mut header);
        for cut in 0..header.len() {
            assert!(decode(&header[..cut], data.clone()).is_err(), "cut at {cut}");
        }
    }
}
