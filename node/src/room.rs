//! Room in the pools of this node and its peers (hazard F11).
//!
//! Every node tells its peers what leaders may count on, a few times a second. A leader takes room in
//! the pool of every node of the volume that is heard before it proposes a write: what was admitted
//! is never refused. As a pool's credit runs out its writers are slowed down to what its keeper
//! frees; at none they wait, and only where what lives fills the pool they are refused at once.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Weak;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_block::limits::ROOM_SPREAD_MS;
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_volume::family::Room;

use crate::calls::{RoomV1, Tag};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// How often a node tells its room.
pub const TELL_INTERVAL: Duration = Duration::from_millis(200);

/// How often while its credit is what writers may use in about one interval.
pub const TELL_INTERVAL_SHORT: Duration = Duration::from_millis(50);

/// A word older than this is no word: the node lags or is gone.
const FRESH_MAX: Duration = Duration::from_secs(2);

/// Longest pause before room is asked for again: by then a word may have come.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// Credit below which a node tells its room more often, in bytes: a fast disk's half second.
const CREDIT_SHORT: u64 = 256 << 20;

/// Room as last heard.
struct Heard {
    word: RoomV1,
    at: Instant,
    /// Bytes taken since.
    taken: u64,
    /// When the next write may go.
    next: Instant,
}

/// The rooms of all nodes.
#[derive(Default)]
pub struct RoomTable {
    heard: RefCell<BTreeMap<NodeId, Heard>>,
}

impl Heard {
    /// Whether the word still says something.
    fn counts(&self, now: Instant) -> bool {
        now.since(self.at) <= FRESH_MAX
    }

    /// What is left of the credit.
    fn left(&self) -> u64 {
        self.word.credit.saturating_sub(self.taken)
    }

    /// How long a write of `bytes` has to wait; nothing when it may go now.
    fn wait(&self, bytes: u64, now: Instant) -> Option<Duration> {
        if self.left() < bytes {
            return Some(ASK_AGAIN);
        }
        let wait = self.next.since(now);
        (!wait.is_zero()).then(|| wait.min(ASK_AGAIN))
    }

    fn take(&mut self, bytes: u64, now: Instant) {
        // All that is left takes ROOM_SPREAD_MS: the less it is, the slower it goes.
        let spread = Duration::from_millis(ROOM_SPREAD_MS).as_nanos();
        let nanos = u128::from(bytes) * spread / u128::from(self.left().max(1));
        let pause = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.next = self.next.max(now).after(pause);
        self.taken += bytes;
    }
}

impl RoomTable {
    /// Notes what a node said.
    pub fn note(&self, node: NodeId, word: RoomV1, now: Instant) {
        let mut heard = self.heard.borrow_mut();
        let next = heard.get(&node).map_or(now, |before| before.next);
        heard.insert(node, Heard { word, at: now, taken: 0, next });
    }

    /// Takes room for a write of `bytes` on each of these nodes that is heard, or on none.
    pub fn take(&self, nodes: &[NodeId], bytes: u64, now: Instant) -> Room {
        let mut heard = self.heard.borrow_mut();
        let mut wait = None;
        for node in nodes {
            let Some(one) = heard.get(node).filter(|one| one.counts(now)) else { continue };
            if one.word.full {
                return Room::Full;
            }
            wait = wait.max(one.wait(bytes, now));
        }
        if let Some(wait) = wait {
            return Room::Wait(wait);
        }
        for node in nodes {
            if let Some(one) = heard.get_mut(node).filter(|one| one.counts(now)) {
                one.take(bytes, now);
            }
        }
        Room::Taken
    }
}

/// Tells the peers what this node has room for, again and again.
pub(crate) async fn tell<E: Env>(node: Weak<Inner<E>>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        let env = inner.env.clone();
        let word = RoomV1::from(inner.pool.room());
        let own = inner.config.node;
        for founder in inner.config.founders.iter().filter(|founder| founder.node != own) {
            let frame = Frame::plain(Kind::Call, 0, Tag::Room.message(&word));
            if let Ok(connection) = inner.links.connection(founder.node, Lane::Control) {
                // The answer is of no interest: an unsent word is followed by the next.
                let _ = connection.send(frame);
            }
        }
        drop(inner);
        let short = word.full || word.credit < CREDIT_SHORT;
        env.sleep(if short { TELL_INTERVAL_SHORT } else { TELL_INTERVAL }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Instant = Instant(10_000_000_000);
    const MIB: u64 = 1 << 20;

    fn word(credit: u64, full: bool) -> RoomV1 {
        RoomV1 { flag: credit > 0 && !full, credit, full }
    }

    #[test]
    fn a_full_node_that_is_heard_stops_writes() {
        let table = RoomTable::default();
        let both = [NodeId(1), NodeId(2)];
        assert_eq!(table.take(&both, MIB, NOW), Room::Taken);
        table.note(NodeId(2), word(100 * MIB, true), NOW);
        assert_eq!(table.take(&both, MIB, NOW), Room::Full);
        assert_eq!(table.take(&[NodeId(1)], MIB, NOW), Room::Taken);
        assert_eq!(table.take(&both, MIB, NOW.after(FRESH_MAX * 2)), Room::Taken);
    }

    #[test]
    fn without_credit_writes_wait_for_the_next_word() {
        let table = RoomTable::default();
        table.note(NodeId(1), word(MIB / 2, false), NOW);
        assert!(matches!(table.take(&[NodeId(1)], MIB, NOW), Room::Wait(_)));
        table.note(NodeId(1), word(10 * MIB, false), NOW);
        assert_eq!(table.take(&[NodeId(1)], MIB, NOW), Room::Taken);
    }

    /// With a credit that nobody renews, writers get slower and slower, and never all of it.
    #[test]
    fn the_less_is_left_the_slower_it_goes() {
        let table = RoomTable::default();
        table.note(NodeId(1), word(64 * MIB, false), NOW);
        let (mut now, mut taken, mut marks) = (NOW, 0, Vec::new());
        for _ in 0..10_000 {
            match table.take(&[NodeId(1)], 16 << 10, now) {
                Room::Taken => taken += 16 << 10,
                Room::Wait(pause) => now = now.after(pause),
                Room::Full => unreachable!("nobody said so"),
            }
            if now.since(NOW) > Duration::from_secs(marks.len() as u64 + 1) {
                marks.push(taken / MIB);
            }
            if marks.len() == 2 {
                break;
            }
        }
        // 1 - 1/e of it in the first second, as much of the rest in the next one.
        assert!((38..43).contains(&marks[0]) && (53..58).contains(&marks[1]), "{marks:?}");
    }
}
