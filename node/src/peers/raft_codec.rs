//! Raft messages as frame bodies: a frozen binary encoding (docs/peer-wire.md).
//!
//! Entries travel as their encoded headers in the body, their blocks as the frame's payload, back
//! to back, so that each lands block-aligned at the receiver.

use ballast_block::checksum::block_crcs;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_raft_store::entry::{self, Body, DecodeEntryError, WriteData};
use ballast_raft_store::types::{
    Entry, EntryPayload, LogId, StoredMembership, TypeConfig, Vote, log_id, term_of,
};
use bytes::{Buf, BufMut, Bytes};
use openraft::impls::leader_id_std::LeaderId;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    VoteRequest, VoteResponse,
};
use openraft::storage::SnapshotMeta;
use thiserror::Error;

/// A body that is not the message it claims to be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DecodeMessageError {
    /// Fewer bytes than the fields need.
    #[error("peer message is cut short")]
    Short,
    /// A field has a value that it can't have.
    #[error("peer message field {0} is out of range")]
    FieldOutOfRange(&'static str),
    /// An entry in it can't be decoded.
    #[error("peer message: {0}")]
    EntryInvalid(#[from] DecodeEntryError),
    /// A block does not match its checksum: damaged between the sender's memory and ours.
    #[error("peer message carries a block whose checksum fails")]
    BlockDamaged,
}

type Decoded<T> = Result<T, DecodeMessageError>;

fn put_vote(vote: &Vote, out: &mut Vec<u8>) {
    out.put_u64_le(vote.leader_id.term);
    out.put_u64_le(vote.leader_id.voted_for);
    out.put_u8(u8::from(vote.committed));
}

fn put_log_id(id: Option<&LogId>, out: &mut Vec<u8>) {
    out.put_u8(u8::from(id.is_some()));
    out.put_u64_le(id.map_or(0, term_of));
    out.put_u64_le(id.map_or(0, |id| id.index));
}

fn need(input: &[u8], bytes: usize) -> Decoded<()> {
    if input.len() < bytes { Err(DecodeMessageError::Short) } else { Ok(()) }
}

fn get_flag(input: &mut &[u8]) -> Decoded<bool> {
    need(input, 1)?;
    match input.get_u8() {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(DecodeMessageError::FieldOutOfRange("flag")),
    }
}

fn get_vote(input: &mut &[u8]) -> Decoded<Vote> {
    need(input, 17)?;
    let leader_id = LeaderId { term: input.get_u64_le(), voted_for: input.get_u64_le() };
    Ok(Vote { leader_id, committed: get_flag(input)? })
}

fn get_log_id(input: &mut &[u8]) -> Decoded<Option<LogId>> {
    let present = get_flag(input)?;
    need(input, 16)?;
    let id = log_id(input.get_u64_le(), input.get_u64_le());
    Ok(present.then_some(id))
}

/// AppendEntries: the body, and the payload parts in entry order.
///
/// Entries must have their payload in memory.
pub fn encode_append(request: &AppendEntriesRequest<TypeConfig>) -> (Bytes, Vec<Bytes>) {
    let mut out = Vec::with_capacity(128 + request.entries.len() * 128);
    put_vote(&request.vote, &mut out);
    put_log_id(request.prev_log_id.as_ref(), &mut out);
    put_log_id(request.leader_commit.as_ref(), &mut out);
    out.put_u32_le(u32::try_from(request.entries.len()).expect("bounded by max_payload_entries"));
    let mut payload = Vec::new();
    for entry in &request.entries {
        let at = out.len();
        out.put_u16_le(0);
        match entry::encode(entry, &mut out) {
            Some(WriteData::Memory(bytes)) => payload.push(bytes),
            Some(WriteData::Stored) => unreachable!("the log reader for peers resolves payload"),
            None => {}
        }
        let length = u16::try_from(out.len() - at - 2).expect("ENTRY_HEADER_BYTES_MAX");
        out[at..at + 2].copy_from_slice(&length.to_le_bytes());
    }
    (out.into(), payload)
}

/// The reverse of [`encode_append`]; checks the checksum of every block (guarantee **checked**:
/// what a follower makes durable is what the leader took from its host).
///
/// # Errors
/// [`DecodeMessageError`].
pub fn decode_append(
    mut body: &[u8],
    payload: &[Bytes],
) -> Decoded<AppendEntriesRequest<TypeConfig>> {
    let input = &mut body;
    let vote = get_vote(input)?;
    let prev_log_id = get_log_id(input)?;
    let leader_commit = get_log_id(input)?;
    need(input, 4)?;
    let count = input.get_u32_le() as usize;
    let mut blocks = payload.first().cloned().unwrap_or_default();
    let mut entries = Vec::with_capacity(count.min(1024));
    for _ in 0..count {
        need(input, 2)?;
        let length = usize::from(input.get_u16_le());
        need(input, length)?;
        let (header, rest) = input.split_at(length);
        *input = rest;
        entries.push(decode_entry(header, &mut blocks)?);
    }
    if !blocks.is_empty() || !input.is_empty() {
        return Err(DecodeMessageError::FieldOutOfRange("length"));
    }
    Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
}

fn decode_entry(header: &[u8], blocks: &mut Bytes) -> Decoded<Entry> {
    let bytes = entry::outline(header)?.payload_blocks as usize * BLOCK_SIZE;
    if blocks.len() < bytes {
        return Err(DecodeMessageError::Short);
    }
    let data = (bytes > 0).then(|| WriteData::Memory(blocks.split_to(bytes)));
    let entry = entry::decode(header, data)?;
    if let EntryPayload::Normal(command) = &entry.payload
        && let Body::Write { crcs, data: WriteData::Memory(payload), .. } = &command.body
        && !block_crcs(payload).eq(crcs.iter().copied())
    {
        return Err(DecodeMessageError::BlockDamaged);
    }
    Ok(entry)
}

/// The answer to one AppendEntries of a stream.
pub fn encode_append_reply(reply: &StreamAppendResult<TypeConfig>) -> Bytes {
    let mut out = Vec::with_capacity(32);
    match reply {
        Ok(matched) => {
            out.put_u8(0);
            put_log_id(matched.as_ref(), &mut out);
        }
        Err(StreamAppendError::Conflict(id)) => {
            out.put_u8(1);
            put_log_id(Some(id), &mut out);
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            out.put_u8(2);
            put_vote(vote, &mut out);
        }
    }
    out.into()
}

/// The reverse of [`encode_append_reply`].
///
/// # Errors
/// [`DecodeMessageError`].
pub fn decode_append_reply(mut body: &[u8]) -> Decoded<StreamAppendResult<TypeConfig>> {
    let input = &mut body;
    need(input, 1)?;
    match input.get_u8() {
        0 => Ok(Ok(get_log_id(input)?)),
        1 => {
            let id = get_log_id(input)?.ok_or(DecodeMessageError::FieldOutOfRange("log id"))?;
            Ok(Err(StreamAppendError::Conflict(id)))
        }
        2 => Ok(Err(StreamAppendError::HigherVote(get_vote(input)?))),
        _ => Err(DecodeMessageError::FieldOutOfRange("append reply")),
    }
}

/// A vote or pre-vote request.
pub fn encode_vote(request: &VoteRequest<TypeConfig>) -> Vec<u8> {
    let mut out = Vec::with_capacity(40);
    put_vote(&request.vote, &mut out);
    put_log_id(request.last_log_id.as_ref(), &mut out);
    out.put_u8(u8::from(request.leadership_transfer));
    out
}

/// The reverse of [`encode_vote`].
///
/// # Errors
/// [`DecodeMessageError`].
pub fn decode_vote(mut body: &[u8]) -> Decoded<VoteRequest<TypeConfig>> {
    let input = &mut body;
    let (vote, last_log_id) = (get_vote(input)?, get_log_id(input)?);
    let mut request = VoteRequest::new(vote, last_log_id);
    request.leadership_transfer = get_flag(input)?;
    Ok(request)
}

/// The answer to a vote request.
pub fn encode_vote_reply(reply: &VoteResponse<TypeConfig>) -> Vec<u8> {
    let mut out = Vec::with_capacity(40);
    put_vote(&reply.vote, &mut out);
    put_log_id(reply.last_log_id.as_ref(), &mut out);
    out.put_u8(u8::from(reply.vote_granted));
    out
}

/// The reverse of [`encode_vote_reply`].
///
/// # Errors
/// [`DecodeMessageError`].
pub fn decode_vote_reply(mut body: &[u8]) -> Decoded<VoteResponse<TypeConfig>> {
    let input = &mut body;
    let (vote, last_log_id) = (get_vote(input)?, get_log_id(input)?);
    Ok(VoteResponse::new(vote, last_log_id, get_flag(input)?))
}

/// A request to take over leadership.
pub fn encode_transfer(request: &TransferLeaderRequest<TypeConfig>) -> Vec<u8> {
    let mut out = Vec::with_capacity(48);
    put_vote(request.from_leader(), &mut out);
    out.put_u64_le(*request.to_node_id());
    put_log_id(request.last_log_id(), &mut out);
    out
}

/// The reverse of [`encode_transfer`].
///
/// # Errors
/// [`DecodeMessageError`].
pub fn decode_transfer(mut body: &[u8]) -> Decoded<TransferLeaderRequest<TypeConfig>> {
    let input = &mut body;
    let vote = get_vote(input)?;
    need(input, 8)?;
    let to = input.get_u64_le();
    Ok(TransferLeaderRequest::new(vote, to, get_log_id(input)?))
}

/// What Raft says of a snapshot.
pub type Meta = SnapshotMeta<
    openraft::type_config::alias::CommittedLeaderIdOf<TypeConfig>,
    u64,
    ballast_raft_store::types::Member,
>;

/// The leader's vote and the description of the state that it offers.
pub fn encode_offer(vote: &Vote, meta: &Meta) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    put_vote(vote, &mut out);
    put_log_id(meta.last_log_id.as_ref(), &mut out);
    put_log_id(meta.last_membership.log_id().as_ref(), &mut out);
    out.put_slice(&entry::encode_membership(meta.last_membership.membership()));
    out
}

