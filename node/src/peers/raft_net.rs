//! Raft's network: what a group of this node sends to its members elsewhere.
//!
//! Step 5 of a write, towards the followers: every AppendEntries of a stream is one frame. After a
//! small one the next waits for its answer; large ones follow each other. A peer that makes no
//! progress, or has not answered what the log is not to keep any more, gets an error: that is what
//! releases the purge of the log (hazard F8).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::{FamilyId, NodeId, ReplicaId};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_env::spawn::OwnedTask;
use ballast_raft_store::replica::Pin;
use ballast_raft_store::types::{LogId, Member, TypeConfig, Vote};
use ballast_volume::acks::{Acks, NotesAcks};
use ballast_volume::snapshot::GroupSnapshot;
use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::LocalBoxStream;
use futures_util::{Stream, StreamExt};
use metrics::Histogram;
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use tokio::sync::mpsc::UnboundedReceiver;

use super::connection::{Connection, PeerError};
use super::links::{Lane, Links};
use super::raft_codec as codec;
use super::wire::{Frame, Kind};
use crate::calls::{OfferV1, Tag};

/// Longest wait for an answer on a stream that has one outstanding. A dead or stopped peer is
/// noticed earlier, by its silence; this is for one whose disk hangs.
const STREAM_PROGRESS_MAX: Duration = Duration::from_secs(10);

/// Longest that news of a commit waits for entries to travel with. Only followers learn of it, who
/// apply a little later: a frame of its own would cost each of them, and this node, as much as an
/// entry.
const COMMIT_HOLD: Duration = Duration::from_millis(5);

/// Longest wait for the answer to entries that the log is not to keep any more. What is not answered
/// yet holds up the purge: a peer that hangs would have the log grow until its silence is noticed.
const UNKEPT_WAIT_MAX: Duration = Duration::from_millis(500);

/// A frame with fewer bytes of entries has to be answered before the next ones are sent: what is
/// proposed meanwhile travels together and shares a disk write and an answer (a fifth of a 4 KiB
/// write's CPU at a depth of 32). Larger ones follow each other without a pause, so that the network
/// and the disk work at the same time.
const PIPELINE_FRAME_BYTES: usize = 256 << 10;

/// Longest wait for the answer to a vote: a campaign is over by then.
const VOTE_MAX: Duration = Duration::from_secs(1);

/// Longest that a receiver may take to pull and install a state.
const RESYNC_MAX: Duration = Duration::from_secs(6 * 3600);

type Rpc<T> = Result<T, RPCError<TypeConfig>>;

/// Views that are being pulled by peers, by transfer id.
pub struct Transfers<E: Env> {
    pins: RefCell<BTreeMap<u64, Rc<Pin<E>>>>,
    next: Cell<u64>,
}

impl<E: Env> Default for Transfers<E> {
    fn default() -> Self {
        Self { pins: RefCell::default(), next: Cell::new(1) }
    }
}

impl<E: Env> Transfers<E> {
    /// The view of a transfer that still runs.
    pub fn get(&self, transfer: u64) -> Option<Rc<Pin<E>>> {
        self.pins.borrow().get(&transfer).cloned()
    }

    fn begin(self: &Rc<Self>, pin: Rc<Pin<E>>) -> RunningTransfer<E> {
        let id = self.next.get();
        self.next.set(id + 1);
        self.pins.borrow_mut().insert(id, pin);
        RunningTransfer { transfers: self.clone(), id }
    }
}

struct RunningTransfer<E: Env> {
    transfers: Rc<Transfers<E>>,
    id: u64,
}

impl<E: Env> Drop for RunningTransfer<E> {
    fn drop(&mut self) {
        self.transfers.pins.borrow_mut().remove(&self.id);
    }
}

/// Makes the clients of one group.
pub struct RaftNet<E: Env> {
    /// The environment.
    pub env: E,
    /// Links to all peers.
    pub links: Rc<Links<E>>,
    /// The group's family.
    pub family: FamilyId,
    /// This node's replica of it.
    pub from: ReplicaId,
    /// Where views are kept while a peer pulls them.
    pub transfers: Rc<Transfers<E>>,
    /// When members followed this replica, if it leads.
    pub acks: Acks,
}

impl<E: Env> NotesAcks for RaftNet<E> {
    fn acks(&self) -> Acks {
        self.acks.clone()
    }
}

impl<E: Env> RaftNet<E> {
    fn client(&self, target: u64, member: &Member, lane: Lane) -> RaftClient<E> {
        RaftClient {
            env: self.env.clone(),
            links: self.links.clone(),
            family: self.family,
            from: self.from,
            to: ReplicaId(target),
            node: member.node,
            lane,
            transfers: self.transfers.clone(),
            acks: self.acks.clone(),
        }
    }
}

