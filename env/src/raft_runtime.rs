//! The runtime that the consensus library runs on: tokio, with what differs between the real and
//! the simulated world made replaceable.
//!
//! Owns the library's source of randomness (election timeouts, first ticks) and its view of the
//! clock. Both are plain thread state, because the library asks for them through functions without
//! a receiver: a shard seeds its thread once at start with [`seed_thread`], and the simulator sets
//! the clock rate of the node that it is about to poll with [`RateScope`]. Never decides a timeout.
//! Not on the path of a write but under all of it: every task of a Raft group is spawned here.

#![allow(
    clippy::disallowed_methods,
    reason = "a clock and a thread for the consensus library, which knows no environment"
)]

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::sync::OnceLock;
use std::time::Duration;

use openraft::async_runtime::{AsyncRuntime, Instant};
use openraft_rt_tokio::TokioRuntime;

/// Tokio as the consensus library sees it: put this into the type configuration.
///
/// Tasks are spawned on the `LocalSet` of the caller.
#[derive(Debug)]
pub struct RaftRuntime {
    tokio: TokioRuntime,
}

impl AsyncRuntime for RaftRuntime {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = RaftInstant;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R>> = <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = ThreadRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = <TokioRuntime as AsyncRuntime>::Watch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + 'static,
        T::Output: 'static,
    {
        TokioRuntime::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(to_tokio(duration))
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        Self::sleep(deadline.saturating_duration_since(Self::Instant::now()))
    }

    fn timeout<R, F: Future<Output = R>>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(to_tokio(duration), future)
    }

    fn timeout_at<R, F: Future<Output = R>>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        Self::timeout(deadline.saturating_duration_since(Self::Instant::now()), future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        ThreadRng(())
    }

    fn new(threads: usize) -> Self {
        Self { tokio: TokioRuntime::new(threads) }
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.tokio.block_on(future)
    }

    fn spawn_blocking<F, T>(f: F) -> impl Future<Output = Result<T, io::Error>> + Send
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        TokioRuntime::spawn_blocking(f)
    }
}

thread_local! {
    static RNG: Cell<Option<u64>> = const { Cell::new(None) };
    static RATE_PPM: Cell<i32> = const { Cell::new(0) };
}

/// Mixes `seed` into the random numbers that Raft groups of this thread draw.
///
/// A shard calls it once at start with a number of its [`crate::entropy::Entropy`]. A thread that
/// never calls it draws from the operating system, which a simulated run must not do.
pub fn seed_thread(seed: u64) {
    RNG.with(|rng| rng.set(Some(splitmix(rng.get().unwrap_or(0) ^ seed).0)));
}

/// Random numbers of this thread, for the consensus library. Not for secrets.
#[derive(Debug)]
pub struct ThreadRng(());

impl ThreadRng {
    fn next(&mut self) -> u64 {
        RNG.with(|rng| {
            let state = rng.get().unwrap_or_else(|| RandomState::new().hash_one(0u8));
            let (next, output) = splitmix(state);
            rng.set(Some(next));
            output
        })
    }
}

/// SplitMix64: the next state, and the output for it.
fn splitmix(state: u64) -> (u64, u64) {
    let next = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (next, mixed ^ (mixed >> 31))
}

impl rand::TryRng for ThreadRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok((self.next() >> 32) as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.next())
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

/// Until dropped, this thread's monotonic clock runs faster than true time by `ppm` parts per
/// million (slower when negative), for Raft groups and for whoever uses [`node_nanos`].
///
/// Only the simulator makes one. The rate of a node must not change during a run: time is scaled
/// from one common start, so a change would be a jump.
#[derive(Debug)]
pub struct RateScope {
    previous: i32,
}

impl RateScope {
    /// Sets the rate; `ppm` lies within ±500,000.
    pub fn enter(ppm: i32) -> Self {
        assert!(ppm.abs() <= 500_000, "clock rate of {ppm} ppm is not a drift");
        Self { previous: RATE_PPM.replace(ppm) }
    }
}

impl Drop for RateScope {
    fn drop(&mut self) {
        RATE_PPM.set(self.previous);
    }
}

