//! Streams of an open pool: append, watermark, reads, space, failure.

mod support;

use std::cell::RefCell;
use std::rc::Rc;

use ballast_block::limits::STREAM_SEAL_IDLE_MS;
use ballast_block::{AlignedBuf, BLOCK_SIZE, ReplicaId};
use ballast_env::clock::Clock;
use ballast_raft_store::format::vote_slot::{SlotNumber, SlotState};
use ballast_raft_store::segment::SegmentState;
use ballast_raft_store::stream::{
    AppendError, PayloadState, RecordHead, RecordKind, SpaceClass, StreamId,
};
use bytes::Bytes;
use support::pool::{append, append_as, format, ids, path, payload, reopen};
use support::{MemoryEnv, run};

#[test]
fn what_is_durable_is_replayed() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let opened = reopen(&env, &path()).await.unwrap();
        assert!(opened.replay.is_empty() && opened.findings.is_empty());
        assert_eq!(opened.streams.info().boot_counter, 1);
        let streams = opened.streams;
        let mut last = None;
        for op in 1..=100 {
            last = Some(append(&streams, op % 3, op.div_ceil(3), (op % 5) as u32));
        }
        streams.durable(StreamId::Hot, last.unwrap().at).await.unwrap();
        let writes = streams.stats(StreamId::Hot).writes;
        assert!(writes <= 2, "100 records that were queued together took {writes} writes");
        drop(streams);
        let again = MemoryEnv::with_image(&path(), env.image(&path()));
        let opened = reopen(&again, &path()).await.unwrap();
        assert_eq!(opened.findings, []);
        let expected: Vec<_> = (1..=100u64).map(|op| (op % 3, op.div_ceil(3))).collect();
        assert_eq!(ids(&opened.replay), expected);
        assert_eq!(opened.streams.info().boot_counter, 2);
        for record in &opened.replay {
            let Some(stored) = record.payload else { continue };
            assert_eq!(record.payload_state, PayloadState::Good);
            let buffer = AlignedBuf::zeroed(stored.blocks as usize * BLOCK_SIZE);
            let read = opened.streams.read_blocks(stored.place, stored.blocks, buffer).await;
            assert_eq!(read.unwrap()[..], payload(record.replica.0, record.op, stored.blocks));
            assert!(opened.streams.segments().is_live(stored.place));
        }
    });
}

#[test]
fn payload_is_readable_at_once_and_goes_to_disk_uncopied() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        let first = append(&streams, 1, 1, 4);
        let second = append(&streams, 1, 2, 4);
        assert!(!streams.is_durable(first.place) && !streams.is_durable(second.header));
        let pending = streams.pending_payload(first.place.plus(1), 2).unwrap();
        assert_eq!(pending[..], payload(1, 1, 4)[BLOCK_SIZE..3 * BLOCK_SIZE]);
        // Across two records, from memory alone.
        let read = |place, count: u32| {
            streams.read_blocks(place, count, AlignedBuf::zeroed(count as usize * BLOCK_SIZE))
        };
        let both = [payload(1, 1, 4), payload(1, 2, 4)].concat();
        assert_eq!(read(first.place, 8).await.unwrap()[..], both[..]);
        streams.durable(StreamId::Hot, first.at).await.unwrap();
        assert!(streams.is_durable(first.place) && streams.is_durable(first.header));
        assert_eq!(streams.pending_payload(first.place, 1), None);
        assert_eq!(read(first.place, 8).await.unwrap()[..], both[..]);
        // An unaligned payload is copied, not refused.
        let odd = Bytes::from(vec![7; BLOCK_SIZE + 1]).slice(1..);
        let record =
            RecordHead { kind: RecordKind::Entry, replica: ReplicaId(1), op: 3, body: &[] };
        let third =
            streams.append(StreamId::Hot, SpaceClass::Normal, record, Some(odd), &[]).unwrap();
        streams.durable(StreamId::Hot, third.at).await.unwrap();
        assert_eq!(read(third.place, 1).await.unwrap()[..], [7; BLOCK_SIZE]);
    });
}

#[test]
fn callbacks_come_in_order_and_a_failed_write_fails_all() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        let log = Rc::new(RefCell::new(Vec::new()));
        let note = |number: u64| {
            let log = log.clone();
            Box::new(move |result: Result<(), _>| log.borrow_mut().push((number, result.is_ok())))
        };
        for op in 1..=40 {
            let at = append(&streams, 1, op, 100).at;
            streams.on_durable(StreamId::Hot, at, note(op));
        }
        streams.flush().await.unwrap();
        assert_eq!(*log.borrow(), (1..=40).map(|op| (op, true)).collect::<Vec<_>>());
        log.borrow_mut().clear();
        env.disk.borrow_mut().fail_write = Some(0);
        let at = append(&streams, 1, 41, 1).at;
        streams.on_durable(StreamId::Hot, at, note(41));
        assert!(streams.flush().await.is_err());
        assert_eq!(*log.borrow(), [(41, false)]);
        env.disk.borrow_mut().fail_write = None;
        let refused = append_as(&streams, SpaceClass::Normal, 1, 42, 1);
        assert!(matches!(refused, Err(AppendError::PoolFailed(_))), "nothing is retried");
        assert!(streams.failure().borrow().is_some());
        streams
            .durable(StreamId::Hot, ballast_raft_store::stream::StreamPosition(1))
            .await
            .unwrap();
    });
}

#[test]
fn an_overdue_write_fails_the_pool() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        env.disk.borrow_mut().hang = true;
        let at = append(&streams, 1, 1, 1).at;
        let failed = streams.durable(StreamId::Hot, at).await.unwrap_err();
        assert!(failed.problem.contains("no answer"), "{failed}");
    });
}

