//! Our ring, as the product uses it.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use ballast_block::AlignedBuf;
use ballast_env::disk::{Disk, File, OpenMode};
use ballast_env::linux::{LinuxEnv, LinuxFile, LinuxShard, SyncBy};

use crate::measure::{Case, Kind, Sample, Stopwatch};

/// Creates the file and writes it once, so that its extents are *written*.
pub fn create_written(path: &Path, bytes: u64) {
    on_a_shard(async |env| {
        let file = env.open(path, OpenMode::CreateNew { size: bytes }).await.expect("create");
        write_all(&file).await;
    });
}

/// Writes the whole file once, 1 MiB at a time.
pub async fn write_all(file: &LinuxFile) {
    const PIECE: usize = 1 << 20;
    let piece = AlignedBuf::zeroed(PIECE).freeze();
    for offset in (0..file.size()).step_by(PIECE) {
        file.write_at(offset, vec![piece.clone()]).await.expect("write");
    }
}

/// Runs `main` on a shard of this thread.
pub fn on_a_shard<Fut: Future>(main: impl FnOnce(LinuxEnv) -> Fut) -> Fut::Output {
    LinuxShard::run(main).expect("a ring")
}

/// One sample on an existing file, synced by RWF_DSYNC.
pub fn run_flag(path: &Path, case: Case) -> Sample {
    run(path, case, SyncBy::Flag)
}

/// One sample on an existing file, synced by shared flushes.
pub fn run_flush(path: &Path, case: Case) -> Sample {
    run(path, case, SyncBy::Flush)
}

fn run(path: &Path, case: Case, sync_by: SyncBy) -> Sample {
    on_a_shard(async |env| {
        let file = env.sync_by(sync_by).open(path, OpenMode::Exclusive).await.expect("open");
        sample(Rc::new(file), case).await
    })
}

/// One sample on an open file.
pub async fn sample(file: Rc<LinuxFile>, case: Case) -> Sample {
    let operations = Rc::new(Cell::new(0));
    let watch = Rc::new(Stopwatch::start());
    let workers: Vec<_> = (0..case.depth)
        .map(|worker| {
            let (file, operations, watch) = (file.clone(), operations.clone(), watch.clone());
            tokio::task::spawn_local(async move {
                let mut buffer = AlignedBuf::zeroed(case.bytes as usize);
                let payload = AlignedBuf::zeroed(case.bytes as usize).freeze();
                let mut offsets = case.offsets(worker);
                while watch.runs() {
                    let offset = offsets.next().expect("endless");
                    match case.kind {
                        Kind::Read => {
                            let (result, back) = file.read_at(offset, buffer).await;
                            result.expect("read");
                            buffer = back;
                        }
                        Kind::DurableWrite => {
                            file.write_at(offset, vec![payload.clone()]).await.expect("write");
                        }
                    }
                    operations.set(operations.get() + 1);
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.expect("a worker");
    }
    watch.stop(operations.get(), case.depth)
}
