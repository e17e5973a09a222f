//! When the members of a group last followed its leader: what a read lease rests on (hazard F4).
//!
//! Ours, because the consensus library dates an answer by the last request that it made for the same
//! log position, which may be one that was made, or sent, long after the one that is answered.
//!
//! Besides, the way back: the network learns here up to where the log is to go (hazard F8).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ballast_block::ReplicaId;
use ballast_env::clock::Instant;

/// Per member: the term of the leader it followed, and when the request it answered was sent. Clones
/// share it: the network notes, the read gate asks.
#[derive(Clone, Default)]
pub struct Acks {
    members: Rc<RefCell<BTreeMap<u64, (u64, Instant)>>>,
    wanted_gone: Rc<Cell<u64>>,
    unsendable: Rc<Cell<u64>>,
}

/// A network that notes the answers of members.
pub trait NotesAcks {
    /// Where it notes them.
    fn acks(&self) -> Acks;
}

impl Acks {
    /// `member` took a request of the leader of `term` that was sent at `sent`, no later.
    pub fn note(&self, member: ReplicaId, term: u64, sent: Instant) {
        let mut members = self.members.borrow_mut();
        let known = members.entry(member.0).or_insert((term, sent));
        *known = (*known).max((term, sent));
    }

    /// The log up to this index is more than may be kept: no request should hold on to it that a
    /// member does not answer (hazard F8).
    pub fn want_gone(&self, index: u64) {
        self.wanted_gone.set(self.wanted_gone.get().max(index));
    }

    /// Up to which index the log is to go.
    pub fn wanted_gone(&self) -> u64 {
        self.wanted_gone.get()
    }

    /// The entry at this index can't be read here, and won't be: no stream should wait for it or for
    /// one before it. 0: all can be read.
    pub fn set_unsendable(&self, index: u64) {
        self.unsendable.set(index);
    }

    /// The entry that can't be sent, or 0.
    pub fn unsendable(&self) -> u64 {
        self.unsendable.get()
    }

    /// Until when a majority of each of the `configs` certainly followed the leader `own` of `term`;
    /// itself it follows `now`. None if some majority never answered in that term.
    pub fn quorum(
        &self,
        own: ReplicaId,
        term: u64,
        configs: &[BTreeSet<u64>],
        now: Instant,
    ) -> Option<Instant> {
        let members = self.members.borrow();
        let when = |member: &u64| match members.get(member) {
            _ if *member == own.0 => Some(now),
            Some(&(followed, sent)) if followed == term => Some(sent),
            _ => None,
        };
        let majority = |config: &BTreeSet<u64>| {
            let earlier = |at: Instant| {
                config.iter().filter(|member| when(member).is_some_and(|when| when >= at)).count()
            };
            let moments = config.iter().filter_map(when);
            moments.filter(|&at| earlier(at) > config.len() / 2).max()
        };
        let mut oldest = now;
        for config in configs {
            oldest = oldest.min(majority(config)?);
        }
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: ReplicaId = ReplicaId(1);

    fn set<const N: usize>(members: [u64; N]) -> BTreeSet<u64> {
        members.into()
    }

    #[test]
    fn the_median_of_three_and_five_counts() {
        let acks = Acks::default();
        let of = |configs: &[BTreeSet<u64>]| acks.quorum(OWN, 7, configs, Instant(100));
        assert_eq!(of(&[set([1])]), Some(Instant(100)), "a lone voter is its own majority");
        assert_eq!(of(&[set([1, 2, 3])]), None);
        acks.note(ReplicaId(2), 7, Instant(40));
        assert_eq!(of(&[set([1, 2, 3])]), Some(Instant(40)));
        assert_eq!(of(&[set([1, 2, 3, 4, 5])]), None);
        acks.note(ReplicaId(3), 7, Instant(60));
        assert_eq!(of(&[set([1, 2, 3])]), Some(Instant(60)));
        assert_eq!(of(&[set([1, 2, 3, 4, 5])]), Some(Instant(40)));
        acks.note(ReplicaId(3), 7, Instant(50));
        assert_eq!(of(&[set([1, 2, 3])]), Some(Instant(60)), "an answer that was overtaken");
    }

    #[test]
    fn both_halves_of_a_change_of_members_count() {
        let acks = Acks::default();
        acks.note(ReplicaId(2), 7, Instant(60));
        let joint = [set([1, 2, 3]), set([1, 4, 5])];
        assert_eq!(acks.quorum(OWN, 7, &joint, Instant(100)), None);
        acks.note(ReplicaId(4), 7, Instant(30));
        assert_eq!(acks.quorum(OWN, 7, &joint, Instant(100)), Some(Instant(30)));
        let without = [set([2, 3, 4])];
        assert_eq!(acks.quorum(OWN, 7, &without, Instant(100)), Some(Instant(30)));
    }

    #[test]
    fn answers_to_another_term_count_for_nothing() {
        let acks = Acks::default();
        acks.note(ReplicaId(2), 6, Instant(60));
        assert_eq!(acks.quorum(OWN, 7, &[set([1, 2, 3])], Instant(100)), None);
        acks.note(ReplicaId(2), 7, Instant(10));
        assert_eq!(acks.quorum(OWN, 7, &[set([1, 2, 3])], Instant(100)), Some(Instant(10)));
        acks.note(ReplicaId(2), 6, Instant(90));
        assert_eq!(acks.quorum(OWN, 7, &[set([1, 2, 3])], Instant(100)), Some(Instant(10)));
    }
}
