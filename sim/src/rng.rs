//! Random numbers of a run: SplitMix64 streams that fork by name, so that drawing more in one part
//! of the world does not change what another part draws.

use std::cell::Cell;

/// One stream of random numbers. Draws through a shared reference: the world is one thread.
#[derive(Debug)]
pub struct Rng {
    state: Cell<u64>,
}

impl Rng {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: Cell::new(seed) }
    }

    /// A stream of its own for `name`; the same name always gives the same stream, whatever was
    /// drawn before from the stream that `seed` started.
    pub fn named(seed: u64, name: &str, number: u64) -> Self {
        let mut hash = seed ^ 0x5851_f42d_4c95_7f2d;
        for byte in name.bytes().chain(number.to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let stream = Self::new(hash);
        stream.draw();
        stream
    }

    /// A uniformly random number.
    pub fn draw(&self) -> u64 {
        let next = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(next);
        let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in `0..bound`; `bound` is not 0.
    pub fn below(&self, bound: u64) -> u64 {
        // Multiply and shift: the bias is below bound / 2^64.
        ((u128::from(self.draw()) * u128::from(bound)) >> 64) as u64
    }

    /// Uniform in `low..=high`.
    pub fn between(&self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True with `per_million` chances in a million.
    pub fn chance(&self, per_million: u64) -> bool {
        self.below(1_000_000) < per_million
    }

    /// One of `items`, which is not empty.
    pub fn pick<'a, T>(&self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ_by_name() {
        let numbers = |name| {
            let rng = Rng::named(1, name, 2);
            (0..8).map(|_| rng.draw()).collect::<Vec<_>>()
        };
        assert_eq!(numbers("disk"), numbers("disk"));
        assert_ne!(numbers("disk"), numbers("network"));
    }

    #[test]
    fn bounds_hold_and_are_reached() {
        let rng = Rng::new(3);
        let drawn: std::collections::BTreeSet<u64> = (0..200).map(|_| rng.between(5, 9)).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
        assert!(!rng.chance(0) && rng.chance(1_000_000));
    }
}
