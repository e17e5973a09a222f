//! Times the life of many volumes through the CSI driver: created, leased, staged, published, taken
//! down again, deleted; three nodes and one host, all on this machine, by `--nbd fuse`.
//!
//! `csi FOLDER [--volumes N] [--parallel N,N...] [--mib N] [--fs ext4|xfs]` writes `csi.csv` and
//! `csi.md` into FOLDER. All volumes go through one step before the first goes through the next, so
//! that all of them are mounted at the same time.

mod calls;
mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::process::{self, Running, run};
use ballast_e2e::scratch::{self, unmount_below};
use ballast_e2e::wait::until_true;

use calls::{CALLS, Call, Driver, Volume};

/// The host, which is the first storage node, too.
const HOST: &str = "node-1";

/// Of each node: written to by all volumes together, with room left.
const POOL: &str = "2GiB";

/// Wanted of the command line.
#[derive(Clone, Debug)]
struct Wanted {
    folder: PathBuf,
    volumes: usize,
    parallel: Vec<usize>,
    mib: u64,
    fs_type: String,
}

/// All volumes once, so many at a time.
#[derive(Debug)]
pub struct Run {
    parallel: usize,
    calls: Vec<Measured>,
    /// Times of the programs that the driver ran for it, in milliseconds.
    programs: BTreeMap<String, Vec<u64>>,
}

/// One call as one run had it, for all volumes.
#[derive(Debug)]
pub struct Measured {
    call: Call,
    /// From the first call's beginning to the last one's end.
    wall: Duration,
    /// CPU of the whole machine meanwhile.
    cpu: Duration,
    each: Vec<Duration>,
}

fn main() {
    let wanted = parse().unwrap_or_else(|problem| {
        eprintln!(
            "{problem}\nusage: csi FOLDER [--volumes N] [--parallel N,N...] [--mib N] [--fs TYPE]"
        );
        std::process::exit(2)
    });
    let more = vec!["--pool-size".to_owned(), POOL.to_owned()];
    let cluster =
        Cluster::with("csi-bench", &Options { volume_mib: 16, more, ..Options::default() });
    let process = start_driver(&cluster);
    let runs = measure(&cluster, &wanted);
    drop(process);
    report::write(&wanted.folder, &runs);
}

fn parse() -> Result<Wanted, String> {
    let mut words = std::env::args().skip(1);
    let folder = words.next().ok_or("FOLDER is missing")?;
    let mut wanted = Wanted {
        folder: PathBuf::from(folder),
        volumes: 100,
        parallel: vec![1, 8],
        mib: 1024,
        fs_type: "ext4".to_owned(),
    };
    while let Some(option) = words.next() {
        let value = words.next().ok_or(format!("{option} has no value"))?;
        let wrong = |_| format!("{option} can't be {value:?}");
        match option.as_str() {
            "--volumes" => wanted.volumes = value.parse().map_err(wrong)?,
            "--mib" => wanted.mib = value.parse().map_err(wrong)?,
            "--fs" => wanted.fs_type.clone_from(&value),
            "--parallel" => {
                let numbers: Result<_, _> = value.split(',').map(str::parse).collect();
                wanted.parallel = numbers.map_err(wrong)?;
            }
            _ => return Err(format!("{option} is unknown")),
        }
    }
    Ok(wanted)
}

/// Its mounts and links go when this is dropped, however the run ended.
struct DriverProcess {
    _process: Running,
    folder: PathBuf,
}

impl Drop for DriverProcess {
    fn drop(&mut self) {
        for pid in process::with_argument_below(&self.folder.join("state")) {
            process::kill_and_wait(pid);
        }
        unmount_below(&self.folder);
    }
}

fn folder(cluster: &Cluster) -> PathBuf {
    cluster.scratch.path().join("csi")
}

