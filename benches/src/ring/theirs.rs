//! tokio-uring 0.5 doing the same.

use std::cell::Cell;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;

use nix::libc;
use tokio_uring::buf::BoundedBuf;
use tokio_uring::fs::{File, OpenOptions};

use crate::measure::{Case, Kind, Sample, Stopwatch};

/// Durable by a write and then fdatasync: it has no flags per write.
pub fn run_fdatasync(path: &Path, case: Case) -> Sample {
    run(path, case, 0)
}

/// Durable because the file is open with O_DSYNC.
pub fn run_dsync(path: &Path, case: Case) -> Sample {
    run(path, case, libc::O_DSYNC)
}

fn run(path: &Path, case: Case, flags: i32) -> Sample {
    tokio_uring::start(async {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT | flags);
        let file = Rc::new(options.open(path).await.expect("open"));
        let operations = Rc::new(Cell::new(0));
        let watch = Rc::new(Stopwatch::start());
        let workers: Vec<_> = (0..case.depth)
            .map(|worker| {
                let (file, operations, watch) = (file.clone(), operations.clone(), watch.clone());
                tokio_uring::spawn(async move {
                    let mut memory = Memory::new(case.bytes as usize);
                    let mut offsets = case.offsets(worker);
                    while watch.runs() {
                        let offset = offsets.next().expect("endless");
                        memory = operate(&file, case, offset, memory, flags == 0).await;
                        operations.set(operations.get() + 1);
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.await.expect("a worker");
        }
        watch.stop(operations.get(), case.depth)
    })
}

/// A vector with a block-aligned range in it.
struct Memory {
    vector: Vec<u8>,
    start: usize,
    length: usize,
}

impl Memory {
    fn new(length: usize) -> Self {
        let vector = vec![0; length + 4096];
        let start = vector.as_ptr().align_offset(4096);
        Self { vector, start, length }
    }
}

async fn operate(file: &File, case: Case, offset: u64, memory: Memory, sync: bool) -> Memory {
    let Memory { vector, start, length } = memory;
    let slice = vector.slice(start..start + length);
    let (result, slice) = match case.kind {
        Kind::Read => file.read_at(slice, offset).await,
        Kind::DurableWrite => {
            let (result, slice) = file.write_at(slice, offset).submit().await;
            if sync {
                file.sync_data().await.expect("fdatasync");
            }
            (result, slice)
        }
    };
    assert_eq!(result.expect("read or write"), length);
    Memory { vector: slice.into_inner(), start, length }
}
