//! The cluster group's replicated state: nodes, pools, volumes, replicas, where they lie,
//! and who may use them.
//!
//! Owns the commands, what each does to the state, placement, and the format of both. A pure state
//! machine: [`ClusterState::apply`] is a function of state and [`Command`] only, so that every
//! replica decides alike. Never does I/O, never reads a clock, draws no random number (ids that must
//! be random come in the command), and knows nothing of the consensus library. Not on the write path.
//!
//! The cluster group holds *intent*; which replicas are members of a family's Raft group is for that
//! family's own log to say. Nothing here is deleted before every pool concerned has confirmed it.

mod codec;
mod command;
mod command_codec;
mod error;
mod giving_up;
mod leases;
mod lineage;
mod nodes;
mod placement;
mod reply_codec;
mod state;
mod validate;
mod view;
mod volumes;
mod wire;

pub use codec::{StateError, StateProblem};
pub use command::{
    AcquireLease, Command, CommandError, CreateVolume, NodeBooted, PoolStart, READER_VERSION,
    RegisterNode,
};
pub use error::{Leased, NodeProblem, Refusal, RefusalCode, SizeProblem};
pub use leases::{check_host, check_reason};
pub use lineage::{Marks, Past};
pub use reply_codec::ReplyError;
pub use state::{ClusterState, Reply};
pub use validate::{check_volume_name, check_volume_size};
pub use view::{
    Lease, LeaseMode, Node, NodeState, Pool, PoolSpace, PoolState, Replica, ReplicaState, Volume,
    VolumePhase,
};
