//! The streams of a pool: append, group commit, durable watermark, reads, checkpoints, recovery.
//! Write path: step 5 (append).
//!
//! Owns what lies between the log and the disk. Never knows what a record means.

mod commit;
mod open;
mod queue;
mod record;
mod scan;
mod set;
mod superblocks;
mod verdict;
mod votes;

pub use commit::{CommitCheckpointError, Committed, FrozenSegments};
pub use open::{Inspected, OpenStoreError, Opened, PoolInfo, inspect, open};
pub use queue::{DurableCallback, StreamStats};
pub use record::{
    AppendError, Appended, PayloadState, PoolFailed, RecordHead, RecordKind, Replayed, SpaceClass,
    StoredPayload, StreamId, StreamPosition,
};
pub use scan::ScanError;
pub use set::{ReadError, StreamSet};
pub use verdict::{Finding, Suspicion, suspects};
