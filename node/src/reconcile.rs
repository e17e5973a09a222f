//! Makes this node what the cluster group says it should be, again and again.
//!
//! Each step is idempotent and looks at what is there: a crash between any two is made good by the
//! next round. A replica is made only while the cluster knows it as "creating", so a pool that
//! lost one never makes it anew under the same id (hazard F5).

use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use ballast_block::{NodeId, PoolId, ReplicaId, ShardId};
use ballast_cluster::{
    ClusterState, Command, NodeBooted, PoolSpace, Refusal, RegisterNode, Replica, ReplicaState,
    Reply, Volume, VolumePhase,
};
use ballast_env::Env;
use ballast_raft_store::types::Member;
use ballast_volume::family::Family;
use ballast_volume::state::FoundingV1;

use crate::admission;
use crate::cluster_group::cluster_replica;
use crate::leases;
use crate::node::Inner;

/// How long a round waits for a change of the cluster's state before it looks anyway.
const ROUND_MAX: Duration = Duration::from_secs(1);
const RETRY_PAUSE: Duration = Duration::from_millis(100);

pub(crate) async fn run<E: Env>(node: Weak<Inner<E>>) {
    let Some(inner) = node.upgrade() else { return };
    start_existing(&inner).await;
    form_cluster(&inner).await;
    let mut changes = inner.cluster.changes();
    drop(inner);
    loop {
        let Some(inner) = node.upgrade() else { return };
        let env = inner.env.clone();
        changes.seen();
        if inner.refused.borrow().is_some() {
            return;
        }
        if !inner.announced.get() {
            announce(&inner).await;
        }
        if inner.announced.get() {
            round(&inner).await;
        }
        drop(inner);
        tokio::select! {
            biased;
            going_on = changes.next() => if !going_on {
                // Shard 0 has ended: nobody knows what this one should be any more.
                let Some(inner) = node.upgrade() else { return };
                return admission::refused(&inner, "shard 0 of this node takes no part any more");
            },
            () = env.sleep(ROUND_MAX) => {}
        }
    }
}

/// What is on the pool runs at once: it needs no quorum of the cluster group to serve. But a family
/// with one replica has no peer that would stop a pool which went back in time: it waits until the
/// cluster has accepted the pool.
async fn start_existing<E: Env>(inner: &Rc<Inner<E>>) {
    let known = inner.cluster.state().pool(inner.pool.id()).map(|pool| pool.shard);
    if known != Some(inner.shard()) {
        // It is new, or configured for another shard than it was; the cluster will say.
        return;
    }
    for replica in inner.pool.replicas() {
        let family = replica.family();
        if family == ballast_block::FamilyId::CLUSTER {
            continue;
        }
        // A member joins in only once its creation was confirmed; that may not be known here yet.
        let (known, alone) = {
            let state = inner.cluster.state();
            let known = state.replica(replica.id()).map(|replica| replica.state);
            (known, state.replicas_of(family).count() < 2)
        };
        if known == Some(ReplicaState::Ready) && !alone {
            inner.start_family(replica).await;
        }
    }
}

async fn form_cluster<E: Env>(inner: &Rc<Inner<E>>) {
    let Some(cluster) = inner.cluster.member() else { return };
    let lowest = inner.config.founders.iter().map(|founder| founder.node).min();
    let own = cluster.group().replica().id();
    // A replacement joins the group that there is.
    if lowest == Some(inner.config.node) && own == cluster_replica(inner.config.node) {
        let _ = cluster.form().await;
    }
}

