//! Operations of hosts between nodes: from the node that serves a client to the leader.

use ballast_block::command::ReadPart;
use ballast_block::{AttachmentId, BlockRange, ByteRange, Epoch, Generation, IoError, NodeId};
use ballast_raft_store::entry::Origin;
use ballast_volume::family::{ExecuteError, OperationReply};
use ballast_volume::split::Operation;
use bytes::Bytes;

use crate::calls::{OperateReplyV1, OperateV1, RunV1};
use crate::peers::connection::PeerError;

const READ: u32 = 1;
const WRITE: u32 = 2;
const ZERO: u32 = 3;
const TRIM: u32 = 4;
const STATUS: u32 = 5;

const DONE: u32 = 0;
const NOT_LEADER: u32 = 1;
const STOPPED: u32 = 2;
const NO_ROOM_YET: u32 = 3;

/// Final errors and their codes; frozen.
const ERRORS: [(u32, IoError); 6] = [
    (16, IoError::RangeOutside),
    (17, IoError::NoSpace),
    (18, IoError::Fenced),
    (19, IoError::Damaged),
    (20, IoError::ReadOnly),
    (21, IoError::ShuttingDown),
];
const OTHER_ERROR: u32 = 31;

/// An operation as message and payload.
pub fn encode(origin: &Origin, operation: &Operation) -> (OperateV1, Vec<Bytes>) {
    let mut payload = Vec::new();
    let (code, start, length) = match operation {
        Operation::Read(range) => (READ, range.offset, range.length),
        Operation::Write { offset, data } => {
            payload.push(data.clone());
            (WRITE, *offset, data.len() as u64)
        }
        Operation::Zero(range) => (ZERO, range.offset, range.length),
        Operation::Trim { start, count } => (TRIM, *start, *count),
        Operation::Status(range) => (STATUS, range.start, u64::from(range.count)),
    };
    let message = OperateV1 {
        operation: code,
        start,
        length,
        attachment: origin.attachment.0,
        generation: origin.generation.0,
        request: origin.request,
        answered_below: origin.answered_below,
        holder: origin.holder.0,
        epoch: origin.epoch.0,
    };
    (message, payload)
}

/// The reverse of [`encode`].
///
/// # Errors
/// [`PeerError::Refused`] for an operation that this program does not know.
pub fn decode(message: &OperateV1, payload: &[Bytes]) -> Result<(Origin, Operation), PeerError> {
    let invalid = |what: &str| PeerError::Refused(format!("operation has invalid {what}"));
    let (start, length) = (message.start, message.length);
    let operation = match message.operation {
        READ => Operation::Read(ByteRange::new(start, length)),
        WRITE => {
            let data = payload.first().cloned().unwrap_or_default();
            if data.len() as u64 != length {
                return Err(invalid("length"));
            }
            Operation::Write { offset: start, data }
        }
        ZERO => Operation::Zero(ByteRange::new(start, length)),
        TRIM => Operation::Trim { start, count: length },
        STATUS => {
            let count = u32::try_from(length).map_err(|_| invalid("length"))?;
            Operation::Status(BlockRange::new(start, count))
        }
        _ => return Err(invalid("kind")),
    };
    let origin = Origin {
        attachment: AttachmentId(message.attachment),
        generation: Generation(message.generation),
        request: message.request,
        answered_below: message.answered_below,
        holder: NodeId(message.holder),
        epoch: Epoch(message.epoch),
        ..Origin::default()
    };
    Ok((origin, operation))
}

/// A result as message and payload.
pub fn encode_reply(result: Result<OperationReply, ExecuteError>) -> (OperateReplyV1, Vec<Bytes>) {
    let mut reply = OperateReplyV1::default();
    let mut payload = Vec::new();
    match result {
        Ok(OperationReply::Done) => {}
        Ok(OperationReply::Data(parts)) => {
            for part in parts {
                let data = matches!(part, ReadPart::Data(_));
                reply.runs.push(RunV1 { length: part.len(), data });
                if let ReadPart::Data(bytes) = part {
                    payload.push(bytes);
                }
            }
        }
        Ok(OperationReply::Status(runs)) => {
            let run = |(data, count)| RunV1 { length: u64::from(count), data };
            reply.runs = runs.into_iter().map(run).collect();
        }
        Err(ExecuteError::NotLeader { hint }) => {
            reply.code = NOT_LEADER;
            reply.hint = hint.map_or(0, |node| node.0);
        }
        Err(ExecuteError::Stopped) => reply.code = STOPPED,
        Err(ExecuteError::NoRoomYet) => reply.code = NO_ROOM_YET,
        Err(ExecuteError::Failed(error)) => {
            let found = ERRORS.iter().find(|(_, known)| *known == error);
            reply.code = found.map_or(OTHER_ERROR, |&(code, _)| code);
        }
    }
    (reply, payload)
}

