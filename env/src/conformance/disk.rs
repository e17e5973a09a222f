//! Checks of files.

use std::io::ErrorKind;
use std::path::Path;
use std::rc::Rc;

use ballast_block::{AlignedBuf, BLOCK_SIZE};
use bytes::Bytes;

use super::together;
use crate::Env;
use crate::disk::{File, OpenMode};

const BLOCK: u64 = BLOCK_SIZE as u64;

/// Every check of files; each uses a file of its own in `folder`.
pub async fn all<E: Env>(env: &E, folder: &Path) {
    round_trip(env, &folder.join("round-trip")).await;
    parts_back_to_back(env, &folder.join("parts")).await;
    many_parts(env, &folder.join("many-parts")).await;
    exclusive(env, &folder.join("exclusive")).await;
    create_new(env, &folder.join("create-new")).await;
    read_only(env, &folder.join("read-only")).await;
    bounds(env, &folder.join("bounds")).await;
    concurrent(env, &folder.join("concurrent")).await;
    dropped(env, &folder.join("dropped")).await;
    discard(env, &folder.join("discard")).await;
}

async fn create<E: Env>(env: &E, path: &Path, blocks: u64) -> E::File {
    let mode = OpenMode::CreateNew { size: blocks * BLOCK };
    env.open(path, mode).await.expect("a new file can be created")
}

/// `blocks` blocks of contents that differ from block to block and from `tag` to `tag`.
fn pattern(tag: u64, blocks: usize) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(blocks * BLOCK_SIZE);
    for (index, word) in buffer.chunks_exact_mut(8).enumerate() {
        let value = (tag + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64;
        word.copy_from_slice(&value.to_le_bytes());
    }
    buffer
}

async fn read(file: &impl File, offset: u64, blocks: usize) -> AlignedBuf {
    let (result, buffer) = file.read_at(offset, AlignedBuf::zeroed(blocks * BLOCK_SIZE)).await;
    result.expect("a read inside the file");
    assert_eq!(buffer.len(), blocks * BLOCK_SIZE, "a read keeps the buffer's length");
    buffer
}

/// What was written is read, now and by the next opener; a new file reads as zeroes.
pub async fn round_trip<E: Env>(env: &E, path: &Path) {
    let file = create(env, path, 8).await;
    assert_eq!(file.size(), 8 * BLOCK);
    assert!(read(&file, 0, 8).await.iter().all(|&byte| byte == 0), "a new file reads as zeroes");
    file.write_at(2 * BLOCK, vec![pattern(1, 3).freeze()]).await.expect("write");
    file.write_at(3 * BLOCK, vec![pattern(2, 1).freeze()]).await.expect("overwrite");
    file.write_at(0, vec![]).await.expect("nothing to write");
    drop(file);
    let file = env.open(path, OpenMode::Exclusive).await.expect("open again");
    assert_eq!(file.size(), 8 * BLOCK, "the size stays");
    assert!(read(&file, 0, 2).await.iter().all(|&byte| byte == 0));
    let first = pattern(1, 3);
    assert_eq!(*read(&file, 2 * BLOCK, 1).await, first[..BLOCK_SIZE]);
    assert_eq!(*read(&file, 3 * BLOCK, 1).await, *pattern(2, 1));
    assert_eq!(*read(&file, 4 * BLOCK, 1).await, first[2 * BLOCK_SIZE..]);
    assert!(read(&file, 5 * BLOCK, 3).await.iter().all(|&byte| byte == 0));
}

/// The parts of one write follow each other without a gap, whatever their sizes.
pub async fn parts_back_to_back<E: Env>(env: &E, path: &Path) {
    let file = create(env, path, 16).await;
    let whole = pattern(3, 6).freeze();
    let parts =
        vec![pattern(4, 1).freeze(), whole.slice(2 * BLOCK_SIZE..), whole.slice(..BLOCK_SIZE)];
    let expected = parts.concat();
    file.write_at(BLOCK, parts).await.expect("write");
    assert_eq!(*read(&file, BLOCK, 6).await, *expected);
    assert!(read(&file, 7 * BLOCK, 9).await.iter().all(|&byte| byte == 0));
}

