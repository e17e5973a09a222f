//! Whether the cluster is well, and if not, why.

use ballast_api::v1 as api;
use ballast_block::FamilyId;
use ballast_node::cluster::{Pool, PoolState, ReplicaState, VolumePhase};

use super::picture::{Picture, count};

/// Free space of a pool, as a part of it, under which it is nearly full.
const NEARLY_FULL_ONE_IN: u64 = 8;

/// The answer to `GetStatus`.
pub fn status(picture: &Picture) -> api::GetStatusResponse {
    let mut reasons = Vec::new();
    if let Some(refused) = &picture.refused {
        let (object, message) =
            (picture.own.to_string(), format!("this node is refused: {refused}"));
        reasons.push(reason(api::ClusterHealth::Unavailable, "node-refused", &object, message));
    }
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

fn quorum(picture: &Picture, reasons: &mut Vec<api::HealthReason>) {
    let answering = picture.reports.len();
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
        if !picture.reports.contains_key(&node.id) {
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
    let on = pool.node;
    let mut add = |code: &str, message: String| {
        reasons.push(reason(api::ClusterHealth::Degraded, code, &id, message));
    };
    match picture.pool_state(pool) {
        api::PoolState::Lost => {
            let lost = |r: &&ballast_node::cluster::Replica| {
                r.pool == pool.id && r.state == ReplicaState::Lost
            };
            let serves = |other: &Pool| other.state != PoolState::Lost;
            let remedy = match picture.state.pools_on(on).any(serves) {
                // It was replaced. What stays in it had no majority of replicas left.
                true if !picture.state.replicas_on(on).any(|r| lost(&r)) => return,
                true => "what stays lost in it can't be brought back: delete those volumes",
                false => "replace it: `ballastctl pool replace`",
            };
            let text = format!("pool {id} of {on} is lost and never serves again: {remedy}");
            add("pool-lost", text);
            return;
        }
        api::PoolState::Failed => add(
            "pool-failed",
            format!("pool {id} of {on} failed: check its disk, then restart the node"),
        ),
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
    let up = state.nodes().filter(|node| picture.reports.contains_key(&node.id)).count();
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
