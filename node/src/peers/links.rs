//! Links to all peers: dialling, accepting, the handshake, and the pumps of each connection.
//!
//! A link names cluster, node, pool and boot counter before anything else is said (hazard F5), and
//! a process incarnation, so that peers notice a restart at once (hazard 13). A link that is silent
//! for [`SILENCE_MAX`] is closed: a stopped process keeps its sockets open for ever.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::buffer::BufferPool;
use ballast_block::{ClusterId, NodeId, PoolId, ReplicaId};
use ballast_cluster::Marks;
use ballast_env::Env;
use ballast_env::network::{Address, Listener};
use ballast_env::spawn::OwnedTask;
use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::connection::{Connection, PeerError, encode_failure};
use super::wire::{Frame, FrameReader, Kind};

/// How long a connection may be silent before it counts as dead.
pub const SILENCE_MAX: Duration = Duration::from_millis(2500);
const PING_INTERVAL: Duration = Duration::from_millis(500);
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
const REDIAL_MIN: Duration = Duration::from_millis(50);
const REDIAL_MAX: Duration = Duration::from_secs(1);

/// Messages of one stream that wait for the group: beyond it the connection is not read on.
const STREAM_FRAMES_MAX: usize = 64;

/// Who a process is, as it tells its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// Its pool.
    pub pool: PoolId,
    /// How often the pool was opened.
    pub boot: u64,
    /// Random, new with each start of the process.
    pub incarnation: u64,
    /// What the pool says of its past, as it was opened.
    pub marks: Marks,
    /// The pool's member of the cluster group.
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
}

