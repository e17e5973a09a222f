//! Several connections of one client that share an attachment: lanes.
//!
//! Owns how they are named and how a request is recognised that its client has moved from one of them
//! to another. Never knows other connections: who does keeps what they have in common. Why a moved
//! request must not be run, and what the recognition rests on: docs/nbd.md.

/// Lanes that a session may have.
pub const LANES_MAX: u16 = 16;

/// One of the connections of a client's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLane {
    /// Names the session: a number that the client has drawn for it, and draws anew for the next.
    pub session: u64,
    /// Which of its connections: 0 to `LANES_MAX - 1`; for Linux the number of the hardware queue
    /// whose requests it carries.
    pub lane: u16,
}

/// In which byte order a client may write its handles, by all that it has sent.
///
/// Linux's handle is a count and the request's tag, whose upper half is the number of the hardware
/// queue that the request belongs to and keeps. Since 6.4 it is sent as a big-endian number, before
/// that as the machine has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandleOrders {
    big: bool,
    little: bool,
}

impl Default for HandleOrders {
    fn default() -> Self {
        Self { big: true, little: true }
    }
}

impl HandleOrders {
    /// Looks at the handle of a request that came on `lane`. Whether in some byte order this and all
    /// before it belong where they came; if not, this one was sent on another lane before, and
    /// nothing may be taken from any lane of the session any more.
    #[must_use]
    pub fn belongs(&mut self, lane: u16, handle: u64) -> bool {
        let bytes = handle.to_be_bytes();
        self.big &= u16::from_be_bytes([bytes[4], bytes[5]]) == lane;
        self.little &= u16::from_le_bytes([bytes[2], bytes[3]]) == lane;
        self.big || self.little
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux makes it: a count, the queue, the tag.
    fn handle(count: u32, queue: u16, tag: u16) -> u64 {
        u64::from(count) << 32 | u64::from(queue) << 16 | u64::from(tag)
    }

    #[test]
    fn requests_belong_to_the_lane_of_their_queue_in_either_order() {
        for order in [u64::to_be, u64::to_le] {
            let mut orders = HandleOrders::default();
            for (count, lane, tag) in [(1, 0, 0), (1, 3, 127), (900, 15, 4), (256, 1, 9)] {
                assert!(orders.belongs(lane, u64::from_be(order(handle(count, lane, tag)))));
            }
            assert!(!orders.belongs(1, u64::from_be(order(handle(2, 0, 0)))), "moved");
            assert!(!orders.belongs(0, u64::from_be(order(handle(3, 0, 0)))), "and for ever");
        }
    }

    /// A handle may look right in the other order. Two copies of a request never both do: the second
    /// has the next count.
    #[test]
    fn of_two_copies_on_different_lanes_one_is_always_recognised() {
        let counts = [0, 1, 255, 256, 511, 512, 3839, 3840, 65535, 65536, u32::MAX];
        for order in [u64::to_be, u64::to_le] {
            for (count, own, other) in counts.into_iter().flat_map(|count| {
                (0..16).flat_map(move |own| (0..16).map(move |other| (count, own, other)))
            }) {
                if own == other {
                    continue;
                }
                let first = (own, u64::from_be(order(handle(count, own, 5))));
                // Moved, perhaps more than once, and perhaps with another tag.
                let moved = handle(count.wrapping_add(1), own, 6);
                let second = (other, u64::from_be(order(moved)));
                for copies in [[first, second], [second, first]] {
                    let mut orders = HandleOrders::default();
                    let taken = copies.map(|(lane, handle)| orders.belongs(lane, handle));
                    assert_ne!(taken, [true, true], "{count} {own} {other}");
                }
            }
        }
    }
}
