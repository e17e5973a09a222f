//! Leases as an administrator asks for them: decided by the cluster group, then taken over by the
//! volume's own group, which fences by them.
//!
//! Never decides who gets one (`cluster`), nor what is refused under one (`volume`). For a node of
//! the volume's shard.

use std::time::Duration;

use ballast_block::{Epoch, VolumeId};
use ballast_cluster::{AcquireLease, Command, Lease, LeaseMode, Volume, VolumePhase};
use ballast_env::Env;
use ballast_env::planted::PlantedBug;
use ballast_volume::content::Content;

use crate::admin::AdminError;
use crate::leases::{self, ContentReply};
use crate::node::Node;

/// Longest wait until this node knows what the cluster group has decided.
const HEARD_MAX: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(5);

/// Longest that the end of a lease is waited for where the volume's group has to hear of it. It is
/// ended before: no other lease is granted that the group does not take over together with that.
const RELEASED_MAX: Duration = Duration::from_secs(3);

/// What is asked of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseAsk {
    /// Who is to use the volume.
    pub host: String,
    /// How, and beside whom.
    pub mode: LeaseMode,
    /// Whether its writes are to be refused.
    pub read_only: bool,
    /// Take it from the hosts that stand in the way, for this reason.
    pub by_force: Option<String>,
    /// The revision of the volume's leases that the asker goes by: it gets no lease where others have
    /// been there since. None = whatever happened meanwhile.
    pub seen_revision: Option<u64>,
}

impl<E: Env> Node<E> {
    /// As [`Node::acquire_lease_of`], of the volume of that name or id.
    ///
    /// # Errors
    /// As that.
    pub async fn acquire_lease(
        &self,
        name_or_id: &str,
        ask: LeaseAsk,
    ) -> Result<(Volume, Lease), AdminError> {
        self.acquire_lease_of(self.find_volume(name_or_id)?.id, ask).await
    }

    /// Lets a host use a volume. When this returns, no write under a lease that had to make place is
    /// applied any more, on any replica.
    ///
    /// # Errors
    /// [`AdminError`]; [`AdminError::NotHeard`] and [`AdminError::NotTaken`] when the lease is
    /// granted and not in force yet, [`AdminError::LeaseGone`] when it was, and another host has it.
    pub async fn acquire_lease_of(
        &self,
        volume: VolumeId,
        ask: LeaseAsk,
    ) -> Result<(Volume, Lease), AdminError> {
        let LeaseAsk { host, mode, read_only, by_force, seen_revision } = ask;
        let command = Command::AcquireLease(AcquireLease {
            volume,
            host: host.clone(),
            mode,
            read_only,
            force: by_force.is_some(),
            reason: by_force.unwrap_or_default(),
            at_ms: self.inner.env.wall_ms(),
            unique_epoch: !self.inner.env.is_planted(PlantedBug::EpochsAnew),
            seen_revision,
        });
        let volume = self.propose_about_volume(&command).await?;
        let lease = volume.lease(&host).cloned();
        let lease = lease.ok_or_else(|| AdminError::NotHeard(volume.name.clone()))?;
        // Taking it over takes time. A lease that was forced away meanwhile was granted, and is gone:
        // the volume's group says so, whatever this node has heard.
        let in_force = self.take_over_under(&volume, lease.epoch).await?;
        let known = self.cluster_state().volume(volume.id).cloned();
        if in_force && known.is_some_and(|it| it.lease_of_epoch(lease.epoch).is_some()) {
            Ok((volume, lease))
        } else {
            Err(AdminError::LeaseGone { volume: volume.name, host })
        }
    }

    /// As [`Node::release_lease_of`], of the volume of that name or id.
    ///
    /// # Errors
    /// As that.
    pub async fn release_lease(
        &self,
        name_or_id: &str,
        host: &str,
        epoch: Epoch,
        seen_revision: Option<u64>,
    ) -> Result<bool, AdminError> {
        self.release_lease_of(&self.find_volume(name_or_id)?, host, epoch, seen_revision).await
    }

    /// Ends a host's lease, or only the one with that epoch; 0 = whichever it has. With a revision of
    /// the volume's leases only if that is the one now; what was asked at it before is then refused
    /// when it comes. Answers whether there was one in `before`: the volume as it was known before.
    ///
    /// # Errors
    /// [`AdminError`]. None because the volume's group did not hear of it in time.
    pub async fn release_lease_of(
        &self,
        before: &Volume,
        host: &str,
        epoch: Epoch,
        seen_revision: Option<u64>,
    ) -> Result<bool, AdminError> {
        let held = before.lease(host).map(|lease| lease.epoch);
        let (id, name) = (before.id, host.to_owned());
        let command = Command::ReleaseLease { volume: id, host: name, epoch, seen_revision };
        let volume = self.propose_about_volume(&command).await?;
        if volume.phase == VolumePhase::Ready {
            let taken_over = tokio::select! {
                biased;
                taken_over = self.take_over(&volume) => taken_over,
                () = self.inner.env.sleep(RELEASED_MAX) => Ok(()),
            };
            if let Err(error) = taken_over {
                tracing::info!(volume = volume.name, host, %error, "lease ended, not taken over yet");
            }
        }
        Ok(held.is_some_and(|held| volume.lease_of_epoch(held).is_none()))
    }

    /// Says what a volume holds, under a lease (0 = as an administrator), or asks only: [`Content`].
    ///
    /// # Errors
    /// [`AdminError`]; [`LeaseError::NotLeased`](leases::LeaseError::NotLeased) in it for a lease that
    /// is not in force when the volume's log comes to it.
    pub async fn set_volume_content(
        &self,
        volume: &Volume,
        content: Option<Content>,
        epoch: Epoch,
    ) -> Result<ContentReply, AdminError> {
        self.hear_of(volume).await?;
        Ok(leases::set_content(&self.inner, volume.id, content, epoch).await?)
    }

    /// Has the volume's group take over what the cluster group decided.
    pub(crate) async fn take_over(&self, volume: &Volume) -> Result<(), AdminError> {
        self.take_over_under(volume, Epoch(0)).await.map(drop)
    }

    /// The same; answers whether that lease is in force there.
    async fn take_over_under(&self, volume: &Volume, epoch: Epoch) -> Result<bool, AdminError> {
        self.hear_of(volume).await?;
        Ok(leases::install(&self.inner, volume.id, epoch).await?)
    }

    /// Waits until this shard knows the volume, its size and its leases as they were decided: another
    /// shard of the node, or another node, may have heard of them before.
    async fn hear_of(&self, volume: &Volume) -> Result<(), AdminError> {
        let env = &self.inner.env;
        let end = env.now().after(HEARD_MAX);
        let is_heard = |known: &Volume| {
            known.lease_revision >= volume.lease_revision && known.size_bytes >= volume.size_bytes
        };
        loop {
            if self.cluster_state().volume(volume.id).is_some_and(is_heard) {
                return Ok(());
            }
            if env.now() >= end {
                return Err(AdminError::NotHeard(volume.name.clone()));
            }
            env.sleep(POLL).await;
        }
    }
}
