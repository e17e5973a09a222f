//! What hosts and administrators ask of nodes by the administration interface: of a random one, for as
//! long as they have patience. The node goes on with it when nobody waits any more.

use std::time::Duration;

use ballast_block::{Epoch, ShardId, VolumeId};
use ballast_cluster::{LeaseMode, Volume};
use ballast_env::clock::Clock;
use ballast_node::admin::AdminError;
use ballast_node::content::Content;
use ballast_node::leases::ContentReply;
use ballast_node::leasing::LeaseAsk;
use ballast_node::node::Node;

use super::{Claim, Life, PATIENCE_MS};
use crate::env::SimEnv;
use crate::rng::Rng;
use crate::system::System;

/// Who asks, and for how long.
pub(super) struct Asking<'a> {
    pub(super) env: &'a SimEnv,
    pub(super) rng: &'a Rng,
    pub(super) patience_ms: u64,
}

impl Asking<'_> {
    async fn wait<T>(&self, answer: impl Future<Output = Option<T>>) -> Option<T> {
        tokio::select! {
            biased;
            answer = answer => answer,
            () = self.env.sleep(Duration::from_millis(self.patience_ms)) => None,
        }
    }
}

impl Claim {
    /// Asks the first shard of a node.
    async fn ask<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        asking: &Asking<'_>,
        call: impl FnOnce(Node<SimEnv>) -> F,
    ) -> Option<T> {
        let through = self.ballast.any_node(asking.rng);
        asking.wait(self.ballast.call(&self.world, through, ShardId(0), call)).await
    }

    /// Asks the shard of a node that has the volume; one that does not know it does not answer.
    async fn ask_about<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        asking: &Asking<'_>,
        volume: VolumeId,
        call: impl FnOnce(Node<SimEnv>, Volume) -> F,
    ) -> Option<T> {
        let through = self.ballast.any_node(asking.rng);
        let known = self.ballast.known_to(through, volume)?;
        let shard = known.shard;
        let call = |node: Node<SimEnv>| call(node, known);
        asking.wait(self.ballast.call(&self.world, through, shard, call)).await
    }

    /// The volume of the name, made if there is none. One of another size is what somebody asked for late
    /// who had asked before the last deletion: nobody uses it, and it is deleted.
    pub(super) async fn create(&self, env: &SimEnv, bytes: u64) -> Option<VolumeId> {
        let asking = Asking { env, rng: &self.rng, patience_ms: PATIENCE_MS };
        let (name, replicas) = (self.name(), self.ballast.volumes()[0].replicas);
        let created = self.ask(&asking, move |node| async move {
            let error = match node.create_volume(&name, bytes, replicas).await {
                Ok(volume) => return Some(volume.id),
                Err(error) => error,
            };
            let other = node.find_volume(&name).ok().filter(|other| other.size_bytes != bytes);
            if matches!(error, AdminError::Refused(_))
                && let Some(other) = other
            {
                // A failure is tried again with the creation.
                let _ = node.delete_volume(&other.id.to_string()).await;
            }
            None
        });
        created.await.flatten()
    }

    /// Whether the volume is deleted for certain. Ends its leases first, by force.
    pub(super) async fn delete(&self, env: &SimEnv, volume: VolumeId) -> bool {
        let asking = Asking { env, rng: &self.rng, patience_ms: PATIENCE_MS };
        let released = self.ask_about(&asking, volume, |node, volume| async move {
            for lease in &volume.leases {
                // What remains leased can't be deleted.
                let _ = node.release_lease_of(&volume, &lease.host, lease.epoch, None).await;
            }
        });
        released.await;
        let deleted = self
            .ask(&asking, move |node| async move { node.delete_volume(&volume.to_string()).await });
        matches!(deleted.await, Some(Ok(_)))
    }

    /// Takes the lease, by force or not; answers its epoch once it is in force.
    pub(super) async fn take_lease(
        &self,
        asking: &Asking<'_>,
        life: &Life,
        host: &str,
        force: bool,
    ) -> Option<Epoch> {
        let ask = LeaseAsk {
            host: host.to_owned(),
            mode: LeaseMode::SingleNodeWriter,
            read_only: false,
            by_force: force.then(|| "it moves".to_owned()),
            seen_revision: None,
        };
        let taken = self.ask_about(asking, life.id, |node, volume| async move {
            node.acquire_lease_of(volume.id, ask).await
        });
        taken.await?.ok().map(|(_, lease)| lease.epoch)
    }

    /// Gives the lease of that epoch back, if somebody hears it.
    pub(super) async fn release(&self, asking: &Asking<'_>, life: &Life, host: &str, epoch: Epoch) {
        let host = host.to_owned();
        let released = self.ask_about(asking, life.id, |node, volume| async move {
            let _ = node.release_lease_of(&volume, &host, epoch, None).await;
        });
        released.await;
    }

    /// Says what the volume holds, under a lease or without (0).
    pub(super) async fn say(
        &self,
        asking: &Asking<'_>,
        life: &Life,
        content: Content,
        epoch: Epoch,
    ) -> Option<Result<ContentReply, AdminError>> {
        let said = self.ask_about(asking, life.id, |node, volume| async move {
            node.set_volume_content(&volume, Some(content), epoch).await
        });
        said.await
    }
}
