//! Steps 3 and 4 of a write on the leader: admission, merge, checksum, propose.
//!
//! Everything that can refuse a write does so here, before it is proposed; what was proposed is
//! never refused for want of space (guarantee **nothing-lost-when-full**).

use ballast_block::geometry::{BLOCK_SIZE, BLOCK_SIZE_U64};
use ballast_block::limits::TRANSFER_BYTES_MAX;
use ballast_block::{AlignedBuf, BlockRange, ByteRange, IoError, NodeId};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::types::{ApplyReply, Rejection};
use bytes::Bytes;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::SemaphorePermit;

use crate::family::{ExecuteError, Family, OperationReply, Room, RoomAsk};
use crate::read::end_block;
use crate::stages;
use crate::state::ROOT_BRANCH;

/// What a write puts over what is there.
enum Over {
    Data(Bytes),
    Zeroes,
}

impl<E: Env> Family<E> {
    pub(crate) async fn write(
        &self,
        origin: Origin,
        offset: u64,
        data: Bytes,
    ) -> Result<OperationReply, ExecuteError> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.admit(range).await?;
        let start = self.inner.group.env().now();
        let blocks = range.covering_blocks();
        self.take_room(origin, blocks).await?;
        if range.is_block_aligned() && ballast_block::buffer::is_block_aligned(&data) {
            let _lock = self.inner.locks.shared(blocks).await;
            let _inflight = self.inflight(blocks).await?;
            return self.propose_write(start, origin, blocks.start, data, None).await;
        }
        self.merge(origin, range, Over::Data(data)).await
    }

    pub(crate) async fn zero(
        &self,
        origin: Origin,
        range: ByteRange,
    ) -> Result<OperationReply, ExecuteError> {
        self.admit(range).await?;
        self.take_room(origin, range.covering_blocks()).await?;
        self.merge(origin, range, Over::Zeroes).await
    }

    pub(crate) async fn trim(
        &self,
        origin: Origin,
        start: u64,
        count: u64,
    ) -> Result<OperationReply, ExecuteError> {
        self.check_end(start.checked_add(count)).await?;
        // A lock holds at most 2^32 blocks; a longer trim takes the longest range there is.
        let locked = u32::try_from(count).unwrap_or(u32::MAX);
        let _lock = self.inner.locks.shared(BlockRange::new(start, locked)).await;
        let branch = ROOT_BRANCH;
        let command =
            Command { origin: Origin { branch, ..origin }, body: Body::Trim { start, count } };
        let (_, reply) = self.inner.group.propose(command, None).await?;
        outcome(reply)
    }

    async fn admit(&self, range: ByteRange) -> Result<(), ExecuteError> {
        if range.length == 0 || range.length > TRANSFER_BYTES_MAX as u64 {
            return Err(IoError::TooLarge { limit: TRANSFER_BYTES_MAX as u64 }.into());
        }
        self.check_end(end_block(range)).await
    }

    /// Takes room in the pools of all voters; waits for some as long as that is of use.
    async fn take_room(&self, origin: Origin, blocks: BlockRange) -> Result<(), ExecuteError> {
        // A header block each, at most.
        let bytes = (u64::from(blocks.count) + 1) * BLOCK_SIZE_U64;
        let ask = RoomAsk { attachment: origin.attachment, request: origin.request, bytes };
        let voters = self.voters();
        let surroundings = &self.inner.surroundings;
        let mut room = surroundings.take_room(&voters, ask);
        if room == Room::Wait {
            room = surroundings.wait_for_room(voters, ask).await;
        }
        match room {
            Room::Taken => Ok(()),
            Room::Wait => Err(ExecuteError::NoRoomYet),
            Room::Full => Err(IoError::NoSpace.into()),
        }
    }

    fn voters(&self) -> Vec<NodeId> {
        let metrics = self.inner.group.raft().server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().nodes().map(|(_, member)| member.node).collect()
    }

    /// Room among the proposed and not yet applied payloads.
    async fn inflight(&self, blocks: BlockRange) -> Result<SemaphorePermit<'_>, ExecuteError> {
        let permit = self.inner.inflight.acquire_many(blocks.count).await;
        permit.map_err(|_| ExecuteError::Stopped)
    }

    async fn merge(
        &self,
        origin: Origin,
        range: ByteRange,
        over: Over,
    ) -> Result<OperationReply, ExecuteError> {
        let start = self.inner.group.env().now();
        let blocks = range.covering_blocks();
        let _lock = self.inner.locks.exclusive(blocks).await;
        let _inflight = self.inflight(blocks).await?;
        let mut buffer = self.inner.buffers.get(blocks.count as usize * BLOCK_SIZE);
        // The entry must be made in the term in which its edges were read: in another one, other
        // writes may have come between (hazard 24).
        let term = self.read_edges(range, blocks, &mut buffer).await?;
        let at = usize::try_from(range.offset % BLOCK_SIZE_U64).expect("less than a block");
        let length = usize::try_from(range.length).expect("admitted");
        let target = &mut buffer[at..at + length];
        match over {
            Over::Data(data) => target.copy_from_slice(&data),
            Over::Zeroes => target.fill(0),
        }
        self.propose_write(start, origin, blocks.start, buffer.freeze(), Some(term)).await
    }

    async fn read_edges(
        &self,
        range: ByteRange,
        blocks: BlockRange,
        buffer: &mut AlignedBuf,
    ) -> Result<u64, ExecuteError> {
        let term = self.inner.group.pass().await?;
        let last = blocks.count - 1;
        if !range.offset.is_multiple_of(BLOCK_SIZE_U64) || range.length < BLOCK_SIZE_U64 {
            self.read_block(blocks.start, &mut buffer[..BLOCK_SIZE]).await?;
        }
        if last > 0 && !range.end().is_multiple_of(BLOCK_SIZE_U64) {
            let at = last as usize * BLOCK_SIZE;
            self.read_block(blocks.start + u64::from(last), &mut buffer[at..]).await?;
        }
        Ok(term)
    }

    async fn propose_write(
        &self,
        began: Instant,
        origin: Origin,
        start: u64,
        payload: Bytes,
        term: Option<u64>,
    ) -> Result<OperationReply, ExecuteError> {
        let group = &self.inner.group;
        group.replica().map_room().await.map_err(|_gone| ExecuteError::Stopped)?;
        let admitted = group.env().now();
        stages::note(&self.inner.stages.admission, began, admitted);
        let bytes = payload.len();
        let command = Command::write(Origin { branch: ROOT_BRANCH, ..origin }, start, payload);
        let (_, reply) = self.inner.gather.propose(group, command, bytes, term).await?;
        stages::note(&self.inner.stages.commit, admitted, group.env().now());
        outcome(reply)
    }
}

fn outcome(reply: ApplyReply) -> Result<OperationReply, ExecuteError> {
    match reply {
        // A duplicate is a retry of ours whose first copy was applied: it is done.
        ApplyReply::Applied(_) | ApplyReply::Rejected(Rejection::Duplicate) => {
            Ok(OperationReply::Done)
        }
        ApplyReply::Rejected(Rejection::StaleGeneration | Rejection::StaleEpoch) => {
            Err(IoError::Fenced.into())
        }
        ApplyReply::Rejected(Rejection::OutsideVolume) => Err(IoError::RangeOutside.into()),
        ApplyReply::Control(_) => unreachable!("a write is not answered as a control command"),
    }
}
