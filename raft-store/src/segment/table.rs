//! The table of segments: use, live blocks, retained entries, pins.
//!
//! Owns which segment is free and when a used one becomes free. Never does I/O, never knows whose
//! a block is.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::reserves::Reserves;
use crate::format::segment_header::SegmentUse;
use crate::format::{PoolGeometry, SegmentNumber};
use crate::place::Place;
use crate::stream::{SpaceClass, StreamId};

/// What a segment is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentState {
    /// Nothing.
    Free,
    /// Bespoken as the next segment of a stream.
    Reserved(StreamId),
    /// Being appended to.
    Open(StreamId),
    /// Appended to no more.
    Full(StreamId),
    /// Holds a part of a checkpoint's body.
    Checkpoint,
}

impl SegmentState {
    pub(super) fn used_for(self) -> Option<SegmentUse> {
        match self {
            SegmentState::Free | SegmentState::Reserved(_) => None,
            SegmentState::Open(stream) | SegmentState::Full(stream) => {
                Some(SegmentUse::Stream(stream))
            }
            SegmentState::Checkpoint => Some(SegmentUse::Checkpoint),
        }
    }
}

/// One segment.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) state: SegmentState,
    /// Differs at each use.
    pub(super) generation: u64,
    /// Its number within its stream.
    pub(super) sequence: u64,
    /// A bit per block; empty while nothing ever lived here.
    pub(super) live: Vec<u64>,
    pub(super) live_blocks: u32,
    /// Retained log entries that lie here.
    retained: u32,
    /// Readers and transfers that need it to stay.
    pins: u32,
    /// Nothing durable refers to it any more: freed with its last pin.
    doomed: bool,
}

impl Segment {
    const FREE: Segment = Segment {
        state: SegmentState::Free,
        generation: 0,
        sequence: 0,
        live: Vec::new(),
        live_blocks: 0,
        retained: 0,
        pins: 0,
        doomed: false,
    };

    fn set_live(&mut self, first: u32, count: u32, live: bool, segment_blocks: u32) {
        if self.live.is_empty() {
            if !live {
                return;
            }
            self.live = vec![0; segment_blocks.div_ceil(64) as usize];
        }
        for block in first..first + count {
            let (word, bit) = ((block / 64) as usize, 1u64 << (block % 64));
            if (self.live[word] & bit != 0) != live {
                self.live[word] ^= bit;
                self.live_blocks = if live { self.live_blocks + 1 } else { self.live_blocks - 1 };
            }
        }
    }
}

/// Numbers of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentCounts {
    /// All segments.
    pub total: u32,
    /// Free ones.
    pub free: u32,
    /// Free ones that [`SpaceClass::Normal`] may use.
    pub free_normal: u32,
    /// Live blocks, all segments together.
    pub live_blocks: u64,
}

/// A segment worth cleaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Which.
    pub segment: SegmentNumber,
    /// Its live blocks.
    pub live_blocks: u32,
}

pub(super) struct Inner {
    pub(super) segments: Vec<Segment>,
    free: BTreeSet<SegmentNumber>,
    /// Where to look for the next free segment: reuse comes as late as it can.
    cursor: SegmentNumber,
    generation: u64,
    live_blocks: u64,
    /// Given up since the last freeze, by the checkpoint that is being made.
    superseded: Vec<(Place, u32)>,
    /// Hot segments from this sequence on are replayed by recovery: never freed, never cleaned.
    replayed_from: u64,
    /// Segments that streams opened since the pool was opened.
    opened: u64,
}

/// The segments of an open pool. Lives on one thread; every call is short and does no I/O.
pub struct SegmentTable {
    geometry: PoolGeometry,
    reserves: Reserves,
    pub(super) inner: RefCell<Inner>,
}

/// Keeps a segment from being reused.
pub struct SegmentPin {
    table: Rc<SegmentTable>,
    segment: SegmentNumber,
}

