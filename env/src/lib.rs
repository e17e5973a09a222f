//! The outside world as small traits, and the Linux implementation of them.
//!
//! Owns every system call and nearly all `unsafe` of Ballast. Never decides anything: no policy, no
//! retries, no formats. Production code is generic over [`Env`]; the simulator brings its own.
//!
//! Everything here runs on one shard: a thread with a current-thread tokio runtime and a
//! `LocalSet`. Futures need not be `Send`. `tokio::sync` and `tokio::select!` (biased) may be used
//! directly; time, randomness, disk, network and spawning come from here only.

pub mod clock;
pub mod conformance;
pub mod disk;
pub mod entropy;
pub mod linux;
pub mod network;
pub mod planted;
pub mod raft_runtime;
pub mod record;
pub mod spawn;

use crate::clock::Clock;
use crate::disk::Disk;
use crate::entropy::Entropy;
use crate::network::Network;
use crate::planted::Planted;
use crate::spawn::Spawn;

/// The outside world of one node. Cheap to clone; clones share everything.
pub trait Env: Clock + Entropy + Disk + Network + Spawn + Planted + Clone + 'static {}

impl<T: Clock + Entropy + Disk + Network + Spawn + Planted + Clone + 'static> Env for T {}
