//! Pools and replicas for tests, and a state machine over a replica.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod life;
pub mod model;
pub mod node;

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;

use ballast_block::{
    AlignedBuf, BLOCK_SIZE, BlockRange, ClusterId, FamilyId, NodeId, Payload, ReplicaId, Sequence,
    VolumeId,
};
use ballast_env::Env;
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::format::PoolGeometry;
use ballast_raft_store::map::ROOT_BRANCH;
use ballast_raft_store::pool::{
    FormatOptions, OpenPoolError, Pool, PoolExpectation, RecoveryReport, ReplicaDescriptor,
};
use ballast_raft_store::replica::{InstallState, ReadContent, ReadError, Replica, ResyncBase};
use ballast_raft_store::types::{
    ApplyReply, Entry, EntryPayload, LogId, StoredMembership, TypeConfig,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::storage::{
    EntryResponder, IOFlushed, RaftLogStorage, RaftSnapshotBuilder, RaftStateMachine,
};
use openraft::type_config::TypeConfigExt;
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf, StoredMembershipOf};

pub const CLUSTER: ClusterId = ClusterId(uuid::Uuid::from_u128(0xc1));
pub const NODE: NodeId = NodeId(3);

/// Makes the smallest pool.
pub async fn format<E: Env>(env: &E, path: &Path) {
    let create = Some(PoolGeometry::BYTES_MIN);
    let options = FormatOptions { cluster: CLUSTER, node: NODE, create, overwrite_foreign: false };
    Pool::format(env, path, options).await.expect("format");
}

pub async fn open<E: Env>(
    env: &E,
    path: &Path,
) -> Result<(Pool<E>, RecoveryReport), OpenPoolError> {
    let expect = PoolExpectation { cluster: CLUSTER, node: NODE, pool: None };
    Pool::open(env.clone(), path, expect).await
}

pub fn descriptor(id: u64) -> ReplicaDescriptor {
    ReplicaDescriptor {
        replica: ReplicaId(id),
        family: FamilyId(id + 100),
        volume: VolumeId::default(),
        bytes: Bytes::from_static(b"descriptor of the layer above"),
    }
}

/// Blocks whose every word tells what they should be.
pub fn blocks(count: u32, stamp: u64) -> Payload {
    let mut buffer = AlignedBuf::zeroed(count as usize * BLOCK_SIZE);
    for (nth, word) in buffer.chunks_exact_mut(8).enumerate() {
        let block = (nth * 8 / BLOCK_SIZE) as u64;
        word.copy_from_slice(&(stamp.wrapping_mul(1 << 16) + block).to_le_bytes());
    }
    buffer.freeze()
}

/// What a layer above would be, at its smallest: it counts writes and has the count as its state.
pub struct Machine<E: Env> {
    pub replica: Replica<E>,
    pub state: Rc<RefCell<State>>,
    snapshot: Rc<RefCell<Option<SnapshotMetaOf<TypeConfig>>>>,
    /// Keeps the pool open.
    _pool: Pool<E>,
}

