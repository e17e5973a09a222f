//! Brings a replica that is behind the leader's log up by difference (hazards F8, F9).
//!
//! The receiver pulls: pages of what changed since its own sequence, from the view that the leader
//! pinned. They are put aside, then one record switches them in. Only what changed travels. Where the
//! pool has no room for that, they replace what is there as they come
//! (docs/decisions/0004-difference-in-place.md).

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::{NodeId, Sequence};
use ballast_env::Env;
use ballast_raft_store::replica::{DiffChange, DiffPage, Replica, Resync, ResyncBase, ResyncError};
use ballast_raft_store::types::Vote;
use ballast_volume::group::Group;
use ballast_volume::snapshot::GroupSnapshot;
use openraft::storage::Snapshot;

use crate::calls::{DifferenceV1, OfferV1, Tag, decode, decode_page};
use crate::meters;
use crate::node::Inner;
use crate::peers::connection::PeerError;
use crate::peers::links::Lane;
use crate::peers::raft_codec;
use crate::peers::wire::{Frame, Kind};

/// Payload of one page of a difference, in bytes: a frame holds it with its description.
pub const PAGE_BYTES_MAX: usize = 1 << 20;

/// Longest wait for a page: the leader reads it from disk.
const PAGE_MAX: Duration = Duration::from_secs(30);

/// Pause before a difference that found no room is tried again.
const FULL_PAUSE: Duration = Duration::from_secs(5);

fn refused(error: impl std::fmt::Display) -> PeerError {
    PeerError::Refused(error.to_string())
}

/// Takes an offered state: pulls what differs, installs it. Answers this replica's vote after it.
pub(crate) async fn accept<E: Env>(
    inner: Rc<Inner<E>>,
    group: Group<E>,
    from: NodeId,
    frame: &Frame,
    offer: OfferV1,
) -> Result<Vote, PeerError> {
    let (vote, meta) = raft_codec::decode_offer(&offer.meta).map_err(refused)?;
    let replica = group.replica().clone();
    let sequence = Sequence(offer.sequence);
    let bytes = Cell::new(0);
    let pulling = Pulling { inner: &inner, from, frame, transfer: offer.transfer, bytes: &bytes };
    let mut base = match (replica.map_lost(), replica.is_mixed()) {
        (true, _) => ResyncBase::Empty,
        // What has begun in place goes on in place.
        (false, true) => ResyncBase::InPlace(sequence),
        (false, false) => ResyncBase::Applied,
    };
    let resync = loop {
        let resync = replica.resync(base).await.map_err(refused)?;
        tracing::info!(replica = %replica.id(), %from, since = resync.since().0, to = sequence.0,
            in_place = resync.is_in_place(), "pulling the difference");
        let stopped = match pulling.all(&resync).await {
            Ok(()) => break resync,
            Err(stopped) => stopped,
        };
        drop(resync);
        base = match (stopped, base) {
            (Stopped::NoDifference(reason), ResyncBase::Applied | ResyncBase::InPlace(_)) => {
                // What was trimmed so long ago is forgotten there.
                tracing::warn!(replica = %replica.id(), reason, "no difference: pulls everything");
                ResyncBase::Empty
            }
            (Stopped::NotTaken(ResyncError::Full(_)), ResyncBase::Applied) => {
                tracing::warn!(replica = %replica.id(),
                    "no room for the difference beside what is here: it replaces in place");
                ResyncBase::InPlace(sequence)
            }
            (Stopped::NotTaken(error), _) => return Err(not_taken(&inner, &replica, error).await),
            (Stopped::NoDifference(reason), _) => return Err(PeerError::Refused(reason)),
            (Stopped::Peer(error), _) => return Err(error),
        };
    };
    let in_place = resync.is_in_place();
    let state = GroupSnapshot::Incoming { resync, state: offer.state, sequence };
    let index = meta.last_log_id;
    let snapshot = Snapshot { meta, snapshot: state };
    let installed = group.raft().install_full_snapshot(vote, snapshot).await.map_err(refused)?;
    tracing::info!(replica = %replica.id(), ?index, bytes = bytes.get(), in_place,
        "difference installed");
    meters::add(&inner.meters.resyncs, 1);
    Ok(installed.vote)
}

