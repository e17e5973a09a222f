//! What the extent map takes and answers, and what it needs of the layers around it.

use std::fmt;
use std::future::Future;

use ballast_block::{BranchId, Sequence};
use bytes::Bytes;
use thiserror::Error;

use crate::place::Place;

/// The branch that every family starts with.
pub const ROOT_BRANCH: BranchId = BranchId(1);

/// Where a page of the map lies in the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageAddress {
    /// First byte, from the start of the pool; 56 bits on disk, never 0.
    pub offset: u64,
    /// Length in bytes; at most [`PAGE_BYTES_MAX`].
    pub length: u32,
}

impl fmt::Display for PageAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}+{}", self.offset, self.length)
    }
}

/// Largest page, in bytes; pages are written back to back, not padded to blocks. Most are below
/// 16 KiB; only the directory entry of a MiB with millions of versions gets near.
pub const PAGE_BYTES_MAX: usize = 256 << 10;

/// A page could not be read or queued, in the words of the layer below.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct PageIoError(pub String);

/// The disk as the map sees it.
pub trait PageIo {
    /// Queues a page for writing and answers where it will lie. Readable at once, durable when the
    /// layer below says so; the checkpoint waits for that.
    fn append_page(&self, page: Bytes) -> Result<PageAddress, PageIoError>;

    /// Reads exactly the bytes of a page. Checksums are checked by the map.
    fn read_page(&self, at: PageAddress) -> impl Future<Output = Result<Bytes, PageIoError>>;
}

/// Hears of what no version refers to any more. Called with no borrow of the map held.
pub trait FreedSink {
    /// `count` payload blocks from `place` on: no version of this map refers to them. Each place
    /// given to [`super::ExtentMap::write`] or as `to` of a [`Move`] is reported exactly once.
    fn freed(&self, place: Place, count: u32);

    /// The page there is not part of the root that [`super::ExtentMap::write_frozen`] is about to
    /// return. The space may be reused once the checkpoint with that root is durable, not before.
    fn page_freed(&self, at: PageAddress);
}

/// A stretch of a look-up's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block, counted from the start of the volume.
    pub start: u64,
    /// Number of blocks, at least 1.
    pub count: u32,
    /// What they hold.
    pub what: RunContent,
}

/// What a run of blocks holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunContent {
    /// Zeroes.
    Hole,
    /// Payload, back to back.
    Data {
        /// Where the payload of the first block lies.
        first: Place,
        /// The version of each block.
        versions: Vec<BlockVersion>,
    },
}

/// Which version of a block is visible, and its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockVersion {
    /// CRC-32 of the payload block.
    pub crc: u32,
    /// The branch that wrote it.
    pub branch: BranchId,
    /// The write that it came with.
    pub sequence: Sequence,
}

/// The cleaner moved the payload of one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The block.
    pub block: u64,
    /// The version: its branch.
    pub branch: BranchId,
    /// The version: its sequence.
    pub sequence: Sequence,
    /// Where its payload lay.
    pub from: Place,
    /// Where its payload lies now.
    pub to: Place,
}

/// A pinned view; it keeps its versions until it is unpinned. Not kept over a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PinId(pub(crate) u64);

/// Some of a difference, in block order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffPage {
    /// What changed.
    pub runs: Vec<DiffRun>,
    /// The block to ask from next; `None` when this was the last page.
    pub next: Option<u64>,
}

/// Blocks whose visible version is newer than asked for, all made by one write or trim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffRun {
    /// First block.
    pub start: u64,
    /// Number of blocks, at least 1.
    pub count: u32,
    /// The branch that changed them.
    pub branch: BranchId,
    /// The write or trim.
    pub sequence: Sequence,
    /// The payload; `None` = trimmed since.
    pub data: Option<DiffData>,
}

/// Payload of a [`DiffRun`], back to back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffData {
    /// Where that of the first block lies.
    pub first: Place,
    /// One CRC-32 per block.
    pub crcs: Vec<u32>,
}

/// The map can't answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MapError {
    /// A page of the map does not check out: the replica must be resynced.
    #[error("map page of {what} at {at} is damaged ({problem}): resync this replica")]
    DamagedPage {
        /// What the page maps.
        what: PageSubject,
        /// Where it lies.
        at: PageAddress,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A page could not be read.
    #[error("can't read map page of {what} at {at}: {source}")]
    ReadPage {
        /// What the page maps.
        what: PageSubject,
        /// Where it lies.
        at: PageAddress,
        /// Why.
        source: PageIoError,
    },
    /// A page could not be queued for writing.
    #[error("can't write map page: {0}")]
    WritePage(PageIoError),
    /// The root in the checkpoint is not one of a version that this program reads.
    #[error(
        "map root is damaged or newer than this program ({0}): upgrade, or resync this replica"
    )]
    DamagedRoot(&'static str),
    /// Tombstones that such a difference needs are gone: the whole view must be compared.
    #[error("no difference since {since} any more, only since {floor}: compare in full (since 0)")]
    DiffTooOld {
        /// What was asked for.
        since: Sequence,
        /// The oldest that can be answered.
        floor: Sequence,
    },
    /// There is no such pin.
    #[error("view {0:?} is not pinned (any more): pin again")]
    NotPinned(PinId),
}

/// What a page of the map maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSubject {
    /// 256 blocks from this one on.
    Blocks(u64),
    /// Directory of 65,536 blocks from this one on.
    Directory(u64),
    /// Changes that were not merged at a checkpoint.
    Changes,
}

impl fmt::Display for PageSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PageSubject::Blocks(first) => write!(f, "blocks {first}+256"),
            PageSubject::Directory(first) => write!(f, "the directory of blocks {first}+65536"),
            PageSubject::Changes => write!(f, "unmerged changes"),
        }
    }
}
