//! Unmerged changes of one range: packed records in the order in which they came.
//!
//! Bounded by the caller's back-pressure on [`super::ExtentMap::delta_bytes`]. The records are also
//! what a checkpoint writes of them (docs/extent-map.md, "Changes").

use super::version::{TOMBSTONE, Version, get, get32, put};

/// Records from which on a per-block index is kept: a scan of fewer is as fast.
const INDEX_FROM: u32 = 48;

/// Memory of a delta beside its records, in bytes: the struct and two allocations.
pub(super) const DELTA_OVERHEAD: usize = size_of::<Delta>() + 16;

const HEADER: usize = 13;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum ChangeKind {
    /// Blocks point at payload.
    Write = 1,
    /// Blocks that are mapped become holes.
    Trim = 2,
    /// A payload lies elsewhere now.
    Move = 3,
    /// Blocks become holes, and say so also where nothing was mapped.
    Mark = 4,
}

/// A decoded record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change<'a> {
    pub kind: ChangeKind,
    /// First block within the range.
    pub start: u8,
    /// Last block within the range.
    pub last: u8,
    /// Low byte of the generation whose checkpoint has, or will have, the record.
    pub tag: u8,
    pub branch: u32,
    pub sequence: u64,
    /// Where it starts in the delta.
    pub offset: usize,
    body: &'a [u8],
}

impl Change<'_> {
    /// Place and checksum of `block`, which is in the record.
    #[inline]
    pub fn version(&self, block: u8) -> Version {
        let within = u64::from(block - self.start);
        let (place, crc) = match self.kind {
            ChangeKind::Write => {
                (get::<5>(self.body, 0) + within, get32::<4>(self.body, 5 + within as usize * 4))
            }
            _ => (TOMBSTONE, 0),
        };
        Version { sequence: self.sequence, place, branch: self.branch, crc, block }
    }

    /// One past its last byte in the delta.
    pub fn end(&self) -> usize {
        self.offset + HEADER + self.body.len()
    }

    /// Old and new place of a move.
    pub fn places(&self) -> (u64, u64) {
        (get::<5>(self.body, 0), get::<5>(self.body, 5))
    }
}

/// The unmerged changes of one range.
#[derive(Clone, Debug, Default)]
pub(super) struct Delta {
    bytes: Vec<u8>,
    records: u32,
    /// Bytes that an earlier checkpoint has.
    pub frozen: u32,
    /// Records that no checkpoint has yet.
    pub unfrozen: u32,
    /// Per block: 1 + offset of the record with its highest sequence; moves count as newest.
    index: Option<Index>,
    /// Highest sequence.
    pub newest: u64,
}

impl Delta {
    /// Memory, in bytes.
    pub fn memory(&self) -> usize {
        DELTA_OVERHEAD + self.bytes.capacity() + self.index.as_ref().map_or(0, Index::memory)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn reserve(&mut self, more: usize) {
        let (len, capacity) = (self.bytes.len(), self.bytes.capacity());
        if len + more > capacity {
            // By half, not by doubling: most deltas are merged small, and memory is what bounds us.
            self.bytes.reserve_exact((more).max(capacity / 2));
        }
    }

    fn push_header(
        &mut self,
        kind: ChangeKind,
        blocks: (u8, u8),
        tag: u8,
        branch: u32,
        sequence: u64,
    ) {
        let mut header = [0; HEADER];
        header[0] = kind as u8;
        header[1] = blocks.0;
        header[2] = blocks.1 - blocks.0;
        header[3] = tag;
        header[4..7].copy_from_slice(&branch.to_le_bytes()[..3]);
        header[7..13].copy_from_slice(&put::<6>(sequence));
        self.bytes.extend_from_slice(&header);
    }

    pub fn push_write(
        &mut self,
        start: u8,
        tag: u8,
        branch: u32,
        sequence: u64,
        place: u64,
        crcs: &[u32],
    ) {
        let last = start + (crcs.len() - 1) as u8;
        let offset = self.bytes.len();
        self.reserve(HEADER + 5 + crcs.len() * 4);
        self.push_header(ChangeKind::Write, (start, last), tag, branch, sequence);
        self.bytes.extend_from_slice(&put::<5>(place));
        crcs.iter().for_each(|crc| self.bytes.extend_from_slice(&crc.to_le_bytes()));
        self.pushed(offset, (start, last), sequence, false);
    }

    pub fn push_hole(
        &mut self,
        kind: ChangeKind,
        blocks: (u8, u8),
        tag: u8,
        branch: u32,
        sequence: u64,
    ) {
        let offset = self.bytes.len();
        self.reserve(HEADER);
        self.push_header(kind, blocks, tag, branch, sequence);
        self.pushed(offset, blocks, sequence, false);
    }

    pub fn push_move(
        &mut self,
        block: u8,
        tag: u8,
        branch: u32,
        sequence: u64,
        places: (u64, u64),
    ) {
        let offset = self.bytes.len();
        self.reserve(HEADER + 10);
        self.push_header(ChangeKind::Move, (block, block), tag, branch, sequence);
        self.bytes.extend_from_slice(&put::<5>(places.0));
        self.bytes.extend_from_slice(&put::<5>(places.1));
        self.pushed(offset, (block, block), sequence, true);
    }

    fn pushed(&mut self, offset: usize, blocks: (u8, u8), sequence: u64, moved: bool) {
        self.records += 1;
        self.unfrozen += 1;
        self.newest = self.newest.max(sequence);
        if let Some(mut index) = self.index.take() {
            self.point(&mut index, offset, blocks, sequence, moved);
            self.index = Some(index);
        } else if self.records >= INDEX_FROM {
            let mut index = Index::Small(Box::new([0; 256]));
            for change in self.changes() {
                let moved = change.kind == ChangeKind::Move;
                let blocks = (change.start, change.last);
                self.point(&mut index, change.offset, blocks, change.sequence, moved);
            }
            self.index = Some(index);
        }
    }

    fn point(
        &self,
        index: &mut Index,
        offset: usize,
        blocks: (u8, u8),
        sequence: u64,
        moved: bool,
    ) {
        let offset = u32::try_from(offset + 1).expect("bounded by the delta's limit");
        for block in usize::from(blocks.0)..=usize::from(blocks.1) {
            let newer = |old: u32| {
                let old = self.change(old as usize - 1).0;
                // A move stays in sight: whoever meets it scans, and finds the newest all the same.
                old.kind != ChangeKind::Move && old.sequence <= sequence
            };
            let at = index.get(block);
            if at == 0 || moved || newer(at) {
                index.set(block, offset);
            }
        }
    }

    fn change(&self, offset: usize) -> (Change<'_>, usize) {
        let header = &self.bytes[offset..offset + HEADER];
        let kind = match header[0] {
            1 => ChangeKind::Write,
            2 => ChangeKind::Trim,
            3 => ChangeKind::Move,
            _ => ChangeKind::Mark,
        };
        let end = offset + HEADER + body_length(header[0], header[2]);
        let change = Change {
            kind,
            start: header[1],
            last: header[1] + header[2],
            tag: header[3],
            branch: get32::<3>(header, 4),
            sequence: get::<6>(header, 7),
            offset,
            body: &self.bytes[offset + HEADER..end],
        };
        (change, end)
    }

    /// Every record, oldest first.
    pub fn changes(&self) -> Changes<'_> {
        self.changes_from(0)
    }

