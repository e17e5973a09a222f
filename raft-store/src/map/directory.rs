//! The directory: for each range of 256 blocks its pages, and its unmerged changes.
//!
//! A leaf holds 256 ranges (256 MiB). Its page list is copied on write, so that a frozen map keeps
//! it without copying; on disk a leaf is one page, written when something in it changed.

use std::cell::Cell;
use std::rc::Rc;

use bytes::Bytes;

use super::delta::Delta;
use super::page::{HEADER_BYTES, Page, PageHeader, PageKind};
use super::types::PageAddress;
use super::version::{get, get32, put};

/// Ranges of a leaf.
pub(super) const LEAF_RANGES: usize = 256;

/// A leaf page ends before this many bytes unless a single range needs more.
const LEAF_PAGE_BYTES: usize = 48 << 10;

const RANGE_ENTRY: usize = 14;
const SLOT_ENTRY: usize = 21;

/// One page of a range.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub kind: PageKind,
    /// First and last block that it may have records of.
    pub first: u8,
    pub last: u8,
    /// Not on disk yet; `at` is void and `page` present.
    pub dirty: bool,
    /// Of a head; 0 for a chunk.
    pub branch: u32,
    pub crc: u32,
    pub at: PageAddress,
    /// When it is in memory.
    pub page: Option<Rc<Page>>,
}

impl Slot {
    pub fn fresh(page: Page) -> Self {
        let header = page.header();
        Self {
            kind: header.kind,
            first: header.first,
            last: header.last,
            dirty: true,
            branch: header.branch,
            crc: page.crc(),
            at: PageAddress::default(),
            page: Some(Rc::new(page)),
        }
    }
}

/// The pages of a range: mostly none or one.
#[derive(Clone, Debug, Default)]
pub(super) enum Slots {
    #[default]
    None,
    One(Slot),
    Many(Vec<Slot>),
}

impl Slots {
    #[inline]
    pub fn as_slice(&self) -> &[Slot] {
        match self {
            Slots::None => &[],
            Slots::One(slot) => std::slice::from_ref(slot),
            Slots::Many(slots) => slots,
        }
    }

    pub fn as_mut_slice(&mut self) -> &mut [Slot] {
        match self {
            Slots::None => &mut [],
            Slots::One(slot) => std::slice::from_mut(slot),
            Slots::Many(slots) => slots,
        }
    }

    pub fn from_vec(mut slots: Vec<Slot>) -> Self {
        match slots.len() {
            0 | 1 => slots.pop().map_or(Slots::None, Slots::One),
            _ => Slots::Many(slots),
        }
    }
}

/// What the directory knows of a range.
#[derive(Clone, Debug, Default)]
pub(super) struct Range {
    /// Heads by branch, then chunks, oldest first.
    pub slots: Slots,
    /// Highest sequence in the pages.
    pub newest: u64,
    /// Changes of this and earlier generations are in the pages.
    pub merged: u32,
    /// Looked at since the cache last passed.
    pub used: Cell<bool>,
    /// The cache has it on its round.
    pub ringed: bool,
}

impl Range {
    pub fn slots(&self) -> &[Slot] {
        self.slots.as_slice()
    }

    pub fn has_history(&self) -> bool {
        self.slots().iter().any(|slot| slot.kind == PageKind::Chunk)
    }
}

/// 256 ranges.
pub(super) struct Leaf {
    pub ranges: Rc<Vec<Range>>,
    pub deltas: Vec<Option<Box<Delta>>>,
    /// Where the last checkpoint has its pages, and their checksums.
    pub at: Vec<(PageAddress, u32)>,
    /// Changed since it was last frozen.
    pub dirty: bool,
}

impl Default for Leaf {
    fn default() -> Self {
        Self {
            ranges: Rc::new(vec![Range::default(); LEAF_RANGES]),
            deltas: std::iter::repeat_with(|| None).take(LEAF_RANGES).collect(),
            at: Vec::new(),
            dirty: false,
        }
    }
}

/// All leaves; the number of a leaf is its index.
#[derive(Default)]
pub(super) struct Directory {
    pub leaves: Vec<Option<Box<Leaf>>>,
}

/// Leaf and position within it of range number `range`.
#[inline]
pub(super) fn split(range: u32) -> (usize, usize) {
    (range as usize / LEAF_RANGES, range as usize % LEAF_RANGES)
}

impl Directory {
    #[inline]
    pub fn leaf(&self, range: u32) -> Option<&Leaf> {
        self.leaves.get(split(range).0)?.as_deref()
    }

    #[inline]
    pub fn leaf_mut(&mut self, range: u32) -> &mut Leaf {
        let index = split(range).0;
        if index >= self.leaves.len() {
            self.leaves.resize_with(index + 1, || None);
        }
        self.leaves[index].get_or_insert_default()
    }

    #[inline]
    pub fn range(&self, range: u32) -> Option<&Range> {
        Some(&self.leaf(range)?.ranges[split(range).1])
    }