impl Identity {
    fn encode(&self, refusal: Option<&Refusal>) -> Bytes {
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
        };
        prost::Message::encode_to_vec(&hello).into()
    }

    fn decode(body: Bytes) -> Result<(Self, Option<Refusal>), PeerError> {
        let damaged = || PeerError::Refused("handshake can't be decoded".into());
        let hello: HelloV1 = prost::Message::decode(body).map_err(|_| damaged())?;
        let identity = Identity {
            cluster: ClusterId::from_bytes(hello.cluster.try_into().map_err(|_| damaged())?),
            node: NodeId(hello.node),
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
    /// Whether a peer may talk to this node; the text of a refusal goes to it.
    fn admit(&self, peer: &Identity) -> Result<(), Refusal>;

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
    env: E,
    identity: Identity,
    buffers: BufferPool,
    peers: RefCell<BTreeMap<NodeId, Dialled>>,
    /// Connections that peers dialled, to be closed with the rest.
    accepted: RefCell<Vec<Connection>>,
}

impl<E: Env> Links<E> {
    /// No peer yet.
    pub fn new(env: E, identity: Identity, buffers: BufferPool) -> Rc<Self> {
        let (peers, accepted) = (RefCell::default(), RefCell::default());
        Rc::new(Self { env, identity, buffers, peers, accepted })
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

    fn keep_accepted(&self, connection: &Connection) {
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
                    let accepted = accept_one(self.clone(), stream, from, handler.clone());
                    self.env.spawn(accepted);
                }
                Err(error) => {
                    tracing::warn!(%error, "can't accept a peer");
                    self.env.sleep(REDIAL_MIN).await;
                }
            }
        }
    }

    fn check(&self, peer: &Identity, expected: Option<NodeId>) -> Result<(), String> {
        if peer.cluster != self.identity.cluster {
            return Err(format!(
                "node belongs to cluster {}, this one to {}",
                peer.cluster, self.identity.cluster
            ));
        }
        if expected.is_some_and(|expected| expected != peer.node) {
            return Err(format!("{} answers at the address of another node", peer.node));
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
        verdict.and_then(|()| self.handler.admit(&peer)).map_err(|Refusal { text, .. }| {
            tracing::warn!(node = %self.node, refusal = text, "peer refused");
            PeerError::Refused(text)
        })?;
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

async fn accept_one<E: Env>(
    links: Rc<Links<E>>,
    stream: E::Stream,
    from: String,
    handler: Rc<dyn Handler>,
) {
    let env = links.env.clone();
    let (reader, writer) = tokio::io::split(stream);
    let mut reader = FrameReader::new(reader, links.buffers.clone());
    let connection = Connection::new(env.now());
    links.keep_accepted(&connection);
    let hello = tokio::select! {
        biased;
        hello = reader.next() => Some(hello),
        () = env.sleep(HANDSHAKE_MAX) => None,
        () = connection.closed() => None,
    };
    let Some(hello) = hello else { return connection.close() };
    let peer = match hello {
        Ok(frame) if frame.kind == Kind::Hello => Identity::decode(frame.body),
        Ok(_) => Err(PeerError::Refused("first frame is not a handshake".into())),
        Err(error) => Err(PeerError::Refused(error.to_string())),
    };
    let peer = match peer {
        Ok((peer, _)) => peer,
        Err(error) => {
            tracing::warn!(from, %error, "connection is no peer");
            return connection.close();
        }
    };
    let verdict = links.check(&peer, None).map_err(Refusal::from);
    let refusal = verdict.and_then(|()| handler.admit(&peer)).err();
    let reply = links.identity.encode(refusal.as_ref());
    let _ = connection.send(Frame::plain(Kind::HelloReply, 0, reply));
    let inbound = Inbound {
        env: env.clone(),
        connection: connection.clone(),
        handler,
        peer,
        refused: refusal.is_some(),
    };
    if let Some(Refusal { text, .. }) = refusal {
        tracing::warn!(from, peer = %peer.node, refusal = text, "peer refused");
    }
    inbound.serve(reader, writer).await;
    connection.close();
}

struct Inbound<E: Env> {
    env: E,
    connection: Connection,
    handler: Rc<dyn Handler>,
    peer: Identity,
    refused: bool,
}

impl<E: Env> Inbound<E> {
    async fn serve<R, W>(self, mut reader: FrameReader<R>, mut writer: W)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let read = async {
            let mut streams = BTreeMap::<u64, mpsc::Sender<Frame>>::new();
            while let Ok(frame) = reader.next().await {
                self.connection.heard(self.env.now());
                if self.refused {
                    return;
                }
                match frame.kind {
                    Kind::Ping => {
                        let pong = Frame::plain(Kind::Pong, frame.id, Bytes::new());
                        let _ = self.connection.send(pong);
                    }
                    Kind::Call => self.start_call(frame),
                    Kind::Append => self.feed_stream(&mut streams, frame).await,
                    Kind::AppendEnd => drop(streams.remove(&frame.id)),
                    _ => {}
                }
            }
        };
        let liveness = async {
            // The dialling side pings; silence means that it is gone or stopped.
            loop {
                self.env.sleep(PING_INTERVAL).await;
                if self.env.now().since(self.connection.last_heard()) > SILENCE_MAX {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = read => {}
            _ = self.connection.write_loop(&mut writer) => {}
            () = liveness => {}
        }
    }

    fn start_call(&self, frame: Frame) {
        let (connection, id) = (self.connection.clone(), frame.id);
        let answer = self.handler.clone().call(self.peer, frame);
        self.env.spawn(async move {
            let reply = match answer.await {
                Ok((body, payload)) => Frame { payload, ..Frame::plain(Kind::CallReply, id, body) },
                Err(error) => Frame::plain(Kind::Failed, id, encode_failure(&error)),
            };
            if connection.send(reply) == Err(PeerError::QueueFull) {
                // The caller would wait for ever for this one answer: end the connection instead.
                connection.close();
            }
        });
    }

    async fn feed_stream(&self, streams: &mut BTreeMap<u64, mpsc::Sender<Frame>>, frame: Frame) {
        let id = frame.id;
        if !streams.contains_key(&id) {
            streams.retain(|_, sender| !sender.is_closed());
            streams.insert(id, self.start_stream(&frame));
        }
        let sender = streams.get(&id).expect("inserted above");
        if sender.send(frame).await.is_err() {
            // The group ended the stream and said so; what still arrives for it is dropped.
        }
    }

    fn start_stream(&self, first: &Frame) -> mpsc::Sender<Frame> {
        let (sender, receiver) = mpsc::channel(STREAM_FRAMES_MAX);
        let (connection, id) = (self.connection.clone(), first.id);
        let replies = connection.clone();
        let reply = Box::new(move |body| {
            let _ = replies.send(Frame::plain(Kind::AppendReply, id, body));
        });
        let running = self.handler.clone().stream(first, receiver, reply);
        self.env.spawn(async move {
            if let Err(error) = running.await {
                let _ = connection.send(Frame::plain(Kind::Failed, id, encode_failure(&error)));
            }
        });
        sender
    }
}
