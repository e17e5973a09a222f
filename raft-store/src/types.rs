//! The types openraft is instantiated with, and short names for them.

use std::fmt;

use ballast_block::{NodeId, Sequence};
use bytes::Bytes;
use openraft::impls::leader_id_std;

use crate::entry::Command;

openraft::declare_raft_types!(
    /// Raft as Ballast uses it: one leader per term (`leader_id_std`), member id = replica id.
    pub TypeConfig:
        D = Command,
        R = ApplyReply,
        NodeId = u64,
        Node = Member,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = ballast_env::raft_runtime::RaftRuntime,
);

/// What Raft knows of a member beside its replica id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// The node on which the replica lies.
    pub node: NodeId,
}

/// What applying an entry answered: the same on every replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApplyReply {
    /// Applied; the family's write sequence after it.
    Applied(Sequence),
    /// Refused by state that is the same on every replica; nothing changed.
    Rejected(Rejection),
    /// The answer of a control command, in the encoding of the layer that proposed it.
    Control(Bytes),
}

/// Why apply refused an entry (guarantee **fenced**).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The attachment named by the entry is not, or no longer, the current one.
    StaleGeneration,
    /// The entry's holder has a newer epoch.
    StaleEpoch,
    /// The entry lies outside the volume's size at its place in the log.
    OutsideVolume,
    /// The request was applied before: a retry of ours.
    Duplicate,
}

impl fmt::Display for ApplyReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

type Term = openraft::type_config::alias::CommittedLeaderIdOf<TypeConfig>;
/// (term, index).
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// Term and candidate, committed or not.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// A log entry.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// What an entry carries.
pub type EntryPayload = openraft::EntryPayload<Command, u64, Member>;
/// A membership configuration.
pub type Membership = openraft::Membership<u64, Member>;
/// A membership and the entry that set it.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;

/// A log id from its parts.
pub fn log_id(term: u64, index: u64) -> LogId {
    LogId { leader_id: Term::new(term), index }
}

/// The term of a log id.
pub fn term_of(id: &LogId) -> u64 {
    id.leader_id.term
}
