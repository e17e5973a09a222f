//! Leases, and sizes, on their way from the cluster group into the families' own logs.
//!
//! The cluster group decides who holds a lease; a family fences by what its own log says (hazard
//! F10), and checks writes against the size that it says. Owns the way between the two: the leader
//! proposes what the cluster knows, when it is asked, when somebody attaches under a lease that it has
//! not heard of, and in each round of `reconcile`.
//! Never decides about a lease. Write path, before step 3.

use std::rc::Rc;
use std::time::Duration;

use ballast_block::{Epoch, FamilyId, NodeId, VolumeId};
use ballast_cluster::{Lease, LeaseMode, Volume};
use ballast_env::Env;
use ballast_env::planted::PlantedBug;
use ballast_volume::command::{
    FamilyCommand, FamilyReplyV1, GrantV1, ResizeV1, SetContentUnderV1, SetContentV1, SetLeasesV1,
    refusal,
};
use ballast_volume::content::Content;
use ballast_volume::family::{ExecuteError, Family};
use bytes::Bytes;
use thiserror::Error;

use crate::attach::{self, DONE, NOT_LEADER, STOPPED};
use crate::calls::{ContentAskV1, ContentReplyV1, InstallLeasesV1, Tag, decode};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// Longest that an administrator waits for a family to take its leases or content over: an election
/// and some.
const INSTALL_MAX: Duration = Duration::from_secs(10);
/// Longest wait for one answer of one node.
const ATTEMPT_MAX: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How much later than another node this one may know what the cluster group has decided.
pub(crate) const COPY_LAG_MAX: Duration = Duration::from_secs(1);

/// Whether an export needs a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeasePolicy {
    /// Always.
    Required,
    /// Whoever connects may use a volume that has no lease, and read any: for development.
    Optional,
}

/// Why a family did not take over what it was told.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LeaseError {
    /// There is no such volume.
    #[error("there is no volume {0}: see the list of volumes")]
    VolumeUnknown(VolumeId),
    /// No leader answered in time. What the cluster group has decided stands: asked again, it goes on.
    #[error("volume {0:?} has no quorum of replicas: check its nodes, then ask again")]
    NoQuorum(String),
    /// What was said of a volume's content was said by who may not write to it.
    #[error(
        "lease {} of volume {volume:?} is not in force, or only reads: what it says of the content \
         is not taken", .epoch.0
    )]
    NotLeased {
        /// The volume's name.
        volume: String,
        /// The lease.
        epoch: Epoch,
    },
}

/// What a volume holds, as its own record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentReply {
    /// It holds something else, and was left as it is.
    pub refused: bool,
    /// What it holds.
    pub content: Content,
    /// Whether anything was ever written to it.
    pub ever_written: bool,
}

/// What is asked of a family's leader.
enum Ask {
    Install(InstallLeasesV1),
    Content(ContentAskV1),
}

impl Ask {
    fn body(&self) -> Bytes {
        match self {
            Ask::Install(ask) => Tag::InstallLeases.message(ask),
            Ask::Content(ask) => Tag::Content.message(ask),
        }
    }
}

/// Has the family's leader take the leases and the size over that the cluster group knows. When this
/// returns, no write under an earlier lease is applied any more, and writes up to the size are.
/// Answers whether `epoch` is in force then: the family may know of its end before this node does.
///
/// # Errors
/// [`LeaseError`].
pub(crate) async fn install<E: Env>(
    inner: &Rc<Inner<E>>,
    volume: VolumeId,
    epoch: Epoch,
) -> Result<bool, LeaseError> {
    let known = inner.cluster.state().volume(volume).cloned();
    let known = known.ok_or(LeaseError::VolumeUnknown(volume))?;
    let (revision, size) = (known.lease_revision, known.size_bytes);
    let ask = InstallLeasesV1 { revision, size, epoch: epoch.0, cluster_revision: 0 };
    at_leader(inner, &known, &Ask::Install(ask)).await.map(|reply| !reply.not_leased)
}

/// Asks a node that leads a family to have heard what the cluster group has decided, as far as this one
/// has, or else to hand the lead to a member that may have. Best effort.
pub(crate) async fn ask_to_hear<E: Env>(inner: &Rc<Inner<E>>, leader: NodeId, family: FamilyId) {
    let cluster_revision = inner.cluster.state().revision();
    let what = Ask::Install(InstallLeasesV1 { cluster_revision, ..InstallLeasesV1::default() });
    ask(inner, leader, family, &what).await;
}

