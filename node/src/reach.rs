//! How far a difference on its way has come, through breaks and newer views: plain bookkeeping for
//! [`crate::resync`].

use std::collections::BTreeMap;

use ballast_block::Sequence;

/// How far what was put aside reaches: from each of these blocks to the next, every change up to the
/// sequence is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reach(BTreeMap<u64, Sequence>);

/// What is asked for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The first block.
    pub(crate) from: u64,
    /// The first block behind it; none: to the end of the volume.
    pub(crate) end: Option<u64>,
    /// What is there reaches so far.
    pub(crate) since: Sequence,
}

impl Reach {
    /// Nothing since then.
    pub(crate) fn new(since: Sequence) -> Self {
        Self(BTreeMap::from([(0, since)]))
    }

    /// The first blocks that lack changes up to `to`.
    pub(crate) fn gap(&self, to: Sequence) -> Option<Gap> {
        let (&from, &since) = self.0.iter().find(|(_, reached)| **reached < to)?;
        let end = self.0.range(from + 1..).next().map(|(&end, _)| end);
        Some(Gap { from, end, since })
    }

    /// What the gap lacked is there up to the block `next`; none: to the end of the volume.
    pub(crate) fn filled(&mut self, gap: Gap, next: Option<u64>, to: Sequence) {
        self.0.insert(gap.from, to);
        if let Some(next) = next.filter(|next| gap.end.is_none_or(|end| *next < end)) {
            self.0.insert(next, gap.since);
        }
        let mut before = None;
        self.0.retain(|_, reached| before.replace(*reached) != Some(*reached));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences<const N: usize>(reach: [(u64, u64); N]) -> Reach {
        Reach(reach.map(|(from, sequence)| (from, Sequence(sequence))).into())
    }

    #[test]
    fn a_broken_difference_goes_on_with_what_changed_meanwhile_and_the_rest() {
        let mut reach = Reach::new(Sequence(5));
        let all = Gap { from: 0, end: None, since: Sequence(5) };
        assert_eq!(reach.gap(Sequence(9)), Some(all));
        reach.filled(all, Some(100), Sequence(9));
        assert_eq!(reach, sequences([(0, 9), (100, 5)]));
        // It broke; the next view is newer.
        let again = Gap { from: 0, end: Some(100), since: Sequence(9) };
        assert_eq!(reach.gap(Sequence(12)), Some(again));
        reach.filled(again, Some(40), Sequence(12));
        assert_eq!(reach, sequences([(0, 12), (40, 9), (100, 5)]));
        // A page may go further than what was asked for.
        let rest = Gap { from: 40, end: Some(100), since: Sequence(9) };
        assert_eq!(reach.gap(Sequence(12)), Some(rest));
        reach.filled(rest, Some(300), Sequence(12));
        assert_eq!(reach, sequences([(0, 12), (100, 5)]));
        let last = Gap { from: 100, end: None, since: Sequence(5) };
        assert_eq!(reach.gap(Sequence(12)), Some(last));
        reach.filled(last, None, Sequence(12));
        assert_eq!(reach, sequences([(0, 12)]));
        assert_eq!(reach.gap(Sequence(12)), None);
    }

    const BLOCKS: u64 = 12;

    /// Against a list of how far each block is: nothing is asked for since later than it is, and at
    /// the end all of it is there.
    #[test]
    fn no_block_lacks_a_change_however_often_it_breaks() {
        let mut state = 7_u64;
        let mut below = |end: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % end
        };
        for _ in 0..500 {
            let (mut reach, mut blocks) = (Reach::new(Sequence(1)), [1; BLOCKS as usize]);
            let mut to = 1;
            let mut tries = 0;
            while tries < 5 {
                to += below(3);
                while let Some(gap) = reach.gap(Sequence(to)) {
                    if tries < 4 && below(4) == 0 {
                        break;
                    }
                    let next = gap.from + 1 + below(5);
                    let next = (next < BLOCKS).then_some(next);
                    for block in gap.from..next.unwrap_or(BLOCKS).min(gap.end.unwrap_or(BLOCKS)) {
                        let known = &mut blocks[block as usize];
                        assert!(gap.since.0 <= *known, "{reach:?} {gap:?} {known}");
                        *known = to;
                    }
                    reach.filled(gap, next, Sequence(to));
                }
                tries += 1;
            }
            assert_eq!(blocks, [to; BLOCKS as usize], "{reach:?}");
            assert_eq!(reach, sequences([(0, to)]));
        }
    }
}
