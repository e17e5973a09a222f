//! The administration interface: the proto files, the client and server generated from them, and a
//! client that finds a node that answers.
//!
//! Never converts to or from the types of other crates: `node` does, where it implements the
//! service. Not on the write path. `docs/api.md` is the page for users.

pub mod client;
mod probe;
mod timeout;

pub use client::{Client, EndpointError};
pub use timeout::timeout_of;

/// `ballast.v1`, as generated: see `proto/ballast/v1/admin.proto` for what each thing means.
#[allow(missing_docs, clippy::all, clippy::disallowed_methods, clippy::disallowed_types)]
pub mod v1 {
    tonic::include_proto!("ballast.v1");
}
