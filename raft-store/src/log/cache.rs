//! Recent payload in memory, by its place in the pool: followers and reads of fresh data go without
//! the disk. Holds references to the very memory that was written; never a copy.

use std::collections::{BTreeMap, VecDeque};

use ballast_block::Payload;
use ballast_block::geometry::BLOCK_SIZE;

use crate::place::Place;

/// Payload by place, bounded in bytes, first in first out.
#[derive(Debug)]
pub(crate) struct PayloadCache {
    by_place: BTreeMap<u64, Payload>,
    order: VecDeque<u64>,
    bytes: usize,
    limit: usize,
}

impl PayloadCache {
    /// An empty cache of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { by_place: BTreeMap::new(), order: VecDeque::new(), bytes: 0, limit }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Remembers `payload`, which lies at `place`; forgets the oldest above the limit.
    pub fn put(&mut self, place: Place, payload: Payload) {
        self.bytes += payload.len();
        match self.by_place.insert(place.0, payload) {
            Some(replaced) => self.bytes -= replaced.len(),
            None => self.order.push_back(place.0),
        }
        while self.bytes > self.limit
            && let Some(oldest) = self.order.pop_front()
        {
            let forgotten = self.by_place.remove(&oldest).expect("in order means in the map");
            self.bytes -= forgotten.len();
        }
    }

    /// The `count` blocks at `place`, if one payload holds them all.
    ///
    /// The space may have been freed and written again since: whoever has a checksum checks it and
    /// asks the disk when it does not match.
    pub fn get(&self, place: Place, count: u32) -> Option<Payload> {
        let (&start, payload) = self.by_place.range(..=place.0).next_back()?;
        let from = usize::try_from(place.0 - start).ok()?.checked_mul(BLOCK_SIZE)?;
        let to = from.checked_add(count as usize * BLOCK_SIZE)?;
        (to <= payload.len()).then(|| payload.slice(from..to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ballast_block::AlignedBuf;

    fn blocks(count: usize, fill: u8) -> Payload {
        let mut buffer = AlignedBuf::zeroed(count * BLOCK_SIZE);
        buffer.fill(fill);
        buffer.freeze()
    }

    #[test]
    fn holds_the_newest_within_its_limit() {
        let mut cache = PayloadCache::new(4 * BLOCK_SIZE);
        cache.put(Place(10), blocks(2, 1));
        cache.put(Place(13), blocks(2, 2));
        assert_eq!(cache.get(Place(11), 1).unwrap()[0], 1);
        assert!(cache.get(Place(11), 2).is_none());
        assert!(cache.get(Place(12), 1).is_none());
        cache.put(Place(20), blocks(1, 3));
        assert!(cache.get(Place(10), 1).is_none(), "the oldest went");
        assert_eq!(cache.get(Place(13), 2).unwrap()[0], 2);
        assert_eq!(cache.bytes(), 3 * BLOCK_SIZE);
        cache.put(Place(13), blocks(1, 4));
        assert_eq!(cache.bytes(), 2 * BLOCK_SIZE);
        assert_eq!(cache.get(Place(13), 1).unwrap()[0], 4);
        assert!(PayloadCache::new(0).get(Place(0), 1).is_none());
    }

    #[test]
    fn a_payload_above_the_limit_is_not_kept() {
        let mut cache = PayloadCache::new(BLOCK_SIZE);
        cache.put(Place(1), blocks(2, 1));
        assert_eq!((cache.bytes(), cache.get(Place(1), 1)), (0, None));
    }
}
