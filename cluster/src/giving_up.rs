//! Whether a pool may be given up: what was acknowledged must be on a majority without it.
//!
//! Owns what the cluster's own records say of that. Whether the other replicas are in sync is not in
//! them: whoever asks the cluster looks at it before (`daemon/src/admin/pools.rs`).

use ballast_block::ShardId;

use crate::error::Refusal;
use crate::state::ClusterState;
use crate::view::{Node, Pool, PoolState, ReplicaState, VolumePhase};

impl ClusterState {
    /// Refuses what would leave a volume that was ever usable, or the cluster group, without a
    /// majority: nobody could say any more what was acknowledged.
    pub(crate) fn check_can_be_given_up(&self, pool: &Pool) -> Result<(), Refusal> {
        for volume in self.volumes.values() {
            let replicas = || volume.replicas.iter().map(|id| &self.replicas[id]);
            if volume.phase != VolumePhase::Ready
                || !replicas().any(|replica| replica.pool == pool.id)
            {
                continue;
            }
            let keeps = |state| state == ReplicaState::Ready;
            let left = replicas().filter(|it| it.pool != pool.id && keeps(it.state)).count();
            let replicas = volume.replicas.len();
            if left * 2 <= replicas {
                let name = volume.name.clone();
                return Err(Refusal::PoolHoldsMajority { pool: pool.id, name, left, replicas });
            }
        }
        let (left, nodes) = (self.members_without(pool), self.nodes.len());
        if pool.shard == ShardId(0) && left * 2 <= nodes {
            return Err(Refusal::PoolHoldsClusterMajority { pool: pool.id, left, nodes });
        }
        Ok(())
    }

    /// Nodes whose member of the cluster group is on another pool than that, and not given up.
    fn members_without(&self, pool: &Pool) -> usize {
        let has_one = |node: &&Node| {
            let mut pools = self.pools_of(node.id, ShardId(0));
            !node.replacing && pools.any(|it| it.id != pool.id && it.state != PoolState::Lost)
        };
        self.nodes.values().filter(has_one).count()
    }
}
