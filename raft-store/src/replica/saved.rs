//! What a checkpoint keeps of the replicas: the encoding of the checkpoint body's part that is not
//! the segment table (docs/disk-format.md, "Checkpoint body"). Protobuf, with the retained entries
//! packed: they are many.

use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use thiserror::Error;

use crate::entry::{self, DecodeEntryError, WriteData};
use crate::log::index::Slot;
use crate::place::Place;
use crate::replica::record::{DescriptorV1, LogIdV1, MembershipV1, VoteV1};
use crate::types::{Entry, EntryPayload};

/// All replicas of a pool.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PoolV1 {
    #[prost(message, repeated, tag = "1")]
    pub replicas: Vec<ReplicaV1>,
    /// Ids that were here once (hazard 28).
    #[prost(uint64, repeated, tag = "2")]
    pub dropped: Vec<u64>,
}

/// One replica as at the freeze.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ReplicaV1 {
    #[prost(message, optional, tag = "1")]
    pub descriptor: Option<DescriptorV1>,
    /// The last operation number that it used.
    #[prost(uint64, tag = "2")]
    pub op: u64,
    #[prost(message, optional, tag = "3")]
    pub vote: Option<VoteV1>,
    #[prost(message, optional, tag = "4")]
    pub purged: Option<LogIdV1>,
    #[prost(message, optional, tag = "5")]
    pub committed: Option<LogIdV1>,
    #[prost(message, optional, tag = "6")]
    pub applied: Option<LogIdV1>,
    #[prost(message, optional, tag = "7")]
    pub membership: Option<MembershipV1>,
    /// State of the layer above at `applied`.
    #[prost(bytes = "bytes", tag = "8")]
    pub state: Bytes,
    #[prost(uint64, tag = "9")]
    pub sequence: u64,
    #[prost(message, optional, tag = "10")]
    pub suspect: Option<SuspectV1>,
    /// Packed retained entries, see [`pack`].
    #[prost(bytes = "bytes", tag = "11")]
    pub entries: Bytes,
    /// Root of the extent map.
    #[prost(bytes = "bytes", tag = "12")]
    pub map: Bytes,
    #[prost(message, optional, tag = "13")]
    pub resync: Option<ResyncV1>,
    /// Resyncs begun so far.
    #[prost(uint64, tag = "14")]
    pub resyncs: u64,
    /// The extent map can't be read: only a resync from nothing helps.
    #[prost(bool, tag = "15")]
    pub map_lost: bool,
    /// Blocks of the map are as late as this sequence, which may be above that of `applied`: a
    /// difference was taking the place of what it replaces. 0 = never.
    #[prost(uint64, tag = "16")]
    pub mixed_upto: u64,
}

/// A suspect's state.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct SuspectV1 {
    #[prost(bool, tag = "1")]
    pub vote_lost: bool,
    #[prost(uint64, tag = "2")]
    pub term: u64,
}

/// A resync on its way: its changes lie in a map of their own.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ResyncV1 {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(uint64, tag = "2")]
    pub since: u64,
    /// The install record is written; its changes still move into the replica's map.
    #[prost(bool, tag = "3")]
    pub installed: bool,
    #[prost(bytes = "bytes", tag = "4")]
    pub map: Bytes,
    #[prost(bool, tag = "5")]
    pub from_empty: bool,
}

/// A checkpoint body that can't be understood: the pool is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum DecodeSavedError {
    #[error("checkpoint body is not readable: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("checkpoint body has an unreadable log entry: {0}")]
    Entry(#[from] DecodeEntryError),
    #[error("packed log entries are cut short")]
    Short,
}

const FLAG_DAMAGED: u8 = 1;

/// Appends a retained entry to `out`: length of the header (2 bytes), header, place (8), flags (1).
pub(crate) fn pack(slot: &Slot, out: &mut Vec<u8>) {
    let at = out.len();
    out.put_u16_le(0);
    // The payload beside the header stays where it is: only its place is kept.
    let _beside = entry::encode(&slot.entry, out);
    let length = u16::try_from(out.len() - at - 2).expect("ENTRY_HEADER_BYTES_MAX fits");
    out[at..at + 2].copy_from_slice(&length.to_le_bytes());
    out.put_u64_le(slot.place.0);
    out.put_u8(if slot.damaged { FLAG_DAMAGED } else { 0 });
}