/// Tells the cluster that this node is there, with this start of its pool.
async fn announce<E: Env>(inner: &Rc<Inner<E>>) {
    let Some(own) = inner.config.own() else { return };
    let register = Command::RegisterNode(RegisterNode {
        node: own.node,
        name: own.name.clone(),
        peer_address: own.peer_address.to_string(),
        labels: BTreeMap::new(),
    });
    let identity = inner.links.identity();
    let known = inner.cluster.state().pool(identity.pool).map(|pool| pool.shard);
    if let Some(known) = known.filter(|&known| known != identity.shard) {
        // The cluster would say the same, in words only: told here, it is a refusal for ever.
        let (pool, reported) = (identity.pool, identity.shard);
        let refusal = Refusal::PoolShardDiffers { pool, known, reported };
        return admission::refused(inner, &refusal.to_string());
    }
    for command in [register, booted(inner)] {
        match inner.cluster.propose(&command).await {
            Ok(Reply::Done) => {}
            Ok(Reply::PoolOlder { known }) => {
                // This process lives: said again, it is no late report of an earlier one.
                tracing::error!(
                    ?known,
                    boot = identity.boot,
                    "the cluster knows a later start of this pool"
                );
                inner.told.set(Some(known));
                return inner.env.sleep(RETRY_PAUSE).await;
            }
            Ok(Reply::PoolRolledBack { pool, known, reported, .. }) => {
                let reason = format!(
                    "pool {pool} was accepted with start {known} and says {reported} now: it has \
                     been rolled back; replace it: `ballastctl pool replace`"
                );
                return admission::refused(inner, &reason);
            }
            Ok(reply) => {
                tracing::error!(?reply, "the cluster does not take this node");
                return inner.env.sleep(ROUND_MAX).await;
            }
            Err(error) => {
                tracing::debug!(%error, "can't announce this node yet");
                return inner.env.sleep(RETRY_PAUSE).await;
            }
        }
    }
    // Older states may name replicas of a pool that this one replaced; made here, they would be
    // voters that have forgotten everything (hazard F5).
    if !knows_this_start(inner) {
        tracing::debug!("accepted, but not known here yet");
        return inner.env.sleep(RETRY_PAUSE).await;
    }
    if let Err(error) = inner.pool.settle_lineage().await {
        tracing::error!(%error, "the cluster's word on this start can't be kept");
        return;
    }
    inner.announced.set(true);
    tracing::info!(node = %own.node, "node is part of the cluster");
}

/// The report of this start.
fn booted<E: Env>(inner: &Inner<E>) -> Command {
    let identity = inner.links.identity();
    Command::NodeBooted(NodeBooted {
        node: identity.node,
        pool: identity.pool,
        boot_counter: identity.boot,
        incarnation: identity.incarnation,
        space: space(inner),
        settled: identity.marks.settled,
        settled_boot: identity.marks.settled_boot,
        offered: identity.marks.offered,
        member: Some(identity.member).filter(|&member| member != ReplicaId(0)),
        shard: identity.shard,
        told: inner.told.get(),
    })
}

/// Whether the state here has this start of the pool, and so all that was decided before it.
fn knows_this_start<E: Env>(inner: &Inner<E>) -> bool {
    let own = inner.links.identity();
    knows(&inner.cluster.state(), own.pool, (own.boot, own.incarnation))
}

/// `start`: its boot counter and its incarnation.
fn knows(state: &ClusterState, pool: PoolId, start: (u64, u64)) -> bool {
    state.pool(pool).is_some_and(|known| (known.boot_counter, known.incarnation) == start)
}

fn space<E: Env>(inner: &Inner<E>) -> PoolSpace {
    let space = inner.pool.space();
    PoolSpace { capacity_bytes: space.total, used_bytes: space.used }
}

async fn round<E: Env>(inner: &Rc<Inner<E>>) {
    let own = {
        let (node, shard) = (inner.config.node, inner.shard());
        own_replicas(&inner.cluster.state(), node, shard, inner.pool.id())
    };
    for (replica, volume) in own {
        match (replica.state, volume) {
            (ReplicaState::Creating, Some(volume)) => create(inner, &replica, &volume).await,
            (ReplicaState::Ready, Some(volume)) => keep(inner, &replica, &volume).await,
            (ReplicaState::Removing, _) => remove(inner, &replica).await,
            (ReplicaState::Lost, _) => stop_lost(inner, &replica).await,
            _ => {}
        }
    }
    report_pool(inner).await;
}

