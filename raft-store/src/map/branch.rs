//! Branches, pins, and the two questions asked of them: is a version visible, is it still needed.
//!
//! Sequences are family-wide, so on any line of ancestors a newer branch has newer sequences: of the
//! visible versions of a block the one with the highest sequence is the block's content.

use std::collections::{BTreeMap, BTreeSet};

use super::version::Version;

/// Branch numbers are 24 bits on disk.
pub(super) const BRANCH_MAX: u32 = (1 << 24) - 1;

#[derive(Clone, Debug)]
pub(super) struct Branch {
    /// 0 = none.
    pub parent: u32,
    /// What the branch sees of its parent: sequences up to this one.
    pub fork: u64,
    /// Written to, or read at its newest state; else only its pins and children matter.
    pub head: bool,
    depth: u32,
    /// An ancestor far up (skew-binary jump pointer): ancestor tests take O(log depth).
    jump: u32,
    /// Ascending.
    children: Vec<u32>,
}

/// The branch table and everything that keeps versions alive.
#[derive(Clone, Debug)]
pub(super) struct Branches {
    table: BTreeMap<u32, Branch>,
    /// How often (branch, sequence) is pinned, snapshots included.
    pins: BTreeMap<(u32, u64), u32>,
    snapshots: BTreeSet<(u32, u64)>,
    /// Ids are never used twice: the next one.
    next: u32,
}

impl Branches {
    pub fn with_root(root: u32) -> Self {
        let mut branches = Self::empty(root);
        branches.insert(root, 0, 0, true);
        branches
    }

    pub fn empty(next: u32) -> Self {
        Self { table: BTreeMap::new(), pins: BTreeMap::new(), snapshots: BTreeSet::new(), next }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Branch)> {
        self.table.iter().map(|(&id, branch)| (id, branch))
    }

    pub fn next_id(&self) -> u32 {
        self.next
    }

    pub fn snapshots(&self) -> impl Iterator<Item = (u32, u64)> {
        self.snapshots.iter().copied()
    }

    pub fn contains(&self, branch: u32) -> bool {
        self.table.contains_key(&branch)
    }

    /// Written to, and sees no other branch: what its head page does not have is a hole.
    pub fn stands_alone(&self, branch: u32) -> bool {
        self.table.get(&branch).is_some_and(|branch| branch.parent == 0 && branch.head)
    }

    /// One branch only: liveness needs no other page than the one that is merged.
    pub fn is_single(&self) -> bool {
        self.table.len() == 1
    }

    /// Pins that end with the process.
    pub fn has_volatile_pins(&self) -> bool {
        self.pins.values().map(|&count| count as usize).sum::<usize>() > self.snapshots.len()
    }

    /// Adds a branch; parents come first. `false` when it can't be: the bytes it came from are bad.
    pub fn insert(&mut self, id: u32, parent: u32, fork: u64, head: bool) -> bool {
        if id == 0 || id > BRANCH_MAX || self.table.contains_key(&id) || parent >= id {
            return false;
        }
        let (depth, jump) = match self.table.get(&parent) {
            None if parent != 0 => return false,
            None => (0, id),
            Some(above) => {
                let far = &self.table[&above.jump];
                let farther = &self.table[&far.jump];
                let even = above.depth - far.depth == far.depth - farther.depth;
                (above.depth + 1, if even { far.jump } else { parent })
            }
        };
        if let Some(above) = self.table.get_mut(&parent) {
            above.children.push(id);
        }
        let branch = Branch { parent, fork, head, depth, jump, children: Vec::new() };
        self.table.insert(id, branch);
        self.next = self.next.max(id + 1);
        true
    }

    /// A new branch that sees `parent` up to `fork`.
    pub fn fork(&mut self, parent: u32, fork: u64) -> u32 {
        let id = self.next;
        assert!(self.insert(id, parent, fork, true), "the parent exists, ids only grow");
        id
    }

    /// The branch is not written any more, and its newest state is nobody's.
    pub fn retire(&mut self, branch: u32) {
        self.table.get_mut(&branch).expect("the caller named a branch").head = false;
    }

    /// Nothing is needed any more.
    pub fn let_go(&mut self) {
        self.pins.clear();
        self.snapshots.clear();
        self.table.values_mut().for_each(|branch| branch.head = false);
    }

