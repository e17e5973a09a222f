//! Rounds of small writes on the leader. Step 4 of a write, in front of the proposal.
//!
//! What is proposed together shares a frame to each follower, a disk write and an answer on every
//! node. So a family's small writes go in rounds: who comes while one is under way waits for its
//! end, and then a moment longer for the hosts that it answered, whose next writes are on their way.
//! So many that more would save nothing wait for nobody. Where nobody comes in that moment, writes
//! go as they come for a while. A write that is alone waits for nobody. Never refuses, and never
//! changes the order of a host's own writes, which has none but by their answers.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::Duration;

use ballast_block::limits::{
    GATHER_BYTES_MAX, GATHER_FREE_WRITES_MAX, GATHER_FREE_WRITES_MIN, GATHER_PAUSE_US_MAX,
    GATHER_US_MAX, GATHER_WRITES_ENOUGH,
};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_raft_store::entry::Command;
use ballast_raft_store::types::{ApplyReply, LogId};
use tokio::sync::Notify;

use crate::family::Inner;
use crate::group::{Group, Proposal, ProposeError};

/// The rounds of a family.
#[derive(Default)]
pub(crate) struct Gather {
    state: RefCell<State>,
    /// For the task that ends rounds in which nobody comes any more.
    changed: Notify,
}

#[derive(Default)]
struct State {
    rounds: Rounds,
    held: Vec<(u64, Proposal)>,
    next: u64,
}

/// What becomes of a write that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// It is proposed by itself.
    Goes,
    /// It waits for the round to be complete.
    Waits,
    /// With it the round is complete.
    Completes,
}

/// What a round that has not begun waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// Nothing is held, or a round is under way.
    Nothing,
    /// It is complete, or its time has passed.
    Now,
    /// It is until then.
    At(Instant),
}

/// Who is under way, who waits, who is expected. Pure.
#[derive(Default)]
struct Rounds {
    /// Proposed and not answered.
    in_flight: usize,
    held: usize,
    /// Answered since the last round began.
    expected: usize,
    /// Came since the first of these answers.
    came: usize,
    /// When somebody was answered or came last.
    last: Instant,
    /// When the last one under way was answered.
    ended: Instant,
    /// So many writes go as they come.
    free: u32,
    /// How many that are after the next round that waited in vain.
    penalty: u32,
}

impl Rounds {
    fn is_complete(&self) -> bool {
        let all_came = self.in_flight == 0 && self.came >= self.expected;
        self.held >= GATHER_WRITES_ENOUGH || (self.held > 0 && all_came)
    }

    /// When who is held waits no longer.
    fn limit(&self) -> Instant {
        let pause = self.last.after(Duration::from_micros(GATHER_PAUSE_US_MAX));
        pause.min(self.ended.after(Duration::from_micros(GATHER_US_MAX)))
    }

    fn arrive(&mut self, now: Instant) -> Arrival {
        if self.free > 0 {
            self.free -= 1;
            self.in_flight += 1;
            (self.expected, self.came) = (0, 0);
            return Arrival::Goes;
        }
        if self.in_flight == 0 && self.held == 0 && now >= self.limit() {
            (self.expected, self.came) = (0, 0);
        }
        self.came += usize::from(self.expected > 0);
        self.held += 1;
        self.last = now;
        if self.is_complete() { Arrival::Completes } else { Arrival::Waits }
    }

    /// One that was under way was answered, or given up.
    fn answer(&mut self, now: Instant) {
        self.in_flight -= 1;
        if self.free == 0 {
            self.expected += 1;
        }
        (self.last, self.ended) = (now, now);
    }

    /// All that are held are proposed.
    fn begin(&mut self) {
        if self.is_complete() {
            // Slowly: at most one round in fifty may wait in vain.
            self.penalty = (self.penalty - self.penalty / 64).saturating_sub(1);
        } else {
            self.penalty = (self.penalty * 2 + GATHER_FREE_WRITES_MIN).min(GATHER_FREE_WRITES_MAX);
            self.free = self.penalty;
        }
        self.in_flight += std::mem::take(&mut self.held);
        (self.expected, self.came) = (0, 0);
    }

    fn due(&self, now: Instant) -> Due {
        if self.is_complete() {
            return Due::Now;
        }
        if self.held == 0 || self.in_flight > 0 {
            return Due::Nothing;
        }
        let limit = self.limit();
        if now >= limit { Due::Now } else { Due::At(limit) }
    }
}

/// A write that is held or under way: counted until it is dropped.
struct Turn<'a, E: Env> {
    gather: &'a Gather,
    env: &'a E,
    number: u64,
}

impl<E: Env> Drop for Turn<'_, E> {
    fn drop(&mut self) {
        let mut state = self.gather.state.borrow_mut();
        let State { rounds, held, .. } = &mut *state;
        match held.iter().position(|(number, _)| *number == self.number) {
            // Given up before it was proposed.
            Some(at) => {
                held.remove(at);
                rounds.held -= 1;
            }
            None => rounds.answer(self.env.now()),
        }
        if rounds.in_flight == 0 && rounds.held > 0 {
            self.gather.changed.notify_one();
        }
    }
}

impl Gather {
    /// Proposes `command` with the round that it belongs to, and waits until it is applied here.
    pub(crate) async fn propose<E: Env>(
        &self,
        group: &Group<E>,
        command: Command,
        bytes: usize,
        term: Option<u64>,
    ) -> Result<(LogId, ApplyReply), ProposeError> {
        if bytes > GATHER_BYTES_MAX {
            return group.propose(command, term).await;
        }
        group.wake_to_lead().await;
        let (proposal, answer) = Proposal::new(command, term);
        let (turn, arrival) = self.arrive(group.env(), proposal);
        match arrival {
            Arrival::Goes | Arrival::Completes => self.begin(group, arrival).await,
            Arrival::Waits => {}
        }
        let outcome = answer.wait().await;
        drop(turn);
        outcome
    }

