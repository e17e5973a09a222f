//! Replicas through crashes, against a model: completed writes are there, what is applied is what the
//! log says, no checkpoint is ahead of the log, and nothing that lives is ever freed (free segments
//! are overwritten with garbage by the test).

#![allow(clippy::await_holding_refcell_ref, reason = "what is awaited under it never waits")]

mod store;
mod support;

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::{BLOCK_SIZE, ReplicaId};
use ballast_env::clock::Clock;
use ballast_env::spawn::Spawn;
use ballast_raft_store::format::{PoolGeometry, SegmentNumber};
use ballast_raft_store::pool::Pool;
use ballast_raft_store::replica::Health;
use ballast_raft_store::segment::SegmentState;
use ballast_raft_store::types::Vote;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use store::life::{recovered, some_entry};
use store::model::{Model, Op, VOLUME};
use store::{Machine, read};
use support::crash::{IN_FLIGHT, Random, crash, env_of};
use support::pool::path;
use support::{Image, MemoryEnv, run};

const REPLICAS: u64 = 3;

struct Life {
    env: MemoryEnv,
    base: Image,
    pool: Pool<MemoryEnv>,
    machines: Vec<Machine<MemoryEnv>>,
    models: Vec<Rc<RefCell<Model>>>,
    term: u64,
    /// Bytes of log and segments cleaned in earlier lives.
    written: u64,
    cleaned: u64,
}

impl Life {
    async fn first() -> Self {
        let env = MemoryEnv::default();
        store::format(&env, &path()).await;
        let (pool, _) = store::open(&env, &path()).await.unwrap();
        let mut machines = Vec::new();
        for id in 1..=REPLICAS {
            let replica = pool.create_replica(store::descriptor(id)).await.unwrap();
            machines.push(Machine::new(pool.clone(), replica));
        }
        let models = (0..REPLICAS).map(|_| Rc::default()).collect();
        let base = Image::new(env.image(&path()).size);
        Self { env, base, pool, machines, models, term: 1, written: 0, cleaned: 0 }
    }

    /// Crashes, opens what is left, compares it with the models, and goes on.
    async fn next(self, random: &mut Random) -> Self {
        let Self { env, base, pool, machines, models, term, written, cleaned } = self;
        let events = env.disk.borrow().events.len();
        let mode = random.pick(&IN_FLIGHT);
        let image = crash(&base, &env, events, mode, random);
        // What the dead process still hears does not count.
        models.iter().for_each(|model| model.borrow_mut().life += 1);
        let stats = pool.stats();
        let written = written + stats.log_bytes_written;
        let cleaned = cleaned + stats.cleaner_segments;
        drop((pool, machines));
        let env = env_of(&image);
        let (pool, report) = store::open(&env, &path()).await.unwrap();
        assert_eq!((report.replicas, report.suspects.len()), (REPLICAS as usize, 0));
        assert_eq!(report.damaged_entries, 0);
        let mut machines = Vec::new();
        for (id, model) in (1..).zip(&models) {
            let replica = pool.replica(ReplicaId(id)).unwrap();
            assert_eq!(replica.health(), Health::Good);
            let machine = Machine::new(pool.clone(), replica);
            recovered(&machine, &mut model.borrow_mut()).await;
            machines.push(machine);
        }
        let (base, term) = (image, term + 1);
        Self { env, base, pool, machines, models, term, written, cleaned }
    }

    /// Some of everything.
    async fn step(&mut self, random: &mut Random) {
        let nth = random.below(REPLICAS) as usize;
        match random.below(100) {
            0..=44 => self.append(nth, random).await,
            45..=64 => self.apply(nth, random).await,
            65..=69 => self.truncate(nth, random).await,
            70..=73 => self.vote(nth),
            74..=77 => self.purge(nth).await,
            78..=79 => self.checkpoint(),
            80..=84 => self.look(nth, random).await,
            85..=86 => self.pool.quiesce_maps().await.unwrap(),
            _ => self.env.sleep(Duration::from_micros(random.below(2500))).await,
        }
    }

    async fn append(&mut self, nth: usize, random: &mut Random) {
        let mut model = self.models[nth].borrow_mut();
        let mut entries = Vec::new();
        for _ in 0..=random.below(6) {
            let entry = some_entry(self.term, model.log.next_index(), random);
            model.perform(Op::Append(entry.clone()));
            entries.push(entry);
        }
        let issued = model.issued();
        drop(model);
        let (send, receive) = ballast_raft_store::types::TypeConfig::oneshot();
        let mut log = self.machines[nth].replica.log();
        log.append(entries, IOFlushed::signal(send)).await.unwrap();
        let model = self.models[nth].clone();
        let life = model.borrow().life;
        self.env.spawn(async move {
            if let Ok(Ok(())) = receive.await {
                let mut model = model.borrow_mut();
                if model.life == life {
                    model.acked = model.acked.max(issued);
                }
            }
        });
    }

