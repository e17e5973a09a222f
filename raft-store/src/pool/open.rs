//! Opening: from the last checkpoint and the records since to replicas that work.
//!
//! Owns what each record means for the log and which replicas are suspect. Nothing is applied
//! here: the log is replayed into the index, and the consensus library applies it again.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{ReplicaId, Sequence};
use ballast_env::Env;
use bytes::Bytes;
use prost::Message;

use crate::format::vote_slot::{SlotNumber, SlotState};
use crate::log::index::Slot;
use crate::map::ExtentMap;
use crate::place::Place;
use crate::pool::map_io::blocks_of;
use crate::pool::shared::{Shared, count};
use crate::pool::{OpenPoolError, PoolExpectation, RecoveryReport};
use crate::replica::core::{Applied, ReplicaInner};
use crate::replica::record::{
    DescriptorV1, InstallV1, LogPointV1, MovedEntryV1, VoteV1, later_vote,
};
use crate::replica::resync::ResyncState;
use crate::replica::saved::{Packed, PoolV1, ReplicaV1, ResyncV1, SuspectV1, unpack};
use crate::replica::{Health, InstallState, Restored};
use crate::stream::{
    Finding, Opened, PayloadState, RecordKind, Replayed, SpaceClass, StreamId, Suspicion, suspects,
};
use crate::types::{LogId, StoredMembership, Vote};

/// Opens a pool and brings its replicas to where their logs end.
pub(super) async fn open<E: Env>(
    env: E,
    path: &Path,
    expect: PoolExpectation,
) -> Result<(Rc<Shared<E>>, RecoveryReport), OpenPoolError> {
    let opened = crate::stream::open(env, path, expect).await?;
    let Opened { streams, checkpoint_body, replay, findings, bytes_read } = opened;
    let shared = Rc::new(Shared::new(streams));
    let outcome = recover(&shared, checkpoint_body, &replay, &findings).await;
    if let Err(error) = outcome {
        shared.stop();
        return Err(error);
    }
    let replicas = shared.all();
    let is_suspect = |one: &&Rc<ReplicaInner<E>>| *one.health.borrow() != Health::Good;
    let damaged = |one: &Rc<ReplicaInner<E>>| {
        one.log.borrow().slots().filter(|slot| slot.damaged).count() as u64
    };
    for finding in &findings {
        let counters = &shared.counters;
        match finding {
            Finding::PayloadDamaged { .. } => count(&counters.damaged_blocks, 1),
            Finding::BatchesLost { count: lost, .. } => count(&counters.damaged_headers, *lost),
            Finding::SegmentHeaderDamaged { .. } => count(&counters.damaged_headers, 1),
            Finding::SuperblockDamaged { .. } => count(&counters.damaged_superblocks, 1),
            Finding::TornTail { .. } => {}
        }
    }
    let report = RecoveryReport {
        replicas: replicas.len(),
        replayed_records: replay.len() as u64,
        replayed_bytes: bytes_read,
        torn_tail: findings.iter().any(|one| matches!(one, Finding::TornTail { .. })),
        suspects: replicas.iter().filter(is_suspect).map(|one| one.descriptor.replica).collect(),
        damaged_entries: replicas.iter().map(damaged).sum(),
    };
    for finding in &findings {
        tracing::warn!(?finding, pool = %shared.streams.info().pool, "recovery");
    }
    Ok((shared, report))
}

async fn recover<E: Env>(
    shared: &Rc<Shared<E>>,
    body: Option<Bytes>,
    replay: &[Replayed],
    findings: &[Finding],
) -> Result<(), OpenPoolError> {
    if let Some(body) = body {
        load(shared, body).await?;
    }
    let known: BTreeMap<ReplicaId, u64> =
        shared.all().iter().map(|one| (one.descriptor.replica, one.op.get())).collect();
    for record in replay {
        replay_one(shared, record).await?;
    }
    for replica in shared.all() {
        replica.take_marked();
    }
    read_votes(shared, &suspects(findings, replay, &known)).await;
    for replica in shared.all() {
        let installed = replica.resync.borrow().as_ref().map(|resync| resync.installed.get());
        match installed {
            None => {}
            // Its changes are lost in part: those since the checkpoint.
            Some(false) => replica.abandon_resync(),
            Some(true) => replica
                .drain_at_open()
                .await
                .map_err(|error| refused(&replica, &format!("install: {error}")))?,
        }
        if replica.map_lost.get() {
            replica.suspect();
        }
        replica.settle();
        replica.mark_end()?;
    }
    count_pages(shared);
    Ok(())
}

