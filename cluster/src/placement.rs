//! Where the replicas of a new volume go: on different nodes, on pools of one shard number, the same
//! choice on every replica of the cluster group.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use ballast_block::limits::POOL_REPLICAS_MAX;
use ballast_block::{NodeId, PoolId, ShardId};

use crate::command::CreateVolume;
use crate::error::Refusal;
use crate::state::ClusterState;
use crate::view::{Pool, PoolState, ReplicaState};

/// What a pool is chosen by, the best one least.
type Rank = (Reverse<u64>, usize, NodeId, PoolId);

/// What a shard number is chosen by, the best one least: the absent nodes that it would take, the
/// preferred nodes that it would leave out (the first of them first), the free space of the worst pool that it would give, the replicas in
/// all that it would give, its number.
type ShardRank = (usize, Vec<bool>, Reverse<u64>, usize, ShardId);

/// The nodes with a working pool of a shard number, each with its best pool that has space.
type Candidates = BTreeMap<NodeId, Option<Rank>>;

/// Chooses a shard number, and a pool of it on each of as many different nodes as replicas are
/// wanted. Absent nodes come last, preferred ones first, as far as they have a pool with space. Among pools: most free
/// space first, then fewest replicas, then by id; among shard numbers the one with the best pools by
/// the same measure.
///
/// Volumes are thin, so a pool needs some free space, not the volume's size.
pub fn choose(
    state: &ClusterState,
    command: &CreateVolume,
) -> Result<(ShardId, Vec<(NodeId, PoolId)>), Refusal> {
    let CreateVolume { name, replicas: wanted, preferred, absent, .. } = command;
    let registered = count(state.nodes().count());
    if registered < *wanted {
        return Err(Refusal::TooFewNodes { name: name.clone(), wanted: *wanted, registered });
    }
    let shards = candidates(state);
    let mut best: Option<(ShardRank, Vec<Rank>)> = None;
    for (&shard, nodes) in &shards {
        let mut ranks: Vec<Rank> = nodes.values().copied().flatten().collect();
        let is_absent = |rank: &Rank| absent.contains(&rank.2);
        ranks.sort_by_key(|rank| (is_absent(rank), place_among(preferred, rank.2), *rank));
        ranks.truncate(*wanted as usize);
        if count(ranks.len()) < *wanted {
            continue;
        }
        let Some(worst) = ranks.iter().map(|(free, ..)| *free).max() else { continue };
        let left_out = |node: &NodeId| ranks.iter().all(|rank| rank.2 != *node);
        let left_out: Vec<bool> = preferred.iter().map(left_out).collect();
        let replicas = ranks.iter().map(|(_, replicas, ..)| replicas).sum();
        let absent = ranks.iter().filter(|rank| is_absent(rank)).count();
        let rank = (absent, left_out, worst, replicas, shard);
        if best.as_ref().is_none_or(|(best, _)| rank < *best) {
            best = Some((rank, ranks));
        }
    }
    let Some(((.., shard), ranks)) = best else { return Err(shortage(&shards, name, *wanted)) };
    Ok((shard, ranks.into_iter().map(|(_, _, node, pool)| (node, pool)).collect()))
}

/// Nodes that nobody prefers come after all that somebody does.
fn place_among(preferred: &[NodeId], node: NodeId) -> usize {
    preferred.iter().position(|it| *it == node).unwrap_or(preferred.len())
}

fn candidates(state: &ClusterState) -> BTreeMap<ShardId, Candidates> {
    let replicas = replicas_per_pool(state);
    let mut shards: BTreeMap<ShardId, Candidates> = BTreeMap::new();
    for pool in state.pools().filter(|pool| pool.state == PoolState::Ok) {
        let best = shards.entry(pool.shard).or_default().entry(pool.node).or_default();
        let Some(rank) = rank(pool, replicas.get(&pool.id).copied().unwrap_or(0)) else { continue };
        if best.is_none_or(|best| rank < best) {
            *best = Some(rank);
        }
    }
    shards
}

/// Why no shard number has enough: too few pools at all, or too few that go together.
fn shortage(shards: &BTreeMap<ShardId, Candidates>, name: &str, wanted: u32) -> Refusal {
    let name = name.to_owned();
    let nodes = |counts: &dyn Fn(&Option<Rank>) -> bool| -> (u32, BTreeMap<ShardId, u32>) {
        let mut all = BTreeSet::new();
        let mut each = BTreeMap::new();
        for (&shard, candidates) in shards {
            let counted = candidates.iter().filter(|(_, best)| counts(best));
            let counted: Vec<NodeId> = counted.map(|(&node, _)| node).collect();
            each.insert(shard, count(counted.len()));
            all.extend(counted);
        }
        (count(all.len()), each)
    };
    let (working, working_each) = nodes(&|_| true);
    if working < wanted {
        return Refusal::TooFewUsableNodes { name, wanted, usable: working };
    }
    if working_each.values().all(|&nodes| nodes < wanted) {
        return Refusal::TooFewUsableNodesOnOneShard { name, wanted, usable: working_each };
    }
    let (spacious, spacious_each) = nodes(&|best| best.is_some());
    if spacious < wanted {
        return Refusal::NoSpace { name, wanted, usable: spacious };
    }
    Refusal::NoSpaceOnOneShard { name, wanted, usable: spacious_each }
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
