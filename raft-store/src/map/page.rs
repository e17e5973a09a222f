//! Pages: a branch's newest versions of 256 blocks (dense or run-coded), and history chunks.
//!
//! Formats: docs/extent-map.md. A page stays encoded in memory and is never changed: a merge makes
//! a new one. What is read from disk is checked whole once, here; the accessors trust it then.

use ballast_block::checksum::crc32;
use ballast_block::geometry::BLOCK_SIZE;
use bytes::Bytes;

use super::types::PAGE_BYTES_MAX;
use super::version::{TOMBSTONE, Version, get, get32, put};

pub(super) const HEADER_BYTES: usize = 32;
const FORMAT_VERSION: u8 = 1;
const DENSE_ENTRY: usize = 15;
const DENSE_BYTES: usize = HEADER_BYTES + 256 * DENSE_ENTRY;
const RUN_ENTRY: usize = 14;
const RECORD: usize = 19;

/// Records of a full history chunk: about 16 KiB.
pub(super) const CHUNK_RECORDS_MAX: usize = 840;

/// What a page is; the number on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum PageKind {
    /// Newest versions of one branch, 15 bytes per block.
    HeadDense = 1,
    /// Newest versions of one branch, by runs of one write.
    HeadRuns = 2,
    /// Versions of any branch, sorted.
    Chunk = 3,
    /// Directory of 256 ranges.
    Leaf = 4,
    /// Unmerged changes.
    Changes = 5,
}

impl PageKind {
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::HeadDense, Self::HeadRuns, Self::Chunk, Self::Leaf, Self::Changes]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }

    pub fn is_head(self) -> bool {
        matches!(self, Self::HeadDense | Self::HeadRuns)
    }
}

/// The header of every page of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageHeader {
    pub kind: PageKind,
    /// First and last block with a record; 0 where it has no meaning.
    pub first: u8,
    pub last: u8,
    /// Number of the range, of the leaf, or of the generation.
    pub subject: u32,
    /// 0 where it has no meaning.
    pub branch: u32,
    /// Records, runs or entries.
    pub count: u32,
    /// Highest sequence in it.
    pub newest: u64,
}

impl PageHeader {
    /// Puts the header before `body` and the checksum before all.
    pub fn seal(&self, mut page: Vec<u8>) -> Bytes {
        assert!(page.len() >= HEADER_BYTES && page.len() <= PAGE_BYTES_MAX);
        page[4] = self.kind as u8;
        page[5] = FORMAT_VERSION;
        page[6] = self.first;
        page[7] = self.last;
        page[8..12].copy_from_slice(&self.subject.to_le_bytes());
        page[12..16].copy_from_slice(&self.branch.to_le_bytes());
        page[16..20].copy_from_slice(&self.count.to_le_bytes());
        page[20..24].fill(0);
        page[24..32].copy_from_slice(&self.newest.to_le_bytes());
        let crc = crc32(&page[4..]);
        page[..4].copy_from_slice(&crc.to_le_bytes());
        Bytes::from(page.into_boxed_slice())
    }

    /// Room for a header, then whatever is pushed.
    pub fn space(body: usize) -> Vec<u8> {
        let mut page = Vec::with_capacity(HEADER_BYTES + body);
        page.resize(HEADER_BYTES, 0);
        page
    }

    /// Checks length, checksum and header of what was read.
    pub fn open(page: &[u8], crc: u32) -> Result<Self, &'static str> {
        if page.len() < HEADER_BYTES {
            return Err("too short");
        }
        if crc32(&page[4..]) != get32::<4>(page, 0) {
            return Err("checksum");
        }
        if crc != get32::<4>(page, 0) {
            return Err("not the page that was written here last");
        }
        if page[5] != FORMAT_VERSION {
            return Err("unknown version");
        }
        Ok(Self {
            kind: PageKind::from_byte(page[4]).ok_or("unknown kind")?,
            first: page[6],
            last: page[7],
            subject: get32::<4>(page, 8),
            branch: get32::<4>(page, 12),
            count: get32::<4>(page, 16),
            newest: get::<8>(page, 24),
        })
    }
}

/// A checked page with versions of blocks: a head or a chunk.
#[derive(Debug)]
pub(super) struct Page {
    bytes: Bytes,
    kind: PageKind,
    branch: u32,
    count: usize,
}

impl Page {
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub fn header(&self) -> PageHeader {
        PageHeader {
            kind: self.kind,
            first: self.bytes[6],
            last: self.bytes[7],
            subject: get32::<4>(&self.bytes, 8),
            branch: self.branch,
            count: get32::<4>(&self.bytes, 16),
            newest: get::<8>(&self.bytes, 24),
        }
    }

    pub fn crc(&self) -> u32 {
        get32::<4>(&self.bytes, 0)
    }

    /// Memory that it takes, in bytes.
    pub fn memory(&self) -> usize {
        self.bytes.len() + 96
    }

    /// What it counts for while it is not on disk: whole blocks there, or its memory if that is more.
    pub fn dirty_bytes(&self) -> usize {
        self.memory().max(self.bytes.len().next_multiple_of(BLOCK_SIZE))
    }

