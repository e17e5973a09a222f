//! Memory for the requests of all clients of a thread together.
//!
//! Owns who may take how much of it. A connection always has a little of its own, so that none
//! stands still because of others; what it needs beyond comes from here, first come, first served:
//! a large request is not passed over for ever by small ones. Never allocates memory itself, never
//! waits: see [`crate::Session::poll_memory`]. Write path, step 2.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Poll, Waker};

use ballast_block::limits::{NBD_CONNECTION_OWN_BYTES, NBD_REQUEST_BYTES_MAX};

/// What the connections of one thread may hold for requests and replies, beyond what each has of
/// its own ([`NBD_CONNECTION_OWN_BYTES`]).
#[derive(Debug)]
pub struct RequestMemory {
    limit: usize,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    last_id: u64,
    /// Who waits, oldest first.
    waiting: VecDeque<(u64, Waker)>,
}

impl RequestMemory {
    /// Of `limit` bytes.
    ///
    /// # Panics
    /// When the largest request does not fit: a bug of the caller.
    pub fn new(limit: usize) -> Rc<Self> {
        assert!(limit >= NBD_REQUEST_BYTES_MAX, "{limit} bytes for requests hold not even one");
        Rc::new(Self { limit, state: RefCell::default() })
    }

    /// Bytes handed out now.
    pub fn used(&self) -> usize {
        self.state.borrow().used
    }

    /// Connections that wait for some.
    pub fn waiting(&self) -> usize {
        self.state.borrow().waiting.len()
    }
}

impl State {
    fn wake_first(&self) {
        if let Some((_, waker)) = self.waiting.front() {
            waker.wake_by_ref();
        }
    }

    fn leave_queue(&mut self, id: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != id);
    }
}

/// One connection's part of it.
#[derive(Debug)]
pub(crate) struct Share {
    memory: Rc<RequestMemory>,
    id: u64,
    charged: usize,
    /// What it would have had to be charged for the last request, which found too little; 0: it did
    /// not.
    wanted: usize,
}

impl Share {
    pub(crate) fn new(memory: Rc<RequestMemory>) -> Self {
        let id = {
            let mut state = memory.state.borrow_mut();
            state.last_id += 1;
            state.last_id
        };
        Self { memory, id, charged: 0, wanted: 0 }
    }

    /// The connection holds `held` bytes by now: less than before, or a little more, for headers.
    pub(crate) fn settle(&mut self, held: usize) {
        let charge = held.saturating_sub(NBD_CONNECTION_OWN_BYTES);
        if charge == self.charged {
            return;
        }
        let mut state = self.memory.state.borrow_mut();
        state.used = state.used - self.charged + charge;
        if charge < self.charged {
            state.wake_first();
        }
        self.charged = charge;
    }

    /// Whether the connection may hold `held` bytes; then it is counted as holding them.
    pub(crate) fn grow(&mut self, held: usize) -> bool {
        let charge = held.saturating_sub(NBD_CONNECTION_OWN_BYTES);
        let mut state = self.memory.state.borrow_mut();
        if !self.may_charge(&state, charge) {
            self.wanted = charge;
            return false;
        }
        self.wanted = 0;
        let more = charge.saturating_sub(self.charged);
        state.used += more;
        self.charged += more;
        // Also when it needs nothing any more: who waits in front of others must not stay there.
        if !state.waiting.is_empty() {
            state.leave_queue(self.id);
            state.wake_first();
        }
        true
    }

    fn may_charge(&self, state: &State, charge: usize) -> bool {
        let more = charge.saturating_sub(self.charged);
        let first = state.waiting.front().is_none_or(|(id, _)| *id == self.id);
        more == 0 || (first && state.used + more <= self.memory.limit)
    }

    /// Whether the last request, which found too little, finds enough now; if not, `waker` is woken
    /// when that may have changed.
    pub(crate) fn poll_room(&self, waker: &Waker) -> Poll<()> {
        if self.wanted == 0 {
            return Poll::Pending;
        }
        let mut state = self.memory.state.borrow_mut();
        if self.may_charge(&state, self.wanted) {
            return Poll::Ready(());
        }
        match state.waiting.iter_mut().find(|(id, _)| *id == self.id) {
            Some((_, known)) => known.clone_from(waker),
            None => state.waiting.push_back((self.id, waker.clone())),
        }
        Poll::Pending
    }

