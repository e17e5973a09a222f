//! How long the stages of a write and of a read take on the leader, as histograms.
//!
//! Handles are registered once per family; all families of a process share what they count.

use ballast_env::clock::Instant;
use metrics::Histogram;

/// Durations of stages, in seconds.
pub(crate) struct Stages {
    /// Step 3: locks, room in flight, merging parts of blocks.
    pub(crate) admission: Histogram,
    /// Steps 4 to 7: from the proposal until it is applied here.
    pub(crate) commit: Histogram,
    /// The read gate, the map and the disk.
    pub(crate) read: Histogram,
}

impl Default for Stages {
    fn default() -> Self {
        let stage =
            |name: &'static str| metrics::histogram!("ballast_stage_seconds", "stage" => name);
        Self { admission: stage("admission"), commit: stage("commit"), read: stage("read") }
    }
}

/// Notes the time from `start` to `end`.
pub(crate) fn note(histogram: &Histogram, start: Instant, end: Instant) {
    histogram.record(end.since(start).as_secs_f64());
}
