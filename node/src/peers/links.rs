//! Links to all peers: dialling, the handshake, and the pumps of each connection.
//!
//! A link names cluster, node, pool and boot counter before anything else is said (hazard F5), and
//! a process incarnation, so that peers notice a restart at once (hazard 13). A link that is silent
//! for [`SILENCE_MAX`] is closed: a stopped process keeps its sockets open for ever.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_block::buffer::BufferPool;
use ballast_cluster::Pool;
use ballast_env::Env;
use ballast_env::network::{Address, Listener};
use ballast_env::spawn::OwnedTask;
use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::connection::{Connection, PeerError};
use super::identity::{Identity, Refusal};
use super::inbound;
use super::wire::{Frame, FrameReader, Kind};
use crate::shards::Doors;

/// How long a connection may be silent before it counts as dead.
pub const SILENCE_MAX: Duration = Duration::from_millis(2500);
pub(super) const PING_INTERVAL: Duration = Duration::from_millis(500);
pub(super) const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
const REDIAL_MIN: Duration = Duration::from_millis(50);
const REDIAL_MAX: Duration = Duration::from_secs(1);

/// The two connections of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// AppendEntries, host I/O, resync.
    Data,
    /// Votes, heartbeats, everything small.
    Control,
}

/// What the node does with what peers send.
pub trait Handler: 'static {
    /// What is known now of the pools of a peer.
    fn known(&self, node: NodeId) -> Vec<Pool>;

    /// Whether a peer may talk to this node; the text of a refusal goes to it. `asked_with`: it has
    /// answered, and this was known when it was asked; none: it has said so by itself, at any time.
    fn admit(&self, peer: &Identity, asked_with: Option<&[Pool]>) -> Result<(), Refusal>;

    /// A peer of the same cluster says that this node's pool is lost.
    fn lost(&self, reason: &str);

    /// Answers a call: body and payload of the reply.
    fn call(
        self: Rc<Self>,
        peer: Identity,
        frame: Frame,
    ) -> LocalBoxFuture<'static, Result<(Bytes, Vec<Bytes>), PeerError>>;

    /// Runs one stream of AppendEntries; frames arrive at `frames`, answers go out by `reply`.
    fn stream(
        self: Rc<Self>,
        first: &Frame,
        frames: mpsc::Receiver<Frame>,
        reply: Box<dyn Fn(Bytes)>,
    ) -> LocalBoxFuture<'static, Result<(), PeerError>>;

    /// A link to `peer` came up (again).
    fn link_up(&self, peer: &Identity);

    /// The link to the node went down.
    fn link_down(&self, node: NodeId);
}

struct Dialled {
    connections: BTreeMap<Lane, Connection>,
    identity: Option<Identity>,
    _tasks: Vec<OwnedTask>,
}

/// All links of a node.
pub struct Links<E: Env> {
    pub(super) env: E,
    identity: Identity,
    pub(super) buffers: BufferPool,
    /// The ways to the other shards of this node.
    pub(super) doors: Rc<Doors<E>>,
    peers: RefCell<BTreeMap<NodeId, Dialled>>,
    /// Connections that peers dialled, to be closed with the rest.
    accepted: RefCell<Vec<Connection>>,
}

impl<E: Env> Links<E> {
    /// No peer yet.
    pub(crate) fn new(
        env: E,
        identity: Identity,
        buffers: BufferPool,
        doors: Rc<Doors<E>>,
    ) -> Rc<Self> {
        let (peers, accepted) = (RefCell::default(), RefCell::default());
        Rc::new(Self { env, identity, buffers, doors, peers, accepted })
    }

    /// This process.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The connection to a peer, if it is up.
    ///
    /// # Errors
    /// [`PeerError::NotConnected`].
    pub fn connection(&self, node: NodeId, lane: Lane) -> Result<Connection, PeerError> {
        let peers = self.peers.borrow();
        let peer = peers.get(&node).ok_or(PeerError::NotConnected)?;
        peer.connections.get(&lane).cloned().ok_or(PeerError::NotConnected)
    }

