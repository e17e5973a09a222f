//! The toy's state machine: blocks in memory, made anew from the log at every start.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use ballast_block::BlockRange;
use ballast_block::geometry::BLOCK_SIZE;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf, StoredMembershipOf};
use openraft::{EntryPayload, RaftSnapshotBuilder, StoredMembership};

use crate::toy::{LogId, ToyConfig};

/// What is applied.
#[derive(Default)]
pub(crate) struct Stored {
    pub(crate) blocks: BTreeMap<u64, Bytes>,
    pub(crate) applied: Option<LogId>,
    membership: StoredMembershipOf<ToyConfig>,
}

impl Stored {
    pub(crate) fn read(&self, range: BlockRange) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(range.bytes() as usize);
        for block in range.start..range.end() {
            match self.blocks.get(&block) {
                Some(data) => bytes.extend_from_slice(data),
                None => bytes.resize(bytes.len() + BLOCK_SIZE, 0),
            }
        }
        bytes
    }

    fn write(&mut self, range: BlockRange, data: &Bytes) {
        for (number, block) in (range.start..range.end()).enumerate() {
            if data.is_empty() {
                self.blocks.remove(&block);
            } else {
                let start = number * BLOCK_SIZE;
                self.blocks.insert(block, data.slice(start..start + BLOCK_SIZE));
            }
        }
    }

    pub(crate) fn digest(&self) -> u64 {
        let mut digest = 0_u64;
        for (block, data) in &self.blocks {
            let crc = ballast_block::checksum::crc32(data);
            digest = digest.rotate_left(7) ^ (u64::from(crc) << 32 | block);
            digest = digest.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        digest
    }
}

#[derive(Default)]
pub(crate) struct ToyMachine(Rc<RefCell<Stored>>);

impl ToyMachine {
    pub(crate) fn stored(&self) -> Rc<RefCell<Stored>> {
        self.0.clone()
    }
}

fn no_snapshots() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "the toy keeps its whole log")
}

impl RaftStateMachine<ToyConfig> for ToyMachine {
    type SnapshotData = ();
    type SnapshotBuilder = NoSnapshots;

    async fn applied_state(
        &mut self,
    ) -> io::Result<(Option<LogId>, StoredMembershipOf<ToyConfig>)> {
        let stored = self.0.borrow();
        Ok((stored.applied, stored.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<ToyConfig>>> + Unpin,
    {
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let mut stored = self.0.borrow_mut();
            stored.applied = Some(entry.log_id);
            match entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(command) => stored.write(command.range, &command.data),
                EntryPayload::Membership(membership) => {
                    stored.membership = StoredMembership::new(Some(entry.log_id), membership);
                }
            }
            if let Some(responder) = responder {
                responder.send(());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> NoSnapshots {
        NoSnapshots
    }

    async fn install_snapshot(
        &mut self,
        _meta: &SnapshotMetaOf<ToyConfig>,
        _snapshot: (),
    ) -> io::Result<()> {
        Err(no_snapshots())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf<ToyConfig, ()>>> {
        Ok(None)
    }
}

pub(crate) struct NoSnapshots;

impl RaftSnapshotBuilder<ToyConfig> for NoSnapshots {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<ToyConfig, ()>> {
        Err(no_snapshots())
    }
}
