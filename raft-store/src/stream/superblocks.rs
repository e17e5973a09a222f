//! The two superblocks of a pool that is being opened.
//!
//! Owns which of them counts, and what is refused by them alone. Never makes one anew.

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{AlignedBuf, BLOCK_SIZE};
use ballast_env::disk::File;

use super::open::OpenStoreError;
use super::verdict::Finding;
use crate::format::create::encoded;
use crate::format::geometry::SUPERBLOCK_OFFSETS;
use crate::format::superblock::{
    DecodeSuperblockError, Features, INCOMPAT_KNOWN, INCOMPAT_LINEAGE, Lineage, RO_COMPAT_KNOWN,
    Superblock,
};
use crate::pool::PoolExpectation;

pub(super) type Copies = [Option<Superblock>; 2];

/// Both copies, as far as they can be read; one at least.
pub(super) async fn read_superblocks<F: File>(
    file: &F,
) -> Result<(Copies, Vec<Finding>), OpenStoreError> {
    let mut decoded = Vec::new();
    for offset in SUPERBLOCK_OFFSETS {
        if offset + BLOCK_SIZE_U64 > file.size() {
            return Err(OpenStoreError::NotAPool);
        }
        let (result, block) = file.read_at(offset, AlignedBuf::zeroed(BLOCK_SIZE)).await;
        decoded.push(match result {
            Ok(()) => Superblock::decode(&block),
            Err(_) => Err(DecodeSuperblockError::Damaged),
        });
    }
    let copies: [Result<Superblock, DecodeSuperblockError>; 2] =
        decoded.try_into().expect("two offsets");
    if let Some(newer) = copies.iter().find_map(|copy| match copy {
        Err(newer @ DecodeSuperblockError::NewerVersion(_)) => Some(newer),
        _ => None,
    }) {
        return Err(OpenStoreError::NewerProgram(newer.to_string()));
    }
    match &copies {
        [Ok(first), Ok(second)] if first.pool != second.pool => {
            return Err(OpenStoreError::TwoPools(first.pool, second.pool));
        }
        [
            Err(DecodeSuperblockError::NotASuperblock),
            Err(DecodeSuperblockError::NotASuperblock),
        ] => return Err(OpenStoreError::NotAPool),
        [Err(first), Err(second)] => {
            return Err(OpenStoreError::SuperblocksDamaged { first: *first, second: *second });
        }
        _ => {}
    }
    let damaged = |copy: usize| Finding::SuperblockDamaged { copy };
    let findings = (0..2).filter(|&copy| copies[copy].is_err()).map(damaged).collect();
    Ok((copies.map(Result::ok), findings))
}

/// Whether this program can use the pool at all.
pub(super) fn check_usable(superblock: &Superblock, size: u64) -> Result<(), OpenStoreError> {
    let Features { ro_compat, incompat, .. } = superblock.features;
    let unknown = (incompat & !INCOMPAT_KNOWN, ro_compat & !RO_COMPAT_KNOWN);
    if unknown != (0, 0) {
        let text = format!("features incompat {:#x}, ro-compat {:#x}", unknown.0, unknown.1);
        return Err(OpenStoreError::NewerProgram(text));
    }
    if !superblock.geometry.fits(size) {
        return Err(OpenStoreError::Shrunk { size });
    }
    Ok(())
}

pub(super) fn check_expected(
    superblock: &Superblock,
    expect: &PoolExpectation,
    size: u64,
) -> Result<(), OpenStoreError> {
    check_usable(superblock, size)?;
    if superblock.cluster != expect.cluster {
        let (found, expected) = (superblock.cluster, expect.cluster);
        return Err(OpenStoreError::WrongCluster { found, expected });
    }
    if superblock.node != expect.node {
        let (found, expected) = (superblock.node, expect.node);
        return Err(OpenStoreError::WrongNode { found, expected });
    }
    if let Some(expected) = expect.pool.filter(|&expected| expected != superblock.pool) {
        return Err(OpenStoreError::WrongPool { found: superblock.pool, expected });
    }
    Ok(())
}

/// The superblock that counts.
pub(super) fn newest(copies: &Copies) -> Superblock {
    let one_at_least = "one copy at least was read";
    let newest = copies.iter().flatten().max_by_key(|copy| copy.generation);
    let mut superblock = newest.expect(one_at_least).clone();
    // A counter that never reached both copies may have been used for nothing.
    let boots = copies.iter().flatten().map(|copy| copy.boot_counter);
    superblock.boot_counter = boots.max().expect(one_at_least);
    superblock
}

/// A mark that is neither none nor the last one.
fn fresh_mark(lineage: Lineage, random: u64) -> u64 {
    let candidates = [random, !random, random ^ 1];
    let fresh = candidates.into_iter().find(|&mark| mark != 0 && mark != lineage.settled);
    fresh.expect("of three different numbers at most two are taken")
}

/// Writes both copies, first the one whose loss costs nothing.
pub(super) async fn raise_boot_counter<F: File>(
    file: &F,
    superblock: &mut Superblock,
    copies: &Copies,
    random: u64,
) -> Result<(), OpenStoreError> {
    let age = |copy: usize| copies[copy].as_ref().map_or(0, |copy| copy.generation);
    let first = usize::from(age(1) < age(0));
    superblock.generation += 1;
    superblock.features.incompat |= INCOMPAT_LINEAGE;
    let lineage = &mut superblock.lineage;
    if lineage.offered == lineage.settled {
        // Never the mark of another start. One that is open stays: the cluster may have it.
        lineage.offered = fresh_mark(*lineage, random);
    }
    for copy in [first, 1 - first] {
        file.write_at(SUPERBLOCK_OFFSETS[copy], vec![encoded(superblock)]).await?;
    }
    Ok(())
}
