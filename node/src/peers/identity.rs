//! Who a process is, as it says in the handshake: docs/peer-wire.md.

use ballast_block::{ClusterId, NodeId, PoolId, ReplicaId, ShardId};
use ballast_cluster::Marks;
use bytes::Bytes;

use super::connection::PeerError;

/// Who a process is, as it tells its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// The shard of that node: peers are those of the same number.
    pub shard: ShardId,
    /// Its pool.
    pub pool: PoolId,
    /// How often the pool was opened.
    pub boot: u64,
    /// Random, new with each start of the process.
    pub incarnation: u64,
    /// What the pool says of its past, as it was opened.
    pub marks: Marks,
    /// The pool's member of the cluster group; 0: it has none, as on all shards but the first.
    pub member: ReplicaId,
}

/// Why a peer is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For people.
    pub text: String,
    /// Its pool is lost, for ever: by an entry of the cluster group, whoever says so.
    pub lost: bool,
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self { text, lost: false }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct HelloV1 {
    #[prost(bytes = "vec", tag = "1")]
    cluster: Vec<u8>,
    #[prost(uint32, tag = "2")]
    node: u32,
    #[prost(bytes = "vec", tag = "3")]
    pool: Vec<u8>,
    #[prost(uint64, tag = "4")]
    boot: u64,
    #[prost(uint64, tag = "5")]
    incarnation: u64,
    #[prost(string, tag = "6")]
    refusal: String,
    #[prost(bool, tag = "7")]
    lost: bool,
    #[prost(fixed64, tag = "8")]
    settled: u64,
    #[prost(uint64, tag = "9")]
    settled_boot: u64,
    #[prost(fixed64, tag = "10")]
    offered: u64,
    #[prost(uint64, tag = "11")]
    member: u64,
    #[prost(uint32, tag = "12")]
    shard: u32,
}

impl Identity {
    /// The body of a hello, or of the answer to one, which may be a refusal.
    pub fn encode(&self, refusal: Option<&Refusal>) -> Bytes {
        let hello = HelloV1 {
            cluster: self.cluster.as_bytes().to_vec(),
            node: self.node.0,
            pool: self.pool.as_bytes().to_vec(),
            boot: self.boot,
            incarnation: self.incarnation,
            refusal: refusal.map(|refusal| refusal.text.clone()).unwrap_or_default(),
            lost: refusal.is_some_and(|refusal| refusal.lost),
            settled: self.marks.settled,
            settled_boot: self.marks.settled_boot,
            offered: self.marks.offered,
            member: self.member.0,
            shard: self.shard.0,
        };
        prost::Message::encode_to_vec(&hello).into()
    }

    /// Who said a hello or answered one, and whether with a refusal.
    ///
    /// # Errors
    /// [`PeerError::Refused`] when it is neither.
    pub fn decode(body: Bytes) -> Result<(Self, Option<Refusal>), PeerError> {
        let damaged = || PeerError::Refused("handshake can't be decoded".into());
        let hello: HelloV1 = prost::Message::decode(body).map_err(|_| damaged())?;
        let identity = Identity {
            cluster: ClusterId::from_bytes(hello.cluster.try_into().map_err(|_| damaged())?),
            node: NodeId(hello.node),
            shard: ShardId(hello.shard),
            pool: PoolId::from_bytes(hello.pool.try_into().map_err(|_| damaged())?),
            boot: hello.boot,
            incarnation: hello.incarnation,
            marks: Marks {
                settled: hello.settled,
                settled_boot: hello.settled_boot,
                offered: hello.offered,
            },
            member: ReplicaId(hello.member),
        };
        let refusal = Refusal { text: hello.refusal, lost: hello.lost };
        Ok((identity, Some(refusal).filter(|refusal| !refusal.text.is_empty())))
    }
}
