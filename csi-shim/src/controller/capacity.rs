//! GetCapacity: how much more fits.
//!
//! Volumes are thin: a larger one can be created. What is told is what could be written, so that a
//! scheduler that trusts it never promises more than there is.

use std::collections::BTreeMap;

use ballast_api::{Client, v1 as api};
use ballast_block::BLOCK_SIZE;
use ballast_block::limits::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};

use super::ControllerService;
use crate::cluster::Asking;
use crate::error::Refusal;
use crate::modes;
use crate::parameters::Parameters;
use crate::size::to_wire;
use crate::v1::{GetCapacityRequest, GetCapacityResponse};

impl ControllerService {
    /// For volumes with these parameters. The topology does not matter: every host reaches them all.
    pub(super) async fn capacity(
        &self,
        asking: &Asking,
        request: &GetCapacityRequest,
    ) -> Result<GetCapacityResponse, Refusal> {
        let parameters = Parameters::parse(&request.parameters)?;
        let supported = request.volume_capabilities.iter().all(|it| modes::parse(Some(it)).is_ok());
        if !supported {
            return Ok(GetCapacityResponse::default());
        }
        let list = |client: Client| async move { client.list_pools(Default::default()).await };
        let pools = asking.ask(list).await?.pools;
        let list = |client: Client| async move { client.list_nodes(Default::default()).await };
        let nodes = asking.ask(list).await?.nodes;
        let free = free_by_shard(&pools, &nodes);
        let replicas = parameters.replicas as usize;
        let whole = |bytes: u64| bytes / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
        let available = free.values().map(|pools| room(pools, replicas)).sum();
        let largest = free.values().map(|pools| largest(pools, replicas)).max().unwrap_or(0);
        Ok(GetCapacityResponse {
            available_capacity: to_wire(whole(available)),
            maximum_volume_size: Some(to_wire(whole(largest.min(VOLUME_BYTES_MAX)))),
            minimum_volume_size: Some(to_wire(VOLUME_BYTES_MIN)),
        })
    }
}

/// Free bytes of the pools that new replicas may go to, by shard: all replicas of a volume lie in
/// one shard, on as many nodes.
fn free_by_shard(pools: &[api::Pool], nodes: &[api::Node]) -> BTreeMap<u32, Vec<u64>> {
    let down = |id: u32| {
        let node = nodes.iter().find(|node| node.id == id);
        node.is_none_or(|node| node.liveness() == api::NodeLiveness::Down)
    };
    let mut best: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    for pool in pools {
        if pool.state() == api::PoolState::Ok && !down(pool.node) {
            let free = pool.capacity_bytes.saturating_sub(pool.used_bytes);
            let of_node = best.entry((pool.shard, pool.node)).or_default();
            *of_node = (*of_node).max(free);
        }
    }
    let mut free: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for ((shard, _), bytes) in best {
        free.entry(shard).or_default().push(bytes);
    }
    free
}

/// The largest volume that can be filled: its worst pool is the one that counts.
fn largest(free: &[u64], replicas: usize) -> u64 {
    let mut free = free.to_vec();
    free.sort_unstable_by(|a, b| b.cmp(a));
    replicas.checked_sub(1).and_then(|worst| free.get(worst)).copied().unwrap_or(0)
}

/// How many bytes of volumes fit, each on as many different pools as it has replicas: the largest
/// `t` for which the pools hold `replicas * t` when none gives more than `t`.
fn room(free: &[u64], replicas: usize) -> u64 {
    if replicas == 0 || free.len() < replicas {
        return 0;
    }
    let mut free = free.to_vec();
    free.sort_unstable_by(|a, b| b.cmp(a));
    // With the k largest cut down to t, the others must hold (replicas - k) * t.
    let bound = |cut: usize| {
        let rest: u128 = free[cut..].iter().map(|bytes| u128::from(*bytes)).sum();
        rest / (replicas - cut) as u128
    };
    let least = (0..replicas).map(bound).min().unwrap_or(0);
    u64::try_from(least).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_distinct_pools_can_hold() {
        assert_eq!(room(&[10, 10, 10], 3), 10);
        assert_eq!(room(&[10, 10, 4], 3), 4);
        assert_eq!(room(&[10, 10, 10, 10], 3), 13);
        assert_eq!(room(&[100, 1, 1], 1), 102);
        assert_eq!(room(&[100, 10, 10, 10], 3), 15);
        assert_eq!(room(&[10, 10], 3), 0);
        assert_eq!(largest(&[10, 30, 20], 3), 10);
        assert_eq!(largest(&[10, 30, 20], 1), 30);
        assert_eq!(largest(&[10, 30], 3), 0);
    }

    #[test]
    fn pools_that_take_nothing_do_not_count() {
        let pool = |node: u32, state: api::PoolState, used_bytes: u64| api::Pool {
            node,
            state: state as i32,
            capacity_bytes: 100,
            used_bytes,
            ..Default::default()
        };
        let node = |id: u32, liveness: api::NodeLiveness| api::Node {
            id,
            liveness: liveness as i32,
            ..Default::default()
        };
        let pools = [
            pool(1, api::PoolState::Ok, 10),
            pool(2, api::PoolState::Failed, 10),
            pool(3, api::PoolState::Ok, 200),
            pool(4, api::PoolState::Ok, 10),
        ];
        let nodes = [
            node(1, api::NodeLiveness::Up),
            node(2, api::NodeLiveness::Up),
            node(3, api::NodeLiveness::Up),
            node(4, api::NodeLiveness::Down),
        ];
        assert_eq!(free_by_shard(&pools, &nodes), BTreeMap::from([(0, vec![90, 0])]));
    }
}
