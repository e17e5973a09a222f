//! Costs of the extent map: `cargo bench -p ballast-raft-store --bench map`. No disk: pages are
//! kept in memory and their bytes counted. Times are CPU time of the thread, so that other work on
//! the machine counts only through the caches; in us: of the clock, because too short. Numbers in docs/decisions/0002-extent-map.md.

#![allow(clippy::disallowed_methods, reason = "measures the real machine, is never simulated")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::rc::Rc;
use std::time::{Duration, Instant as Wall};

use ballast_block::{BlockRange, Sequence};
use ballast_raft_store::map::{
    ExtentMap, FreedSink, Move, PageAddress, PageCache, PageIo, PageIoError, ROOT_BRANCH,
    RunContent,
};
use ballast_raft_store::place::Place;
use bytes::Bytes;

#[derive(Default)]
struct Disk {
    pages: RefCell<BTreeMap<u64, Bytes>>,
    next: Cell<u64>,
    written: Cell<u64>,
    read: Cell<u64>,
    freed: Cell<u64>,
}

impl PageIo for Disk {
    fn append_page(&self, page: Bytes) -> Result<PageAddress, PageIoError> {
        let offset = self.next.get().max(4096);
        self.next.set(offset + page.len() as u64);
        self.written.set(self.written.get() + page.len() as u64);
        let length = page.len() as u32;
        self.pages.borrow_mut().insert(offset, page);
        Ok(PageAddress { offset, length })
    }

    async fn read_page(&self, at: PageAddress) -> Result<Bytes, PageIoError> {
        self.read.set(self.read.get() + 1);
        self.pages.borrow().get(&at.offset).cloned().ok_or_else(|| PageIoError("gone".into()))
    }
}

impl FreedSink for Disk {
    fn freed(&self, _place: Place, count: u32) {
        self.freed.set(self.freed.get() + u64::from(count));
    }

    fn page_freed(&self, at: PageAddress) {
        self.pages.borrow_mut().remove(&at.offset);
    }
}

struct Bench {
    disk: Rc<Disk>,
    map: ExtentMap<Disk>,
    cache: PageCache,
    sequence: u64,
    place: u64,
    dice: u64,
}

const GIB: u64 = 1 << 18;

impl Bench {
    fn new() -> Self {
        let disk = Rc::new(Disk::default());
        let cache = PageCache::new(4 << 30);
        let map = ExtentMap::new(disk.clone(), &cache);
        Self { disk, map, cache, sequence: 0, place: 1, dice: 1 }
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice % below
    }

    fn write(&mut self, start: u64, crcs: &[u32]) {
        self.sequence += 1;
        let range = BlockRange::new(start, crcs.len() as u32);
        self.map.write(ROOT_BRANCH, Sequence(self.sequence), range, Place(self.place), crcs);
        self.place += crcs.len() as u64;
    }

    async fn checkpoint(&self) -> Vec<u8> {
        let frozen = self.map.freeze();
        self.map.write_frozen(frozen).await.expect("no disk")
    }

    /// Every block mapped: at random, so that pages are dense, or in writes of 1 MiB.
    async fn fill(&mut self, blocks: u64, random: bool) {
        if random {
            // A permutation: an odd step over a power of two.
            for i in 0..blocks {
                self.write((i * 0x9e37_79b1) % blocks, &[i as u32]);
                if self.map.delta_bytes() > 256 << 20 {
                    self.map.merge(64 << 20).await.expect("no disk");
                }
            }
        } else {
            let crcs = [7; 256];
            (0..blocks / 256).for_each(|i| self.write(i * 256, &crcs));
        }
        self.map.merge(0).await.expect("no disk");
        self.checkpoint().await;
    }

    fn time_lookups(&mut self, name: &str, blocks: u64, length: u32) {
        let starts: Vec<u64> = (0..1 << 16).map(|_| self.roll(blocks - 256)).collect();
        for round in 0..2 {
            let begin = Instant::now();
            for _ in 0..8 {
                for &start in &starts {
                    let range = BlockRange::new(start, length);
                    black_box(self.map.try_lookup(ROOT_BRANCH, None, range).expect("cached"));
                }
            }
            if round > 0 {
                report(name, begin, 8 * starts.len());
            }
        }
    }
}