impl Drop for SegmentPin {
    fn drop(&mut self) {
        let mut inner = self.table.inner.borrow_mut();
        let segment = inner.segment(self.segment);
        segment.pins -= 1;
        if segment.pins == 0 && segment.doomed {
            inner.free(self.segment);
        }
    }
}

/// One use of a segment that nothing refers to any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unreferenced {
    number: SegmentNumber,
    generation: u64,
}

/// The table as it was at one moment.
#[derive(Clone, Debug)]
pub struct FrozenTable {
    /// By segment number; `None` = free or only reserved.
    pub(super) segments: Vec<Option<Segment>>,
}

impl Inner {
    fn segment(&mut self, number: SegmentNumber) -> &mut Segment {
        &mut self.segments[number.0 as usize]
    }

    fn free(&mut self, number: SegmentNumber) {
        let segment = self.segment(number);
        assert!(segment.pins == 0 && segment.retained == 0);
        let live = u64::from(segment.live_blocks);
        *segment = Segment::FREE;
        self.live_blocks -= live;
        self.free.insert(number);
    }
}

impl SegmentTable {
    /// All free. Generations count on from `boot_counter`, so that no two uses of a segment ever
    /// have the same.
    pub(crate) fn new(geometry: PoolGeometry, boot_counter: u64) -> Self {
        let inner = Inner {
            segments: vec![Segment::FREE; geometry.segments as usize],
            free: (0..geometry.segments).map(SegmentNumber).collect(),
            cursor: SegmentNumber(0),
            generation: boot_counter << 32,
            live_blocks: 0,
            superseded: Vec::new(),
            replayed_from: 0,
            opened: 0,
        };
        let reserves = Reserves::new(geometry.segments);
        Self { geometry, reserves, inner: RefCell::new(inner) }
    }

    /// The division of the pool.
    pub fn geometry(&self) -> PoolGeometry {
        self.geometry
    }

    fn locate(&self, place: Place) -> (SegmentNumber, u32) {
        self.geometry.locate(place).expect("the caller's places lie in segments")
    }

    fn set_live(&self, place: Place, count: u32, live: bool) {
        let (number, first) = self.locate(place);
        assert!(first + count <= self.geometry.segment_blocks);
        let mut inner = self.inner.borrow_mut();
        let segment = inner.segment(number);
        let before = u64::from(segment.live_blocks);
        segment.set_live(first, count, live, self.geometry.segment_blocks);
        let after = u64::from(segment.live_blocks);
        inner.live_blocks = inner.live_blocks + after - before;
    }

    /// Something refers to these blocks. Appending and replaying payload does it by itself.
    /// Already live blocks stay live.
    pub fn mark_live(&self, place: Place, count: u32) {
        self.set_live(place, count, true);
    }

    /// Nothing refers to these blocks any more. Already dead blocks stay dead.
    pub fn mark_dead(&self, place: Place, count: u32) {
        self.set_live(place, count, false);
    }

    /// As [`SegmentTable::mark_dead`], for blocks that the checkpoint being made has already
    /// replaced: it does not refer to them. What dies otherwise between its freeze and its commit
    /// counts as live in it, because a crash may bring it back.
    pub fn mark_superseded(&self, place: Place, count: u32) {
        self.set_live(place, count, false);
        self.inner.borrow_mut().superseded.push((place, count));
    }

    /// Whether a block is live.
    pub fn is_live(&self, place: Place) -> bool {
        let (number, block) = self.locate(place);
        let inner = self.inner.borrow();
        let live = &inner.segments[number.0 as usize].live;
        live.get((block / 64) as usize).is_some_and(|word| word & (1 << (block % 64)) != 0)
    }

