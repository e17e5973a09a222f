//! What lies where in a pool that nobody uses now, and whether it is whole: for administrators and
//! for tests. Reads only; not locked. Never repairs: a node that opens the pool does.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use ballast_block::checksum::crc32;
use ballast_block::geometry::{BLOCK_SIZE, BLOCK_SIZE_U64};
use ballast_block::{AlignedBuf, FamilyId, ReplicaId, Sequence};
use ballast_env::Env;
use ballast_env::disk::{File, OpenMode};
use bytes::Bytes;
use prost::Message;

use crate::entry::{self, Body, WriteData};
use crate::format::geometry::SUPERBLOCK_OFFSETS;
use crate::format::vote_slot::{SlotNumber, VoteSlot};
use crate::map::{ExtentMap, FreedSink, PageAddress, PageCache, PageIo, PageIoError, ROOT_BRANCH};
use crate::place::Place;
use crate::pool::OpenPoolError;
use crate::replica::record::DescriptorV1;
use crate::replica::saved::{PoolV1, ReplicaV1, unpack};
use crate::stream::{Inspected, PayloadState, RecordKind, Replayed, inspect};
use crate::types::{EntryPayload, LogId, term_of};

/// Memory for clean map pages while a map is walked, in bytes.
const CACHE_BYTES: usize = 16 << 20;
/// Blocks of a map that are looked at in one go.
const WALK_BLOCKS: usize = 4096;

/// A kind of thing in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of the two superblocks.
    Superblock,
    /// Second place of a vote.
    VoteSlot,
    /// Header of a batch of the hot stream, since the checkpoint.
    Batch,
    /// Header of a batch with a vote record.
    VoteBatch,
    /// Payload of a log entry that the checkpoint does not cover.
    EntryNotCovered,
    /// Payload of a retained log entry that the checkpoint covers.
    EntryCovered,
    /// Body of the last checkpoint.
    Checkpoint,
    /// Page of an extent map.
    MapPage,
    /// Payload that an extent map refers to.
    Payload,
}

impl Kind {
    /// Its name, for tools.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Superblock => "superblock",
            Kind::VoteSlot => "vote-slot",
            Kind::Batch => "batch-header",
            Kind::VoteBatch => "vote-batch",
            Kind::EntryNotCovered => "entry-not-covered",
            Kind::EntryCovered => "entry-covered",
            Kind::Checkpoint => "checkpoint",
            Kind::MapPage => "map-page",
            Kind::Payload => "payload",
        }
    }
}

/// One thing in a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// What it is.
    pub kind: Kind,
    /// Whose; 0 = the pool's.
    pub replica: ReplicaId,
    /// Its family; that of the cluster group for what is the pool's.
    pub family: FamilyId,
    /// First byte in the pool.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Whether its checksum is right.
    pub whole: bool,
    /// More, for people.
    pub detail: String,
}

/// A pool, looked at.
pub struct Survey {
    /// What opening it would say.
    pub pool: Inspected,
    /// Everything that was found, in no particular order.
    pub places: Vec<Located>,
}

/// Looks at a pool. `payload`: also at each block that a map refers to, which reads all of them.
///
/// # Errors
/// [`OpenPoolError`]: the pool can't be opened either.
pub async fn survey<E: Env>(env: &E, path: &Path, payload: bool) -> Result<Survey, OpenPoolError>
where
    E::File: 'static,
{
    let pool = inspect(env, path).await?;
    let file =
        env.open(path, OpenMode::ReadOnly).await.map_err(crate::stream::OpenStoreError::Io)?;
    let geometry = pool.info.geometry;
    let saved = match &pool.checkpoint_body {
        Some(body) => PoolV1::decode(body.clone())
            .map_err(|error| OpenPoolError::Refused(format!("checkpoint: {error}")))?,
        None => PoolV1::default(),
    };
    let surveyor = Rc::new(Surveyor { file });
    let mut places = surveyor.superblocks().await;
    surveyor.log(&pool.replay, &mut places).await;
    let mut left = pool.checkpoint_bytes;
    for segment in &pool.checkpoint_segments {
        let offset = geometry.place(*segment, 1).offset();
        let bytes = left.min(geometry.segment_bytes() - BLOCK_SIZE_U64);
        left -= bytes;
        places.push(of_pool(Kind::Checkpoint, offset, bytes, true, format!("{segment}")));
    }
    for replica in saved.replicas {
        surveyor.replica(replica, payload, &mut places).await?;
    }
    Ok(Survey { pool, places })
}

