//! Commands given out to the caller and not completed.
//!
//! Owns their number and the memory they may hold, both bounded. Never waits: who finds no room
//! tries again after a completion or after replies were sent.

use ballast_block::limits::{CONNECTION_INFLIGHT_BYTES_MAX, CONNECTION_INFLIGHT_COMMANDS_MAX};
use bytes::Buf;

use crate::io_command::Reply;
use crate::memory::Share;
use crate::reply::ReplyQueue;

/// All that is in flight on one connection.
#[derive(Default)]
pub(crate) struct InFlight {
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    count: usize,
    bytes: usize,
    last_number: u64,
}

/// A command given out, until it is completed.
#[derive(Debug)]
struct Pending {
    number: u64,
    reply: Reply,
    /// Bytes of memory it may hold.
    cost: usize,
}

/// Names a command in flight of one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandId {
    slot: usize,
    /// Never used twice in a session: finds a command that is completed twice.
    number: u64,
}

impl InFlight {
    /// Whether a command that holds `cost` bytes may be given out, as far as this connection goes.
    /// What waits to be sent counts.
    pub(crate) fn has_room(&self, cost: usize, replies: &ReplyQueue) -> bool {
        self.count < CONNECTION_INFLIGHT_COMMANDS_MAX
            && self.held(replies) + cost <= CONNECTION_INFLIGHT_BYTES_MAX
    }

    /// The same, and other connections leave so much; it is then counted as taken.
    pub(crate) fn take_room(
        &self,
        cost: usize,
        replies: &ReplyQueue,
        share: Option<&mut Share>,
    ) -> bool {
        self.has_room(cost, replies)
            && share.is_none_or(|share| cost == 0 || share.grow(self.held(replies) + cost))
    }

    /// Bytes of memory that commands and their replies hold now.
    pub(crate) fn held(&self, replies: &ReplyQueue) -> usize {
        self.bytes + replies.remaining()
    }

    pub(crate) fn insert(&mut self, reply: Reply, cost: usize) -> CommandId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.last_number += 1;
        let number = self.last_number;
        self.slots[slot] = Some(Pending { number, reply, cost });
        self.count += 1;
        self.bytes += cost;
        CommandId { slot, number }
    }

    /// # Panics
    /// When the command is not in flight: a bug of the caller.
    pub(crate) fn remove(&mut self, id: CommandId) -> Reply {
        let pending = self.slots.get_mut(id.slot).and_then(Option::take);
        let pending = pending.expect("only commands in flight are completed");
        assert_eq!(pending.number, id.number, "a command was completed twice");
        self.free.push(id.slot);
        self.count -= 1;
        self.bytes -= pending.cost;
        pending.reply
    }

    /// # Panics
    /// As [`InFlight::remove`].
    pub(crate) fn reply(&self, id: CommandId) -> &Reply {
        let pending = self.slots.get(id.slot).and_then(Option::as_ref);
        let pending = pending.filter(|pending| pending.number == id.number);
        &pending.expect("only commands in flight are asked for").reply
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }
}
