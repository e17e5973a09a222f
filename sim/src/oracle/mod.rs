//! The judge of what hosts see: guarantees **linearizable**, **atomic-write**, **fenced**, **one-writer**
//! and **never-format-data**.
//!
//! Hosts tell it when an operation begins and how it ends; it keeps the history of every block and
//! finds whether some order of all operations explains it. What it knows of a write:
//! - answered: it is in effect from then on, until a later write;
//! - failed or without answer: it may have happened at any time from its begin, or never; once it
//!   was seen it stays. A host that repeats it does a second write;
//! - refused (no space, fenced: the status says that nothing was done): nobody may ever see it.
//!
//! A write is one moment for all its blocks, and so is a read. Times are numbers that only order
//! begins and ends, drawn in the order of true time.

mod content;
pub mod stamp;
mod violation;
mod zones;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use ballast_block::BlockRange;

use crate::oracle::content::Contents;
use crate::oracle::zones::{BlockRead, BlockWrite, Wrong};

pub use crate::oracle::violation::Violation;

/// One write of a host; the value of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub u64);

/// One read of a host in progress.
#[derive(Clone, Copy, Debug)]
pub struct ReadToken {
    volume: u64,
    range: BlockRange,
    began: u64,
}

impl ReadToken {
    /// What is being read.
    pub fn range(&self) -> BlockRange {
        self.range
    }
}

/// The contents of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Zeroes: never written, trimmed, or written so.
    Zero,
    /// The stamp of a write.
    Written(WriteId),
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Success was reported.
    Done,
    /// An error or no answer: it may have happened, and may yet.
    Unknown,
    /// An error that says that nothing happened and nothing will.
    Refused,
}

/// The histories of all volumes.
#[derive(Default)]
pub struct Oracle {
    time: Cell<u64>,
    writes: RefCell<Vec<Write>>,
    blocks: RefCell<BTreeMap<(u64, u64), Block>>,
    /// The attachments of each volume, the first one number 1.
    attachments: RefCell<BTreeMap<u64, Vec<Attachment>>>,
    /// The newest epoch of each volume that is known to have been in force.
    epochs: RefCell<BTreeMap<u64, u64>>,
    contents: Contents,
}

/// Under what a host writes, and what for.
#[derive(Clone, Copy, Debug)]
pub struct Author {
    /// The number that [`Oracle::attached`] gave to its attachment; `u64::MAX`: none is known.
    pub attachment: u64,
    /// The epoch of its lease; 0: without one.
    pub epoch: u64,
    /// Whether it makes a file system. What else is written is data.
    pub formats: bool,
}

/// When a host began to attach, and when it was told that it is. Of two that overlap nobody outside
/// knows which was admitted first.
#[derive(Clone, Copy)]
struct Attachment {
    began: u64,
    admitted: u64,
}

struct Write {
    author: Author,
    volume: u64,
    range: BlockRange,
    zeroes: bool,
    began: u64,
    in_effect: u64,
    /// When it was fenced: it happened before or never.
    deadline: u64,
    refused: bool,
    /// What had taken its author's place for certain when it began.
    fenced: Option<Fence>,
}

#[derive(Clone, Copy)]
enum Fence {
    /// A newer attachment.
    Attachment,
    /// A lease of that epoch.
    Epoch(u64),
}

#[derive(Default)]
struct Block {
    writes: Vec<WriteId>,
    reads: Vec<BlockRead>,
    /// Length of the history when it is to be checked again.
    check_at: usize,
}

/// A history is checked again when it has grown by one part in so many: checking it at every read
/// would take time by the square of its length.
const CHECK_GROWTH: usize = 32;

impl Oracle {
    fn next_time(&self) -> u64 {
        let time = self.time.get() + 1;
        self.time.set(time);
        time
    }

    /// A host begins to write `range` of `volume`; with zeroes, or with the stamps of the id.
    pub fn write_begins(&self, volume: u64, range: BlockRange, zeroes: bool) -> WriteId {
        self.write_begins_under(u64::MAX, volume, range, zeroes)
    }

