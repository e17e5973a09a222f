//! Pools for tests: made, opened, filled.

use std::path::{Path, PathBuf};

use ballast_block::{AlignedBuf, BLOCK_SIZE, ClusterId, NodeId, ReplicaId};
use ballast_env::Env;
use ballast_raft_store::format::create::create;
use ballast_raft_store::format::geometry::PoolGeometry;
use ballast_raft_store::pool::{FormatOptions, PoolExpectation};
use ballast_raft_store::stream::{
    Appended, OpenStoreError, Opened, RecordHead, RecordKind, Replayed, SpaceClass, StreamId,
    StreamSet, open,
};
use bytes::Bytes;

pub const CLUSTER: ClusterId = ClusterId(uuid::Uuid::from_u128(0xc1));
pub const NODE: NodeId = NodeId(3);

pub fn path() -> PathBuf {
    PathBuf::from("/pool")
}

pub fn options(create: Option<u64>) -> FormatOptions {
    FormatOptions { cluster: CLUSTER, node: NODE, create, overwrite_foreign: false }
}

pub fn expectation() -> PoolExpectation {
    PoolExpectation { cluster: CLUSTER, node: NODE, pool: None }
}

/// Makes the smallest pool.
pub async fn format<E: Env>(env: &E, path: &Path) {
    create(env, path, options(Some(PoolGeometry::BYTES_MIN))).await.expect("format");
}

pub async fn reopen<E: Env>(env: &E, path: &Path) -> Result<Opened<E>, OpenStoreError> {
    open(env.clone(), path, expectation()).await
}

/// `blocks` blocks that tell who wrote them.
pub fn payload(replica: u64, op: u64, blocks: u32) -> Bytes {
    let mut buffer = AlignedBuf::zeroed(blocks as usize * BLOCK_SIZE);
    for (index, block) in buffer.chunks_exact_mut(BLOCK_SIZE).enumerate() {
        block[..8].copy_from_slice(&replica.to_le_bytes());
        block[8..16].copy_from_slice(&op.to_le_bytes());
        block[4000] = index as u8;
    }
    buffer.freeze()
}

/// Appends an entry of so many blocks.
pub fn append<E: Env>(streams: &StreamSet<E>, replica: u64, op: u64, blocks: u32) -> Appended {
    append_as(streams, SpaceClass::Normal, replica, op, blocks).expect("room")
}

pub fn append_as<E: Env>(
    streams: &StreamSet<E>,
    class: SpaceClass,
    replica: u64,
    op: u64,
    blocks: u32,
) -> Result<Appended, ballast_raft_store::stream::AppendError> {
    let body = body(replica, op, blocks);
    let record =
        RecordHead { kind: RecordKind::Entry, replica: ReplicaId(replica), op, body: &body };
    let payload = (blocks > 0).then(|| payload(replica, op, blocks));
    streams.append(StreamId::Hot, class, record, payload, &[])
}

/// A body that tells the record.
pub fn body(replica: u64, op: u64, blocks: u32) -> Vec<u8> {
    let mut body = vec![0x5a; 40 + (op % 60) as usize];
    body[..8].copy_from_slice(&replica.to_le_bytes());
    body[8..16].copy_from_slice(&op.to_le_bytes());
    body[16..20].copy_from_slice(&blocks.to_le_bytes());
    body
}

/// Who and which of each replayed record, after a look at the rest of it.
pub fn ids(replay: &[Replayed]) -> Vec<(u64, u64)> {
    let id = |record: &Replayed| {
        let blocks = record.payload.map_or(0, |payload| payload.blocks);
        assert_eq!(record.body, body(record.replica.0, record.op, blocks));
        (record.replica.0, record.op)
    };
    replay.iter().map(id).collect()
}
