//! NBD clients: the socket, the session, and the commands in flight. Steps 1, 2 and 8 of a write.
//!
//! One task per connection; what several of one client have in common is [`crate::nbd_lanes`]. It begins on shard 0, which listens, and travels to the volume's shard
//! when the client opens an export. It reads only while the session wants input, so what a client may have
//! in flight is bounded by the session; a write's payload goes from the socket straight into an
//! aligned, pooled buffer.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use ballast_block::limits::{
    NBD_CONNECTIONS_MAX, NBD_HANDSHAKE_SECONDS_MAX, NBD_OPEN_ELECTIONS, NBD_OPEN_SECONDS_MAX,
};
use ballast_block::{Epoch, IoError, IoReply, NodeId, ShardId};
use ballast_cluster::{ReplicaState, Volume, VolumePhase};
use ballast_env::Env;
use ballast_env::network::Listener;
use ballast_nbd::{
    Access, CommandId, Event, ExportInfo, ListExportsError, OpenExport, OpenExportError, Purpose,
    Session, SuspendedHandshake, Want,
};
use bytes::Buf;
use futures_util::future::{FutureExt, LocalBoxFuture, join};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::client::{AttachError, VolumeClient};
use crate::config::NodeConfig;
use crate::leases::{COPY_LAG_MAX, LeasePolicy};
use crate::nbd_lanes::{self, Place};
use crate::node::Inner;
use crate::shards::{Arrival, HandOverError};

/// Pause after an accept that failed, for want of file descriptors maybe.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client may take over its last answers, and over closing its side, before it is cut off.
pub(crate) const CLOSING_MAX: Duration = Duration::from_secs(1);

/// Bytes thrown away at once while a client closes its side.
const UNREAD_BYTES: usize = 16 << 10;

/// Waits until every client's connection is closed, but not for one that does not close its side.
pub(crate) async fn all_closed<E: Env>(inner: &Inner<E>) {
    let closed = async {
        loop {
            let next = inner.nbd_closed.notified();
            if inner.nbd_connections.get() == 0 {
                return;
            }
            next.await;
        }
    };
    tokio::select! {
        biased;
        () = closed => {}
        () = inner.env.sleep(CLOSING_MAX) => {}
    }
}

