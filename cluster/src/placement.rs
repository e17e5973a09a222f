//! Where the replicas of a new volume go: on different nodes, the same choice on every replica of
//! the cluster group.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use ballast_block::limits::POOL_REPLICAS_MAX;
use ballast_block::{NodeId, PoolId};

use crate::error::Refusal;
use crate::state::ClusterState;
use crate::view::{Pool, PoolState, ReplicaState};

/// What a pool is chosen by, the best one least.
type Rank = (Reverse<u64>, usize, NodeId, PoolId);

/// Chooses a pool on each of `wanted` different nodes: most free space first, then fewest replicas,
/// then by id.
///
/// Volumes are thin, so a pool needs some free space, not the volume's size.
pub fn choose(
    state: &ClusterState,
    name: &str,
    wanted: u32,
) -> Result<Vec<(NodeId, PoolId)>, Refusal> {
    let name = || name.to_owned();
    let registered = count(state.nodes().count());
    if registered < wanted {
        return Err(Refusal::TooFewNodes { name: name(), wanted, registered });
    }
    let replicas = replicas_per_pool(state);
    let mut working: BTreeMap<NodeId, Option<Rank>> = BTreeMap::new();
    for pool in state.pools().filter(|pool| pool.state == PoolState::Ok) {
        let best = working.entry(pool.node).or_default();
        let Some(rank) = rank(pool, replicas.get(&pool.id).copied().unwrap_or(0)) else { continue };
        if best.is_none_or(|best| rank < best) {
            *best = Some(rank);
        }
    }
    if count(working.len()) < wanted {
        let usable = count(working.len());
        return Err(Refusal::TooFewUsableNodes { name: name(), wanted, usable });
    }
    let mut ranks: Vec<Rank> = working.into_values().flatten().collect();
    if count(ranks.len()) < wanted {
        return Err(Refusal::NoSpace { name: name(), wanted, usable: count(ranks.len()) });
    }
    ranks.sort();
    Ok(ranks.into_iter().take(wanted as usize).map(|(_, _, node, pool)| (node, pool)).collect())
}

fn rank(pool: &Pool, replicas: usize) -> Option<Rank> {
    let free = pool.space.free_bytes();
    let usable = free > 0 && replicas < POOL_REPLICAS_MAX;
    usable.then(|| (Reverse(free_step(free)), replicas, pool.node, pool.id))
}

/// Free space in steps of an eighth to a sixteenth of itself: between reports the numbers stand
/// still, and without steps the pool that is ahead by a byte would take every volume until then.
fn free_step(free: u64) -> u64 {
    let drop_bits = (u64::BITS - free.leading_zeros()).saturating_sub(4);
    free >> drop_bits << drop_bits
}

fn replicas_per_pool(state: &ClusterState) -> BTreeMap<PoolId, usize> {
    let mut counts = BTreeMap::new();
    for replica in state.replicas().filter(|replica| replica.state != ReplicaState::Removed) {
        *counts.entry(replica.pool).or_default() += 1;
    }
    counts
}

fn count(items: usize) -> u32 {
    u32::try_from(items).expect("nodes are bounded by a small limit")
}

#[cfg(test)]
mod tests {
    use super::free_step;

    #[test]
    fn steps_keep_four_bits() {
        assert_eq!(free_step(0), 0);
        assert_eq!(free_step(15), 15);
        assert_eq!(free_step(17), 16);
        assert_eq!(free_step(u64::MAX), 0xf << 60);
        assert_eq!(free_step((1 << 40) - 1), 0xf << 36);
    }
}
