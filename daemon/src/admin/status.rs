//! Whether the cluster is well, and if not, why.

use std::collections::BTreeSet;

use ballast_api::v1 as api;
use ballast_block::{FamilyId, ShardId};
use ballast_node::cluster::{Pool, PoolState, ReplicaState, Volume, VolumePhase};

use super::picture::{Picture, count};

/// Free space of a pool, as a part of it, under which it is nearly full.
const NEARLY_FULL_ONE_IN: u64 = 8;

/// The answer to `GetStatus`.
pub fn status(picture: &Picture) -> api::GetStatusResponse {
    let mut reasons = Vec::new();
    own_shards(picture, &mut reasons);
    quorum(picture, &mut reasons);
    volumes(picture, &mut reasons);
    nodes(picture, &mut reasons);
    for pool in picture.state.pools() {
        self::pool(picture, pool, &mut reasons);
    }
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.severity));
    let worst = reasons.first().map(|reason| reason.severity);
    let leader = picture.leader(FamilyId::CLUSTER).map_or(0, |(node, _)| node.0);
    api::GetStatusResponse {
        health: worst.unwrap_or(api::ClusterHealth::Ok.into()),
        reasons,
        cluster_id: picture.state.cluster().to_string(),
        generation: picture.state.generation(),
        leader_node: leader,
        revision: picture.state.revision(),
        answering_node: picture.own.0,
        counts: Some(counts(picture)),
    }
}

fn reason(
    severity: api::ClusterHealth,
    code: &str,
    object: &str,
    message: String,
) -> api::HealthReason {
    let (code, object) = (code.to_owned(), object.to_owned());
    api::HealthReason { severity: severity.into(), code, object, message }
}

fn own_shards(picture: &Picture, reasons: &mut Vec<api::HealthReason>) {
    let object = picture.own.to_string();
    for (shard, why) in &picture.refused {
        let (severity, code, message) = match *shard {
            ShardId(0) => (
                api::ClusterHealth::Unavailable,
                "node-refused",
                format!("this node is refused: {why}"),
            ),
            _ => (
                api::ClusterHealth::Degraded,
                "shard-refused",
                format!("{shard} of this node is refused: {why}"),
            ),
        };
        reasons.push(reason(severity, code, &object, message));
    }
    for (shard, why) in &picture.ended {
        let message = format!(
            "{shard} of this node has ended, its other shards go on: {why}. See to its disk and \
             restart the node, or give its pool up: `ballastctl pool replace`"
        );
        reasons.push(reason(api::ClusterHealth::Degraded, "shard-ended", &object, message));
    }
    let unseen = |volume: &&Volume| !picture.reports.contains_key(&volume.shard);
    let unseen: BTreeSet<_> =
        picture.state.volumes().filter(unseen).map(|volume| volume.shard).collect();
    for shard in unseen {
        let count = picture.state.volumes().filter(|volume| volume.shard == shard).count();
        let message = format!(
            "this node does not serve {shard} and can't tell how its {count} volumes are: ask a \
             node that does"
        );
        reasons.push(reason(api::ClusterHealth::Degraded, "shard-unseen", &object, message));
    }
}

fn quorum(picture: &Picture, reasons: &mut Vec<api::HealthReason>) {
    let answering = picture.reports.get(&ShardId(0)).map_or(0, |reports| reports.len());
    let wanted = picture.founders / 2 + 1;
    if answering >= wanted && picture.leader(FamilyId::CLUSTER).is_some() {
        return;
    }
    let message = format!(
        "the cluster group has no leader among the {answering} of {} nodes that answer; {wanted} \
         must run and see each other: volumes can't be created, changed or deleted",
        picture.founders
    );
    reasons.push(reason(api::ClusterHealth::Unavailable, "no-quorum", "", message));
}

fn volumes(picture: &Picture, reasons: &mut Vec<api::HealthReason>) {
    for volume in picture.state.volumes() {
        let name = &volume.name;
        match picture.health(volume) {
            api::VolumeHealth::Unavailable => reasons.push(reason(
                api::ClusterHealth::Unavailable,
                "volume-unavailable",
                name,
                format!("volume {name} has no leader: hosts wait; check the nodes of its replicas"),
            )),
            api::VolumeHealth::Degraded => reasons.push(reason(
                api::ClusterHealth::Degraded,
                "volume-degraded",
                name,
                format!(
                    "volume {name} has a replica that is behind, away or lost; it catches up by \
                     itself when its node is back"
                ),
            )),
            api::VolumeHealth::Ok | api::VolumeHealth::Unspecified => {}
        }
    }
}

