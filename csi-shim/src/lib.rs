//! `ballast-csi`: the CSI driver (Container Storage Interface 1.12).
//!
//! Translates, checks and retries: a volume's state is the cluster's, asked over the
//! administration interface; what a host has attached and mounted is the kernel's, with a small
//! record beside it. Never on the write path: once a volume is staged, its I/O goes from the kernel
//! (or, in development, from the link process of `link`) to a node's NBD target. `docs/csi.md` is
//! the page for users.

pub mod attach;
pub mod cli;
pub mod cluster;
pub mod context;
pub mod controller;
pub mod error;
pub mod host;
pub mod identity;
pub mod limits;
pub mod link;
pub mod locks;
pub mod modes;
pub mod names;
pub mod node;
pub mod parameters;
pub mod serve;
pub mod size;
pub mod steps;

/// `csi.v1`, as generated: see `proto/csi.proto`.
#[allow(missing_docs, clippy::all, clippy::disallowed_methods, clippy::disallowed_types)]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// The driver's name: volumes and nodes in Kubernetes carry it, so it never changes.
pub const DRIVER_NAME: &str = "csi.ballast.storage";

/// The topology key whose value is a host's name, in what every node says of itself.
pub const NODE_TOPOLOGY_KEY: &str = "topology.csi.ballast.storage/node";