/// Marks the pages of all maps as what lives in the meta stream's segments: what a checkpoint's table
/// says of them may be more, for pages that the process before gave up after it.
fn count_pages<E: Env>(shared: &Shared<E>) {
    let segments = shared.streams.segments();
    segments.clear_live(StreamId::Meta);
    let replicas = shared.all();
    let resyncs = replicas.iter().filter_map(|one| Some(one.resync.borrow().as_ref()?.map.clone()));
    let unused = shared.abandoned.borrow().clone().into_iter();
    let unused = unused.chain(shared.drained.borrow().clone());
    for map in replicas.iter().map(|one| one.map()).chain(resyncs).chain(unused) {
        for (place, blocks) in map.pages().into_iter().map(blocks_of) {
            segments.mark_live(place, blocks);
        }
    }
}

fn refused<E: Env>(replica: &ReplicaInner<E>, problem: &str) -> OpenPoolError {
    OpenPoolError::Refused(format!("{}: {problem}", replica.descriptor.replica))
}

/// Takes over what the checkpoint has.
async fn load<E: Env>(shared: &Rc<Shared<E>>, body: Bytes) -> Result<(), OpenPoolError> {
    let unreadable = |problem: String| OpenPoolError::Refused(format!("checkpoint: {problem}"));
    let body = PoolV1::decode(body).map_err(|error| unreadable(error.to_string()))?;
    shared.dropped.borrow_mut().extend(body.dropped.iter().map(|&id| ReplicaId(id)));
    for saved in body.replicas {
        let replica = load_replica(shared, saved).await.map_err(unreadable)?;
        shared.replicas.borrow_mut().insert(replica.descriptor.replica, Rc::new(replica));
    }
    Ok(())
}

async fn load_replica<E: Env>(
    shared: &Rc<Shared<E>>,
    saved: ReplicaV1,
) -> Result<ReplicaInner<E>, String> {
    let descriptor = saved.descriptor.as_ref().and_then(DescriptorV1::split);
    let (descriptor, slot) = descriptor.ok_or("no descriptor")?;
    let load = |root: Bytes| {
        let io = shared.map_io.clone();
        async move { ExtentMap::load(&root, io, &shared.pages).await.map_err(|e| e.to_string()) }
    };
    let (map, lost) = match load(saved.map).await {
        Ok(map) => (map, saved.map_lost),
        Err(problem) => {
            // The log and the vote are whole: the replica stays, and is resynced from nothing.
            tracing::error!(replica = %descriptor.replica, problem, "extent map is lost");
            count(&shared.counters.damaged_pages, 1);
            (ExtentMap::new(shared.map_io.clone(), &shared.pages), true)
        }
    };
    let replica = ReplicaInner::with_map(shared.clone(), descriptor, slot, map);
    replica.map_lost.set(lost);
    replica.mixed_upto.set(Sequence(saved.mixed_upto));
    replica.op.set(saved.op);
    replica.resyncs.set(saved.resyncs);
    replica.marked.set(saved.suspect);
    let membership = saved.membership.unwrap_or_default().decode_membership();
    let membership = membership.map_err(|error| error.to_string())?;
    replica.checkpointed.set(saved.applied.map(Into::into));
    *replica.checkpointed_membership.borrow_mut() = membership.clone();
    *replica.applied.borrow_mut() = Applied {
        id: saved.applied.map(Into::into),
        membership,
        sequence: Sequence(saved.sequence),
    };
    replica.restored.borrow_mut().state = saved.state;
    if let Some(ResyncV1 { id, since, installed, map, from_empty }) = saved.resync {
        let map = Rc::new(load(map).await?);
        let state = ResyncState {
            id,
            since: Sequence(since),
            from_empty,
            // Said only while changes come; what of them is here, the map has.
            in_place: None,
            map,
            installed: installed.into(),
        };
        *replica.resync.borrow_mut() = Some(Rc::new(state));
    }
    {
        let mut log = replica.log.borrow_mut();
        log.vote = saved.vote.map(Into::into);
        log.purged = saved.purged.map(Into::into);
        log.committed = saved.committed.map(Into::into);
    }
    for packed in unpack(saved.entries).map_err(|error| error.to_string())? {
        let slot = replica.unpacked(packed).await?;
        replica.retain(&slot);
        replica.log.borrow_mut().push(slot);
    }
    Ok(replica)
}

