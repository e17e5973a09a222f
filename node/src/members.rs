//! Keeps the members of each group that leads here what the cluster group says they should be.
//!
//! A replica whose pool was lost is replaced by one with a new id (hazard F5): that joins as a
//! learner, is brought up like any follower that is far behind, and becomes a voter in the same
//! change that takes the old one out. Where a group that is led elsewhere has other members than it
//! should have, its leader is asked whether it has heard of that: one that does not hear the cluster
//! group makes room. Never makes or drops a replica: `reconcile` does.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use ballast_block::{FamilyId, ReplicaId};
use ballast_cluster::{ReplicaState, VolumePhase};
use ballast_env::Env;
use ballast_raft_store::types::Member;
use ballast_volume::group::Group;
use openraft::async_runtime::WatchReceiver;

use crate::leases;
use crate::node::Inner;

const ROUND: Duration = Duration::from_secs(1);

/// Every so many rounds a member of a group that is not what it should be asks whether its leader has
/// heard of that.
const ASK_ROUNDS: u32 = 5;

/// Entries that a learner may be behind and still be made a voter: what is in flight under load.
pub(crate) const NEAR_ENTRIES: u64 = 256;

pub(crate) async fn run<E: Env>(node: Weak<Inner<E>>) {
    let mut unsettled = BTreeMap::new();
    loop {
        let Some(inner) = node.upgrade() else { return };
        let env = inner.env.clone();
        if inner.refused.borrow().is_none() {
            round(&inner, &mut unsettled).await;
        }
        drop(inner);
        env.sleep(ROUND).await;
    }
}

/// `unsettled` has for how many rounds in turn a group that is led elsewhere was not what it should be.
async fn round<E: Env>(inner: &Rc<Inner<E>>, unsettled: &mut BTreeMap<FamilyId, u32>) {
    if let Some(group) = inner.cluster.group() {
        settle(group, wanted_of_cluster(inner)).await;
    }
    let families: Vec<_> = inner.families.borrow().values().cloned().collect();
    let mut before = std::mem::take(unsettled);
    for family in families {
        let group = family.group();
        let Some(wanted) = wanted_of_family(inner, group) else { continue };
        if group.leading_term().is_some() {
            settle(group, wanted).await;
        } else if is_unsettled(group, &wanted) {
            let id = group.replica().family();
            let rounds = before.remove(&id).unwrap_or(0) + 1;
            unsettled.insert(id, rounds);
            if rounds.is_multiple_of(ASK_ROUNDS)
                && let Some(leader) = group.leader_node()
            {
                leases::ask_to_hear(inner, leader, id).await;
            }
        }
    }
}

/// The cluster group's members. A replacement counts once its pool was seen.
fn wanted_of_cluster<E: Env>(inner: &Inner<E>) -> BTreeMap<u64, Member> {
    let state = inner.cluster.state();
    let joined = state.nodes().filter(|node| node.member.is_some() && !node.replacing);
    let joined: BTreeMap<_, _> = joined.map(|node| (node.id, node.cluster_member())).collect();
    let founders = inner.config.founders.iter().map(|founder| {
        let own = ReplicaId(u64::from(founder.node.0));
        let member = joined.get(&founder.node).copied().unwrap_or(own);
        (member.0, Member { node: founder.node })
    });
    founders.collect()
}

fn wanted_of_family<E: Env>(inner: &Inner<E>, group: &Group<E>) -> Option<BTreeMap<u64, Member>> {
    let state = inner.cluster.state();
    let family = group.replica().family();
    let volume = state.volume_of_family(family)?;
    if volume.phase != VolumePhase::Ready {
        return None;
    }
    let all = state.replicas_of(family);
    // A replica that is still to be made can't be brought up yet.
    let made = |state| matches!(state, ReplicaState::Ready | ReplicaState::Lost);
    let wanted: BTreeMap<_, _> = all
        .filter(|replica| made(replica.state))
        .map(|replica| (replica.id.0, Member { node: replica.node }))
        .collect();
    (wanted.len() == volume.replicas.len()).then_some(wanted)
}

/// The members of a group as its leader has them.
struct Members {
    voters: BTreeSet<u64>,
    known: BTreeMap<u64, Member>,
    /// Those that have nearly everything.
    near: BTreeSet<u64>,
    /// A change was begun and not ended.
    is_joint: bool,
}

fn members_of<E: Env>(group: &Group<E>) -> Members {
    let metrics = group.raft().metrics();
    let metrics = metrics.borrow_watched();
    let membership = metrics.membership_config.membership();
    let last = metrics.last_log_index.unwrap_or(0);
    let matched = metrics.replication.iter().flatten();
    let near = matched.filter(|(_, id)| id.is_some_and(|id| id.index + NEAR_ENTRIES >= last));
    Members {
        voters: membership.voter_ids().collect(),
        known: membership.nodes().map(|(&id, &member)| (id, member)).collect(),
        near: near.map(|(&id, _)| id).collect(),
        is_joint: membership.get_joint_config().len() > 1,
    }
}

/// Whether a group is not, or not yet, what this node has heard that it should be.
fn is_unsettled<E: Env>(group: &Group<E>, wanted: &BTreeMap<u64, Member>) -> bool {
    let Members { voters, known, .. } = members_of(group);
    !is_outdated(wanted, &known) && !voters.iter().eq(wanted.keys())
}

/// A node's ids only rise: whether the group knows a newer one, so that this node's view of the
/// cluster is old.
fn is_outdated(wanted: &BTreeMap<u64, Member>, known: &BTreeMap<u64, Member>) -> bool {
    wanted
        .iter()
        .any(|(id, old)| known.iter().any(|(other, member)| member.node == old.node && other > id))
}

/// One step towards `wanted`, if this node leads the group and it is not there yet.
async fn settle<E: Env>(group: &Group<E>, wanted: BTreeMap<u64, Member>) {
    if group.leading_term().is_none() {
        return;
    }
    let Members { voters, known, near, is_joint } = members_of(group);
    if !is_joint && voters.iter().eq(wanted.keys()) {
        return;
    }
    if is_outdated(&wanted, &known) {
        return;
    }
    // It may sleep; a change of members is something to be awake for.
    if group.pass().await.is_err() {
        return;
    }
    let family = group.replica().family();
    if let Some((&next, &member)) = wanted.iter().find(|(id, _)| !known.contains_key(id)) {
        tracing::warn!(%family, replica = next, "a replacement joins as a learner");
        if let Err(error) = group.raft().add_learner(next, member, false).await {
            tracing::warn!(%family, replica = next, %error, "learner not added");
        }
        return;
    }
    // Until its replacement has nearly everything, the lost one stays: it counts for nothing but
    // the size of a majority.
    let before = |node| known.iter().find(|(id, old)| voters.contains(id) && old.node == node);
    let target: BTreeSet<u64> = wanted
        .iter()
        .filter_map(|(id, member)| match voters.contains(id) || near.contains(id) {
            true => Some(*id),
            false => before(member.node).map(|(&id, _)| id),
        })
        .collect();
    if target == voters && !is_joint {
        return;
    }
    match group.raft().change_membership(target.clone(), false).await {
        Ok(_) => {
            tracing::warn!(%family, before = ?voters, after = ?target, "lost replicas are replaced")
        }
        Err(error) => tracing::warn!(%family, %error, "members not changed"),
    }
}
