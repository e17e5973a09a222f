//! The pool: streams, segments, log, extent map, checkpoints, cleaner, recovery; openraft's storage
//! traits. A payload is written once, into a log-structured store; the Raft log and the extent map
//! are two indexes over it.
//!
//! Steps 5 (append) and 7 (apply, into the map) of a write, and the disk read of a read. Never
//! decides what an entry means (that is `volume`), never talks to a peer.

mod checkpoint;
mod cleaner;
pub mod entry;
pub mod format;
mod keeper;
pub mod log;
pub mod map;
pub mod place;
pub mod pool;
mod read;
pub mod replica;
pub mod segment;
pub mod stream;
pub mod survey;
pub mod types;
