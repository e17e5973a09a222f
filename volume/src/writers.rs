//! Who may write a family now: its attachments, and which of their requests were applied.
//!
//! Pure, part of the replicated state. Guarantees **fenced** and **linearizable**: an attachment that
//! is not in here writes nothing, and a retry of ours is applied once.

use std::collections::{BTreeMap, BTreeSet};

use ballast_block::{AttachmentId, Epoch, Generation, NodeId};
use ballast_raft_store::entry::Origin;
use ballast_raft_store::types::Rejection;
use prost::Message;

use crate::command::Writer;
use crate::leases::LeaseTable;

/// The attachments that may write: one, or one for each lease that shares the volume.
#[derive(Default)]
pub(crate) struct Writers(BTreeMap<AttachmentId, WriterState>);

struct WriterState {
    generation: Generation,
    node: NodeId,
    /// The lease that it was made under; 0 = none.
    epoch: Epoch,
    /// Requests below were answered to the host: a retry of one can't be.
    answered_below: u64,
    /// Requests at or above `answered_below` that were applied. Bounded by what the serving node
    /// keeps in flight.
    applied: BTreeSet<u64>,
}

/// As it is kept in the family's state.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct WriterV1 {
    #[prost(uint64, tag = "1")]
    attachment: u64,
    #[prost(uint32, tag = "2")]
    node: u32,
    #[prost(uint64, tag = "3")]
    answered_below: u64,
    #[prost(uint64, repeated, tag = "4")]
    applied: Vec<u64>,
    #[prost(uint64, tag = "5")]
    generation: u64,
    #[prost(uint64, tag = "6")]
    epoch: u64,
}

impl Writers {
    /// Each of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = Writer> {
        self.0.iter().map(|(&attachment, state)| state.named(attachment))
    }

    /// The newest.
    pub(crate) fn newest(&self) -> Option<Writer> {
        self.all().max_by_key(|writer| writer.generation)
    }

    pub(crate) fn get(&self, attachment: AttachmentId) -> Option<Writer> {
        self.0.get(&attachment).map(|state| state.named(attachment))
    }

    /// Takes a writer in, in place of the one under the same lease, and of all others unless the
    /// lease is shared.
    pub(crate) fn admit(&mut self, new: Writer, shared: bool) {
        self.0.retain(|_, writer| shared && writer.epoch != new.epoch);
        let state = WriterState {
            generation: new.generation,
            node: new.node,
            epoch: new.epoch,
            answered_below: 0,
            applied: BTreeSet::new(),
        };
        self.0.insert(new.attachment, state);
    }

    /// Ends those whose lease is no longer in force.
    pub(crate) fn keep_leased(&mut self, leases: &LeaseTable) {
        self.0.retain(|_, writer| leases.lets_write(writer.epoch));
    }

    pub(crate) fn remove(&mut self, attachment: AttachmentId, generation: Generation) {
        if self.get(attachment).is_some_and(|writer| writer.generation == generation) {
            self.0.remove(&attachment);
        }
    }

    /// Whether a request may be applied. Once [`Writers::note`] has it, it is a duplicate.
    pub(crate) fn check(&self, origin: &Origin, leases: &LeaseTable) -> Result<(), Rejection> {
        let Some(writer) = self.0.get(&origin.attachment) else {
            let lease_ended = origin.epoch != Epoch(0) && leases.grant(origin.epoch).is_none();
            let stale =
                if lease_ended { Rejection::StaleEpoch } else { Rejection::StaleGeneration };
            return Err(stale);
        };
        if writer.generation != origin.generation {
            return Err(Rejection::StaleGeneration);
        }
        if writer.epoch != origin.epoch {
            return Err(Rejection::StaleEpoch);
        }
        if origin.request < writer.answered_below || writer.applied.contains(&origin.request) {
            return Err(Rejection::Duplicate);
        }
        Ok(())
    }

    /// A request that was checked is applied.
    pub(crate) fn note(&mut self, origin: &Origin) {
        let writer = self.0.get_mut(&origin.attachment).expect("checked");
        if origin.answered_below > writer.answered_below {
            writer.answered_below = origin.answered_below;
            writer.applied = writer.applied.split_off(&origin.answered_below);
        }
        writer.applied.insert(origin.request);
    }

    pub(crate) fn to_state(&self) -> Vec<WriterV1> {
        let state = |(attachment, writer): (&AttachmentId, &WriterState)| WriterV1 {
            attachment: attachment.0,
            node: writer.node.0,
            answered_below: writer.answered_below,
            applied: writer.applied.iter().copied().collect(),
            generation: writer.generation.0,
            epoch: writer.epoch.0,
        };
        self.0.iter().map(state).collect()
    }

    pub(crate) fn from_state(writers: Vec<WriterV1>) -> Self {
        let state = |writer: WriterV1| {
            let state = WriterState {
                generation: Generation(writer.generation),
                node: NodeId(writer.node),
                epoch: Epoch(writer.epoch),
                answered_below: writer.answered_below,
                applied: writer.applied.into_iter().collect(),
            };
            (AttachmentId(writer.attachment), state)
        };
        Self(writers.into_iter().map(state).collect())
    }
}

impl WriterV1 {
    /// State of version 1 had one writer, whose generation was the family's.
    pub(crate) fn of_generation(self, generation: u64) -> Self {
        Self { generation, ..self }
    }
}

impl WriterState {
    fn named(&self, attachment: AttachmentId) -> Writer {
        let (generation, node, epoch) = (self.generation, self.node, self.epoch);
        Writer { attachment, generation, node, epoch }
    }
}