fn of_pool(kind: Kind, offset: u64, bytes: u64, whole: bool, detail: String) -> Located {
    let (replica, family) = (ReplicaId(0), FamilyId::CLUSTER);
    Located { kind, replica, family, offset, bytes, whole, detail }
}

struct Surveyor<F: File> {
    file: F,
}

impl<F: File + 'static> Surveyor<F> {
    async fn read(&self, offset: u64, bytes: usize) -> Option<AlignedBuf> {
        let buffer = AlignedBuf::zeroed(bytes.next_multiple_of(BLOCK_SIZE));
        let (result, buffer) = self.file.read_at(offset, buffer).await;
        result.ok().map(|()| buffer)
    }

    async fn superblocks(&self) -> Vec<Located> {
        let mut found = Vec::new();
        for (copy, offset) in SUPERBLOCK_OFFSETS.into_iter().enumerate() {
            let block = self.read(offset, BLOCK_SIZE).await;
            let decoded = block.map(|block| crate::format::superblock::Superblock::decode(&block));
            let (whole, detail) = match decoded {
                Some(Ok(it)) => (true, format!("copy {copy}, generation {}", it.generation)),
                Some(Err(error)) => (false, format!("copy {copy}: {error}")),
                None => (false, format!("copy {copy} can't be read")),
            };
            found.push(of_pool(Kind::Superblock, offset, BLOCK_SIZE_U64, whole, detail));
        }
        found
    }

    /// Whether the blocks have these checksums.
    async fn has(&self, place: Place, crcs: &[u32]) -> bool {
        let Some(bytes) = self.read(place.offset(), crcs.len() * BLOCK_SIZE).await else {
            return false;
        };
        bytes.chunks_exact(BLOCK_SIZE).map(crc32).eq(crcs.iter().copied())
    }

    async fn log(&self, replay: &[Replayed], places: &mut Vec<Located>) {
        for record in replay {
            let kind = match record.kind {
                RecordKind::Vote => Kind::VoteBatch,
                _ => Kind::Batch,
            };
            let at = record.header.offset();
            let detail = format!("{:?} record {}", record.kind, record.op);
            let header = of_pool(kind, at, BLOCK_SIZE_U64, true, detail.clone());
            places.push(Located { replica: record.replica, ..header });
            if let (RecordKind::Entry, Some(payload)) = (record.kind, record.payload) {
                let (offset, bytes) =
                    (payload.place.offset(), u64::from(payload.blocks) * BLOCK_SIZE_U64);
                let whole = match write_of(&record.body) {
                    // Recovery takes for good what a later write proves.
                    Some((_, _, crcs)) => self.has(payload.place, &crcs).await,
                    None => record.payload_state == PayloadState::Good,
                };
                let found = of_pool(Kind::EntryNotCovered, offset, bytes, whole, detail);
                places.push(Located { replica: record.replica, ..found });
            }
        }
    }

    async fn replica(
        self: &Rc<Self>,
        saved: ReplicaV1,
        payload: bool,
        places: &mut Vec<Located>,
    ) -> Result<(), OpenPoolError> {
        let refused = |problem: String| OpenPoolError::Refused(problem);
        let descriptor = saved.descriptor.as_ref().and_then(DescriptorV1::split);
        let (descriptor, SlotNumber(slot)) =
            descriptor.ok_or_else(|| refused("a replica has no descriptor".into()))?;
        let (replica, family) = (descriptor.replica, descriptor.family);
        let found = |kind, offset, bytes, whole, detail| Located {
            kind,
            replica,
            family,
            offset,
            bytes,
            whole,
            detail,
        };
        let offset = SlotNumber(slot).offset();
        let block = self.read(offset, BLOCK_SIZE).await;
        let whole = block.is_some_and(|block| {
            block.iter().all(|&byte| byte == 0) || VoteSlot::decode(&block).is_ok()
        });
        places.push(found(Kind::VoteSlot, offset, BLOCK_SIZE_U64, whole, format!("slot {slot}")));
        for packed in unpack(saved.entries).map_err(|error| refused(error.to_string()))? {
            let Some((id, _, crcs)) = write_of(&packed.header) else { continue };
            let whole = self.has(packed.place, &crcs).await;
            let bytes = crcs.len() as u64 * BLOCK_SIZE_U64;
            let detail = format!("entry {}.{}", term_of(&id), id.index);
            let covered = saved.applied.is_some_and(|applied| LogId::from(applied) >= id);
            let kind = if covered { Kind::EntryCovered } else { Kind::EntryNotCovered };
            places.push(found(kind, packed.place.offset(), bytes, whole, detail));
        }
        if family != FamilyId::CLUSTER {
            // A page begins with its checksum.
            let pages = crate::map::pages_of(&saved.map).map_err(|e| refused(e.to_owned()))?;
            for (at, crc) in pages {
                let bytes = self.read(at.offset, at.length as usize).await;
                let whole = bytes.is_some_and(|bytes| crc32(&bytes[4..at.length as usize]) == crc);
                let detail = "directory or changes".to_owned();
                places.push(found(Kind::MapPage, at.offset, at.length.into(), whole, detail));
            }
            if payload {
                let walked = self.walk(&saved.map).await;
                places.extend(walked.into_iter().map(|(kind, offset, bytes, whole, detail)| {
                    found(kind, offset, bytes, whole, detail)
                }));
            }
        }
        Ok(())
    }

    /// All payload that a map refers to, and the pages that were needed to find it.
    async fn walk(self: &Rc<Self>, root: &[u8]) -> Vec<(Kind, u64, u64, bool, String)> {
        let io = Rc::new(ReadOnly { surveyor: self.clone(), pages: RefCell::default() });
        let mut found = Vec::new();
        let failed =
            |error: &dyn std::fmt::Display| (Kind::MapPage, 0, 0, false, error.to_string());
        let map = match ExtentMap::load(root, io.clone(), &PageCache::new(CACHE_BYTES)).await {
            Ok(map) => map,
            Err(error) => return vec![failed(&error)],
        };
        let pin = map.pin(ROOT_BRANCH, Sequence(u64::MAX >> 1));
        let mut from = Some(0);
        while let Some(block) = from {
            let page = match map.diff(pin, Sequence(0), block, WALK_BLOCKS).await {
                Ok(page) => page,
                Err(error) => {
                    found.push(failed(&error));
                    break;
                }
            };
            for run in page.runs {
                let Some(data) = run.data else { continue };
                let whole = self.has(data.first, &data.crcs).await;
                let bytes = u64::from(run.count) * BLOCK_SIZE_U64;
                let detail = format!("block {}", run.start);
                found.push((Kind::Payload, data.first.offset(), bytes, whole, detail));
            }
            from = page.next;
        }
        let pages = io.pages.borrow().clone();
        let page =
            |at: PageAddress| (Kind::MapPage, at.offset, at.length.into(), true, String::new());
        found.extend(pages.into_iter().map(page));
        found
    }
}

