//! Room in the pools of this node and its peers (hazard F11).
//!
//! Every node tells its peers what leaders may count on, a few times a second. A leader takes room in
//! the pool of every node of the volume that is heard before it proposes a write: what was admitted
//! is never refused. As a pool's credit runs out its writers are slowed down to what its keeper
//! frees; at none they wait in turn (`room_queue.rs`), and only where what lives fills the pool they
//! are refused at once.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use ballast_block::NodeId;
use ballast_block::limits::{ROOM_AHEAD_MS, ROOM_ATTEMPT_MS_MAX, ROOM_SPREAD_MS, ROOM_WAIT_MS_MAX};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_volume::family::Room;

use crate::calls::{RoomV1, Tag};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};
use crate::room_queue::{RoomQueue, Waiter, Who};

/// How often a node tells its room.
pub const TELL_INTERVAL: Duration = Duration::from_millis(200);

/// How often while its credit is what writers may use in about one interval.
pub const TELL_INTERVAL_SHORT: Duration = Duration::from_millis(50);

/// A word older than this is no word: the node lags or is gone.
const FRESH_MAX: Duration = Duration::from_secs(2);

/// How often the queue is looked through while somebody waits: a word may have come, or the pace
/// allows the next one.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// Least time between two looks through the queue.
const SERVE_INTERVAL: Duration = Duration::from_millis(1);

/// Credit below which a node tells its room more often, in bytes: a fast disk's half second.
const CREDIT_SHORT: u64 = 256 << 20;

/// Room as last heard.
struct Heard {
    word: RoomV1,
    at: Instant,
    /// Bytes taken since.
    taken: u64,
    /// When the next write may go, were it to keep to the pace exactly.
    next: Instant,
    /// When a write last got room.
    last: Instant,
}

/// The rooms of all nodes.
#[derive(Default)]
pub struct RoomTable {
    heard: RefCell<BTreeMap<NodeId, Heard>>,
    queue: RefCell<RoomQueue>,
    /// When the queue was looked through last.
    served: Cell<Instant>,
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

    /// Whether a write of `bytes` may not go now.
    fn is_short(&self, bytes: u64, now: Instant) -> bool {
        self.left() < bytes || self.next.since(now) > Duration::from_millis(ROOM_AHEAD_MS)
    }

    fn take(&mut self, bytes: u64, now: Instant) {
        // All that is left takes ROOM_SPREAD_MS: the less it is, the slower it goes.
        let spread = Duration::from_millis(ROOM_SPREAD_MS).as_nanos();
        let nanos = u128::from(bytes) * spread / u128::from(self.left().max(1));
        let pause = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.next = self.next.max(now).after(pause);
        self.taken += bytes;
        self.last = now;
    }
}

impl RoomTable {
    /// Notes what a node said.
    pub fn note(&self, node: NodeId, word: RoomV1, now: Instant) {
        let mut heard = self.heard.borrow_mut();
        let (next, last) = heard.get(&node).map_or((now, now), |old| (old.next, old.last));
        heard.insert(node, Heard { word, at: now, taken: 0, next, last });
    }

    /// Takes room for a write of `bytes` on each of these nodes that is heard, or on none; never
    /// before somebody who waits for room on one of them.
    pub fn take(&self, nodes: &[NodeId], bytes: u64, now: Instant) -> Room {
        let mut heard = self.heard.borrow_mut();
        let queue = self.queue.borrow();
        let mut room = Room::Taken;
        for node in nodes {
            let Some(one) = heard.get(node).filter(|one| one.counts(now)) else { continue };
            if one.word.full {
                return Room::Full;
            }
            if one.is_short(bytes, now) || queue.is_awaited(*node) {
                room = Room::Wait;
            }
        }
        if room == Room::Taken {
            take_on(&mut heard, nodes, bytes, now);
        }
        room
    }

    /// [`Self::serve`], unless somebody else has just called it: each of many who wait does.
    fn serve_if_due(&self, now: Instant) {
        if now.since(self.served.get()) >= SERVE_INTERVAL {
            self.serve(now);
        }
    }

    /// Gives room to those who wait, in the order in which they came. Who waits for one node does
    /// not hold up writes to others.
    fn serve(&self, now: Instant) {
        self.served.set(now);
        let mut heard = self.heard.borrow_mut();
        let mut queue = self.queue.borrow_mut();
        let mut awaited = BTreeSet::new();
        queue.forget_absent(now);
        for waiter in queue.present() {
            if waiter.answer.get().is_none() {
                let answer = answer(&mut heard, &mut awaited, waiter, now);
                waiter.tell(answer);
            }
        }
        queue.set_awaited(awaited);
    }
}

/// The answer to a waiter whose turn comes after that of those who wait for the nodes `awaited`;
/// nothing when it has to go on waiting.
fn answer(
    heard: &mut BTreeMap<NodeId, Heard>,
    awaited: &mut BTreeSet<NodeId>,
    waiter: &Waiter,
    now: Instant,
) -> Option<Room> {
    let bytes = waiter.who.ask.bytes;
    let (mut may_go, mut fits, mut hopeless) = (true, true, false);
    let mut short = Vec::new();
    for node in &waiter.nodes {
        let Some(one) = heard.get(node).filter(|one| one.counts(now)) else { continue };
        if one.word.full {
            return Some(Room::Full);
        }
        fits &= one.left() >= bytes;
        if one.is_short(bytes, now) || awaited.contains(node) {
            may_go = false;
            short.push(*node);
            let waited = now.since(one.last.max(waiter.since));
            hopeless |= waited >= Duration::from_millis(ROOM_WAIT_MS_MAX);
        }
    }
    // What has waited for nothing but a larger one in front of it goes after all.
    if may_go || hopeless && fits {
        take_on(heard, &waiter.nodes, bytes, now);
        return Some(Room::Taken);
    }
    if hopeless {
        return Some(Room::Full);
    }
    awaited.extend(short);
    None
}

