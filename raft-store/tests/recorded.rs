//! Replicas under load on a real file, recorded: votes, entries, maps, checkpoints and the cleaner
//! write at the same time. Whatever prefix of the record a power loss leaves, with what was in flight
//! lost, whole, cut or torn, the pool opens with all that had been acknowledged (hazard 35).
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a real file")]
#![allow(clippy::await_holding_refcell_ref, reason = "what is awaited under it never waits")]

mod store;
mod support;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::ReplicaId;
use ballast_env::Env;
use ballast_env::clock::Clock;
use ballast_env::linux::LinuxShard;
use ballast_env::record::{Event as Recorded, Log, Recorder};
use ballast_env::spawn::Spawn;
use ballast_raft_store::format::PoolGeometry;
use ballast_raft_store::pool::Pool;
use ballast_raft_store::replica::Health;
use ballast_raft_store::types::{Entry, TypeConfig, Vote};
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use store::Machine;
use store::life::{recovered, some_entry};
use store::model::{Model, Op};
use support::crash::{IN_FLIGHT, InFlight, Random, env_of, leave_in_flight};
use support::pool::path;
use support::{Image, WriteRecord, run};

const REPLICAS: u64 = 3;

/// More than the pool's size is written in so many, so that segments are cleaned.
const STEPS: usize = 9_000;

/// How many moments of the record lose power; other ones each time, because the disk is real. More
/// would take minutes; `tests/real_file.rs` has a shorter run with every moment of it.
const PREFIXES: usize = 100;

/// What the run asked for and what it was answered, of one replica.
#[derive(Clone)]
enum Note {
    Asked(Op),
    Acked(usize),
    Voted(Vote),
    VoteAcked(usize),
    Applied(Entry),
}

/// Notes of each replica, with the events that there were before.
type Notes = Rc<RefCell<Vec<(usize, usize, Note)>>>;

struct Run<E: Env> {
    env: Recorder<E>,
    pool: Pool<Recorder<E>>,
    machines: Vec<Machine<Recorder<E>>>,
    models: Vec<Model>,
    notes: Notes,
    term: u64,
}

impl<E: Env> Run<E> {
    async fn new(env: Recorder<E>, file: &std::path::Path) -> Self {
        store::format(&env, file).await;
        let (pool, _) = store::open(&env, file).await.unwrap();
        let mut machines = Vec::new();
        for id in 1..=REPLICAS {
            let replica = pool.create_replica(store::descriptor(id)).await.unwrap();
            machines.push(Machine::new(pool.clone(), replica));
        }
        let models = vec![Model::default(); REPLICAS as usize];
        Self { env, pool, machines, models, notes: Notes::default(), term: 1 }
    }

    fn note(&self, nth: usize, note: Note) {
        self.notes.borrow_mut().push((self.env.events(), nth, note));
    }

    fn ask(&mut self, nth: usize, op: Op) {
        self.note(nth, Note::Asked(op.clone()));
        self.models[nth].perform(op);
    }

    async fn step(&mut self, random: &mut Random) {
        let nth = random.below(REPLICAS) as usize;
        match random.below(100) {
            0..=49 => self.append(nth, random).await,
            50..=74 => self.apply(nth).await,
            75..=77 => self.truncate(nth, random).await,
            78..=80 => self.vote(nth),
            81..=86 => self.purge(nth).await,
            87..=88 => self.checkpoint(),
            _ => self.env.sleep(Duration::from_micros(random.below(2_500))).await,
        }
    }

    async fn append(&mut self, nth: usize, random: &mut Random) {
        let mut entries = Vec::new();
        for _ in 0..=random.below(6) {
            let entry = some_entry(self.term, self.models[nth].log.next_index(), random);
            self.ask(nth, Op::Append(entry.clone()));
            entries.push(entry);
        }
        let issued = self.models[nth].issued();
        let (send, receive) = TypeConfig::oneshot();
        let mut log = self.machines[nth].replica.log();
        log.append(entries, IOFlushed::signal(send)).await.unwrap();
        let (env, notes) = (self.env.clone(), self.notes.clone());
        self.env.spawn(async move {
            receive.await.unwrap().unwrap();
            notes.borrow_mut().push((env.events(), nth, Note::Acked(issued)));
        });
    }

    async fn apply(&mut self, nth: usize) {
        let (from, upto) = (self.models[nth].applied.len(), self.models[nth].log.next_index());
        let mut log = self.machines[nth].replica.log();
        for entry in log.try_get_log_entries(from as u64..upto).await.unwrap() {
            let whole = self.models[nth].log.entries[&entry.log_id.index].clone();
            self.machines[nth].replica.map_room().await.unwrap();
            self.note(nth, Note::Applied(whole.clone()));
            self.models[nth].applied.push(whole);
            self.machines[nth].apply_one(entry);
        }
    }

    /// A new leader voids what was not committed.
    async fn truncate(&mut self, nth: usize, random: &mut Random) {
        let (applied, next) =
            (self.models[nth].applied.len() as u64, self.models[nth].log.next_index());
        if next <= applied || applied == 0 {
            return;
        }
        let last = self.models[nth].log.entries.get(&(applied - 1 + random.below(next - applied)));
        let Some(last) = last.map(|entry| entry.log_id) else { return };
        self.ask(nth, Op::Truncate(last));
        self.term += 1;
        self.machines[nth].replica.log().truncate_after(Some(last)).await.unwrap();
    }