    /// Forgets what lives in all segments of a stream, for an owner that marks it anew.
    pub fn clear_live(&self, stream: StreamId) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        for segment in &mut inner.segments {
            if segment.state.used_for() == Some(SegmentUse::Stream(stream)) {
                inner.live_blocks -= u64::from(segment.live_blocks);
                segment.live_blocks = 0;
                segment.live.fill(0);
            }
        }
    }

    /// A log entry that may still be read by a follower lies at this place (its payload, or its
    /// header block when it has none). Counts.
    pub fn retain(&self, place: Place) {
        let (number, _) = self.locate(place);
        self.inner.borrow_mut().segment(number).retained += 1;
    }

    /// The reverse of one [`SegmentTable::retain`].
    ///
    /// # Panics
    /// When nothing is retained there: a bug of the caller.
    pub fn release(&self, place: Place) {
        let (number, _) = self.locate(place);
        let mut inner = self.inner.borrow_mut();
        let retained = &mut inner.segment(number).retained;
        *retained = retained.checked_sub(1).expect("released what was retained");
    }

    /// Keeps the segment of `place` from being reused until the pin is dropped.
    pub fn pin(self: &Rc<Self>, place: Place) -> SegmentPin {
        let (segment, _) = self.locate(place);
        self.inner.borrow_mut().segment(segment).pins += 1;
        SegmentPin { table: self.clone(), segment }
    }

    /// What a segment is doing.
    pub fn state(&self, segment: SegmentNumber) -> SegmentState {
        self.inner.borrow().segments[segment.0 as usize].state
    }

    /// Numbers, now.
    pub fn counts(&self) -> SegmentCounts {
        let inner = self.inner.borrow();
        let free = inner.free.len() as u32;
        SegmentCounts {
            total: self.geometry.segments,
            free,
            free_normal: free.saturating_sub(self.reserves.kept_from(SpaceClass::Normal)),
            live_blocks: inner.live_blocks,
        }
    }

    /// Segments that streams opened since the pool was opened.
    pub fn opened(&self) -> u64 {
        self.inner.borrow().opened
    }

    /// Free segments that a class may take.
    pub fn free_for(&self, class: SpaceClass) -> u32 {
        let free = self.inner.borrow().free.len() as u32;
        free.saturating_sub(self.reserves.kept_from(class))
    }

    /// Segments that a checkpoint made now would free: nothing in them is live or retained.
    pub fn reclaimable(&self) -> u32 {
        let inner = self.inner.borrow();
        let dead = |segment: &&Segment| {
            matches!(segment.state, SegmentState::Full(_))
                && segment.live_blocks == 0
                && segment.retained == 0
                && segment.pins == 0
        };
        inner.segments.iter().filter(dead).count() as u32
    }

    /// Full segments of map pages, and what lives in them, in blocks.
    pub fn meta(&self) -> (u32, u64) {
        let inner = self.inner.borrow();
        let meta = |segment: &&Segment| segment.state == SegmentState::Full(StreamId::Meta);
        let all = inner.segments.iter().filter(meta);
        all.fold((0, 0), |(count, live), one| (count + 1, live + u64::from(one.live_blocks)))
    }

    /// The emptiest segments of the hot and cold streams that may be cleaned: with something live,
    /// at most so many blocks, without retained entries, before the recovery start of the last
    /// durable checkpoint.
    pub fn victims(&self, most: usize, live_max: u32) -> Vec<Victim> {
        self.victims_of(most, live_max, |segment, replayed_from| match segment.state {
            SegmentState::Full(StreamId::Hot) => segment.sequence < replayed_from,
            SegmentState::Full(StreamId::Cold) => true,
            _ => false,
        })
    }

    /// The emptiest full segments of map pages, with at most so many live blocks each.
    pub fn meta_victims(&self, most: usize, live_max: u32) -> Vec<Victim> {
        let meta = SegmentState::Full(StreamId::Meta);
        self.victims_of(most, live_max, |segment, _| segment.state == meta)
    }

    fn victims_of(
        &self,
        most: usize,
        live_max: u32,
        may: impl Fn(&Segment, u64) -> bool,
    ) -> Vec<Victim> {
        let inner = self.inner.borrow();
        let mut victims: Vec<Victim> = inner
            .segments
            .iter()
            .zip(0..)
            .filter(|(segment, _)| (1..=live_max).contains(&segment.live_blocks))
            .filter(|(segment, _)| segment.retained == 0 && may(segment, inner.replayed_from))
            .map(|(segment, number)| Victim {
                segment: SegmentNumber(number),
                live_blocks: segment.live_blocks,
            })
            .collect();
        victims.sort_by_key(|victim| (victim.live_blocks, victim.segment));
        victims.truncate(most);
        victims
    }

    /// The live blocks of a segment as runs, in order.
    pub fn live_runs(&self, segment: SegmentNumber) -> Vec<(Place, u32)> {
        let inner = self.inner.borrow();
        let live = &inner.segments[segment.0 as usize].live;
        let is_live = |block: u32| live[(block / 64) as usize] & (1 << (block % 64)) != 0;
        let mut runs: Vec<(Place, u32)> = Vec::new();
        let blocks = if live.is_empty() { 0 } else { self.geometry.segment_blocks };
        for block in (0..blocks).filter(|&block| is_live(block)) {
            let place = self.geometry.place(segment, block);
            match runs.last_mut() {
                Some((first, count)) if first.plus(u64::from(*count)) == place => *count += 1,
                _ => runs.push((place, 1)),
            }
        }
        runs
    }

    /// Takes a free segment, or `None` when the class may take no more.
    pub(crate) fn allocate(&self, class: SpaceClass, state: SegmentState) -> Option<SegmentNumber> {
        let mut inner = self.inner.borrow_mut();
        if inner.free.len() as u32 <= self.reserves.kept_from(class) {
            return None;
        }
        let after = inner.free.range(inner.cursor..).next().copied();
        let number = after.or_else(|| inner.free.first().copied())?;
        inner.free.remove(&number);
        inner.cursor = SegmentNumber(number.0 + 1);
        inner.segment(number).state = state;
        Some(number)
    }

    /// Gives back a segment that was allocated and never referred to.
    pub(crate) fn give_back(&self, number: SegmentNumber) {
        self.inner.borrow_mut().free(number);
    }

    /// Whether recovery may take a segment for this use: nothing lives there under another one.
    pub(crate) fn may_claim(&self, number: SegmentNumber, generation: u64) -> bool {
        let inner = self.inner.borrow();
        let segment = &inner.segments[number.0 as usize];
        match segment.state {
            SegmentState::Free => true,
            SegmentState::Full(_) => segment.generation == generation || segment.live_blocks == 0,
            SegmentState::Checkpoint | SegmentState::Reserved(_) | SegmentState::Open(_) => false,
        }
    }

    /// Takes this very segment, which recovery found in use.
    pub(crate) fn claim(
        &self,
        number: SegmentNumber,
        state: SegmentState,
        generation: u64,
        sequence: u64,
    ) {
        let mut inner = self.inner.borrow_mut();
        if inner.segments[number.0 as usize].generation != generation {
            // What a checkpoint says of an earlier use: it was freed since.
            let live = u64::from(inner.segments[number.0 as usize].live_blocks);
            inner.live_blocks -= live;
            *inner.segment(number) = Segment::FREE;
        }
        inner.free.remove(&number);
        let segment = inner.segment(number);
        segment.state = state;
        segment.generation = generation;
        segment.sequence = sequence;
    }

    /// What lives in a segment that was just claimed.
    pub(super) fn set_image(&self, number: SegmentNumber, live: Vec<u64>, live_blocks: u32) {
        let mut inner = self.inner.borrow_mut();
        let segment = inner.segment(number);
        segment.live = live;
        segment.live_blocks = live_blocks;
        inner.live_blocks += u64::from(live_blocks);
    }

    /// Opens an allocated or reserved segment; answers its generation.
    pub(crate) fn open(&self, number: SegmentNumber, stream: StreamId, sequence: u64) -> u64 {
        let mut inner = self.inner.borrow_mut();
        inner.generation += 1;
        inner.opened += 1;
        let generation = inner.generation;
        let segment = inner.segment(number);
        segment.state = SegmentState::Open(stream);
        segment.generation = generation;
        segment.sequence = sequence;
        generation
    }

    /// The stream is through with a segment.
    pub(crate) fn close(&self, number: SegmentNumber, stream: StreamId) {
        let mut inner = self.inner.borrow_mut();
        let segment = inner.segment(number);
        assert_eq!(segment.state, SegmentState::Open(stream));
        segment.state = SegmentState::Full(stream);
    }

    /// A generation for a segment that is no stream's.
    pub(crate) fn next_generation(&self) -> u64 {
        let mut inner = self.inner.borrow_mut();
        inner.generation += 1;
        inner.generation
    }

    /// Recovery starts here from now on.
    pub(crate) fn set_replayed_from(&self, sequence: u64) {
        self.inner.borrow_mut().replayed_from = sequence;
    }

    /// The table as it is now, for a checkpoint that begins.
    pub(crate) fn begin_checkpoint(&self) -> FrozenTable {
        self.inner.borrow_mut().superseded.clear();
        self.freeze()
    }

    /// Takes what a checkpoint that ends has to know beyond its freeze.
    pub(crate) fn renew_meta(&self, frozen: &mut FrozenTable) {
        let superseded = std::mem::take(&mut self.inner.borrow_mut().superseded);
        for (place, count) in superseded {
            let (number, first) = self.locate(place);
            if let Some(segment) = &mut frozen.segments[number.0 as usize] {
                segment.set_live(first, count, false, self.geometry.segment_blocks);
            }
        }
        frozen.unite_meta(self.freeze());
    }

    /// The table as it is now.
    fn freeze(&self) -> FrozenTable {
        let inner = self.inner.borrow();
        let segments = inner.segments.iter();
        let segments = segments
            .map(|segment| segment.state.used_for().is_some().then(|| segment.clone()))
            .collect();
        FrozenTable { segments }
    }

    /// Frees what no durable state refers to any more: what [`FrozenTable::drop_unreferenced`]
    /// left out of the checkpoint that has just become durable. Pinned ones follow with their last
    /// pin. Answers how many segments are free now that were not.
    pub(crate) fn free_all(&self, unreferenced: &[Unreferenced], replayed_from: u64) -> usize {
        let mut inner = self.inner.borrow_mut();
        inner.replayed_from = replayed_from;
        let mut freed = 0;
        for &Unreferenced { number, generation } in unreferenced {
            let segment = inner.segment(number);
            if segment.generation != generation {
                // Freed since with its last pin, and perhaps in use again.
                continue;
            }
            assert!(segment.live_blocks == 0 && segment.retained == 0, "{number} came to life");
            if segment.pins == 0 {
                inner.free(number);
                freed += 1;
            } else {
                segment.doomed = true;
            }
        }
        freed
    }
}

impl FrozenTable {
    /// Takes out the segments that nothing refers to and recovery would not replay, and answers
    /// them: full, without a live block or retained entry, before hot segment `replayed_from`.
    /// They must not be in the checkpoint: after a crash they are as free as they were before it.
    pub(crate) fn drop_unreferenced(&mut self, replayed_from: u64) -> Vec<Unreferenced> {
        let mut dropped = Vec::new();
        for (number, slot) in self.segments.iter_mut().enumerate() {
            let Some(segment) = slot else { continue };
            let is_over = match segment.state {
                SegmentState::Full(StreamId::Hot) => segment.sequence < replayed_from,
                SegmentState::Full(_) => true,
                _ => false,
            };
            if is_over && segment.live_blocks == 0 && segment.retained == 0 {
                let number = SegmentNumber(number as u32);
                dropped.push(Unreferenced { number, generation: segment.generation });
                *slot = None;
            }
        }
        dropped
    }
}
