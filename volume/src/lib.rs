//! A family at work: admission, propose, apply, read gate, attachments.
//!
//! Steps 3 (admission), 4 (propose) and 7 (apply's decision) of a write, and the whole of a read
//! but its disk access. Knows no socket and no peer: the node brings the network.

pub mod acks;
pub mod command;
pub mod content;
pub mod family;
mod gather;
pub mod group;
pub mod leases;
pub mod locks;
pub mod machine;
pub mod quiesce;
pub mod read;
pub mod read_gate;
pub mod retention;
pub mod snapshot;
pub mod split;
mod stages;
pub mod state;
pub mod write;
mod writers;
