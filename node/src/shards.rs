//! The shards of one node: what they have of each other, and how connections get to theirs.
//!
//! Each shard is a thread with a pool and a [`crate::node::Node`] of its own. They share nothing
//! but what goes through here: shard 0 publishes the cluster group's state and proposes for the
//! others, and a connection that was accepted on one shard travels to the one that it is for. All
//! of it is bounded channels; nothing here waits for another shard on the way of a read or write.

use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};

use ballast_block::limits::{SHARD_ARRIVALS_MAX, SHARD_PROPOSALS_MAX};
use ballast_block::{ClusterId, ShardId};
use ballast_cluster::{ClusterState, Command, Reply};
use ballast_env::Env;
use ballast_env::network::Network;
use ballast_nbd::{OpenExport, SuspendedHandshake};
use tokio::sync::{mpsc, oneshot, watch};

use crate::cluster_group::ProposeClusterError;
use crate::nbd_target;
use crate::node::Inner;
use crate::peers::inbound;
use crate::peers::links::Handler;
use crate::peers::wire::Frame;

/// A connection on its way to the shard that it is for.
pub(crate) enum Arrival<E: Env> {
    /// A peer's; it has said who it is.
    Peer {
        /// The connection.
        stream: <E as Network>::Detached,
        /// What it said.
        hello: Frame,
        /// Where it comes from, for people.
        from: String,
    },
    /// An NBD client's; it waits for an export to be opened.
    Nbd {
        /// The connection.
        stream: <E as Network>::Detached,
        /// The handshake so far.
        handshake: SuspendedHandshake,
        /// The export.
        open: OpenExport,
        /// Where it comes from, for people.
        from: String,
    },
}

/// A command that shard 0 proposes for another one.
pub(crate) struct Proposal {
    pub(crate) command: Command,
    pub(crate) reply: oneshot::Sender<Result<Reply, ProposeClusterError>>,
}

/// What a shard has of the cluster group's state.
pub(crate) enum Seat {
    /// It has the group's member, and serves the others.
    First { publish: watch::Sender<Arc<ClusterState>>, proposals: mpsc::Receiver<Proposal> },
    /// It reads what shard 0 publishes.
    Further { copy: watch::Receiver<Arc<ClusterState>>, proposals: mpsc::Sender<Proposal> },
}

/// The ways to a node's shards.
pub(crate) struct Doors<E: Env>(Vec<Door<E>>);

struct Door<E: Env> {
    way: mpsc::Sender<Arrival<E>>,
    /// Shut until the shard takes connections in: one that waited while the shard's pool was being
    /// opened could be from a process of the peer that has ended meanwhile, and would be turned away
    /// as one whose pool looks older than what is known ([`crate::admission`]).
    is_open: Arc<AtomicBool>,
}

impl<E: Env> Clone for Door<E> {
    fn clone(&self) -> Self {
        Self { way: self.way.clone(), is_open: self.is_open.clone() }
    }
}

/// A connection can't be handed to a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandOverError {
    /// The node has no pool for it, or that pool has failed, or is not open yet.
    #[error("this node has no pool for {0} that serves")]
    ShardNotHere(ShardId),
    /// Too many are on their way there.
    #[error("{0} of this node is overloaded with new connections")]
    ShardBusy(ShardId),
}

impl<E: Env> Doors<E> {
    /// Room for one connection at a shard's door, which is then sure to be taken in.
    pub(crate) fn door(
        &self,
        shard: ShardId,
    ) -> Result<mpsc::Permit<'_, Arrival<E>>, HandOverError> {
        let door = self.0.get(shard.0 as usize).filter(|door| door.is_open.load(Acquire));
        let door = door.ok_or(HandOverError::ShardNotHere(shard))?;
        door.way.try_reserve().map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => HandOverError::ShardBusy(shard),
            mpsc::error::TrySendError::Closed(()) => HandOverError::ShardNotHere(shard),
        })
    }

    /// The shard takes connections in from now on.
    pub(crate) fn open(&self, shard: ShardId) {
        self.0[shard.0 as usize].is_open.store(true, Release);
    }
}

/// The place of a shard among those of its node: what it starts with besides its configuration.
pub struct Place<E: Env> {
    pub(crate) shard: ShardId,
    pub(crate) doors: Doors<E>,
    pub(crate) arrivals: mpsc::Receiver<Arrival<E>>,
    pub(crate) seat: Seat,
}

