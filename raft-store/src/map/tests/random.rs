//! Random histories: write, trim, move, pin, fork, snapshot, merge, freeze, crash and replay, all
//! reads and the accounting compared with the model.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ballast_block::{BlockRange, BranchId, Sequence};

use super::disk::{Accounts, Disk};
use super::model::{Data, Model, ModelBranch};
use crate::map::{ExtentMap, FrozenMap, MapError, Move, PageCache, PinId, Run, RunContent, turn};
use crate::place::Place;

/// A small generator of pseudo-random numbers: the seed is the whole input.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// What is in the log: replayed after a crash.
#[derive(Clone, Debug)]
enum Logged {
    Write { branch: u32, sequence: u64, start: u64, place: u64, crcs: Vec<u32> },
    Trim { branch: u32, sequence: u64, start: u64, count: u64 },
    Snapshot { branch: u32, sequence: u64 },
    Unsnapshot { branch: u32, sequence: u64 },
    Fork { parent: u32, sequence: u64 },
    Retire { branch: u32 },
}

/// A state that a crash leads back to.
#[derive(Clone)]
struct Saved {
    model: Model,
    snapshots: Vec<(u32, u64)>,
    accounts: Accounts,
    /// Length of the log.
    log: usize,
}

/// How many live pages a map says it has, and how many the disk has, must agree.
fn count_pages(map: &ExtentMap<Disk>) -> usize {
    let state = map.state.borrow();
    let leaves = state.directory.leaves.iter().flatten();
    let of_leaf = |leaf: &super::super::directory::Leaf| {
        leaf.at.len() + leaf.ranges.iter().map(|range| range.slots().len()).sum::<usize>()
    };
    let runs = state.runs.iter().map(|run| run.pages.len()).sum::<usize>();
    leaves.map(|leaf| of_leaf(leaf)).sum::<usize>() + runs
}

pub struct Family {
    pub dice: Dice,
    disk: Rc<Disk>,
    pub map: ExtentMap<Disk>,
    cache_bytes: usize,
    model: Model,
    pins: Vec<(PinId, (u32, u64))>,
    snapshots: Vec<(u32, u64)>,
    pub sequence: u64,
    next_place: u64,
    blocks: BTreeSet<u64>,
    log: Vec<Logged>,
    /// The last durable checkpoint.
    durable: Option<(Vec<u8>, Saved)>,
    frozen: Option<(FrozenMap, Saved)>,
    many_branches: bool,
}

const SPOTS: [u64; 6] = [0, 256, 512 - 12, 256 * 5 + 100, 256 * 300, 256 * 700 + 250];

impl Family {
    pub fn new(seed: u64, many_branches: bool, cache_bytes: usize) -> Self {
        let disk = Rc::new(Disk::default());
        let map = ExtentMap::new(disk.clone(), &PageCache::new(cache_bytes));
        Self {
            dice: Dice::new(seed),
            disk,
            map,
            cache_bytes,
            model: Model::new(),
            pins: Vec::new(),
            snapshots: Vec::new(),
            sequence: 0,
            next_place: 1,
            blocks: BTreeSet::new(),
            log: Vec::new(),
            durable: None,
            frozen: None,
            many_branches,
        }
    }

    fn some_range(&mut self) -> (u64, u64) {
        let spot = SPOTS[self.dice.roll(SPOTS.len() as u64) as usize];
        let count = match self.dice.roll(20) {
            0 => 1 + self.dice.roll(256),
            1..5 => 1 + self.dice.roll(40),
            _ => 1 + self.dice.roll(3),
        };
        (spot + self.dice.roll(24), count)
    }

    fn some_head(&mut self) -> u32 {
        let heads = self.model.branches.iter().filter(|(_, branch)| branch.head);
        let heads: Vec<u32> = heads.map(|(&id, _)| id).collect();
        heads[self.dice.roll(heads.len() as u64) as usize]
    }

    fn apply(&mut self, entry: &Logged) {
        self.apply_to_model(entry);
        apply_to_map(&self.map, entry);
    }

    fn apply_to_model(&mut self, entry: &Logged) {
        match *entry {
            Logged::Write { branch, sequence, start, place, ref crcs } => {
                for (i, &crc) in (0..).zip(crcs) {
                    self.blocks.insert(start + i);
                    let data = Data { place: place + i, crc };
                    self.model.versions.insert((start + i, branch, sequence), Some(data));
                    assert!(self.disk.accounts.borrow_mut().live.insert(place + i));
                }
            }
            Logged::Trim { branch, sequence, start, count } => {
                for &block in self.blocks.range(start..start + count) {
                    self.model.versions.insert((block, branch, sequence), None);
                }
            }
            Logged::Snapshot { branch, sequence } => {
                self.snapshots.push((branch, sequence));
                self.model.views.push((branch, sequence));
            }
            Logged::Unsnapshot { branch, sequence } => {
                self.snapshots.retain(|&one| one != (branch, sequence));
                self.forget((branch, sequence));
            }
            Logged::Fork { parent, sequence } => {
                let branch = ModelBranch { parent: Some((parent, sequence)), head: true };
                let id = self.model.branches.keys().next_back().unwrap() + 1;
                self.model.branches.insert(id, branch);
            }
            Logged::Retire { branch } => {
                self.model.branches.get_mut(&branch).unwrap().head = false;
            }
        }
    }