    /// As [`Oracle::write_begins`], under the attachment that [`Oracle::attached`] numbered: if one
    /// that is newer for certain was admitted, nobody may ever see the write.
    pub fn write_begins_under(
        &self,
        attachment: u64,
        volume: u64,
        range: BlockRange,
        zeroes: bool,
    ) -> WriteId {
        let author = Author { attachment, epoch: 0, formats: false };
        self.write_begins_by(author, volume, range, zeroes)
    }

    /// The same for a write under a lease, or to make a file system. Nor may anybody ever see it if a
    /// newer epoch was in force for certain.
    pub fn write_begins_by(
        &self,
        author: Author,
        volume: u64,
        range: BlockRange,
        zeroes: bool,
    ) -> WriteId {
        let fenced = self.fence_of(author, volume);
        let began = self.next_time();
        let mut writes = self.writes.borrow_mut();
        // Id 0 stays free, so that a block of zeroes is no stamp.
        let id = WriteId(writes.len() as u64 + 1);
        let (in_effect, deadline) = (u64::MAX, u64::MAX);
        let refused = fenced.is_some();
        writes.push(Write {
            author,
            volume,
            range,
            zeroes,
            began,
            in_effect,
            deadline,
            refused,
            fenced,
        });
        let mut blocks = self.blocks.borrow_mut();
        for block in range.start..range.end() {
            blocks.entry((volume, block)).or_default().writes.push(id);
        }
        id
    }

    fn fence_of(&self, author: Author, volume: u64) -> Option<Fence> {
        let attachments = self.attachments.borrow();
        let all = attachments.get(&volume).map_or(&[][..], Vec::as_slice);
        let own = author.attachment.checked_sub(1).and_then(|nth| all.get(nth as usize));
        if own.is_some_and(|own| all.iter().any(|one| one.began > own.admitted)) {
            return Some(Fence::Attachment);
        }
        let newest = self.epochs.borrow().get(&volume).copied();
        let newer = newest.filter(|newest| author.epoch != 0 && *newest > author.epoch);
        newer.map(Fence::Epoch)
    }

    /// The write `id` ended.
    ///
    /// # Errors
    /// The guarantee that the history now breaks.
    pub fn write_ends(&self, id: WriteId, outcome: Outcome) -> Result<(), Violation> {
        let ended = self.next_time();
        let (author, volume) = {
            let mut writes = self.writes.borrow_mut();
            let write = &mut writes[(id.0 - 1) as usize];
            let (volume, epoch) = (write.volume, write.author.epoch);
            match (outcome, write.fenced) {
                (Outcome::Done, Some(Fence::Attachment)) => {
                    return Err(Violation::TwoWriters { volume, write: id });
                }
                (Outcome::Done, Some(Fence::Epoch(newer))) => {
                    return Err(Violation::OldEpoch { volume, write: id, epoch, newer });
                }
                (Outcome::Done, None) => {
                    self.note_effect(id, write, ended)?;
                    (write.author, volume)
                }
                (Outcome::Unknown, _) => return Ok(()),
                (Outcome::Refused, _) => {
                    write.refused = true;
                    return Ok(());
                }
            }
        };
        if author.epoch != 0 {
            self.epoch_in_force(volume, author.epoch);
        }
        Ok(())
    }

    /// The write is in effect, since `at` at the latest.
    fn note_effect(&self, id: WriteId, write: &mut Write, at: u64) -> Result<(), Violation> {
        let since = at.min(write.deadline);
        if since >= write.in_effect {
            return Ok(());
        }
        write.in_effect = since;
        let formats = write.author.formats.then_some(write.began);
        self.contents.in_effect(write.volume, id, since, formats)
    }

    /// A lease of `volume` with that epoch is in force: writes under older ones happened by now, or
    /// never will (guarantee **one-writer**).
    pub fn epoch_in_force(&self, volume: u64, epoch: u64) {
        let mut epochs = self.epochs.borrow_mut();
        let newest = epochs.entry(volume).or_default();
        if epoch <= *newest {
            return;
        }
        *newest = epoch;
        let now = self.next_time();
        for write in self.writes.borrow_mut().iter_mut() {
            if write.volume == volume && (1..epoch).contains(&write.author.epoch) {
                write.deadline = write.deadline.min(now);
            }
        }
    }

