//! Power loss at every point: what was durable is there, plus a prefix of what was in flight,
//! never a hole; also through checkpoints, reuse of segments and crashes during recovery.

#![allow(clippy::disallowed_methods, reason = "waits in tokio's paused time")]

mod support;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use ballast_block::{AlignedBuf, BLOCK_SIZE, ReplicaId};
use ballast_env::clock::Clock;
use ballast_raft_store::place::Place;
use ballast_raft_store::stream::{
    Finding, Opened, PayloadState, RecordHead, RecordKind, SpaceClass, StreamId, StreamSet,
};
use bytes::Bytes;
use proptest::prelude::*;
use support::crash::{IN_FLIGHT, Random, crash, env_of};
use support::pool::{append_as, format, ids, path, payload, reopen};
use support::{Image, MemoryEnv, run};

type Id = (u64, u64);

/// A payload that must stay readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    id: Id,
    place: u64,
    blocks: u32,
}

/// What the pool holds, as the test knows it.
#[derive(Clone, Debug, Default)]
struct Model {
    /// Every record ever, in order.
    records: Vec<Id>,
    kept: Vec<Kept>,
}

impl Model {
    fn next_op(&self, replica: u64) -> u64 {
        self.records.iter().filter(|id| id.0 == replica).count() as u64 + 1
    }

    fn encode(&self) -> Bytes {
        let mut out = Vec::new();
        out.extend((self.records.len() as u64).to_le_bytes());
        for (replica, op) in &self.records {
            out.extend(replica.to_le_bytes());
            out.extend(op.to_le_bytes());
        }
        for kept in &self.kept {
            for field in [kept.id.0, kept.id.1, kept.place, u64::from(kept.blocks)] {
                out.extend(field.to_le_bytes());
            }
        }
        Bytes::from(out)
    }

    fn decode(bytes: &[u8]) -> Self {
        let words: Vec<u64> =
            bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        let (records, kept) = words[1..].split_at(words[0] as usize * 2);
        let kept = kept.chunks(4).map(|four| Kept {
            id: (four[0], four[1]),
            place: four[2],
            blocks: four[3] as u32,
        });
        Self {
            records: records.chunks(2).map(|two| (two[0], two[1])).collect(),
            kept: kept.collect(),
        }
    }
}

/// The model as the opened pool has it.
async fn restored(opened: &Opened<MemoryEnv>) -> Model {
    let mut model =
        opened.checkpoint_body.as_ref().map_or_else(Model::default, |body| Model::decode(body));
    model.records.extend(ids(&opened.replay));
    for record in &opened.replay {
        let Some(stored) = record.payload else { continue };
        assert_eq!(record.payload_state, PayloadState::Good);
        let id = (record.replica.0, record.op);
        model.kept.push(Kept { id, place: stored.place.0, blocks: stored.blocks });
    }
    for kept in &model.kept {
        let buffer = AlignedBuf::zeroed(kept.blocks as usize * BLOCK_SIZE);
        let read = opened.streams.read_blocks(Place(kept.place), kept.blocks, buffer).await;
        assert!(read.unwrap()[..] == payload(kept.id.0, kept.id.1, kept.blocks), "{kept:?}");
        assert!(opened.streams.segments().is_live(Place(kept.place)), "{kept:?}");
    }
    for finding in &opened.findings {
        // A segment's header may be torn while its first batch is whole.
        let is_torn = matches!(
            finding,
            Finding::TornTail { .. }
                | Finding::SuperblockDamaged { .. }
                | Finding::SegmentHeaderDamaged { .. }
        );
        assert!(is_torn, "{finding:?}");
    }
    let mut last = BTreeMap::new();
    for (replica, op) in &model.records {
        let before = last.insert(*replica, *op).unwrap_or(0);
        assert_eq!(*op, before + 1, "hole in replica {replica}");
    }
    model
}

/// Bounds of what a crash may leave: at least `sure` records, at most all of `records`.
struct Bounds {
    records: Vec<Id>,
    sure: usize,
}

impl Bounds {
    fn check(&self, found: &Model) {
        let count = found.records.len();
        assert!(count >= self.sure, "{count} records, {} were durable", self.sure);
        assert!(self.records.starts_with(&found.records), "not a prefix of what was appended");
    }
}

/// One life of a pool: some appends, waits and checkpoints. Notes when records became durable.
struct Life {
    env: MemoryEnv,
    model: Model,
    /// (events so far, records durable).
    sure: Rc<RefCell<Vec<(usize, usize)>>>,
    /// Records appended, by events so far.
    appended: Vec<(usize, usize)>,
}

impl Life {
    fn events(&self) -> usize {
        self.env.disk.borrow().events.len()
    }

    fn append(&mut self, streams: &StreamSet<MemoryEnv>, random: &mut Random) -> bool {
        let replica = 1 + random.below(5);
        let op = self.model.next_op(replica);
        let blocks = random.pick(&[0, 0, 1, 1, 2, 8, 64, 256]);
        let Ok(appended) = append_as(streams, SpaceClass::Normal, replica, op, blocks) else {
            return false;
        };
        self.model.records.push((replica, op));
        if blocks > 0 {
            self.model.kept.push(Kept { id: (replica, op), place: appended.place.0, blocks });
        }
        let count = self.model.records.len();
        self.appended.push((self.events(), count));
        let (disk, sure) = (self.env.disk.clone(), self.sure.clone());
        let callback = move |result: Result<(), _>| {
            if result.is_ok() {
                sure.borrow_mut().push((disk.borrow().events.len(), count));
            }
        };
        streams.on_durable(StreamId::Hot, appended.at, Box::new(callback));
        true
    }

