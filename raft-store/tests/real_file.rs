//! The store on a real file: what was durable is there, and every power loss of a recorded run
//! leaves a pool that opens with all that had been acknowledged (hazard 35).
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "looks at real files and measures real time"
)]

mod support;

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use ballast_block::{AlignedBuf, BLOCK_SIZE};
use ballast_env::linux::LinuxShard;
use ballast_env::record::{Event as Recorded, Log, Recorder};
use ballast_raft_store::format::geometry::PoolGeometry;
use ballast_raft_store::stream::{OpenStoreError, StreamId};
use bytes::Bytes;
use support::crash::{IN_FLIGHT, Random, crash};
use support::pool::{append, format, ids, path, payload, reopen};
use support::{Event, Image, MemoryEnv, WriteRecord, run};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("store-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_pool_on_a_file() {
    let folder = Folder::new("file");
    let path = folder.0.join("pool");
    LinuxShard::run(async |env| {
        format(&env, &path).await;
        let streams = reopen(&env, &path).await.unwrap().streams;
        for op in 1..=500 {
            append(&streams, 1, op, 1 + (op % 4) as u32);
        }
        streams
            .commit_checkpoint(streams.freeze(), vec![Bytes::from_static(b"body")])
            .await
            .unwrap();
        for op in 501..=600 {
            append(&streams, 1, op, 1);
        }
        streams.flush().await.unwrap();
        let locked = reopen(&env, &path).await.err().unwrap();
        let is_locked = matches!(&locked, OpenStoreError::Io(error)
            if error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(is_locked, "{locked}");
    })
    .unwrap();
    LinuxShard::run(async |env| {
        let opened = reopen(&env, &path).await.unwrap();
        assert_eq!(opened.findings, []);
        assert_eq!(opened.checkpoint_body.unwrap(), &b"body"[..]);
        assert_eq!(ids(&opened.replay), (501..=600).map(|op| (1, op)).collect::<Vec<_>>());
        for record in &opened.replay {
            let stored = record.payload.unwrap();
            let buffer = AlignedBuf::zeroed(BLOCK_SIZE);
            let read = opened.streams.read_blocks(stored.place, 1, buffer).await.unwrap();
            assert_eq!(read[..], payload(1, record.op, 1));
        }
    })
    .unwrap();
}

/// A run on a real file: its record, and (events so far, records acknowledged).
fn recorded(folder: &Folder) -> (Log, Vec<(usize, usize)>) {
    let file = folder.0.join("pool");
    LinuxShard::run(async |env| {
        let env = Recorder::new(env);
        format(&env, &file).await;
        let streams = reopen(&env, &file).await.unwrap().streams;
        let sure = Rc::new(RefCell::new(Vec::new()));
        for op in 1..=60u64 {
            let at = append(&streams, 1 + op % 2, op.div_ceil(2), (op % 7) as u32 * 8).at;
            let (recorder, sure) = (env.clone(), sure.clone());
            let callback = move |result: Result<(), _>| {
                result.unwrap();
                sure.borrow_mut().push((recorder.log().events().len(), op as usize));
            };
            streams.on_durable(StreamId::Hot, at, Box::new(callback));
            if op % 9 == 0 {
                streams.flush().await.unwrap();
            }
        }
        streams.flush().await.unwrap();
        let sure = sure.borrow().clone();
        (env.log(), sure)
    })
    .unwrap()
}

#[test]
fn every_power_loss_of_a_recorded_run() {
    let folder = Folder::new("recorded");
    let (log, sure) = recorded(&folder);
    run(async {
        let disk = MemoryEnv::default();
        let image = Image::new(PoolGeometry::BYTES_MIN);
        for event in log.events() {
            let mut disk = disk.disk.borrow_mut();
            match event {
                Recorded::Started { write, offset, parts, .. } => {
                    assert_eq!(*write, disk.writes.len());
                    let bytes = Bytes::from(parts.concat());
                    disk.writes.push(WriteRecord { offset: *offset, bytes });
                    disk.events.push(Event::Issued(*write));
                }
                Recorded::Finished { write, durable } => {
                    assert!(durable);
                    disk.events.push(Event::Completed(*write));
                }
                Recorded::Opened { .. } => disk.events.push(Event::Nothing),
                Recorded::Discarded { .. } => unreachable!("the store discards nothing"),
            }
        }
        let random = &mut Random(11);
        let formatted = disk.disk.borrow().writes.iter().position(|write| write.offset == 0);
        let formatted = Event::Completed(formatted.unwrap());
        let first = disk.disk.borrow().events.iter().position(|event| *event == formatted).unwrap();
        let all: Vec<_> = (1..=60u64).map(|op| (1 + op % 2, op.div_ceil(2))).collect();
        for events in first + 1..=log.events().len() {
            for mode in IN_FLIGHT {
                let image = crash(&image, &disk, events, mode, random);
                let env = MemoryEnv::with_image(&path(), image);
                let found = ids(&reopen(&env, &path()).await.unwrap().replay);
                let sure = sure.iter().filter(|(at, _)| *at <= events).map(|(_, count)| *count);
                assert!(found.len() >= sure.max().unwrap_or(0), "after {events} events");
                assert!(all.starts_with(&found));
            }
        }
    });
}
