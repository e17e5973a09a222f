//! One connection between two nodes: a queue out, frames in, calls and streams matched by id.
//!
//! Owns the queue's byte bound (guarantee **bounded**) and the pending calls. Never retries: who
//! asked decides.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use ballast_block::limits::PEER_QUEUE_BYTES_MAX;
use ballast_env::clock::{Clock, Instant};
use thiserror::Error;
use tokio::io::AsyncWrite;
use tokio::sync::{mpsc, oneshot};

use super::wire::{Frame, Kind, OutQueue};

/// A peer that can't be asked, or did not answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PeerError {
    /// No connection to it.
    #[error("no connection to the peer")]
    NotConnected,
    /// The connection ended before the answer.
    #[error("connection to the peer ended before its answer")]
    ConnectionEnded,
    /// More waits for it than the queue may hold: it is slow or hangs.
    #[error("queue to the peer is full")]
    QueueFull,
    /// No answer to entries that are no longer to be kept.
    #[error("peer is slower than the log may grow")]
    BehindRetention,
    /// No answer within the limit.
    #[error("peer did not answer in time")]
    TimedOut,
    /// The peer has no such replica.
    #[error("replica is not on the peer")]
    ReplicaNotHere,
    /// The peer refused; the text is for people.
    #[error("peer refused: {0}")]
    Refused(String),
}

enum Waiting {
    Call(oneshot::Sender<Result<Frame, PeerError>>),
    Stream(mpsc::UnboundedSender<Result<Frame, PeerError>>),
}

struct State {
    out: OutQueue,
    writer: Option<Waker>,
    waiting: BTreeMap<u64, Waiting>,
    next_id: u64,
    closed: bool,
    last_heard: Instant,
}

/// Handle of a connection; clones share it.
#[derive(Clone)]
pub struct Connection {
    state: Rc<RefCell<State>>,
    closing: Rc<tokio::sync::Notify>,
    drained: Rc<tokio::sync::Notify>,
}

impl Connection {
    /// A fresh connection; `now` counts as the first sign of life.
    pub fn new(now: Instant) -> Self {
        let state = State {
            out: OutQueue::default(),
            writer: None,
            waiting: BTreeMap::new(),
            next_id: 1,
            closed: false,
            last_heard: now,
        };
        Self { state: Rc::new(RefCell::new(state)), closing: Rc::default(), drained: Rc::default() }
    }

    /// Queues a frame.
    ///
    /// # Errors
    /// [`PeerError::QueueFull`] over [`PEER_QUEUE_BYTES_MAX`] (control answers always fit, they are
    /// small and bounded by the calls in flight); [`PeerError::ConnectionEnded`] when it is closed.
    pub fn send(&self, frame: Frame) -> Result<(), PeerError> {
        let mut state = self.state.borrow_mut();
        if state.closed {
            return Err(PeerError::ConnectionEnded);
        }
        if state.out.bytes() + frame.wire_bytes() > PEER_QUEUE_BYTES_MAX {
            return Err(PeerError::QueueFull);
        }
        state.out.push(frame);
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
        Ok(())
    }

    /// Queues a frame once there is room for it.
    ///
    /// # Errors
    /// [`PeerError::ConnectionEnded`].
    pub async fn send_in_turn(&self, frame: Frame) -> Result<(), PeerError> {
        loop {
            let drained = self.drained.notified();
            match self.send(frame.clone()) {
                Err(PeerError::QueueFull) => drained.await,
                sent => return sent,
            }
        }
    }

    /// Sends a call and waits for its answer.
    ///
    /// # Errors
    /// [`PeerError`]; after anything but `NotConnected` and `QueueFull` the call may have happened.
    pub async fn call<C: Clock>(
        &self,
        clock: &C,
        mut frame: Frame,
        limit: Duration,
    ) -> Result<Frame, PeerError> {
        let (sender, receiver) = oneshot::channel();
        frame.id = self.register(Waiting::Call(sender));
        let pending = PendingCall { connection: self, id: frame.id };
        self.send(frame)?;
        let answer = tokio::select! {
            biased;
            answer = receiver => answer.unwrap_or(Err(PeerError::ConnectionEnded)),
            () = clock.sleep(limit) => Err(PeerError::TimedOut),
        };
        drop(pending);
        answer
    }

