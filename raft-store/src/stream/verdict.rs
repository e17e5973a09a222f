//! What recovery found wrong, and which replicas it makes suspect (hazard F6).

use std::collections::BTreeMap;

use ballast_block::ReplicaId;

use super::record::Replayed;
use crate::format::SegmentNumber;
use crate::place::Place;

/// Something that was not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Row R4 of the decision table: a torn write, never acknowledged, was dropped.
    TornTail {
        /// Where the first dropped batch should be.
        place: Place,
        /// Its number.
        sequence: u64,
    },
    /// Row R2: the record is known, its payload must come from a peer.
    PayloadDamaged {
        /// First block of the payload.
        place: Place,
        /// Whose it is.
        replica: ReplicaId,
        /// The record's operation number.
        op: u64,
    },
    /// Row R3: batches that were durable are gone.
    BatchesLost {
        /// The first of them.
        first: u64,
        /// How many in a row.
        count: u64,
        /// Last operation of every replica in the lost batch: known when it was a single one.
        last_ops: Option<Vec<(ReplicaId, u64)>>,
    },
    /// The header of a segment is damaged; its batches told what it said.
    SegmentHeaderDamaged {
        /// Which.
        segment: SegmentNumber,
    },
    /// One of the two superblocks is damaged; it was written anew.
    SuperblockDamaged {
        /// Its number, 0 or 1.
        copy: usize,
    },
}

/// Why a replica is suspect: it may have lost what it acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// Records up to this operation were in a lost batch.
    Lost {
        /// The last operation known to be lost.
        up_to: u64,
    },
    /// Lost batches may have held records of it; nothing shows that they did not.
    Unproven,
}

/// The replicas that may have lost something they acknowledged.
///
/// `known`: the last operation of each replica as the checkpoint has it; replicas that the replay
/// creates need not be there.
pub fn suspects(
    findings: &[Finding],
    replay: &[Replayed],
    known: &BTreeMap<ReplicaId, u64>,
) -> BTreeMap<ReplicaId, Suspicion> {
    let mut suspects = BTreeMap::new();
    for finding in findings {
        let Finding::BatchesLost { first, last_ops, .. } = finding else { continue };
        match last_ops {
            Some(last_ops) => {
                let lost = last_ops.iter();
                suspects
                    .extend(lost.map(|&(replica, op)| (replica, Suspicion::Lost { up_to: op })));
            }
            None => {
                for replica in unproven(*first, replay, known) {
                    suspects.entry(replica).or_insert(Suspicion::Unproven);
                }
            }
        }
    }
    suspects
}

/// Replicas whose operations do not run without a gap across the hole before batch `first`.
fn unproven(first: u64, replay: &[Replayed], known: &BTreeMap<ReplicaId, u64>) -> Vec<ReplicaId> {
    let mut before = known.clone();
    let mut after: BTreeMap<ReplicaId, u64> = BTreeMap::new();
    for record in replay {
        if record.at.0 < first {
            before.insert(record.replica, record.op);
        } else {
            after.entry(record.replica).or_insert(record.op);
            before.entry(record.replica).or_insert(0);
        }
    }
    let whole = |replica: &ReplicaId, last: u64| after.get(replica) == Some(&(last + 1));
    before.iter().filter(|(replica, last)| !whole(replica, **last)).map(|(id, _)| *id).collect()
}