impl<E: Env> RaftNetworkFactory<TypeConfig> for RaftNet<E> {
    type Network = RaftClient<E>;

    async fn new_client(&mut self, target: u64, member: &Member) -> RaftClient<E> {
        self.client(target, member, Lane::Data)
    }

    async fn new_heartbeat_client(&mut self, target: u64, member: &Member) -> RaftClient<E> {
        self.client(target, member, Lane::Control)
    }
}

/// One group's way to one of its members.
pub struct RaftClient<E: Env> {
    env: E,
    links: Rc<Links<E>>,
    family: FamilyId,
    from: ReplicaId,
    to: ReplicaId,
    node: NodeId,
    lane: Lane,
    transfers: Rc<Transfers<E>>,
    acks: Acks,
}

fn unreachable(error: &PeerError) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(error))
}

fn undecodable(error: codec::DecodeMessageError) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(&error))
}

impl<E: Env> RaftClient<E> {
    fn frame(&self, kind: Kind, id: u64, body: Bytes) -> Frame {
        let plain = Frame::plain(kind, id, body);
        Frame { family: self.family, from: self.from, to: self.to, ..plain }
    }

    async fn call(&self, lane: Lane, body: Bytes, limit: Duration) -> Rpc<Bytes> {
        let frame = self.frame(Kind::Call, 0, body);
        match self.links.call(self.node, lane, frame, limit).await {
            Ok(reply) => Ok(reply.body),
            Err(error) => Err(unreachable(&error)),
        }
    }
}