    async fn apply(&mut self, nth: usize, random: &mut Random) {
        let (machine, mut model) = (&self.machines[nth], self.models[nth].borrow_mut());
        let from = model.applied.len() as u64;
        let upto = (from + random.below(12)).min(model.log.next_index());
        let entries = machine.replica.log().try_get_log_entries(from..upto).await.unwrap();
        assert_eq!(entries.len() as u64, upto.saturating_sub(from));
        for entry in entries {
            let whole = model.log.entries[&entry.log_id.index].clone();
            assert_eq!(entry.log_id, whole.log_id);
            machine.apply_one(entry);
            model.applied.push(whole);
        }
        assert_eq!(*machine.state.borrow(), model.state(model.applied.len()));
    }

    /// A new leader voids what was not committed.
    async fn truncate(&mut self, nth: usize, random: &mut Random) {
        let mut model = self.models[nth].borrow_mut();
        let applied = model.applied.len() as u64;
        let next = model.log.next_index();
        if next <= applied || applied == 0 {
            return;
        }
        let last = model.log.entries.get(&(applied - 1 + random.below(next - applied)));
        let Some(last) = last.map(|entry| entry.log_id) else { return };
        model.perform(Op::Truncate(last));
        self.term += 1;
        drop(model);
        self.machines[nth].replica.log().truncate_after(Some(last)).await.unwrap();
    }

    fn vote(&mut self, nth: usize) {
        let model = self.models[nth].clone();
        self.term += 1;
        let vote = Vote::new(self.term, nth as u64);
        model.borrow_mut().votes.push(vote);
        let (number, life) = (model.borrow().votes.len(), model.borrow().life);
        let mut log = self.machines[nth].replica.log();
        self.env.spawn(async move {
            if log.save_vote(&vote).await.is_ok() {
                let mut model = model.borrow_mut();
                if model.life == life {
                    model.votes_acked = model.votes_acked.max(number);
                }
            }
        });
    }

    async fn purge(&mut self, nth: usize) {
        let keep = 20;
        let target = {
            let model = self.models[nth].borrow();
            let upto = model.applied.len().checked_sub(keep).and_then(|at| model.applied.get(at));
            upto.map(|entry| entry.log_id)
        };
        let Some(target) = target else { return };
        if self.models[nth].borrow().log.purged >= Some(target) {
            return;
        }
        // As the consensus library does: only what a checkpoint has.
        self.pool.checkpoint().await.unwrap();
        self.poison();
        self.models[nth].borrow_mut().perform(Op::Purge(target));
        self.machines[nth].replica.log().purge(target).await.unwrap();
    }

    fn checkpoint(&self) {
        let pool = self.pool.clone();
        self.env.spawn(async move {
            // A crash of the test ends it.
            let _crashed = pool.checkpoint().await;
        });
    }

    /// What is read is what was applied.
    async fn look(&mut self, nth: usize, random: &mut Random) {
        self.poison();
        let start = random.below(VOLUME - 32);
        let expected = {
            let model = self.models[nth].borrow();
            let all = model.content(model.applied.len());
            all[start as usize * BLOCK_SIZE..][..32 * BLOCK_SIZE].to_vec()
        };
        let found = read(&self.machines[nth].replica, start, 32).await.unwrap();
        assert!(found == expected, "replica {} differs in {start}+32", nth + 1);
    }

    /// Overwrites free segments: whoever still reads them will notice.
    fn poison(&self) {
        let segments = self.pool.segments();
        let geometry = segments.geometry();
        let garbage = vec![0xdb; BLOCK_SIZE];
        let mut disk = self.env.disk.borrow_mut();
        let image = disk.images.get_mut(Path::new(&path())).unwrap();
        for number in (0..geometry.segments).map(SegmentNumber) {
            if segments.state(number) != SegmentState::Free {
                continue;
            }
            for block in 1..geometry.segment_blocks {
                let place = geometry.place(number, block).0;
                if image.is_written(place) {
                    image.set_block(place, &garbage);
                }
            }
        }
    }
}

fn live(seed: u64, lives: u64, steps: u64) -> (u64, u64) {
    run(async {
        let mut random = Random(seed);
        let mut life = Life::first().await;
        for _ in 0..lives {
            for _ in 0..random.below(steps) {
                life.step(&mut random).await;
            }
            life = life.next(&mut random).await;
        }
        (life.written, life.cleaned)
    })
}

#[test]
fn many_short_lives() {
    for seed in 0..20 {
        live(seed, 12, 60);
    }
}

#[test]
fn some_long_lives() {
    let (mut written, mut cleaned) = (0, 0);
    for seed in 100..106 {
        let (more_written, more_cleaned) = live(seed, 3, 1500);
        written += more_written;
        cleaned += more_cleaned;
    }
    // Several times the pool's size was written, so segments were cleaned and used again.
    assert!(written > 3 * PoolGeometry::BYTES_MIN && cleaned > 20, "{written} {cleaned}");
}