fn start_driver(cluster: &Cluster) -> DriverProcess {
    let folder = folder(cluster);
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let nodes = cluster.nodes();
    let list = |texts: Vec<&str>| texts.join(",");
    let daemons = list(nodes.iter().map(|node| node.grpc.as_str()).collect());
    let bare = |url: &str| url.trim_start_matches("nbd://").trim_end_matches('/').to_owned();
    let servers: Vec<String> = nodes.iter().map(|node| bare(&node.nbd)).collect();
    let text = |name: &str| folder.join(name).display().to_string();
    let (program, state) = (scratch::program("ballast-csi").display().to_string(), text("state"));
    let (endpoint, servers) = (format!("unix://{}", text("csi.sock")), servers.join(","));
    let mut command = vec![&*program, "--mode", "all", "--node-id", HOST, "--nbd", "fuse"];
    command.extend(["--endpoint", &endpoint, "--ballast", &daemons, "--state-dir", &state]);
    command.extend(["--nbd-address", &servers, "--log-level", "warn,ballast_csi_shim=debug"]);
    let process = Running::start(&folder.join("driver.log"), &command, false);
    let socket = folder.join("csi.sock");
    until_true("the driver's socket", 20, || {
        std::os::unix::net::UnixStream::connect(&socket).is_ok()
    });
    DriverProcess { _process: process, folder }
}

fn measure(cluster: &Cluster, wanted: &Wanted) -> Vec<Run> {
    let folder = folder(cluster);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime can be made");
    let log = || std::fs::read_to_string(folder.join("driver.log")).expect("the driver logs");
    let mut runs = Vec::new();
    for &parallel in &wanted.parallel {
        let name = |number| format!("bench-{parallel}-{number}");
        let volumes: Vec<_> = (0..wanted.volumes)
            .map(|number| Volume::new(&folder, &name(number), wanted.mib, &wanted.fs_type))
            .collect();
        let volumes = Arc::new(volumes);
        let driver = runtime.block_on(Driver::connect(&folder.join("csi.sock")));
        let (logged, mut calls) = (log().len(), Vec::new());
        for call in CALLS {
            // What the last step left to be written is not this one's.
            run("sync", &[]);
            let (start, before) = (Instant::now(), busy());
            let each = runtime.block_on(all(&driver, &volumes, call, parallel));
            let (wall, cpu) = (start.elapsed(), busy() - before);
            eprintln!("{parallel} at a time: {call:?} {wall:.1?}, CPU {cpu:.1?}");
            calls.push(Measured { call, wall, cpu, each });
        }
        runs.push(Run { parallel, calls, programs: programs(&log()[logged..]) });
    }
    runs
}

/// What the driver's log says of programs: `program="NAME"` and `ms=NUMBER` in a line.
fn programs(log: &str) -> BTreeMap<String, Vec<u64>> {
    let mut programs: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for line in log.lines() {
        let value = |key: &str| {
            let word = line.split(' ').find_map(|word| word.strip_prefix(key));
            word.map(|word| word.trim_matches('"'))
        };
        let ms = value("ms=").and_then(|ms| ms.parse().ok());
        if let (Some(program), Some(ms)) = (value("program="), ms) {
            programs.entry(program.to_owned()).or_default().push(ms);
        }
    }
    programs
}

/// One call for every volume, so many at a time.
async fn all(
    driver: &Driver,
    volumes: &Arc<Vec<Volume>>,
    call: Call,
    parallel: usize,
) -> Vec<Duration> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..parallel {
        let (driver, volumes, next) = (driver.clone(), volumes.clone(), next.clone());
        workers.spawn(async move {
            let mut took = Vec::new();
            while let Some(volume) = volumes.get(next.fetch_add(1, Ordering::Relaxed)) {
                let start = Instant::now();
                driver.call(call, volume).await;
                took.push(start.elapsed());
            }
            took
        });
    }
    workers.join_all().await.concat()
}

/// CPU that the machine has used so far.
fn busy() -> Duration {
    let text = std::fs::read_to_string("/proc/stat").expect("the kernel counts");
    let ticks: Vec<u64> =
        text.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
    let &[user, nice, system, _idle, _iowait, irq, softirq, _steal] = ticks.as_slice() else {
        panic!("/proc/stat: {text}")
    };
    // Of 10 ms each, as the kernel shows them to everybody.
    Duration::from_millis((user + nice + system + irq + softirq) * 10)
}