    /// Who answered under that node id last, while its link is up.
    pub fn peer(&self, node: NodeId) -> Option<Identity> {
        let peers = self.peers.borrow();
        peers.get(&node).filter(|peer| !peer.connections.is_empty()).and_then(|peer| peer.identity)
    }

    /// Bytes that wait in the longest queue to a peer.
    pub fn queued_bytes_max(&self) -> usize {
        let (peers, accepted) = (self.peers.borrow(), self.accepted.borrow());
        let dialled = peers.values().flat_map(|peer| peer.connections.values());
        let all = dialled.chain(accepted.iter());
        all.map(|connection| connection.queued_bytes()).max().unwrap_or(0)
    }

    /// Calls a peer.
    ///
    /// # Errors
    /// [`PeerError`].
    pub async fn call(
        &self,
        node: NodeId,
        lane: Lane,
        frame: Frame,
        limit: Duration,
    ) -> Result<Frame, PeerError> {
        self.connection(node, lane)?.call(&self.env, frame, limit).await
    }

    /// Keeps links to a peer from now on.
    pub fn dial(self: &Rc<Self>, node: NodeId, address: Address, handler: Rc<dyn Handler>) {
        let mut tasks = Vec::new();
        for lane in [Lane::Data, Lane::Control] {
            let dialler = Dialler {
                links: self.clone(),
                node,
                lane,
                address: address.clone(),
                handler: handler.clone(),
            };
            tasks.push(OwnedTask(self.env.spawn(dialler.run())));
        }
        let dialled = Dialled { connections: BTreeMap::new(), identity: None, _tasks: tasks };
        self.peers.borrow_mut().insert(node, dialled);
    }

    /// Ends all links and dials no more.
    pub fn hang_up(&self) {
        let peers = std::mem::take(&mut *self.peers.borrow_mut());
        for connection in peers.values().flat_map(|peer| peer.connections.values()) {
            connection.close();
        }
        for connection in self.accepted.take() {
            connection.close();
        }
    }

    pub(super) fn keep_accepted(&self, connection: &Connection) {
        let mut accepted = self.accepted.borrow_mut();
        accepted.retain(|connection| !connection.is_closed());
        accepted.push(connection.clone());
    }

    /// Accepts peers until the listener fails.
    pub async fn accept<L>(self: Rc<Self>, listener: L, handler: Rc<dyn Handler>)
    where
        L: Listener<Stream = E::Stream>,
    {
        loop {
            match listener.accept().await {
                Ok((stream, from)) => {
                    let accepted = inbound::accept_one(self.clone(), stream, from, handler.clone());
                    self.env.spawn(accepted);
                }
                Err(error) => {
                    tracing::warn!(%error, "can't accept a peer");
                    self.env.sleep(REDIAL_MIN).await;
                }
            }
        }
    }

    pub(super) fn check(&self, peer: &Identity, expected: Option<NodeId>) -> Result<(), String> {
        if peer.cluster != self.identity.cluster {
            return Err(format!(
                "node belongs to cluster {}, this one to {}",
                peer.cluster, self.identity.cluster
            ));
        }
        if expected.is_some_and(|expected| expected != peer.node) {
            return Err(format!("{} answers at the address of another node", peer.node));
        }
        if peer.shard != self.identity.shard {
            return Err(format!("{} answers for {}", peer.shard, self.identity.shard));
        }
        if peer.node == self.identity.node {
            return Err(format!("two nodes call themselves {}", peer.node));
        }
        Ok(())
    }
}

struct Dialler<E: Env> {
    links: Rc<Links<E>>,
    node: NodeId,
    lane: Lane,
    address: Address,
    handler: Rc<dyn Handler>,
}

impl<E: Env> Dialler<E> {
    async fn run(self) {
        let mut pause = REDIAL_MIN;
        loop {
            match self.once().await {
                Ok(()) => pause = REDIAL_MIN,
                Err(error) => {
                    tracing::debug!(node = %self.node, lane = ?self.lane, %error, "no link");
                    pause = (pause * 2).min(REDIAL_MAX);
                }
            }
            self.links.env.sleep(pause).await;
        }
    }