impl<E: Env> Place<E> {
    /// Which shard it is for.
    pub fn shard(&self) -> ShardId {
        self.shard
    }
}

/// Places for the shards of a node with so many pools, shard 0 first. They may be sent to threads
/// where the environment's detached connections may.
pub fn places<E: Env>(cluster: ClusterId, count: usize) -> Vec<Place<E>> {
    let (publish, copy) = watch::channel(Arc::new(ClusterState::new(cluster)));
    let (proposer, proposed) = mpsc::channel(SHARD_PROPOSALS_MAX);
    let (doors, arrivals): (Vec<_>, Vec<_>) =
        (0..count).map(|_| mpsc::channel(SHARD_ARRIVALS_MAX)).unzip();
    let shut = |way| Door { way, is_open: Arc::default() };
    let doors: Vec<Door<E>> = doors.into_iter().map(shut).collect();
    let mut first = Some(Seat::First { publish, proposals: proposed });
    let further = || Seat::Further { copy: copy.clone(), proposals: proposer.clone() };
    let place = |(shard, arrivals)| Place {
        shard: ShardId(shard),
        doors: Doors(doors.clone()),
        arrivals,
        seat: first.take().unwrap_or_else(further),
    };
    (0..).zip(arrivals).map(place).collect()
}

/// Shard 0's service to the others: the state as it changes, and their proposals. Ends, and with it
/// their part in the cluster, when shard 0 takes no part any more.
pub(crate) async fn serve_others<E: Env>(
    node: Weak<Inner<E>>,
    publish: watch::Sender<Arc<ClusterState>>,
    mut proposals: mpsc::Receiver<Proposal>,
) {
    if publish.receiver_count() == 0 {
        return;
    }
    let publish = Rc::new(publish);
    let Some(inner) = node.upgrade() else { return };
    publish.send_replace(Arc::new(inner.cluster.state().clone()));
    let mut changes = inner.cluster.changes();
    let mut stopping = inner.stopping.subscribe();
    let env = inner.env.clone();
    drop(inner);
    loop {
        let proposal = tokio::select! {
            biased;
            _ = stopping.wait_for(|&stop| stop) => return,
            going_on = changes.next() => match going_on {
                true => None,
                false => return,
            },
            Some(proposal) = proposals.recv() => Some(proposal),
        };
        let Some(inner) = node.upgrade() else { return };
        publish_state(&inner, &publish);
        if let Some(Proposal { command, reply }) = proposal {
            let publish = Rc::downgrade(&publish);
            env.spawn(async move {
                let proposed = inner.cluster.propose(&command).await;
                if let Some(publish) = publish.upgrade() {
                    publish_state(&inner, &publish);
                }
                // Who asked may have given up.
                let _ = reply.send(proposed);
            });
        }
    }
}

fn publish_state<E: Env>(inner: &Inner<E>, publish: &watch::Sender<Arc<ClusterState>>) {
    let state = inner.cluster.state();
    publish.send_if_modified(|published| {
        let changed = **published != *state;
        if changed {
            *published = Arc::new(state.clone());
        }
        changed
    });
}

/// Takes the connections in that other shards of the node accepted for this one.
pub(crate) async fn take_in<E: Env>(
    node: Weak<Inner<E>>,
    mut arrivals: mpsc::Receiver<Arrival<E>>,
    handler: Rc<dyn Handler>,
) {
    while let Some(arrival) = arrivals.recv().await {
        let Some(inner) = node.upgrade() else { return };
        let (Arrival::Peer { from: source, .. } | Arrival::Nbd { from: source, .. }) = &arrival;
        let source = source.clone();
        let taken = match arrival {
            Arrival::Peer { stream, hello, from } => inner.env.adopt(stream).map(|stream| {
                let links = inner.links.clone();
                let served = inbound::take_in(links, stream, hello, from, handler.clone());
                inner.env.spawn(served);
            }),
            Arrival::Nbd { stream, handshake, open, from } => {
                let adopted = inner.env.adopt(stream);
                adopted.map(|stream| nbd_target::resume(&inner, stream, handshake, open, from))
            }
        };
        if let Err(error) = taken {
            tracing::warn!(from = source, %error, "can't take a connection in");
        }
    }
}