/// Does again what a record did.
async fn replay_one<E: Env>(
    shared: &Rc<Shared<E>>,
    record: &Replayed,
) -> Result<(), OpenPoolError> {
    if record.kind == RecordKind::CreateReplica {
        let descriptor = DescriptorV1::decode(record.body.clone()).ok();
        let Some((descriptor, slot)) =
            descriptor.and_then(|descriptor: DescriptorV1| descriptor.split())
        else {
            return Err(OpenPoolError::Refused(format!("{}: no descriptor", record.replica)));
        };
        let replica = ReplicaInner::empty(shared.clone(), descriptor, slot);
        replica.op.set(record.op);
        shared.replicas.borrow_mut().insert(record.replica, Rc::new(replica));
        return Ok(());
    }
    let Some(replica) = shared.replicas.borrow().get(&record.replica).cloned() else {
        // Its creation was lost (row R3): it never had anything that another record proves.
        tracing::error!(replica = %record.replica, "record of a replica that is not known");
        return Ok(());
    };
    // Alone, nobody ever took anything out of its log.
    if record.op != replica.op.get() + 1 && !replica.is_alone() {
        replica.parted.set(true);
    }
    replica.op.set(record.op);
    let problem = |problem: String| refused(&replica, &problem);
    match record.kind {
        RecordKind::Entry => replica.replay_entry(record).await.map_err(problem)?,
        RecordKind::Vote => {
            let vote: Vote = decode::<VoteV1>(record).map_err(problem)?.into();
            replica.log.borrow_mut().vote = Some(vote);
        }
        kind @ (RecordKind::Truncate | RecordKind::Purge | RecordKind::Committed) => {
            let point: LogPointV1 = decode(record).map_err(problem)?;
            replica.replay_suspicion(&point);
            replica.replay_point(kind, point.id.map(LogId::from));
        }
        RecordKind::DropReplica => shared.forget(&replica),
        RecordKind::MovedEntry => {
            if let (Some(id), Some(payload)) =
                (decode::<MovedEntryV1>(record).map_err(problem)?.id, record.payload)
            {
                replica.move_entry(id.into(), payload.place);
            }
        }
        RecordKind::Install => replica.replay_install(record).await.map_err(problem)?,
        RecordKind::CreateReplica | RecordKind::Moved | RecordKind::Page => {}
    }
    Ok(())
}

fn decode<M: Message + Default>(record: &Replayed) -> Result<M, String> {
    M::decode(record.body.clone())
        .map_err(|error| format!("{:?} record {}: {error}", record.kind, record.op))
}

/// Compares the votes with their second places, and makes suspects.
async fn read_votes<E: Env>(shared: &Rc<Shared<E>>, suspects: &BTreeMap<ReplicaId, Suspicion>) {
    let replicas = shared.all();
    let last = replicas.iter().map(|one| one.vote_slot).max();
    let slots = match last {
        Some(SlotNumber(last)) => shared.streams.read_vote_slots(usize::from(last) + 1).await,
        None => Vec::new(),
    };
    let mut rewrite = Vec::new();
    for replica in replicas {
        let id = replica.descriptor.replica;
        let slot = &slots[usize::from(replica.vote_slot.0)];
        let second = match slot {
            SlotState::Vote(vote) if vote.replica == id => {
                VoteV1::decode(vote.body.clone()).ok().map(Vote::from)
            }
            _ => None,
        };
        if *slot == SlotState::Damaged {
            tracing::error!(replica = %id, "second place of a vote is damaged");
            count(&shared.counters.damaged_votes, 1);
        }
        let mut log = replica.log.borrow_mut();
        log.vote = later_vote(log.vote, second);
        let term = log.vote.map_or(0, |vote| vote.leader_id.term);
        let last_term = log.last().map_or(0, |last| crate::types::term_of(&last));
        let mut health = replica.health.borrow_mut();
        if suspects.contains_key(&id) {
            let before = matches!(*health, Health::Suspect { vote_lost: true, .. });
            let vote_lost = before || *slot == SlotState::Damaged;
            *health = Health::Suspect { vote_lost, term: term.max(last_term) };
        } else if let (SlotState::Damaged, Some(vote)) = (slot, log.vote) {
            let body = VoteV1::from(&vote).encode_to_vec().into();
            rewrite.push((replica.vote_slot, id, replica.op.get(), body));
        }
    }
    // What the first place says for certain.
    for (slot, replica, op, body) in rewrite {
        if let Err(error) = shared.streams.write_vote_slot(slot, replica, op, body).await {
            tracing::error!(%replica, %error, "second place of a vote not written anew");
        }
    }
}