    fn arrive<'a, E: Env>(&'a self, env: &'a E, proposal: Proposal) -> (Turn<'a, E>, Arrival) {
        let mut state = self.state.borrow_mut();
        let number = state.next;
        state.next += 1;
        state.held.push((number, proposal));
        let arrival = state.rounds.arrive(env.now());
        if arrival == Arrival::Waits && state.rounds.in_flight == 0 && state.rounds.held == 1 {
            self.changed.notify_one();
        }
        (Turn { gather: self, env, number }, arrival)
    }

    /// Proposes all that are held.
    async fn begin<E: Env>(&self, group: &Group<E>, arrival: Arrival) {
        let held = {
            let mut state = self.state.borrow_mut();
            if arrival != Arrival::Goes {
                state.rounds.begin();
            }
            std::mem::take(&mut state.held)
        };
        for (_, proposal) in held {
            group.send(proposal).await;
        }
    }
}

/// Ends the rounds in which nobody comes any more.
pub(crate) async fn keep<E: Env>(family: Weak<Inner<E>>, gather: Rc<Gather>) {
    loop {
        gather.changed.notified().await;
        loop {
            let Some(inner) = family.upgrade() else { return };
            let (env, now) = (inner.group.env().clone(), inner.group.env().now());
            let due = gather.state.borrow().rounds.due(now);
            match due {
                Due::Nothing => break,
                Due::Now => gather.begin(&inner.group, Arrival::Completes).await,
                Due::At(limit) => {
                    drop(inner);
                    tokio::select! {
                        biased;
                        () = gather.changed.notified() => {}
                        () = env.sleep(limit.since(now)) => {}
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_micros(GATHER_PAUSE_US_MAX);

    fn at(micros: u64) -> Instant {
        Instant::default().after(Duration::from_micros(micros))
    }

    /// A round of `count` that begins at 0, of hosts that had been answered before.
    fn under_way(count: usize) -> Rounds {
        let mut rounds = Rounds { held: count, ..Rounds::default() };
        rounds.begin();
        assert_eq!((rounds.in_flight, rounds.held, rounds.free), (count, 0, 0));
        rounds
    }

    #[test]
    fn a_write_that_is_alone_waits_for_nobody() {
        let mut rounds = Rounds::default();
        for round in 0..10 {
            assert_eq!(rounds.arrive(at(round * 100)), Arrival::Completes);
            rounds.begin();
            rounds.answer(at(round * 100 + 50));
        }
    }

    #[test]
    fn those_who_come_during_a_round_wait_for_those_whom_it_answers() {
        let mut rounds = under_way(2);
        assert_eq!(rounds.arrive(at(10)), Arrival::Waits);
        rounds.answer(at(500));
        assert_eq!(rounds.due(at(500)), Due::Nothing, "one is under way still");
        rounds.answer(at(500));
        assert_eq!(rounds.due(at(500)), Due::At(at(500).after(PAUSE)));
        assert_eq!(rounds.arrive(at(600)), Arrival::Waits);
        assert_eq!(rounds.arrive(at(650)), Arrival::Completes);
        rounds.begin();
        assert_eq!((rounds.in_flight, rounds.free), (3, 0));
    }

    #[test]
    fn who_does_not_come_is_waited_for_once_and_then_not_for_a_while() {
        let mut rounds = under_way(2);
        rounds.arrive(at(10));
        rounds.answer(at(500));
        rounds.answer(at(500));
        let limit = at(500).after(PAUSE);
        assert_eq!(rounds.due(limit), Due::Now);
        rounds.begin();
        for write in 0..GATHER_FREE_WRITES_MIN {
            assert_eq!(rounds.arrive(at(1000)), Arrival::Goes, "write {write}");
        }
        let under_way = rounds.in_flight;
        assert_eq!(under_way, 1 + GATHER_FREE_WRITES_MIN as usize);
        assert_eq!(rounds.arrive(at(1000)), Arrival::Waits);
        for _ in 0..under_way {
            rounds.answer(at(1500));
        }
        assert_eq!(rounds.due(at(1500)), Due::At(at(1500).after(PAUSE)));
    }

    #[test]
    fn hosts_that_come_one_by_one_are_waited_for_so_long_and_no_longer() {
        let mut rounds = under_way(20);
        for _ in 0..20 {
            rounds.answer(at(0));
        }
        for micros in (0..GATHER_US_MAX).step_by(900) {
            assert_eq!(rounds.arrive(at(micros)), Arrival::Waits);
        }
        assert_eq!(rounds.due(at(GATHER_US_MAX)), Due::Now);
    }

    #[test]
    fn enough_go_while_others_are_under_way() {
        let mut rounds = under_way(8);
        for nth in 1..GATHER_WRITES_ENOUGH {
            assert_eq!(rounds.arrive(at(10)), Arrival::Waits, "{nth}");
        }
        assert_eq!(rounds.arrive(at(10)), Arrival::Completes);
        rounds.begin();
        assert_eq!((rounds.in_flight, rounds.free), (8 + GATHER_WRITES_ENOUGH, 0));
    }

    #[test]
    fn hosts_that_rest_are_not_expected_for_ever() {
        let mut rounds = under_way(8);
        for _ in 0..8 {
            rounds.answer(at(100));
        }
        assert_eq!(rounds.arrive(at(1_000_000)), Arrival::Completes);
    }
}
