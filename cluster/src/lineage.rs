//! Whether a pool that comes up has the past that the cluster knows (hazard F5).
//!
//! A pool whose contents went back in time starts again and again, each time with a higher counter:
//! the counter alone would let it in at last. Its marks stay those of the past it comes from.

use crate::command::NodeBooted;
use crate::view::Pool;

/// What a pool says of its past; docs/disk-format.md, superblock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// The last mark that it knows to be accepted; 0 = none.
    pub settled: u64,
    /// The start, by boot counter, that was accepted with it.
    pub settled_boot: u64,
    /// The mark that it offers.
    pub offered: u64,
}

/// What comparing says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// It is the pool that was accepted last, or a later start of it.
    Same,
    /// It is an older copy, for certain: also when what is known here is not the newest.
    RolledBack,
    /// It knows of a start that is not known here.
    Unknown,
}

impl Marks {
    /// Those of a report.
    pub fn of(command: &NodeBooted) -> Self {
        let NodeBooted { settled, settled_boot, offered, .. } = *command;
        Self { settled, settled_boot, offered }
    }
}

impl Pool {
    /// Compares a start with what was accepted last.
    pub fn past_of(&self, boot_counter: u64, incarnation: u64, marks: Marks) -> Past {
        let same_start = boot_counter == self.boot_counter;
        if boot_counter < self.boot_counter || (same_start && incarnation != self.incarnation) {
            return Past::RolledBack;
        }
        if self.mark == 0 {
            return Past::Same;
        }
        if marks.settled_boot > self.boot_counter {
            return Past::Unknown;
        }
        // Accepted with the mark it offered, but it did not live to note it: else what it noted.
        let noted = marks.settled_boot == self.boot_counter;
        let mark = if noted { marks.settled } else { marks.offered };
        if mark == self.mark { Past::Same } else { Past::RolledBack }
    }
}
