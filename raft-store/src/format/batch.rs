//! A batch header: one block that holds the heads and bodies of the batch's records; their payload
//! blocks follow it. Write path: step 5 (append).
//!
//! Owns the encoding. Never decides what goes into a batch (that is `stream::queue`) nor whether a
//! batch is believed (that is `stream::scan`).

use ballast_block::limits::{BATCH_REPLICAS_MAX, RECORD_BODY_BYTES_MAX, TRANSFER_BLOCKS_MAX};
use ballast_block::{BLOCK_SIZE, ReplicaId};
use bytes::Bytes;
use thiserror::Error;

use super::fields::{BlockProblem, Reader, Writer, check_block, seal_block};
use super::{NO_SEGMENT, SegmentNumber};
use crate::stream::{RecordHead, RecordKind, StreamId};

const MAGIC: u32 = u32::from_le_bytes(*b"BBAT");
const CRC_AT: usize = 92;
const LIST_AT: usize = 96;
const LISTED_BYTES: usize = 16;
const RECORD_HEAD_BYTES: usize = 28;
/// Version of the layout.
const VERSION: u16 = 1;

// The list of the previous batch never crowds out the largest record.
const _: () = assert!(
    LIST_AT + BATCH_REPLICAS_MAX * LISTED_BYTES + RECORD_HEAD_BYTES + RECORD_BODY_BYTES_MAX
        <= BLOCK_SIZE
);

/// The fixed fields of a batch header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchFields {
    /// The stream.
    pub stream: StreamId,
    /// First bytes of the pool's id.
    pub pool_tag: u64,
    /// The segment that the batch lies in.
    pub segment: SegmentNumber,
    /// The segment reserved to follow it, if any: known even if the segment's header is lost.
    pub next: Option<SegmentNumber>,
    /// The segment's generation.
    pub generation: u64,
    /// The segment's number within the stream.
    pub segment_sequence: u64,
    /// The batch's number within the stream.
    pub sequence: u64,
    /// Number of the first batch of the same disk write: all before it were durable when this was
    /// written, because a stream has one write in flight.
    pub write_first: u64,
    /// The block of the segment that this header is.
    pub block: u32,
    /// Blocks of payload behind the header.
    pub payload_blocks: u32,
    /// Checksum of the header of the batch before; 0 when this is the first after an open that
    /// found none.
    pub previous_crc: u32,
}

/// A record of a decoded batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchRecord {
    /// What it is.
    pub kind: RecordKind,
    /// Whose it is.
    pub replica: ReplicaId,
    /// The replica's operation number.
    pub op: u64,
    /// Its body.
    pub body: Bytes,
    /// First payload block, counted from the block behind the header.
    pub payload_first: u32,
    /// Blocks of payload.
    pub payload_blocks: u32,
    /// CRC-32 over the list of the CRC-32s of the payload's blocks.
    pub digest: u32,
}

/// A decoded batch header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its fixed fields.
    pub fields: BatchFields,
    /// Its own checksum: what the next batch names.
    pub crc: u32,
    /// Last operation of each replica in the batch before.
    pub previous: Vec<(ReplicaId, u64)>,
    /// Its records, in order; none in a seal.
    pub records: Vec<BatchRecord>,
}

/// A block that is not a batch header that this program can use.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeBatchError {
    /// It is something else.
    #[error("no batch header")]
    NotABatch,
    /// The checksum does not hold.
    #[error("batch header is damaged (checksum)")]
    Damaged,
    /// The checksum holds, but a field can't be right.
    #[error("batch header field {0} is out of range")]
    FieldOutOfRange(&'static str),
    /// Written by a newer program.
    #[error("batch header has version {0}, this program reads {VERSION}: upgrade this node")]
    NewerVersion(u16),
    /// Written by a newer program.
    #[error("record has unknown kind {0}: upgrade this node")]
    UnknownKind(u8),
}

impl DecodeBatchError {
    /// Whether the block is a whole batch header that only a newer program understands: to go on
    /// without it would lose what it says (hazard 31).
    pub fn needs_newer_program(self) -> bool {
        matches!(self, DecodeBatchError::NewerVersion(_) | DecodeBatchError::UnknownKind(_))
    }
}

/// Whether a block claims to be a batch header. Cheap.
pub fn may_be_header(block: &[u8]) -> bool {
    block.starts_with(&MAGIC.to_le_bytes())
}

/// Fills a header block record by record.
#[derive(Debug)]
pub struct BatchWriter {
    at: usize,
    records: u16,
    listed: u16,
}