impl<E: Env> Clone for Machine<E> {
    fn clone(&self) -> Self {
        Self {
            replica: self.replica.clone(),
            state: self.state.clone(),
            snapshot: self.snapshot.clone(),
            _pool: self._pool.clone(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub sequence: u64,
    /// A digest of all that was applied, in order.
    pub digest: u64,
}

impl State {
    fn encode(&self) -> Bytes {
        [self.sequence.to_le_bytes(), self.digest.to_le_bytes()].concat().into()
    }

    fn decode(bytes: &[u8]) -> Self {
        if bytes.is_empty() {
            return Self::default();
        }
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        Self { sequence: number(0), digest: number(8) }
    }

    pub fn note(&mut self, entry: &Entry) {
        let mut bytes = Vec::new();
        ballast_raft_store::entry::encode(entry, &mut bytes);
        self.digest =
            self.digest.rotate_left(5) ^ u64::from(ballast_block::checksum::crc32(&bytes));
    }
}

impl<E: Env> Machine<E> {
    pub fn new(pool: Pool<E>, replica: Replica<E>) -> Self {
        let restored = replica.restored();
        let state = Rc::new(RefCell::new(State::decode(&restored.state)));
        assert_eq!(state.borrow().sequence, restored.sequence.0);
        let source = state.clone();
        replica.set_state_source(Rc::new(move || source.borrow().encode()));
        Self { replica, state, snapshot: Rc::default(), _pool: pool }
    }

    pub fn apply_one(&self, entry: Entry) -> ApplyReply {
        let id = entry.log_id;
        let state = &mut *self.state.borrow_mut();
        state.note(&entry);
        match entry.payload {
            EntryPayload::Blank => self.replica.apply_other(id, None, None),
            EntryPayload::Membership(membership) => {
                self.replica.apply_other(id, Some(membership), None);
            }
            EntryPayload::Normal(command) => match command.body {
                // A stand-in for a fenced write.
                Body::Write { .. } if command.origin.key == 77 => {
                    self.replica.apply_rejected(id);
                }
                Body::Write { .. } => {
                    state.sequence += 1;
                    self.replica.apply_write(id, ROOT_BRANCH, Sequence(state.sequence));
                }
                Body::Trim { start, count } => {
                    state.sequence += 1;
                    let sequence = Sequence(state.sequence);
                    self.replica.apply_trim(id, ROOT_BRANCH, sequence, start, count);
                }
                Body::Control(_) => self.replica.apply_other(id, None, None),
            },
        }
        ApplyReply::Applied(Sequence(state.sequence))
    }
}

impl<E: Env> RaftSnapshotBuilder<TypeConfig> for Machine<E> {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<TypeConfig, ()>> {
        let (last_log_id, last_membership) = self.applied_state().await?;
        self._pool.checkpoint().await.map_err(io::Error::other)?;
        let meta = SnapshotMetaOf::<TypeConfig> { last_log_id, last_membership };
        *self.snapshot.borrow_mut() = Some(meta.clone());
        Ok(SnapshotOf::<TypeConfig, ()> { meta, snapshot: () })
    }
}

impl<E: Env> RaftStateMachine<TypeConfig> for Machine<E> {
    type SnapshotData = ();
    type SnapshotBuilder = Self;

    async fn applied_state(
        &mut self,
    ) -> io::Result<(Option<LogId>, StoredMembershipOf<TypeConfig>)> {
        Ok((self.replica.applied(), self.replica.membership()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin,
    {
        while let Some(entry) = entries.next().await {
            let (entry, responder) = entry?;
            self.replica.map_room().await.map_err(io::Error::other)?;
            let reply = self.apply_one(entry);
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        (): (),
    ) -> io::Result<()> {
        let membership: StoredMembership = meta.last_membership.clone();
        let applied = meta.last_log_id.expect("of something");
        let resync = self.replica.resync(ResyncBase::Applied).await.map_err(io::Error::other)?;
        let (sequence, state) = (Sequence(self.state.borrow().sequence), Bytes::new());
        let install = InstallState { applied, membership, state, sequence };
        resync.install(install).await.map_err(io::Error::other)?;
        *self.snapshot.borrow_mut() = Some(meta.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf<TypeConfig, ()>>> {
        let meta = self.snapshot.borrow().clone();
        Ok(meta.map(|meta| SnapshotOf::<TypeConfig, ()> { meta, snapshot: () }))
    }
}

/// An entry of term 1.
pub fn entry(index: u64, payload: EntryPayload) -> Entry {
    Entry { log_id: ballast_raft_store::types::log_id(1, index), payload }
}

pub fn write(index: u64, start: u64, payload: Payload) -> Entry {
    entry(index, EntryPayload::Normal(Command::write(Origin::default(), start, payload)))
}

/// Appends and returns when it is durable.
pub async fn append<E: Env>(replica: &Replica<E>, entries: Vec<Entry>) -> io::Result<()> {
    let (send, receive) = TypeConfig::oneshot();
    replica.log().append(entries, IOFlushed::signal(send)).await?;
    receive.await.map_err(io::Error::other)?
}

/// Reads a range and puts it together; holes are zeroes.
pub async fn read<E: Env>(
    replica: &Replica<E>,
    start: u64,
    count: u32,
) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    for part in replica.read(ROOT_BRANCH, BlockRange::new(start, count)).await? {
        match part.content {
            ReadContent::Hole => bytes.resize(bytes.len() + part.count as usize * BLOCK_SIZE, 0),
            ReadContent::Data(payload) => bytes.extend_from_slice(&payload),
        }
    }
    assert_eq!(bytes.len(), count as usize * BLOCK_SIZE);
    Ok(bytes)
}
