//! The root of a map: what a checkpoint body has of it (docs/extent-map.md, "Root").

use ballast_block::checksum::crc32;
use bytes::{Buf, BufMut};

use super::branch::Branches;
use super::types::PageAddress;

const MAGIC: u32 = 0x314d_5842;
const VERSION: u16 = 1;
/// Pins that end with the process held history back: it has to be looked through.
const FLAG_UNTIDY: u16 = 1;

/// Where a page lies, and its checksum.
pub(super) type PageRef = (PageAddress, u32);

/// A trim over many ranges that is not merged yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WideTrim {
    pub branch: u32,
    pub sequence: u64,
    pub start: u64,
    pub end: u64,
}

/// The decoded root.
#[derive(Debug)]
pub(super) struct Root {
    pub generation: u32,
    pub untidy: bool,
    pub floor: u64,
    pub branches: Branches,
    pub wide: Vec<WideTrim>,
    /// Unmerged changes: generation and pages, ascending.
    pub runs: Vec<(u32, Vec<PageRef>)>,
    /// Directory leaves: number and pages, ascending.
    pub leaves: Vec<(u32, Vec<PageRef>)>,
}

fn count(of: usize) -> u32 {
    u32::try_from(of).expect("bounded by the volume's size")
}

fn put_pages(out: &mut Vec<u8>, of: &[(u32, Vec<PageRef>)]) {
    for (number, pages) in of {
        out.put_u32_le(*number);
        out.put_u32_le(count(pages.len()));
        for (at, crc) in pages {
            out.put_u64_le(at.offset);
            out.put_u32_le(at.length);
            out.put_u32_le(*crc);
        }
    }
}

impl Root {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.leaves.len() * 24);
        out.put_u32_le(MAGIC);
        out.put_u16_le(VERSION);
        out.put_u16_le(if self.untidy { FLAG_UNTIDY } else { 0 });
        out.put_u32_le(self.generation);
        out.put_u32_le(self.branches.next_id());
        out.put_u64_le(self.floor);
        out.put_u32_le(count(self.branches.iter().count()));
        out.put_u32_le(count(self.branches.snapshots().count()));
        out.put_u32_le(count(self.wide.len()));
        out.put_u32_le(count(self.runs.len()));
        out.put_u32_le(count(self.leaves.len()));
        for (id, branch) in self.branches.iter() {
            out.put_u32_le(id);
            out.put_u32_le(branch.parent);
            out.put_u64_le(branch.fork);
            out.put_u32_le(u32::from(branch.head));
        }
        for (branch, sequence) in self.branches.snapshots() {
            out.put_u32_le(branch);
            out.put_u64_le(sequence);
        }
        for wide in &self.wide {
            out.put_u32_le(wide.branch);
            out.put_u64_le(wide.sequence);
            out.put_u64_le(wide.start);
            out.put_u64_le(wide.end);
        }
        put_pages(&mut out, &self.runs);
        put_pages(&mut out, &self.leaves);
        let crc = crc32(&out);
        out.put_u32_le(crc);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (body, mut crc) =
            bytes.split_at_checked(bytes.len().wrapping_sub(4)).ok_or("length")?;
        if crc32(body) != crc.get_u32_le() {
            return Err("checksum");
        }
        let mut input = Input(body);
        if input.u32()? != MAGIC {
            return Err("not a map root");
        }
        if input.u16()? != VERSION {
            return Err("unknown version");
        }
        let flags = input.u16()?;
        if flags & !FLAG_UNTIDY != 0 {
            return Err("unknown flags");
        }
        let generation = input.u32()?;
        let mut branches = Branches::empty(input.u32()?);
        let floor = input.u64()?;
        let counts = [input.u32()?, input.u32()?, input.u32()?, input.u32()?, input.u32()?];
        for _ in 0..counts[0] {
            let (id, parent, fork) = (input.u32()?, input.u32()?, input.u64()?);
            if !branches.insert(id, parent, fork, input.u32()? != 0) {
                return Err("branch table");
            }
        }
        for _ in 0..counts[1] {
            let (branch, sequence) = (input.u32()?, input.u64()?);
            if !branches.contains(branch) {
                return Err("snapshot of no branch");
            }
            branches.add_snapshot(branch, sequence);
        }
        let mut wide = Vec::new();
        for _ in 0..counts[2] {
            let (branch, sequence) = (input.u32()?, input.u64()?);
            wide.push(WideTrim { branch, sequence, start: input.u64()?, end: input.u64()? });
        }
        let runs = input.pages(counts[3])?;
        let leaves = input.pages(counts[4])?;
        if !input.0.is_empty() {
            return Err("length");
        }
        let untidy = flags & FLAG_UNTIDY != 0;
        Ok(Self { generation, untidy, floor, branches, wide, runs, leaves })
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn u16(&mut self) -> Result<u16, &'static str> {
        self.0.try_get_u16_le().map_err(|_| "length")
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        self.0.try_get_u32_le().map_err(|_| "length")
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        self.0.try_get_u64_le().map_err(|_| "length")
    }

    fn pages(&mut self, count: u32) -> Result<Vec<(u32, Vec<PageRef>)>, &'static str> {
        let mut all = Vec::new();
        for _ in 0..count {
            let (number, count) = (self.u32()?, self.u32()?);
            let mut pages = Vec::new();
            for _ in 0..count {
                let at = PageAddress { offset: self.u64()?, length: self.u32()? };
                pages.push((at, self.u32()?));
            }
            all.push((number, pages));
        }
        Ok(all)
    }
}
