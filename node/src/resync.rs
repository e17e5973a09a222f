//! Brings a replica that is behind the leader's log up by difference (hazards F8, F9).
//!
//! The receiver pulls: pages of what changed since its own sequence, from the view that the leader
//! pinned. They are put aside, then one record switches them in. Only what changed travels; what has
//! arrived when a connection breaks is kept for a while, and the next difference goes on from it.
//! Where the pool has no room for that, changes replace what is there as they come
//! (docs/decisions/0004-difference-in-place.md).

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::{NodeId, Sequence};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_raft_store::replica::{
    DiffChange, DiffPage, ReadError, Replica, Resync, ResyncBase, ResyncError,
};
use ballast_raft_store::types::{LogId, Vote};
use ballast_volume::group::Group;
use ballast_volume::snapshot::GroupSnapshot;
use openraft::storage::Snapshot;

use crate::calls::{DifferenceV1, OfferV1, Tag, decode, decode_page};
use crate::families;
use crate::meters;
use crate::node::{Inner, Node};
use crate::peers::connection::PeerError;
use crate::peers::links::Lane;
use crate::peers::raft_codec;
use crate::peers::wire::{Frame, Kind};
use crate::reach::{Gap, Reach};

/// Payload of one page of a difference, in bytes: a frame holds it with its description.
pub const PAGE_BYTES_MAX: usize = 1 << 20;

/// Longest wait for a page: the leader reads it from disk.
const PAGE_MAX: Duration = Duration::from_secs(30);

/// Rounds of repair of one page: damage may strike again, or a block be overwritten meanwhile, whose
/// older version nobody else has; the next view does not show it any more.
const REPAIR_ROUNDS_MAX: u32 = 3;

/// Pause before a difference that found no room is tried again.
const FULL_PAUSE: Duration = Duration::from_secs(5);

/// How long what arrived of a broken difference is kept: longer than a connection takes to come back
/// and a leader to be elected. It takes room on the pool.
const KEPT_MAX: Duration = Duration::from_secs(60);

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
    let transfer = offer.transfer;
    let pulling = Pulling { inner: &inner, from, frame, transfer, sequence, bytes: &bytes };
    let kept = go_on(&inner, &replica, sequence);
    let mut goes_on = kept.is_some();
    let mut incoming = match kept {
        Some(kept) => kept,
        None => Incoming::begin(&replica, first_base(&replica, sequence), sequence).await?,
    };
    loop {
        tracing::info!(replica = %replica.id(), %from, reach = ?incoming.reach, to = sequence.0,
            in_place = incoming.resync.is_in_place(), "pulling the difference");
        let stopped = match pulling.all(&mut incoming).await {
            Ok(()) => break,
            Err(stopped) => stopped,
        };
        let base = match (stopped, incoming.base) {
            (Stopped::NoDifference(reason), base) if goes_on => {
                tracing::warn!(replica = %replica.id(), reason, ?base, "does not go on: begins anew");
                goes_on = false;
                first_base(&replica, sequence)
            }
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
            (Stopped::NotTaken(error), _) => {
                drop(incoming);
                return Err(not_taken(&inner, &replica, error).await);
            }
            (Stopped::NoDifference(reason), _) => return Err(PeerError::Refused(reason)),
            (Stopped::Peer(error), _) => {
                keep(&inner, &replica, incoming, &error);
                return Err(error);
            }
        };
        drop(incoming);
        incoming = Incoming::begin(&replica, base, sequence).await?;
    }
    let resync = incoming.resync;
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

fn first_base<E: Env>(replica: &Replica<E>, sequence: Sequence) -> ResyncBase {
    match (replica.map_lost(), replica.is_mixed()) {
        (true, _) => ResyncBase::Empty,
        // What has begun in place goes on in place.
        (false, true) => ResyncBase::InPlace(sequence),
        (false, false) => ResyncBase::Applied,
    }
}

/// A difference on its way into a replica.
pub(crate) struct Incoming<E: Env> {
    resync: Resync<E>,
    base: ResyncBase,
    /// What the replica had applied when it began.
    applied: Option<LogId>,
    reach: Reach,
    /// The view that was pulled last.
    sequence: Sequence,
    /// If nothing goes on with it until then, it is dropped.
    kept_until: Instant,
}

impl<E: Env> Incoming<E> {
    async fn begin(
        replica: &Replica<E>,
        base: ResyncBase,
        sequence: Sequence,
    ) -> Result<Self, PeerError> {
        let resync = replica.resync(base).await.map_err(refused)?;
        let (reach, applied) = (Reach::new(resync.since()), replica.applied());
        Ok(Self { resync, base, applied, reach, sequence, kept_until: Instant(0) })
    }
}

/// Keeps what arrived of a difference that broke. In place it is in the replica's map already.
fn keep<E: Env>(
    inner: &Inner<E>,
    replica: &Replica<E>,
    mut incoming: Incoming<E>,
    error: &PeerError,
) {
    tracing::warn!(replica = %replica.id(), %error, reach = ?incoming.reach, "the difference broke");
    if !incoming.resync.is_in_place() {
        incoming.kept_until = inner.env.now().after(KEPT_MAX);
        inner.broken.borrow_mut().insert(replica.id(), incoming);
    }
}

