//! Making a pool. Never formats what holds, or held, a pool (guarantee **never-format-data**).

use std::path::Path;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{AlignedBuf, BLOCK_SIZE, PoolId};
use ballast_env::Env;
use ballast_env::disk::{File, OpenMode};
use bytes::Bytes;

use super::PoolGeometry;
use super::SegmentNumber;
use super::geometry::{SUPERBLOCK_OFFSETS, VOTE_SLOTS_OFFSET};
use super::superblock::{
    CheckpointBody, DecodeSuperblockError, Features, Lineage, StreamStart, Superblock,
};
use crate::pool::{FormatOptions, FormatPoolError};

/// Makes a pool; answers its id. Durable when it returns.
///
/// # Errors
/// [`FormatPoolError`].
pub async fn create<E: Env>(
    env: &E,
    path: &Path,
    options: FormatOptions,
) -> Result<PoolId, FormatPoolError> {
    let mode = match options.create {
        Some(size) => {
            geometry_for(size)?;
            OpenMode::CreateNew { size }
        }
        None => OpenMode::Exclusive,
    };
    let file = env.open(path, mode).await?;
    let (geometry, start) = inspect(&file, path, &options).await?;
    let superblock = new_superblock(env, &options, geometry);
    if start.iter().any(|&byte| byte != 0) {
        file.write_at(0, vec![AlignedBuf::zeroed(start.len()).freeze()]).await?;
    }
    // The second copy first: a pool whose format was cut short opens by it, or is blank.
    for offset in [SUPERBLOCK_OFFSETS[1], SUPERBLOCK_OFFSETS[0]] {
        file.write_at(offset, vec![encoded(&superblock)]).await?;
    }
    Ok(superblock.pool)
}

/// Refuses what [`create`] would refuse, but for a file to be created that exists. Writes nothing.
///
/// # Errors
/// [`FormatPoolError`].
pub async fn check<E: Env>(
    env: &E,
    path: &Path,
    options: &FormatOptions,
) -> Result<(), FormatPoolError> {
    match options.create {
        Some(size) => geometry_for(size).map(drop),
        None => {
            let file = env.open(path, OpenMode::Exclusive).await?;
            inspect(&file, path, options).await.map(drop)
        }
    }
}

fn geometry_for(size: u64) -> Result<PoolGeometry, FormatPoolError> {
    let least = PoolGeometry::BYTES_MIN;
    PoolGeometry::for_size(size).ok_or(FormatPoolError::TooSmall { size, least })
}

/// The geometry for a file that may be formatted, and what stands at its start.
async fn inspect<F: File>(
    file: &F,
    path: &Path,
    options: &FormatOptions,
) -> Result<(PoolGeometry, AlignedBuf), FormatPoolError> {
    let geometry = geometry_for(file.size())?;
    let (read, start) = file.read_at(0, AlignedBuf::zeroed(VOTE_SLOTS_OFFSET as usize)).await;
    read?;
    let path = || path.display().to_string();
    if SUPERBLOCK_OFFSETS.iter().any(|&offset| was_superblock(&start[offset as usize..])) {
        return Err(FormatPoolError::HoldsPool { path: path() });
    }
    if !options.overwrite_foreign && start.iter().any(|&byte| byte != 0) {
        return Err(FormatPoolError::HoldsForeignData { path: path() });
    }
    Ok((geometry, start))
}

/// Whether a superblock stands here, or the remains of one.
fn was_superblock(block: &[u8]) -> bool {
    Superblock::decode(&block[..BLOCK_SIZE]) != Err(DecodeSuperblockError::NotASuperblock)
}

fn new_superblock<E: Env>(env: &E, options: &FormatOptions, geometry: PoolGeometry) -> Superblock {
    let start = |segment| StreamStart {
        segment: SegmentNumber(segment),
        block: 1,
        generation: 0,
        segment_sequence: 1,
        sequence: 1,
        next: None,
    };
    Superblock {
        cluster: options.cluster,
        pool: PoolId::from_random(env.random_16()),
        node: options.node,
        geometry,
        features: Features::default(),
        generation: 1,
        boot_counter: 0,
        checkpoint: 0,
        body: CheckpointBody::default(),
        lineage: Lineage::default(),
        // Only the hot stream's first segment is bespoken; the others take any free one.
        starts: [start(0), start(0), start(0)],
    }
}

/// A superblock as a block to be written.
pub(crate) fn encoded(superblock: &Superblock) -> Bytes {
    let mut block = AlignedBuf::zeroed(BLOCK_SIZE_U64 as usize);
    superblock.encode(&mut block);
    block.freeze()
}