    /// A host begins to ask whether it may format.
    pub fn formatting_asked(&self) -> u64 {
        self.next_time()
    }

    /// Who began to ask then may format `volume`, as a blank one or as one that was begun before.
    ///
    /// # Errors
    /// [`Violation::MayFormat`], [`Violation::NotBlank`].
    pub fn formatting_granted(
        &self,
        volume: u64,
        asked: u64,
        blank: bool,
    ) -> Result<(), Violation> {
        self.contents.granted(volume, asked, blank)
    }

    /// A host begins to attach for writing.
    pub fn attach_begins(&self) -> u64 {
        self.next_time()
    }

    /// The attachment of `volume` that began then was admitted: writes of older ones happened by
    /// now, or never will (guarantee **fenced**). Answers its number.
    pub fn attached(&self, volume: u64, began: u64) -> u64 {
        let mut attachments = self.attachments.borrow_mut();
        let all = attachments.entry(volume).or_default();
        let admitted = self.next_time();
        let older = |number: u64| match number.checked_sub(1).and_then(|nth| all.get(nth as usize))
        {
            Some(one) => one.admitted < began,
            None => true,
        };
        let mut writes = self.writes.borrow_mut();
        for write in writes.iter_mut().filter(|write| write.volume == volume) {
            if older(write.author.attachment) {
                write.deadline = write.deadline.min(admitted);
            }
        }
        all.push(Attachment { began, admitted });
        all.len() as u64
    }

    /// As [`Oracle::attached`], of an attachment that began after all others were admitted.
    pub fn fence(&self, volume: u64) -> u64 {
        self.attached(volume, self.attach_begins())
    }

    /// A host begins to read.
    pub fn read_begins(&self, volume: u64, range: BlockRange) -> ReadToken {
        ReadToken { volume, range, began: self.next_time() }
    }

    /// The read returned `bytes`. A read that failed is simply never told.
    ///
    /// # Errors
    /// The guarantee that the history now breaks.
    pub fn read_ends(&self, read: ReadToken, bytes: &[u8]) -> Result<(), Violation> {
        let mut values = Vec::with_capacity(read.range.count as usize);
        for (block, bytes) in (read.range.start..).zip(bytes.chunks(4096)) {
            let value = stamp::recognise(read.volume, block, bytes);
            values.push(value.ok_or_else(|| not_of(read.volume, block, bytes))?);
        }
        assert_eq!(values.len(), read.range.count as usize, "a read returns what was asked for");
        self.read_ends_with(read, &values)
    }

    /// As [`Oracle::read_ends`], with the blocks' contents recognised already.
    ///
    /// # Errors
    /// The guarantee that the history now breaks.
    pub fn read_ends_with(&self, read: ReadToken, values: &[Value]) -> Result<(), Violation> {
        let ended = self.next_time();
        let seen = || (read.range.start..).zip(values.iter().copied());
        for (block, value) in seen() {
            let saw = match value {
                Value::Zero => None,
                Value::Written(id) => {
                    self.observe(read.volume, block, id, ended)?;
                    Some(id)
                }
            };
            let entry = BlockRead { saw, began: read.began, ended };
            let mut blocks = self.blocks.borrow_mut();
            blocks.entry((read.volume, block)).or_default().reads.push(entry);
        }
        for (block, value) in seen() {
            if let Value::Written(id) = value {
                self.check_whole(read.volume, id, block, seen())?;
            }
            if self.is_check_due(read.volume, block) {
                self.check_block(read.volume, block)?;
            }
        }
        Ok(())
    }

    fn is_check_due(&self, volume: u64, block: u64) -> bool {
        let mut blocks = self.blocks.borrow_mut();
        let history = blocks.entry((volume, block)).or_default();
        let length = history.writes.len() + history.reads.len();
        let due = length >= history.check_at;
        if due {
            history.check_at = length + length / CHECK_GROWTH;
        }
        due
    }

    /// Checks every block once more: what an unknown write did may show only in later reads.
    ///
    /// # Errors
    /// The first guarantee found broken.
    pub fn check_all(&self) -> Result<(), Violation> {
        let all: Vec<(u64, u64)> = self.blocks.borrow().keys().copied().collect();
        all.into_iter().try_for_each(|(volume, block)| self.check_block(volume, block))
    }

