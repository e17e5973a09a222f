//! Attachments: who may write a volume, and moving its leader to who serves the writer.
//!
//! An attachment is a committed entry before its first I/O (guarantee **fenced**). Under a lease it
//! takes the place of the one that the holder had; without one the leader lets it take over only from
//! one whose serving node is gone or does not know it any more. What the old one still sends is
//! refused at apply, on every replica.

use std::rc::Rc;
use std::time::Duration;

use ballast_block::{AttachmentId, Epoch, FamilyId, NodeId, ReplicaId};
use ballast_env::Env;
use ballast_volume::command::{self, FamilyCommand, Writer, refusal};
use ballast_volume::family::{ExecuteError, Family};
use ballast_volume::group::Group;
use openraft::async_runtime::WatchReceiver;

use crate::calls::{
    AttachReplyV1, AttachV1, AttachmentV1, FlagV1, MoveLeaderV1, MovedV1, Tag, decode,
};
use crate::leases;
use crate::members::NEAR_ENTRIES;
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// How long the leader waits for the node of another attachment to speak for it. Its silence is
/// safe: taking over fences it.
const ALIVE_MAX: Duration = Duration::from_millis(1500);

/// Entries that a follower may be behind and still be handed the lead: a few round trips.
const IN_SYNC_ENTRIES: u64 = 64;

/// Attached, detached or moved.
pub const DONE: u32 = 0;
/// Another node leads.
pub const NOT_LEADER: u32 = 1;
/// The family does not run on the node asked.
pub const STOPPED: u32 = 2;
/// Another attachment holds the volume and is alive.
pub const HELD: u32 = 3;
/// The lease that it names is not in force, or does not let its holder write.
pub const NOT_LEASED: u32 = 4;
/// The volume is leased, and it names no lease.
pub const LEASED: u32 = 5;

/// Whether a client of this node holds that attachment.
pub(crate) fn is_alive<E: Env>(inner: &Inner<E>, attachment: u64) -> bool {
    inner.attachments.borrow().contains_key(&AttachmentId(attachment))
}

fn failed(error: &ExecuteError) -> AttachReplyV1 {
    match error {
        ExecuteError::NotLeader { hint } => AttachReplyV1 {
            code: NOT_LEADER,
            node: hint.map_or(0, |node| node.0),
            ..AttachReplyV1::default()
        },
        _ => AttachReplyV1 { code: STOPPED, ..AttachReplyV1::default() },
    }
}

fn family_here<E: Env>(inner: &Inner<E>, family: FamilyId) -> Result<Family<E>, AttachReplyV1> {
    let family = inner.families.borrow().get(&family).cloned();
    family.ok_or(AttachReplyV1 { code: STOPPED, ..AttachReplyV1::default() })
}

/// Makes an attachment a writer, if this node leads and nobody else may go on.
///
/// Under a lease the holder's word counts: the attachment that it had before is torn. Without one
/// the node of another attachment is asked whether that is alive.
pub(crate) async fn attach_here<E: Env>(
    inner: &Rc<Inner<E>>,
    family: FamilyId,
    ask: AttachV1,
) -> AttachReplyV1 {
    let family = match family_here(inner, family) {
        Ok(family) => family,
        Err(reply) => return reply,
    };
    match admit(inner, &family, ask).await {
        Ok(reply) => {
            if reply.code == DONE && ask.follow {
                follow(inner, &family, NodeId(ask.node)).await;
            }
            reply
        }
        Err(error) => failed(&error),
    }
}

async fn admit<E: Env>(
    inner: &Rc<Inner<E>>,
    family: &Family<E>,
    ask: AttachV1,
) -> Result<AttachReplyV1, ExecuteError> {
    let refused = |code, node| Ok(AttachReplyV1 { code, node, ..AttachReplyV1::default() });
    let AttachV1 { attachment, node, epoch, .. } = ask;
    loop {
        family.group().pass().await?;
        if epoch != 0 && !leases::is_in_force(inner, family, Epoch(epoch)).await? {
            return refused(NOT_LEASED, 0);
        }
        let (writer, generation, size) = {
            let state = family.state();
            (state.writer(), state.generation(), state.size())
        };
        if ask.reads_only {
            return Ok(AttachReplyV1 { code: DONE, node, generation: generation.0, size });
        }
        if let Some(writer) = writer
            && writer.attachment.0 != attachment
            && epoch == 0
            && speaks_for(inner, writer).await
        {
            return refused(HELD, writer.node.0);
        }
        let seen_generation = generation.0;
        let command = command::AttachV1 { attachment, node, seen_generation, epoch };
        let reply = family.control(FamilyCommand::Attach(command)).await?;
        match reply.why {
            0 => {
                let (generation, size) = (reply.generation, reply.size);
                return Ok(AttachReplyV1 { code: DONE, node, generation, size });
            }
            refusal::NOT_LEASED => return refused(NOT_LEASED, 0),
            refusal::LEASED => return refused(LEASED, 0),
            // Another one came between: look again.
            _ => {}
        }
    }
}

async fn speaks_for<E: Env>(inner: &Inner<E>, writer: Writer) -> bool {
    if writer.node == inner.config.node {
        return is_alive(inner, writer.attachment.0);
    }
    let ask = AttachmentV1 { attachment: writer.attachment.0, generation: writer.generation.0 };
    let frame = Frame::plain(Kind::Call, 0, Tag::AttachmentAlive.message(&ask));
    let answer = inner.links.call(writer.node, Lane::Control, frame, ALIVE_MAX).await;
    let answer = answer.and_then(|reply| decode::<FlagV1>(reply.body));
    answer.is_ok_and(|word| word.flag)
}

