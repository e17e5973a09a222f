//! Connections that peers dialled: the handshake's other side, and what arrives afterwards.
//!
//! Only shard 0 listens. A peer says which shard it is; if that is another one here, the connection
//! travels there ([`crate::shards`]) before anything is answered.

use std::collections::BTreeMap;
use std::rc::Rc;

use ballast_env::Env;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::connection::{Connection, PeerError, encode_failure};
use super::identity::{Identity, Refusal};
use super::links::{HANDSHAKE_MAX, Handler, Links, PING_INTERVAL, SILENCE_MAX};
use super::wire::{Frame, FrameReader, Kind};
use crate::shards::{Arrival, HandOverError};

/// Messages of one stream that wait for the group: beyond it the connection is not read on.
const STREAM_FRAMES_MAX: usize = 64;

/// Serves a connection that was accepted: here, or on the shard that it is for.
pub(super) async fn accept_one<E: Env>(
    links: Rc<Links<E>>,
    stream: E::Stream,
    from: String,
    handler: Rc<dyn Handler>,
) {
    let connection = Connection::new(links.env.now());
    links.keep_accepted(&connection);
    let mut reader = FrameReader::new(stream, links.buffers.clone());
    let hello = tokio::select! {
        biased;
        hello = reader.next() => hello.map_err(|error| PeerError::Refused(error.to_string())),
        () = links.env.sleep(HANDSHAKE_MAX) => Err(PeerError::TimedOut),
        () = connection.closed() => Err(PeerError::ConnectionEnded),
    };
    let read = hello.and_then(|hello| {
        let peer = identity_in(&hello)?;
        let stream = reader.into_inner().map_err(|error| PeerError::Refused(error.to_string()))?;
        Ok((stream, hello, peer))
    });
    let (stream, hello, peer) = match read {
        Ok(read) => read,
        Err(error) => {
            if matches!(error, PeerError::Refused(_)) {
                tracing::warn!(from, %error, "connection is no peer");
            }
            return connection.close();
        }
    };
    if peer.shard == links.identity().shard {
        return serve(links, connection, stream, peer, from, handler).await;
    }
    let handed = links.doors.door(peer.shard).map(|door| (door, links.env.detach(stream)));
    match handed {
        Ok((door, Ok(stream))) => door.send(Arrival::Peer { stream, hello, from }),
        Ok((_, Err(error))) => tracing::warn!(from, %error, "can't hand a peer to its shard"),
        Err(error @ HandOverError::ShardNotHere(_)) => {
            tracing::debug!(from, peer = %peer.node, %error, "peer not served");
        }
        Err(error) => tracing::warn!(from, peer = %peer.node, %error, "peer not served"),
    }
    connection.close();
}

/// Serves a connection that shard 0 accepted for this one.
pub(crate) async fn take_in<E: Env>(
    links: Rc<Links<E>>,
    stream: E::Stream,
    hello: Frame,
    from: String,
    handler: Rc<dyn Handler>,
) {
    let Ok(peer) = identity_in(&hello) else { return };
    let connection = Connection::new(links.env.now());
    links.keep_accepted(&connection);
    serve(links, connection, stream, peer, from, handler).await;
}

fn identity_in(hello: &Frame) -> Result<Identity, PeerError> {
    if hello.kind != Kind::Hello {
        return Err(PeerError::Refused("first frame is not a handshake".into()));
    }
    Identity::decode(hello.body.clone()).map(|(peer, _)| peer)
}

async fn serve<E: Env>(
    links: Rc<Links<E>>,
    connection: Connection,
    stream: E::Stream,
    peer: Identity,
    from: String,
    handler: Rc<dyn Handler>,
) {
    let verdict = links.check(&peer, None).map_err(Refusal::from);
    let refusal = verdict.and_then(|()| handler.admit(&peer, None)).err();
    let reply = links.identity().encode(refusal.as_ref());
    let _ = connection.send(Frame::plain(Kind::HelloReply, 0, reply));
    let inbound = Inbound {
        env: links.env.clone(),
        connection: connection.clone(),
        handler,
        peer,
        refused: refusal.is_some(),
    };
    if let Some(Refusal { text, .. }) = refusal {
        tracing::warn!(from, peer = %peer.node, refusal = text, "peer refused");
    }
    let (reader, writer) = tokio::io::split(stream);
    inbound.serve(FrameReader::new(reader, links.buffers.clone()), writer).await;
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
