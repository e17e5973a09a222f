//! A storage node as a library, generic over its environment.

pub mod calls;
pub mod peers;