impl BatchWriter {
    /// Starts a header with the list of the batch before.
    pub fn start(block: &mut [u8], previous: &[(ReplicaId, u64)]) -> Self {
        assert!(block.len() == BLOCK_SIZE && previous.len() <= BATCH_REPLICAS_MAX);
        let mut out = Writer::new(block, LIST_AT);
        for (replica, op) in previous {
            out.u64(replica.0);
            out.u64(*op);
        }
        Self { at: out.at(), records: 0, listed: previous.len() as u16 }
    }

    /// Whether a record with a body of so many bytes fits.
    pub fn has_room(&self, body: usize) -> bool {
        self.at + RECORD_HEAD_BYTES + body <= BLOCK_SIZE
    }

    /// Adds a record.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn push(&mut self, block: &mut [u8], record: &RecordHead<'_>, blocks: u32, digest: u32) {
        assert!(record.body.len() <= RECORD_BODY_BYTES_MAX && self.has_room(record.body.len()));
        let mut out = Writer::new(block, self.at);
        out.u8(record.kind as u8);
        out.u8(0);
        out.u16(record.body.len() as u16);
        out.u16(blocks as u16);
        out.u16(0);
        out.u64(record.replica.0);
        out.u64(record.op);
        out.u32(digest);
        out.bytes(record.body);
        self.at = out.at();
        self.records += 1;
    }

    /// Number of records so far.
    pub fn records(&self) -> u16 {
        self.records
    }

    /// Fills in the fixed fields and the checksum; answers it.
    pub fn finish(&self, block: &mut [u8], fields: &BatchFields) -> u32 {
        block[self.at..].fill(0);
        let mut out = Writer::new(block, 0);
        out.u32(MAGIC);
        out.u16(VERSION);
        out.u8(fields.stream as u8);
        out.u8(0);
        out.u64(fields.pool_tag);
        out.u32(fields.segment.0);
        out.u32(fields.next.map_or(NO_SEGMENT, |next| next.0));
        out.u64(fields.generation);
        out.u64(fields.segment_sequence);
        out.u64(fields.sequence);
        out.u64(fields.write_first);
        out.u32(fields.block);
        out.u32(fields.payload_blocks);
        out.u32(fields.previous_crc);
        out.u16(self.records);
        out.u16(self.listed);
        out.u16(self.at as u16);
        let unused = out.at();
        block[unused..LIST_AT].fill(0);
        seal_block(block, CRC_AT)
    }
}

impl Batch {
    /// From a header block; bodies are slices of it.
    ///
    /// # Errors
    /// [`DecodeBatchError`].
    pub fn decode(block: &Bytes) -> Result<Self, DecodeBatchError> {
        let crc = check_block(block, MAGIC, CRC_AT).map_err(|problem| match problem {
            BlockProblem::Magic => DecodeBatchError::NotABatch,
            BlockProblem::Checksum => DecodeBatchError::Damaged,
        })?;
        let fields = &mut Reader::new(block, 4);
        let version = fields.u16().ok_or(SHORT)?;
        if version != VERSION {
            return Err(DecodeBatchError::NewerVersion(version));
        }
        let fixed = decode_fixed(fields).ok_or(SHORT)??;
        let records = fields.u16().ok_or(SHORT)?;
        let listed = usize::from(fields.u16().ok_or(SHORT)?);
        let end = usize::from(fields.u16().ok_or(SHORT)?);
        if end > BLOCK_SIZE || listed > BATCH_REPLICAS_MAX {
            return Err(DecodeBatchError::FieldOutOfRange("length"));
        }
        let mut list = Reader::new(&block[..end], LIST_AT);
        let previous = (0..listed)
            .map(|_| Some((ReplicaId(list.u64()?), list.u64()?)))
            .collect::<Option<Vec<_>>>()
            .ok_or(SHORT)?;
        let records = decode_records(&block.slice(..end), list.at(), records)?;
        let payload: u32 = records.iter().map(|record| record.payload_blocks).sum();
        if payload != fixed.payload_blocks || payload as usize > TRANSFER_BLOCKS_MAX {
            return Err(DecodeBatchError::FieldOutOfRange("payload blocks"));
        }
        Ok(Self { fields: fixed, crc, previous, records })
    }

    /// Last operation of each replica with records in it: what the next header lists.
    pub fn last_ops(&self) -> Vec<(ReplicaId, u64)> {
        let mut list = Vec::new();
        self.records.iter().for_each(|record| note_op(&mut list, record.replica, record.op));
        list
    }
}

/// Enters an operation into a batch's list of last operations.
pub fn note_op(list: &mut Vec<(ReplicaId, u64)>, replica: ReplicaId, op: u64) {
    match list.iter_mut().find(|(listed, _)| *listed == replica) {
        Some((_, last)) => *last = op,
        None => list.push((replica, op)),
    }
}

const SHORT: DecodeBatchError = DecodeBatchError::FieldOutOfRange("length");