const MILLION: i128 = 1_000_000;

/// The monotonic clock of the node that runs on this thread, in nanoseconds since the first use of
/// it in the process.
pub fn node_nanos() -> i64 {
    static START: OnceLock<tokio::time::Instant> = OnceLock::new();
    let now = tokio::time::Instant::now();
    let start = *START.get_or_init(|| now);
    // Test runtimes of one process pause their clocks at different points: earlier is possible.
    let nanos = match now.checked_duration_since(start) {
        Some(after) => i128::try_from(after.as_nanos()).unwrap_or(i128::MAX),
        None => -i128::try_from(start.duration_since(now).as_nanos()).unwrap_or(i128::MAX),
    };
    let ppm = i128::from(RATE_PPM.get());
    let scaled = if ppm == 0 { nanos } else { nanos * (MILLION + ppm) / MILLION };
    i64::try_from(scaled).expect("a process runs for less than 292 years")
}

/// How long tokio must wait for `duration` of the node's clock to pass.
pub fn to_tokio(duration: Duration) -> Duration {
    let ppm = i128::from(RATE_PPM.get());
    if ppm == 0 {
        return duration;
    }
    let nanos = i128::try_from(duration.as_nanos()).unwrap_or(i128::from(i64::MAX));
    let scaled = (nanos * MILLION + MILLION + ppm - 1) / (MILLION + ppm);
    Duration::from_nanos(u64::try_from(scaled).unwrap_or(u64::MAX))
}

/// A point of the node's monotonic clock, as the consensus library uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RaftInstant(i64);

impl RaftInstant {
    /// Nanoseconds since the start of the clock, see [`node_nanos`].
    pub fn nanos(self) -> i64 {
        self.0
    }
}

fn nanos_of(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

impl Instant for RaftInstant {
    fn now() -> Self {
        Self(node_nanos())
    }
}

impl Add<Duration> for RaftInstant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos_of(duration)))
    }
}

impl AddAssign<Duration> for RaftInstant {
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}

impl Sub<Duration> for RaftInstant {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos_of(duration)))
    }
}

impl SubAssign<Duration> for RaftInstant {
    fn sub_assign(&mut self, duration: Duration) {
        *self = *self - duration;
    }
}

impl Sub<RaftInstant> for RaftInstant {
    type Output = Duration;

    /// Zero when `earlier` is later.
    fn sub(self, earlier: RaftInstant) -> Duration {
        Duration::from_nanos(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_numbers() {
        let draw = || {
            std::thread::spawn(|| {
                seed_thread(7);
                let mut rng = RaftRuntime::thread_rng();
                (rng.next_u64(), rng.next_u32(), RaftRuntime::thread_rng().next_u64())
            })
            .join()
            .unwrap()
        };
        let (first, _, third) = draw();
        assert_eq!(draw(), draw());
        assert_ne!(first, third);
    }

    #[test]
    fn an_unseeded_thread_still_gets_random_numbers() {
        let draw = || std::thread::spawn(|| RaftRuntime::thread_rng().next_u64()).join().unwrap();
        assert_ne!(draw(), draw());
    }

    #[tokio::test(start_paused = true)]
    async fn a_fast_clock_sleeps_less_and_shows_more() {
        let true_start = tokio::time::Instant::now();
        let scope = RateScope::enter(100_000);
        let start = RaftInstant::now();
        RaftRuntime::sleep(Duration::from_millis(1100)).await;
        let shown = RaftInstant::now() - start;
        drop(scope);
        assert_eq!(true_start.elapsed(), Duration::from_millis(1000));
        assert!(shown.abs_diff(Duration::from_millis(1100)) < Duration::from_micros(1));
        assert_eq!(to_tokio(Duration::from_secs(1)), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn timeout_at_fires_at_the_deadline() {
        let deadline = RaftInstant::now() + Duration::from_millis(50);
        let outcome = RaftRuntime::timeout_at(deadline, std::future::pending::<()>()).await;
        assert!(outcome.is_err());
        assert_eq!(RaftInstant::now() - deadline, Duration::ZERO);
    }
}
