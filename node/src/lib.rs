//! A storage node as a library, generic over its environment: the daemon runs it on Linux, the
//! simulator in a simulated world.
//!
//! Wires links, pool, cluster group, families and targets together. Everything here runs on the
//! node's shard: one thread.

pub use ballast_cluster as cluster;
pub use ballast_volume::group::RaftSettings;

pub mod admin;
mod admission;
pub mod attach;
pub mod calls;
pub mod client;
pub mod cluster_group;
pub mod config;
pub mod families;
mod members;
mod mend;
mod meters;
pub mod metrics;
pub mod nbd_target;
pub mod node;
pub mod operate;
pub mod peers;
mod quiesce;
mod reach;
pub mod reconcile;
pub mod report;
pub mod resync;
pub mod room;
pub mod room_queue;
pub mod server;
