//! The extent maps' way to the disk, and what they report as free.
//!
//! A page is a record of the meta stream, padded to whole blocks. Shared by all maps of a pool.

use ballast_block::geometry::{BLOCK_SIZE, BLOCK_SIZE_U64};
use ballast_block::{AlignedBuf, ReplicaId};
use ballast_env::Env;
use bytes::Bytes;

use crate::map::{FreedSink, PageAddress, PageIo, PageIoError};
use crate::place::Place;
use crate::stream::{RecordHead, RecordKind, SpaceClass, StreamId, StreamSet};

/// The disk as maps see it.
pub(crate) struct MapIo<E: Env> {
    streams: StreamSet<E>,
}

impl<E: Env> MapIo<E> {
    pub fn new(streams: StreamSet<E>) -> Self {
        Self { streams }
    }
}

/// The blocks of a page.
pub(crate) fn blocks_of(at: PageAddress) -> (Place, u32) {
    (Place::from_offset(at.offset), at.length.div_ceil(BLOCK_SIZE as u32))
}

impl<E: Env> PageIo for MapIo<E> {
    fn append_page(&self, page: Bytes) -> Result<PageAddress, PageIoError> {
        let length = u32::try_from(page.len()).expect("PAGE_BYTES_MAX fits");
        let mut padded: AlignedBuf =
            self.streams.buffers().get(page.len().next_multiple_of(BLOCK_SIZE));
        padded[..page.len()].copy_from_slice(&page);
        padded[page.len()..].fill(0);
        let head = RecordHead { kind: RecordKind::Page, replica: ReplicaId(0), op: 0, body: &[] };
        let payload = Some(padded.freeze());
        let appended =
            self.streams.append(StreamId::Meta, SpaceClass::Checkpoint, head, payload, &[]);
        let appended = appended.map_err(|error| PageIoError(error.to_string()))?;
        Ok(PageAddress { offset: appended.place.offset(), length })
    }

    async fn read_page(&self, at: PageAddress) -> Result<Bytes, PageIoError> {
        if !at.offset.is_multiple_of(BLOCK_SIZE_U64) {
            return Err(PageIoError(format!("page at {at} is not on a block border")));
        }
        let (place, blocks) = blocks_of(at);
        let buffer = self.streams.buffers().get(blocks as usize * BLOCK_SIZE);
        match self.streams.read_blocks(place, blocks, buffer).await {
            Ok(buffer) => Ok(buffer.freeze().slice(..at.length as usize)),
            Err(error) => Err(PageIoError(error.to_string())),
        }
    }
}

impl<E: Env> FreedSink for MapIo<E> {
    fn freed(&self, place: Place, count: u32) {
        self.streams.segments().mark_dead(place, count);
    }

    fn page_freed(&self, at: PageAddress) {
        let (place, blocks) = blocks_of(at);
        self.streams.segments().mark_superseded(place, blocks);
    }
}
