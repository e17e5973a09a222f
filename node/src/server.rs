//! What this node does with what its peers send: finds the group, checks who asks, answers.
//!
//! A replica that is not here is answered "not here" and never made by implication; a suspect
//! neither votes nor acknowledges (hazards F5, F6).

use std::rc::{Rc, Weak};

use ballast_block::{FamilyId, NodeId};
use ballast_cluster::Pool;
use ballast_env::Env;
use ballast_raft_store::replica::{DamagedBlock, Health};
use ballast_raft_store::types::TypeConfig;
use ballast_volume::group::Group;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use openraft::raft::{AppendEntriesRequest, VoteResponse};
use prost::Message;
use tokio::sync::mpsc;

use crate::calls::{
    AttachV1, AttachmentV1, BlockV1, ClusterCallV1, DifferenceV1, FlagV1, MoveLeaderV1, OfferV1,
    OperateV1, RoomV1, SleepV1, Tag, decode, encode_page,
};
use crate::node::Inner;
use crate::peers::connection::PeerError;
use crate::peers::identity::{Identity, Refusal};
use crate::peers::links::Handler;
use crate::peers::raft_codec as codec;
use crate::peers::wire::Frame;
use crate::{admission, attach, leases, mend, operate, quiesce, report, resync};

type Answer = Result<(Bytes, Vec<Bytes>), PeerError>;

/// The node as its peers see it.
pub(crate) struct Server<E: Env> {
    inner: Weak<Inner<E>>,
}

impl<E: Env> Server<E> {
    pub(crate) fn of(inner: &Rc<Inner<E>>) -> Rc<dyn Handler> {
        Rc::new(Self { inner: Rc::downgrade(inner) })
    }

    fn inner(&self) -> Result<Rc<Inner<E>>, PeerError> {
        self.inner.upgrade().ok_or_else(|| PeerError::Refused("node is stopping".into()))
    }
}

/// The group that a frame speaks to, if exactly that replica is here.
fn group_of<E: Env>(inner: &Inner<E>, frame: &Frame) -> Result<Group<E>, PeerError> {
    let group = if frame.family == FamilyId::CLUSTER {
        inner.cluster.group().cloned()
    } else {
        inner.families.borrow().get(&frame.family).map(|family| family.group().clone())
    };
    group.filter(|group| group.replica().id() == frame.to).ok_or(PeerError::ReplicaNotHere)
}

fn refused(error: impl std::fmt::Display) -> PeerError {
    PeerError::Refused(error.to_string())
}

fn message(message: &impl Message) -> Answer {
    Ok((message.encode_to_vec().into(), Vec::new()))
}

impl<E: Env> Handler for Server<E> {
    fn known(&self, node: NodeId) -> Vec<Pool> {
        self.inner.upgrade().map_or_else(Vec::new, |inner| admission::known_of(&inner, node))
    }

    fn admit(&self, peer: &Identity, asked_with: Option<&[Pool]>) -> Result<(), Refusal> {
        let inner = self.inner.upgrade().ok_or_else(|| "node is stopping".to_owned())?;
        admission::admit(&inner, peer, asked_with)
    }

    fn lost(&self, reason: &str) {
        if let Some(inner) = self.inner.upgrade() {
            admission::refused(&inner, reason);
        }
    }

    fn call(self: Rc<Self>, peer: Identity, frame: Frame) -> LocalBoxFuture<'static, Answer> {
        Box::pin(async move { dispatch(self.inner()?, peer, frame).await })
    }

    fn stream(
        self: Rc<Self>,
        first: &Frame,
        frames: mpsc::Receiver<Frame>,
        reply: Box<dyn Fn(Bytes)>,
    ) -> LocalBoxFuture<'static, Result<(), PeerError>> {
        let group = self.inner().and_then(|inner| group_of(&inner, first));
        Box::pin(async move { follow(group?, frames, reply).await })
    }

    fn link_up(&self, _peer: &Identity) {}

    fn link_down(&self, node: NodeId) {
        if let Some(inner) = self.inner.upgrade() {
            quiesce::lost_node(&inner, node);
        }
    }
}