impl<E: Env> RaftNetworkV2<TypeConfig> for RaftClient<E> {
    type SnapshotData = GroupSnapshot<E>;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<TypeConfig>> {
        let (body, payload) = codec::encode_append(&request);
        let frame = self.frame(Kind::Call, 0, Tag::Append.body(&body));
        let frame = Frame { payload, ..frame };
        let (term, sent) = (request.vote.leader_id.term, self.env.now());
        let reply = self.links.call(self.node, self.lane, frame, option.hard_ttl()).await;
        let reply = reply.map_err(|error| unreachable(&error))?;
        let result = codec::decode_append_reply(&reply.body).map_err(undecodable)?;
        if result.is_ok() {
            self.acks.note(self.to, term, sent);
        }
        let last = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
        Ok(match result {
            Ok(matched) if matched == last => AppendEntriesResponse::Success,
            Ok(matched) => AppendEntriesResponse::PartialSuccess(matched),
            Err(error) => AppendEntriesResponse::from(Err(error)),
        })
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        _option: RPCOption,
    ) -> LocalBoxFuture<'s, Rpc<LocalBoxStream<'s, Rpc<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin + 'static,
    {
        Box::pin(async move {
            // openraft waits between tries inside its request stream: who fails without taking from
            // it is called again at once, for ever.
            let Some(first) = input.next().await else {
                return Ok(futures_util::stream::empty().boxed_local());
            };
            let input = futures_util::stream::iter([first]).chain(input.fuse());
            let connection = self.links.connection(self.node, self.lane);
            let connection = connection.map_err(|error| unreachable(&error))?;
            let stream = OpenStream::start(self, connection, input);
            Ok(futures_util::stream::unfold(stream, OpenStream::next).boxed_local())
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        let body = Tag::Vote.body(&codec::encode_vote(&request));
        let reply = self.call(Lane::Control, body, VOTE_MAX).await?;
        codec::decode_vote_reply(&reply).map_err(undecodable)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        let body = Tag::PreVote.body(&codec::encode_vote(&request));
        let reply = self.call(Lane::Control, body, VOTE_MAX).await?;
        codec::decode_vote_reply(&reply).map_err(undecodable)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<TypeConfig, GroupSnapshot<E>>,
        cancel: impl Future<Output = ReplicationClosed> + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let GroupSnapshot::Own { pin, state, sequence } = snapshot.snapshot else {
            let error = PeerError::Refused("only a group's own state can be offered".into());
            return Err(unreachable(&error).into());
        };
        let transfer = self.transfers.begin(pin);
        let meta = codec::encode_offer(&vote, &snapshot.meta).into();
        let offer = OfferV1 { transfer: transfer.id, meta, state, sequence: sequence.0 };
        tracing::info!(family = %self.family, to = %self.to, index = ?snapshot.meta.last_log_id,
            "follower is behind the log: offering the difference");
        let reply = tokio::select! {
            biased;
            closed = cancel => return Err(closed.into()),
            reply = self.call(Lane::Data, Tag::Offer.message(&offer), RESYNC_MAX) => reply?,
        };
        let reply = codec::decode_vote_reply(&reply).map_err(undecodable)?;
        Ok(SnapshotResponse::new(reply.vote))
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Rpc<TransferLeaderResponse<TypeConfig>> {
        let body = Tag::Transfer.body(&codec::encode_transfer(&request));
        self.call(Lane::Control, body, VOTE_MAX).await?;
        Ok(Ok(()))
    }
}

/// The requests of a stream, without those that only tell a commit which the next one tells, too.
///
/// openraft matches answers to requests by log id alone, so one that is never sent lacks no answer.
struct Requests<'a, S> {
    input: &'a mut S,
    held: Option<AppendEntriesRequest<TypeConfig>>,
    /// The last entry sent: what repeats it is no probe for the follower's log.
    last: Option<LogId>,
    /// Started with the first that is held, and again only after its end: to start a timer costs a
    /// system call, so not each one held has its own.
    timer: Option<LocalBoxFuture<'static, ()>>,
}

impl<S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin> Requests<'_, S> {
    async fn next<E: Env>(&mut self, clock: &E) -> Option<AppendEntriesRequest<TypeConfig>> {
        loop {
            let request = if self.held.is_some() {
                let timer = self.timer.get_or_insert_with(|| Box::pin(clock.sleep(COMMIT_HOLD)));
                tokio::select! {
                    biased;
                    request = self.input.next() => request,
                    () = timer => {
                        self.timer = None;
                        return self.held.take();
                    }
                }
            } else {
                self.input.next().await
            };
            // What comes later in a stream tells at least as much: it takes the place of what waits.
            let Some(request) = request else { return self.held.take() };
            self.held = None;
            match request.entries.last() {
                Some(entry) => self.last = Some(entry.log_id),
                None if self.last.is_some() && self.last == request.prev_log_id => {
                    self.held = Some(request);
                    continue;
                }
                None => {}
            }
            return Some(request);
        }
    }
}

/// One running stream: a task sends, answers arrive in order.
struct OpenStream<E: Env> {
    env: E,
    connection: Connection,
    id: u64,
    replies: UnboundedReceiver<Result<Frame, PeerError>>,
    progress: Rc<Progress>,
    failed: bool,
    to: ReplicaId,
    acks: Acks,
    _sender: OwnedTask,
}

struct Sent {
    /// The leader's term.
    term: u64,
    queued: Instant,
    /// Of entries.
    bytes: usize,
    /// The index of the first entry, if there is one.
    first: Option<u64>,
}

/// Whether this request is empty because entries up to `unsendable` can't be read: a stream that
/// waits for them would hold them for ever.
fn waits_for(request: &AppendEntriesRequest<TypeConfig>, unsendable: u64) -> bool {
    let below = request.prev_log_id.is_some_and(|prev| prev.index < unsendable);
    below && request.entries.is_empty()
}

struct Progress {
    /// The frames without an answer, oldest first.
    unanswered: RefCell<VecDeque<Sent>>,
    round_trip: Histogram,
    sent: Cell<u64>,
    answered: Cell<u64>,
    ended: Cell<bool>,
    /// When the oldest unanswered frame became the oldest.
    since: Cell<Instant>,
    error: RefCell<Option<PeerError>>,
    changed: tokio::sync::Notify,
    /// Told of each answer.
    received: tokio::sync::Notify,
}

impl Progress {
    /// Returns when the next frame may go.
    async fn turn(&self) {
        let is_small = |sent: &Sent| (1..PIPELINE_FRAME_BYTES).contains(&sent.bytes);
        while self.unanswered.borrow().iter().any(is_small) {
            self.received.notified().await;
        }
    }