/// Says what a volume holds, under a lease (0 = as an administrator), or asks only. Guarantee
/// **never-format-data**: nobody formats without having been let become [`Content::Formatting`] first.
///
/// # Errors
/// [`LeaseError`].
pub(crate) async fn set_content<E: Env>(
    inner: &Rc<Inner<E>>,
    volume: VolumeId,
    content: Option<Content>,
    epoch: Epoch,
) -> Result<ContentReply, LeaseError> {
    let known = inner.cluster.state().volume(volume).cloned();
    let known = known.ok_or(LeaseError::VolumeUnknown(volume))?;
    let SetContentV1 { kind, fs_type } = content.as_ref().map(SetContentV1::of).unwrap_or_default();
    let ask = ContentAskV1 { kind, fs_type, epoch: epoch.0 };
    let reply = at_leader(inner, &known, &Ask::Content(ask)).await?;
    if reply.not_leased {
        return Err(LeaseError::NotLeased { volume: known.name, epoch });
    }
    let content = Content::from_kind(reply.content, &reply.fs_type);
    // A leader of a newer version: as long as nobody knows what it is, it is not to be formatted.
    let content = content.unwrap_or(Content::Raw);
    Ok(ContentReply { refused: reply.refused, content, ever_written: reply.ever_written })
}

/// Asks the leader of a volume, whoever that is.
async fn at_leader<E: Env>(
    inner: &Rc<Inner<E>>,
    volume: &Volume,
    what: &Ask,
) -> Result<ContentReplyV1, LeaseError> {
    let end = inner.env.now().after(INSTALL_MAX);
    let mut hint = None;
    for turn in 0.. {
        let target = hint.take().or_else(|| likely_leader(inner, volume.family, turn));
        if let Some(target) = target {
            match ask(inner, target, volume.family, what).await {
                Some(reply) if reply.code == DONE => return Ok(reply),
                Some(reply) if reply.node != 0 => hint = Some(NodeId(reply.node)),
                _ => {}
            }
        }
        if inner.env.now() >= end || *inner.stopping.borrow() {
            break;
        }
        inner.env.sleep(RETRY_PAUSE).await;
    }
    Err(LeaseError::NoQuorum(volume.name.clone()))
}

/// Who this node believes to lead, then each node that has a replica in turn.
fn likely_leader<E: Env>(inner: &Inner<E>, family: FamilyId, turn: usize) -> Option<NodeId> {
    let own = inner.families.borrow().get(&family).and_then(|family| family.group().leader_node());
    let state = inner.cluster.state();
    let nodes: Vec<NodeId> = state.replicas_of(family).map(|replica| replica.node).collect();
    let in_turn = nodes.get(turn % nodes.len().max(1)).copied();
    own.filter(|_| turn.is_multiple_of(2)).or(in_turn)
}

async fn ask<E: Env>(
    inner: &Rc<Inner<E>>,
    target: NodeId,
    family: FamilyId,
    what: &Ask,
) -> Option<ContentReplyV1> {
    if target == inner.config.node {
        return Some(match what {
            Ask::Install(ask) => install_here(inner, family, *ask).await,
            Ask::Content(ask) => content_here(inner, family, ask.clone()).await,
        });
    }
    let frame = Frame { family, ..Frame::plain(Kind::Call, 0, what.body()) };
    let reply = inner.links.call(target, Lane::Control, frame, ATTEMPT_MAX).await.ok()?;
    decode(reply.body).ok()
}

/// Takes over at least that revision of the leases and that size, if this node leads the family.
pub(crate) async fn install_here<E: Env>(
    inner: &Rc<Inner<E>>,
    family: FamilyId,
    ask: InstallLeasesV1,
) -> ContentReplyV1 {
    let Some(member) = family_here(inner, family) else { return stopped() };
    if member.group().leading_term().is_none() {
        return not_leader(member.group().leader_node());
    }
    // The asker may have heard of it before this node.
    let has_heard = |state: &ballast_cluster::ClusterState| {
        state.revision() >= ask.cluster_revision
            && state.volume_of_family(family).is_none_or(|known| {
                known.lease_revision >= ask.revision && known.size_bytes >= ask.size
            })
    };
    hear(inner, has_heard).await;
    if !has_heard(&inner.cluster.state()) {
        // Not one that only lags: it does not hear the cluster group. Another member may.
        let heir = attach::pass_lead_on(inner, member.group()).await;
        tracing::warn!(%family, ?heir, "leads, and does not hear what was decided: hands over");
        return not_leader(heir);
    }
    let brought_up = match bring_up(inner, &member).await {
        // What a leader that was deposed knows of a lease may be over.
        Ok(()) if ask.epoch != 0 => member.group().pass().await.map(drop).map_err(Into::into),
        brought_up => brought_up,
    };
    let state = member.state();
    let is_there = state.leases().revision() >= ask.revision && state.size() >= ask.size;
    match brought_up {
        Ok(()) if is_there => {
            let epoch = Epoch(ask.epoch);
            let not_leased = epoch != Epoch(0) && state.leases().grant(epoch).is_none();
            ContentReplyV1 { not_leased, ..ContentReplyV1::default() }
        }
        Ok(()) => stopped(),
        Err(error) => failed(&error),
    }
}

