//! Mends what recovery or a read found damaged on this node's pool, from the peers.
//!
//! Retained log entries whose payload is damaged get it back by log id (hazard 20). Where nobody has
//! it any more, a leader gives its log up to there, and who lacks it gets the difference; if it is
//! not applied either, the leader steps aside. A suspect replica asks its leader to hand over,
//! because only a leader of a newer term may bring it up (hazard F6). What can't be mended yet is
//! tried again in the next round.

use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use ballast_block::{FamilyId, NodeId, ReplicaId};
use ballast_cluster::{Command, Reply};
use ballast_env::Env;
use ballast_raft_store::entry::{Body, WriteData};
use ballast_raft_store::replica::Health;
use ballast_raft_store::types::{EntryPayload, LogId, log_id, term_of};
use ballast_volume::group::Group;
use bytes::Bytes;
use openraft::storage::RaftLogReader;

use crate::attach::{self, others};
use crate::calls::{EntryV1, MoveLeaderV1, Tag};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};
use crate::resync;

const ROUND: Duration = Duration::from_secs(2);
const FETCH_MAX: Duration = Duration::from_secs(5);

/// Entries fetched in one round of one replica: bounds what a badly damaged log asks of its peers.
const ENTRIES_PER_ROUND: usize = 64;

pub(crate) async fn run<E: Env>(node: Weak<Inner<E>>) {
    let mut held_up = BTreeMap::new();
    loop {
        let Some(inner) = node.upgrade() else { return };
        let env = inner.env.clone();
        resync::drop_stale(&inner);
        let groups = inner.groups();
        for group in groups {
            mend_entries(&inner, &group, &mut held_up).await;
            match beyond_mending(&group) {
                Some(why) => replace(&inner, &group, why).await,
                None => ask_for_newer_term(&inner, &group).await,
            }
        }
        drop(inner);
        env.sleep(ROUND).await;
    }
}

/// `held_up` has what could not be mended in the last round, by replica, of entries not applied.
async fn mend_entries<E: Env>(
    inner: &Rc<Inner<E>>,
    group: &Group<E>,
    held_up: &mut BTreeMap<ReplicaId, LogId>,
) {
    let replica = group.replica();
    let (mut applied, mut ahead) = (None, None);
    let damaged = replica.damaged_entries();
    if damaged.is_empty() {
        group.set_unsendable(0);
    }
    for id in damaged.into_iter().take(ENTRIES_PER_ROUND) {
        let Some(payload) = fetch(inner, group, id).await else {
            match replica.applied() >= Some(id) {
                true => applied = Some(id),
                false => ahead = ahead.or(Some(id)),
            }
            continue;
        };
        match replica.repair_entry(id, payload).await {
            Ok(()) => tracing::warn!(replica = %replica.id(), %id, "damaged log entry repaired"),
            Err(error) => {
                tracing::error!(replica = %replica.id(), %id, %error, "log entry not repaired");
            }
        }
    }
    if let Some(id) = applied {
        give_up(inner, group, id).await;
    }
    let before = held_up.remove(&replica.id());
    if let Some(id) = ahead {
        held_up.insert(replica.id(), id);
        if before == ahead {
            step_aside(group, id).await;
        }
    }
}

/// Gives up the log up to a damaged entry that is applied and that no peer has in its own log any
/// more, or none that is heard. A leader can't send it, nor anything behind it to a member of which
/// it does not know that it has it: that member could never acknowledge again. It gets the
/// difference, whose blocks are had from any replica's map.
async fn give_up<E: Env>(inner: &Inner<E>, group: &Group<E>, id: LogId) {
    let replica = group.replica();
    if group.leading_term().is_none() {
        return;
    }
    let is_covered = replica.checkpointed().is_some_and(|(covered, _)| covered >= id);
    if !is_covered && let Err(error) = inner.pool.checkpoint().await {
        tracing::warn!(replica = %replica.id(), %id, %error, "damaged log entry not given up");
        return;
    }
    group.set_unsendable(id.index);
    if group.purge_log(&inner.env, id).await {
        tracing::warn!(replica = %replica.id(), %id,
            "nobody has a damaged log entry: the log is given up to there");
    }
}