fn nodes(picture: &Picture, reasons: &mut Vec<api::HealthReason>) {
    for node in picture.state.nodes() {
        if picture.node_report(node.id).is_none() {
            let message = format!(
                "node {} does not answer at {}: start it, or check the network between",
                node.name, node.peer_address
            );
            reasons.push(reason(api::ClusterHealth::Degraded, "node-down", &node.name, message));
        }
    }
}

fn pool(picture: &Picture, pool: &Pool, reasons: &mut Vec<api::HealthReason>) {
    let id = pool.id.to_string();
    let (on, shard) = (pool.node, pool.shard);
    let mut add = |code: &str, message: String| {
        reasons.push(reason(api::ClusterHealth::Degraded, code, &id, message));
    };
    match picture.pool_state(pool) {
        api::PoolState::Lost => {
            let lost = |r: &&ballast_node::cluster::Replica| {
                r.pool == pool.id && r.state == ReplicaState::Lost
            };
            let serves = |other: &Pool| other.state != PoolState::Lost;
            let remedy = match picture.state.pools_of(on, pool.shard).any(serves) {
                // It was replaced. What stays in it had no majority of replicas left.
                true if !picture.state.replicas_on(on).any(|r| lost(&r)) => return,
                true => "what stays lost in it can't be brought back: delete those volumes",
                false => "replace it: `ballastctl pool replace`",
            };
            let text = format!("pool {id} of {on} is lost and never serves again: {remedy}");
            add("pool-lost", text);
            return;
        }
        api::PoolState::Failed => {
            let text = match picture.is_silent(pool) && pool.state == PoolState::Ok {
                true => format!(
                    "pool {id} ({shard}) of {on} does not answer, and its node does: it is being \
                     opened, or was refused, or has failed; that node's log and `ballastctl \
                     status` there say which"
                ),
                false => format!(
                    "pool {id} ({shard}) of {on} failed: check its disk and the node's log, then \
                     restart the node; if the disk is gone for good, give the pool up: \
                     `ballastctl pool replace`"
                ),
            };
            add("pool-failed", text);
        }
        _ => {}
    }
    let free = picture.free_bytes(pool);
    if free == 0 {
        add(
            "pool-full",
            format!("pool {id} of {on} is full: writes of its volumes are refused; delete or trim"),
        );
    } else if free < pool.space.capacity_bytes / NEARLY_FULL_ONE_IN {
        add("pool-nearly-full", format!("pool {id} of {on} has {free} bytes left: delete or trim"));
    }
}

fn counts(picture: &Picture) -> api::Counts {
    let state = &picture.state;
    let living = || state.volumes().filter(|volume| volume.phase != VolumePhase::Deleting);
    let health = |wanted: api::VolumeHealth| {
        count(living().filter(|volume| picture.health(volume) == wanted).count())
    };
    let up = state.nodes().filter(|node| picture.node_report(node.id).is_some()).count();
    let working = || state.pools().filter(|pool| picture.pool_state(pool) == api::PoolState::Ok);
    let kept = state.replicas().filter(|replica| replica.state != ReplicaState::Removed);
    let known = state.pools().filter(|pool| pool.state != PoolState::Lost).count();
    api::Counts {
        nodes: count(state.nodes().count()),
        nodes_up: count(up),
        pools: count(known),
        pools_ok: count(working().count()),
        volumes: count(state.volumes().count()),
        volumes_ok: health(api::VolumeHealth::Ok),
        volumes_degraded: health(api::VolumeHealth::Degraded),
        volumes_unavailable: health(api::VolumeHealth::Unavailable),
        volumes_deleting: count(state.volumes().count() - living().count()),
        replicas: count(kept.count()),
        capacity_bytes: working().map(|pool| pool.space.capacity_bytes).sum(),
        used_bytes: working().map(|pool| picture.used_bytes(pool)).sum(),
    }
}