#[test]
fn an_idle_stream_is_sealed_once() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        append(&streams, 1, 1, 1);
        streams.flush().await.unwrap();
        env.sleep(std::time::Duration::from_millis(10 * STREAM_SEAL_IDLE_MS)).await;
        assert_eq!(streams.stats(StreamId::Hot).writes, 2);
        assert_eq!(streams.position(StreamId::Hot).0, 2);
    });
}

#[test]
fn a_full_pool_keeps_its_reserves_in_order() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        let classes = [
            SpaceClass::Normal,
            SpaceClass::Trim,
            SpaceClass::Cleaner,
            SpaceClass::Checkpoint,
            SpaceClass::Control,
        ];
        let mut op = 0;
        let mut appended = Vec::new();
        for class in classes {
            let before = op;
            let error = loop {
                match append_as(&streams, class, 1, op + 1, 256) {
                    Ok(_) => op += 1,
                    Err(error) => break error,
                }
            };
            assert_eq!(error, AppendError::OutOfSpace { class });
            appended.push(op - before);
            streams.flush().await.unwrap();
            assert_eq!(streams.segments().free_for(class), 0);
        }
        // One such entry per segment of 2 MiB; one segment stays bespoken for the hot stream.
        assert_eq!(appended, [21, 2, 2, 4, 2]);
        drop(streams);
        let again = MemoryEnv::with_image(&path(), env.image(&path()));
        let opened = reopen(&again, &path()).await.unwrap();
        assert_eq!(opened.replay.len() as u64, op);
    });
}

#[test]
fn vote_slots_keep_the_last_vote() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        assert_eq!(streams.read_vote_slots(3).await, vec![SlotState::Empty; 3]);
        let vote = |op: u64| {
            streams.write_vote_slot(
                SlotNumber(1),
                ReplicaId(9),
                op,
                Bytes::from(vec![op as u8; 48]),
            )
        };
        // The first is asked for, then nobody waits for it any more.
        tokio::select! {
            biased;
            _ = vote(1) => unreachable!("takes a disk write"),
            () = std::future::ready(()) => {}
        }
        vote(2).await.unwrap();
        let states = streams.read_vote_slots(300).await;
        let SlotState::Vote(found) = &states[1] else { panic!("{:?}", states[1]) };
        assert_eq!((found.replica, found.op), (ReplicaId(9), 2));
        assert_eq!(states[0], SlotState::Empty);
        let mut image = env.image(&path());
        drop(streams);
        image.rot(256 + 1, 100);
        image.make_unreadable(256 + 2);
        let again = MemoryEnv::with_image(&path(), image);
        let streams = reopen(&again, &path()).await.unwrap().streams;
        let states = streams.read_vote_slots(4).await;
        let damaged = SlotState::Damaged;
        assert_eq!(states, [SlotState::Empty, damaged.clone(), damaged, SlotState::Empty]);
    });
}

#[test]
fn checkpoints_bound_the_replay_and_free_segments() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        let table = streams.segments().clone();
        let mut places = Vec::new();
        for op in 1..=12 {
            places.push(append(&streams, 1, op, 200));
        }
        streams.flush().await.unwrap();
        let free = table.counts().free;
        // The first two segments are dead, the third holds a retained entry without payload.
        for appended in &places[..6] {
            table.mark_dead(appended.place, 200);
        }
        table.retain(places[4].header);
        let pin = streams.pin_segment(places[0].place);
        let page = RecordHead { kind: RecordKind::Page, replica: ReplicaId(0), op: 0, body: &[] };
        let frozen = streams.freeze();
        // Pages of the checkpoint come after the freeze, as do new entries.
        let page = streams
            .append(StreamId::Meta, SpaceClass::Checkpoint, page, Some(payload(0, 0, 3)), &[])
            .unwrap();
        append(&streams, 1, 13, 1);
        let body = vec![Bytes::from(vec![1; 5000]), Bytes::from(vec![2; 3 << 20])];
        let committed = streams.commit_checkpoint(frozen, body.clone()).await.unwrap();
        assert_eq!((committed.checkpoint, committed.freed), (1, 1));
        // -1 hot, -1 meta, -2 body, +1 freed.
        assert_eq!(table.counts().free, free - 2);
        drop(pin);
        assert_eq!(table.counts().free, free - 1, "freed with its last pin");
        streams.flush().await.unwrap();
        drop((streams, table));

        let again = MemoryEnv::with_image(&path(), env.image(&path()));
        let opened = reopen(&again, &path()).await.unwrap();
        assert_eq!(ids(&opened.replay), [(1, 13)]);
        assert_eq!(opened.checkpoint_body.unwrap(), body.concat());
        let table = opened.streams.segments().clone();
        assert!(table.is_live(places[6].place) && !table.is_live(places[0].place));
        assert!(table.is_live(page.place) && !table.is_live(page.place.plus(3)));
        assert_eq!(table.counts().live_blocks, 6 * 200 + 3 + 1);
        let victims = table.victims(10, u32::MAX);
        let frozen = opened.streams.freeze();
        let committed = opened.streams.commit_checkpoint(frozen, vec![]).await.unwrap();
        assert_eq!(committed.checkpoint, 2);
        assert_eq!(committed.freed, 1, "nothing is retained any more");
        assert!(victims.iter().all(|victim| victim.live_blocks > 0));
        let geometry = table.geometry();
        let state = |place| table.state(geometry.locate(place).unwrap().0);
        assert_eq!(state(places[6].place), SegmentState::Full(StreamId::Hot));
    });
}