impl<E: Env> ReplicaInner<E> {
    /// The slot of a packed entry; reads its payload where it can't be decoded without.
    async fn unpacked(&self, packed: Packed) -> Result<Slot, String> {
        let payload = match packed.needs_payload() {
            true => Some(self.whole_payload(packed.place, packed.blocks).await?),
            false => None,
        };
        packed.into_slot(payload).map_err(|error| error.to_string())
    }

    async fn whole_payload(&self, place: Place, blocks: u32) -> Result<Bytes, String> {
        let buffer = self.shared.streams.buffers().get(blocks as usize * BLOCK_SIZE);
        let read = self.shared.streams.read_blocks(place, blocks, buffer).await;
        Ok(read.map_err(|error| error.to_string())?.freeze())
    }

    /// A record that says something of the log up to `id`.
    fn replay_point(&self, kind: RecordKind, id: Option<LogId>) {
        match kind {
            RecordKind::Truncate => {
                if id.is_none_or(|id| self.log.borrow().holds(id)) {
                    self.parted.set(false);
                }
                self.truncate_index(id);
            }
            RecordKind::Purge => {
                let applied = self.applied.borrow().id;
                if let Some(upto) = id
                    && (!self.parted.get() || Some(upto) <= applied)
                {
                    self.purge_index(upto);
                }
            }
            _ => {
                let mut log = self.log.borrow_mut();
                // Of an entry that is not here it says nothing, not even of those before it: they
                // may be another leader's, which were replaced.
                if id.is_some_and(|id| log.holds(id)) {
                    log.committed = log.committed.max(id);
                }
            }
        }
    }

    async fn replay_entry(&self, record: &Replayed) -> Result<(), String> {
        let (place, blocks) =
            record.payload.map_or((Place(0), 0), |payload| (payload.place, payload.blocks));
        let damaged = record.payload_state == PayloadState::Damaged;
        let packed = Packed { header: record.body.clone(), place, blocks, damaged };
        if damaged && packed.needs_payload() {
            // A control entry that can't be read is as good as lost: the log ends before it.
            self.suspect();
            return Ok(());
        }
        let slot = self.unpacked(packed).await?;
        let id = slot.entry.log_id;
        let next = self.log.borrow().last().map_or(0, |last| last.index + 1);
        let known = !self.parted.get() || self.log.borrow().is_followed_by(id);
        if !known || id.index > next {
            self.suspect();
            self.retain(&slot);
            self.release(&[slot], true);
            return Ok(());
        }
        self.parted.set(false);
        if id.index != next {
            // Between records of which none is lost this can't be: openraft's log has no holes, and
            // starts at 0.
            self.suspect();
            let keep = {
                let log = self.log.borrow();
                let before = id.index.checked_sub(1).and_then(|index| log.get(index));
                before.map(|slot| slot.entry.log_id).or(log.purged)
            };
            self.truncate_index(keep);
        }
        self.retain(&slot);
        self.log.borrow_mut().push(slot);
        Ok(())
    }

    /// Whether it is its family's only voter.
    fn is_alone(&self) -> bool {
        let applied = self.applied.borrow();
        applied.membership.membership().voter_ids().eq([self.descriptor.replica.0])
    }

    /// What an earlier opening could not read may be readable to this one (a path that was flapping):
    /// but that one has cut the log, and what the log says is not what was acknowledged.
    fn replay_suspicion(&self, point: &LogPointV1) {
        if point.suspect.is_some() {
            self.marked.set(point.suspect);
        }
        if point.cleared {
            self.marked.set(None);
        }
    }