    /// For a change: a leaf that a frozen map still holds is copied first.
    pub fn range_mut(&mut self, range: u32) -> &mut Range {
        &mut Rc::make_mut(&mut self.leaf_mut(range).ranges)[split(range).1]
    }

    #[inline]
    pub fn delta(&self, range: u32) -> Option<&Delta> {
        self.leaf(range)?.deltas[split(range).1].as_deref()
    }

    /// The first range at or behind `from`, below `end`, that has a page or a change.
    pub fn next_present(&self, from: u32, end: u32) -> Option<u32> {
        let mut at = from;
        while at < end {
            let (index, within) = split(at);
            if index >= self.leaves.len() {
                return None;
            }
            let Some(leaf) = &self.leaves[index] else {
                at = ((index + 1) * LEAF_RANGES) as u32;
                continue;
            };
            if !leaf.ranges[within].slots().is_empty() || leaf.deltas[within].is_some() {
                return Some(at);
            }
            at += 1;
        }
        None
    }
}

/// A leaf as its pages: every range that has pages, or whose changes are merged up to a generation
/// that a run of changes on disk may still be of (`oldest` and later). `address` answers where each
/// slot lies. No page = nothing in it.
pub(super) fn encode_leaf(
    number: u32,
    ranges: &[Range],
    oldest: u32,
    mut address: impl FnMut(&Slot) -> PageAddress,
) -> Vec<Bytes> {
    let (mut pages, mut page) = (Vec::new(), PageHeader::space(0));
    let mut header = PageHeader {
        kind: PageKind::Leaf,
        first: 0,
        last: 0,
        subject: number,
        branch: 0,
        count: 0,
        newest: 0,
    };
    for (i, range) in ranges.iter().enumerate() {
        if range.slots().is_empty() && range.merged < oldest {
            continue;
        }
        let bytes = RANGE_ENTRY + SLOT_ENTRY * range.slots().len();
        if header.count > 0 && page.len() + bytes > LEAF_PAGE_BYTES {
            pages.push(header.seal(std::mem::replace(&mut page, PageHeader::space(bytes))));
            (header.count, header.newest) = (0, 0);
        }
        let within = u8::try_from(i).expect("a leaf has 256 ranges");
        if header.count == 0 {
            header.first = within;
        }
        header.last = within;
        header.count += 1;
        header.newest = header.newest.max(range.newest);
        page.extend_from_slice(&[within, 0]);
        page.extend_from_slice(&put::<2>(range.slots().len() as u64));
        page.extend_from_slice(&range.merged.to_le_bytes());
        page.extend_from_slice(&put::<6>(range.newest));
        for slot in range.slots() {
            let at = address(slot);
            page.extend_from_slice(&[slot.kind as u8, slot.first, slot.last]);
            page.extend_from_slice(&put::<3>(u64::from(slot.branch)));
            page.extend_from_slice(&put::<7>(at.offset));
            page.extend_from_slice(&at.length.to_le_bytes());
            page.extend_from_slice(&slot.crc.to_le_bytes());
        }
    }
    if header.count > 0 {
        pages.push(header.seal(page));
    }
    pages
}

/// The reverse of [`encode_leaf`], page by page.
pub(super) fn decode_leaf(
    number: u32,
    page: &[u8],
    crc: u32,
    ranges: &mut [Range],
) -> Result<(), &'static str> {
    let header = PageHeader::open(page, crc)?;
    if header.kind != PageKind::Leaf || header.subject != number {
        return Err("page of something else");
    }
    let mut rest = &page[HEADER_BYTES..];
    for _ in 0..header.count {
        let (entry, behind) = rest.split_at_checked(RANGE_ENTRY).ok_or("length")?;
        let count = get32::<2>(entry, 2) as usize;
        let (entries, behind) = behind.split_at_checked(count * SLOT_ENTRY).ok_or("length")?;
        let slots = entries.chunks_exact(SLOT_ENTRY).map(decode_slot).collect::<Option<Vec<_>>>();
        ranges[usize::from(entry[0])] = Range {
            slots: Slots::from_vec(slots.ok_or("directory entry")?),
            newest: get::<6>(entry, 8),
            merged: get32::<4>(entry, 4),
            ..Range::default()
        };
        rest = behind;
    }
    if rest.is_empty() { Ok(()) } else { Err("length") }
}

fn decode_slot(entry: &[u8]) -> Option<Slot> {
    let kind = PageKind::from_byte(entry[0])?;
    let at = PageAddress { offset: get::<7>(entry, 6), length: get32::<4>(entry, 13) };
    let branch = get32::<3>(entry, 3);
    if !matches!(kind, PageKind::HeadDense | PageKind::HeadRuns | PageKind::Chunk) {
        return None;
    }
    let (first, last, crc) = (entry[1], entry[2], get32::<4>(entry, 17));
    Some(Slot { kind, first, last, dirty: false, branch, crc, at, page: None })
}
