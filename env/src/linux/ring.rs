//! One `io_uring` per shard, polled through its file descriptor. Write path: step 5 (append).
//!
//! Owns the operations that the kernel works on, with their buffers: a future that waits for one
//! may be dropped at any time. Never decides what to do: order and priority are the callers'.
//!
//! What is pushed during one turn of the runtime goes to the kernel with one system call: the
//! first push wakes the driver task, which runs after the tasks that were ready before it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ballast_block::limits::RING_OPERATIONS_MAX;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::flush::{self, Flushed, Flushes};
use super::operation::{Operation, Step};

/// How long the end of a shard waits for the disk before it gives the memory of what is still in
/// flight up (leaks it): a disk that hangs must not keep the process from ending.
const DRAIN: Duration = Duration::from_secs(10);

/// The ring of a shard.
pub(super) struct Ring {
    fd: RawFd,
    state: RefCell<State>,
    /// As many as operations may be in flight.
    permits: Arc<Semaphore>,
}

struct State {
    uring: IoUring,
    /// By the `user_data` of their submission.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
    flushes: Flushes,
    /// Whether the kernel reports a chain of write and flush as one completion (5.17).
    chains: bool,
    /// Writes in flight that a flush follows.
    flushed_writes: usize,
    /// Of the driver task.
    driver: Option<Waker>,
}

struct InFlight {
    operation: Operation,
    caller: oneshot::Sender<Finished>,
    _permit: OwnedSemaphorePermit,
}

/// An operation that has ended, and how.
pub(super) type Finished = (io::Result<()>, Operation);

type Ended = (oneshot::Sender<Finished>, Finished);

/// In `user_data`: the completion of a flush, by its number, not of an operation by its slot.
const FLUSH: u64 = 1 << 63;

/// In `user_data`: the completion of the flush that was chained to the write in that slot.
const CHAINED: u64 = 1 << 62;

impl Ring {
    /// Sets the ring up and starts its driver task on this thread.
    pub(super) fn start() -> io::Result<Rc<Self>> {
        let uring = build()?;
        let chains = uring.params().is_feature_skip_cqe_on_success();
        let ring = Rc::new(Self {
            fd: uring.as_raw_fd(),
            state: RefCell::new(State {
                uring,
                in_flight: Vec::new(),
                free: Vec::new(),
                flushes: Flushes::default(),
                chains,
                flushed_writes: 0,
                driver: None,
            }),
            // One entry is left for the flush that is chained to a write.
            permits: Arc::new(Semaphore::new(RING_OPERATIONS_MAX as usize - 1)),
        });
        // SAFETY: `Polled` holds the ring, and the ring keeps its fd open.
        let polled =
            unsafe { AsyncFd::register_with_interest(Polled(ring.clone()), Interest::READABLE) }?;
        tokio::task::spawn_local(async move { poll_fn(|cx| drive(&polled, cx)).await });
        Ok(ring)
    }

    /// Has the kernel do `operation`. Once it has begun, it goes on to its end even if the future
    /// is dropped.
    pub(super) async fn run(self: Rc<Self>, operation: Operation) -> Finished {
        let permit = self.permits.clone().acquire_owned().await.expect("never closed");
        let (caller, finished) = oneshot::channel();
        let driver = {
            let mut state = self.state.borrow_mut();
            state.begin(InFlight { operation, caller, _permit: permit });
            state.driver.take()
        };
        if let Some(driver) = driver {
            driver.wake();
        }
        finished.await.expect("the ring keeps the sender until the operation has ended")
    }
}

/// Completions are handled at this thread's next system call (COOP_TASKRUN, 5.19) and don't
/// interrupt it, where the kernel offers that.
fn build() -> io::Result<IoUring> {
    let single = IoUring::builder()
        .dontfork()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(RING_OPERATIONS_MAX);
    if !matches!(&single, Err(error) if error.raw_os_error() == Some(libc::EINVAL)) {
        return single.map_err(named);
    }
    IoUring::builder().dontfork().build(RING_OPERATIONS_MAX).map_err(named)
}

fn named(error: io::Error) -> io::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::EPERM) => {
            "not permitted: allow it in the seccomp profile and set the sysctl \
             kernel.io_uring_disabled to 0"
        }
        Some(libc::ENOSYS) => "this kernel has none: use Linux 5.15 or later",
        Some(libc::ENOMEM) => "no memory that may be locked: raise RLIMIT_MEMLOCK",
        _ => "refused by the kernel",
    };
    io::Error::new(error.kind(), format!("io_uring: {remedy} ({error})"))
}

