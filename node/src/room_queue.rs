//! Who waits for room, in order of arrival.
//!
//! Owns places and answers; what there is to give is the table's (`room.rs`). A write that large
//! ones of other volumes, or small ones, came before gets its turn after them, and none starves.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::limits::ROOM_PLACE_MS;
use ballast_block::{AttachmentId, FamilyId, NodeId};
use ballast_env::clock::Instant;
use ballast_volume::family::{Room, RoomAsk};
use tokio::sync::Notify;

/// A write that waits.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    /// Its volume's family.
    pub family: FamilyId,
    /// What it asks for.
    pub ask: RoomAsk,
}

type Key = (FamilyId, AttachmentId, u64);

impl Who {
    fn key(&self) -> Key {
        (self.family, self.ask.attachment, self.ask.request)
    }
}

/// Somebody's place in the queue.
pub(crate) struct Waiter {
    pub(crate) who: Who,
    /// Where it needs room.
    pub(crate) nodes: Vec<NodeId>,
    /// When it came first.
    pub(crate) since: Instant,
    /// The answer, once there is one.
    pub(crate) answer: Cell<Option<Room>>,
    /// Told when there is one.
    pub(crate) answered: Notify,
    /// When it went away, to come again perhaps.
    left: Cell<Option<Instant>>,
}

impl Waiter {
    pub(crate) fn tell(&self, answer: Option<Room>) {
        if answer.is_some() {
            self.answer.set(answer);
            self.answered.notify_one();
        }
    }
}

/// All who wait.
#[derive(Default)]
pub(crate) struct RoomQueue {
    places: BTreeMap<u64, Rc<Waiter>>,
    by_key: BTreeMap<Key, u64>,
    next: u64,
    /// Nodes that somebody waits for who came before whoever comes next.
    awaited: BTreeSet<NodeId>,
}

impl RoomQueue {
    /// Takes a place at the end, or the one that was kept.
    pub(crate) fn enter(&mut self, who: Who, nodes: Vec<NodeId>, now: Instant) -> Rc<Waiter> {
        let kept = self.by_key.get(&who.key()).copied();
        let since = kept.and_then(|place| self.places.get(&place)).map_or(now, |old| old.since);
        let place = kept.unwrap_or(self.next);
        self.next = self.next.max(place + 1);
        let waiter = Waiter {
            who,
            nodes,
            since,
            answer: Cell::default(),
            answered: Notify::new(),
            left: Cell::default(),
        };
        let waiter = Rc::new(waiter);
        self.places.insert(place, waiter.clone());
        self.by_key.insert(who.key(), place);
        waiter
    }

    /// Goes, and may come again.
    pub(crate) fn leave(&mut self, waiter: &Rc<Waiter>, now: Instant) {
        waiter.left.set(Some(now));
        if self.places.is_empty() {
            self.awaited.clear();
        }
    }

    /// Goes for good, unless the same write has come again meanwhile.
    pub(crate) fn remove(&mut self, waiter: &Rc<Waiter>) {
        let key = waiter.who.key();
        let Some(place) = self.by_key.get(&key).copied() else { return };
        if self.places.get(&place).is_some_and(|at| Rc::ptr_eq(at, waiter)) {
            self.places.remove(&place);
            self.by_key.remove(&key);
        }
    }

    /// Gives up the places of those who did not come again.
    pub(crate) fn forget_absent(&mut self, now: Instant) {
        let kept = Duration::from_millis(ROOM_PLACE_MS);
        let is_kept = |left: Instant| now.since(left) <= kept;
        self.places.retain(|_, waiter| waiter.left.get().is_none_or(is_kept));
        let places = &self.places;
        self.by_key.retain(|_, place| places.contains_key(place));
    }

    /// Those who wait now, in order of arrival.
    pub(crate) fn present(&self) -> impl Iterator<Item = &Rc<Waiter>> {
        self.places.values().filter(|waiter| waiter.left.get().is_none())
    }

    pub(crate) fn set_awaited(&mut self, nodes: BTreeSet<NodeId>) {
        self.awaited = nodes;
    }

    /// Whether somebody waits for room on `node`.
    pub(crate) fn is_awaited(&self, node: NodeId) -> bool {
        self.awaited.contains(&node)
    }
}
