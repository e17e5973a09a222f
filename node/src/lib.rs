//! A storage node as a library, generic over its environment: the daemon runs it on Linux, the
//! simulator in a simulated world.
//!
//! Wires links, pool, cluster group, families and targets together. Everything here runs on one
//! shard: a thread with one of the node's pools. What the shards of a node have of each other is in
//! [`shards`].

pub use ballast_cluster as cluster;
pub use ballast_volume::content;
pub use ballast_volume::group::RaftSettings;

pub mod admin;
mod admission;
pub mod attach;
pub mod calls;
pub mod client;
mod cluster_copy;
pub mod cluster_group;
pub mod config;
pub mod families;
pub mod leases;
pub mod leasing;
mod members;
mod mend;
mod meters;
pub mod metrics;
pub mod nbd_lanes;
mod nbd_sizes;
mod nbd_target;
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
pub mod shards;
