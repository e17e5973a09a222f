//! The table of segments as a checkpoint's body holds it.

use thiserror::Error;

use super::table::{FrozenTable, Segment, SegmentState, SegmentTable};
use crate::format::SegmentNumber;
use crate::format::segment_header::SegmentUse;
use crate::stream::StreamId;

const VERSION: u32 = 1;

/// Bytes that are not a table of segments of this pool.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeTableError {
    /// Written by a newer program.
    #[error("segment table has version {0}, this program reads {VERSION}: upgrade this node")]
    NewerVersion(u32),
    /// Cut short, or a field can't be right.
    #[error("segment table is damaged at byte {0}")]
    Damaged(usize),
}

impl FrozenTable {
    /// Takes the meta stream's segments from `now`: the pages that the checkpoint refers to were
    /// written after the freeze. What was live at the freeze stays live.
    pub(super) fn unite_meta(&mut self, now: FrozenTable) {
        for (then, now) in self.segments.iter_mut().zip(now.segments) {
            let Some(mut now) = now.filter(is_meta) else { continue };
            if let Some(then) = then.as_ref().filter(|then| then.generation == now.generation) {
                if now.live.is_empty() {
                    now.live.clone_from(&then.live);
                }
                now.live.iter_mut().zip(&then.live).for_each(|(word, old)| *word |= old);
                now.live_blocks = now.live.iter().map(|word| word.count_ones()).sum();
            }
            *then = Some(now);
        }
    }

    /// Appends its encoding to `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(VERSION.to_le_bytes());
        let stream_of = |segment: &Segment| match segment.state.used_for() {
            Some(SegmentUse::Stream(stream)) => Some(stream as u8),
            // The superblock lists those of checkpoints.
            Some(SegmentUse::Checkpoint) | None => None,
        };
        let used = self.segments.iter().enumerate().filter_map(|(number, segment)| {
            let segment = segment.as_ref()?;
            Some((number as u32, stream_of(segment)?, segment))
        });
        let used: Vec<_> = used.collect();
        out.extend((used.len() as u32).to_le_bytes());
        for (number, stream, segment) in used {
            out.extend(number.to_le_bytes());
            out.extend(u32::from(stream).to_le_bytes());
            out.extend(segment.generation.to_le_bytes());
            out.extend(segment.sequence.to_le_bytes());
            out.extend(segment.live_blocks.to_le_bytes());
            if segment.live_blocks > 0 {
                segment.live.iter().for_each(|word| out.extend(word.to_le_bytes()));
            }
        }
    }
}

fn is_meta(segment: &Segment) -> bool {
    segment.state.used_for() == Some(SegmentUse::Stream(StreamId::Meta))
}

impl SegmentTable {
    /// Takes over what a checkpoint's table says. Every segment in it counts as full: streams go
    /// on in fresh ones.
    pub(crate) fn load(&self, bytes: &[u8]) -> Result<(), DecodeTableError> {
        let mut input = Input { bytes, at: 0 };
        let version = input.u32()?;
        if version != VERSION {
            return Err(DecodeTableError::NewerVersion(version));
        }
        let words = self.geometry().segment_blocks.div_ceil(64);
        for _ in 0..input.u32()? {
            let number = SegmentNumber(input.u32()?);
            let stream = u8::try_from(input.u32()?).ok().and_then(StreamId::from_number);
            let (generation, sequence) = (input.u64()?, input.u64()?);
            let live_blocks = input.u32()?;
            let damaged = DecodeTableError::Damaged(input.at);
            let stream = stream.ok_or(damaged)?;
            let known = number.0 < self.geometry().segments;
            if !known || self.state(number) != SegmentState::Free {
                return Err(damaged);
            }
            let mut live = Vec::new();
            if live_blocks > 0 {
                live = (0..words).map(|_| input.u64()).collect::<Result<_, _>>()?;
            }
            if live.iter().map(|word| word.count_ones()).sum::<u32>() != live_blocks {
                return Err(damaged);
            }
            self.claim(number, SegmentState::Full(stream), generation, sequence);
            self.set_image(number, live, live_blocks);
        }
        if input.at == bytes.len() { Ok(()) } else { Err(DecodeTableError::Damaged(input.at)) }
    }
}

struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Input<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeTableError> {
        let rest = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk());
        let found = *rest.ok_or(DecodeTableError::Damaged(self.at))?;
        self.at += N;
        Ok(found)
    }

    fn u32(&mut self) -> Result<u32, DecodeTableError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeTableError> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::PoolGeometry;
    use crate::stream::SpaceClass;

    const GEOMETRY: PoolGeometry = PoolGeometry { segment_blocks: 512, segments: 40 };

    /// One full hot segment with two live blocks, an empty cold one that is open.
    fn sample() -> SegmentTable {
        let table = SegmentTable::new(GEOMETRY, 2);
        for (stream, sequence) in [(StreamId::Hot, 7), (StreamId::Cold, 3)] {
            let state = SegmentState::Reserved(stream);
            let segment = table.allocate(SpaceClass::Normal, state).unwrap();
            table.open(segment, stream, sequence);
        }
        table.mark_live(GEOMETRY.place(SegmentNumber(0), 1), 1);
        table.mark_live(GEOMETRY.place(SegmentNumber(0), 65), 1);
        table.close(SegmentNumber(0), StreamId::Hot);
        table
    }

    fn encoded(table: &SegmentTable) -> Vec<u8> {
        let mut bytes = Vec::new();
        table.begin_checkpoint().encode(&mut bytes);
        bytes
    }

    /// Byte by byte: a change here is a change of the format (docs/disk-format.md).
    #[test]
    fn golden_bytes() {
        let mut expected = vec![1, 0, 0, 0, 2, 0, 0, 0];
        // Number, stream, generation, number in the stream, live blocks, bits.
        expected.extend([0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
        expected.extend([7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        expected.extend([2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0; 48]);
        expected.extend([1, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]);
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encoded(&sample()), expected);
    }

    #[test]
    fn what_was_encoded_is_loaded() {
        let table = SegmentTable::new(GEOMETRY, 3);
        table.load(&encoded(&sample())).unwrap();
        assert_eq!(encoded(&table), encoded(&sample()));
        assert_eq!(table.state(SegmentNumber(1)), SegmentState::Full(StreamId::Cold));
        let counts = table.counts();
        assert_eq!((counts.free, counts.live_blocks), (38, 2));
        assert_eq!(table.live_runs(SegmentNumber(0)).len(), 2);
    }

    #[test]
    fn damage_is_an_error_never_a_panic() {
        let good = encoded(&sample());
        for cut in 0..good.len() {
            assert!(SegmentTable::new(GEOMETRY, 3).load(&good[..cut]).is_err());
        }
        for byte in 0..good.len() {
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[byte] ^= 1 << bit;
                // Some flips make another table; none may do harm.
                let _may_be_right = SegmentTable::new(GEOMETRY, 3).load(&bytes);
            }
        }
        let mut newer = good;
        newer[0] = 2;
        let refused = SegmentTable::new(GEOMETRY, 3).load(&newer);
        assert_eq!(refused, Err(DecodeTableError::NewerVersion(2)));
    }

    #[test]
    fn a_page_that_dies_between_freeze_and_commit_counts_as_live_unless_superseded() {
        let table = SegmentTable::new(GEOMETRY, 2);
        let state = SegmentState::Reserved(StreamId::Meta);
        let segment = table.allocate(SpaceClass::Checkpoint, state).unwrap();
        table.open(segment, StreamId::Meta, 1);
        let place = |block| GEOMETRY.place(segment, block);
        table.mark_live(place(1), 4);
        let mut frozen = table.begin_checkpoint();
        table.mark_dead(place(1), 1);
        table.mark_superseded(place(2), 1);
        table.mark_live(place(9), 1);
        table.renew_meta(&mut frozen);
        let mut bytes = Vec::new();
        frozen.encode(&mut bytes);
        let again = SegmentTable::new(GEOMETRY, 3);
        again.load(&bytes).unwrap();
        let live: Vec<u32> = (0..16).filter(|&block| again.is_live(place(block))).collect();
        assert_eq!(live, [1, 3, 4, 9]);
        assert_eq!(table.counts().live_blocks, 3);
    }
}
