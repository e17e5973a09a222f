//! What each block may hold: the model that the volume is compared with.
//!
//! An acknowledged write leaves one possibility. A write without an answer adds one, until a read
//! has shown which it is; from then on that one must stay. Never talks to a server.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::pattern::Content;

/// Violations that are kept with their details; the others are only counted.
const KEPT: usize = 20;

/// One block's possibilities.
#[derive(Debug, Clone, Default)]
struct Block {
    allowed: Vec<Content>,
    /// Nothing is known: never written by us, and not said to be zero.
    unknown: bool,
}

/// A write that got no answer, and was not looked at since.
#[derive(Debug, Clone)]
pub struct Unanswered {
    /// Its blocks.
    pub blocks: Range<usize>,
    /// What it wrote.
    pub content: Content,
}

/// All blocks of the region, and what was found wrong.
pub struct Journal {
    blocks: Vec<Block>,
    unsettled: Vec<Unanswered>,
    ever_unanswered: BTreeSet<Content>,
    violations: Vec<String>,
    violation_count: u64,
}

impl Journal {
    /// A region of this many blocks, all zero or of unknown content.
    pub fn new(blocks: usize, zeroes: bool) -> Journal {
        let first = match zeroes {
            true => Block { allowed: vec![Content::Zero], unknown: false },
            false => Block { allowed: Vec::new(), unknown: true },
        };
        Journal {
            blocks: vec![first; blocks],
            unsettled: Vec::new(),
            ever_unanswered: BTreeSet::new(),
            violations: Vec::new(),
            violation_count: 0,
        }
    }

    /// A write was acknowledged: from now on it, and nothing else, is there.
    pub fn acknowledged(&mut self, blocks: Range<usize>, content: Content) {
        for block in &mut self.blocks[blocks] {
            *block = Block { allowed: vec![content], unknown: false };
        }
    }

    /// A write got no answer: it may be there, or come later, until it is looked at.
    pub fn unanswered(&mut self, blocks: Range<usize>, content: Content) {
        for block in &mut self.blocks[blocks.clone()] {
            block.allowed.push(content);
        }
        self.ever_unanswered.insert(content);
        self.unsettled.push(Unanswered { blocks, content });
    }

    /// The writes to look at before the next write is sent.
    pub fn unsettled(&self) -> Vec<Unanswered> {
        self.unsettled.clone()
    }

    /// A read over all blocks of an unanswered write: it must be there whole, or not at all.
    pub fn settle(&mut self, write: &Unanswered, found: &[Content]) {
        let states = &self.blocks[write.blocks.clone()];
        let only_new = |(block, content): (&Block, &Content)| {
            let could_be_old = block.allowed.iter().filter(|c| *c == content).count() > 1;
            *content == write.content && !could_be_old
        };
        let there = states.iter().zip(found).any(only_new);
        let missing = found.iter().any(|content| *content != write.content);
        if there && missing {
            let (blocks, content) = (&write.blocks, write.content);
            self.violation(format!(
                "torn: {content:?} of blocks {blocks:?} is there in part: {found:?}"
            ));
        }
        for (block, content) in write.blocks.clone().zip(found) {
            self.observed(block, *content);
        }
        self.unsettled.retain(|w| w.blocks != write.blocks || w.content != write.content);
    }

    /// A read answered with this: it must be allowed, and stays.
    pub fn observed(&mut self, index: usize, content: Content) {
        let block = &mut self.blocks[index];
        let fine = block.allowed.contains(&content)
            || (block.unknown && content != Content::Garbage)
            || (block.unknown && block.allowed.is_empty());
        let before = std::mem::replace(block, Block { allowed: vec![content], unknown: false });
        if fine {
            return;
        }
        let kind = match content {
            Content::Garbage => "corrupt",
            Content::Misplaced(_) => "misplaced",
            Content::Write(_) if self.ever_unanswered.contains(&content) => "ghost",
            Content::Write(_) | Content::Zero => "lost",
        };
        let allowed = before.allowed;
        self.violation(format!("{kind}: block {index} holds {content:?}, not one of {allowed:?}"));
    }