    /// Every record from the one that starts at `at`.
    pub fn changes_from(&self, at: usize) -> Changes<'_> {
        Changes { delta: self, at }
    }

    /// Every record that has one of the blocks `first..=last`, oldest first.
    #[inline]
    pub fn for_each_in(&self, first: u8, last: u8, mut each: impl FnMut(&Change<'_>)) {
        let mut at = 0;
        while let Some(&[kind, start, more]) = self.bytes.get(at..).and_then(<[u8]>::first_chunk) {
            if start <= last && first <= start + more {
                each(&self.change(at).0);
            }
            at += HEADER + body_length(kind, more);
        }
    }

    /// The record with the highest sequence for `block`: `Ok(None)` when there is no record for it,
    /// `Err` when only a scan can tell.
    #[inline]
    pub fn newest_of(&self, block: u8) -> Result<Option<Change<'_>>, ()> {
        match self.index.as_ref().ok_or(())?.get(usize::from(block)) {
            0 => Ok(None),
            offset => match self.change(offset as usize - 1).0 {
                change if change.kind == ChangeKind::Move => Err(()),
                change => Ok(Some(change)),
            },
        }
    }

    /// Takes in records that a checkpoint has; they get its `tag`. Answers how many.
    pub fn restore(&mut self, mut records: &[u8], tag: u8) -> Result<u32, &'static str> {
        let before = self.records;
        while !records.is_empty() {
            let length = record_length(records)?;
            let (record, rest) = records.split_at_checked(length).ok_or("change is cut short")?;
            let offset = self.bytes.len();
            self.reserve(length);
            self.bytes.extend_from_slice(record);
            self.bytes[offset + 3] = tag;
            let change = self.change(offset).0;
            let (blocks, sequence) = ((change.start, change.last), change.sequence);
            let moved = change.kind == ChangeKind::Move;
            self.pushed(offset, blocks, sequence, moved);
            records = rest;
        }
        self.freeze();
        Ok(self.records - before)
    }

    /// The next checkpoint has everything that is here now.
    pub fn freeze(&mut self) {
        self.frozen = u32::try_from(self.bytes.len()).expect("bounded by the delta's limit");
        self.unfrozen = 0;
    }

    /// The next checkpoint writes everything that is here again, under `tag`.
    pub fn retag(&mut self, tag: u8) {
        let mut at = 0;
        while at < self.bytes.len() {
            self.bytes[at + 3] = tag;
            at = self.change(at).1;
        }
        self.frozen = 0;
        self.unfrozen = self.records;
    }
}

/// Bytes behind the header of a record of `more + 1` blocks.
#[inline]
fn body_length(kind: u8, more: u8) -> usize {
    match kind {
        1 => 5 + 4 * (usize::from(more) + 1),
        3 => 10,
        _ => 0,
    }
}