    fn trusted(bytes: Bytes) -> Self {
        let kind = PageKind::from_byte(bytes[4]).expect("sealed or opened");
        let (branch, count) = (get32::<4>(&bytes, 12), get32::<4>(&bytes, 16) as usize);
        Self { bytes, kind, branch, count }
    }

    /// Checks what was read for the directory entry (kind, range, branch, crc).
    pub fn open(
        bytes: Bytes,
        kind: PageKind,
        range: u32,
        branch: u32,
        crc: u32,
    ) -> Result<Self, &'static str> {
        let header = PageHeader::open(&bytes, crc)?;
        if (header.kind, header.subject, header.branch) != (kind, range, branch) {
            return Err("page of something else");
        }
        let count = header.count as usize;
        let body = bytes.len() - HEADER_BYTES;
        match kind {
            PageKind::HeadDense if body == 256 * DENSE_ENTRY => {}
            PageKind::HeadRuns => check_runs(&bytes, count)?,
            PageKind::Chunk if body == count * RECORD => check_chunk(&bytes, count)?,
            _ => return Err("length"),
        }
        Ok(Self::trusted(bytes))
    }

    /// The newest versions of `branch`, ascending by block, at most one each; not empty.
    pub fn head(range: u32, branch: u32, tips: &[Version]) -> Self {
        let runs = runs_of(tips);
        let mapped = tips.iter().filter(|tip| !tip.is_tombstone()).count();
        let run_bytes = HEADER_BYTES + runs.len() * RUN_ENTRY + mapped * 4;
        let kind = if run_bytes < DENSE_BYTES { PageKind::HeadRuns } else { PageKind::HeadDense };
        let mut page;
        let count = if kind == PageKind::HeadRuns {
            page = PageHeader::space(run_bytes - HEADER_BYTES);
            put_runs(&mut page, &runs, tips);
            runs.len()
        } else {
            page = vec![0; DENSE_BYTES];
            for tip in tips {
                let at = HEADER_BYTES + usize::from(tip.block) * DENSE_ENTRY;
                page[at..at + 5].copy_from_slice(&put::<5>(tip.place));
                page[at + 5..at + 9].copy_from_slice(&tip.crc.to_le_bytes());
                page[at + 9..at + 15].copy_from_slice(&put::<6>(tip.sequence));
            }
            tips.len()
        };
        Self::trusted(header_of(kind, range, branch, count, tips).seal(page))
    }

    /// Versions ascending by [`Version::key`], 1 to [`CHUNK_RECORDS_MAX`] of them.
    pub fn chunk(range: u32, versions: &[Version]) -> Self {
        assert!(!versions.is_empty() && versions.len() <= CHUNK_RECORDS_MAX);
        let mut page = PageHeader::space(versions.len() * RECORD);
        for version in versions {
            page.push(version.block);
            page.extend_from_slice(&put::<3>(u64::from(version.branch)));
            page.extend_from_slice(&put::<6>(version.sequence));
            page.extend_from_slice(&put::<5>(version.place));
            page.extend_from_slice(&version.crc.to_le_bytes());
        }
        let header = header_of(PageKind::Chunk, range, 0, versions.len(), versions);
        Self::trusted(header.seal(page))
    }

    /// The version of `block` in a head page.
    #[inline]
    pub fn tip(&self, block: u8) -> Option<Version> {
        match self.kind {
            PageKind::HeadDense => self.dense(block),
            PageKind::HeadRuns => {
                let starts_after = |run: usize| self.bytes[HEADER_BYTES + run * RUN_ENTRY] > block;
                let after = partition(self.count, starts_after);
                let run = self.run(after.checked_sub(1)?);
                (block - run.start <= run.last).then(|| self.in_run(&run, block))
            }
            _ => None,
        }
    }

    /// Every version of blocks `first..=last`, in [`Version::key`] order.
    pub fn for_each(&self, first: u8, last: u8, mut each: impl FnMut(Version)) {
        match self.kind {
            PageKind::HeadDense => {
                (first..=last).filter_map(|block| self.dense(block)).for_each(each);
            }
            PageKind::HeadRuns => {
                for run in (0..self.count).map(|run| self.run(run)) {
                    let end = run.start + run.last;
                    for block in run.start.max(first)..=end.min(last) {
                        each(self.in_run(&run, block));
                    }
                }
            }
            PageKind::Chunk => {
                let block = |i: usize| self.bytes[HEADER_BYTES + i * RECORD];
                let from = partition(self.count, |i| block(i) >= first);
                for i in from..self.count {
                    if block(i) > last {
                        break;
                    }
                    each(self.record(i));
                }
            }
            PageKind::Leaf | PageKind::Changes => {}
        }
    }

    #[inline]
    fn dense(&self, block: u8) -> Option<Version> {
        let at = HEADER_BYTES + usize::from(block) * DENSE_ENTRY;
        let entry = &self.bytes[at..at + DENSE_ENTRY];
        let place = get::<5>(entry, 0);
        let (crc, sequence) = (get32::<4>(entry, 5), get::<6>(entry, 9));
        (place != 0).then_some(Version { sequence, place, branch: self.branch, crc, block })
    }

    #[inline]
    fn run(&self, i: usize) -> HeadRun {
        let at = HEADER_BYTES + i * RUN_ENTRY;
        let entry = &self.bytes[at..at + RUN_ENTRY];
        HeadRun {
            start: entry[0],
            last: entry[1],
            crc_index: entry[2],
            sequence: get::<6>(entry, 3),
            place: get::<5>(entry, 9),
        }
    }

    fn in_run(&self, run: &HeadRun, block: u8) -> Version {
        let within = block - run.start;
        let (place, crc) = if run.place == TOMBSTONE {
            (TOMBSTONE, 0)
        } else {
            let index = usize::from(run.crc_index) + usize::from(within);
            let at = HEADER_BYTES + self.count * RUN_ENTRY + index * 4;
            (run.place + u64::from(within), get32::<4>(&self.bytes, at))
        };
        Version { sequence: run.sequence, place, branch: self.branch, crc, block }
    }

    fn record(&self, i: usize) -> Version {
        record(&self.bytes, i)
    }
}