/// What the state wants on this pool. What it has on others of this shard is not ours to make: they
/// were here before this one.
fn own_replicas(
    state: &ClusterState,
    node: NodeId,
    shard: ShardId,
    pool: PoolId,
) -> Vec<(Replica, Option<Volume>)> {
    let on_shard = state.replicas_on_shard(node, shard);
    let own = on_shard.filter(|replica| replica.pool == pool).cloned();
    own.map(|replica| {
        let volume = state.volume_of_family(replica.family).cloned();
        (replica, volume)
    })
    .collect()
}

async fn report_pool<E: Env>(inner: &Rc<Inner<E>>) {
    let now = space(inner);
    let pool = inner.links.identity().pool;
    let worth = {
        let state = inner.cluster.state();
        state.pool(pool).filter(|known| known.space.worth_reporting(&now)).map(|known| known.state)
    };
    if let Some(state) = worth {
        let _ = inner.cluster.propose(&Command::ReportPool { pool, space: now, state }).await;
    }
}

async fn create<E: Env>(inner: &Rc<Inner<E>>, replica: &Replica, volume: &Volume) {
    // The one that this one replaces has forgotten something, and the cluster has given it up.
    for old in inner.pool.replicas() {
        if old.family() == replica.family
            && old.id() < replica.id
            && let Err(reason) = inner.remove_replica(replica.family, old.id()).await
        {
            tracing::error!(replica = %old.id(), reason, "replica can't be removed");
            return;
        }
    }
    let founding = FoundingV1 { name: volume.name.clone(), size: volume.founded_bytes };
    match inner.make_replica(replica.id, replica.family, volume.id, founding).await {
        Ok(()) => {
            let _ = inner.cluster.propose(&Command::ReplicaReady { replica: replica.id }).await;
        }
        Err(reason) => tracing::error!(replica = %replica.id, reason, "replica can't be made"),
    }
}

async fn keep<E: Env>(inner: &Rc<Inner<E>>, replica: &Replica, volume: &Volume) {
    let running = inner.families.borrow().contains_key(&replica.family);
    if !running {
        match inner.pool.replica(replica.id) {
            Some(stored) => inner.start_family(stored).await,
            None => {
                tracing::error!(replica = %replica.id, volume = volume.name,
                    "replica is missing on this node's pool: it is lost, never made anew");
                return;
            }
        }
    }
    if volume.phase == VolumePhase::Creating {
        form(inner, replica, volume).await;
    }
    bring_up(inner, volume).await;
}

/// Forms the family's Raft group, once all its replicas are there; done by the lowest of them.
async fn form<E: Env>(inner: &Rc<Inner<E>>, own: &Replica, volume: &Volume) {
    let members: BTreeMap<u64, Member> = {
        let state = inner.cluster.state();
        let mut all = state.replicas_of(volume.family);
        if !all.all(|replica| replica.state == ReplicaState::Ready) {
            return;
        }
        let all = state.replicas_of(volume.family);
        all.map(|replica| (replica.id.0, Member { node: replica.node })).collect()
    };
    if members.keys().next() != Some(&own.id.0) {
        return;
    }
    let family = inner.families.borrow().get(&volume.family).cloned();
    let Some(family) = family else { return };
    if family.group().initialize(members).await.is_ok() {
        let formed = Command::FamilyFormed { family: volume.family };
        let _ = inner.cluster.propose(&formed).await;
    }
}

/// The family's own log decides on the size that writes are checked against, and under which leases
/// they are taken.
async fn bring_up<E: Env>(inner: &Rc<Inner<E>>, volume: &Volume) {
    let family = inner.families.borrow().get(&volume.family).cloned();
    let leads = |family: &Family<E>| family.group().leading_term().is_some();
    let Some(family) = family.filter(leads) else { return };
    if let Err(error) = leases::bring_up(inner, &family).await {
        tracing::debug!(volume = volume.name, %error, "can't take size and leases over yet");
    }
}

/// A lost replica must not vote or acknowledge any more; its data stays, for people to look at.
async fn stop_lost<E: Env>(inner: &Rc<Inner<E>>, replica: &Replica) {
    let member = inner.families.borrow_mut().remove(&replica.family);
    if let Some(member) = member {
        tracing::error!(replica = %replica.id, "the cluster calls this replica lost: stopped");
        member.stop().await;
    }
}

