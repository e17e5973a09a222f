//! Block-range locks of a family's leader (hazard 24).
//!
//! Writes of whole blocks share; a merge of parts of blocks excludes everything that overlaps it
//! from before its read until its write is applied. In the order of arrival, so nobody starves.

use std::cell::RefCell;
use std::rc::Rc;

use ballast_block::BlockRange;
use tokio::sync::oneshot;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Shared,
    Exclusive,
}

struct Holder {
    ticket: u64,
    range: BlockRange,
    mode: Mode,
    granted: bool,
    wake: Option<oneshot::Sender<()>>,
}

#[derive(Default)]
struct Table {
    /// Holders and waiters in the order of arrival.
    queue: Vec<Holder>,
    next: u64,
    exclusive: usize,
}

impl Table {
    fn conflicts(&self, index: usize) -> bool {
        let holder = &self.queue[index];
        self.queue[..index].iter().any(|earlier| {
            (earlier.mode == Mode::Exclusive || holder.mode == Mode::Exclusive)
                && earlier.range.overlaps(&holder.range)
        })
    }

    fn grant(&mut self) {
        for index in 0..self.queue.len() {
            if !self.queue[index].granted && !self.conflicts(index) {
                let holder = &mut self.queue[index];
                holder.granted = true;
                if let Some(wake) = holder.wake.take() {
                    let _ = wake.send(());
                }
            }
        }
    }
}

/// The locks of one family.
#[derive(Clone, Default)]
pub struct RangeLocks {
    table: Rc<RefCell<Table>>,
}

/// A held lock, released when dropped.
pub struct RangeLock {
    table: Rc<RefCell<Table>>,
    ticket: u64,
}

impl RangeLocks {
    /// Waits for a lock that others share.
    pub async fn shared(&self, range: BlockRange) -> RangeLock {
        self.lock(range, Mode::Shared).await
    }

    /// Waits for a lock that nobody shares.
    pub async fn exclusive(&self, range: BlockRange) -> RangeLock {
        self.lock(range, Mode::Exclusive).await
    }

    async fn lock(&self, range: BlockRange, mode: Mode) -> RangeLock {
        let (lock, wait) = {
            let mut table = self.table.borrow_mut();
            let ticket = table.next;
            table.next += 1;
            table.exclusive += usize::from(mode == Mode::Exclusive);
            table.queue.push(Holder { ticket, range, mode, granted: true, wake: None });
            let index = table.queue.len() - 1;
            // Without a merge around, whole-block writes never look at each other.
            let wait = (table.exclusive > 0 && table.conflicts(index)).then(|| {
                let (wake, wait) = oneshot::channel();
                table.queue[index].granted = false;
                table.queue[index].wake = Some(wake);
                wait
            });
            (RangeLock { table: self.table.clone(), ticket }, wait)
        };
        if let Some(wait) = wait {
            wait.await.expect("the table outlives its waiters");
        }
        lock
    }
}

impl Drop for RangeLock {
    fn drop(&mut self) {
        let mut table = self.table.borrow_mut();
        let index = table.queue.iter().position(|holder| holder.ticket == self.ticket);
        let holder = table.queue.remove(index.expect("held until now"));
        if holder.mode == Mode::Exclusive {
            table.exclusive -= 1;
        }
        let waiters = table.queue.iter().any(|holder| !holder.granted);
        if waiters {
            table.grant();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn now<F: Future>(future: F) -> Option<F::Output> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[test]
    fn shared_share_and_exclusive_excludes() {
        let locks = RangeLocks::default();
        let range = BlockRange::new(10, 4);
        let first = now(locks.shared(range)).unwrap();
        let second = now(locks.shared(range)).unwrap();
        assert!(now(locks.exclusive(BlockRange::new(13, 1))).is_none());
        drop((first, second));
        let merge = now(locks.exclusive(BlockRange::new(13, 1))).unwrap();
        assert!(now(locks.shared(range)).is_none());
        assert!(now(locks.shared(BlockRange::new(14, 1))).is_some());
        drop(merge);
        assert!(now(locks.shared(range)).is_some());
    }

    #[test]
    fn a_waiter_is_woken_and_a_dropped_one_leaves_nothing() {
        let locks = RangeLocks::default();
        let range = BlockRange::new(0, 1);
        let held = now(locks.exclusive(range)).unwrap();
        let mut waiting = Box::pin(locks.shared(range));
        let mut context = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        drop(Box::pin(locks.exclusive(range)));
        drop(held);
        assert!(waiting.as_mut().poll(&mut context).is_ready());
        drop(waiting);
        assert!(locks.table.borrow().queue.is_empty());
    }
}
