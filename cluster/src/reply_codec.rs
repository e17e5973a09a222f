//! A reply as bytes: a node that does not lead the cluster group forwards its commands to the node
//! that does, and gets this back. Never stored.

use ballast_block::{PoolId, ReplicaId};
use prost::Message;
use thiserror::Error;

use crate::codec::StateProblem;
use crate::command::PoolStart;
use crate::error::Refusal;
use crate::state::Reply;
use crate::view::Volume;
use crate::wire::{
    DoneReply, GivenUpReply, PoolOlderReply, PoolRolledBackReply, RefusalCodeNumber, RefusedReply,
    ReplacingReply, ReplyKind, ReplyRecord,
};

/// Bytes that are not a reply this build understands.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReplyError {
    /// Not even protobuf.
    #[error("cluster reply is not valid protobuf ({0}): upgrade the older of the two nodes")]
    NotProtobuf(#[from] prost::DecodeError),
    /// A kind, code or id that this build does not know.
    #[error("cluster reply is of an unknown kind: upgrade the older of the two nodes")]
    Unknown,
}

impl From<StateProblem> for ReplyError {
    fn from(_: StateProblem) -> Self {
        ReplyError::Unknown
    }
}

impl Reply {
    /// Its form between nodes.
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self {
            Reply::Done => ReplyKind::Done(DoneReply {}),
            Reply::Volume(volume) => ReplyKind::Volume(volume.into()),
            Reply::PoolRolledBack { pool, known, reported, lost } => {
                ReplyKind::PoolRolledBack(PoolRolledBackReply {
                    pool: pool.as_bytes().to_vec(),
                    known: *known,
                    reported: *reported,
                    lost: lost.iter().map(|replica| replica.0).collect(),
                })
            }
            Reply::Replacing { member } => {
                ReplyKind::Replacing(ReplacingReply { member: member.0 })
            }
            Reply::GivenUp => ReplyKind::GivenUp(GivenUpReply {}),
            Reply::PoolOlder { known } => ReplyKind::PoolOlder(PoolOlderReply {
                boot_counter: known.boot_counter,
                incarnation: known.incarnation,
            }),
            Reply::Refused(refusal) => ReplyKind::Refused(RefusedReply {
                code: RefusalCodeNumber::from(refusal.code()).into(),
                message: refusal.to_string(),
            }),
        };
        ReplyRecord { kind: Some(kind) }.encode_to_vec()
    }

    /// From its form between nodes. A refusal becomes [`Refusal::Forwarded`].
    ///
    /// # Errors
    /// [`ReplyError`] when the bytes are not a reply.
    pub fn decode(bytes: &[u8]) -> Result<Self, ReplyError> {
        Ok(match ReplyRecord::decode(bytes)?.kind.ok_or(ReplyError::Unknown)? {
            ReplyKind::Done(DoneReply {}) => Reply::Done,
            ReplyKind::Volume(record) => Reply::Volume(Volume::try_from(record)?),
            ReplyKind::PoolRolledBack(it) => Reply::PoolRolledBack {
                pool: PoolId::from_bytes(
                    it.pool.as_slice().try_into().map_err(|_| ReplyError::Unknown)?,
                ),
                known: it.known,
                reported: it.reported,
                lost: it.lost.into_iter().map(ReplicaId).collect(),
            },
            ReplyKind::Replacing(it) => Reply::Replacing { member: ReplicaId(it.member) },
            ReplyKind::GivenUp(GivenUpReply {}) => Reply::GivenUp,
            ReplyKind::PoolOlder(PoolOlderReply { boot_counter, incarnation }) => {
                Reply::PoolOlder { known: PoolStart { boot_counter, incarnation } }
            }
            ReplyKind::Refused(it) => {
                let code = it.code().try_into().map_err(|_| ReplyError::Unknown)?;
                Reply::Refused(Refusal::Forwarded { code, message: it.message })
            }
        })
    }
}
