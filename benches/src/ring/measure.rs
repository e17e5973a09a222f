//! What is measured: operations, wall time, CPU time of this process.

use std::fmt;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// How long one sample runs.
pub const SAMPLE: Duration = Duration::from_millis(500);

/// Which operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A read.
    Read,
    /// A write that is on stable storage at its end.
    DurableWrite,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Read => "read",
            Kind::DurableWrite => "durable write",
        })
    }
}

/// What one sample does.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Which operation.
    pub kind: Kind,
    /// Operations in flight.
    pub depth: u64,
    /// Bytes of one.
    pub bytes: u64,
    /// Bytes of the file, all of them written before.
    pub file_bytes: u64,
}

impl Case {
    /// Offsets of one of the `depth` workers: spread over the file, never those of another.
    pub fn offsets(self, worker: u64) -> impl Iterator<Item = u64> {
        let per_worker = self.file_bytes / self.bytes / self.depth;
        // An odd stride visits places all over the worker's part.
        (0_u64..).map(move |turn| {
            (worker * per_worker + turn.wrapping_mul(7919) % per_worker) * self.bytes
        })
    }
}

/// What one sample shows.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Operations per second.
    pub rate: f64,
    /// CPU time of this process per operation, in microseconds; the kernel's own threads (they
    /// finish and flush direct writes) are not in it.
    pub cpu_us: f64,
    /// Mean time of one operation, in microseconds.
    pub latency_us: f64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rate, cpu_us, latency_us } = self;
        write!(f, "{rate:>9.0} op/s {cpu_us:>7.2} us CPU/op {latency_us:>8.1} us latency")
    }
}

/// A sample being taken.
pub struct Stopwatch {
    start: Instant,
    cpu: Duration,
}

impl Stopwatch {
    /// Starts to measure.
    pub fn start() -> Self {
        Self { start: Instant::now(), cpu: cpu_time() }
    }

    /// Whether the sample's time has not passed yet.
    pub fn runs(&self) -> bool {
        self.start.elapsed() < SAMPLE
    }

    /// The sample, of so many operations with so many in flight.
    pub fn stop(&self, operations: u64, depth: u64) -> Sample {
        let (wall, cpu) = (self.start.elapsed().as_secs_f64(), cpu_time() - self.cpu);
        let operations = operations as f64;
        Sample {
            rate: operations / wall,
            cpu_us: cpu.as_secs_f64() * 1e6 / operations,
            latency_us: wall * 1e6 * depth as f64 / operations,
        }
    }
}

fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("always allowed");
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.unsigned_abs())
}

/// The medians, and the range of the latencies: other users of the machine show there.
pub fn summary(samples: Vec<Sample>) -> String {
    let latencies = || samples.iter().map(|sample| sample.latency_us);
    let (least, most) = (latencies().fold(f64::MAX, f64::min), latencies().fold(0.0, f64::max));
    format!("{} ({least:.0}..{most:.0})", median(&samples))
}

/// The median of each number.
pub fn median(samples: &[Sample]) -> Sample {
    let of = |number: fn(&Sample) -> f64| {
        let mut numbers: Vec<f64> = samples.iter().map(number).collect();
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    Sample {
        rate: of(|sample| sample.rate),
        cpu_us: of(|sample| sample.cpu_us),
        latency_us: of(|sample| sample.latency_us),
    }
}