    /// Gives up most payload, then makes a checkpoint while appends go on.
    async fn checkpoint(&mut self, streams: &StreamSet<MemoryEnv>, random: &mut Random) {
        let kept = std::mem::take(&mut self.model.kept);
        for kept in kept {
            if random.below(8) == 0 && self.model.kept.len() < 4 {
                self.model.kept.push(kept);
            } else {
                streams.segments().mark_dead(Place(kept.place), kept.blocks);
            }
        }
        let page = RecordHead { kind: RecordKind::Page, replica: ReplicaId(0), op: 0, body: &[] };
        let page = streams.append(
            StreamId::Meta,
            SpaceClass::Checkpoint,
            page,
            Some(payload(0, 0, 2)),
            &[],
        );
        if let Ok(page) = page {
            // The next checkpoint's pages replace it.
            streams.segments().mark_dead(page.place, 2);
        }
        let frozen = streams.freeze();
        let body = vec![self.model.encode()];
        for _ in 0..random.below(4) {
            self.append(streams, random);
        }
        streams.commit_checkpoint(frozen, body).await.unwrap();
    }

    async fn live(&mut self, streams: &StreamSet<MemoryEnv>, random: &mut Random) {
        for _ in 0..3 + random.below(20) {
            match random.below(12) {
                0 => streams.flush().await.unwrap(),
                1 | 2 => self.checkpoint(streams, random).await,
                3 => self.env.sleep(std::time::Duration::from_millis(150)).await,
                4 | 5 => self.env.sleep(std::time::Duration::from_millis(1)).await,
                _ => {
                    for _ in 0..random.below(12) {
                        if !self.append(streams, random) {
                            self.checkpoint(streams, random).await;
                        }
                    }
                }
            }
        }
    }

    /// What a crash after so many events may leave.
    fn bounds(&self, before: &Bounds, opened_at: usize, restored: usize, events: usize) -> Bounds {
        if events < opened_at {
            return Bounds { records: before.records.clone(), sure: before.sure };
        }
        let sure = self.sure.borrow();
        let sure = sure.iter().filter(|(at, _)| *at <= events).map(|(_, count)| *count).max();
        let most = self.appended.iter().filter(|(at, _)| *at <= events).map(|(_, count)| *count);
        let most = most.max().unwrap_or(restored).max(restored);
        Bounds {
            records: self.model.records[..most].to_vec(),
            sure: sure.unwrap_or(restored).max(restored),
        }
    }
}

async fn new_pool() -> Image {
    let env = MemoryEnv::default();
    format(&env, &path()).await;
    env.image(&path())
}

/// Lives, each ended by a power loss at some event.
async fn lives(seed: u64, count: u64) {
    let random = &mut Random(seed);
    let mut image = new_pool().await;
    let mut before = Bounds { records: Vec::new(), sure: 0 };
    for _ in 0..count {
        let env = env_of(&image);
        let opened = reopen(&env, &path()).await.expect("opens after a crash");
        let model = restored(&opened).await;
        before.check(&model);
        let restored = model.records.len();
        let opened_at = env.disk.borrow().events.len();
        let mut life = Life { env: env.clone(), model, sure: Rc::default(), appended: Vec::new() };
        life.live(&opened.streams, random).await;
        let all = life.events();
        let events = if random.below(6) == 0 {
            random.below(opened_at as u64 + 1) as usize
        } else {
            random.below(all as u64 + 1) as usize
        };
        before = life.bounds(&before, opened_at, restored, events);
        let mode = random.pick(&IN_FLIGHT);
        image = crash(&image, &env, events, mode, random);
    }
    let opened = reopen(&env_of(&image), &path()).await.expect("opens after a crash");
    before.check(&restored(&opened).await);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn many_lives(seed in any::<u64>()) {
        run(lives(seed, 12));
    }
}

#[test]
fn every_point_of_one_life() {
    run(async {
        let random = &mut Random(7);
        let image = new_pool().await;
        let env = env_of(&image);
        let opened = reopen(&env, &path()).await.unwrap();
        let opened_at = env.disk.borrow().events.len();
        let mut life = Life {
            env: env.clone(),
            model: Model::default(),
            sure: Rc::default(),
            appended: Vec::new(),
        };
        for _ in 0..3 {
            life.live(&opened.streams, random).await;
        }
        assert!(opened.streams.checkpoint() > 1 && life.model.records.len() > 50);
        let before = Bounds { records: Vec::new(), sure: 0 };
        for events in 0..=life.events() {
            for mode in IN_FLIGHT {
                let image = crash(&image, &env, events, mode, random);
                let opened = reopen(&env_of(&image), &path()).await.unwrap();
                life.bounds(&before, opened_at, 0, events).check(&restored(&opened).await);
            }
        }
    });
}
