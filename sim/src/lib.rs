//! The whole cluster in one thread from one seed: time, network, disks, crashes, histories.
//!
//! Owns the simulated world and the judgement of what happens in it. Runs the production code of
//! `node` and below as it is, through [`env::SimEnv`]; never patches it and never looks at its
//! private state where its bytes on a wire or a disk can be looked at instead.

pub mod ballast;
pub mod claim;
pub mod cluster;
pub mod env;
pub mod host;
pub mod machine;
pub mod nemesis;
pub mod oracle;
mod os_entropy;
mod panics;
pub mod plan;
pub mod rng;
pub mod scene;
mod sizes;
pub mod system;
pub mod toy;
pub mod trace;
pub mod whole;
pub mod world;