/// Gives up the lead because of a damaged entry that is not applied here and that nobody has in his
/// log, or nobody who is heard: it can't be sent, so nothing behind it is ever committed. It was
/// never acknowledged, or those who applied it can lead without this replica.
async fn step_aside<E: Env>(group: &Group<E>, id: LogId) {
    let Some(term) = group.leading_term() else { return };
    let replica = group.replica().id();
    match group.resign(id.index).await {
        Ok(()) => tracing::error!(%replica, term, %id,
            "leads with a log entry that is damaged and not applied: steps aside"),
        Err(error) => tracing::debug!(%replica, term, %error, "does not step aside"),
    }
}

async fn fetch<E: Env>(inner: &Inner<E>, group: &Group<E>, id: LogId) -> Option<Bytes> {
    let ask = EntryV1 { term: term_of(&id), index: id.index };
    for (node, to) in others(inner, group) {
        let plain = Frame::plain(Kind::Call, 0, Tag::Entry.message(&ask));
        let replica = group.replica();
        let frame = Frame { family: replica.family(), from: replica.id(), to, ..plain };
        match inner.links.call(node, Lane::Data, frame, FETCH_MAX).await {
            Ok(reply) if !reply.payload.is_empty() => return reply.payload.into_iter().next(),
            Ok(_) => {}
            Err(error) => tracing::debug!(%node, %error, "no copy of a damaged log entry"),
        }
    }
    None
}

/// The payload of exactly that entry, if this replica has it and it is a write.
pub(crate) async fn entry_payload<E: Env>(group: &Group<E>, ask: EntryV1) -> Option<Bytes> {
    let mut log = group.replica().log();
    let found = log.limited_get_log_entries(ask.index, ask.index + 1).await.ok()?;
    let entry = found.into_iter().find(|entry| entry.log_id == log_id(ask.term, ask.index))?;
    match entry.payload {
        EntryPayload::Normal(command) => match command.body {
            Body::Write { data: WriteData::Memory(payload), .. } => Some(payload),
            _ => None,
        },
        _ => None,
    }
}

/// Why no leader can bring this replica up any more, if so.
fn beyond_mending<E: Env>(group: &Group<E>) -> Option<&'static str> {
    let replica = group.replica();
    match replica.health() {
        Health::Suspect { vote_lost: true, .. } => Some("its vote may be lost"),
        _ if replica.map_lost() => Some("its extent map is lost"),
        _ => None,
    }
}

/// Asks the cluster group for a replica with a new id in the place of this one.
async fn replace<E: Env>(inner: &Rc<Inner<E>>, group: &Group<E>, why: &str) {
    let replica = group.replica().id();
    if let Some(term) = group.leading_term() {
        tracing::error!(%replica, term, why, "leads with a damaged replica: hands over");
        attach::pass_lead_on(inner, group).await;
        return;
    }
    if group.replica().family() == FamilyId::CLUSTER {
        tracing::error!(%replica, why, "the cluster group's replica takes no part any more: give \
            this pool up with `ballastctl pool replace`");
        return;
    }
    tracing::error!(%replica, why, "replica takes no part any more: asks for a new one");
    match inner.cluster.propose(&Command::ReplaceReplica { replica }).await {
        Ok(Reply::Refused(refusal)) => tracing::error!(%replica, %refusal, "not replaced"),
        Ok(_) => {}
        Err(error) => tracing::debug!(%replica, %error, "not replaced yet"),
    }
}

async fn ask_for_newer_term<E: Env>(inner: &Rc<Inner<E>>, group: &Group<E>) {
    let replica = group.replica();
    let Health::Suspect { term, .. } = replica.health() else { return };
    let others = others(inner, group);
    for &(leader, _) in &others {
        let Some(&(heir, _)) = others.iter().find(|&&(node, _)| node != leader) else { return };
        tracing::warn!(replica = %replica.id(), term, %heir, "suspect: asks for a newer leader");
        ask_to_hand_over(inner, replica.family(), leader, heir).await;
    }
}

async fn ask_to_hand_over<E: Env>(inner: &Inner<E>, family: FamilyId, to: NodeId, heir: NodeId) {
    let ask = MoveLeaderV1 { node: heir.0 };
    let plain = Frame::plain(Kind::Call, 0, Tag::MoveLeader.message(&ask));
    let frame = Frame { family, ..plain };
    if let Err(error) = inner.links.call(to, Lane::Control, frame, FETCH_MAX).await {
        tracing::debug!(%to, %error, "not asked to hand over");
    }
}