fn record(bytes: &[u8], i: usize) -> Version {
    let at = HEADER_BYTES + i * RECORD;
    let entry = &bytes[at..at + RECORD];
    Version {
        block: entry[0],
        branch: get32::<3>(entry, 1),
        sequence: get::<6>(entry, 4),
        place: get::<5>(entry, 10),
        crc: get32::<4>(entry, 15),
    }
}

fn header_of(kind: PageKind, range: u32, branch: u32, count: usize, of: &[Version]) -> PageHeader {
    PageHeader {
        kind,
        first: of[0].block,
        last: of[of.len() - 1].block,
        subject: range,
        branch,
        count: u32::try_from(count).expect("bounded by the page size"),
        newest: of.iter().map(|version| version.sequence).max().unwrap_or(0),
    }
}

/// Blocks of one write with consecutive numbers and places.
#[derive(Clone, Copy, Debug)]
struct HeadRun {
    start: u8,
    /// Its last block, counted from `start`.
    last: u8,
    /// Number of the checksum of its first block.
    crc_index: u8,
    sequence: u64,
    place: u64,
}

fn runs_of(tips: &[Version]) -> Vec<HeadRun> {
    let mut runs: Vec<HeadRun> = Vec::new();
    let mut mapped = 0u64;
    for tip in tips {
        let next_place = |run: &HeadRun| match run.place {
            TOMBSTONE => TOMBSTONE,
            place => place + u64::from(run.last) + 1,
        };
        match runs.last_mut() {
            Some(run)
                if usize::from(run.start) + usize::from(run.last) + 1 == usize::from(tip.block)
                    && run.sequence == tip.sequence
                    && next_place(run) == tip.place =>
            {
                run.last += 1;
            }
            _ => runs.push(HeadRun {
                start: tip.block,
                last: 0,
                crc_index: if tip.is_tombstone() { 0 } else { mapped as u8 },
                sequence: tip.sequence,
                place: tip.place,
            }),
        }
        mapped += u64::from(!tip.is_tombstone());
    }
    runs
}

fn put_runs(page: &mut Vec<u8>, runs: &[HeadRun], tips: &[Version]) {
    for run in runs {
        page.extend_from_slice(&[run.start, run.last, run.crc_index]);
        page.extend_from_slice(&put::<6>(run.sequence));
        page.extend_from_slice(&put::<5>(run.place));
    }
    for tip in tips.iter().filter(|tip| !tip.is_tombstone()) {
        page.extend_from_slice(&tip.crc.to_le_bytes());
    }
}

fn check_runs(bytes: &[u8], count: usize) -> Result<(), &'static str> {
    if count > 256 || bytes.len() < HEADER_BYTES + count * RUN_ENTRY {
        return Err("length");
    }
    let (mut free_from, mut mapped) = (0, 0);
    for entry in bytes[HEADER_BYTES..][..count * RUN_ENTRY].chunks_exact(RUN_ENTRY) {
        let (start, blocks) = (usize::from(entry[0]), usize::from(entry[1]) + 1);
        if start < free_from || start + blocks > 256 {
            return Err("runs overlap");
        }
        free_from = start + blocks;
        if get::<5>(entry, 9) != TOMBSTONE {
            if usize::from(entry[2]) != mapped {
                return Err("checksum index");
            }
            mapped += blocks;
        }
    }
    match bytes.len() == HEADER_BYTES + count * RUN_ENTRY + mapped * 4 {
        true => Ok(()),
        false => Err("length"),
    }
}

fn check_chunk(bytes: &[u8], count: usize) -> Result<(), &'static str> {
    let sorted = (1..count).all(|i| record(bytes, i - 1).key() < record(bytes, i).key());
    if sorted { Ok(()) } else { Err("records out of order") }
}

/// The first of `0..count` for which `after` holds; it holds for all behind.
#[inline]
fn partition(count: usize, after: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = (low + high) / 2;
        if after(middle) { high = middle } else { low = middle + 1 }
    }
    low
}