    /// Wants nothing more: others need not wait for it.
    pub(crate) fn give_up(&mut self) {
        self.wanted = 0;
        let mut state = self.memory.state.borrow_mut();
        state.leave_queue(self.id);
        state.wake_first();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.memory.state.borrow_mut();
        state.used -= self.charged;
        state.leave_queue(self.id);
        state.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    const OWN: usize = NBD_CONNECTION_OWN_BYTES;
    const LARGEST: usize = NBD_REQUEST_BYTES_MAX;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Count {
        fn taken(&self) -> usize {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    #[test]
    fn a_little_is_everyones_own() {
        let memory = RequestMemory::new(LARGEST);
        let (mut greedy, mut modest) = (Share::new(memory.clone()), Share::new(memory.clone()));
        assert!(greedy.grow(OWN + LARGEST));
        assert!(modest.grow(OWN));
        assert!(!modest.grow(OWN + 1));
        assert_eq!(memory.used(), LARGEST);
    }

    #[test]
    fn who_came_first_is_served_first() {
        let memory = RequestMemory::new(LARGEST);
        let [mut holder, mut large, mut small] = [(); 3].map(|()| Share::new(memory.clone()));
        let (large_woken, small_woken) = (Arc::<Count>::default(), Arc::<Count>::default());
        assert!(holder.grow(OWN + LARGEST));
        assert!(!large.grow(OWN + LARGEST));
        assert!(large.poll_room(&Waker::from(large_woken.clone())).is_pending());
        assert!(!small.grow(OWN + 1));
        assert!(small.poll_room(&Waker::from(small_woken.clone())).is_pending());

        holder.settle(OWN + 4096);
        assert_eq!((large_woken.taken(), small_woken.taken()), (1, 0));
        assert!(!small.grow(OWN + 1), "there is room, but others came first");
        assert!(!large.grow(OWN + LARGEST), "not yet enough");
        assert!(large.poll_room(&Waker::from(large_woken.clone())).is_pending());
        assert_eq!(memory.waiting(), 2);
        drop(holder);
        assert_eq!((large_woken.taken(), small_woken.taken()), (1, 0));
        assert!(large.poll_room(Waker::noop()).is_ready(), "it looks again");
        assert!(large.grow(OWN + LARGEST));
        assert_eq!(small_woken.taken(), 1, "the next one looks, too");
        assert!(!small.grow(OWN + 1));
        drop(large);
        assert_eq!(small_woken.taken(), 1);
        assert!(small.grow(OWN + 1));
        assert_eq!((memory.used(), memory.waiting()), (1, 0));
    }

    #[test]
    fn who_waited_and_needs_nothing_any_more_holds_nobody_up() {
        let memory = RequestMemory::new(LARGEST);
        let [mut holder, mut first, mut next] = [(); 3].map(|()| Share::new(memory.clone()));
        let woken = Arc::<Count>::default();
        assert!(holder.grow(OWN + LARGEST - 4096) && first.grow(OWN + 4096));
        assert!(!first.grow(OWN + 8192));
        assert!(first.poll_room(Waker::noop()).is_pending());
        assert!(!next.grow(OWN + 4096));
        assert!(next.poll_room(&Waker::from(woken.clone())).is_pending());
        first.settle(0);
        assert!(first.grow(OWN), "its own, without the memory of all");
        assert!(woken.taken() > 0);
        assert!(next.grow(OWN + 4096));
    }

    #[test]
    fn who_waits_and_goes_away_holds_nobody_up() {
        let memory = RequestMemory::new(LARGEST);
        let [mut holder, mut gone, mut next] = [(); 3].map(|()| Share::new(memory.clone()));
        let woken = Arc::<Count>::default();
        assert!(holder.grow(OWN + LARGEST - 4096));
        assert!(!gone.grow(OWN + LARGEST));
        assert!(gone.poll_room(Waker::noop()).is_pending());
        assert!(!next.grow(OWN + 4096));
        assert!(next.poll_room(&Waker::from(woken.clone())).is_pending());
        drop(gone);
        assert_eq!(woken.taken(), 1);
        assert!(next.grow(OWN + 4096));
        drop((holder, next));
        assert_eq!((memory.used(), memory.waiting()), (0, 0));
    }
}
