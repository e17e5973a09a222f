//! Keeps our ring and tokio-uring side by side (docs/decisions/0003-ring.md), and tells what a
//! durable write costs on a disk.
//!
//! `ring compare FOLDER` runs both on a new file in FOLDER, interleaved, and prints medians.
//! `ring disk FOLDER` measures durable writes by size, number in flight and state of the extents.

mod disk;
mod measure;
mod ours;
mod theirs;

use std::path::{Path, PathBuf};

use measure::{Case, Kind, Sample};

/// Bytes of the file: large enough that the writes don't fall on each other.
const FILE_BYTES: u64 = 256 << 20;

const ROUNDS: usize = 7;

type Run = fn(&Path, Case) -> Sample;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mode, folder] = arguments.as_slice() else { usage() };
    let path = PathBuf::from(folder).join(format!("ring-bench-{}", std::process::id()));
    match mode.as_str() {
        "compare" => compare(&path),
        "disk" => disk::report(&path),
        _ => usage(),
    }
    std::fs::remove_file(&path).expect("the bench's own file");
}

fn usage() -> ! {
    eprintln!("usage: ring compare|disk FOLDER (a folder on the disk to measure)");
    std::process::exit(2)
}

fn compare(path: &Path) {
    ours::create_written(path, FILE_BYTES);
    let contenders: [(&str, Run); 4] = [
        ("ours, shared flush", ours::run_flush),
        ("ours, RWF_DSYNC", ours::run_flag),
        ("tokio-uring, fdatasync", theirs::run_fdatasync),
        ("tokio-uring, O_DSYNC", theirs::run_dsync),
    ];
    println!("4 KiB, direct, on {}; medians of {ROUNDS} interleaved rounds", path.display());
    for (kind, depths) in [(Kind::Read, &[1, 8, 32][..]), (Kind::DurableWrite, &[1, 4, 16])] {
        for &depth in depths {
            let case = Case { kind, depth, bytes: 4096, file_bytes: FILE_BYTES };
            let mut samples = vec![Vec::new(); contenders.len()];
            for _ in 0..ROUNDS {
                for ((_, run), samples) in contenders.iter().zip(&mut samples) {
                    samples.push(run(path, case));
                }
            }
            for ((name, _), samples) in contenders.iter().zip(samples) {
                // Reads are the same however writes are synced.
                if kind == Kind::Read && name.ends_with("DSYNC") {
                    continue;
                }
                println!("{kind:>14} x{depth:<3} {name:<24} {}", measure::summary(samples));
            }
        }
    }
}
