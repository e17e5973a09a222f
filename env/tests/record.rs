//! The record of a disk's writes, and the images replayed from it.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "looks at real files; the dumb model"
)]

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use ballast_block::{AlignedBuf, BLOCK_SIZE};
use ballast_env::conformance;
use ballast_env::disk::{Disk, File, OpenMode};
use ballast_env::linux::LinuxShard;
use ballast_env::record::{Event, Log, RecordError, Recorder};
use ballast_env::spawn::Spawn;

const BLOCK: u64 = BLOCK_SIZE as u64;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("record-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn filled(byte: u8, blocks: usize) -> bytes::Bytes {
    let mut buffer = AlignedBuf::zeroed(blocks * BLOCK_SIZE);
    buffer.fill(byte);
    buffer.freeze()
}

#[test]
fn a_recorder_keeps_the_contracts() {
    let folder = Folder::new("conformance");
    let address = ballast_env::network::Address::Tcp("127.0.0.1:0".parse().unwrap());
    LinuxShard::run(async |env| {
        conformance::all(&Recorder::new(env), &folder.0, &address).await;
    })
    .unwrap();
}

/// A run with three writers, two of them on the same blocks.
fn recorded(folder: &Folder) -> Log {
    LinuxShard::run(async |env| {
        let env = Recorder::new(env);
        let mode = OpenMode::CreateNew { size: 8 * BLOCK };
        let file = Rc::new(env.open(&folder.0.join("pool"), mode).await.unwrap());
        file.write_at(0, vec![filled(1, 2), filled(2, 1)]).await.unwrap();
        let ends = Rc::new(RefCell::new(0));
        let (sender, mut receiver) = tokio::sync::mpsc::channel(4);
        for (offset, byte) in [(1, 3), (1, 4), (4, 5)] {
            let (file, ends, sender) = (file.clone(), ends.clone(), sender.clone());
            let _detached = env.spawn(async move {
                file.write_at(offset * BLOCK, vec![filled(byte, 2)]).await.unwrap();
                *ends.borrow_mut() += 1;
                sender.send(()).await.unwrap();
            });
        }
        for _ in 0..3 {
            receiver.recv().await.unwrap();
        }
        file.discard(0, BLOCK).await.unwrap();
        assert!(file.write_at(8 * BLOCK, vec![filled(9, 1)]).await.is_err());
        env.log()
    })
    .unwrap()
}

/// What every byte may be after a power loss behind `prefix`, block by block and byte value by
/// byte value: the dumb model. (All blocks here are filled with one value per write.)
fn possible(prefix: &[Event], block: u64) -> Vec<u8> {
    let mut values = vec![0_u8];
    let mut open = Vec::new();
    for event in prefix {
        match event {
            Event::Started { write, offset, parts, .. } => {
                let at = (block * BLOCK).checked_sub(*offset).map(|at| at as usize);
                let bytes = parts.concat();
                if let Some(&value) = at.and_then(|at| bytes.get(at)) {
                    open.push((*write, value));
                    values.push(value);
                }
            }
            Event::Finished { write, durable: true } => {
                if let Some(place) = open.iter().position(|(number, _)| number == write) {
                    let (_, value) = open.remove(place);
                    // The others in flight may have landed before or after it.
                    values = std::iter::once(value).chain(open.iter().map(|o| o.1)).collect();
                }
            }
            Event::Discarded { offset, length, .. }
                if (*offset..offset + length).contains(&(block * BLOCK)) =>
            {
                values.push(0);
            }
            _ => {}
        }
    }
    values
}

#[test]
fn every_prefix_holds_what_was_acknowledged() {
    let folder = Folder::new("prefixes");
    let log = recorded(&folder);
    assert_eq!(log.files(), [folder.0.join("pool")]);
    let image = folder.0.join("image");
    let mut torn_apart = false;
    for events in 1..=log.events().len() {
        let prefix = &log.events()[..events];
        for torn in [None].into_iter().chain((0..40).map(Some)) {
            log.replay_prefix(0, events, torn, &image).unwrap();
            let bytes = std::fs::read(&image).unwrap();
            assert_eq!(bytes.len() as u64, 8 * BLOCK);
            for (block, contents) in bytes.chunks(BLOCK_SIZE).enumerate() {
                let allowed = possible(prefix, block as u64);
                assert!(
                    contents.iter().all(|byte| allowed.contains(byte)),
                    "block {block} behind {events} events, {torn:?}: not in {allowed:?}"
                );
                for sector in contents.chunks(512) {
                    assert!(sector.iter().all(|byte| *byte == sector[0]), "a torn sector");
                }
                torn_apart |= contents.iter().any(|byte| *byte != contents[0]);
            }
        }
    }
    assert!(torn_apart, "no seed tore a block");
    let whole = log.events().len();
    log.replay_prefix(0, whole, None, &image).unwrap();
    let real = std::fs::read(folder.0.join("pool")).unwrap();
    let replayed = std::fs::read(&image).unwrap();
    // Without the blocks of two writers at once and what was discarded.
    assert_eq!(replayed[3 * BLOCK_SIZE..], real[3 * BLOCK_SIZE..]);
}

#[test]
fn nothing_to_replay_before_the_file_was_opened() {
    let folder = Folder::new("unopened");
    let log = recorded(&folder);
    let image = folder.0.join("image");
    for (file, events) in [(0, 0), (1, 100)] {
        let error = log.replay_prefix(file, events, None, &image).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
}

#[test]
fn saved_and_loaded() {
    let folder = Folder::new("saved");
    let log = recorded(&folder);
    let path = folder.0.join("record");
    log.save(&path).unwrap();
    assert_eq!(Log::load(&path).unwrap(), log);
    let bytes = std::fs::read(&path).unwrap();
    for length in [0, 7, 9, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(matches!(Log::load(&path), Err(RecordError::Malformed { .. })), "{length}");
    }
}