/// A packed entry before its payload, if it needs that, was read.
pub(crate) struct Packed {
    pub header: Bytes,
    pub place: Place,
    pub blocks: u32,
    pub damaged: bool,
}

impl Packed {
    /// Whether the entry can't be decoded without its payload: long control entries.
    pub fn needs_payload(&self) -> bool {
        self.blocks > 0 && !entry::is_write(&self.header)
    }

    /// The slot, with the payload where it is needed.
    pub fn into_slot(self, payload: Option<Bytes>) -> Result<Slot, DecodeEntryError> {
        let data = match payload {
            Some(bytes) => Some(WriteData::Memory(bytes)),
            None => (self.blocks > 0).then_some(WriteData::Stored),
        };
        let entry = entry::decode(&self.header, data)?;
        let Self { place, blocks, damaged, .. } = self;
        Ok(Slot { entry, place, blocks, damaged, born: 0 })
    }
}

/// Splits packed entries.
pub(crate) fn unpack(mut packed: Bytes) -> Result<Vec<Packed>, DecodeSavedError> {
    let mut slots = Vec::new();
    while packed.has_remaining() {
        let length = usize::from(packed.try_get_u16_le().map_err(|_| DecodeSavedError::Short)?);
        if packed.remaining() < length + 9 {
            return Err(DecodeSavedError::Short);
        }
        let header = packed.split_to(length);
        let place = Place(packed.get_u64_le());
        let damaged = packed.get_u8() & FLAG_DAMAGED != 0;
        let blocks = entry::outline(&header)?.payload_blocks;
        slots.push(Packed { header, place, blocks, damaged });
    }
    Ok(slots)
}

/// The entry as the index keeps it: without the payload of a write.
pub(crate) fn without_payload(mut entry: Entry) -> Entry {
    if let EntryPayload::Normal(command) = &mut entry.payload
        && let entry::Body::Write { data, .. } = &mut command.body
    {
        *data = WriteData::Stored;
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Command, INLINE_BYTES_MAX, Origin};
    use crate::types::log_id;
    use ballast_block::AlignedBuf;
    use ballast_block::geometry::BLOCK_SIZE;

    #[test]
    fn entries_survive_packing() {
        let write = Command::write(Origin::default(), 7, AlignedBuf::zeroed(BLOCK_SIZE).freeze());
        let long = Command::control(vec![3; INLINE_BYTES_MAX + 1].into());
        let payloads = [
            (EntryPayload::Blank, 0),
            (EntryPayload::Normal(write), 1),
            (EntryPayload::Normal(long), 1),
        ];
        let mut out = Vec::new();
        let mut slots = Vec::new();
        for (index, (payload, blocks)) in payloads.into_iter().enumerate() {
            let entry = Entry { log_id: log_id(2, index as u64), payload };
            let slot = Slot {
                entry: without_payload(entry),
                place: Place(9),
                blocks,
                damaged: index == 1,
                born: 0,
            };
            pack(&slot, &mut out);
            slots.push(slot);
        }
        let unpacked = unpack(out.clone().into()).unwrap();
        assert_eq!(unpacked.len(), 3);
        for (packed, slot) in unpacked.into_iter().zip(slots) {
            let mut padded = AlignedBuf::zeroed(BLOCK_SIZE);
            padded[..INLINE_BYTES_MAX + 1].fill(3);
            let payload = packed.needs_payload().then(|| padded.freeze());
            let back = packed.into_slot(payload).unwrap();
            assert_eq!(back.entry, slot.entry);
            assert_eq!((back.place, back.blocks), (slot.place, slot.blocks));
            assert_eq!(back.damaged, slot.damaged);
        }
        assert!(unpack(Bytes::from(out).slice(..20)).is_err());
    }
}
