//! A reply as bytes: a node that does not lead the cluster group forwards its commands to the node
//! that does, and gets this back. Never stored.

use ballast_block::{PoolId, ReplicaId};
use prost::Message;
use thiserror::Error;

use crate::codec::StateProblem;
use crate::error::Refusal;
use crate::state::Reply;
use crate::view::Volume;
use crate::wire::{
    DoneReply, PoolRolledBackReply, RefusalCodeNumber, RefusedReply, ReplyKind, ReplyRecord,
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
            ReplyKind::Refused(it) => {
                let code = it.code().try_into().map_err(|_| ReplyError::Unknown)?;
                Reply::Refused(Refusal::Forwarded { code, message: it.message })
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::RefusalCode;
    use crate::testing::{cluster_of, create};

    #[test]
    fn replies_survive_the_way() {
        let mut state = cluster_of(3);
        let pool = PoolId::from_bytes([7; 16]);
        let rolled_back =
            Reply::PoolRolledBack { pool, known: 5, reported: 4, lost: vec![ReplicaId(1000)] };
        let volume = state.apply(create("a", 1, 3));
        assert!(matches!(volume, Reply::Volume(_)));
        for reply in [Reply::Done, volume, rolled_back] {
            assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
        }
    }

    #[test]
    fn a_refusal_keeps_code_and_words() {
        let refused = Reply::Refused(Refusal::UnknownPool { pool: PoolId::from_bytes([7; 16]) });
        let Ok(Reply::Refused(forwarded)) = Reply::decode(&refused.encode()) else { panic!() };
        let Reply::Refused(original) = refused else { unreachable!() };
        assert_eq!(forwarded.code(), RefusalCode::NotFound);
        assert_eq!(forwarded.to_string(), original.to_string());
    }
}