/// A number per block: 16 bits as long as they suffice, because most deltas stay small.
#[derive(Clone, Debug)]
enum Index {
    Small(Box<[u16; 256]>),
    Large(Box<[u32; 256]>),
}

impl Index {
    fn memory(&self) -> usize {
        match self {
            Index::Small(_) => 512,
            Index::Large(_) => 1024,
        }
    }

    #[inline]
    fn get(&self, block: usize) -> u32 {
        match self {
            Index::Small(at) => u32::from(at[block]),
            Index::Large(at) => at[block],
        }
    }

    fn set(&mut self, block: usize, offset: u32) {
        match (&mut *self, u16::try_from(offset)) {
            (Index::Small(at), Ok(offset)) => at[block] = offset,
            (Index::Large(at), _) => at[block] = offset,
            (Index::Small(small), Err(_)) => {
                let mut large: Box<[u32; 256]> = Box::new(small.map(u32::from));
                large[block] = offset;
                *self = Index::Large(large);
            }
        }
    }
}

pub(super) struct Changes<'a> {
    delta: &'a Delta,
    at: usize,
}

impl<'a> Iterator for Changes<'a> {
    type Item = Change<'a>;

    #[inline]
    fn next(&mut self) -> Option<Change<'a>> {
        if self.at >= self.delta.bytes.len() {
            return None;
        }
        let (change, end) = self.delta.change(self.at);
        self.at = end;
        Some(change)
    }
}

/// Length of the first of some records that were read from disk.
fn record_length(records: &[u8]) -> Result<usize, &'static str> {
    if records.len() < HEADER {
        return Err("change is cut short");
    }
    let blocks = usize::from(records[2]) + 1;
    if usize::from(records[1]) + blocks > 256 {
        return Err("change leaves its range");
    }
    match records[0] {
        1 => Ok(HEADER + 5 + 4 * blocks),
        2 | 4 => Ok(HEADER),
        3 if blocks == 1 => Ok(HEADER + 10),
        _ => Err("unknown change"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crowd(delta: &mut Delta) {
        (0..INDEX_FROM).for_each(|i| delta.push_write(200, 0, 1, u64::from(i), 1000, &[i]));
    }

    #[test]
    fn index_finds_the_highest_sequence() {
        let mut delta = Delta::default();
        assert!(delta.newest_of(7).is_err(), "no index yet");
        crowd(&mut delta);
        assert!(delta.newest_of(7).unwrap().is_none());
        delta.push_write(6, 0, 1, 90, 2000, &[1, 2, 3]);
        delta.push_write(7, 0, 1, 80, 3000, &[4]);
        let newest = delta.newest_of(7).unwrap().unwrap();
        assert_eq!((newest.sequence, newest.version(7).place), (90, 2001), "not the last to come");
        delta.push_hole(ChangeKind::Trim, (0, 255), 0, 1, 91);
        assert!(delta.newest_of(7).unwrap().unwrap().version(7).is_tombstone());
    }

    #[test]
    fn a_move_makes_look_ups_scan() {
        let mut delta = Delta::default();
        crowd(&mut delta);
        delta.push_write(7, 0, 1, 90, 2000, &[1]);
        delta.push_move(7, 0, 1, 50, (1, 2));
        delta.push_write(7, 0, 1, 70, 3000, &[1]);
        assert!(delta.newest_of(7).is_err(), "neither the move nor what came last is the newest");
    }

    #[test]
    fn index_survives_64_kib() {
        let mut delta = Delta::default();
        let crcs = [5; 256];
        (1..100).for_each(|i| delta.push_write(0, 0, 1, i, 1 << 20, &crcs));
        delta.push_write(9, 0, 1, 500, 7777, &[6]);
        assert!(delta.bytes().len() > 1 << 16);
        let version = |block| delta.newest_of(block).unwrap().unwrap().version(block);
        assert_eq!((version(9).place, version(9).sequence), (7777, 500));
        assert_eq!((version(255).place, version(255).sequence), ((1 << 20) + 255, 99));
    }

    #[test]
    fn records_that_are_cut_or_unknown_are_refused() {
        let mut delta = Delta::default();
        delta.push_write(3, 0, 1, 9, 77, &[1, 2]);
        delta.push_move(3, 0, 1, 9, (77, 78));
        delta.push_hole(ChangeKind::Mark, (0, 255), 0, 1, 10);
        let bytes = delta.bytes().to_vec();
        let restored = |bytes: &[u8]| Delta::default().restore(bytes, 1);
        assert_eq!(restored(&bytes), Ok(3));
        let borders: Vec<usize> = delta.changes().map(|change| change.end()).collect();
        for cut in (1..bytes.len()).filter(|cut| !borders.contains(cut)) {
            assert!(restored(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for (at, byte) in [(0, 0), (0, 5), (1, 255)] {
            let mut wrong = bytes.clone();
            wrong[at] = byte;
            assert!(restored(&wrong).is_err(), "byte {at} = {byte}");
        }
    }
}