    /// Records something that must not happen.
    pub fn violation(&mut self, what: String) {
        self.violation_count += 1;
        if self.violations.len() < KEPT {
            self.violations.push(what);
        }
    }

    /// How many violations there were, and the first of them.
    pub fn violations(&self) -> (u64, &[String]) {
        (self.violation_count, &self.violations)
    }

    /// Blocks in the region.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether anything is known about this block.
    pub fn is_known(&self, block: usize) -> bool {
        !self.blocks[block].unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Content::{Garbage, Write, Zero};

    fn kinds(journal: &Journal) -> Vec<&str> {
        let (_, kept) = journal.violations();
        kept.iter().map(|v| v.split(':').next().unwrap()).collect()
    }

    #[test]
    fn an_acknowledged_write_must_be_there() {
        let mut journal = Journal::new(4, true);
        journal.acknowledged(0..2, Write(1));
        journal.acknowledged(1..2, Write(2));
        journal.observed(0, Write(1));
        journal.observed(1, Write(2));
        journal.observed(2, Zero);
        assert!(kinds(&journal).is_empty());
        journal.observed(1, Write(1));
        journal.observed(0, Zero);
        journal.observed(3, Garbage);
        assert_eq!(kinds(&journal), ["lost", "lost", "corrupt"]);
    }

    #[test]
    fn what_was_observed_stays() {
        for (first, second, expected) in
            [(Write(2), Write(1), "lost"), (Write(1), Write(2), "ghost")]
        {
            let mut journal = Journal::new(1, false);
            journal.acknowledged(0..1, Write(1));
            journal.unanswered(0..1, Write(2));
            journal.observed(0, first);
            assert!(kinds(&journal).is_empty());
            journal.observed(0, second);
            assert_eq!(kinds(&journal), [expected]);
        }
    }

    #[test]
    fn a_late_write_behind_a_newer_one_is_a_ghost() {
        let mut journal = Journal::new(1, true);
        journal.unanswered(0..1, Write(1));
        let write = journal.unsettled().remove(0);
        journal.settle(&write, &[Zero]);
        journal.acknowledged(0..1, Write(2));
        journal.observed(0, Write(1));
        assert_eq!(kinds(&journal), ["ghost"]);
    }

    #[test]
    fn an_unanswered_write_is_whole_or_absent() {
        for (found, expected) in [
            ([Write(9), Write(9)], vec![]),
            ([Zero, Write(1)], vec![]),
            ([Write(9), Write(1)], vec!["torn"]),
            ([Zero, Write(9)], vec!["torn"]),
        ] {
            let mut journal = Journal::new(2, true);
            journal.acknowledged(1..2, Write(1));
            journal.unanswered(0..2, Write(9));
            let write = journal.unsettled().remove(0);
            journal.settle(&write, &found);
            assert_eq!(kinds(&journal), expected, "{found:?}");
            assert!(journal.unsettled().is_empty());
        }
    }

    #[test]
    fn zeroes_over_zeroes_are_not_torn() {
        let mut journal = Journal::new(2, true);
        journal.acknowledged(1..2, Write(1));
        journal.unanswered(0..2, Zero);
        let write = journal.unsettled().remove(0);
        journal.settle(&write, &[Zero, Write(1)]);
        assert!(kinds(&journal).is_empty());
    }

    #[test]
    fn unknown_blocks_start_with_what_is_read() {
        let mut journal = Journal::new(1, false);
        journal.observed(0, Garbage);
        journal.observed(0, Garbage);
        assert!(kinds(&journal).is_empty());
        journal.observed(0, Zero);
        assert_eq!(kinds(&journal), ["lost"]);
    }
}