/// The reverse of [`encode_offer`].
///
/// # Errors
/// [`DecodeMessageError`].
pub fn decode_offer(mut body: &[u8]) -> Decoded<(Vote, Meta)> {
    let input = &mut body;
    let vote = get_vote(input)?;
    let last_log_id = get_log_id(input)?;
    let membership_id = get_log_id(input)?;
    let membership = entry::decode_membership(Bytes::copy_from_slice(input))?;
    let last_membership = StoredMembership::new(membership_id, membership);
    Ok((vote, Meta { last_log_id, last_membership }))
}

#[cfg(test)]
mod tests {
    use ballast_block::AlignedBuf;
    use ballast_raft_store::entry::{Command, Origin};

    use super::*;

    fn vote() -> Vote {
        Vote { leader_id: LeaderId { term: 3, voted_for: 1001 }, committed: true }
    }

    fn append() -> AppendEntriesRequest<TypeConfig> {
        let mut payload = AlignedBuf::zeroed(2 * BLOCK_SIZE);
        payload[5000] = 9;
        let write = EntryPayload::Normal(Command::write(Origin::default(), 7, payload.freeze()));
        let control = EntryPayload::Normal(Command::control(vec![3; 5000].into()));
        let payloads = [EntryPayload::Blank, write, control];
        let entries = payloads.into_iter().zip(11..);
        let entries = entries.map(|(payload, index)| Entry { log_id: log_id(3, index), payload });
        AppendEntriesRequest {
            vote: vote(),
            prev_log_id: Some(log_id(2, 10)),
            entries: entries.collect(),
            leader_commit: None,
        }
    }

