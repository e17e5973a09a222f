//! Bugs planted on purpose: the proof that the simulator finds what it is there for.
//!
//! Only the simulated environment ever answers yes. Every other environment keeps the default, a
//! constant `false` that the compiler removes together with the bug; `tidy` checks that nobody else
//! overrides it.

/// A mistake that one line of production code could hold; docs/simulator.md says how soon each is
/// found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PlantedBug {
    /// Entries count as durable when they are queued, before they are on the disk.
    EarlyAck,
    /// A restarted leader goes on in its old term (hazard F1).
    LeaderRestore,
    /// Whoever believes to lead answers reads at once (hazard F4).
    SkippedReadGate,
    /// The cleaner frees a block that the map still points to (hazard F3).
    LiveBlockFreed,
    /// A checkpoint does not wait for what it covers to be durable (hazard F7).
    EarlyCheckpoint,
    /// That a volume is being formatted is bound to nobody: what another host wrote meanwhile is no
    /// reason to refuse that it begins again.
    LooseFormatting,
    /// The epochs of leases begin anew with each volume, so also with one that has the name of one that
    /// was deleted.
    EpochsAnew,
}

/// Whether a bug is planted in this environment.
pub trait Planted {
    /// Whether the code must behave as if it had `bug`.
    #[inline]
    fn is_planted(&self, bug: PlantedBug) -> bool {
        let _ = bug;
        false
    }
}
