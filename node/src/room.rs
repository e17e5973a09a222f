//! Room in the pools of this node and its peers (hazard F11).
//!
//! Every node tells its peers how many bytes leaders may count on, a few times a second and at
//! once when it runs low. A leader admits a write only while every node of the volume that is
//! heard has room; what was admitted is never refused.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Weak;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::Env;
use ballast_env::clock::Instant;

use crate::calls::{FlagV1, Tag};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// How often a node tells its room.
pub const TELL_INTERVAL: Duration = Duration::from_millis(200);

/// A word older than this is no word: the node lags or is gone.
const FRESH_MAX: Duration = Duration::from_secs(2);

/// Least room for which writes are admitted, in bytes, for pools of at least 16 times this; smaller
/// pools use a sixteenth. Covers what all leaders may send within one tell interval and a round
/// trip, at a gigabyte per second.
const LEAST_BYTES: u64 = 256 << 20;

/// Room as last heard.
#[derive(Default)]
pub struct RoomTable {
    heard: RefCell<BTreeMap<NodeId, (bool, Instant)>>,
}

/// Whether a pool of `total` bytes with `credit` bytes left takes more writes.
pub fn has_room(credit: u64, total: u64) -> bool {
    credit > LEAST_BYTES.min(total / 16)
}

impl RoomTable {
    /// Notes what a node said.
    pub fn note(&self, node: NodeId, room: bool, now: Instant) {
        self.heard.borrow_mut().insert(node, (room, now));
    }

    /// Whether none of the nodes that are heard is full.
    pub fn all(&self, nodes: &[NodeId], now: Instant) -> bool {
        let heard = self.heard.borrow();
        nodes.iter().all(|node| match heard.get(node) {
            Some(&(room, at)) => room || now.since(at) > FRESH_MAX,
            None => true,
        })
    }
}

/// Tells the peers whether this node has room, again and again.
pub(crate) async fn tell<E: Env>(node: Weak<Inner<E>>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        let env = inner.env.clone();
        let space = inner.pool.space();
        let flag = has_room(space.credit(), space.total);
        let own = inner.config.node;
        inner.room.note(own, flag, env.now());
        for founder in inner.config.founders.iter().filter(|founder| founder.node != own) {
            let frame = Frame::plain(Kind::Call, 0, Tag::Room.message(&FlagV1 { flag }));
            if let Ok(connection) = inner.links.connection(founder.node, Lane::Control) {
                // The answer is of no interest: an unsent word is followed by the next.
                let _ = connection.send(frame);
            }
        }
        drop(inner);
        env.sleep(TELL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_node_that_is_heard_stops_writes() {
        let table = RoomTable::default();
        let now = Instant(10_000_000_000);
        assert!(table.all(&[NodeId(1), NodeId(2)], now));
        table.note(NodeId(2), false, now);
        assert!(!table.all(&[NodeId(1), NodeId(2)], now));
        assert!(table.all(&[NodeId(1)], now));
        assert!(table.all(&[NodeId(2)], now.after(FRESH_MAX * 2)));
        assert!(has_room(1 << 30, 64 << 30) && !has_room(200 << 20, 64 << 30));
        assert!(has_room(40 << 20, 512 << 20) && !has_room(30 << 20, 512 << 20));
    }
}