/// CPU time of this thread.
struct Instant(u64);

impl Instant {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
        Self(stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds"))
    }

    fn elapsed(&self) -> Duration {
        Duration::from_nanos(Self::now().0 - self.0)
    }
}

fn report(name: &str, begin: Instant, count: usize) {
    println!("{name:60} {:8.0} ns", begin.elapsed().as_nanos() as f64 / count as f64);
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    runtime.block_on(async {
        delta_and_merge().await;
        lookups().await;
        checkpoint_and_load().await;
        relocation().await;
        for (share, live) in [(64, 0), (256, 0), (64, 80), (256, 80)] {
            metadata(share, live).await;
        }
    });
}

async fn delta_and_merge() {
    let mut bench = Bench::new();
    let blocks = 32 * GIB;
    let count = 1 << 20;
    let starts: Vec<u64> = (0..count).map(|_| bench.roll(blocks - 256)).collect();
    let begin = Instant::now();
    starts.iter().for_each(|&start| bench.write(start, &[1]));
    report("write 4 KiB into the delta, 32 GiB, 32 per range", begin, count);
    println!("{:60} {:8} bytes", "  memory per record", bench.map.delta_bytes() / count);
    let begin = Instant::now();
    bench.map.merge(0).await.expect("no disk");
    report("merge, per 4 KiB record (32 per page)", begin, count);
    let begin = Instant::now();
    starts.iter().for_each(|&start| bench.write(start, &[1]));
    report("write 4 KiB into the delta, again", begin, count);
    let begin = Instant::now();
    bench.map.merge(0).await.expect("no disk");
    report("merge, per 4 KiB record over dense-ish pages", begin, count);
    let crcs = [1; 256];
    let begin = Instant::now();
    starts[..1 << 16].iter().for_each(|&start| bench.write(start, &crcs));
    report("write 1 MiB into the delta (unaligned: two ranges)", begin, 1 << 16);
}

async fn lookups() {
    for random in [true, false] {
        let mut bench = Bench::new();
        let blocks = 4 * GIB;
        bench.fill(blocks, random).await;
        let kind = if random { "dense" } else { "runs" };
        bench.time_lookups(&format!("look-up 4 KiB, warm, {kind}, no delta"), blocks, 1);
        bench.time_lookups(&format!("look-up 1 MiB, warm, {kind}, no delta"), blocks, 256);
        for per_range in [8, 24, 60, 240] {
            for _ in 0..blocks / 256 * per_range {
                let start = bench.roll(blocks - 1);
                bench.write(start, &[1]);
            }
            let name = format!("look-up 4 KiB, warm, {kind}, {per_range} more changes per range");
            bench.time_lookups(&name, blocks, 1);
        }
        bench.map.merge(0).await.expect("no disk");
    }
}

async fn checkpoint_and_load() {
    for random in [true, false] {
        let mut bench = Bench::new();
        let blocks = 16 * GIB;
        bench.fill(blocks, random).await;
        for _ in 0..1 << 16 {
            let start = bench.roll(blocks);
            bench.write(start, &[1]);
        }
        let begin = Wall::now();
        let frozen = bench.map.freeze();
        println!("{:60} {:8} us", "freeze, 65,536 random unmerged", begin.elapsed().as_micros());
        let written = bench.disk.written.get();
        bench.map.write_frozen(frozen).await.expect("no disk");
        let written = bench.disk.written.get() - written;
        println!("{:60} {:8} bytes per record", "  written for them", written >> 16);
        bench.map.merge(0).await.expect("no disk");
        let begin = Wall::now();
        let frozen = bench.map.freeze();
        println!("{:60} {:8} us", "freeze, all leaves dirty, 16 GiB", begin.elapsed().as_micros());
        let (begin, written) = (Wall::now(), bench.disk.written.get());
        let root = bench.map.write_frozen(frozen).await.expect("no disk");
        let bytes = bench.disk.written.get() - written;
        println!("{:60} {:8} us", "  written", begin.elapsed().as_micros());
        println!("{:60} {bytes:8} bytes", "  written");
        println!("{:60} {:8} bytes", "root of 16 GiB", root.len());
        let all: usize = bench.disk.pages.borrow().values().map(Bytes::len).sum();
        println!("{:60} {:8.2} bytes per block", "map on disk", all as f64 / blocks as f64);
        let (begin, read) = (Wall::now(), bench.disk.read.get());
        let map = ExtentMap::load(&root, bench.disk.clone(), &bench.cache).await.expect("fine");
        println!("{:60} {:8} us", "load of 16 GiB", begin.elapsed().as_micros());
        println!("{:60} {:8}", "  pages read", bench.disk.read.get() - read);
        let begin = Instant::now();
        for range in 0..blocks / 256 {
            let range = BlockRange::new(range * 256, 1);
            black_box(map.lookup(ROOT_BRANCH, None, range).await.expect("fine"));
        }
        report("look-up that reads its page (from memory)", begin, (blocks / 256) as usize);
    }
}

