//! The other nodes: connections, calls, Raft's network.
//!
//! Two connections to each peer in each direction, one for data and one for control, so that no
//! heartbeat or vote waits behind a megabyte of payload (hazard 26).

pub mod connection;
pub mod identity;
pub(crate) mod inbound;
pub mod links;
pub mod raft_codec;
pub mod raft_net;
pub mod wire;