    fn forget(&mut self, view: (u32, u64)) {
        let at = self.model.views.iter().position(|&one| one == view).unwrap();
        self.model.views.remove(at);
    }

    fn log(&mut self, entry: Logged) {
        self.apply(&entry);
        self.log.push(entry);
    }

    pub fn write(&mut self) {
        let entry = self.some_write();
        self.log(entry);
    }

    fn some_write(&mut self) -> Logged {
        let (start, count) = self.some_range();
        let branch = self.some_head();
        self.sequence += 1 + self.dice.roll(2);
        let place = self.next_place;
        self.next_place += count + self.dice.roll(2);
        let crcs = (0..count).map(|_| self.dice.roll(1 << 32) as u32).collect();
        let sequence = self.sequence;
        Logged::Write { branch, sequence, start, place, crcs }
    }

    pub fn trim(&mut self) {
        let (start, count) = match self.dice.roll(8) {
            0 => (0, 1 << 30),
            1 => (self.dice.roll(1000), 256 * 100 + self.dice.roll(256 * 700)),
            2 => (0, 256 * 8),
            _ => self.some_range(),
        };
        let branch = self.some_head();
        self.sequence += 1;
        self.log(Logged::Trim { branch, sequence: self.sequence, start, count });
    }

    /// The cleaner takes some live places and moves them.
    pub async fn relocate(&mut self) {
        let versions = self.model.versions.iter();
        let data = versions.filter_map(|(&key, data)| Some((key, (*data)?)));
        let live = self.disk.accounts.borrow().live.clone();
        let live: Vec<_> = data.filter(|(_, data)| live.contains(&data.place)).collect();
        for _ in 0..self.dice.roll(12) {
            if live.is_empty() {
                return;
            }
            let ((block, branch, sequence), data) =
                live[self.dice.roll(live.len() as u64) as usize];
            let key = (BranchId(branch), Sequence(sequence));
            // It is in the accounts, so some version lies there, needed or not merged away yet.
            let current = self.model.versions[&(block, branch, sequence)].unwrap();
            if current.place != data.place {
                continue;
            }
            assert_eq!(self.map.holds(block, Place(data.place)).await.unwrap(), Some(key));
            let to = self.next_place;
            self.next_place += 1;
            self.disk.accounts.borrow_mut().live.insert(to);
            let (from, to) = (Place(data.place), Place(to));
            self.map.relocate(&[Move { block, branch: key.0, sequence: key.1, from, to }]);
            let moved = Data { place: to.0, ..data };
            self.model.versions.insert((block, branch, sequence), Some(moved));
        }
    }

    /// With nothing going on, the disk has the pages of the root and no others.
    async fn settle_pages(&mut self) {
        self.map.merge(0).await.unwrap();
        for _ in 0..4 {
            self.checkpoint().await;
        }
        if self.frozen.is_some() {
            self.checkpoint().await;
        }
        assert_eq!(count_pages(&self.map), self.disk.pages.borrow().len(), "pages leaked");
        assert_eq!(self.map.dirty_bytes(), 0);
        assert!(self.map.state.borrow().runs.is_empty(), "merged changes are kept on disk");
        assert!(self.map.cache.bytes() <= self.cache_bytes, "cache over its limit");
    }

    fn change_views(&mut self) {
        let branch = self.some_head();
        match self.dice.roll(if self.many_branches { 9 } else { 4 }) {
            0 => {
                let view = (branch, self.sequence);
                let pin = self.map.pin(BranchId(view.0), Sequence(view.1));
                self.pins.push((pin, view));
                self.model.views.push(view);
            }
            1 if !self.pins.is_empty() => {
                let at = self.dice.roll(self.pins.len() as u64) as usize;
                let (pin, view) = self.pins.swap_remove(at);
                self.map.unpin(pin);
                self.forget(view);
            }
            2 | 4 if !self.snapshots.contains(&(branch, self.sequence)) => {
                self.log(Logged::Snapshot { branch, sequence: self.sequence });
            }
            3 if !self.snapshots.is_empty() => {
                let at = self.dice.roll(self.snapshots.len() as u64) as usize;
                let (branch, sequence) = self.snapshots[at];
                self.log(Logged::Unsnapshot { branch, sequence });
            }
            5 | 6 if !self.snapshots.is_empty() => {
                let at = self.dice.roll(self.snapshots.len() as u64) as usize;
                let (parent, sequence) = self.snapshots[at];
                self.log(Logged::Fork { parent, sequence });
            }
            7 => self.log(Logged::Fork { parent: branch, sequence: self.sequence }),
            8 if self.model.branches.values().filter(|branch| branch.head).count() > 1 => {
                self.log(Logged::Retire { branch });
            }
            _ => {}
        }
    }

