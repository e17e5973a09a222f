//! Counters along the way of hosts' commands and of resyncs. Plain numbers, read off by
//! [`crate::metrics`]; only durations go into histograms at once.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::{FamilyId, IoCommand};
use metrics::Histogram;

/// Kinds of commands, as their label.
pub(crate) const KINDS: [&str; 5] = ["read", "write", "trim", "flush", "status"];

/// Which of [`KINDS`] a command is, and how many bytes it is about.
pub(crate) fn kind_of(command: &IoCommand) -> (usize, u64) {
    match command {
        IoCommand::Read { range } => (0, range.length),
        IoCommand::Write { range, .. } => (1, range.length),
        IoCommand::Trim { range } | IoCommand::WriteZeroes { range, .. } => (2, range.length),
        IoCommand::Flush => (3, 0),
        IoCommand::BlockStatus { .. } => (4, 0),
    }
}

/// What hosts did with one volume through this node, by kind of command.
#[derive(Default)]
pub(crate) struct VolumeMeter {
    /// Commands that were answered.
    pub(crate) commands: [Cell<u64>; KINDS.len()],
    /// Bytes that they were about; of those answered without an error.
    pub(crate) bytes: [Cell<u64>; KINDS.len()],
    /// Commands that were answered with an error.
    pub(crate) errors: [Cell<u64>; KINDS.len()],
}

/// All counters of a node.
pub(crate) struct Meters {
    latency: [Histogram; KINDS.len()],
    volumes: RefCell<BTreeMap<FamilyId, Rc<VolumeMeter>>>,
    /// Bytes that differences brought to replicas here.
    pub(crate) resync_received: Cell<u64>,
    /// Bytes of differences that peers pulled from here.
    pub(crate) resync_sent: Cell<u64>,
    /// Differences installed here.
    pub(crate) resyncs: Cell<u64>,
}

impl Default for Meters {
    fn default() -> Self {
        let latency =
            KINDS.map(|kind| metrics::histogram!("ballast_command_seconds", "operation" => kind));
        Self {
            latency,
            volumes: RefCell::default(),
            resync_received: Cell::new(0),
            resync_sent: Cell::new(0),
            resyncs: Cell::new(0),
        }
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: &Cell<u64>, more: u64) {
    counter.set(counter.get().wrapping_add(more));
}

impl Meters {
    /// The counters of a volume.
    pub(crate) fn volume(&self, family: FamilyId) -> Rc<VolumeMeter> {
        self.volumes.borrow_mut().entry(family).or_default().clone()
    }

    /// Notes that a command was answered.
    pub(crate) fn note(
        &self,
        volume: &VolumeMeter,
        (kind, bytes): (usize, u64),
        good: bool,
        took: Duration,
    ) {
        self.latency[kind].record(took.as_secs_f64());
        add(&volume.commands[kind], 1);
        let (counter, more) =
            if good { (&volume.bytes[kind], bytes) } else { (&volume.errors[kind], 1) };
        add(counter, more);
    }

    /// The counters of all volumes that still exist.
    pub(crate) fn volumes(
        &self,
        exists: impl Fn(FamilyId) -> bool,
    ) -> Vec<(FamilyId, Rc<VolumeMeter>)> {
        let mut volumes = self.volumes.borrow_mut();
        volumes.retain(|family, _| exists(*family));
        volumes.iter().map(|(family, meter)| (*family, meter.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_counted_by_kind_and_volumes_forgotten() {
        let meters = Meters::default();
        let meter = meters.volume(FamilyId(1));
        meters.note(&meter, (1, 4096), true, Duration::from_micros(300));
        meters.note(&meter, (1, 4096), false, Duration::from_micros(300));
        let seen = meters.volumes(|_| true);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].1.commands[1].get(), 2);
        assert_eq!((seen[0].1.bytes[1].get(), seen[0].1.errors[1].get()), (4096, 1));
        assert!(meters.volumes(|_| false).is_empty());
    }
}