async fn relocation() {
    let mut bench = Bench::new();
    let blocks = 4 * GIB;
    bench.fill(blocks, true).await;
    let count = 1 << 18;
    let mut moves = Vec::new();
    for _ in 0..count {
        let block = bench.roll(blocks);
        let range = BlockRange::new(block, 1);
        let runs = bench.map.try_lookup(ROOT_BRANCH, None, range).expect("cached");
        let RunContent::Data { first, versions } = &runs[0].what else { unreachable!() };
        let (branch, sequence) = (versions[0].branch, versions[0].sequence);
        bench.place += 1;
        moves.push(Move { block, branch, sequence, from: *first, to: Place(bench.place) });
    }
    moves.sort_by_key(|one| one.block);
    moves.dedup_by_key(|one| one.block);
    let begin = Instant::now();
    for one in &moves {
        black_box(bench.map.holds(one.block, one.from).await.expect("cached"));
    }
    report("holds, cached", begin, moves.len());
    let begin = Instant::now();
    bench.map.relocate(&moves);
    report("relocate, into the delta", begin, moves.len());
    let begin = Instant::now();
    bench.map.merge(0).await.expect("no disk");
    report("merge, per move (64 per page)", begin, moves.len());
}

/// Metadata bytes per host byte: uniform random 4 KiB, `share` MiB of delta per TiB, checkpoint
/// every 256 MiB of log per TiB; at `full` % with as many moves as the cleaner would make (1.7).
async fn metadata(share: u64, full: u64) {
    let mut bench = Bench::new();
    let blocks = 16 * GIB;
    bench.fill(blocks, true).await;
    let delta_max = (share << 20) / 64;
    let writes = 1 << 18;
    let (mut written, begin) = (0, Instant::now());
    for i in 0..2 * writes {
        if i == writes {
            written = bench.disk.written.get();
        }
        let start = bench.roll(blocks);
        bench.write(start, &[1]);
        for _ in 0..if full > 0 { 1 + u64::from(i % 10 < 7) } else { 0 } {
            let block = bench.roll(blocks);
            let range = BlockRange::new(block, 1);
            let runs = bench.map.try_lookup(ROOT_BRANCH, None, range).expect("cached");
            let RunContent::Data { first, versions } = &runs[0].what else { unreachable!() };
            let (branch, sequence) = (versions[0].branch, versions[0].sequence);
            bench.place += 1;
            let to = Place(bench.place);
            bench.map.relocate(&[Move { block, branch, sequence, from: *first, to }]);
        }
        if bench.map.delta_bytes() as u64 > delta_max {
            bench.map.merge((delta_max - delta_max / 16) as usize).await.expect("no disk");
        }
        if i % 1024 == 0 {
            bench.checkpoint().await;
        }
    }
    let bytes = (bench.disk.written.get() - written) as f64 / (writes as f64 * 4096.0);
    let name = format!("metadata per host byte, {share} MiB delta per TiB, {full}% full");
    println!("{name:60} {bytes:8.3}");
    report("  all of it, per host write", begin, 2 * writes);
}
