//! Bodies of a replica's control records: protobuf, each its own message.
//!
//! Entries are not here: their body is the entry header of [`crate::entry`].

use ballast_block::limits::POOL_REPLICAS_MAX;
use ballast_block::{BranchId, FamilyId, ReplicaId, Sequence, VolumeId};
use bytes::Bytes;
use prost::Message;

use crate::entry::{DecodeEntryError, decode_membership, encode_membership};
use crate::format::vote_slot::SlotNumber;
use crate::pool::ReplicaDescriptor;
use crate::replica::saved::SuspectV1;
use crate::types::{LogId, StoredMembership, Vote, log_id, term_of};

/// A log id, or none: an index alone can't say "none".
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct LogIdV1 {
    #[prost(uint64, tag = "1")]
    pub term: u64,
    #[prost(uint64, tag = "2")]
    pub index: u64,
}

impl From<LogId> for LogIdV1 {
    fn from(id: LogId) -> Self {
        Self { term: term_of(&id), index: id.index }
    }
}

impl From<LogIdV1> for LogId {
    fn from(id: LogIdV1) -> Self {
        log_id(id.term, id.index)
    }
}

/// Body of `Truncate` (entries after it are void), `Purge` and `Committed`.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct LogPointV1 {
    #[prost(message, optional, tag = "1")]
    pub id: Option<LogIdV1>,
    /// Of a truncation that opening wrote, because it could not read all that was in the log: the
    /// replica is suspect, also when the next opening can read it again.
    #[prost(message, optional, tag = "2")]
    pub suspect: Option<SuspectV1>,
    /// A leader of a newer term has brought the log up since: it is suspect no more.
    #[prost(bool, tag = "3")]
    pub cleared: bool,
}

impl LogPointV1 {
    pub(crate) fn of(id: Option<LogId>) -> Self {
        Self { id: id.map(Into::into), ..Self::default() }
    }
}

/// Body of `Vote`, and of a vote slot.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct VoteV1 {
    #[prost(uint64, tag = "1")]
    pub term: u64,
    #[prost(uint64, tag = "2")]
    pub candidate: u64,
    #[prost(bool, tag = "3")]
    pub committed: bool,
}

impl From<&Vote> for VoteV1 {
    fn from(vote: &Vote) -> Self {
        Self {
            term: vote.leader_id.term,
            candidate: vote.leader_id.voted_for,
            committed: vote.committed,
        }
    }
}

impl From<VoteV1> for Vote {
    fn from(vote: VoteV1) -> Self {
        if vote.committed {
            Vote::new_committed(vote.term, vote.candidate)
        } else {
            Vote::new(vote.term, vote.candidate)
        }
    }
}

/// The later of two votes of one replica: within a term it votes once, and the vote can only turn
/// committed.
pub(crate) fn later_vote(a: Option<Vote>, b: Option<Vote>) -> Option<Vote> {
    a.into_iter().chain(b).max_by_key(|vote| (vote.leader_id.term, vote.committed))
}

/// Body of `CreateReplica`; part of a checkpoint's replica.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct DescriptorV1 {
    #[prost(uint64, tag = "1")]
    pub replica: u64,
    #[prost(uint64, tag = "2")]
    pub family: u64,
    #[prost(bytes = "bytes", tag = "3")]
    pub volume: Bytes,
    #[prost(bytes = "bytes", tag = "4")]
    pub bytes: Bytes,
    #[prost(uint32, tag = "5")]
    pub vote_slot: u32,
}

impl DescriptorV1 {
    pub fn new(descriptor: &ReplicaDescriptor, vote_slot: SlotNumber) -> Self {
        Self {
            replica: descriptor.replica.0,
            family: descriptor.family.0,
            volume: Bytes::copy_from_slice(descriptor.volume.as_bytes()),
            bytes: descriptor.bytes.clone(),
            vote_slot: vote_slot.0.into(),
        }
    }

