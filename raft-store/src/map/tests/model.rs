//! The dumb model: every version ever, every view, everything looked up by brute force.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    pub place: u64,
    pub crc: u32,
}

#[derive(Clone, Debug)]
pub struct ModelBranch {
    pub parent: Option<(u32, u64)>,
    pub head: bool,
}

#[derive(Clone, Default)]
pub struct Model {
    /// (block, branch, sequence) -> payload or hole.
    pub versions: BTreeMap<(u64, u32, u64), Option<Data>>,
    pub branches: BTreeMap<u32, ModelBranch>,
    /// Pinned (branch, sequence), pins and snapshots.
    pub views: Vec<(u32, u64)>,
}

impl Model {
    pub fn new() -> Self {
        let mut model = Self::default();
        model.branches.insert(1, ModelBranch { parent: None, head: true });
        model
    }

    /// (branch, sequence, content) of the visible version.
    pub fn visible(&self, branch: u32, at: u64, block: u64) -> Option<(u32, u64, Option<Data>)> {
        let (mut branch, mut at) = (branch, at);
        loop {
            let range = (block, branch, 0)..=(block, branch, at);
            if let Some((key, data)) = self.versions.range(range).next_back() {
                return Some((key.1, key.2, *data));
            }
            let (parent, fork) = self.branches[&branch].parent?;
            (branch, at) = (parent, at.min(fork));
        }
    }

    pub fn all_views(&self) -> Vec<(u32, u64)> {
        let heads = self.branches.iter().filter(|(_, branch)| branch.head);
        let heads = heads.map(|(&id, _)| (id, u64::MAX - 1));
        heads.chain(self.views.iter().copied()).collect()
    }

    /// Places that some view shows.
    pub fn needed(&self, blocks: &BTreeSet<u64>) -> BTreeSet<u64> {
        let views = self.all_views();
        let pairs = blocks.iter().flat_map(|&block| views.iter().map(move |view| (block, *view)));
        let seen = pairs.filter_map(|(block, (branch, at))| self.visible(branch, at, block)?.2);
        seen.map(|data| data.place).collect()
    }
}