    fn vote(&mut self, nth: usize) {
        self.term += 1;
        let vote = Vote::new(self.term, nth as u64);
        self.note(nth, Note::Voted(vote));
        self.models[nth].votes.push(vote);
        let number = self.models[nth].votes.len();
        let mut log = self.machines[nth].replica.log();
        let (env, notes) = (self.env.clone(), self.notes.clone());
        self.env.spawn(async move {
            log.save_vote(&vote).await.unwrap();
            notes.borrow_mut().push((env.events(), nth, Note::VoteAcked(number)));
        });
    }

    async fn purge(&mut self, nth: usize) {
        let keep = 20;
        let applied = &self.models[nth].applied;
        let target = applied.len().checked_sub(keep).and_then(|at| applied.get(at));
        let Some(target) = target.map(|entry| entry.log_id) else { return };
        if self.models[nth].log.purged >= Some(target) {
            return;
        }
        // As the consensus library does: only what a checkpoint has.
        self.pool.checkpoint().await.unwrap();
        self.ask(nth, Op::Purge(target));
        self.machines[nth].replica.log().purge(target).await.unwrap();
    }

    fn checkpoint(&self) {
        let pool = self.pool.clone();
        self.env.spawn(async move {
            pool.checkpoint().await.unwrap();
        });
    }
}

struct Record {
    log: Log,
    notes: Vec<(usize, usize, Note)>,
    /// Events until all replicas were made.
    made: usize,
}

fn record() -> Record {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let folder = folder.join(format!("recorded-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("pool");
    let record = LinuxShard::run(async |env| {
        let mut run = Run::new(Recorder::new(env), &file).await;
        let made = run.env.events();
        let random = &mut Random(23);
        for _ in 0..STEPS {
            run.step(random).await;
        }
        let stats = run.pool.stats();
        assert!(stats.cleaner_segments > 3, "{} segments cleaned", stats.cleaner_segments);
        Record { log: run.env.log(), notes: run.notes.borrow().clone(), made }
    });
    std::fs::remove_dir_all(&folder).unwrap();
    record.unwrap()
}

/// The record, gone through from its start.
struct Replay<'a> {
    record: &'a Record,
    notes: std::iter::Peekable<std::slice::Iter<'a, (usize, usize, Note)>>,
    events: usize,
    /// What is durable.
    image: Image,
    in_flight: BTreeMap<usize, WriteRecord>,
    models: Vec<Model>,
}

impl<'a> Replay<'a> {
    fn new(record: &'a Record) -> Self {
        Self {
            record,
            notes: record.notes.iter().peekable(),
            events: 0,
            image: Image::new(PoolGeometry::BYTES_MIN),
            in_flight: BTreeMap::new(),
            models: vec![Model::default(); REPLICAS as usize],
        }
    }

    /// Goes on until so many events have happened.
    fn go_on(&mut self, events: usize) {
        for event in &self.record.log.events()[self.events..events] {
            match event {
                Recorded::Started { write, offset, parts, .. } => {
                    let write_record =
                        WriteRecord { offset: *offset, bytes: parts.concat().into() };
                    self.in_flight.insert(*write, write_record);
                }
                Recorded::Finished { write, durable } => {
                    assert!(durable);
                    let write = self.in_flight.remove(write).expect("it was started");
                    self.image.write(write.offset, &write.bytes);
                }
                Recorded::Opened { .. } => {}
                Recorded::Discarded { .. } => unreachable!("the store discards nothing"),
            }
        }
        self.events = events;
        while let Some((_, nth, note)) = self.notes.next_if(|(at, ..)| *at <= events) {
            let model = &mut self.models[*nth];
            match note.clone() {
                Note::Asked(op) => model.perform(op),
                Note::Acked(issued) => model.acked = model.acked.max(issued),
                Note::Voted(vote) => model.votes.push(vote),
                Note::VoteAcked(number) => model.votes_acked = model.votes_acked.max(number),
                Note::Applied(entry) => model.applied.push(entry),
            }
        }
    }

    /// A power loss now.
    async fn check(&self, mode: InFlight, random: &mut Random) {
        let (events, all) = (self.events, self.record.log.events().len());
        let what = format!("{events} of {all} events, what was in flight {mode:?}");
        let mut image = self.image.clone();
        leave_in_flight(&mut image, self.in_flight.values(), mode, random);
        let (pool, report) = store::open(&env_of(&image), &path()).await.unwrap();
        assert_eq!((report.replicas, report.suspects.len()), (REPLICAS as usize, 0), "{what}");
        assert_eq!(report.damaged_entries, 0, "{what}");
        for (id, model) in (1..).zip(&self.models) {
            let replica = pool.replica(ReplicaId(id)).unwrap();
            assert_eq!(replica.health(), Health::Good, "{what}");
            recovered(&Machine::new(pool.clone(), replica), &mut model.clone()).await;
        }
    }
}

#[test]
fn power_losses_of_a_run_under_load() {
    let record = record();
    run(async {
        let random = &mut Random(29);
        let all = record.log.events().len();
        let step = ((all - record.made) / PREFIXES).max(1);
        let mut replay = Replay::new(&record);
        for (nth, events) in (record.made..=all).step_by(step).enumerate() {
            replay.go_on(events);
            replay.check(IN_FLIGHT[nth % IN_FLIGHT.len()], random).await;
        }
    });
}
