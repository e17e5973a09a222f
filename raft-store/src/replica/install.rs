//! The switch of an install, by its record or by the replay of it, and what follows: the changes move
//! into the replica's map.

use ballast_block::checksum::block_crcs;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{AlignedBuf, BlockRange, Sequence};
use ballast_env::Env;
use prost::Message;

use crate::entry::INLINE_BYTES_MAX;
use crate::map::{MapError, ROOT_BRANCH};
use crate::pool::PoolFailure;
use crate::replica::core::ReplicaInner;
use crate::replica::record::InstallV1;
use crate::replica::resync::ResyncState;
use crate::replica::{InstallState, Restored, ResyncError};
use crate::stream::{RecordKind, SpaceClass, StreamPosition};

/// Blocks that move into the replica's map at once.
const DRAIN_BLOCKS: usize = 4096;

impl<E: Env> ReplicaInner<E> {
    pub async fn append_install(&self, record: &InstallV1) -> Result<StreamPosition, PoolFailure> {
        let (class, kind) = (SpaceClass::Control, RecordKind::Install);
        let encoded = record.encode_to_vec();
        let appended = if encoded.len() <= INLINE_BYTES_MAX {
            self.append_or_wait(class, kind, &encoded, None, &[]).await?
        } else {
            let mut padded = AlignedBuf::zeroed(encoded.len().next_multiple_of(BLOCK_SIZE));
            padded[..encoded.len()].copy_from_slice(&encoded);
            let payload = padded.freeze();
            let crcs: Vec<u32> = block_crcs(&payload).collect();
            let body = (encoded.len() as u64).to_le_bytes();
            let appended = self.append_or_wait(class, kind, &body, Some(payload), &crcs).await?;
            // Nothing refers to it once a checkpoint has the state.
            self.shared.streams.segments().mark_dead(appended.place, crcs.len() as u32);
            appended
        };
        Ok(appended.at)
    }

    /// The switch itself: memory only, no await.
    pub fn switch(&self, state: &InstallState, resync: &ResyncState<E>) {
        resync.installed.set(true);
        self.parted.set(false);
        {
            let mut applied = self.applied.borrow_mut();
            applied.membership = state.membership.clone();
        }
        let held = self.log.borrow().get(state.applied.index).map(|slot| slot.entry.log_id);
        if held != Some(state.applied) {
            // The log goes another way, or does not reach so far: none of it is kept. The payload of
            // what was applied is the map's, which a difference leaves as it is where nothing changed.
            let applied = self.applied.borrow().id;
            if let Some(applied) = applied {
                self.purge_index(applied);
            }
            let purged = self.log.borrow().purged;
            self.truncate_index(purged);
        }
        self.purge_index(state.applied);
        let mut applied = self.applied.borrow_mut();
        applied.id = Some(state.applied);
        applied.sequence = state.sequence;
        self.durable.set(self.durable.get().max(Some(state.applied)));
        let mut log = self.log.borrow_mut();
        log.committed = log.committed.max(Some(state.applied));
        *self.restored.borrow_mut() = Restored {
            applied: applied.id,
            membership: applied.membership.clone(),
            state: state.state.clone(),
            sequence: state.sequence,
        };
        self.state_is_restored.set(true);
    }

    /// Moves the changes of an installed resync into the map, as there is room for them.
    pub async fn drain(&self) -> Result<(), ResyncError> {
        self.drain_into_map(true).await
    }

    /// The same while the pool is opened: nobody merges then, so that waiting for room had no end.
    pub async fn drain_at_open(&self) -> Result<(), ResyncError> {
        self.drain_into_map(false).await
    }

    async fn drain_into_map(&self, in_turn: bool) -> Result<(), ResyncError> {
        let Some(resync) = self.resync.borrow().clone() else { return Ok(()) };
        assert!(resync.installed.get());
        let problem = |error: MapError| ResyncError::Read(self.map_error(&error));
        if resync.from_empty {
            let old = self.map.replace(resync.map.clone());
            *self.resync.borrow_mut() = None;
            self.map_lost.set(false);
            self.mixed_upto.set(Sequence(0));
            self.note_delta();
            self.shared.abandoned.borrow_mut().push(old);
            self.shared.work.notify_one();
            return Ok(());
        }
        // What was put twice is reported as freed, before its record is gone.
        resync.map.merge(0).await.map_err(problem)?;
        let newest = self.applied.borrow().sequence;
        let pin = resync.map.pin(ROOT_BRANCH, newest);
        let mut from = Some(0);
        while let Some(block) = from {
            let page = resync.map.diff(pin, Sequence(0), block, DRAIN_BLOCKS).await;
            let page = page.map_err(problem)?;
            // One without changes waits for nobody's: the cluster group's, behind a map that can't be
            // merged.
            let waits = in_turn && !page.runs.is_empty();
            for run in page.runs {
                let map = self.map.borrow();
                match run.data {
                    None => map.mark_hole(run.branch, run.sequence, run.start, run.count.into()),
                    Some(data) => {
                        let range = BlockRange::new(run.start, run.count);
                        map.write(run.branch, run.sequence, range, data.first, &data.crcs);
                    }
                }
            }
            from = page.next;
            self.note_delta();
            if waits {
                self.map_room().await?;
            }
        }
        resync.map.unpin(pin);
        *self.resync.borrow_mut() = None;
        self.shared.drained.borrow_mut().push(resync.map.clone());
        self.note_delta();
        Ok(())
    }

    /// Forgets the changes of a resync that will not be installed.
    pub fn abandon_resync(&self) {
        let Some(resync) = self.resync.borrow_mut().take() else { return };
        self.note_delta();
        self.shared.abandoned.borrow_mut().push(resync.map.clone());
        self.shared.work.notify_one();
    }
}