    fn saved(&self) -> Saved {
        let mut model = self.model.clone();
        // Pins end with the process.
        model.views = self.snapshots.clone();
        let (snapshots, log) = (self.snapshots.clone(), self.log.len());
        Saved { model, snapshots, accounts: self.disk.accounts.borrow().clone(), log }
    }

    async fn checkpoint(&mut self) {
        match self.frozen.take() {
            None => self.frozen = Some((self.map.freeze(), self.saved())),
            Some((frozen, saved)) => {
                let target = self.dice.roll(6000) as usize;
                let writing = self.map.write_frozen(frozen);
                let (root, merged) =
                    futures_util::future::join(writing, self.map.merge(target)).await;
                merged.unwrap();
                let root = root.unwrap();
                self.disk.checkpointed();
                self.durable = Some((root, saved));
                self.disk.remember();
            }
        }
    }

    async fn crash(&mut self) {
        self.frozen = None;
        self.pins.clear();
        let cache = PageCache::new(self.cache_bytes);
        let from = match self.durable.clone() {
            Some((root, saved)) => {
                self.disk = Rc::new(self.disk.reboot(saved.accounts));
                let map = ExtentMap::load(&root, self.disk.clone(), &cache).await;
                self.map = map.unwrap();
                self.model = saved.model;
                self.snapshots = saved.snapshots;
                saved.log
            }
            None => {
                self.disk = Rc::new(Disk::default());
                self.map = ExtentMap::new(self.disk.clone(), &cache);
                self.model = Model::new();
                self.snapshots.clear();
                0
            }
        };
        for entry in self.log.split_off(from) {
            self.log(entry);
        }
    }

    async fn look(&mut self) {
        let views = self.model.all_views();
        let (branch, at) = views[self.dice.roll(views.len() as u64) as usize];
        let (start, count) = self.some_range();
        self.compare(branch, at, start, count).await;
    }

    async fn compare(&self, branch: u32, at: u64, start: u64, count: u64) {
        let asked = (at < u64::MAX - 1).then_some(Sequence(at));
        let range = BlockRange::new(start, count as u32);
        let runs = self.map.lookup(BranchId(branch), asked, range).await.unwrap();
        self.check(branch, at, (start, start + count), &runs);
    }

    fn check(&self, branch: u32, at: u64, range: (u64, u64), runs: &[Run]) {
        let mut block = range.0;
        for run in runs {
            assert_eq!(run.start, block);
            for i in 0..u64::from(run.count) {
                let expected = self.model.visible(branch, at, block);
                match &run.what {
                    RunContent::Hole => {
                        assert_eq!(expected.and_then(|version| version.2), None, "block {block}");
                    }
                    RunContent::Data { first, versions } => {
                        let version = versions[i as usize];
                        let data = Data { place: first.0 + i, crc: version.crc };
                        let found = (version.branch.0, version.sequence.0, Some(data));
                        assert_eq!(expected, Some(found), "block {block} of {branch} at {at}");
                    }
                }
                block += 1;
            }
        }
        assert_eq!(block, range.1);
    }

    async fn compare_all(&self) {
        for (branch, at) in self.model.all_views() {
            for spot in SPOTS {
                self.compare(branch, at, spot, 280).await;
            }
        }
    }

    /// The quiet point: nothing is live that no view shows.
    async fn account(&mut self) {
        self.map.merge(0).await.unwrap();
        assert_eq!(self.map.delta_bytes(), 0);
        let needed = self.model.needed(&self.blocks);
        let live = &self.disk.accounts.borrow().live;
        let lost: Vec<_> = needed.difference(live).collect();
        let leaked: Vec<_> = live.difference(&needed).collect();
        assert!(lost.is_empty() && leaked.is_empty(), "lost {lost:?}, leaked {leaked:?}");
    }