    /// Blocks of `volume` that were ever written, in runs of at most `longest` blocks.
    pub fn written(&self, volume: u64, longest: u32) -> Vec<BlockRange> {
        let mut runs: Vec<BlockRange> = Vec::new();
        for (_, block) in self.blocks.borrow().range((volume, 0)..=(volume, u64::MAX)).map(|e| e.0)
        {
            match runs.last_mut() {
                Some(run) if run.end() == *block && run.count < longest => run.count += 1,
                _ => runs.push(BlockRange::new(*block, 1)),
            }
        }
        runs
    }

    /// `id` was seen in one block: it is in effect in all of its blocks.
    fn observe(&self, volume: u64, block: u64, id: WriteId, at: u64) -> Result<(), Violation> {
        let ghost = Violation::Ghost { volume, block, write: id };
        let mut writes = self.writes.borrow_mut();
        let index = id.0.checked_sub(1).ok_or_else(|| ghost.clone())?;
        let write = writes.get_mut(index as usize).ok_or_else(|| ghost.clone())?;
        let there =
            write.volume == volume && (write.range.start..write.range.end()).contains(&block);
        if !there || write.zeroes {
            return Err(ghost);
        }
        if write.refused {
            return Err(Violation::Refused { volume, block, write: id });
        }
        self.note_effect(id, write, at)
    }

    /// One read that saw `id` in a block saw nothing in its other blocks that surely was older.
    fn check_whole(
        &self,
        volume: u64,
        id: WriteId,
        seen_in: u64,
        seen: impl Iterator<Item = (u64, Value)>,
    ) -> Result<(), Violation> {
        let writes = self.writes.borrow();
        let write = &writes[(id.0 - 1) as usize];
        for (block, value) in seen {
            let inside = (write.range.start..write.range.end()).contains(&block);
            if !inside || block == seen_in || value == Value::Written(id) {
                continue;
            }
            let older = match value {
                Value::Written(other) => writes[(other.0 - 1) as usize].in_effect < write.began,
                Value::Zero => !self.zeroes_may_follow(&writes, volume, block, write.began),
            };
            if older {
                return Err(Violation::Torn { volume, block, write: id });
            }
        }
        Ok(())
    }

    /// Whether a write of zeroes to `block` may have taken effect after `time`.
    fn zeroes_may_follow(&self, writes: &[Write], volume: u64, block: u64, time: u64) -> bool {
        let blocks = self.blocks.borrow();
        let Some(history) = blocks.get(&(volume, block)) else { return false };
        history.writes.iter().any(|id| {
            let write = &writes[(id.0 - 1) as usize];
            write.zeroes && !write.refused && write.in_effect > time
        })
    }

    fn check_block(&self, volume: u64, block: u64) -> Result<(), Violation> {
        let blocks = self.blocks.borrow();
        let Some(history) = blocks.get(&(volume, block)) else { return Ok(()) };
        let all = self.writes.borrow();
        let of_block = |id: &WriteId| {
            let write = &all[(id.0 - 1) as usize];
            BlockWrite {
                id: *id,
                zeroes: write.zeroes,
                began: write.began,
                in_effect: write.in_effect,
                refused: write.refused,
            }
        };
        let writes: Vec<BlockWrite> = history.writes.iter().map(of_block).collect();
        zones::check(&writes, &history.reads).map_err(|wrong| match wrong {
            Wrong::NeverWritten(write) => Violation::Ghost { volume, block, write },
            Wrong::WasRefused(write) => Violation::Refused { volume, block, write },
            Wrong::Stale { old, newer } => {
                Violation::Stale { volume, block, old: Some(old), newer }
            }
            Wrong::StaleZeroes { newer } => Violation::Stale { volume, block, old: None, newer },
        })
    }
}

/// What is wrong with contents that no write to that block made.
fn not_of(volume: u64, block: u64, bytes: &[u8]) -> Violation {
    match stamp::origin(bytes) {
        Some((of, write)) if of != volume => Violation::Foreign { volume, block, of, write },
        _ => Violation::Garbage { volume, block },
    }
}