    /// The descriptor and the vote slot; `None` when a field can't be.
    pub fn split(&self) -> Option<(ReplicaDescriptor, SlotNumber)> {
        let descriptor = ReplicaDescriptor {
            replica: ReplicaId(self.replica),
            family: FamilyId(self.family),
            volume: VolumeId::from_bytes(self.volume.as_ref().try_into().ok()?),
            bytes: self.bytes.clone(),
        };
        let slot = u16::try_from(self.vote_slot).ok()?;
        (usize::from(slot) < POOL_REPLICAS_MAX).then_some((descriptor, SlotNumber(slot)))
    }
}

/// Body of `MovedEntry`: the payload beside it is that of this retained entry, a write.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct MovedEntryV1 {
    #[prost(message, optional, tag = "1")]
    pub id: Option<LogIdV1>,
    /// The first block that it writes.
    #[prost(uint64, tag = "2")]
    pub block: u64,
    /// One CRC-32 per block.
    #[prost(fixed32, repeated, tag = "3")]
    pub crcs: Vec<u32>,
}

/// Body of `Moved`: whose payload lies beside it in the cold stream.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct MovedV1 {
    #[prost(uint32, tag = "1")]
    pub branch: u32,
    /// The first block.
    #[prost(uint64, tag = "2")]
    pub block: u64,
    #[prost(uint64, tag = "3")]
    pub sequence: u64,
    /// One CRC-32 per block.
    #[prost(fixed32, repeated, tag = "4")]
    pub crcs: Vec<u32>,
}

impl MovedV1 {
    pub fn new(branch: BranchId, block: u64, sequence: Sequence, crcs: &[u32]) -> Self {
        Self { branch: branch.0, block, sequence: sequence.0, crcs: crcs.to_vec() }
    }
}

/// Body of `Install`; where it is long it is the payload, and the body its length (8 bytes).
#[derive(Clone, PartialEq, Message)]
pub(crate) struct InstallV1 {
    /// The resync whose changes become visible.
    #[prost(uint64, tag = "1")]
    pub resync: u64,
    /// The map starts empty: what was there before is dropped.
    #[prost(bool, tag = "2")]
    pub from_empty: bool,
    #[prost(message, optional, tag = "3")]
    pub applied: Option<LogIdV1>,
    #[prost(message, optional, tag = "4")]
    pub membership: Option<MembershipV1>,
    #[prost(bytes = "bytes", tag = "5")]
    pub state: Bytes,
    #[prost(uint64, tag = "6")]
    pub sequence: u64,
}

/// A membership and the entry that set it.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct MembershipV1 {
    #[prost(message, optional, tag = "1")]
    pub set_by: Option<LogIdV1>,
    /// As [`crate::entry::encode_membership`].
    #[prost(bytes = "bytes", tag = "2")]
    pub membership: Bytes,
}

impl MembershipV1 {
    pub fn new(stored: &StoredMembership) -> Self {
        Self {
            set_by: stored.log_id().map(Into::into),
            membership: encode_membership(stored.membership()).into(),
        }
    }

    pub fn decode_membership(self) -> Result<StoredMembership, DecodeEntryError> {
        let membership = decode_membership(self.membership)?;
        Ok(StoredMembership::new(self.set_by.map(Into::into), membership))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_survive_and_order() {
        let old = Vote::new(3, 7);
        let won = Vote::new_committed(3, 7);
        let next = Vote::new(4, 9);
        for vote in [old, won, next] {
            let bytes = VoteV1::from(&vote).encode_to_vec();
            assert_eq!(Vote::from(VoteV1::decode(&bytes[..]).unwrap()), vote);
        }
        assert_eq!(later_vote(Some(old), Some(won)), Some(won));
        assert_eq!(later_vote(Some(next), Some(won)), Some(next));
        assert_eq!(later_vote(None, Some(old)), Some(old));
        assert_eq!(later_vote(None, None), None);
    }

    #[test]
    fn no_log_id_is_not_index_zero() {
        let zero = LogPointV1::of(Some(log_id(0, 0))).encode_to_vec();
        let none = LogPointV1::of(None).encode_to_vec();
        assert!(LogPointV1::decode(&zero[..]).unwrap().id.is_some());
        assert!(LogPointV1::decode(&none[..]).unwrap().id.is_none());
    }
}
