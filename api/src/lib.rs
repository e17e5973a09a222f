//! The administration interface: the proto files, and the client and server generated from them.
//!
//! Never converts to or from the types of other crates: `node` does, where it implements the
//! service. Not on the write path. `docs/api.md` is the page for users.

/// `ballast.v1`, as generated: see `proto/ballast/v1/admin.proto` for what each thing means.
#[allow(missing_docs, clippy::all, clippy::disallowed_methods, clippy::disallowed_types)]
pub mod v1 {
    tonic::include_proto!("ballast.v1");
}