pub(crate) async fn accept<E: Env, L>(node: Weak<Inner<E>>, listener: L)
where
    L: Listener<Stream = E::Stream>,
{
    loop {
        let accepted = listener.accept().await;
        let Some(inner) = node.upgrade() else { return };
        match accepted {
            Ok((_, from)) if inner.nbd_connections.get() >= NBD_CONNECTIONS_MAX => {
                tracing::warn!(from, limit = NBD_CONNECTIONS_MAX, "too many NBD clients");
            }
            Ok((stream, from)) => {
                let connection = Connection::new(inner.clone(), stream, from, Session::new());
                inner.env.spawn(connection.run(None));
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept an NBD client");
                inner.env.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Goes on with a connection that another shard of this node accepted.
pub(crate) fn resume<E: Env>(
    inner: &Rc<Inner<E>>,
    stream: E::Stream,
    handshake: SuspendedHandshake,
    open: OpenExport,
    from: String,
) {
    if inner.nbd_connections.get() >= NBD_CONNECTIONS_MAX {
        tracing::warn!(from, limit = NBD_CONNECTIONS_MAX, "too many NBD clients");
        return;
    }
    let connection = Connection::new(inner.clone(), stream, from, Session::resume(handshake));
    inner.env.spawn(connection.run(Some(open)));
}

type Completion = (CommandId, Result<IoReply, IoError>);

struct Connection<E: Env> {
    inner: Rc<Inner<E>>,
    stream: E::Stream,
    from: String,
    session: Session,
    client: Option<Rc<VolumeClient<E>>>,
    /// Its place among the connections of its client, if that has several to write by.
    place: Option<Place<E>>,
    /// Completes when the session of that place has ended.
    others_ended: LocalBoxFuture<'static, ()>,
    running: FuturesUnordered<LocalBoxFuture<'static, Completion>>,
    attached: Rc<Cell<bool>>,
    /// Of the cluster's state when the volume's size was looked at last.
    revision_seen: u64,
    _counted: Counted<E>,
}

/// A connection among those that the limit is for.
struct Counted<E: Env>(Rc<Inner<E>>);

impl<E: Env> Counted<E> {
    fn new(inner: Rc<Inner<E>>) -> Self {
        inner.nbd_connections.set(inner.nbd_connections.get() + 1);
        Self(inner)
    }
}

impl<E: Env> Drop for Counted<E> {
    fn drop(&mut self) {
        self.0.nbd_connections.set(self.0.nbd_connections.get() - 1);
        self.0.nbd_closed.notify_waiters();
    }
}

/// How serving a connection ended.
enum Served {
    /// The client has said good-bye, or its session is over.
    Ended,
    /// The export is another shard's.
    Elsewhere(ShardId, OpenExport),
}

impl<E: Env> Connection<E> {
    fn new(inner: Rc<Inner<E>>, stream: E::Stream, from: String, mut session: Session) -> Self {
        session.share(inner.request_memory.clone());
        let running = FuturesUnordered::new();
        let (client, place, attached) = (None, None, Rc::default());
        let others_ended = std::future::pending().boxed_local();
        let _counted = Counted::new(inner.clone());
        let revision_seen = 0;
        Self {
            inner,
            stream,
            from,
            session,
            client,
            place,
            others_ended,
            running,
            attached,
            revision_seen,
            _counted,
        }
    }

    /// Serves the client; `asked` is what it waits for already.
    async fn run(mut self, asked: Option<OpenExport>) {
        let mut stopping = self.inner.stopping.subscribe();
        let limit = self.inner.env.sleep(Duration::from_secs(NBD_HANDSHAKE_SECONDS_MAX));
        let attached = self.attached.clone();
        let handshake = async move {
            limit.await;
            if attached.get() {
                std::future::pending::<()>().await;
            }
        };
        let served = tokio::select! {
            biased;
            served = self.serve(asked) => served,
            _ = stopping.wait_for(|&stop| stop) => Ok(Served::Ended),
            () = handshake => Err(io::ErrorKind::TimedOut.into()),
        };
        let sound = match served {
            Ok(Served::Ended) => true,
            Ok(Served::Elsewhere(shard, open)) => return self.hand_over(shard, open),
            Err(error) => {
                tracing::info!(from = self.from, %error, "NBD client gone");
                false
            }
        };
        self.session.stop_waiting();
        if *stopping.borrow() {
            self.session.begin_shutdown();
        }
        let good_bye = sound && !self.session.is_over() && self.session.commands_in_flight() == 0;
        match (&self.place, &self.client) {
            (Some(_), _) if good_bye => {}
            // Before the connection is closed: what the client does then comes too late.
            (Some(place), _) => place.end(),
            (None, Some(client)) => client.let_go(),
            (None, None) => {}
        }
        let Self { inner, stream, mut session, client, place, mut running, _counted, .. } = self;
        // What is in flight runs to its end: dropped half-way, a write would leave its lock while
        // its entry is on its way.
        let in_flight = async {
            tokio::select! {
                biased;
                _ = stopping.wait_for(|&stop| stop) => {}
                () = async { while running.next().await.is_some() {} } => {}
            }
        };
        let closed = async {
            if sound {
                tokio::select! {
                    biased;
                    // A client that is gone by now has nothing left to hear.
                    _ = close(stream, &mut session) => {}
                    () = inner.env.sleep(CLOSING_MAX) => {}
                }
            }
        };
        join(in_flight, closed).await;
        drop((session, _counted));
        let left_behind = match place {
            Some(place) => place.depart(good_bye),
            None => client,
        };
        if let Some(client) = left_behind {
            client.detach().await;
        }
    }

    async fn serve(&mut self, asked: Option<OpenExport>) -> io::Result<Served> {
        if let Some(open) = asked {
            let opened = self.open_in_time(open, true).await;
            self.session.export_opened(opened);
        }
        loop {
            self.note_growth();
            while let Some(event) = self.session.next_event().map_err(io::Error::other)? {
                match event {
                    Event::OpenExport(open) => {
                        if let Some(shard) = self.shard_elsewhere(&open) {
                            flush(&mut self.stream, &mut self.session).await?;
                            return Ok(Served::Elsewhere(shard, open));
                        }
                        let opened = self.open_in_time(open, false).await;
                        self.session.export_opened(opened);
                    }
                    event => self.handle(event),
                }
            }
            if self.session.is_over() || matches!(self.session.want(), Want::Close) {
                return Ok(Served::Ended);
            }
            poll_fn(|context| self.poll_progress(context)).await?;
        }
    }

    /// A volume may grow while a client uses it; looked at when the cluster's state has changed, or
    /// another client here was told so before it has.
    fn note_growth(&mut self) {
        let Some(client) = &self.client else { return };
        let revision = self.inner.cluster.state().revision();
        if self.revision_seen != revision || client.size_told() > 0 {
            self.revision_seen = revision;
            self.session.grow(client.size_now());
        }
    }

    /// The shard of this node that serves the export, if it is another one and there.
    fn shard_elsewhere(&self, open: &OpenExport) -> Option<ShardId> {
        let shard = self.volume_of(open).ok()?.shard;
        let elsewhere = open.purpose == Purpose::Attach && shard != self.inner.shard();
        (elsewhere && self.inner.doors.door(shard).is_ok()).then_some(shard)
    }

    /// The shard that handed the client over may know the volume a moment earlier than this one.
    async fn hear_of(&self, open: &OpenExport) {
        let known = async {
            let mut changes = self.inner.cluster.changes();
            while self.volume_of(open).is_err() && changes.next().await {}
        };
        tokio::select! {
            biased;
            () = known => {}
            () = self.inner.env.sleep(COPY_LAG_MAX) => {}
        }
    }

    /// The only way out of a shard; what the client sent and was not looked at goes along.
    fn hand_over(self, shard: ShardId, open: OpenExport) {
        let Self { inner, stream, from, session, .. } = self;
        let handed = inner.doors.door(shard).map(|door| (door, inner.env.detach(stream)));
        match handed {
            Ok((door, Ok(stream))) => {
                let handshake = session.suspend();
                door.send(Arrival::Nbd { stream, handshake, open, from });
            }
            Ok((_, Err(error))) => tracing::warn!(from, %error, "NBD client not handed over"),
            Err(error) => tracing::warn!(from, %error, "NBD client not handed over"),
        }
    }

    /// Does whatever can be done now: completions, sending, receiving.
    fn poll_progress(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut progress = false;
        if self.others_ended.poll_unpin(context).is_ready() {
            self.others_ended = std::future::pending().boxed_local();
            self.session.end();
            return Poll::Ready(Ok(()));
        }
        while let Poll::Ready(Some((id, result))) = self.running.poll_next_unpin(context) {
            self.session.complete(id, result);
            progress = true;
        }
        while self.session.replies().has_remaining() {
            match self.poll_send(context) {
                Poll::Ready(Ok(())) => progress = true,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => break,
            }
        }
        if !progress && let Want::Read { first, .. } = self.session.want() {
            let mut buffer = ReadBuf::new(first);
            match Pin::new(&mut self.stream).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) => {
                    let count = buffer.filled().len();
                    if count == 0 {
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                    self.session.received(count);
                    progress = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        if progress || self.session.poll_memory(context.waker()).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        poll_send(&mut self.stream, &mut self.session, context)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::ListExports => {
                let names = self.volume_names();
                self.session.exports_listed(names);
            }
            Event::OpenExport(_) => unreachable!("taken by the caller"),
            Event::PayloadBuffer { length } => {
                self.session.payload_buffer(self.inner.buffers.get(length));
            }
            Event::Command { id, command } => {
                let handle = self.session.handle_of(id);
                if self.place.as_ref().is_some_and(|place| !place.may_run(handle)) {
                    return self.session.end();
                }
                let client = self.client.clone().expect("commands follow an attachment");
                self.running.push(Box::pin(async move { (id, client.run(command).await) }));
            }
        }
    }

    fn volume_names(&self) -> Result<Vec<String>, ListExportsError> {
        if *self.inner.stopping.borrow() {
            return Err(ListExportsError::ShuttingDown);
        }
        let state = self.inner.cluster.state();
        let ready = state.volumes().filter(|volume| volume.phase == VolumePhase::Ready);
        Ok(ready.map(|volume| volume.name.clone()).collect())
    }

    /// The volume that a client means.
    fn volume_of(&self, open: &OpenExport) -> Result<Volume, OpenExportError> {
        let mut names = self.volume_names().map_err(|_| OpenExportError::ShuttingDown)?;
        let name = match (&open.name.volume, names.len()) {
            (Some(name), _) => name.clone(),
            (None, 1) => names.remove(0),
            (None, volumes) => return Err(OpenExportError::NotTheOnlyVolume { volumes }),
        };
        let state = self.inner.cluster.state();
        state.volume_by_name(&name).cloned().ok_or(OpenExportError::Unknown)
    }

    /// Opens an export, or refuses it when the volume has had no leader for too long.
    async fn open_in_time(
        &mut self,
        open: OpenExport,
        handed_over: bool,
    ) -> Result<ExportInfo, OpenExportError> {
        let (inner, asked) = (self.inner.clone(), open.clone());
        let opening = async {
            if handed_over {
                self.hear_of(&open).await;
            }
            self.open(open).await
        };
        let opened = tokio::select! {
            biased;
            opened = opening => Some(opened),
            () = inner.env.sleep(open_max(&inner.config)) => None,
        };
        opened.unwrap_or_else(|| Err(self.no_leader(&asked)))
    }

    /// Why there is none, as far as this node sees.
    fn no_leader(&self, open: &OpenExport) -> OpenExportError {
        let volume = match self.volume_of(open) {
            Ok(volume) => volume,
            Err(error) => return error,
        };
        let inner = &self.inner;
        let state = inner.cluster.state();
        let replicas = state.replicas_of(volume.family);
        let nodes = replicas.filter(|it| it.state == ReplicaState::Ready).map(|it| it.node);
        let is_away =
            |&node: &NodeId| node != inner.config.node && inner.links.peer(node).is_none();
        let name = |id| state.node(id).map_or_else(|| id.to_string(), |node| node.name.clone());
        let unreachable = nodes.filter(is_away).map(name).collect::<Vec<_>>().join(", ");
        let (from, volume) = (&self.from, volume.name);
        tracing::warn!(from, volume, unreachable, "NBD client refused: no leader");
        OpenExportError::NoQuorum { unreachable }
    }

    async fn open(&mut self, open: OpenExport) -> Result<ExportInfo, OpenExportError> {
        let volume = self.volume_of(&open)?;
        let read_only = open.name.access == Access::ReadOnly;
        if open.purpose == Purpose::Describe {
            // Nothing is attached: the size is what the cluster knows.
            return Ok(export_info(volume.name, volume.size_bytes, read_only));
        }
        if volume.shard != self.inner.shard() {
            let error = self.inner.doors.door(volume.shard).err();
            let error = error.unwrap_or(HandOverError::ShardBusy(volume.shard));
            return Err(OpenExportError::NotServedHere { why: error.to_string() });
        }
        let epoch = open.name.lease.unwrap_or(Epoch(0));
        if epoch == Epoch(0) && self.inner.config.leases == LeasePolicy::Required {
            return Err(OpenExportError::LeaseNeeded);
        }
        let attach = || VolumeClient::open(self.inner.clone(), &volume.name, read_only, epoch);
        let client = match open.name.lane {
            None => attach().await.map(|client| Some(Rc::new(client))),
            Some(lane) => {
                let place = nbd_lanes::join(&self.inner, (volume.family, epoch), lane);
                let client = place.attached(attach).await;
                if matches!(client, Ok(Some(_))) {
                    self.others_ended = place.ended().boxed_local();
                    self.place = Some(place);
                }
                client
            }
        };
        let client = client.map_err(|error| refusal(error, &volume))?;
        let client = client.ok_or_else(|| OpenExportError::NotServedHere {
            why: "another connection of this session has ended".to_owned(),
        })?;
        tracing::info!(from = self.from, volume = volume.name, read_only, "NBD client attached");
        let mut info = export_info(volume.name, client.size(), read_only);
        info.multi_connection |= self.place.is_some();
        let state = self.inner.cluster.state();
        let known = |family| state.volume_of_family(family).map(|volume| volume.size_bytes);
        self.inner.nbd_sizes.tell(volume.family, info.size, known);
        drop(state);
        self.attached.set(true);
        self.client = Some(client);
        Ok(info)
    }
}

fn poll_send<S: AsyncWrite + Unpin>(
    stream: &mut S,
    session: &mut Session,
    context: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    const SLICES_MAX: usize = 64;
    let replies = session.replies();
    let mut slices = [IoSlice::new(&[]); SLICES_MAX];
    let used = replies.chunks_vectored(&mut slices);
    let sent = Pin::new(stream).poll_write_vectored(context, &slices[..used]);
    match sent {
        Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        Poll::Ready(Ok(count)) => {
            replies.advance(count);
            Poll::Ready(Ok(()))
        }
        Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        Poll::Pending => Poll::Pending,
    }
}

async fn flush<S: AsyncWrite + Unpin>(stream: &mut S, session: &mut Session) -> io::Result<()> {
    while session.replies().has_remaining() {
        poll_fn(|context| poll_send(stream, session, context)).await?;
    }
    Ok(())
}

/// Sends what is answered, says that no more follows, and waits for the client to close. A socket that
/// is closed while it holds bytes that nobody read takes back what is still on its way to the client.
async fn close<S>(mut stream: S, session: &mut Session) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    flush(&mut stream, session).await?;
    stream.shutdown().await?;
    let mut unread = vec![0; UNREAD_BYTES];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

fn refusal(error: AttachError, volume: &Volume) -> OpenExportError {
    match error {
        AttachError::VolumeUnknown(_) => OpenExportError::Unknown,
        AttachError::Held(node) => {
            OpenExportError::AlreadyAttached { holder: format!("a client of {node}") }
        }
        AttachError::NotLeased(epoch) => OpenExportError::LeaseNotInForce(epoch),
        AttachError::Leased => OpenExportError::LeasedElsewhere { holder: holders(volume) },
    }
}

/// How long a client waits until its export is open.
fn open_max(config: &NodeConfig) -> Duration {
    let elections = config.raft.election_max * NBD_OPEN_ELECTIONS;
    let most = Duration::from_secs(NBD_HANDSHAKE_SECONDS_MAX - 1);
    Duration::from_secs(NBD_OPEN_SECONDS_MAX).max(elections).min(most)
}

/// Who holds the volume's leases, for people.
fn holders(volume: &Volume) -> String {
    let hosts: Vec<&str> = volume.leases.iter().map(|lease| &lease.host[..]).collect();
    if hosts.is_empty() { "another host".to_owned() } else { hosts.join(", ") }
}

fn export_info(name: String, size: u64, read_only: bool) -> ExportInfo {
    ExportInfo { name, description: String::new(), size, read_only, multi_connection: read_only }
}
