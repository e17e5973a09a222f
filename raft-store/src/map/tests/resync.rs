//! Differences carry a view to another map.

use std::collections::BTreeMap;
use std::rc::Rc;

use ballast_block::{BlockRange, Sequence};

use super::disk::Disk;
use super::random::{Family, run};
use crate::map::{DiffPage, ExtentMap, PageCache, ROOT_BRANCH};

/// A replica that gets a view as differences, in pieces and in any order, shows the same; and can
/// hand on what it got, holes included.
#[test]
fn resync() {
    for seed in 0..6 {
        run(resync_once(seed));
    }
}

async fn resync_once(seed: u64) {
    let mut source = Family::new(seed, false, 1 << 20);
    let disk = Rc::new(Disk::default());
    let target = ExtentMap::new(disk.clone(), &PageCache::new(1 << 20));
    let mut since = 0;
    for round in 0..4 {
        for _ in 0..150 {
            match source.dice.roll(20) {
                0..14 => source.write(),
                14..16 => source.trim(),
                16..18 => source.relocate().await,
                _ => source.map.merge(source.dice.roll(3000) as usize).await.unwrap(),
            }
        }
        let sequence = Sequence(source.sequence);
        let pin = source.map.pin(ROOT_BRANCH, sequence);
        let mut runs = Vec::new();
        let mut from = Some(0);
        while let Some(block) = from {
            let page = source.map.diff(pin, Sequence(since), block, 100).await.unwrap();
            runs.extend(page.runs);
            from = page.next;
        }
        for i in (1..runs.len()).rev() {
            runs.swap(i, source.dice.roll(i as u64 + 1) as usize);
        }
        for (i, run) in runs.iter().enumerate() {
            let (start, count) = (run.start, run.count);
            match &run.data {
                None => target.mark_hole(run.branch, run.sequence, start, u64::from(count)),
                Some(data) => {
                    (0..count).for_each(|i| {
                        disk.accounts.borrow_mut().live.insert(data.first.0 + u64::from(i));
                    });
                    let range = BlockRange::new(start, count);
                    target.write(run.branch, run.sequence, range, data.first, &data.crcs);
                }
            }
            if i % 50 == 49 {
                target.merge(0).await.unwrap();
            }
        }
        let range = BlockRange::new(0, 256 * 702);
        let ours = source.map.lookup(ROOT_BRANCH, None, range).await.unwrap();
        let theirs = target.lookup(ROOT_BRANCH, None, range).await.unwrap();
        assert_eq!(ours, theirs, "round {round}");
        let theirs = target.pin(ROOT_BRANCH, sequence);
        for asked in [0, since, sequence.0 / 2] {
            let ours = source.map.diff(pin, Sequence(asked), 0, 1 << 20).await.unwrap();
            let theirs = target.diff(theirs, Sequence(asked), 0, 1 << 20).await.unwrap();
            let holes = |page: DiffPage| -> BTreeMap<u64, u64> {
                let holes = page.runs.into_iter().filter(|run| run.data.is_none());
                let blocks = holes.flat_map(|run| {
                    (0..u64::from(run.count)).map(move |i| (run.start + i, run.sequence.0))
                });
                blocks.collect()
            };
            // A hole that was trimmed once more may keep the first trim here, the second there.
            let (ours, theirs) = (holes(ours), holes(theirs));
            let kept = |(block, sequence)| theirs.get(block).is_some_and(|had| had >= sequence);
            assert!(ours.iter().all(kept), "holes were lost");
        }
        source.map.unpin(pin);
        target.unpin(theirs);
        since = sequence.0;
    }
}
