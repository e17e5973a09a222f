//! Pools: which there are, and the word that gives one up.
//!
//! Owns what is looked at before a pool is given up: that it does not serve, and that a majority of
//! each volume's replicas, and of the cluster group, is in sync without it. The cluster's own records
//! know only which replicas there are; they are checked as the command is applied
//! (`cluster/src/giving_up.rs`), so that of two commands at once only one passes.

use std::collections::BTreeSet;

use ballast_api::v1 as api;
use ballast_block::{NodeId, PoolId, ShardId};
use ballast_node::admin::Replacement;
use ballast_node::cluster::{ClusterState, Pool, PoolState, VolumePhase};
use tonic::Status;

use super::picture::Picture;
use super::service::find_node;
use super::volumes;
use crate::shard::LinuxNode;

/// The pools of all nodes, or of one.
pub fn list(
    picture: &Picture,
    request: &api::ListPoolsRequest,
) -> Result<api::ListPoolsResponse, Status> {
    let node = match request.node.as_str() {
        "" => None,
        name => Some(find_node(picture, name)?),
    };
    let wanted = picture.state.pools().filter(|pool| node.is_none_or(|node| node == pool.node));
    let mut pools: Vec<api::Pool> = wanted.map(|pool| picture.pool(pool)).collect();
    pools.sort_by(|a, b| (a.node, a.shard, &a.id).cmp(&(b.node, b.shard, &b.id)));
    Ok(api::ListPoolsResponse { pools })
}

/// A pool that may be given up, as far as the nodes that answer tell.
pub struct Asked {
    node: NodeId,
    pool: PoolId,
    shard: ShardId,
    force: bool,
}

/// Which pool is meant, and whether it can be missed.
pub fn to_replace(picture: &Picture, request: &api::ReplacePoolRequest) -> Result<Asked, Status> {
    let api::ReplacePoolRequest { node, pool_id, force, reason } = request;
    let node = find_node(picture, node)?;
    let id = pool_to_replace(&picture.state, node, pool_id)?;
    let pool = *picture.state.pool(id).expect("it was found there");
    if *force && reason.is_empty() {
        return Err(Status::invalid_argument("force needs a reason: say why the loss is taken"));
    }
    if *force {
        tracing::warn!(pool = %id, %node, reason, "pool is given up by force");
    } else if pool.state != PoolState::Lost {
        check_does_not_serve(picture, &pool)?;
        check_can_be_missed(picture, &pool)?;
    }
    Ok(Asked { node, pool: id, shard: pool.shard, force: *force })
}

/// Gives it up, unless the cluster's records speak against it.
pub async fn replace(node: LinuxNode, asked: Asked) -> Result<api::ReplacePoolResponse, Status> {
    let Asked { node: of, pool, shard, force } = asked;
    let (replacement, without_number) = match node.replace_pool(of, pool, force).await {
        Ok(Replacement::Member(member)) => (member.0, false),
        Ok(Replacement::NoMember) => (0, true),
        Ok(Replacement::Serves) => (0, false),
        Err(error) => return Err(volumes::status(error)),
    };
    let (pool_id, node, shard) = (pool.to_string(), of.0, shard.0);
    Ok(api::ReplacePoolResponse { pool_id, node, replacement, without_number, shard })
}

/// A wrong node's number is typed soon, and there is no way back.
fn check_does_not_serve(picture: &Picture, pool: &Pool) -> Result<(), Status> {
    let Some(reports) = picture.reports.get(&pool.shard) else {
        let text = format!("this node has no pool on {}: ask a node that has", pool.shard);
        return Err(Status::unavailable(text));
    };
    let serves = reports.get(&pool.node).is_some_and(|report| report.pool_failure.is_empty());
    if !serves {
        return Ok(());
    }
    let (id, node) = (pool.id, pool.node);
    Err(Status::failed_precondition(format!(
        "pool {id} of {node} serves: stop the node first, if it is to be given up (see `ballastctl \
         pool list` for the pool that you mean)"
    )))
}

fn check_can_be_missed(picture: &Picture, pool: &Pool) -> Result<(), Status> {
    let (id, force) = (pool.id, "or take its loss with --force and --reason");
    for volume in picture.state.volumes().filter(|it| it.phase == VolumePhase::Ready) {
        let mut replicas = picture.state.replicas_of(volume.family);
        if !replicas.any(|replica| replica.pool == id) {
            continue;
        }
        let (left, all) = (picture.in_sync_without(volume, id), volume.replicas.len());
        if left * 2 <= all {
            let name = &volume.name;
            return Err(Status::failed_precondition(format!(
                "pool {id} can't be given up: without it {left} of the {all} replicas of volume \
                 {name:?} are in sync, which is no majority; wait until the others are (`ballastctl \
                 volume show {name}`), {force}"
            )));
        }
    }
    let (left, all) = (picture.members_in_sync_without(pool.node), picture.founders);
    if pool.shard == ShardId(0) && left * 2 <= all {
        return Err(Status::failed_precondition(format!(
            "pool {id} can't be given up: without it {left} of the {all} nodes are in sync in the \
             cluster group, which is no majority; bring the others back first, {force}"
        )));
    }
    Ok(())
}

/// The pool of a node that was named, or its only one.
fn pool_to_replace(state: &ClusterState, of: NodeId, named: &str) -> Result<PoolId, Status> {
    if !named.is_empty() {
        let pool = state.pools_on(of).find(|pool| pool.id.to_string() == named);
        let unknown = || format!("{of} has no pool {named}: see `ballastctl pool list`");
        return pool.map(|pool| pool.id).ok_or_else(|| Status::not_found(unknown()));
    }
    let mut candidates: Vec<PoolId> = Vec::new();
    let shards: BTreeSet<ShardId> = state.pools_on(of).map(|pool| pool.shard).collect();
    for shard in shards {
        let serves = |pool: &&Pool| pool.state != PoolState::Lost;
        let before = candidates.len();
        candidates.extend(state.pools_of(of, shard).filter(serves).map(|pool| pool.id));
        if candidates.len() == before {
            // Only lost ones: any of them stands for the shard.
            candidates.extend(state.pools_of(of, shard).take(1).map(|pool| pool.id));
        }
    }
    match candidates.as_slice() {
        [only] => Ok(*only),
        _ => {
            let text = format!(
                "{of} has {} pools: name one with --pool, see `ballastctl pool list`",
                candidates.len()
            );
            Err(Status::failed_precondition(text))
        }
    }
}