    #[test]
    fn append_survives_and_damage_is_seen() {
        let request = append();
        let (body, parts) = encode_append(&request);
        let joined = Bytes::from(parts.concat());
        let back = decode_append(&body, std::slice::from_ref(&joined)).unwrap();
        assert_eq!(back.entries, request.entries);
        assert_eq!(back.prev_log_id, request.prev_log_id);
        let mut damaged = joined.to_vec();
        damaged[5000] ^= 1;
        let result = decode_append(&body, &[damaged.into()]);
        assert_eq!(result.unwrap_err(), DecodeMessageError::BlockDamaged);
        for cut in 0..body.len() {
            assert!(decode_append(&body[..cut], std::slice::from_ref(&joined)).is_err());
        }
    }

    #[test]
    fn small_messages_survive() {
        let mut request = VoteRequest::new(vote(), Some(log_id(1, 2)));
        request.leadership_transfer = true;
        assert_eq!(decode_vote(&encode_vote(&request)).unwrap(), request);
        let reply = VoteResponse::new(vote(), None, true);
        assert_eq!(decode_vote_reply(&encode_vote_reply(&reply)).unwrap(), reply);
        let transfer = TransferLeaderRequest::new(vote(), 1002, Some(log_id(1, 2)));
        assert_eq!(decode_transfer(&encode_transfer(&transfer)).unwrap(), transfer);
        let replies = [
            Ok(Some(log_id(4, 5))),
            Ok(None),
            Err(StreamAppendError::Conflict(log_id(1, 1))),
            Err(StreamAppendError::HigherVote(vote())),
        ];
        for reply in replies {
            assert_eq!(decode_append_reply(&encode_append_reply(&reply)).unwrap(), reply);
        }
    }
}