/// Tells that a difference can't be taken, and waits: the leader offers again at once, but room does
/// not come that fast, and each try costs as much as it pulled.
async fn not_taken<E: Env>(
    inner: &Inner<E>,
    replica: &Replica<E>,
    error: ResyncError,
) -> PeerError {
    match &error {
        ResyncError::Full(_) => tracing::error!(replica = %replica.id(), %error,
            "replica can't catch up: delete or trim volumes that are on this pool, or replace it by \
            a larger one (`ballastctl pool replace`)"),
        error => tracing::warn!(replica = %replica.id(), %error, "difference not taken"),
    }
    inner.env.sleep(FULL_PAUSE).await;
    refused(error)
}

/// Why a difference stopped before its end.
enum Stopped {
    /// The peer has none since then.
    NoDifference(String),
    /// The peer does not answer.
    Peer(PeerError),
    /// The replica does not take it.
    NotTaken(ResyncError),
}

/// A transfer that a peer offered.
struct Pulling<'a, E: Env> {
    inner: &'a Inner<E>,
    from: NodeId,
    /// The offer.
    frame: &'a Frame,
    transfer: u64,
    /// Payload that came, in bytes.
    bytes: &'a Cell<u64>,
}

impl<E: Env> Pulling<'_, E> {
    async fn all(&self, resync: &Resync<E>) -> Result<(), Stopped> {
        if resync.is_in_place() {
            // What was trimmed makes room for what was written.
            self.pages(resync, true).await?;
        }
        self.pages(resync, false).await
    }

    async fn pages(&self, resync: &Resync<E>, holes: bool) -> Result<(), Stopped> {
        let mut from_block = 0;
        loop {
            let (transfer, since) = (self.transfer, resync.since().0);
            let ask = DifferenceV1 { transfer, since, from_block, holes };
            let mut page = match self.pull(ask).await {
                Err(PeerError::Refused(reason)) if from_block == 0 && since > 0 => {
                    return Err(Stopped::NoDifference(reason));
                }
                page => page.map_err(Stopped::Peer)?,
            };
            let more = page_bytes(&page);
            self.bytes.set(self.bytes.get() + more);
            meters::add(&self.inner.meters.resync_received, more);
            if holes {
                page.records.retain(|record| record.change == DiffChange::Hole);
            }
            resync.put(page.records).await.map_err(Stopped::NotTaken)?;
            match page.next {
                Some(next) => from_block = next,
                None => return Ok(()),
            }
        }
    }

    async fn pull(&self, ask: DifferenceV1) -> Result<DiffPage, PeerError> {
        let call = Frame {
            family: self.frame.family,
            from: self.frame.to,
            to: self.frame.from,
            ..Frame::plain(Kind::Call, 0, Tag::Difference.message(&ask))
        };
        let reply = self.inner.links.call(self.from, Lane::Data, call, PAGE_MAX).await?;
        decode_page(decode(reply.body)?, &reply.payload)
    }
}

fn page_bytes(page: &DiffPage) -> u64 {
    let bytes = page.records.iter().map(|record| match &record.change {
        DiffChange::Hole => 0,
        DiffChange::Data { payload, .. } => payload.len() as u64,
    });
    bytes.sum()
}

/// Gives a page of a view that a peer pulls.
pub(crate) async fn page<E: Env>(
    inner: &Inner<E>,
    ask: DifferenceV1,
) -> Result<DiffPage, PeerError> {
    let pin = inner.transfers.get(ask.transfer).ok_or_else(|| refused("transfer is over"))?;
    let replica = pin.replica();
    let since = Sequence(ask.since);
    let page = match ask.holes {
        true => replica.diff_holes(&pin, since, ask.from_block, PAGE_BYTES_MAX).await,
        false => replica.diff(&pin, since, ask.from_block, PAGE_BYTES_MAX).await,
    };
    let page = page.map_err(|error| refused(ResyncError::Read(error)))?;
    meters::add(&inner.meters.resync_sent, page_bytes(&page));
    Ok(page)
}
