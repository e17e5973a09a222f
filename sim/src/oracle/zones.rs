//! Is the history of one block that of a register?
//!
//! Every write of data has a value of its own, so each read names the write that it saw. A write and
//! its reads together form a *zone*: from the first end of any of them (by then the value was there)
//! to the last start of any of them (then it was still there). A history is linearizable exactly when
//!
//! 1. no read ends before its write begins,
//! 2. no two zones that run forward (first end before last start) overlap,
//! 3. no zone that runs backward lies wholly inside a forward one.
//!
//! (Gibbons and Korach, Testing shared memories, 1997.) A write without an answer that nobody saw
//! may never have happened and is left out; one that was seen ended at the latest when it was seen.
//!
//! Zeroes are not unique: every completed write of zeroes counts under rule 3 as a zone of its own,
//! and a read of zeroes needs one possible source that nothing surely overwrote in between.

use crate::oracle::WriteId;

/// A write as one block sees it. Times are numbers of the oracle's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockWrite {
    pub(crate) id: WriteId,
    pub(crate) zeroes: bool,
    pub(crate) began: u64,
    /// When it was surely in effect; `u64::MAX` when it may never have been.
    pub(crate) in_effect: u64,
    pub(crate) refused: bool,
}

/// A read as one block sees it; `None` is zeroes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockRead {
    pub(crate) saw: Option<WriteId>,
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

/// What is wrong with a block's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// A read returned what nobody had written there by then.
    NeverWritten(WriteId),
    /// A read returned a write that was refused.
    WasRefused(WriteId),
    /// `newer` was surely in effect, and `old` was read later.
    Stale { old: WriteId, newer: WriteId },
    /// A read returned zeroes that something had surely overwritten.
    StaleZeroes { newer: WriteId },
}

#[derive(Clone, Copy)]
struct Zone {
    id: WriteId,
    zeroes: bool,
    began: u64,
    first_end: u64,
    last_start: u64,
}

impl Zone {
    fn is_forward(&self) -> bool {
        self.first_end < self.last_start
    }
}

/// Checks one block. `writes` are all of its writes in the order of their ids, `reads` all of its
/// reads that were answered.
pub(crate) fn check(writes: &[BlockWrite], reads: &[BlockRead]) -> Result<(), Wrong> {
    let zone = |write: &BlockWrite| Zone {
        id: write.id,
        zeroes: write.zeroes,
        began: write.began,
        first_end: write.in_effect,
        last_start: write.began,
    };
    let mut zones: Vec<Zone> = writes.iter().map(zone).collect();
    for read in reads {
        let Some(id) = read.saw else { continue };
        let index = writes.binary_search_by_key(&id, |write| write.id);
        let index = index.map_err(|_| Wrong::NeverWritten(id))?;
        if writes[index].refused {
            return Err(Wrong::WasRefused(id));
        }
        if read.ended < writes[index].began {
            return Err(Wrong::NeverWritten(id));
        }
        let zone = &mut zones[index];
        zone.first_end = zone.first_end.min(read.ended);
        zone.last_start = zone.last_start.max(read.began);
    }
    // What nobody saw and nobody was promised may never have happened.
    zones.retain(|zone| zone.first_end != u64::MAX);
    let zeroes = Zeroes::of(writes, &zones);
    for read in reads.iter().filter(|read| read.saw.is_none()) {
        zeroes.check(read)?;
    }
    check_zones(&mut zones)
}

fn check_zones(zones: &mut [Zone]) -> Result<(), Wrong> {
    zones.sort_by_key(|zone| zone.first_end.min(zone.last_start));
    let forward: Vec<Zone> = zones.iter().copied().filter(Zone::is_forward).collect();
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_start {
            return Err(Wrong::Stale { old: pair[0].id, newer: pair[1].id });
        }
    }
    let mut candidates = forward.iter().peekable();
    for zone in zones.iter().filter(|zone| !zone.is_forward()) {
        // Forward zones don't overlap: only the first that ends after this one begins can hold it.
        while candidates.peek().is_some_and(|held| held.last_start <= zone.last_start) {
            candidates.next();
        }
        if let Some(held) = candidates.peek()
            && held.first_end < zone.last_start
            && zone.first_end < held.last_start
        {
            return Err(Wrong::Stale { old: held.id, newer: zone.id });
        }
    }
    Ok(())
}

/// What decides whether a read may have seen zeroes.
struct Zeroes {
    /// Writes of data by when they were surely in effect; with each, which of those so far began
    /// last.
    overwrites: Vec<(u64, u64, WriteId)>,
    /// Writes of zeroes by their begin; with each, until when one of those so far may have happened.
    sources: Vec<(u64, u64)>,
}

impl Zeroes {
    fn of(writes: &[BlockWrite], zones: &[Zone]) -> Self {
        let mut data: Vec<&Zone> = zones.iter().filter(|zone| !zone.zeroes).collect();
        data.sort_by_key(|zone| zone.first_end);
        let mut last = (0, WriteId(0));
        let overwrites = data.iter().map(|zone| {
            last = last.max((zone.began, zone.id));
            (zone.first_end, last.0, last.1)
        });
        let overwrites = overwrites.collect();
        let mut until = 0;
        let sources = writes.iter().filter(|write| write.zeroes && !write.refused).map(|write| {
            until = until.max(write.in_effect);
            (write.began, until)
        });
        Self { overwrites, sources: sources.collect() }
    }

    /// Zeroes need a source that nothing surely overwrote before `read` began.
    fn check(&self, read: &BlockRead) -> Result<(), Wrong> {
        let before = self.overwrites.partition_point(|(first_end, ..)| *first_end < read.began);
        // The volume began as zeroes.
        let Some((_, last_began, newer)) = self.overwrites[..before].last() else { return Ok(()) };
        let begun = self.sources.partition_point(|(began, _)| *began <= read.ended);
        match self.sources[..begun].last() {
            Some((_, until)) if until >= last_began => Ok(()),
            _ => Err(Wrong::StaleZeroes { newer: *newer }),
        }
    }
}