/// Step 5 of a write on a follower: entries of one leader, in order, into the log.
async fn follow<E: Env>(
    group: Group<E>,
    frames: mpsc::Receiver<Frame>,
    reply: Box<dyn Fn(Bytes)>,
) -> Result<(), PeerError> {
    let stop = Rc::new(std::cell::RefCell::new(None));
    let failed = stop.clone();
    let member = group.clone();
    let requests = futures_util::stream::unfold(frames, move |mut frames| {
        let (failed, member) = (failed.clone(), member.clone());
        async move {
            let frame = frames.recv().await?;
            match decode_request(&member, &frame) {
                Ok(request) => Some((request, frames)),
                Err(error) => {
                    *failed.borrow_mut() = Some(error);
                    None
                }
            }
        }
    });
    let mut answers = std::pin::pin!(group.raft().stream_append(requests));
    while let Some(answer) = answers.next().await {
        reply(codec::encode_append_reply(&answer.map_err(refused)?));
        // After the entry, which is a sign of life of the leader: before it, the first tick of a
        // woken member would campaign (hazard 14).
        group.wake();
    }
    match stop.borrow_mut().take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn decode_request<E: Env>(
    group: &Group<E>,
    frame: &Frame,
) -> Result<AppendEntriesRequest<TypeConfig>, PeerError> {
    let request = codec::decode_append(&frame.body, &frame.payload).map_err(refused)?;
    accept_from(group, &request)?;
    Ok(request)
}

fn accept_from<E: Env>(
    group: &Group<E>,
    request: &AppendEntriesRequest<TypeConfig>,
) -> Result<(), PeerError> {
    let term = request.vote.leader_id.term;
    if !group.may_acknowledge(term) {
        return Err(PeerError::Refused(format!(
            "{} may have lost entries: it waits for a leader of a newer term than {term}",
            group.replica().id()
        )));
    }
    if let Some(commit) = request.leader_commit {
        group.note_commit(term, commit.index);
    }
    Ok(())
}

async fn dispatch<E: Env>(inner: Rc<Inner<E>>, peer: Identity, frame: Frame) -> Answer {
    let tag = frame.body.first().copied().and_then(Tag::from_byte);
    let tag = tag.ok_or_else(|| refused("unknown call: upgrade this node"))?;
    let body = frame.body.slice(1..);
    match tag {
        Tag::Vote | Tag::PreVote | Tag::Transfer | Tag::Append => {
            raft_call(&inner, tag, &frame, &body).await
        }
        Tag::Offer => {
            let group = group_of(&inner, &frame)?;
            let offer: OfferV1 = decode(body)?;
            let vote = resync::accept(inner, group, peer.node, &frame, offer).await?;
            Ok((codec::encode_vote_reply(&VoteResponse::new(vote, None, true)).into(), Vec::new()))
        }
        Tag::Difference => {
            let ask: DifferenceV1 = decode(body)?;
            let (page, payload) = encode_page(resync::page(&inner, ask).await?);
            Ok((page.encode_to_vec().into(), payload))
        }
        Tag::Block => block(&inner, &frame, decode(body)?).await,
        Tag::Operate => operate_call(&inner, &frame, decode(body)?).await,
        Tag::Attach => {
            let ask: AttachV1 = decode(body)?;
            message(&attach::attach_here(&inner, frame.family, ask).await)
        }
        Tag::Detach => {
            let ask: AttachmentV1 = decode(body)?;
            message(&attach::detach_here(&inner, frame.family, ask).await)
        }
        Tag::AttachmentAlive => {
            let ask: AttachmentV1 = decode(body)?;
            message(&FlagV1 { flag: attach::is_alive(&inner, ask.attachment) })
        }
        Tag::Propose => {
            let call: ClusterCallV1 = decode(body)?;
            let member = inner.cluster.member().ok_or(PeerError::ReplicaNotHere)?;
            message(&member.propose_here(call.bytes).await)
        }
        Tag::NodeReport => message(&report::own(&inner).await),
        Tag::MoveLeader => {
            let ask: MoveLeaderV1 = decode(body)?;
            message(&attach::move_leader_here(&inner, frame.family, NodeId(ask.node)).await)
        }
        Tag::InstallLeases => {
            message(&leases::install_here(&inner, frame.family, decode(body)?).await)
        }
        Tag::Content => message(&leases::content_here(&inner, frame.family, decode(body)?).await),
        Tag::TakeLead => message(&attach::take_lead_here(&inner, frame.family).await),
        Tag::Sleep => {
            let ask: SleepV1 = decode(body)?;
            message(&FlagV1 { flag: group_of(&inner, &frame)?.sleep_under(ask.term, ask.last) })
        }
        Tag::Entry => {
            let group = group_of(&inner, &frame)?;
            let payload = mend::entry_payload(&group, decode(body)?).await;
            Ok((Bytes::new(), payload.into_iter().collect()))
        }
        Tag::Room => {
            let word: RoomV1 = decode(body)?;
            inner.room.note(peer.node, word, inner.env.now());
            Ok((Bytes::new(), Vec::new()))
        }
    }
}

async fn raft_call<E: Env>(inner: &Inner<E>, tag: Tag, frame: &Frame, body: &[u8]) -> Answer {
    let group = group_of(inner, frame)?;
    let answer = match tag {
        Tag::Vote | Tag::PreVote => {
            let request = codec::decode_vote(body).map_err(refused)?;
            if !group.may_vote(request.leadership_transfer) {
                return Err(refused("this replica does not vote yet"));
            }
            let reply = match tag {
                Tag::Vote => group.raft().vote(request).await,
                _ => group.raft().pre_vote(request).await,
            };
            group.wake();
            codec::encode_vote_reply(&reply.map_err(refused)?).into()
        }
        Tag::Transfer => {
            let request = codec::decode_transfer(body).map_err(refused)?;
            let is_next = request.to_node_id() == &group.replica().id().0;
            // The library would have it campaign, whatever forbids its elections: what it may have
            // lost, and a vote of it, would be missing (hazard F6).
            if is_next && group.replica().health() != Health::Good {
                return Err(refused("this replica may have lost entries: it does not lead"));
            }
            let taken = group.raft().handle_transfer_leader(request).await.map_err(refused)?;
            taken.map_err(refused)?;
            if is_next {
                // A leader that sleeps sends no heartbeats: the others would replace it.
                group.wake();
            }
            Bytes::new()
        }
        _ => {
            let request = codec::decode_append(body, &frame.payload).map_err(refused)?;
            accept_from(&group, &request)?;
            let previous = request.prev_log_id;
            let last = request.entries.last().map(|entry| entry.log_id).or(previous);
            let reply = group.raft().append_entries(request).await.map_err(refused)?;
            group.wake();
            codec::encode_append_reply(&reply.into_stream_result(previous, last))
        }
    };
    Ok((answer, Vec::new()))
}

async fn block<E: Env>(inner: &Inner<E>, frame: &Frame, ask: BlockV1) -> Answer {
    let group = group_of(inner, frame)?;
    let wanted = DamagedBlock {
        branch: ballast_block::BranchId(ask.branch),
        block: ask.block,
        sequence: ballast_block::Sequence(ask.sequence),
        crc: ask.crc,
    };
    let payload = group.replica().read_record(wanted).await.map_err(refused)?;
    Ok((Bytes::new(), payload.into_iter().collect()))
}

async fn operate_call<E: Env>(inner: &Inner<E>, frame: &Frame, ask: OperateV1) -> Answer {
    let (origin, operation) = operate::decode(&ask, &frame.payload)?;
    let family = inner.families.borrow().get(&frame.family).cloned();
    let result = match family {
        Some(family) => family.execute(origin, operation).await,
        None => Err(ballast_volume::family::ExecuteError::Stopped),
    };
    let (reply, payload) = operate::encode_reply(result);
    Ok((reply.encode_to_vec().into(), payload))
}
