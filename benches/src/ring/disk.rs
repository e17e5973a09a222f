//! What durable writes cost on this disk.

use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use ballast_block::AlignedBuf;
use ballast_env::disk::{Disk, File, OpenMode};

use crate::measure::{Case, Kind, Sample, median, summary};
use crate::ours::{on_a_shard, sample, write_all};
use crate::{FILE_BYTES, ROUNDS};

/// Writes the report.
pub fn report(path: &Path) {
    println!("durable writes on {}; medians of {ROUNDS} interleaved rounds", path.display());
    let unwritten = (0..ROUNDS).map(|_| first_writes(path)).collect();
    println!("8 KiB x1, first write into fallocated extents, in order: {}", summary(unwritten));
    let pass = Instant::now();
    on_a_shard(async |env| {
        let file = env.open(path, OpenMode::Exclusive).await.expect("open");
        write_all(&file).await;
    });
    let rate = FILE_BYTES as f64 / 1e6 / pass.elapsed().as_secs_f64();
    println!("writing the whole file once, 1 MiB at a time: {rate:.0} MB/s");
    let sizes = [4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20].map(|bytes| (bytes, 1));
    let depths = [2, 3, 4, 8, 16].map(|depth| (8 << 10, depth));
    let large = [2, 4].map(|depth| (256 << 10, depth));
    let cases: Vec<(u64, u64)> = sizes.into_iter().chain(depths).chain(large).collect();
    let mut samples = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        for (&(bytes, depth), samples) in cases.iter().zip(&mut samples) {
            let case = Case { kind: Kind::DurableWrite, depth, bytes, file_bytes: FILE_BYTES };
            samples.push(on_a_shard(async |env| {
                let file = env.open(path, OpenMode::Exclusive).await.expect("open");
                sample(Rc::new(file), case).await
            }));
        }
    }
    for ((bytes, depth), samples) in cases.into_iter().zip(samples) {
        let throughput = median(&samples).rate * bytes as f64 / 1e6;
        println!("{:>5} KiB x{depth:<3} {throughput:>7.1} MB/s {}", bytes >> 10, summary(samples));
    }
}

/// Writes into a new file whose space is allocated and not written yet; leaves it behind.
fn first_writes(path: &Path) -> Sample {
    const BYTES: usize = 8 << 10;
    drop(std::fs::remove_file(path));
    on_a_shard(async |env| {
        let file = env.open(path, OpenMode::CreateNew { size: FILE_BYTES }).await.expect("create");
        let payload = AlignedBuf::zeroed(BYTES).freeze();
        let watch = crate::measure::Stopwatch::start();
        let mut operations = 0;
        while watch.runs() {
            let offset = operations * BYTES as u64 % file.size();
            file.write_at(offset, vec![payload.clone()]).await.expect("write");
            operations += 1;
        }
        watch.stop(operations, 1)
    })
}
