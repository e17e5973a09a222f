//! What the segments of a pool are for, in numbers: docs/disk-format.md, "Space".
//!
//! All bounds of a pool follow from its size, so that overwriting what fits goes on for ever on the
//! smallest pool as on the largest, however many families share it. Pure arithmetic.

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::{
    ASIDE_UNTIL_ONE_IN, CAPACITY_PERCENT, CHECKPOINT_LOG_BYTES, CHECKPOINT_LOG_ONE_IN,
    MAP_DELTA_BYTES_MAX, MAP_DIRTY_BYTES_MAX, META_ONE_IN, OPEN_SEGMENTS, POOL_REPLICAS_MAX,
    POOL_RETENTION_BYTES_MAX, REPLICAS_PER_SEGMENT_MAX, RESERVE_ADMITTED_ONE_IN, RETENTION_ONE_IN,
    RETENTION_PRESSED_ONE_IN, UNMERGED_ONE_IN, WORKING_ONE_IN, WORKING_SEGMENTS_MIN,
};

use crate::format::PoolGeometry;
use crate::segment::Reserves;
use crate::stream::SpaceClass;

/// The budget of one pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Live blocks that the pool takes, data and map: beyond it the pool is full.
    pub capacity_blocks: u64,
    /// Live blocks up to which differences are put aside; beyond, they replace in place.
    pub aside_blocks: u64,
    /// Live blocks up to which a difference may add some: a peer's pool holds what was admitted beyond
    /// its capacity, and what a follower takes by log is bounded by nothing but space.
    pub most_blocks: u64,
    /// Free segments, beyond all reserves, for what was admitted and is not appended yet.
    pub admitted: u32,
    /// Free segments, beyond the former, that the keeper works hard to have.
    pub working: u32,
    /// Free segments beyond the reserves below which the keeper starts to clean what costs little.
    pub low: u32,
    /// Log since the last checkpoint that makes the next one due, in bytes of the hot stream.
    pub checkpoint_log: u64,
    /// Log entries kept, all families together, in bytes of the hot stream.
    pub retention: u64,
    /// The same while free segments are few.
    pub retention_pressed: u64,
    /// Blocks that maps may have changed without having merged it: that much may be dead and still
    /// count as live.
    pub unmerged_blocks: u64,
    /// Memory of unmerged changes, in bytes.
    pub delta_bytes: usize,
    /// Map pages that wait for a checkpoint, in bytes on disk.
    pub dirty_bytes: usize,
    /// Segments of map pages beyond twice what lives in them, before they are compacted.
    pub meta: u32,
    /// Replicas.
    pub replicas: usize,
}

impl Budget {
    /// Of a pool so divided.
    pub fn new(geometry: PoolGeometry) -> Self {
        let segments = geometry.segments;
        let bytes = geometry.segment_bytes();
        let part = |one_in: u32, least: u32| (segments / one_in).max(least);
        let of = |segments: u32| u64::from(segments) * bytes;
        let total = of(segments);
        let checkpoint_log = of(part(CHECKPOINT_LOG_ONE_IN, 1)).min(CHECKPOINT_LOG_BYTES);
        let retention = of(part(RETENTION_ONE_IN, 2)).min(POOL_RETENTION_BYTES_MAX);
        let retention_pressed = (retention / RETENTION_PRESSED_ONE_IN).max(bytes);
        let admitted = part(RESERVE_ADMITTED_ONE_IN, 1);
        let working = part(WORKING_ONE_IN, WORKING_SEGMENTS_MIN);
        let meta = part(META_ONE_IN, 1);
        // Neither cleaned nor freed: what is kept for followers, what recovery would replay, and
        // what comes while the checkpoint that moves its start is made.
        let tail = (retention_pressed + 2 * checkpoint_log).div_ceil(bytes) as u32;
        let reserves = Reserves::new(segments).kept_from(SpaceClass::Normal);
        let fixed = reserves + OPEN_SEGMENTS + tail + admitted + working + meta;
        let cleanable = u64::from(segments.saturating_sub(fixed).max(1));
        // Of each segment one block is its header.
        let blocks = cleanable * u64::from(geometry.segment_blocks - 1);
        let capacity_blocks = blocks * CAPACITY_PERCENT / 100;
        let beyond = u64::from(admitted + working) * u64::from(geometry.segment_blocks - 1);
        let unmerged_blocks = total / UNMERGED_ONE_IN / BLOCK_SIZE as u64;
        let part_of_memory = |most: usize| {
            usize::try_from(total / UNMERGED_ONE_IN).map_or(most, |part| part.min(most))
        };
        Self {
            capacity_blocks,
            aside_blocks: capacity_blocks - capacity_blocks / ASIDE_UNTIL_ONE_IN,
            most_blocks: capacity_blocks + beyond,
            admitted,
            working,
            low: segments / 4,
            checkpoint_log,
            retention,
            retention_pressed,
            unmerged_blocks,
            delta_bytes: part_of_memory(MAP_DELTA_BYTES_MAX),
            dirty_bytes: part_of_memory(MAP_DIRTY_BYTES_MAX),
            meta,
            replicas: POOL_REPLICAS_MAX.min(segments as usize * REPLICAS_PER_SEGMENT_MAX),
        }
    }
}

/// How little is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pressure {
    /// Enough.
    None,
    /// A quarter of the pool: what costs little is cleaned.
    Low,
    /// Little above what the keeper must have: less log is kept, checkpoints come sooner.
    Pressed,
    /// Less than the keeper must have: everything is cleaned that gains something.
    Tight,
}

impl Budget {
    /// For so many free segments beyond the reserves.
    pub(crate) fn pressure(&self, free: u32) -> Pressure {
        if free < self.admitted + self.working {
            Pressure::Tight
        } else if free < self.admitted + 2 * self.working {
            Pressure::Pressed
        } else if free < self.low {
            Pressure::Low
        } else {
            Pressure::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of docs/disk-format.md.
    #[test]
    fn capacities() {
        let capacity = |bytes: u64| {
            let geometry = PoolGeometry::for_size(bytes).unwrap();
            let budget = Budget::new(geometry);
            let total = u64::from(geometry.segments) * geometry.segment_bytes();
            (total >> 20, (budget.capacity_blocks * BLOCK_SIZE as u64) >> 20)
        };
        let sizes = [PoolGeometry::BYTES_MIN, 512 << 20, 1536 << 20, 16 << 30, 1 << 40];
        let found = sizes.map(capacity);
        println!("{found:?}");
        for (total, capacity) in found {
            assert!(capacity * 100 >= total * 25, "{capacity} of {total} MiB");
        }
    }

    #[test]
    fn everything_fits_every_pool() {
        for segments in 32..2000 {
            let geometry = PoolGeometry { segment_blocks: 512, segments };
            let budget = Budget::new(geometry);
            let reserves = Reserves::new(segments).kept_from(SpaceClass::Normal);
            assert!(budget.low > 2 * budget.working + budget.admitted, "{segments}");
            assert!(reserves + OPEN_SEGMENTS + budget.low < segments, "{segments}");
            // Pages of one checkpoint: what was dirty when it was due, and what one merge adds.
            let pages = budget.dirty_bytes as u64 / BLOCK_SIZE as u64 + budget.unmerged_blocks;
            let reserve = reserves - Reserves::new(segments).kept_from(SpaceClass::Checkpoint);
            assert!(pages <= u64::from(reserve - 1) * 511, "{segments}: {pages} in {reserve}");
            let retention = budget.retention / geometry.segment_bytes();
            assert!(retention + 2 <= u64::from(segments / 8), "{segments}: {retention}");
        }
    }
}
