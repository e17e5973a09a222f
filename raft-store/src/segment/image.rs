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