type FixedResult = Result<BatchFields, DecodeBatchError>;

fn decode_fixed(fields: &mut Reader<'_>) -> Option<FixedResult> {
    let Some(stream) = StreamId::from_number(fields.u8()?) else {
        return Some(Err(DecodeBatchError::FieldOutOfRange("stream")));
    };
    fields.skip(1)?;
    let pool_tag = fields.u64()?;
    let segment = SegmentNumber(fields.u32()?);
    let next = fields.u32()?;
    Some(Ok(BatchFields {
        stream,
        pool_tag,
        segment,
        next: (next != NO_SEGMENT).then_some(SegmentNumber(next)),
        generation: fields.u64()?,
        segment_sequence: fields.u64()?,
        sequence: fields.u64()?,
        write_first: fields.u64()?,
        block: fields.u32()?,
        payload_blocks: fields.u32()?,
        previous_crc: fields.u32()?,
    }))
}

fn decode_records(
    block: &Bytes,
    at: usize,
    count: u16,
) -> Result<Vec<BatchRecord>, DecodeBatchError> {
    let fields = &mut Reader::new(block, at);
    let mut records = Vec::with_capacity(usize::from(count).min(BLOCK_SIZE / RECORD_HEAD_BYTES));
    let mut payload_first = 0;
    for _ in 0..count {
        let number = fields.u8().ok_or(SHORT)?;
        let kind = RecordKind::from_number(number).ok_or(DecodeBatchError::UnknownKind(number))?;
        let mut head = || {
            fields.skip(1)?;
            let length = usize::from(fields.u16()?);
            let payload_blocks = u32::from(fields.u16()?);
            fields.skip(2)?;
            let replica = ReplicaId(fields.u64()?);
            let op = fields.u64()?;
            let digest = fields.u32()?;
            let body_at = fields.at();
            fields.skip(length)?;
            let body = block.slice(body_at..body_at + length);
            Some(BatchRecord { kind, replica, op, body, payload_first, payload_blocks, digest })
        };
        let record = head().ok_or(SHORT)?;
        payload_first += record.payload_blocks;
        records.push(record);
    }
    if fields.at() != block.len() {
        return Err(SHORT);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields() -> BatchFields {
        BatchFields {
            stream: StreamId::Hot,
            pool_tag: 7,
            segment: SegmentNumber(3),
            next: Some(SegmentNumber(9)),
            generation: 1 << 32,
            segment_sequence: 4,
            sequence: 10,
            write_first: 9,
            block: 100,
            payload_blocks: 3,
            previous_crc: 0xdead,
        }
    }

    fn sample() -> (Vec<u8>, u32) {
        let mut block = vec![0xaa; BLOCK_SIZE];
        let mut writer = BatchWriter::start(&mut block, &[(ReplicaId(5), 6)]);
        let head =
            RecordHead { kind: RecordKind::Entry, replica: ReplicaId(5), op: 7, body: b"entry" };
        writer.push(&mut block, &head, 3, 99);
        let head = RecordHead { kind: RecordKind::Vote, replica: ReplicaId(8), op: 1, body: b"" };
        writer.push(&mut block, &head, 0, 0);
        let crc = writer.finish(&mut block, &fields());
        (block, crc)
    }

    #[test]
    fn what_was_written_is_read() {
        let (block, crc) = sample();
        let batch = Batch::decode(&Bytes::from(block)).unwrap();
        assert_eq!((batch.fields, batch.crc), (fields(), crc));
        assert_eq!(batch.previous, [(ReplicaId(5), 6)]);
        assert_eq!(batch.last_ops(), [(ReplicaId(5), 7), (ReplicaId(8), 1)]);
        assert_eq!(batch.records[0].body, &b"entry"[..]);
        assert_eq!((batch.records[0].payload_blocks, batch.records[0].digest), (3, 99));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let (block, _) = sample();
        for byte in 0..BLOCK_SIZE {
            let mut damaged = block.clone();
            damaged[byte] ^= 1 << (byte % 8);
            let error = Batch::decode(&Bytes::from(damaged)).unwrap_err();
            assert!(!error.needs_newer_program());
        }
    }

    #[test]
    fn newer_versions_and_kinds_are_named() {
        let (mut block, _) = sample();
        block[4] = 2;
        seal_block(&mut block, CRC_AT);
        let error = Batch::decode(&Bytes::from(block)).unwrap_err();
        assert_eq!(error, DecodeBatchError::NewerVersion(2));
        let (mut block, _) = sample();
        block[LIST_AT + LISTED_BYTES] = 200;
        seal_block(&mut block, CRC_AT);
        let error = Batch::decode(&Bytes::from(block)).unwrap_err();
        assert_eq!(error, DecodeBatchError::UnknownKind(200));
    }
}
