//! The disk part of a read: map look-up, one read per run of blocks, checksums.
//!
//! Never returns a byte whose checksum fails (guarantee **checked**): it names the blocks, and the
//! layer above fetches them from a peer. Payload above the durable watermark comes from memory
//! (hazard F7); every disk read keeps its segment from being reused.

use ballast_block::checksum::crc32;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{BlockRange, BranchId, Payload, Sequence};
use ballast_env::Env;
use futures_util::future::join_all;

use crate::map::{BlockVersion, MapError, Run, RunContent};
use crate::place::Place;
use crate::pool::shared::count;
use crate::replica::core::{Map, ReplicaInner};
use crate::replica::{DamagedBlock, ReadContent, ReadError, ReadPart};

/// What one block's bytes turned out to be, beside the payload.
type BadBlocks = Vec<usize>;

impl<E: Env> ReplicaInner<E> {
    /// Reads `range` of `branch`, newest or at `sequence`.
    pub async fn read(
        &self,
        branch: BranchId,
        at: Option<Sequence>,
        range: BlockRange,
    ) -> Result<Vec<ReadPart>, ReadError> {
        let runs = self.lookup(branch, at, range).await?;
        let parts = join_all(runs.into_iter().map(|run| self.read_run(run))).await;
        let mut answer = Vec::with_capacity(parts.len());
        let mut damaged = Vec::new();
        for part in parts {
            match part {
                Ok(part) => answer.push(part),
                Err(ReadError::Damaged { blocks, .. }) => damaged.extend(blocks),
                Err(other) => return Err(other),
            }
        }
        if damaged.is_empty() {
            return Ok(answer);
        }
        count(&self.shared.counters.damaged_blocks, damaged.len() as u64);
        Err(ReadError::Damaged { replica: self.descriptor.replica, blocks: damaged })
    }

    pub(crate) async fn lookup(
        &self,
        branch: BranchId,
        at: Option<Sequence>,
        range: BlockRange,
    ) -> Result<Vec<Run>, ReadError> {
        self.usable()?;
        let map = self.map();
        lookup_in(&map, branch, at, range).await.map_err(|error| self.map_error(&error))
    }

    /// Whether reads make sense.
    pub(crate) fn usable(&self) -> Result<(), ReadError> {
        self.shared.check()?;
        let id = self.descriptor.replica;
        match (self.dropped.get(), self.map_lost.get()) {
            (true, _) => Err(ReadError::Dropped(id)),
            (_, true) => Err(ReadError::MapLost(id)),
            _ => Ok(()),
        }
    }

    /// Whether what the map shows is of one moment.
    pub(crate) fn whole(&self) -> Result<(), ReadError> {
        match self.is_mixed() {
            true => Err(ReadError::Mixed(self.descriptor.replica)),
            false => Ok(()),
        }
    }

    pub(crate) fn map_error(&self, error: &MapError) -> ReadError {
        self.note_map_damage(error);
        if self.map_lost.get() {
            return ReadError::MapLost(self.descriptor.replica);
        }
        ReadError::Disk { replica: self.descriptor.replica, problem: error.to_string() }
    }

    /// A page that can't be had is nowhere else: what it mapped is not known here any more.
    pub(crate) fn note_map_damage(&self, error: &MapError) {
        let is_damage = matches!(error, MapError::DamagedPage { .. } | MapError::ReadPage { .. });
        if !is_damage || self.dropped.get() || self.shared.check().is_err() {
            return;
        }
        count(&self.shared.counters.damaged_pages, 1);
        if !self.map_lost.replace(true) {
            tracing::error!(replica = %self.descriptor.replica, %error, "extent map is lost");
            self.suspect();
        }
    }

    /// Reads a run. Between the look-up and the pin taken here there is no await.
    async fn read_run(&self, run: Run) -> Result<ReadPart, ReadError> {
        let RunContent::Data { first, versions } = run.what else {
            return Ok(ReadPart { count: run.count, content: ReadContent::Hole });
        };
        let crcs: Vec<u32> = versions.iter().map(|version| version.crc).collect();
        let (payload, bad) = self.read_payload(first, &crcs).await?;
        if bad.is_empty() {
            return Ok(ReadPart { count: run.count, content: ReadContent::Data(payload) });
        }
        let name = |&nth: &usize| {
            let BlockVersion { crc, branch, sequence } = versions[nth];
            DamagedBlock { branch, block: run.start + nth as u64, sequence, crc }
        };
        let blocks: Vec<DamagedBlock> = bad.iter().map(name).collect();
        tracing::error!(replica = %self.descriptor.replica, %first, ?blocks, "blocks are damaged");
        Err(ReadError::Damaged { replica: self.descriptor.replica, blocks })
    }

    /// The blocks at `place`, and which of them fail their checksum.
    pub(crate) async fn read_payload(
        &self,
        place: Place,
        crcs: &[u32],
    ) -> Result<(Payload, BadBlocks), ReadError> {
        let blocks = u32::try_from(crcs.len()).expect("a run's count is 32 bits");
        if let Some(payload) = self.shared.payload_in_memory(place, blocks)
            && bad_blocks(&payload, crcs).is_empty()
        {
            return Ok((payload, Vec::new()));
        }
        let buffer = self.shared.streams.buffers().get(crcs.len() * BLOCK_SIZE);
        match self.shared.streams.read_blocks(place, blocks, buffer).await {
            Ok(buffer) => {
                let payload = buffer.freeze();
                let bad = bad_blocks(&payload, crcs);
                Ok((payload, bad))
            }
            Err(_) if blocks > 1 => self.read_singly(place, crcs).await,
            Err(_) => {
                self.shared.check()?;
                Ok((Payload::new(), vec![0]))
            }
        }
    }

    /// A read of several blocks failed: finds out which of them the disk can't give.
    async fn read_singly(
        &self,
        place: Place,
        crcs: &[u32],
    ) -> Result<(Payload, BadBlocks), ReadError> {
        let mut whole = self.shared.streams.buffers().get(crcs.len() * BLOCK_SIZE);
        let mut bad = Vec::new();
        for (nth, &crc) in crcs.iter().enumerate() {
            let buffer = self.shared.streams.buffers().get(BLOCK_SIZE);
            match self.shared.streams.read_blocks(place.plus(nth as u64), 1, buffer).await {
                Ok(block) if crc32(&block) == crc => {
                    whole[nth * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&block);
                }
                Ok(_) | Err(_) => bad.push(nth),
            }
        }
        self.shared.check()?;
        Ok((whole.freeze(), bad))
    }
}

async fn lookup_in<E: Env>(
    map: &Map<E>,
    branch: BranchId,
    at: Option<Sequence>,
    range: BlockRange,
) -> Result<Vec<Run>, MapError> {
    match map.try_lookup(branch, at, range) {
        Some(runs) => Ok(runs),
        None => map.lookup(branch, at, range).await,
    }
}

/// Which blocks of `payload` fail their checksum.
fn bad_blocks(payload: &[u8], crcs: &[u32]) -> BadBlocks {
    let blocks = payload.chunks_exact(BLOCK_SIZE).map(crc32);
    blocks.zip(crcs).enumerate().filter(|(_, (is, must))| is != *must).map(|(nth, _)| nth).collect()
}