/// Ends an attachment, if this node leads.
pub(crate) async fn detach_here<E: Env>(
    inner: &Inner<E>,
    family: FamilyId,
    ask: AttachmentV1,
) -> AttachReplyV1 {
    let family = match family_here(inner, family) {
        Ok(family) => family,
        Err(reply) => return reply,
    };
    let (attachment, generation) = (ask.attachment, ask.generation);
    let command = command::DetachV1 { attachment, generation };
    match family.control(FamilyCommand::Detach(command)).await {
        Ok(_) => AttachReplyV1::default(),
        Err(error) => failed(&error),
    }
}

/// Hands the lead to the node that serves the writer, if it has a replica in sync. Best effort.
async fn follow<E: Env>(inner: &Inner<E>, family: &Family<E>, node: NodeId) {
    if inner.config.leader_follows_writer && node != inner.config.node {
        let _ = hand_over(family.group(), node, IN_SYNC_ENTRIES).await;
    }
}

/// Hands the lead to another member that is connected and near, also under load, and answers to whom.
/// The next one by replica id comes first: where that is no better off, it comes to each in turn.
pub(crate) async fn pass_lead_on<E: Env>(inner: &Inner<E>, group: &Group<E>) -> Option<NodeId> {
    group.leading_term()?;
    let own = group.replica().id();
    let mut heirs = others(inner, group);
    let behind = heirs.partition_point(|(_, id)| *id < own);
    heirs.rotate_left(behind);
    for (node, _) in heirs {
        let is_there = inner.links.connection(node, Lane::Control).is_ok();
        if is_there && hand_over(group, node, NEAR_ENTRIES).await.is_ok() {
            return Some(node);
        }
    }
    None
}

/// The members of a group on other nodes, by replica id.
pub(crate) fn others<E: Env>(inner: &Inner<E>, group: &Group<E>) -> Vec<(NodeId, ReplicaId)> {
    let metrics = group.raft().server_metrics();
    let metrics = metrics.borrow_watched();
    let nodes = metrics.membership_config.membership().nodes();
    let own = inner.config.node;
    let others = nodes.filter(|(_, member)| member.node != own);
    others.map(|(&id, member)| (member.node, ReplicaId(id))).collect()
}

async fn hand_over<E: Env>(group: &Group<E>, node: NodeId, lag_max: u64) -> Result<(), String> {
    let (target, lag) = in_sync_on(group, node)?;
    if lag > lag_max {
        return Err(format!(
            "the replica on {node} is {lag} entries behind; wait until it is in sync"
        ));
    }
    group.transfer(target).await.map_err(|error| error.to_string())
}

fn in_sync_on<E: Env>(group: &Group<E>, node: NodeId) -> Result<(ReplicaId, u64), String> {
    let metrics = group.raft().metrics();
    let metrics = metrics.borrow_watched();
    let membership = metrics.membership_config.membership();
    let voters: std::collections::BTreeSet<u64> = membership.voter_ids().collect();
    // A node whose pool was replaced may have two for a moment: the new one has the higher id.
    let (&target, _) = membership
        .nodes()
        .filter(|(id, member)| member.node == node && voters.contains(id))
        .last()
        .ok_or_else(|| format!("the volume has no replica on {node}"))?;
    let last = metrics.last_log_index.unwrap_or(0);
    let replication = metrics.replication.as_ref().ok_or("this node does not lead the volume")?;
    let matched = replication.get(&target).copied().flatten().map_or(0, |id| id.index);
    Ok((ReplicaId(target), last.saturating_sub(matched)))
}

/// Takes the lead of a family from a leader that another node can't reach and this one can. Best
/// effort, as every move of a leader: who asked looks where it went.
pub(crate) async fn take_lead_here<E: Env>(inner: &Inner<E>, family: FamilyId) -> MovedV1 {
    let stopped = MovedV1 { code: STOPPED, ..MovedV1::default() };
    let Ok(member) = family_here(inner, family) else { return stopped };
    let own = inner.config.node;
    let Some(leader) = member.group().leader_node().filter(|&leader| leader != own) else {
        return MovedV1 { code: NOT_LEADER, ..MovedV1::default() };
    };
    let plain = Frame::plain(Kind::Call, 0, Tag::MoveLeader.message(&MoveLeaderV1 { node: own.0 }));
    let reply = inner.links.call(leader, Lane::Control, Frame { family, ..plain }, ALIVE_MAX).await;
    reply.and_then(|reply| decode(reply.body)).unwrap_or(stopped)
}

/// Hands the lead of a group to `node`, if this node leads it now.
pub(crate) async fn move_leader_here<E: Env>(
    inner: &Inner<E>,
    family: FamilyId,
    node: NodeId,
) -> MovedV1 {
    let moved = |code, node: Option<NodeId>, reason: String| MovedV1 {
        code,
        node: node.map_or(0, |node| node.0),
        reason,
    };
    let group = match family {
        FamilyId::CLUSTER => inner.cluster.group().cloned(),
        _ => inner.families.borrow().get(&family).map(|family| family.group().clone()),
    };
    let Some(group) = group else { return moved(STOPPED, None, String::new()) };
    if group.leading_term().is_none() {
        return moved(NOT_LEADER, group.leader_node(), String::new());
    }
    if node == inner.config.node {
        return moved(DONE, Some(node), String::new());
    }
    match hand_over(&group, node, IN_SYNC_ENTRIES).await {
        Ok(()) => moved(DONE, Some(node), String::new()),
        Err(reason) => moved(HELD, None, reason),
    }
}