/// The reverse of [`encode_reply`], for the answer to `operation`.
///
/// # Errors
/// The error that the leader gave.
pub fn decode_reply(
    operation: &Operation,
    reply: OperateReplyV1,
    payload: &[Bytes],
) -> Result<OperationReply, ExecuteError> {
    match reply.code {
        DONE => {}
        NOT_LEADER => {
            let hint = (reply.hint != 0).then_some(NodeId(reply.hint));
            return Err(ExecuteError::NotLeader { hint });
        }
        STOPPED => return Err(ExecuteError::Stopped),
        NO_ROOM_YET => return Err(ExecuteError::NoRoomYet),
        code => {
            let found = ERRORS.into_iter().find(|&(known, _)| known == code);
            return Err(ExecuteError::Failed(found.map_or(IoError::Damaged, |(_, error)| error)));
        }
    }
    match operation {
        Operation::Read(range) => read_parts(range.length, reply.runs, payload),
        Operation::Status(_) => {
            let run = |run: RunV1| (run.data, u32::try_from(run.length).unwrap_or(u32::MAX));
            Ok(OperationReply::Status(reply.runs.into_iter().map(run).collect()))
        }
        _ => Ok(OperationReply::Done),
    }
}

fn read_parts(
    length: u64,
    runs: Vec<RunV1>,
    payload: &[Bytes],
) -> Result<OperationReply, ExecuteError> {
    let mut data = payload.first().cloned().unwrap_or_default();
    let mut parts = Vec::with_capacity(runs.len());
    for run in &runs {
        let fits = usize::try_from(run.length).ok().filter(|&bytes| bytes <= data.len());
        parts.push(match fits {
            Some(bytes) if run.data => ReadPart::Data(data.split_to(bytes)),
            // A peer that answers nonsense is as one that can't answer: ask again.
            _ if run.data => return Err(ExecuteError::Stopped),
            _ => ReadPart::Hole(run.length),
        });
    }
    if runs.iter().map(|run| run.length).sum::<u64>() != length {
        return Err(ExecuteError::Stopped);
    }
    Ok(OperationReply::Data(parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_survive() {
        let origin = Origin {
            attachment: AttachmentId(1),
            generation: Generation(2),
            request: 3,
            answered_below: 2,
            holder: NodeId(4),
            epoch: Epoch(5),
            ..Origin::default()
        };
        let operations = [
            Operation::Read(ByteRange::new(5, 6)),
            Operation::Write { offset: 7, data: Bytes::from_static(b"abc") },
            Operation::Zero(ByteRange::new(1, 2)),
            Operation::Trim { start: 1, count: 1 << 34 },
            Operation::Status(BlockRange::new(9, 10)),
        ];
        for operation in operations {
            let (message, payload) = encode(&origin, &operation);
            assert_eq!(decode(&message, &payload).unwrap(), (origin, operation));
        }
        let short = OperateV1 { operation: WRITE, length: 1, ..OperateV1::default() };
        assert!(decode(&short, &[]).is_err());
        assert!(decode(&OperateV1::default(), &[]).is_err());
    }

    #[test]
    fn answers_survive() {
        let read = Operation::Read(ByteRange::new(0, 7));
        let parts = vec![ReadPart::Hole(4), ReadPart::Data(Bytes::from_static(b"xyz"))];
        let (reply, payload) = encode_reply(Ok(OperationReply::Data(parts)));
        match decode_reply(&read, reply.clone(), &payload) {
            Ok(OperationReply::Data(parts)) => assert_eq!(parts[1].len(), 3),
            other => panic!("{other:?}"),
        }
        assert!(decode_reply(&read, reply, &[]).is_err(), "payload is missing");
        for (_, error) in ERRORS {
            let (reply, _) = encode_reply(Err(ExecuteError::Failed(error.clone())));
            let back = decode_reply(&read, reply, &[]).unwrap_err();
            assert_eq!(back, ExecuteError::Failed(error));
        }
        let hint = ExecuteError::NotLeader { hint: Some(NodeId(3)) };
        let (reply, _) = encode_reply(Err(hint.clone()));
        assert_eq!(decode_reply(&read, reply, &[]).unwrap_err(), hint);
    }
}