/// More parts than one system call takes.
pub async fn many_parts<E: Env>(env: &E, path: &Path) {
    const PARTS: usize = 2500;
    let file = create(env, path, PARTS as u64).await;
    let source = pattern(5, PARTS).freeze();
    // Backwards, so that no two neighbours of the file are neighbours in memory.
    let block = |index: usize| source.slice(index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE);
    let parts: Vec<Bytes> = (0..PARTS).rev().map(block).collect();
    let expected = parts.concat();
    file.write_at(0, parts).await.expect("write");
    assert!(*read(&file, 0, PARTS).await == *expected, "a write of many parts reads differently");
}

/// An exclusive open keeps others out until its file is dropped.
pub async fn exclusive<E: Env>(env: &E, path: &Path) {
    let first = create(env, path, 1).await;
    let second = env.open(path, OpenMode::Exclusive).await.err().expect("locked by its creator");
    assert_eq!(second.kind(), ErrorKind::WouldBlock);
    drop(first);
    let third = env.open(path, OpenMode::Exclusive).await.expect("unlocked by the drop");
    let fourth = env.open(path, OpenMode::Exclusive).await.err().expect("locked again");
    assert_eq!(fourth.kind(), ErrorKind::WouldBlock);
    drop(third);
    let missing = path.with_extension("missing");
    for mode in [OpenMode::Exclusive, OpenMode::ReadOnly] {
        let error = env.open(&missing, mode).await.err().expect("does not exist");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

/// `CreateNew` never touches a file that exists.
pub async fn create_new<E: Env>(env: &E, path: &Path) {
    let file = create(env, path, 2).await;
    file.write_at(0, vec![pattern(6, 2).freeze()]).await.expect("write");
    drop(file);
    let again = env.open(path, OpenMode::CreateNew { size: 4 * BLOCK }).await;
    assert_eq!(again.err().expect("exists").kind(), ErrorKind::AlreadyExists);
    let file = env.open(path, OpenMode::Exclusive).await.expect("open");
    assert_eq!(*read(&file, 0, 2).await, *pattern(6, 2), "its contents stay");
}

/// A reader gets in beside the owner, sees its writes, and can't write.
pub async fn read_only<E: Env>(env: &E, path: &Path) {
    let owner = create(env, path, 2).await;
    let reader = env.open(path, OpenMode::ReadOnly).await.expect("open beside the owner");
    owner.write_at(0, vec![pattern(7, 1).freeze()]).await.expect("write");
    assert_eq!(*read(&reader, 0, 1).await, *pattern(7, 1));
    let refused = reader.write_at(0, vec![pattern(8, 1).freeze()]).await;
    assert_eq!(refused.expect_err("read only").kind(), ErrorKind::PermissionDenied);
    let refused = reader.discard(0, BLOCK).await;
    assert_eq!(refused.expect_err("read only").kind(), ErrorKind::PermissionDenied);
    assert_eq!(*read(&reader, 0, 1).await, *pattern(7, 1));
}

/// Past the end nothing is read or written, and the buffer comes back.
pub async fn bounds<E: Env>(env: &E, path: &Path) {
    let file = create(env, path, 4).await;
    for offset in [3 * BLOCK, 4 * BLOCK, 1 << 50] {
        let buffer = pattern(9, 2);
        let memory = buffer.as_ptr();
        let (result, buffer) = file.read_at(offset, buffer).await;
        assert_eq!(result.expect_err("past the end").kind(), ErrorKind::UnexpectedEof);
        assert_eq!(buffer.as_ptr(), memory, "the same buffer comes back with an error");
        assert_eq!(buffer.len(), 2 * BLOCK_SIZE);
        let written = file.write_at(offset, vec![pattern(9, 2).freeze()]).await;
        assert_eq!(written.expect_err("past the end").kind(), ErrorKind::InvalidInput);
        let discarded = file.discard(offset, 2 * BLOCK).await;
        assert_eq!(discarded.expect_err("past the end").kind(), ErrorKind::InvalidInput);
    }
    assert!(read(&file, 0, 4).await.iter().all(|&byte| byte == 0), "nothing was written");
}

/// Many writes and reads at once, more than any queue of a device or of a ring is deep.
pub async fn concurrent<E: Env>(env: &E, path: &Path) {
    const WRITES: u64 = 1000;
    let file = Rc::new(create(env, path, 2 * WRITES).await);
    let write = |index: u64| {
        let file = file.clone();
        let parts = vec![pattern(index, 1).freeze(), pattern(index + WRITES, 1).freeze()];
        async move { file.write_at(2 * index * BLOCK, parts).await.expect("write") }
    };
    together(env, (0..WRITES).map(write).collect()).await;
    let check = |index: u64| {
        let file = file.clone();
        async move {
            let found = read(&*file, 2 * index * BLOCK, 2).await;
            assert_eq!(found[..BLOCK_SIZE], *pattern(index, 1), "write {index}");
            assert_eq!(found[BLOCK_SIZE..], *pattern(index + WRITES, 1), "write {index}");
        }
    };
    together(env, (0..WRITES).map(check).collect()).await;
}

/// Dropping futures and the file hurts neither the operations nor the next opener.
pub async fn dropped<E: Env>(env: &E, path: &Path) {
    const WRITES: u64 = 64;
    let file = create(env, path, WRITES).await;
    for index in 0..WRITES {
        let mut write = Box::pin(file.write_at(index * BLOCK, vec![pattern(index, 1).freeze()]));
        let mut read = Box::pin(file.read_at(index * BLOCK, AlignedBuf::zeroed(BLOCK_SIZE)));
        // One poll starts them.
        tokio::select! {
            biased;
            _ = &mut write => {}
            _ = &mut read => {}
            () = std::future::ready(()) => {}
        }
    }
    drop(file);
    let file = loop {
        match env.open(path, OpenMode::Exclusive).await {
            Ok(file) => break file,
            // Some are still on their way and hold the file open.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                env.sleep(std::time::Duration::from_millis(1)).await;
            }
            Err(error) => panic!("open again: {error}"),
        }
    };
    for index in 0..WRITES {
        let found = read(&file, index * BLOCK, 1).await;
        let zero = found.iter().all(|&byte| byte == 0);
        assert!(zero || *found == *pattern(index, 1), "block {index} was never written so");
    }
}

/// What is discarded reads as zeroes or as before; its neighbours stay; it can be written again.
pub async fn discard<E: Env>(env: &E, path: &Path) {
    let file = create(env, path, 16).await;
    let before = pattern(10, 16);
    file.write_at(0, vec![pattern(10, 16).freeze()]).await.expect("write");
    file.discard(4 * BLOCK, 8 * BLOCK).await.expect("discard");
    file.discard(0, 0).await.expect("nothing to discard");
    let found = read(&file, 0, 16).await;
    assert_eq!(found[..4 * BLOCK_SIZE], before[..4 * BLOCK_SIZE]);
    assert_eq!(found[12 * BLOCK_SIZE..], before[12 * BLOCK_SIZE..]);
    for (index, block) in found.chunks(BLOCK_SIZE).enumerate() {
        let zero = block.iter().all(|&byte| byte == 0);
        assert!(zero || *block == before[index * BLOCK_SIZE..][..BLOCK_SIZE]);
    }
    file.write_at(6 * BLOCK, vec![pattern(11, 2).freeze()]).await.expect("write again");
    assert_eq!(*read(&file, 6 * BLOCK, 2).await, *pattern(11, 2));
    assert_eq!(file.size(), 16 * BLOCK, "the size stays");
}
