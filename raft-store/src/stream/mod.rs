//! Streams: append, group commit, durable watermark, reads, recovery. Write path: step 5 (append).

mod record;

pub use record::{
    AppendError, Appended, PayloadState, PoolFailed, RecordHead, RecordKind, Replayed, SpaceClass,
    StoredPayload, StreamId, StreamPosition,
};
