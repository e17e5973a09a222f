//! Real processes, real clients: what the tests in `tests/` are made of.
//!
//! Starts three nodes as `ballastd dev` does, points other projects' NBD clients at them, kills,
//! stops and cuts them, and takes everything down again also when a test fails. Every wait is for
//! a condition, with a deadline. Nothing in here knows how the server works inside.
//!
//! Needs root (mounts, loop devices, packet filter) and the tools of
//! `scripts/install-test-tools.sh`; the binaries must have been built.

pub mod clients;
pub mod cluster;
pub mod commits;
pub mod disk;
pub mod filesystem;
pub mod http;
pub mod machine;
pub mod nbd;
pub mod network;
pub mod peer;
pub mod postgres;
pub mod process;
pub mod scratch;
pub mod verify;
pub mod vm;
pub mod wait;

/// The short form of a number of repetitions, or the long one when `BALLAST_E2E_LONG` is set.
pub fn times(short: usize, long: usize) -> usize {
    if std::env::var_os("BALLAST_E2E_LONG").is_some() { long } else { short }
}
