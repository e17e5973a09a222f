//! NBD clients: the socket, the session, and the commands in flight. Steps 1, 2 and 8 of a write.
//!
//! One task per connection. It reads only while the session wants input, so what a client may have
//! in flight is bounded by the session; a write's payload goes from the socket straight into an
//! aligned, pooled buffer.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use ballast_block::limits::{NBD_CONNECTIONS_MAX, NBD_HANDSHAKE_SECONDS_MAX};
use ballast_block::{IoError, IoReply};
use ballast_cluster::VolumePhase;
use ballast_env::Env;
use ballast_env::network::Listener;
use ballast_nbd::{
    Access, CommandId, Event, ExportInfo, ListExportsError, OpenExport, OpenExportError, Purpose,
    Session, Want,
};
use bytes::Buf;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::client::{AttachError, VolumeClient};
use crate::node::Inner;

/// Pause after an accept that failed, for want of file descriptors maybe.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
                let connection = Connection::new(inner.clone(), stream, from);
                inner.env.spawn(connection.run());
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept an NBD client");
                inner.env.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

type Completion = (CommandId, Result<IoReply, IoError>);

struct Connection<E: Env> {
    inner: Rc<Inner<E>>,
    stream: E::Stream,
    from: String,
    session: Session,
    client: Option<Rc<VolumeClient<E>>>,
    running: FuturesUnordered<LocalBoxFuture<'static, Completion>>,
    attached: Rc<Cell<bool>>,
}

impl<E: Env> Drop for Connection<E> {
    fn drop(&mut self) {
        self.inner.nbd_connections.set(self.inner.nbd_connections.get() - 1);
    }
}

impl<E: Env> Connection<E> {
    fn new(inner: Rc<Inner<E>>, stream: E::Stream, from: String) -> Self {
        let session = Session::new();
        inner.nbd_connections.set(inner.nbd_connections.get() + 1);
        let running = FuturesUnordered::new();
        Self { inner, stream, from, session, client: None, running, attached: Rc::default() }
    }

    async fn run(mut self) {
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
            served = self.serve() => served,
            _ = stopping.wait_for(|&stop| stop) => Ok(()),
            () = handshake => Err(io::ErrorKind::TimedOut.into()),
        };
        if let Err(error) = served {
            tracing::info!(from = self.from, %error, "NBD client gone");
        }
        if let Some(client) = &self.client {
            client.let_go();
        }
        // What is in flight runs to its end: dropped half-way, a write would leave its lock while
        // its entry is on its way.
        if !*stopping.borrow() {
            while self.running.next().await.is_some() {}
        }
        if let Some(client) = self.client.take() {
            client.detach().await;
        }
    }

    async fn serve(&mut self) -> io::Result<()> {
        loop {
            while let Some(event) = self.session.next_event().map_err(io::Error::other)? {
                self.handle(event).await;
            }
            if matches!(self.session.want(), Want::Close) {
                return self.flush().await;
            }
            poll_fn(|context| self.poll_progress(context)).await?;
        }
    }

    /// Does whatever can be done now: completions, sending, receiving.
    fn poll_progress(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut progress = false;
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
        if progress { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        const SLICES_MAX: usize = 64;
        let replies = self.session.replies();
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let used = replies.chunks_vectored(&mut slices);
        let sent = Pin::new(&mut self.stream).poll_write_vectored(context, &slices[..used]);
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

    async fn flush(&mut self) -> io::Result<()> {
        while self.session.replies().has_remaining() {
            poll_fn(|context| self.poll_send(context)).await?;
        }
        poll_fn(|context| Pin::new(&mut self.stream).poll_shutdown(context)).await
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::ListExports => {
                let names = self.volume_names();
                self.session.exports_listed(names);
            }
            Event::OpenExport(open) => {
                let opened = self.open(open).await;
                self.session.export_opened(opened);
            }
            Event::PayloadBuffer { length } => {
                self.session.payload_buffer(self.inner.buffers.get(length));
            }
            Event::Command { id, command } => {
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

    async fn open(&mut self, open: OpenExport) -> Result<ExportInfo, OpenExportError> {
        let names = self.volume_names().map_err(|_| OpenExportError::ShuttingDown)?;
        let name = match open.name.volume {
            Some(name) => name,
            None if names.len() == 1 => names[0].clone(),
            None => return Err(OpenExportError::NotTheOnlyVolume { volumes: names.len() }),
        };
        let read_only = open.name.access == Access::ReadOnly;
        let describe = open.purpose == Purpose::Describe;
        // Describing attaches nothing: the size is what the cluster knows.
        let client = VolumeClient::open(self.inner.clone(), &name, read_only || describe).await;
        let client = client.map_err(|error| match error {
            AttachError::VolumeUnknown(_) => OpenExportError::Unknown,
            AttachError::Held(node) => {
                OpenExportError::AlreadyAttached { holder: format!("a client of {node}") }
            }
            AttachError::NoQuorum => OpenExportError::NoQuorum,
        })?;
        let info = ExportInfo {
            name,
            description: String::new(),
            size: client.size(),
            read_only,
            multi_connection: read_only,
        };
        if !describe {
            tracing::info!(from = self.from, volume = info.name, read_only, "NBD client attached");
            self.attached.set(true);
            self.client = Some(Rc::new(client));
        }
        Ok(info)
    }
}
