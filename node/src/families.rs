//! The families on this node: made, started and stopped as the cluster group says.

use std::rc::Rc;

use ballast_block::{FamilyId, NodeId, Payload, ReplicaId, VolumeId};
use ballast_env::Env;
use ballast_raft_store::pool::ReplicaDescriptor;
use ballast_raft_store::replica::{DamagedBlock, Replica};
use ballast_volume::family::{Family, Room, RoomAsk, Surroundings};
use ballast_volume::state::FoundingV1;
use futures_util::future::LocalBoxFuture;
use prost::Message;

use crate::calls::{BlockV1, Tag};
use crate::node::{Inner, checkpoint_of, raft_net};
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};
use crate::room::{note_own_room, wait_for_room};
use crate::room_queue::Who;

/// Longest wait for a peer's copy of a damaged block.
const FETCH_MAX: std::time::Duration = std::time::Duration::from_secs(5);

struct Around<E: Env> {
    inner: std::rc::Weak<Inner<E>>,
    family: FamilyId,
}

impl<E: Env> Surroundings for Around<E> {
    fn take_room(&self, members: &[NodeId], ask: RoomAsk) -> Room {
        let Some(inner) = self.inner.upgrade() else { return Room::Full };
        note_own_room(&inner);
        inner.room.take(members, ask.bytes, inner.env.now())
    }

    fn wait_for_room(&self, members: Vec<NodeId>, ask: RoomAsk) -> LocalBoxFuture<'static, Room> {
        let Some(inner) = self.inner.upgrade() else { return Box::pin(async { Room::Full }) };
        let family = self.family;
        Box::pin(async move { wait_for_room(&inner, Who { family, ask }, members).await })
    }

    fn fetch_block(
        &self,
        family: FamilyId,
        wanted: DamagedBlock,
    ) -> LocalBoxFuture<'static, Option<Payload>> {
        let inner = self.inner.upgrade();
        Box::pin(async move { fetch(inner?, family, wanted).await })
    }
}

/// Puts a peer's copy in the place of each of these blocks, which are damaged here. Answers whether
/// every one was to be had.
pub(crate) async fn mend_blocks<E: Env>(
    inner: &Rc<Inner<E>>,
    replica: &Replica<E>,
    damaged: Vec<DamagedBlock>,
) -> bool {
    for block in damaged {
        let Some(payload) = fetch(inner.clone(), replica.family(), block).await else {
            tracing::error!(replica = %replica.id(), ?block, "no replica has this block");
            return false;
        };
        if let Err(error) = replica.repair(block, payload).await {
            tracing::error!(replica = %replica.id(), ?block, %error, "can't repair block");
            return false;
        }
    }
    true
}

async fn fetch<E: Env>(
    inner: Rc<Inner<E>>,
    family: FamilyId,
    wanted: DamagedBlock,
) -> Option<Payload> {
    let own = inner.config.node;
    let peers: Vec<(NodeId, ReplicaId)> = {
        let state = inner.cluster.state();
        let replicas = state.replicas_of(family).filter(|replica| replica.node != own);
        replicas.map(|replica| (replica.node, replica.id)).collect()
    };
    let ask = BlockV1 {
        branch: wanted.branch.0,
        block: wanted.block,
        sequence: wanted.sequence.0,
        crc: wanted.crc,
    };
    for (node, to) in peers {
        let plain = Frame::plain(Kind::Call, 0, Tag::Block.message(&ask));
        let frame = Frame { family, to, ..plain };
        match inner.links.call(node, Lane::Data, frame, FETCH_MAX).await {
            Ok(reply) => {
                if let Some(payload) = reply.payload.into_iter().next() {
                    return Some(payload);
                }
            }
            Err(error) => tracing::warn!(%node, %error, "no copy of a damaged block"),
        }
    }
    None
}

impl<E: Env> Inner<E> {
    /// Makes the replica of a new volume on this node's pool; harmless when it is there.
    ///
    /// # Errors
    /// The pool's reason, for people.
    pub(crate) async fn make_replica(
        &self,
        replica: ReplicaId,
        family: FamilyId,
        volume: VolumeId,
        founding: FoundingV1,
    ) -> Result<(), String> {
        if self.pool.replica(replica).is_some() {
            return Ok(());
        }
        let bytes = founding.encode_to_vec().into();
        let descriptor = ReplicaDescriptor { replica, family, volume, bytes };
        let made = self.pool.create_replica(descriptor).await;
        made.map(|_| ()).map_err(|error| error.to_string())
    }

    /// Starts a family's member on this node.
    pub(crate) async fn start_family(self: &Rc<Self>, replica: Replica<E>) {
        let family = replica.family();
        if !self.changing.borrow_mut().insert(family) {
            return;
        }
        let net = raft_net(&self.env, &self.links, &self.transfers, family, replica.id());
        let around = Rc::new(Around { inner: Rc::downgrade(self), family });
        let started = Family::start(
            self.env.clone(),
            replica,
            net,
            self.config.raft,
            checkpoint_of(&self.pool),
            around,
            self.buffers.clone(),
        );
        match started.await {
            Ok(member) => {
                tracing::info!(%family, volume = member.founding().name, "family started");
                self.families.borrow_mut().insert(family, member);
            }
            Err(error) => tracing::error!(%family, %error, "family can't be started"),
        }
        self.changing.borrow_mut().remove(&family);
    }

    /// Stops a family's member and drops its replica: the volume was deleted.
    ///
    /// # Errors
    /// The pool's reason, for people.
    pub(crate) async fn remove_replica(
        &self,
        family: FamilyId,
        replica: ReplicaId,
    ) -> Result<(), String> {
        let member = self.families.borrow_mut().remove(&family);
        if let Some(member) = member {
            member.stop().await;
        }
        if self.pool.replica(replica).is_none() {
            return Ok(());
        }
        self.pool.drop_replica(replica).await.map_err(|error| error.to_string())
    }
}
