//! How large a simulated cluster is: what a seed makes of it.

use ballast_block::limits::FAMILY_RETENTION_BYTES_MAX;

use crate::rng::Rng;

/// The stream that says how many shards a seed has: the first one with which those seeds that tests,
/// scripts and documents name keep one, and with it their history.
const SHARDS_STREAM: u64 = 176;

/// The stream that says how many claims a seed has, chosen so as well.
const CLAIMS_STREAM: u64 = 34686;

/// Sizes of a simulated cluster.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Storage nodes.
    pub nodes: u32,
    /// Shards of each node, each with a pool.
    pub shards: u32,
    /// Bytes of each pool.
    pub pool_bytes: u64,
    /// Replicas of each volume: 1, 3 or 5, at most one per node.
    pub replicas: u32,
    /// Log kept per family, in bytes.
    pub retention_bytes: u64,
    /// Volumes.
    pub volumes: usize,
    /// Blocks of each volume.
    pub volume_blocks: u64,
    /// Names under which small volumes are made, formatted and deleted, one after another.
    pub claims: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            nodes: 3,
            shards: 1,
            pool_bytes: 1 << 30,
            replicas: 3,
            retention_bytes: FAMILY_RETENTION_BYTES_MAX,
            volumes: 1,
            volume_blocks: 1024,
            claims: 0,
        }
    }
}

impl Sizes {
    /// What `seed` makes of it: mostly three nodes; pools from ones that hosts fill, or that must be
    /// cleaned all the time, to ones that they never fill.
    pub fn of(seed: u64) -> Self {
        let rng = Rng::named(seed, "sizes", 0);
        let (nodes, replicas) = *rng.pick(&[
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 1),
            (1, 1),
            (5, 3),
            (5, 5),
        ]);
        let mib = *rng.pick(&[1024, 1024, 256, 128, 96, 96]);
        let small = mib <= 128;
        let shards = *Rng::named(seed, "shards", SHARDS_STREAM).pick(&[1, 1, 2]);
        Self {
            nodes,
            shards,
            pool_bytes: mib << 20,
            replicas,
            retention_bytes: *rng.pick(&[FAMILY_RETENTION_BYTES_MAX, 8 << 20, 1 << 20]),
            // One on each shard at least.
            volumes: (*rng.pick(&[1, 1, 1, 2, 3])).max(shards as usize),
            // More than a small pool holds. With several replicas only where each pool has all: else a
            // pool may have to hold what two others took meanwhile, each as much as it could.
            volume_blocks: if small && rng.chance(300_000) && (replicas == 1 || replicas == nodes) {
                16 << 10
            } else {
                1 << 10
            },
            claims: *Rng::named(seed, "claims", CLAIMS_STREAM).pick(&[0, 0, 1]),
        }
    }
}
