//! Reading the log: entries as the index has them, and with their payload for peers.

use std::io;

use ballast_block::Payload;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::APPEND_BYTES_MAX;
use ballast_env::Env;
use futures_util::future::join_all;

use crate::entry::{Body, Command, WriteData};
use crate::log::index::Slot;
use crate::pool::shared::count;
use crate::replica::core::ReplicaInner;
use crate::types::{Entry, EntryPayload};

impl<E: Env> ReplicaInner<E> {
    /// The retained ones of `start..end`, without payload.
    pub fn entries(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.alive().map_err(io::Error::other)?;
        Ok(self.log.borrow().range(start, end).map(|slot| slot.entry.clone()).collect())
    }

    /// The first of `start..end`, with payload, as many as one message to a peer may carry. Answers
    /// fewer, or none, where a payload can't be had: the caller tries again, and the layer above
    /// finds the reason in `damaged_entries`.
    pub async fn entries_with_payload(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.alive().map_err(io::Error::other)?;
        let mut slots: Vec<Slot> = Vec::new();
        let mut bytes = 0;
        for slot in self.log.borrow().range(start, end) {
            bytes += slot.blocks as usize * BLOCK_SIZE;
            if slot.damaged || (bytes > APPEND_BYTES_MAX && !slots.is_empty()) {
                break;
            }
            slots.push(slot.clone());
        }
        let payloads = join_all(slots.iter().map(|slot| self.payload_of(slot))).await;
        self.alive().map_err(io::Error::other)?;
        let mut entries = Vec::with_capacity(slots.len());
        for (slot, payload) in slots.into_iter().zip(payloads) {
            let mut entry = slot.entry;
            if let EntryPayload::Normal(Command { body: Body::Write { data, .. }, .. }) =
                &mut entry.payload
            {
                let Some(payload) = payload else { break };
                *data = WriteData::Memory(payload);
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    /// The payload of a write, from memory or disk; `None` when it is damaged, which is noted.
    async fn payload_of(&self, slot: &Slot) -> Option<Payload> {
        let (_, crcs) = slot.write()?;
        // A retained entry's segment is never reused: what the cache has for its place is its own.
        if let Some(payload) = self.shared.payload_in_memory(slot.place, slot.blocks) {
            return Some(payload);
        }
        match self.read_payload(slot.place, &crcs).await {
            Ok((payload, bad)) if bad.is_empty() => Some(payload),
            Ok((_, bad)) => {
                count(&self.shared.counters.damaged_blocks, bad.len() as u64);
                let id = slot.entry.log_id;
                tracing::error!(replica = %self.descriptor.replica, %id, "log entry is damaged");
                let mut log = self.log.borrow_mut();
                if let Some(now) = log.get_mut(id.index).filter(|now| now.entry.log_id == id) {
                    now.damaged = now.place == slot.place;
                }
                None
            }
            Err(_) => None,
        }
    }
}