    pub fn pin(&mut self, branch: u32, sequence: u64) {
        *self.pins.entry((branch, sequence)).or_default() += 1;
    }

    pub fn unpin(&mut self, branch: u32, sequence: u64) {
        let count = self.pins.get_mut(&(branch, sequence)).expect("pinned once per unpin");
        *count -= 1;
        if *count == 0 {
            self.pins.remove(&(branch, sequence));
        }
    }

    /// A pin that outlives the process.
    pub fn add_snapshot(&mut self, branch: u32, sequence: u64) {
        if self.snapshots.insert((branch, sequence)) {
            self.pin(branch, sequence);
        }
    }

    pub fn remove_snapshot(&mut self, branch: u32, sequence: u64) -> bool {
        let was = self.snapshots.remove(&(branch, sequence));
        if was {
            self.unpin(branch, sequence);
        }
        was
    }

    /// Up to which sequence a view of `branch` at `at` sees versions of `of`; `None` = not at all.
    pub fn limit(&self, branch: u32, at: u64, of: u32) -> Option<u64> {
        if branch == of {
            return Some(at);
        }
        let (above, mut id) = (self.table.get(&of)?, branch);
        let mut below = self.table.get(&id)?;
        if below.depth <= above.depth {
            return None;
        }
        while below.depth > above.depth + 1 {
            let far = &self.table[&below.jump];
            id = if far.depth > above.depth { below.jump } else { below.parent };
            below = &self.table[&id];
        }
        (below.parent == of).then_some(below.fork)
    }

    fn pinned(&self, branch: u32, from: u64, below: u64) -> bool {
        self.pins.range((branch, from)..(branch, below)).next().is_some()
    }

    /// Marks which versions of one block are needed. `versions` are all versions of that block,
    /// ascending by (branch, sequence); with a single branch the newest one of it and whatever else
    /// is to be judged suffice. Tombstones up to `floor` are only kept over something.
    pub fn judge(&self, versions: &[Version], floor: u64, kept: &mut Vec<bool>) {
        kept.clear();
        let mut seen = None;
        for (i, version) in versions.iter().enumerate() {
            let next = versions.get(i + 1).filter(|next| next.branch == version.branch);
            let end = next.map_or(u64::MAX, |next| next.sequence);
            let mut live = self.pinned(version.branch, version.sequence, end);
            if let Some(branch) = self.table.get(&version.branch)
                && !live
            {
                live = branch.head && end == u64::MAX;
                if !live && !branch.children.is_empty() {
                    let seen = seen.get_or_insert_with(|| First::of(versions));
                    live = self.child_sees(branch, version.sequence, end, seen);
                }
            }
            if live && version.is_tombstone() && version.sequence <= floor {
                let beneath = versions[..i].iter().zip(kept.iter());
                live = beneath.filter(|(_, kept)| **kept).any(|(older, _)| {
                    let limit = self.limit(version.branch, version.sequence, older.branch);
                    limit.is_some_and(|limit| older.sequence <= limit)
                });
            }
            kept.push(live);
        }
    }

    /// Whether a child that forked in [from, end) sees through its own versions to there.
    fn child_sees(&self, branch: &Branch, from: u64, end: u64, first: &First) -> bool {
        let mut open = Vec::new();
        let push = |children: &[u32], from: u64, end: u64, open: &mut Vec<u32>| {
            open.extend(children.iter().filter(|child| {
                let fork = self.table[child].fork;
                from <= fork && fork < end
            }));
        };
        push(&branch.children, from, end, &mut open);
        while let Some(id) = open.pop() {
            let child = &self.table[&id];
            let end = first.sequence(id);
            if self.pinned(id, 0, end) || (child.head && end == u64::MAX) {
                return true;
            }
            push(&child.children, 0, end, &mut open);
        }
        false
    }
}

/// The oldest version that each branch has of one block.
struct First(BTreeMap<u32, u64>);

impl First {
    fn of(versions: &[Version]) -> Self {
        let mut first = BTreeMap::new();
        for version in versions {
            first.entry(version.branch).or_insert(version.sequence);
        }
        Self(first)
    }

    fn sequence(&self, branch: u32) -> u64 {
        self.0.get(&branch).copied().unwrap_or(u64::MAX)
    }
}
