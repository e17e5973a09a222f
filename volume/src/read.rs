//! A read on the leader: gate, map, disk, checksum; repair from a peer where a checksum fails.

use ballast_block::command::ReadPart;
use ballast_block::geometry::{BLOCK_SIZE, BLOCK_SIZE_U64};
use ballast_block::limits::TRANSFER_BLOCKS_MAX;
use ballast_block::{BlockRange, ByteRange, Epoch, IoError};
use ballast_env::Env;
use ballast_raft_store::entry::Origin;
use ballast_raft_store::replica::{ReadContent, ReadError, ReadPart as StoredPart};

use crate::family::{ExecuteError, Family, OperationReply};
use crate::stages;
use crate::state::ROOT_BRANCH;

/// Rounds of repair of one read: damage may be found block by block, or strike again.
const REPAIR_ROUNDS_MAX: u32 = 3;

impl<E: Env> Family<E> {
    pub(crate) async fn read(
        &self,
        origin: &Origin,
        range: ByteRange,
    ) -> Result<OperationReply, ExecuteError> {
        self.check_end(end_block(range)).await?;
        let blocks = range.covering_blocks();
        if blocks.count as usize > TRANSFER_BLOCKS_MAX {
            let limit = (TRANSFER_BLOCKS_MAX * BLOCK_SIZE) as u64;
            return Err(IoError::TooLarge { limit }.into());
        }
        let group = &self.inner.group;
        let start = group.env().now();
        group.pass().await?;
        self.check_lease(origin)?;
        let parts = self.read_stored(blocks).await?;
        stages::note(&self.inner.stages.read, start, group.env().now());
        Ok(OperationReply::Data(cut(parts, range, blocks)))
    }

    pub(crate) async fn status(
        &self,
        origin: &Origin,
        range: BlockRange,
    ) -> Result<OperationReply, ExecuteError> {
        self.check_end(Some(range.end())).await?;
        self.inner.group.pass().await?;
        self.check_lease(origin)?;
        let runs = self.inner.group.replica().allocation(ROOT_BRANCH, range).await;
        Ok(OperationReply::Status(runs.map_err(|error| self.unreadable(error))?))
    }

    /// Whether a range ends inside the volume, at `end` in blocks. What is applied here may be older
    /// than the volume's last growth, so only behind the gate is anything outside.
    pub(crate) async fn check_end(&self, end: Option<u64>) -> Result<(), ExecuteError> {
        let is_inside = || {
            let size = self.state().size().div_ceil(BLOCK_SIZE_U64);
            end.is_some_and(|end| end <= size)
        };
        if is_inside() {
            return Ok(());
        }
        self.inner.group.pass().await?;
        if is_inside() { Ok(()) } else { Err(IoError::RangeOutside.into()) }
    }

    /// Reads leave no trace in the log, so their lease is looked at where they are answered. Behind the
    /// gate: before it, the leases applied here may be older than the one that is asked under.
    fn check_lease(&self, origin: &Origin) -> Result<(), ExecuteError> {
        let epoch = origin.epoch;
        if epoch != Epoch(0) && self.state().leases().grant(epoch).is_none() {
            return Err(IoError::Fenced.into());
        }
        Ok(())
    }

    /// One block for a merge. The caller has passed the gate and holds the lock.
    pub(crate) async fn read_block(&self, block: u64, out: &mut [u8]) -> Result<(), ExecuteError> {
        let out = &mut out[..BLOCK_SIZE];
        match &self.read_stored(BlockRange::new(block, 1)).await?[..] {
            [StoredPart { content: ReadContent::Data(bytes), .. }] => out.copy_from_slice(bytes),
            _ => out.fill(0),
        }
        Ok(())
    }

    async fn read_stored(&self, range: BlockRange) -> Result<Vec<StoredPart>, ExecuteError> {
        let replica = self.inner.group.replica();
        for _ in 0..REPAIR_ROUNDS_MAX {
            match replica.read(ROOT_BRANCH, range).await {
                Ok(parts) => return Ok(parts),
                Err(ReadError::Damaged { blocks, .. }) => {
                    for damaged in blocks {
                        self.repair(damaged).await?;
                    }
                }
                Err(error) => return Err(self.unreadable(error)),
            }
        }
        Err(IoError::Damaged.into())
    }

    async fn repair(
        &self,
        damaged: ballast_raft_store::replica::DamagedBlock,
    ) -> Result<(), ExecuteError> {
        let replica = self.inner.group.replica();
        let fetched = self.inner.surroundings.fetch_block(replica.family(), damaged).await;
        let Some(payload) = fetched else {
            tracing::error!(family = %replica.family(), ?damaged, "no replica has this block");
            return Err(IoError::Damaged.into());
        };
        replica.repair(damaged, payload).await.map_err(|error| {
            tracing::error!(family = %replica.family(), ?damaged, %error, "can't repair block");
            ExecuteError::Failed(IoError::Damaged)
        })
    }

    fn unreadable(&self, error: ReadError) -> ExecuteError {
        match error {
            ReadError::Pool(_) | ReadError::Dropped(_) => ExecuteError::Stopped,
            // It is about to hand over to one that can read, or is not elected any more.
            ReadError::MapLost(_) | ReadError::Mixed(_) if self.inner.group.has_other_voters() => {
                ExecuteError::NotLeader { hint: None }
            }
            error => {
                tracing::error!(%error, "read failed");
                ExecuteError::Failed(IoError::Damaged)
            }
        }
    }
}

/// The first block behind a range of bytes; none behind the largest number.
pub(crate) fn end_block(range: ByteRange) -> Option<u64> {
    range.offset.checked_add(range.length).map(|end| end.div_ceil(BLOCK_SIZE_U64))
}

/// Cuts what whole blocks hold to the bytes asked for.
fn cut(parts: Vec<StoredPart>, range: ByteRange, blocks: BlockRange) -> Vec<ReadPart> {
    let mut at = blocks.start * BLOCK_SIZE_U64;
    let mut out = Vec::with_capacity(parts.len());
    for part in parts {
        let end = at + u64::from(part.count) * BLOCK_SIZE_U64;
        let (from, to) = (at.max(range.offset), end.min(range.end()));
        if from < to {
            out.push(match part.content {
                ReadContent::Hole => ReadPart::Hole(to - from),
                ReadContent::Data(bytes) => {
                    let index = |byte: u64| usize::try_from(byte - at).expect("in a transfer");
                    ReadPart::Data(bytes.slice(index(from)..index(to)))
                }
            });
        }
        at = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use ballast_block::AlignedBuf;

    use super::*;

    #[test]
    fn cut_keeps_just_the_bytes_asked_for() {
        let data = AlignedBuf::copy_of(&[7; BLOCK_SIZE]).freeze();
        let parts = vec![
            StoredPart { count: 1, content: ReadContent::Hole },
            StoredPart { count: 1, content: ReadContent::Data(data) },
            StoredPart { count: 2, content: ReadContent::Hole },
        ];
        let range = ByteRange::new(4096 + 4095, 4098 + 4096);
        let lengths = |parts: Vec<ReadPart>| {
            parts
                .iter()
                .map(|part| (matches!(part, ReadPart::Data(_)), part.len()))
                .collect::<Vec<_>>()
        };
        let cut = lengths(cut(parts, range, BlockRange::new(1, 4)));
        assert_eq!(cut, [(false, 1), (true, 4096), (false, 4097)]);
    }
}