    /// Whether entries up to `wanted_gone` wait for an answer for too long.
    fn holds_log(&self, wanted_gone: u64, now: Instant) -> bool {
        let unanswered = self.unanswered.borrow();
        let first = unanswered.iter().find(|sent| sent.first.is_some());
        first.is_some_and(|sent| {
            sent.first <= Some(wanted_gone) && now.since(sent.queued) >= UNKEPT_WAIT_MAX
        })
    }
}

impl<E: Env> OpenStream<E> {
    fn start<S>(client: &RaftClient<E>, connection: Connection, mut input: S) -> Self
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin + 'static,
    {
        let (id, replies) = connection.open_stream();
        let env = client.env.clone();
        let progress = Rc::new(Progress {
            unanswered: RefCell::default(),
            round_trip: metrics::histogram!("ballast_stage_seconds", "stage" => "follower"),
            sent: Cell::new(0),
            answered: Cell::new(0),
            ended: Cell::new(false),
            since: Cell::new(env.now()),
            error: RefCell::default(),
            changed: tokio::sync::Notify::new(),
            received: tokio::sync::Notify::new(),
        });
        let template = client.frame(Kind::Append, id, Bytes::new());
        let (shared, clock, out) = (progress.clone(), env.clone(), connection.clone());
        let shared_acks = client.acks.clone();
        let sending = async move {
            let mut requests = Requests { input: &mut input, held: None, last: None, timer: None };
            loop {
                shared.turn().await;
                let Some(request) = requests.next(&clock).await else { break };
                if waits_for(&request, shared_acks.unsendable()) {
                    *shared.error.borrow_mut() = Some(PeerError::BehindRetention);
                    break;
                }
                let (body, payload) = codec::encode_append(&request);
                let bytes = match request.entries.is_empty() {
                    true => 0,
                    false => body.len() + payload.iter().map(Bytes::len).sum::<usize>(),
                };
                let now = clock.now();
                if shared.sent.get() == shared.answered.get() {
                    shared.since.set(now);
                }
                let term = request.vote.leader_id.term;
                let first = request.entries.first().map(|entry| entry.log_id.index);
                let sent = Sent { term, queued: now, bytes, first };
                shared.unanswered.borrow_mut().push_back(sent);
                shared.sent.set(shared.sent.get() + 1);
                let frame = Frame { body, payload, ..template.clone() };
                // In turn: a follower that catches up is as slow as its disk, and no reason to start
                // over. One that hangs is told by the progress limit or its silence.
                if let Err(error) = out.send_in_turn(frame).await {
                    *shared.error.borrow_mut() = Some(error);
                    break;
                }
                shared.changed.notify_one();
            }
            let _ = out.send(Frame { kind: Kind::AppendEnd, ..template });
            shared.ended.set(true);
            shared.changed.notify_one();
        };
        let _sender = OwnedTask(client.env.spawn(sending));
        let (to, acks) = (client.to, client.acks.clone());
        Self { env, connection, id, replies, progress, failed: false, to, acks, _sender }
    }

    async fn next(mut self) -> Option<(Rpc<StreamAppendResult<TypeConfig>>, Self)> {
        if self.failed {
            return None;
        }
        let result = loop {
            if let Some(error) = self.progress.error.borrow_mut().take() {
                break Err(unreachable(&error));
            }
            let waiting = self.progress.sent.get() > self.progress.answered.get();
            if !waiting && self.progress.ended.get() {
                return None;
            }
            let waited = self.env.now().since(self.progress.since.get());
            let left = STREAM_PROGRESS_MAX.saturating_sub(waited);
            if waiting && left.is_zero() {
                break Err(unreachable(&PeerError::TimedOut));
            }
            if self.progress.holds_log(self.acks.wanted_gone(), self.env.now()) {
                break Err(unreachable(&PeerError::BehindRetention));
            }
            let pause = left.min(UNKEPT_WAIT_MAX / 2);
            tokio::select! {
                biased;
                reply = self.replies.recv() => break self.take(reply),
                () = self.progress.changed.notified() => {}
                () = self.env.sleep(pause), if waiting => {}
            }
        };
        self.failed = !matches!(result, Ok(Ok(_)));
        Some((result, self))
    }

    fn take(&self, reply: Option<Result<Frame, PeerError>>) -> Rpc<StreamAppendResult<TypeConfig>> {
        let reply = reply.unwrap_or(Err(PeerError::ConnectionEnded));
        let reply = reply.map_err(|error| unreachable(&error))?;
        self.progress.answered.set(self.progress.answered.get() + 1);
        let now = self.env.now();
        self.progress.since.set(now);
        let result = codec::decode_append_reply(&reply.body).map_err(undecodable)?;
        let sent = self.progress.unanswered.borrow_mut().pop_front();
        self.progress.received.notify_one();
        if let Some(Sent { term, queued, .. }) = sent {
            self.progress.round_trip.record(now.since(queued).as_secs_f64());
            if result.is_ok() {
                self.acks.note(self.to, term, queued);
            }
        }
        Ok(result)
    }
}

impl<E: Env> Drop for OpenStream<E> {
    fn drop(&mut self) {
        self.connection.close_stream(self.id);
        let _ = self.connection.send(Frame::plain(Kind::AppendEnd, self.id, Bytes::new()));
    }
}
