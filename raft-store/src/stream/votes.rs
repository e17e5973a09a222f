//! Vote slots: the second place of every vote.
//!
//! Owns the order of writes to one slot: a later vote never loses to an earlier one, also when the
//! future that asked for the earlier one was dropped.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use ballast_block::limits::{POOL_REPLICAS_MAX, RECOVERY_READ_BYTES};
use ballast_block::{AlignedBuf, BLOCK_SIZE, ReplicaId};
use ballast_env::Env;
use ballast_env::disk::File;
use bytes::Bytes;
use tokio::sync::oneshot;

use super::record::PoolFailed;
use super::set::{Shared, StreamSet};
use crate::format::pool_tag;
use crate::format::vote_slot::{DecodeVoteSlotError, SlotNumber, SlotState, VoteSlot};
use crate::place::Place;

/// Writes of vote slots that wait, by slot. A slot that is here has a task that writes it.
#[derive(Default)]
pub(super) struct VoteWriter {
    waiting: RefCell<BTreeMap<SlotNumber, VecDeque<Waiting>>>,
}

struct Waiting {
    slot: VoteSlot,
    done: oneshot::Sender<Result<(), PoolFailed>>,
}

impl VoteWriter {
    /// Answers whether nobody writes this slot yet.
    fn queue(&self, waiting: Waiting) -> bool {
        let mut all = self.waiting.borrow_mut();
        let slot = waiting.slot.slot;
        let is_idle = !all.contains_key(&slot);
        all.entry(slot).or_default().push_back(waiting);
        is_idle
    }
}

impl<E: Env> StreamSet<E> {
    /// Writes a vote to its slot; durable when it returns. Goes on if the future is dropped.
    ///
    /// # Errors
    /// [`PoolFailed`].
    ///
    /// # Panics
    /// When the body is longer than [`ballast_block::limits::VOTE_SLOT_BODY_BYTES_MAX`], or there
    /// is no such slot.
    pub async fn write_vote_slot(
        &self,
        slot: SlotNumber,
        replica: ReplicaId,
        op: u64,
        body: Bytes,
    ) -> Result<(), PoolFailed> {
        let shared = self.shared();
        shared.check_failed()?;
        let pool_tag = pool_tag(shared.info.pool);
        let (done, answer) = oneshot::channel();
        let waiting = Waiting { slot: VoteSlot { pool_tag, slot, replica, op, body }, done };
        let is_idle = shared.votes.queue(waiting);
        if is_idle {
            shared.env.spawn(write_slot(shared.clone(), slot));
        }
        answer.await.unwrap_or_else(|_| shared.check_failed())
    }

    /// What the first `count` slots hold, in order. Unreadable ones count as damaged.
    pub async fn read_vote_slots(&self, count: usize) -> Vec<SlotState> {
        assert!(count <= POOL_REPLICAS_MAX);
        let shared = self.shared();
        let mut states = Vec::with_capacity(count);
        while states.len() < count {
            let blocks = (count - states.len()).min(RECOVERY_READ_BYTES / BLOCK_SIZE);
            let first = SlotNumber(states.len() as u16);
            let buffer = AlignedBuf::zeroed(blocks * BLOCK_SIZE);
            let (result, buffer) = shared.file.read_at(first.offset(), buffer).await;
            for block in 0..blocks {
                let slot = SlotNumber(first.0 + block as u16);
                let bytes = &buffer[block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE];
                states.push(match result {
                    Ok(()) => state_of(bytes, shared.info.pool, slot),
                    Err(_) => read_alone(shared, slot).await,
                });
            }
        }
        states
    }
}

async fn read_alone<E: Env>(shared: &Shared<E>, slot: SlotNumber) -> SlotState {
    let (result, buffer) = shared.file.read_at(slot.offset(), AlignedBuf::zeroed(BLOCK_SIZE)).await;
    match result {
        Ok(()) => state_of(&buffer, shared.info.pool, slot),
        Err(_) => SlotState::Damaged,
    }
}

fn state_of(block: &[u8], pool: ballast_block::PoolId, slot: SlotNumber) -> SlotState {
    match VoteSlot::decode(block) {
        Ok(vote) if vote.pool_tag != pool_tag(pool) => SlotState::Empty,
        Ok(vote) if vote.slot != slot => SlotState::Damaged,
        Ok(vote) => SlotState::Vote(vote),
        Err(DecodeVoteSlotError::NotASlot) if block.iter().all(|&byte| byte == 0) => {
            SlotState::Empty
        }
        // What another user of the disk left, or a vote whose first bytes rotted: can't be told
        // apart, and a slot that was never written is nobody's.
        Err(_) => SlotState::Damaged,
    }
}

/// Writes what waits for a slot, one after the other.
async fn write_slot<E: Env>(shared: Rc<Shared<E>>, slot: SlotNumber) {
    loop {
        let next = {
            let mut all = shared.votes.waiting.borrow_mut();
            let queue = all.get_mut(&slot).expect("here until this task ends");
            let next = queue.pop_front();
            if next.is_none() {
                all.remove(&slot);
            }
            next
        };
        let Some(Waiting { slot: vote, done }) = next else { return };
        let mut block = shared.buffers.get(BLOCK_SIZE);
        vote.encode(&mut block);
        let place = Place::from_offset(slot.offset());
        let result = shared.write("vote slot", place, vec![block.freeze()]).await;
        // Who asked may have gone.
        let _gone = done.send(result);
    }
}