/// Log id, first block and checksums, if it is a write.
fn write_of(header: &Bytes) -> Option<(LogId, u64, Vec<u32>)> {
    if !entry::is_write(header) {
        return None;
    }
    let entry = entry::decode(header, Some(WriteData::Stored)).ok()?;
    match entry.payload {
        EntryPayload::Normal(command) => match command.body {
            Body::Write { range, crcs, .. } => Some((entry.log_id, range.start, crcs.to_vec())),
            _ => None,
        },
        _ => None,
    }
}

struct ReadOnly<F: File> {
    surveyor: Rc<Surveyor<F>>,
    pages: RefCell<Vec<PageAddress>>,
}

impl<F: File + 'static> PageIo for ReadOnly<F> {
    fn append_page(&self, _: Bytes) -> Result<PageAddress, PageIoError> {
        Err(PageIoError("the pool is only looked at".into()))
    }

    async fn read_page(&self, at: PageAddress) -> Result<Bytes, PageIoError> {
        self.pages.borrow_mut().push(at);
        let read = self.surveyor.read(at.offset, at.length as usize).await;
        let bytes = read.ok_or_else(|| PageIoError(format!("page at {at} can't be read")))?;
        Ok(bytes.freeze().slice(..at.length as usize))
    }
}

impl<F: File + 'static> FreedSink for ReadOnly<F> {
    fn freed(&self, _: Place, _: u32) {}

    fn page_freed(&self, _: PageAddress) {}
}