    /// A suspicion of an earlier opening that was never cleared, beside what this one has found.
    fn take_marked(&self) {
        let Some(SuspectV1 { vote_lost, term }) = self.marked.take() else { return };
        self.suspect();
        if let Health::Suspect { vote_lost: lost, term: known } = &mut *self.health.borrow_mut() {
            *lost |= vote_lost;
            *known = term.max(*known);
        }
    }

    /// May have lost something that it acknowledged.
    pub(crate) fn suspect(&self) {
        let mut health = self.health.borrow_mut();
        if *health == Health::Good {
            let term = self.log.borrow().vote.map_or(0, |vote| vote.leader_id.term);
            *health = Health::Suspect { vote_lost: false, term };
        }
    }

    async fn replay_install(&self, record: &Replayed) -> Result<(), String> {
        if record.payload_state == PayloadState::Damaged {
            // Which state it switched to is lost, and so is what came after: this replica is, not
            // the pool.
            tracing::error!(replica = %self.descriptor.replica, "install record is damaged");
            if let Some(payload) = record.payload {
                self.shared.streams.segments().mark_dead(payload.place, payload.blocks);
            }
            count(&self.shared.counters.damaged_blocks, 1);
            self.abandon_resync();
            self.map_lost.set(true);
            self.suspect();
            return Ok(());
        }
        let unreadable = |what: &str| format!("install record {}: {what}", record.op);
        let encoded = match record.payload {
            None => record.body.clone(),
            Some(payload) => {
                self.shared.streams.segments().mark_dead(payload.place, payload.blocks);
                let length = record.body.as_ref().try_into().map(u64::from_le_bytes);
                let length = length.map_err(|_| unreadable("no length"))?;
                let whole = self.whole_payload(payload.place, payload.blocks).await?;
                let length = usize::try_from(length).map_err(|_| unreadable("length"))?;
                if length > whole.len() {
                    return Err(unreadable("length"));
                }
                whole.slice(..length)
            }
        };
        let install = InstallV1::decode(encoded).map_err(|error| unreadable(&error.to_string()))?;
        let resync = self.resync.borrow().clone();
        let resync = resync.filter(|resync| resync.id == install.resync);
        let resync = resync.ok_or_else(|| unreadable("its changes are not in the checkpoint"))?;
        let membership = install.membership.unwrap_or_default().decode_membership();
        let state = InstallState {
            applied: install.applied.ok_or_else(|| unreadable("no log id"))?.into(),
            membership: membership.map_err(|error| unreadable(&error.to_string()))?,
            state: install.state,
            sequence: Sequence(install.sequence),
        };
        self.switch(&state, &resync);
        Ok(())
    }

    /// Says where the log ends now, if records were lost, and that the replica is suspect for it: to
    /// the next opening, what this one left out must not look as if it were between what is here and
    /// what comes, nor this log as if it were all that was acknowledged.
    fn mark_end(&self) -> Result<(), OpenPoolError> {
        if !self.parted.replace(false) {
            return Ok(());
        }
        let suspect = match *self.health.borrow() {
            Health::Good => None,
            Health::Suspect { vote_lost, term } => Some(SuspectV1 { vote_lost, term }),
        };
        let end = LogPointV1::of(self.log.borrow().last());
        let body = LogPointV1 { suspect, ..end }.encode_to_vec();
        let marked = self.append(SpaceClass::Control, RecordKind::Truncate, &body, None, &[]);
        marked.map(|_| ()).map_err(|error| refused(self, &format!("end of the log: {error}")))
    }

    /// The last step: what is in the log is durable, and what was restored is known.
    fn settle(&self) {
        let applied = self.applied.borrow();
        let mut log = self.log.borrow_mut();
        self.durable.set(log.last());
        // A hint may be ahead of what a suspect still has, or speak of what took its place.
        let committed = log.committed.filter(|id| Some(*id) <= applied.id || log.holds(*id));
        log.committed = committed.or(applied.id);
        self.committed_unsaved.set(false);
        let state = self.restored.borrow().state.clone();
        let membership: StoredMembership = applied.membership.clone();
        *self.restored.borrow_mut() =
            Restored { applied: applied.id, membership, state, sequence: applied.sequence };
    }
}
