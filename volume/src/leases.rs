//! The family's copy of its volume's leases: whose writes apply takes.
//!
//! Pure, part of the replicated state. The truth is the cluster group's; a revision of it comes here
//! as a committed entry, so that every replica fences at the same place of the log (hazard F10).

use ballast_block::Epoch;
use prost::Message;

use crate::command::{GrantV1, SetLeasesV1};

/// The leases that the family knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseTable {
    revision: u64,
    /// By epoch, rising.
    grants: Vec<Grant>,
}

/// What a lease allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Names the lease.
    pub epoch: Epoch,
    /// Whether its holder may write.
    pub writes: bool,
    /// Whether others may write beside it.
    pub shared: bool,
}

/// As it is kept in the family's state.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LeaseTableV1 {
    #[prost(uint64, tag = "1")]
    revision: u64,
    #[prost(message, repeated, tag = "2")]
    grants: Vec<GrantV1>,
}

impl LeaseTable {
    /// The revision of the cluster group's leases that this is; 0 = there never was a lease.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether somebody holds a lease.
    pub fn is_leased(&self) -> bool {
        !self.grants.is_empty()
    }

    /// The lease of that epoch, while it is in force.
    pub fn grant(&self, epoch: Epoch) -> Option<Grant> {
        self.grants.iter().find(|grant| grant.epoch == epoch).copied()
    }

    /// Takes a newer revision over; an older one arrives late and changes nothing.
    pub(crate) fn set(&mut self, new: &SetLeasesV1) -> bool {
        if new.revision <= self.revision {
            return false;
        }
        *self = Self::from_wire(new.revision, &new.grants);
        true
    }

    /// Whether an attachment that was made under `epoch` may still write; 0 = without a lease.
    pub(crate) fn lets_write(&self, epoch: Epoch) -> bool {
        match epoch {
            Epoch(0) => !self.is_leased(),
            epoch => self.grant(epoch).is_some_and(|grant| grant.writes),
        }
    }

    pub(crate) fn to_state(&self) -> LeaseTableV1 {
        let wire = |grant: &Grant| GrantV1 {
            epoch: grant.epoch.0,
            writes: grant.writes,
            shared: grant.shared,
        };
        LeaseTableV1 { revision: self.revision, grants: self.grants.iter().map(wire).collect() }
    }

    pub(crate) fn from_state(state: &LeaseTableV1) -> Self {
        Self::from_wire(state.revision, &state.grants)
    }

    fn from_wire(revision: u64, grants: &[GrantV1]) -> Self {
        let grant = |wire: &GrantV1| Grant {
            epoch: Epoch(wire.epoch),
            writes: wire.writes,
            shared: wire.shared,
        };
        let mut grants: Vec<Grant> = grants.iter().map(grant).collect();
        grants.sort_unstable_by_key(|grant| grant.epoch);
        Self { revision, grants }
    }
}