    /// A pinned view minus what was known at an earlier sequence, applied to that, is the view.
    async fn diff(&mut self) {
        if self.pins.is_empty() {
            return;
        }
        let (pin, (branch, at)) = self.pins[self.dice.roll(self.pins.len() as u64) as usize];
        let since = self.dice.roll(at + 1);
        let (mut from, mut changed) = (0, BTreeMap::new());
        loop {
            let max = 1 + self.dice.roll(300) as usize;
            let page = match self.map.diff(pin, Sequence(since), from, max).await {
                Err(MapError::DiffTooOld { floor, .. }) => {
                    assert!(since > 0 && since < floor.0 && floor.0 <= self.sequence);
                    return;
                }
                page => page.unwrap(),
            };
            for run in page.runs {
                for i in 0..u64::from(run.count) {
                    let data = run.data.as_ref();
                    let data = data.map(|data| (data.first.0 + i, data.crcs[i as usize]));
                    assert!(run.sequence.0 > since);
                    let version = (run.branch.0, run.sequence.0, data);
                    assert_eq!(changed.insert(run.start + i, version), None);
                }
            }
            match page.next {
                Some(next) => from = next,
                None => break,
            }
        }
        for &block in &self.blocks {
            let expected = self.model.visible(branch, at, block);
            // The replica that was at `since` has this, under rules that know no pruning.
            let known = self.model.visible(branch, since, block).and_then(|version| version.2);
            let known = known.filter(|_| since > 0);
            let becomes = match changed.get(&block) {
                Some(&(_, _, data)) => data.map(|(place, crc)| Data { place, crc }),
                None => known,
            };
            assert_eq!(becomes, expected.and_then(|version| version.2), "block {block}");
        }
    }

    /// Merging while others write and read.
    async fn merge_busy(&mut self) {
        let target = self.dice.roll(4000) as usize;
        let none = ExtentMap::new(self.disk.clone(), &PageCache::new(0));
        let map = Rc::new(std::mem::replace(&mut self.map, none));
        let merging = map.clone();
        let merge = async move { merging.merge(target).await.unwrap() };
        let busy = async {
            for _ in 0..self.dice.roll(30) {
                turn().await;
                let entry = self.some_write();
                let Logged::Write { branch, start, ref crcs, .. } = entry else { unreachable!() };
                let (branch, range) = (BranchId(branch), BlockRange::new(start, crcs.len() as u32));
                self.apply_to_model(&entry);
                apply_to_map(&map, &entry);
                let runs = map.lookup(branch, None, range).await.unwrap();
                self.check(branch.0, u64::MAX - 1, (range.start, range.end()), &runs);
                self.log.push(entry);
            }
        };
        futures_util::future::join(merge, busy).await;
        self.map = Rc::into_inner(map).unwrap();
    }

    async fn step(&mut self) {
        match self.dice.roll(1000) {
            0..500 => self.write(),
            500..550 => self.trim(),
            550..620 => self.relocate().await,
            620..697 => self.change_views(),
            697..700 => {
                let floor = Sequence(self.dice.roll(self.sequence + 1));
                self.map.forget_tombstones(floor);
            }
            700..800 => self.look().await,
            800..840 => self.diff().await,
            840..880 => self.merge_busy().await,
            880..920 => {
                let target = self.dice.roll(3000) as usize;
                self.map.merge(target).await.unwrap();
            }
            920..970 => self.checkpoint().await,
            970..980 => self.crash().await,
            980..987 => self.account().await,
            987..990 => self.settle_pages().await,
            _ => self.compare_all().await,
        }
    }
}

fn apply_to_map(map: &ExtentMap<Disk>, entry: &Logged) {
    match *entry {
        Logged::Write { branch, sequence, start, place, ref crcs } => {
            let range = BlockRange::new(start, crcs.len() as u32);
            map.write(BranchId(branch), Sequence(sequence), range, Place(place), crcs);
        }
        Logged::Trim { branch, sequence, start, count } => {
            map.trim(BranchId(branch), Sequence(sequence), start, count);
        }
        Logged::Snapshot { branch, sequence } => {
            map.add_snapshot(BranchId(branch), Sequence(sequence));
        }
        Logged::Unsnapshot { branch, sequence } => {
            assert!(map.remove_snapshot(BranchId(branch), Sequence(sequence)));
        }
        Logged::Fork { parent, sequence } => {
            map.fork(BranchId(parent), Sequence(sequence));
        }
        Logged::Retire { branch } => map.retire_branch(BranchId(branch)),
    }
}

pub fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn histories(seeds: std::ops::Range<u64>, steps: usize, many_branches: bool) {
    for seed in seeds {
        let cache_bytes = [2000, 1 << 20, 0][seed as usize % 3];
        let mut family = Family::new(seed, many_branches, cache_bytes);
        family.disk.slow.set(seed as usize % 2);
        run(async {
            for _ in 0..steps {
                family.step().await;
            }
            family.compare_all().await;
            family.account().await;
            family.settle_pages().await;
            (0..40).for_each(|_| family.write());
            family.map.wipe().await.unwrap();
            family.disk.checkpointed();
            assert!(family.disk.accounts.borrow().live.is_empty());
            assert!(family.disk.pages.borrow().is_empty());
        });
    }
}

#[test]
fn one_branch() {
    histories(0..9, 1500, false);
}

#[test]
fn many_branches() {
    histories(100..109, 1000, true);
}