async fn remove<E: Env>(inner: &Rc<Inner<E>>, replica: &Replica) {
    match inner.remove_replica(replica.family, replica.id).await {
        Ok(()) => {
            let _ = inner.cluster.propose(&Command::ReplicaRemoved { replica: replica.id }).await;
        }
        Err(reason) => tracing::error!(replica = %replica.id, reason, "replica can't be removed"),
    }
}

#[cfg(test)]
mod tests {
    use ballast_block::{ClusterId, VolumeId};
    use ballast_cluster::CreateVolume;

    use super::*;

    const NODE: NodeId = NodeId(1);

    fn pool(number: u8) -> PoolId {
        PoolId::from_bytes([number; 16])
    }

    /// A start of a node with a pool on shard 1: its boot counter and its incarnation.
    fn boots(state: &mut ClusterState, node: NodeId, number: u8, start: (u64, u64)) {
        let (boot_counter, incarnation) = start;
        let space = PoolSpace { capacity_bytes: 1 << 30, used_bytes: 0 };
        let booted = Command::NodeBooted(NodeBooted {
            node,
            pool: pool(number),
            shard: ShardId(1),
            boot_counter,
            incarnation,
            space,
            settled: 0,
            settled_boot: 0,
            offered: 0,
            member: None,
            told: None,
        });
        assert_eq!(state.apply(booted), Reply::Done);
    }

    /// Three nodes with a pool each, and a volume whose replicas are to be made there.
    fn older() -> ClusterState {
        let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
        for number in 1..=3 {
            let node = NodeId(number.into());
            let register = RegisterNode {
                node,
                name: format!("n{number}"),
                peer_address: format!("10.0.0.{number}:7100"),
                labels: BTreeMap::new(),
            };
            assert_eq!(state.apply(Command::RegisterNode(register)), Reply::Done);
            boots(&mut state, node, number, (1, 100));
        }
        let create = CreateVolume {
            volume: VolumeId::from_bytes([1; 16]),
            name: "first".to_owned(),
            size_bytes: 16 << 20,
            replicas: 3,
            created_at_ms: 0,
            preferred: Vec::new(),
            absent: Vec::new(),
        };
        state.apply(Command::CreateVolume(create));
        let wanted = own_replicas(&state, NODE, ShardId(1), pool(1));
        let creating = |(it, volume): &(Replica, Option<Volume>)| {
            it.state == ReplicaState::Creating && volume.is_some()
        };
        assert!(wanted.len() == 1 && wanted.iter().all(creating), "{wanted:?}");
        state
    }

    #[test]
    fn a_start_is_known_only_by_a_state_that_has_it() {
        let mut state = older();
        assert!(knows(&state, pool(1), (1, 100)));
        // A later start; another process with the same counter, as on a copy of the pool.
        for start in [(2, 101), (1, 101)] {
            assert!(!knows(&state, pool(1), start), "{start:?}");
        }
        boots(&mut state, NODE, 1, (2, 101));
        assert!(knows(&state, pool(1), (2, 101)) && !knows(&state, pool(1), (1, 100)));
    }

    #[test]
    fn a_state_from_before_a_pool_was_replaced_makes_no_replica_on_what_replaced_it() {
        let mut state = older();
        let before = own_replicas(&state, NODE, ShardId(1), pool(1))[0].0;
        assert!(!knows(&state, pool(9), (1, 200)));
        assert!(own_replicas(&state, NODE, ShardId(1), pool(9)).is_empty());
        let made: Vec<ReplicaId> = state.replicas_of(before.family).map(|it| it.id).collect();
        for replica in made {
            state.apply(Command::ReplicaReady { replica });
        }
        state.apply(Command::FamilyFormed { family: before.family });
        let replace = Command::ReplacePool { node: NODE, pool: pool(1), guarded: true };
        assert_eq!(state.apply(replace), Reply::GivenUp);
        boots(&mut state, NODE, 9, (1, 200));
        assert!(knows(&state, pool(9), (1, 200)));
        let wanted = own_replicas(&state, NODE, ShardId(1), pool(9));
        assert_eq!(wanted.len(), 1);
        assert_ne!(wanted[0].0.id, before.id, "an id is made once");
    }
}