    async fn once(&self) -> Result<(), PeerError> {
        let env = &self.links.env;
        let known = self.handler.known(self.node);
        let handshake = async {
            let stream = env.connect(&self.address).await;
            let stream = stream.map_err(|error| PeerError::Refused(error.to_string()))?;
            let (reader, writer) = tokio::io::split(stream);
            let mut reader = FrameReader::new(reader, self.links.buffers.clone());
            let connection = Connection::new(env.now());
            let hello = self.links.identity.encode(None);
            connection.send(Frame::plain(Kind::Hello, self.lane as u64, hello))?;
            let mut writer = writer;
            let reply = tokio::select! {
                biased;
                reply = reader.next() => reply,
                _ = connection.write_loop(&mut writer) => return Err(PeerError::ConnectionEnded),
            };
            let reply = reply.map_err(|error| PeerError::Refused(error.to_string()))?;
            Ok((connection, reader, writer, reply))
        };
        let (connection, reader, writer, reply) = tokio::select! {
            biased;
            done = handshake => done?,
            () = env.sleep(HANDSHAKE_MAX) => return Err(PeerError::TimedOut),
        };
        let (peer, refusal) = Identity::decode(reply.body)?;
        let verdict = self.links.check(&peer, Some(self.node));
        if let Some(Refusal { text, lost }) = refusal {
            tracing::warn!(node = %self.node, refusal = text, "peer refuses this node");
            if lost && verdict.is_ok() {
                self.handler.lost(&text);
            }
            return Err(PeerError::Refused(text));
        }
        let verdict = verdict.map_err(Refusal::from);
        verdict.and_then(|()| self.handler.admit(&peer, Some(&known))).map_err(
            |Refusal { text, .. }| {
                tracing::warn!(node = %self.node, refusal = text, "peer refused");
                PeerError::Refused(text)
            },
        )?;
        self.up(&connection, peer);
        let ended = pump(env, &connection, reader, writer, |frame| connection.deliver(frame)).await;
        self.down();
        connection.close();
        tracing::debug!(node = %self.node, lane = ?self.lane, ended, "link down");
        Ok(())
    }

    fn up(&self, connection: &Connection, peer: Identity) {
        let both = {
            let mut peers = self.links.peers.borrow_mut();
            let entry = peers.get_mut(&self.node).expect("inserted by dial");
            entry.connections.insert(self.lane, connection.clone());
            entry.identity = Some(peer);
            entry.connections.len() == 2
        };
        if both {
            tracing::info!(node = %self.node, "link up");
            self.handler.link_up(&peer);
        }
    }

    fn down(&self) {
        let was_both = {
            let mut peers = self.links.peers.borrow_mut();
            let Some(entry) = peers.get_mut(&self.node) else { return };
            let was_both = entry.connections.len() == 2;
            entry.connections.remove(&self.lane);
            was_both
        };
        if was_both {
            tracing::info!(node = %self.node, "link down");
            self.handler.link_down(self.node);
        }
    }
}

/// Runs reading, writing and liveness of a connection until one of them ends it.
async fn pump<E: Env, R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    env: &E,
    connection: &Connection,
    mut reader: FrameReader<R>,
    mut writer: W,
    mut on_frame: impl FnMut(Frame),
) -> String {
    let read = async {
        loop {
            match reader.next().await {
                Ok(frame) => {
                    connection.heard(env.now());
                    match frame.kind {
                        Kind::Ping => {
                            let pong = Frame::plain(Kind::Pong, frame.id, Bytes::new());
                            let _ = connection.send(pong);
                        }
                        Kind::Pong => {}
                        _ => on_frame(frame),
                    }
                }
                Err(error) => return error.to_string(),
            }
        }
    };
    let liveness = async {
        loop {
            env.sleep(PING_INTERVAL).await;
            if env.now().since(connection.last_heard()) > SILENCE_MAX {
                return "peer is silent".to_owned();
            }
            let _ = connection.send(Frame::plain(Kind::Ping, 0, Bytes::new()));
        }
    };
    tokio::select! {
        biased;
        error = read => error,
        written = connection.write_loop(&mut writer) => format!("{written:?}"),
        silent = liveness => silent,
        () = connection.closed() => "closed".to_owned(),
    }
}
