//! Simulated hosts: clients that speak real NBD bytes over the simulated network, and what they do
//! with it.

pub mod lanes;
pub mod nbd;
pub mod workload;
