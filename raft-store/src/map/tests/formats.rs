//! Pages and root: golden bytes, and damage anywhere is an error that names the place.

use std::rc::Rc;

use ballast_block::{BlockRange, BranchId, Sequence};
use bytes::Bytes;

use super::disk::{Accounts, Disk};
use super::random::run;
use crate::map::page::{Page, PageKind};
use crate::map::version::{TOMBSTONE, Version};
use crate::map::{
    ExtentMap, MapError, PageCache, PageSubject, ROOT_BRANCH, RunContent, directory, root,
};
use crate::place::Place;

fn version(block: u8, sequence: u64, place: u64, crc: u32) -> Version {
    Version { sequence, place, branch: 1, crc, block }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_pages() {
    let tips = [version(3, 5, 100, 0xa1), version(4, 5, 101, 0xa2), version(9, 6, TOMBSTONE, 0)];
    let runs = Page::head(7, 1, &tips);
    assert_eq!(
        hex(&runs.bytes()[4..]),
        concat!(
            "0201030907000000010000000200000000000000",
            "0600000000000000",
            "0301000500000000006400000000",
            "090000060000000000ffffffffff",
            "a1000000a2000000"
        )
    );
    let chunk = Page::chunk(7, &tips);
    assert_eq!(
        hex(&chunk.bytes()[4..]),
        concat!(
            "0301030907000000000000000300000000000000",
            "0600000000000000",
            "030100000500000000006400000000a1000000",
            "040100000500000000006500000000a2000000",
            "09010000060000000000ffffffffff00000000"
        )
    );
    let all: Vec<Version> =
        (0..=255).map(|i| version(i, 300 - u64::from(i), 1000 + 2 * u64::from(i), 9)).collect();
    let dense = Page::head(0x01_0203, 1, &all);
    assert_eq!(dense.bytes().len(), 3872);
    assert_eq!(
        hex(&dense.bytes()[4..62]),
        concat!(
            "010100ff03020100010000000001000000000000",
            "2c01000000000000",
            "e803000000090000002c0100000000",
            "ea03000000090000002b0100000000"
        )
    );
}

#[test]
fn pages_say_what_was_put_in() {
    for runs in [1, 2, 7, 100, 210, 256] {
        let tips: Vec<Version> = (0..=255u8)
            .filter(|block| runs > 2 || block % 5 != 0)
            .map(|block| {
                let run = u64::from(block) * runs / 256;
                let place =
                    if run % 3 == 1 { TOMBSTONE } else { 1 + run * 1000 + u64::from(block) };
                let crc = if place == TOMBSTONE { 0 } else { u32::from(block) * 77 };
                version(block, run + 1, place, crc)
            })
            .collect();
        let page = Page::head(5, 1, &tips);
        let kind = page.header().kind;
        let reread = Page::open(page.bytes().clone(), kind, 5, 1, page.crc()).unwrap();
        let mut seen = Vec::new();
        reread.for_each(0, 255, |one| seen.push(one));
        assert_eq!(seen, tips, "{runs} runs, {kind:?}");
        for block in 0..=255 {
            let expected = tips.iter().find(|tip| tip.block == block);
            assert_eq!(reread.tip(block).as_ref(), expected);
        }
        assert_eq!(kind == PageKind::HeadDense, runs == 256);
    }
}

#[test]
fn pages_of_something_else_are_refused() {
    let page = Page::head(5, 1, &[version(1, 2, 3, 4)]);
    let open = |kind, range, branch, crc| {
        Page::open(page.bytes().clone(), kind, range, branch, crc).map(|_| ())
    };
    let runs = PageKind::HeadRuns;
    assert_eq!(open(runs, 5, 1, page.crc()), Ok(()));
    assert!(open(PageKind::Chunk, 5, 1, page.crc()).is_err());
    assert!(open(runs, 6, 1, page.crc()).is_err());
    assert!(open(runs, 5, 2, page.crc()).is_err());
    assert!(open(runs, 5, 1, page.crc() ^ 1).is_err(), "an older page at the same place");
    for cut in 0..page.bytes().len() {
        assert!(Page::open(page.bytes().slice(..cut), runs, 5, 1, page.crc()).is_err());
    }
}

/// A map with every kind of page on disk, its root, and its disk.
async fn sample() -> (Rc<Disk>, Vec<u8>) {
    let disk = Rc::new(Disk::default());
    let map = ExtentMap::new(disk.clone(), &PageCache::new(1 << 20));
    let write = |sequence, start, count: u32| {
        let range = BlockRange::new(start, count);
        let place = sequence * 1000;
        let live = &mut disk.accounts.borrow_mut().live;
        (place..place + u64::from(count)).for_each(|place| assert!(live.insert(place)));
        let crcs: Vec<u32> = (0..count).map(|i| i * 3).collect();
        map.write(ROOT_BRANCH, Sequence(sequence), range, Place(place), &crcs);
    };
    write(1, 0, 256);
    (0..256).for_each(|i| write(2 + i, 256 + (i * 37) % 256, 1));
    map.add_snapshot(ROOT_BRANCH, Sequence(300));
    map.merge(0).await.unwrap();
    write(301, 10, 20);
    map.merge(0).await.unwrap();
    write(302, 70_000, 3);
    map.trim(ROOT_BRANCH, Sequence(303), 20, 5);
    map.trim(ROOT_BRANCH, Sequence(304), 65_600, 1 << 20);
    let frozen = map.freeze();
    let root = map.write_frozen(frozen).await.unwrap();
    (disk, root)
}

fn reboot(disk: &Disk) -> Rc<Disk> {
    disk.remember();
    Rc::new(disk.reboot(Accounts::default()))
}

#[test]
fn every_damaged_page_is_found() {
    run(async {
        let (disk, root) = sample().await;
        let pages: Vec<(u64, Bytes)> =
            disk.pages.borrow().iter().map(|(at, page)| (*at, page.clone())).collect();
        assert_eq!(pages.len(), 5, "two heads, a chunk, a leaf, changes");
        for (offset, page) in pages {
            for at in (0..page.len()).step_by(7) {
                let disk = reboot(&disk);
                let mut wrong = page.to_vec();
                wrong[at] ^= 0x10;
                disk.pages.borrow_mut().insert(offset, wrong.into());
                let error = read_all(&disk, &root).await.unwrap_err();
                let MapError::DamagedPage { what, at, .. } = error else { panic!("{error}") };
                assert_eq!(at.offset, offset);
                assert!(!matches!(what, PageSubject::Blocks(first) if first > 256));
            }
        }
        assert_eq!(read_all(&reboot(&disk), &root).await, Ok(()));
    });
}

async fn read_all(disk: &Rc<Disk>, root: &[u8]) -> Result<(), MapError> {
    let map = ExtentMap::load(root, disk.clone(), &PageCache::new(1 << 20)).await?;
    let now = map.lookup(ROOT_BRANCH, None, BlockRange::new(0, 512)).await?;
    assert!(now.iter().any(|run| run.what == RunContent::Hole && run.start == 20));
    let then = Some(Sequence(300));
    let then = map.lookup(ROOT_BRANCH, then, BlockRange::new(0, 256)).await?;
    assert_eq!(then.len(), 1);
    let far = map.lookup(ROOT_BRANCH, None, BlockRange::new(70_000, 3)).await?;
    assert_eq!(far.len(), 1, "trimmed");
    assert_eq!(far[0].what, RunContent::Hole);
    Ok(())
}

#[test]
fn a_damaged_page_does_not_take_others_with_it() {
    run(async {
        let (disk, root) = sample().await;
        let disk = reboot(&disk);
        let map = ExtentMap::load(&root, disk.clone(), &PageCache::new(0)).await.unwrap();
        let of_range_1 = map.state.borrow().directory.range(1).unwrap().slots()[0].at;
        let bytes = disk.pages.borrow()[&of_range_1.offset].clone();
        let mut wrong = bytes.to_vec();
        wrong[100] ^= 1;
        disk.pages.borrow_mut().insert(of_range_1.offset, wrong.into());
        let damaged = map.lookup(ROOT_BRANCH, None, BlockRange::new(300, 1)).await;
        let what = PageSubject::Blocks(256);
        let expected = MapError::DamagedPage { what, at: of_range_1, problem: "checksum" };
        assert_eq!(damaged, Err(expected));
        assert!(map.lookup(ROOT_BRANCH, None, BlockRange::new(0, 256)).await.is_ok());
        disk.pages.borrow_mut().insert(of_range_1.offset, bytes);
        assert!(map.lookup(ROOT_BRANCH, None, BlockRange::new(300, 1)).await.is_ok());
    });
}

#[test]
fn every_damaged_root_is_refused() {
    run(async {
        let (disk, root) = sample().await;
        for at in 0..root.len() {
            let mut wrong = root.clone();
            wrong[at] ^= 1;
            assert!(root::Root::decode(&wrong).is_err(), "byte {at}");
            assert!(root::Root::decode(&root[..at]).is_err(), "cut at {at}");
        }
        let decoded = root::Root::decode(&root).unwrap();
        assert_eq!(decoded.encode(), root);
        assert_eq!((decoded.leaves.len(), decoded.runs.len(), decoded.wide.len()), (1, 1, 1));
        drop(disk);
    });
}

#[test]
fn leaves_are_split() {
    let mut ranges = vec![directory::Range::default(); directory::LEAF_RANGES];
    for (i, range) in ranges.iter_mut().enumerate() {
        let page = || Page::chunk(i as u32, &[version(1, 2, 3, 4)]);
        range.slots =
            directory::Slots::from_vec((0..30).map(|_| directory::Slot::fresh(page())).collect());
        range.newest = i as u64;
    }
    let at = crate::map::PageAddress { offset: 1 << 50, length: 51 };
    let pages = directory::encode_leaf(9, &ranges, 0, |_| at);
    assert_eq!(pages.len(), 4);
    let mut again = vec![directory::Range::default(); directory::LEAF_RANGES];
    for page in pages {
        let crc = u32::from_le_bytes(page[..4].try_into().unwrap());
        directory::decode_leaf(9, &page, crc, &mut again).unwrap();
        assert!(directory::decode_leaf(8, &page, crc, &mut again).is_err());
    }
    for (range, again) in ranges.iter().zip(&again) {
        assert_eq!((range.newest, range.slots().len()), (again.newest, again.slots().len()));
        assert!(again.slots().iter().all(|slot| slot.at == at && !slot.dirty));
    }
}

#[test]
fn the_cache_keeps_its_limit_and_what_is_used() {
    run(async {
        let (disk, root) = sample().await;
        let disk = reboot(&disk);
        let cache = PageCache::new(6000);
        let mut loaded = Vec::new();
        for _ in 0..3 {
            loaded.push(ExtentMap::load(&root, disk.clone(), &cache).await.unwrap());
        }
        for map in &loaded {
            for range in [0, 256] {
                map.lookup(BranchId(1), None, BlockRange::new(range, 1)).await.unwrap();
                assert!(cache.bytes() <= 6000);
            }
        }
        assert!(cache.bytes() > 3000);
        drop(loaded);
        assert_eq!(cache.bytes(), 0);
    });
}

#[test]
fn a_page_that_is_replaced_while_it_is_read() {
    run(async {
        let (disk, root) = sample().await;
        let disk = reboot(&disk);
        let cache = PageCache::new(1 << 20);
        let map = ExtentMap::load(&root, disk.clone(), &cache).await.unwrap();
        disk.slow.set(1000);
        let reading = map.lookup(ROOT_BRANCH, None, BlockRange::new(0, 1));
        let replacing = async {
            disk.slow.set(0);
            disk.accounts.borrow_mut().live.extend(1..400_000);
            map.write(ROOT_BRANCH, Sequence(400), BlockRange::new(0, 1), Place(9), &[9]);
            map.merge(0).await.unwrap();
            for _ in 0..2 {
                let frozen = map.freeze();
                map.write_frozen(frozen).await.unwrap();
                disk.checkpointed();
            }
        };
        let (runs, ()) = futures_util::future::join(reading, replacing).await;
        let RunContent::Data { first, .. } = &runs.unwrap()[0].what else { panic!("a hole") };
        assert_eq!(*first, Place(9), "the page that replaced it was looked at");
    });
}

/// docs/decisions/0002-extent-map.md says what a mapped MiB takes; this holds it to that.
#[test]
fn memory_of_a_range() {
    assert_eq!(size_of::<directory::Range>() + size_of::<Option<Box<u8>>>(), 64);
}

#[test]
fn small_chunks_are_merged() {
    run(async {
        let disk = Rc::new(Disk::default());
        let map = ExtentMap::new(disk.clone(), &PageCache::new(1 << 20));
        let slots = || map.state.borrow().directory.range(0).unwrap().slots().len();
        let mut most = 0;
        for sequence in 1..=2000u64 {
            let range = BlockRange::new(sequence * 31 % 256, 1);
            map.write(ROOT_BRANCH, Sequence(sequence), range, Place(sequence), &[sequence as u32]);
            map.merge(0).await.unwrap();
            map.add_snapshot(ROOT_BRANCH, Sequence(sequence));
            most = most.max(slots());
        }
        // A head, 2 full chunks, up to 8 of each of three sizes.
        assert!((3..=1 + 2 + 24).contains(&slots()) && most <= 1 + 2 + 24, "{most} pages");
        for sequence in (1..=2000u64).step_by(13) {
            let (block, at) = (sequence * 31 % 256, Some(Sequence(sequence)));
            let runs = map.lookup(ROOT_BRANCH, at, BlockRange::new(block, 1)).await.unwrap();
            let RunContent::Data { first, versions } = &runs[0].what else { panic!("a hole") };
            assert_eq!((first.0, versions[0].sequence.0), (sequence, sequence));
        }
    });
}

#[test]
fn a_wipe_passes_over_damage() {
    run(async {
        let (disk, root) = sample().await;
        let accounts = disk.accounts.borrow().clone();
        let disk = reboot(&disk);
        disk.accounts.replace(accounts);
        let map = ExtentMap::load(&root, disk.clone(), &PageCache::new(0)).await.unwrap();
        let of_range_1 = map.state.borrow().directory.range(1).unwrap().slots()[0].at;
        disk.pages.borrow_mut().insert(of_range_1.offset, Bytes::from_static(&[0; 3872]));
        let error = map.wipe().await.unwrap_err();
        assert!(matches!(error, MapError::DamagedPage { what: PageSubject::Blocks(256), .. }));
        disk.doomed.borrow_mut().sort();
        let doomed = disk.doomed.take();
        assert_eq!(doomed.len(), disk.pages.borrow().len(), "every page, once");
        let live = disk.accounts.borrow().live.len();
        assert_eq!(live, 256, "only those of the range that can't be read");
        assert_eq!(map.delta_bytes() + map.dirty_bytes(), 0);
    });
}

#[test]
fn a_repeated_write_replaces_the_earlier_one() {
    run(async {
        for merge_between in [false, true] {
            let disk = Rc::new(Disk::default());
            let map = ExtentMap::new(disk.clone(), &PageCache::new(1 << 20));
            disk.accounts.borrow_mut().live.extend([10, 11, 20]);
            let range = BlockRange::new(5, 2);
            map.write(ROOT_BRANCH, Sequence(3), range, Place(10), &[1, 2]);
            if merge_between {
                map.merge(0).await.unwrap();
            }
            map.write(ROOT_BRANCH, Sequence(3), BlockRange::new(6, 1), Place(20), &[7]);
            let before = map.lookup(ROOT_BRANCH, None, range).await.unwrap();
            map.merge(0).await.unwrap();
            assert_eq!(map.lookup(ROOT_BRANCH, None, range).await.unwrap(), before);
            let live: Vec<u64> = disk.accounts.borrow().live.iter().copied().collect();
            assert_eq!((live, before.len()), (vec![10, 20], 2));
        }
    });
}
