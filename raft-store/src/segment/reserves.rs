//! Free segments that are kept back, so that a full pool can always vote, checkpoint, clean and
//! trim (hazard F11).

use ballast_block::limits::{
    RESERVE_CHECKPOINT_ONE_IN, RESERVE_CHECKPOINT_SEGMENTS_MIN, RESERVE_CLEANER_SEGMENTS,
    RESERVE_CONTROL_SEGMENTS, RESERVE_TRIM_SEGMENTS,
};

use crate::stream::SpaceClass;

/// The reserves of one pool, in segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserves {
    checkpoint: u32,
}

impl Reserves {
    /// For a pool of so many segments.
    pub fn new(segments: u32) -> Self {
        let part = segments / RESERVE_CHECKPOINT_ONE_IN;
        Self { checkpoint: part.max(RESERVE_CHECKPOINT_SEGMENTS_MIN) }
    }

    /// Free segments that an allocation of this class must leave.
    pub fn kept_from(&self, class: SpaceClass) -> u32 {
        let control = RESERVE_CONTROL_SEGMENTS;
        let checkpoint = control + self.checkpoint;
        let cleaner = checkpoint + RESERVE_CLEANER_SEGMENTS;
        match class {
            SpaceClass::Control => 0,
            SpaceClass::Checkpoint => control,
            SpaceClass::Cleaner => checkpoint,
            SpaceClass::Trim => cleaner,
            SpaceClass::Normal => cleaner + RESERVE_TRIM_SEGMENTS,
        }
    }
}