    /// Opens a stream: answers to frames sent under its id arrive at the receiver, in order.
    pub fn open_stream(&self) -> (u64, mpsc::UnboundedReceiver<Result<Frame, PeerError>>) {
        // Unbounded, but holds at most one small answer per frame sent, and those are bounded.
        let (sender, receiver) = mpsc::unbounded_channel();
        (self.register(Waiting::Stream(sender)), receiver)
    }

    /// Forgets a stream; later answers to it are dropped.
    pub fn close_stream(&self, id: u64) {
        self.state.borrow_mut().waiting.remove(&id);
    }

    fn register(&self, waiting: Waiting) -> u64 {
        let mut state = self.state.borrow_mut();
        let id = state.next_id;
        state.next_id += 1;
        if !state.closed {
            state.waiting.insert(id, waiting);
        }
        id
    }

    /// Notes a sign of life.
    pub fn heard(&self, now: Instant) {
        self.state.borrow_mut().last_heard = now;
    }

    /// When the other side was last heard.
    pub fn last_heard(&self) -> Instant {
        self.state.borrow().last_heard
    }

    /// Hands an answer to who waits for it.
    pub fn deliver(&self, frame: Frame) {
        let mut state = self.state.borrow_mut();
        let result = |frame: Frame| match frame.kind {
            Kind::Failed => Err(decode_failure(&frame.body)),
            _ => Ok(frame),
        };
        match state.waiting.get(&frame.id) {
            Some(Waiting::Stream(sender)) => {
                let _ = sender.send(result(frame));
            }
            Some(Waiting::Call(_)) => {
                if let Some(Waiting::Call(sender)) = state.waiting.remove(&frame.id) {
                    let _ = sender.send(result(frame));
                }
            }
            None => {}
        }
    }

    /// Closes it: everything that waits fails, the pump ends.
    pub fn close(&self) {
        let waiting = {
            let mut state = self.state.borrow_mut();
            state.closed = true;
            state.out.clear();
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
            std::mem::take(&mut state.waiting)
        };
        for (_, waiting) in waiting {
            match waiting {
                Waiting::Call(sender) => drop(sender.send(Err(PeerError::ConnectionEnded))),
                Waiting::Stream(sender) => drop(sender.send(Err(PeerError::ConnectionEnded))),
            }
        }
        self.closing.notify_waiters();
        self.drained.notify_waiters();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.state.borrow().closed
    }

    /// Returns when it is closed.
    pub async fn closed(&self) {
        let closing = self.closing.notified();
        if !self.is_closed() {
            closing.await;
        }
    }

    /// Writes what is queued until the connection is closed or breaks.
    pub async fn write_loop<W: AsyncWrite + Unpin>(&self, writer: &mut W) -> std::io::Result<()> {
        poll_fn(|context| {
            let mut state = self.state.borrow_mut();
            loop {
                if state.closed {
                    return std::task::Poll::Ready(Ok(()));
                }
                if state.out.is_empty() {
                    state.writer = Some(context.waker().clone());
                    return std::task::Poll::Pending;
                }
                match state.out.poll_write(writer, context) {
                    std::task::Poll::Ready(Ok(())) => self.drained.notify_waiters(),
                    other => return other,
                }
            }
        })
        .await
    }

    /// Bytes waiting to be written.
    pub fn queued_bytes(&self) -> usize {
        self.state.borrow().out.bytes()
    }
}

struct PendingCall<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        self.connection.close_stream(self.id);
    }
}

const FAILURE_REPLICA_NOT_HERE: u8 = 1;
const FAILURE_REFUSED: u8 = 2;

/// The body of a [`Kind::Failed`] frame.
pub fn encode_failure(error: &PeerError) -> bytes::Bytes {
    match error {
        PeerError::ReplicaNotHere => vec![FAILURE_REPLICA_NOT_HERE].into(),
        other => [&[FAILURE_REFUSED], other.to_string().as_bytes()].concat().into(),
    }
}

fn decode_failure(body: &[u8]) -> PeerError {
    match body.split_first() {
        Some((&FAILURE_REPLICA_NOT_HERE, _)) => PeerError::ReplicaNotHere,
        Some((_, text)) => PeerError::Refused(String::from_utf8_lossy(text).into_owned()),
        None => PeerError::Refused("no reason given".into()),
    }
}