/// Answers what the volume holds, and makes it what is asked if that destroys nothing, if this node
/// leads the family.
pub(crate) async fn content_here<E: Env>(
    inner: &Rc<Inner<E>>,
    family: FamilyId,
    ask: ContentAskV1,
) -> ContentReplyV1 {
    let Some(member) = family_here(inner, family) else { return stopped() };
    if ask.kind != 0 {
        if Content::from_kind(ask.kind, &ask.fs_type).is_none() {
            return stopped();
        }
        return match say(inner, &member, ask).await {
            Ok(reply) => ContentReplyV1 {
                refused: reply.refused,
                not_leased: reply.why == refusal::NOT_LEASED,
                content: reply.content,
                fs_type: reply.fs_type,
                ever_written: reply.ever_written,
                ..ContentReplyV1::default()
            },
            Err(error) => failed(&error),
        };
    }
    if let Err(shut) = member.group().pass().await {
        return failed(&shut.into());
    }
    let state = member.state();
    let (content, ever_written) = state.content();
    ContentReplyV1 {
        content: content.kind(),
        fs_type: content.fs_type().to_owned(),
        ever_written,
        ..ContentReplyV1::default()
    }
}

/// Proposes what a volume holds. The log decides whether the lease is in force then.
async fn say<E: Env>(
    inner: &Rc<Inner<E>>,
    member: &Family<E>,
    ask: ContentAskV1,
) -> Result<FamilyReplyV1, ExecuteError> {
    let ContentAskV1 { kind, fs_type, epoch } = ask;
    let content = Some(SetContentV1 { kind, fs_type });
    if epoch != 0 {
        // The holder may have heard of its lease before this node.
        is_in_force(inner, member, Epoch(epoch)).await?;
    }
    let said = SetContentUnderV1 { content, epoch };
    if inner.env.is_planted(PlantedBug::LooseFormatting) && epoch != 0 {
        return member.control(FamilyCommand::SetContentUnder(said)).await;
    }
    member.control(FamilyCommand::SayContent(said)).await
}

/// Proposes the size and the leases that this node knows of, where the family has older ones. For
/// the leader.
pub(crate) async fn bring_up<E: Env>(
    inner: &Inner<E>,
    family: &Family<E>,
) -> Result<(), ExecuteError> {
    let id = family.group().replica().family();
    let known = inner.cluster.state().volume_of_family(id).cloned();
    let Some(volume) = known else { return Ok(()) };
    if family.state().size() < volume.size_bytes {
        let resize = FamilyCommand::Resize(ResizeV1 { size: volume.size_bytes });
        family.control(resize).await?;
    }
    if family.state().leases().revision() < volume.lease_revision {
        let grants = volume.leases.iter().map(grant).collect();
        let leases = SetLeasesV1 { revision: volume.lease_revision, grants };
        family.control(FamilyCommand::SetLeases(leases)).await?;
    }
    Ok(())
}

/// Whether the family knows that lease, once it has heard what the cluster group decided. For the
/// leader, before it takes an attachment.
pub(crate) async fn is_in_force<E: Env>(
    inner: &Rc<Inner<E>>,
    family: &Family<E>,
    epoch: Epoch,
) -> Result<bool, ExecuteError> {
    let id = family.group().replica().family();
    if family.state().leases().grant(epoch).is_some() {
        return Ok(true);
    }
    hear(inner, |state| state.volume_of_family(id).is_some_and(|known| known.last_epoch >= epoch))
        .await;
    bring_up(inner, family).await?;
    Ok(family.state().leases().grant(epoch).is_some())
}

/// Waits until the state of the cluster group as it is known here is such, for as long as it may
/// lag.
async fn hear<E: Env>(inner: &Inner<E>, such: impl Fn(&ballast_cluster::ClusterState) -> bool) {
    let heard = async {
        let mut changes = inner.cluster.changes();
        while !such(&inner.cluster.state()) && changes.next().await {}
    };
    tokio::select! {
        biased;
        () = heard => {}
        () = inner.env.sleep(COPY_LAG_MAX) => {}
    }
}

fn grant(lease: &Lease) -> GrantV1 {
    GrantV1 {
        epoch: lease.epoch.0,
        writes: !lease.read_only,
        shared: matches!(lease.mode, LeaseMode::Readers | LeaseMode::Writers),
    }
}

fn family_here<E: Env>(inner: &Inner<E>, family: FamilyId) -> Option<Family<E>> {
    inner.families.borrow().get(&family).cloned()
}

fn stopped() -> ContentReplyV1 {
    ContentReplyV1 { code: STOPPED, ..ContentReplyV1::default() }
}

fn not_leader(hint: Option<NodeId>) -> ContentReplyV1 {
    let node = hint.map_or(0, |node| node.0);
    ContentReplyV1 { code: NOT_LEADER, node, ..ContentReplyV1::default() }
}

fn failed(error: &ExecuteError) -> ContentReplyV1 {
    match error {
        ExecuteError::NotLeader { hint } => not_leader(*hint),
        _ => stopped(),
    }
}