fn take_on(heard: &mut BTreeMap<NodeId, Heard>, nodes: &[NodeId], bytes: u64, now: Instant) {
    for node in nodes {
        if let Some(one) = heard.get_mut(node).filter(|one| one.counts(now)) {
            one.take(bytes, now);
        }
    }
}

/// Notes what this node itself has room for, which is always of now.
pub(crate) fn note_own_room<E: Env>(inner: &Inner<E>) {
    inner.room.note(inner.config.node, inner.pool.room().into(), inner.env.now());
}

/// Waits for room in turn: [`Room::Taken`], [`Room::Full`], or [`Room::Wait`] when the time of one
/// attempt is over.
pub(crate) async fn wait_for_room<E: Env>(
    inner: &Rc<Inner<E>>,
    who: Who,
    nodes: Vec<NodeId>,
) -> Room {
    let start = inner.env.now();
    let place = inner.room.queue.borrow_mut().enter(who, nodes, start);
    let kept = PlaceKept { inner: inner.clone(), place };
    let place = &kept.place;
    loop {
        note_own_room(inner);
        inner.room.serve_if_due(inner.env.now());
        if let Some(room) = place.answer.get() {
            inner.room.queue.borrow_mut().remove(place);
            return room;
        }
        if inner.env.now().since(start) >= Duration::from_millis(ROOM_ATTEMPT_MS_MAX) {
            return Room::Wait;
        }
        tokio::select! {
            biased;
            () = place.answered.notified() => {}
            () = inner.env.sleep(ASK_AGAIN) => {}
        }
    }
}

/// Keeps a waiter's place for a while when it goes.
struct PlaceKept<E: Env> {
    inner: Rc<Inner<E>>,
    place: Rc<Waiter>,
}

impl<E: Env> Drop for PlaceKept<E> {
    fn drop(&mut self) {
        self.inner.room.queue.borrow_mut().leave(&self.place, self.inner.env.now());
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
    use ballast_block::{AttachmentId, FamilyId};
    use ballast_volume::family::RoomAsk;

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
        assert_eq!(table.take(&[NodeId(1)], MIB, NOW), Room::Wait);
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
                Room::Wait => now = now.after(ASK_AGAIN),
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
        assert!((38..44).contains(&marks[0]) && (53..58).contains(&marks[1]), "{marks:?}");
    }

    /// Waits as `wait_for_room` does.
    fn enter(table: &RoomTable, request: u64, bytes: u64, nodes: &[u32]) -> Rc<Waiter> {
        let ask = RoomAsk { attachment: AttachmentId(1), request, bytes };
        let who = Who { family: FamilyId(nodes[0].into()), ask };
        let nodes = nodes.iter().map(|&node| NodeId(node)).collect();
        table.queue.borrow_mut().enter(who, nodes, NOW)
    }

    #[test]
    fn a_large_write_gets_room_beside_small_ones() {
        let table = RoomTable::default();
        table.note(NodeId(1), word(MIB / 2, false), NOW);
        let large = enter(&table, 1, MIB, &[1]);
        table.serve(NOW);
        // Neither a newcomer nor one that came later goes before it.
        assert_eq!(table.take(&[NodeId(1)], 4096, NOW), Room::Wait);
        let small = enter(&table, 2, 4096, &[1]);
        table.serve(NOW);
        assert_eq!((large.answer.get(), small.answer.get()), (None, None));
        // Writes to other nodes do not wait for it.
        assert_eq!(table.take(&[NodeId(2)], MIB, NOW), Room::Taken);
        table.note(NodeId(1), word(2 * MIB, false), NOW);
        table.serve(NOW);
        let later = NOW.after(Duration::from_secs(2));
        table.note(NodeId(1), word(2 * MIB, false), later);
        table.serve(later);
        assert_eq!(
            (large.answer.get(), small.answer.get()),
            (Some(Room::Taken), Some(Room::Taken))
        );
    }

    #[test]
    fn who_waits_in_vain_is_refused_and_what_still_fits_is_not() {
        let table = RoomTable::default();
        table.note(NodeId(1), word(MIB / 2, false), NOW);
        let large = enter(&table, 1, MIB, &[1]);
        let small = enter(&table, 2, 4096, &[1]);
        table.serve(NOW);
        let later = NOW.after(Duration::from_millis(ROOM_WAIT_MS_MAX));
        table.note(NodeId(1), word(MIB / 2, false), later);
        table.serve(later);
        assert_eq!((large.answer.get(), small.answer.get()), (Some(Room::Full), Some(Room::Taken)));
    }

    #[test]
    fn who_asks_again_has_kept_his_place_for_a_while() {
        let table = RoomTable::default();
        table.note(NodeId(1), word(0, false), NOW);
        let first = enter(&table, 1, MIB, &[1]);
        let second = enter(&table, 2, MIB, &[1]);
        table.queue.borrow_mut().leave(&first, NOW);
        let again = enter(&table, 1, MIB, &[1]);
        let soon = NOW.after(Duration::from_millis(100));
        table.note(NodeId(1), word(MIB, false), soon);
        table.serve(soon);
        assert_eq!((again.answer.get(), second.answer.get()), (Some(Room::Taken), None));
        // Who does not come back holds up nobody.
        let third = enter(&table, 3, MIB, &[1]);
        table.queue.borrow_mut().leave(&third, soon);
        let later = soon.after(Duration::from_secs(2));
        table.note(NodeId(1), word(MIB, false), later);
        table.serve(later);
        assert_eq!(second.answer.get(), Some(Room::Taken));
    }
}
