//! Brings a replica that is behind the leader's log up by difference (hazards F8, F9).
//!
//! The receiver pulls: pages of what changed since its own sequence, from the view that the leader
//! pinned. They are put aside, then one record switches them in. Only what changed travels.

use std::rc::Rc;
use std::time::Duration;

use ballast_block::{NodeId, Sequence};
use ballast_env::Env;
use ballast_raft_store::replica::{DiffPage, ResyncBase, ResyncError};
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
    let base = if replica.map_lost() { ResyncBase::Empty } else { ResyncBase::Applied };
    let mut resync = replica.resync(base).await.map_err(refused)?;
    let mut since = resync.since();
    tracing::info!(replica = %replica.id(), %from, since = since.0, to = offer.sequence,
        "pulling the difference");
    let mut from_block = 0;
    let mut bytes = 0;
    loop {
        let ask = DifferenceV1 { transfer: offer.transfer, since: since.0, from_block };
        let page = match pull(&inner, from, frame, ask).await {
            Err(PeerError::Refused(reason)) if from_block == 0 && since > Sequence(0) => {
                // What was trimmed so long ago is forgotten there.
                tracing::warn!(replica = %replica.id(), reason, "no difference: pulls everything");
                drop(resync);
                resync = replica.resync(ResyncBase::Empty).await.map_err(refused)?;
                since = resync.since();
                continue;
            }
            page => page?,
        };
        let more = page_bytes(&page);
        bytes += more;
        meters::add(&inner.meters.resync_received, more);
        if let Err(error) = resync.put(page.records).await {
            tracing::warn!(replica = %replica.id(), %error, "difference not taken");
            drop(resync);
            // The leader offers again at once: room does not come that fast, and each try costs
            // as much as it pulled.
            inner.env.sleep(FULL_PAUSE).await;
            return Err(refused(error));
        }
        match page.next {
            Some(next) => from_block = next,
            None => break,
        }
    }
    let state =
        GroupSnapshot::Incoming { resync, state: offer.state, sequence: Sequence(offer.sequence) };
    let index = meta.last_log_id;
    let snapshot = Snapshot { meta, snapshot: state };
    let installed = group.raft().install_full_snapshot(vote, snapshot).await.map_err(refused)?;
    tracing::info!(replica = %replica.id(), ?index, bytes, "difference installed");
    meters::add(&inner.meters.resyncs, 1);
    Ok(installed.vote)
}

fn page_bytes(page: &DiffPage) -> u64 {
    use ballast_raft_store::replica::DiffChange;
    let bytes = page.records.iter().map(|record| match &record.change {
        DiffChange::Hole => 0,
        DiffChange::Data { payload, .. } => payload.len() as u64,
    });
    bytes.sum()
}

async fn pull<E: Env>(
    inner: &Inner<E>,
    from: NodeId,
    frame: &Frame,
    ask: DifferenceV1,
) -> Result<DiffPage, PeerError> {
    let call = Frame {
        family: frame.family,
        from: frame.to,
        to: frame.from,
        ..Frame::plain(Kind::Call, 0, Tag::Difference.message(&ask))
    };
    let reply = inner.links.call(from, Lane::Data, call, PAGE_MAX).await?;
    decode_page(decode(reply.body)?, &reply.payload)
}

/// Gives a page of a view that a peer pulls.
pub(crate) async fn page<E: Env>(
    inner: &Inner<E>,
    ask: DifferenceV1,
) -> Result<DiffPage, PeerError> {
    let pin = inner.transfers.get(ask.transfer).ok_or_else(|| refused("transfer is over"))?;
    let replica = pin.replica();
    let page = replica.diff(&pin, Sequence(ask.since), ask.from_block, PAGE_BYTES_MAX).await;
    let page = page.map_err(|error| refused(ResyncError::Read(error)))?;
    meters::add(&inner.meters.resync_sent, page_bytes(&page));
    Ok(page)
}