impl State {
    fn begin(&mut self, started: InFlight) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.in_flight.push(None);
            self.in_flight.len() - 1
        });
        let flushed = started.operation.is_flushed_write();
        let whole = started.operation.is_one_entry();
        self.in_flight[slot] = Some(started);
        self.flushed_writes += usize::from(flushed);
        // Alone, it shares its flush with no other: then both go to the kernel at once.
        if flushed && whole && self.chains && self.flushed_writes == 1 {
            self.push_chain(slot);
        } else {
            self.push(slot);
        }
    }

    /// A write and its flush: one completion for both, or one for the write if that fails.
    fn push_chain(&mut self, slot: usize) {
        let started = self.in_flight[slot].as_mut().expect("the slot is in use");
        let flags = squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS;
        let write = started.operation.entry().user_data(slot as u64).flags(flags);
        let flush = flush::entry(started.operation.file()).user_data(CHAINED | slot as u64);
        // SAFETY: as in `push`; the flush has no memory, and the operation keeps its file.
        unsafe {
            self.queue(&write);
            self.queue(&flush);
        }
    }

    fn push(&mut self, slot: usize) {
        let started = self.in_flight[slot].as_mut().expect("the slot is in use");
        let entry = started.operation.entry().user_data(slot as u64);
        // SAFETY: memory and file of the entry belong to the operation, which stays in its slot
        // until the kernel's completion; its buffers don't move when the slot does.
        unsafe { self.queue(&entry) }
    }

    fn push_flush(&mut self, number: usize, entry: squeue::Entry) {
        let entry = entry.user_data(FLUSH | number as u64);
        // SAFETY: the entry has no memory, and `flushes` holds its file until its completion.
        unsafe { self.queue(&entry) }
    }

    /// # Safety
    /// Memory and file of the entry stay until its completion.
    unsafe fn queue(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        unsafe { self.uring.submission().push(entry) }
            .expect("as many entries as permits, and one per operation");
    }

    /// Gives what was pushed to the kernel and takes what is complete. Returns whether the kernel
    /// has put a submission off.
    fn turn(&mut self, ended: &mut Vec<Ended>) -> bool {
        loop {
            let submission = self.uring.submission();
            if !submission.is_empty() || submission.taskrun() || submission.cq_overflow() {
                drop(submission);
                match self.uring.submit() {
                    Ok(_) => {}
                    Err(error) => match error.raw_os_error() {
                        Some(libc::EINTR) => continue,
                        Some(libc::EAGAIN | libc::EBUSY) => {
                            self.reap(ended);
                            return true;
                        }
                        _ => panic!("io_uring_enter failed: {error}"),
                    },
                }
            } else {
                drop(submission);
            }
            self.reap(ended);
            // What goes on (a short write) or was left over is submitted at once.
            if self.uring.submission().is_empty() {
                return false;
            }
        }
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) {
        loop {
            let Some(completion) = self.uring.completion().next() else { break };
            let (data, result) = (completion.user_data(), completion.result());
            if data & FLUSH != 0 {
                self.flushed((data ^ FLUSH) as usize, result, ended);
                continue;
            }
            let slot = (data & !CHAINED) as usize;
            let started = self.in_flight[slot].as_mut().expect("completed once");
            if data & CHAINED != 0 {
                match result {
                    0 => self.end(slot, Ok(()), ended),
                    _ if flush::is_put_off(result) => {
                        self.flushes.add(started.operation.file(), slot);
                    }
                    _ => self.end(slot, flush::result(Some(-result)), ended),
                }
                continue;
            }
            match started.operation.advance(result) {
                Step::Again => self.push(slot),
                Step::Flush => self.flushes.add(started.operation.file(), slot),
                Step::Done(result) => self.end(slot, result, ended),
            }
        }
        while let Some((number, entry)) = self.flushes.next() {
            self.push_flush(number, entry);
        }
    }

    fn flushed(&mut self, number: usize, result: i32, ended: &mut Vec<Ended>) {
        match self.flushes.complete(number, result) {
            Flushed::Again(entry) => self.push_flush(number, entry),
            Flushed::Ended(slots, failed) => {
                for slot in slots {
                    self.end(slot, flush::result(failed), ended);
                }
            }
        }
    }

    fn end(&mut self, slot: usize, result: io::Result<()>, ended: &mut Vec<Ended>) {
        let InFlight { operation, caller, _permit } =
            self.in_flight[slot].take().expect("ends once");
        self.free.push(slot);
        self.flushed_writes -= usize::from(operation.is_flushed_write());
        ended.push((caller, (result, operation)));
    }
}

/// The ring as epoll sees it.
struct Polled(Rc<Ring>);

impl AsRawFd for Polled {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd
    }
}

/// One poll of the task that talks to the kernel.
fn drive(polled: &AsyncFd<Polled>, cx: &mut Context<'_>) -> Poll<()> {
    let mut ended = Vec::new();
    loop {
        let put_off = {
            let mut state = polled.get_ref().0.state.borrow_mut();
            state.driver = Some(cx.waker().clone());
            state.turn(&mut ended)
        };
        // With the state free again: this may drop files and buffers.
        for (caller, finished) in ended.drain(..) {
            drop(caller.send(finished));
        }
        if put_off {
            cx.waker().wake_by_ref();
        }
        match polled.poll_read_ready(cx) {
            // Epoll reports edges, so look again after each.
            Poll::Ready(Ok(mut ready)) => ready.clear_ready(),
            // The runtime is shutting down.
            Poll::Ready(Err(_)) => return Poll::Ready(()),
            Poll::Pending => return Poll::Pending,
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        let mut ended = Vec::new();
        let timeout = Timespec::new().sec(DRAIN.as_secs());
        while state.in_flight.iter().any(Option::is_some) {
            let waited =
                state.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout));
            state.reap(&mut ended);
            match waited {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "disk operations still in flight: memory given up");
                    std::mem::forget(std::mem::take(&mut state.in_flight));
                }
            }
        }
    }
}