/// The difference that broke, if the one to `to` can go on with it.
fn go_on<E: Env>(inner: &Inner<E>, replica: &Replica<E>, to: Sequence) -> Option<Incoming<E>> {
    let mut kept = inner.broken.borrow_mut().remove(&replica.id())?;
    // A new leader may not have applied all that was put aside: it would be there before its time.
    // And what the log brought meanwhile would be here twice.
    if kept.sequence > to || kept.applied != replica.applied() {
        return None;
    }
    kept.sequence = to;
    Some(kept)
}

/// Lets go of what broken differences left behind and nobody goes on with.
pub(crate) fn drop_stale<E: Env>(inner: &Inner<E>) {
    let now = inner.env.now();
    let full = inner.pool.room().full;
    inner.broken.borrow_mut().retain(|replica, kept| {
        let keep = now < kept.kept_until && !full;
        if !keep {
            tracing::info!(%replica, "nothing goes on with a broken difference: dropped");
        }
        keep
    });
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
    /// What the view goes to.
    sequence: Sequence,
    /// Payload that came, in bytes.
    bytes: &'a Cell<u64>,
}

impl<E: Env> Pulling<'_, E> {
    async fn all(&self, incoming: &mut Incoming<E>) -> Result<(), Stopped> {
        if incoming.resync.is_in_place() {
            // What was trimmed makes room for what was written.
            self.holes(&incoming.resync).await?;
        }
        let mut is_first = true;
        while let Some(gap) = incoming.reach.gap(self.sequence) {
            let page = self.page(gap, is_first, false).await?;
            is_first = false;
            let more = page_bytes(&page);
            self.bytes.set(self.bytes.get() + more);
            meters::add(&self.inner.meters.resync_received, more);
            incoming.resync.put(page.records).await.map_err(Stopped::NotTaken)?;
            incoming.reach.filled(gap, page.next, self.sequence);
        }
        Ok(())
    }

    async fn holes(&self, resync: &Resync<E>) -> Result<(), Stopped> {
        let mut gap = Gap { from: 0, end: None, since: resync.since() };
        loop {
            let mut page = self.page(gap, gap.from == 0, true).await?;
            // An older sender gives everything.
            page.records.retain(|record| record.change == DiffChange::Hole);
            resync.put(page.records).await.map_err(Stopped::NotTaken)?;
            match page.next {
                Some(next) => gap.from = next,
                None => return Ok(()),
            }
        }
    }

    async fn page(&self, gap: Gap, is_first: bool, holes: bool) -> Result<DiffPage, Stopped> {
        let Gap { from: from_block, since, .. } = gap;
        let ask = DifferenceV1 { transfer: self.transfer, since: since.0, from_block, holes };
        match self.pull(ask).await {
            Err(PeerError::Refused(reason)) if is_first && since > Sequence(0) => {
                Err(Stopped::NoDifference(reason))
            }
            page => page.map_err(Stopped::Peer),
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

/// Gives a page of a view that a peer pulls. What is damaged of it here is first mended from others.
pub(crate) async fn page<E: Env>(
    inner: &Rc<Inner<E>>,
    ask: DifferenceV1,
) -> Result<DiffPage, PeerError> {
    let pin = inner.transfers.get(ask.transfer).ok_or_else(|| refused("transfer is over"))?;
    let replica = pin.replica();
    let since = Sequence(ask.since);
    let mut rounds = 0;
    loop {
        let page = match ask.holes {
            true => replica.diff_holes(&pin, since, ask.from_block, PAGE_BYTES_MAX).await,
            false => replica.diff(&pin, since, ask.from_block, PAGE_BYTES_MAX).await,
        };
        let damaged = match page {
            Ok(page) => {
                meters::add(&inner.meters.resync_sent, page_bytes(&page));
                return Ok(page);
            }
            Err(ReadError::Damaged { blocks, .. }) if rounds < REPAIR_ROUNDS_MAX => blocks,
            Err(error) => return Err(refused(ResyncError::Read(error))),
        };
        rounds += 1;
        if !families::mend_blocks(inner, replica, damaged.clone()).await {
            let error = ReadError::Damaged { replica: replica.id(), blocks: damaged };
            return Err(refused(ResyncError::Read(error)));
        }
    }
}

/// Differences that a node had to do with since its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resyncs {
    /// Bytes that its replicas pulled.
    pub received: u64,
    /// Bytes that peers pulled from it.
    pub sent: u64,
    /// Differences that were installed here.
    pub installed: u64,
}

impl<E: Env> Node<E> {
    /// Differences so far.
    pub fn resyncs(&self) -> Resyncs {
        let meters = &self.inner.meters;
        Resyncs {
            received: meters.resync_received.get(),
            sent: meters.resync_sent.get(),
            installed: meters.resyncs.get(),
        }
    }

    /// Bytes that wait in the longest queue to a peer.
    pub fn peer_queue_bytes(&self) -> u64 {
        self.inner.links.queued_bytes_max() as u64
    }
}
