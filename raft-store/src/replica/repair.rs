//! Damaged payload: finding a record by name for a peer, and replacing bytes with a peer's.

use ballast_block::checksum::{block_crcs, crc32};
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{BlockRange, Payload};
use ballast_env::Env;
use prost::Message;

use crate::log::index::Slot;
use crate::map::{Move, RunContent};
use crate::place::Place;
use crate::pool::PoolFailure;
use crate::pool::shared::count;
use crate::replica::core::ReplicaInner;
use crate::replica::record::{MovedEntryV1, MovedV1};
use crate::replica::{DamagedBlock, ReadError, RepairError};
use crate::stream::{
    AppendError, Appended, RecordHead, RecordKind, SpaceClass, StreamId, StreamPosition,
};
use crate::types::LogId;

impl<E: Env> ReplicaInner<E> {
    /// Where the bytes of exactly that record lie.
    async fn place_of(&self, wanted: &DamagedBlock) -> Result<Option<Place>, ReadError> {
        let range = BlockRange::new(wanted.block, 1);
        // The newest version, else what was the newest at that time.
        for at in [None, Some(wanted.sequence)] {
            let runs = match self.lookup(wanted.branch, at, range).await {
                Err(_) if at.is_some() => continue,
                outcome => outcome?,
            };
            if let Some(RunContent::Data { first, versions }) =
                runs.into_iter().next().map(|run| run.what)
                && versions.first().is_some_and(|version| {
                    version.branch == wanted.branch && version.sequence == wanted.sequence
                })
            {
                return Ok(Some(first));
            }
        }
        Ok(None)
    }

    /// The bytes of exactly that record.
    pub async fn read_record(&self, wanted: DamagedBlock) -> Result<Option<Payload>, ReadError> {
        let Some(place) = self.place_of(&wanted).await? else { return Ok(None) };
        let (payload, bad) = self.read_payload(place, &[wanted.crc]).await?;
        if bad.is_empty() {
            return Ok(Some(payload));
        }
        Err(ReadError::Damaged { replica: self.descriptor.replica, blocks: vec![wanted] })
    }

    /// Puts `payload` in the place of a damaged block's bytes.
    pub async fn repair(&self, damaged: DamagedBlock, payload: Payload) -> Result<(), RepairError> {
        if payload.len() != BLOCK_SIZE || crc32(&payload) != damaged.crc {
            return Err(RepairError::WrongBytes { block: damaged.block });
        }
        let body = MovedV1::new(damaged.branch, damaged.block, damaged.sequence, &[damaged.crc]);
        let body = body.encode_to_vec();
        let (to, at) =
            self.append_cold(SpaceClass::Cleaner, &body, payload, &[damaged.crc]).await?;
        let durable = self.shared.streams.durable(StreamId::Cold, at).await;
        durable.map_err(PoolFailure::from)?;
        let from = self.place_of(&damaged).await?;
        let segments = self.shared.streams.segments();
        match from.filter(|from| segments.is_live(*from)) {
            Some(from) => {
                let DamagedBlock { block, branch, sequence, .. } = damaged;
                self.map.borrow().relocate(&[Move { block, branch, sequence, from, to }]);
                self.note_damaged_entry(from);
                self.note_delta();
                count(&self.shared.counters.repaired_blocks, 1);
            }
            None => segments.mark_dead(to, 1),
        }
        Ok(())
    }

    /// A retained entry with payload at `place` is to be mended as well: a follower may want it.
    fn note_damaged_entry(&self, place: Place) {
        let mut log = self.log.borrow_mut();
        let holds =
            |slot: &&Slot| slot.place <= place && place < slot.place.plus(slot.blocks.into());
        let index = log.slots().filter(|slot| slot.is_write()).find(holds);
        let index = index.map(|slot| slot.entry.log_id.index);
        if let Some(slot) = index.and_then(|index| log.get_mut(index)) {
            slot.damaged = true;
        }
    }

    /// Gives a damaged retained entry its payload back: it moves to the end of the log.
    pub async fn repair_entry(&self, id: LogId, payload: Payload) -> Result<(), RepairError> {
        let (block, crcs) = {
            let log = self.log.borrow();
            match log.get(id.index).filter(|slot| slot.entry.log_id == id && slot.damaged) {
                Some(slot) => slot.write().expect("only writes are found damaged"),
                None => return Ok(()),
            }
        };
        if payload.len() != crcs.len() * BLOCK_SIZE
            || !block_crcs(&payload).eq(crcs.iter().copied())
        {
            return Err(RepairError::WrongEntry { index: id.index });
        }
        let body = MovedEntryV1 { id: Some(id.into()), block, crcs: crcs.to_vec() };
        let body = body.encode_to_vec();
        let (class, kind) = (SpaceClass::Trim, RecordKind::MovedEntry);
        let appended =
            self.append_or_wait(class, kind, &body, Some(payload.clone()), &crcs).await?;
        self.shared.cache.borrow_mut().put(appended.place, payload);
        self.move_entry(id, appended.place);
        let durable = self.shared.streams.durable(StreamId::Hot, appended.at).await;
        durable.map_err(PoolFailure::from)?;
        count(&self.shared.counters.repaired_blocks, crcs.len() as u64);
        Ok(())
    }

    /// The payload of a retained entry lies at `to` now. Where the map refers to it, it follows.
    pub fn move_entry(&self, id: LogId, to: Place) {
        let segments = self.shared.streams.segments();
        let mut log = self.log.borrow_mut();
        let Some(slot) = log.get_mut(id.index).filter(|slot| slot.entry.log_id == id) else {
            return;
        };
        let from = std::mem::replace(&mut slot.place, to);
        slot.damaged = false;
        let blocks = slot.blocks;
        segments.release(from);
        segments.retain(to);
        let applied = self.applied.borrow().id >= Some(id);
        if !applied {
            segments.mark_dead(from, blocks);
            return;
        }
        // The map goes on with the old place: its damaged blocks are repaired one by one when they
        // are read, and most may be overwritten by then.
        segments.mark_dead(to, blocks);
    }

    /// Queues payload on the cold stream, waiting for space where there is none.
    pub async fn append_cold(
        &self,
        class: SpaceClass,
        body: &[u8],
        payload: Payload,
        crcs: &[u32],
    ) -> Result<(Place, StreamPosition), PoolFailure> {
        loop {
            self.shared.check()?;
            match self.try_append_cold(class, body, payload.clone(), crcs) {
                Ok(appended) => return Ok((appended.place, appended.at)),
                Err(AppendError::PoolFailed(failed)) => return Err(failed.into()),
                Err(AppendError::OutOfSpace { .. }) => self.shared.wait_for_space().await,
            }
        }
    }

    /// As [`Self::append_cold`], without waiting for space: for the keeper, which makes it.
    pub fn try_append_cold(
        &self,
        class: SpaceClass,
        body: &[u8],
        payload: Payload,
        crcs: &[u32],
    ) -> Result<Appended, AppendError> {
        let replica = self.descriptor.replica;
        let head = RecordHead { kind: RecordKind::Moved, replica, op: 0, body };
        self.shared.streams.append(StreamId::Cold, class, head, Some(payload), crcs)
    }
}
