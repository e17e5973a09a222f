//! ControllerPublishVolume and ControllerUnpublishVolume: leases.
//!
//! A lease is granted when the volume's replicas fence by it: from then on a holder that lost it can
//! write nothing more. What the node needs to attach goes into the publish context.
//!
//! A daemon goes on with a request for seconds after its caller has gone, and the caller asks another
//! one. So each request names what it goes by (the revision of the volume's leases, the epoch that is
//! given back), and what is overtaken does nothing however late it comes.

use std::collections::BTreeMap;

use ballast_api::{Client, v1 as api};
use tonic::Code;

use super::{ControllerService, Hosts};
use crate::cluster::Asking;
use crate::context::{Address, PublishContext};
use crate::error::{Refusal, required};
use crate::modes;
use crate::steps::{self, Step};
use crate::v1::{
    ControllerPublishVolumeRequest, ControllerPublishVolumeResponse,
    ControllerUnpublishVolumeRequest, ControllerUnpublishVolumeResponse,
};

impl ControllerService {
    /// Takes a lease for the host.
    pub(super) async fn publish(
        &self,
        asking: &Asking,
        request: &ControllerPublishVolumeRequest,
    ) -> Result<ControllerPublishVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let host = required("node_id", &request.node_id)?;
        let wanted = modes::parse(request.volume_capability.as_ref())?;
        let _held = self.locks.hold(id)?;
        let list =
            |client: Client| async move { client.list_nodes(api::ListNodesRequest {}).await };
        let nodes = asking.ask(list).await?.nodes;
        self.check_host(host, &nodes)?;
        let acquire = api::AcquireLeaseRequest {
            volume: id.to_owned(),
            host: host.to_owned(),
            mode: wanted.lease as i32,
            read_only: wanted.read_only || request.readonly,
            force: false,
            reason: String::new(),
            seen_lease_revision: None,
        };
        let (answer, replicas) = take_lease(asking, acquire).await?;
        steps::reached(Step::LeaseTaken);
        let lease = answer.lease.ok_or(Refusal::AnswerIncomplete("lease"))?;
        let volume = answer.volume.ok_or(Refusal::AnswerIncomplete("volume"))?;
        let context = PublishContext {
            volume: volume.name.clone(),
            epoch: lease.epoch,
            mode: lease.mode(),
            read_only: lease.read_only,
            addresses: addresses(host, volume.leader_node, &replicas, &nodes, self.nbd_port),
        };
        Ok(ControllerPublishVolumeResponse { publish_context: context.to_map() })
    }

    fn check_host(&self, host: &str, nodes: &[api::Node]) -> Result<(), Refusal> {
        let known = match &self.hosts {
            Hosts::Any => true,
            Hosts::Known(more) => more.contains(host) || nodes.iter().any(|n| n.name == host),
        };
        if known { Ok(()) } else { Err(Refusal::HostUnknown(host.to_owned())) }
    }

    /// Gives the host's lease back, or all of the volume's when no host is named.
    pub(super) async fn unpublish(
        &self,
        asking: &Asking,
        request: &ControllerUnpublishVolumeRequest,
    ) -> Result<ControllerUnpublishVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let _held = self.locks.hold(id)?;
        let volume = match asking.volume_now(id).await {
            // What is gone is published nowhere.
            Err(Refusal::VolumeUnknown(_)) => None,
            found => Some(found?.0),
        };
        for (host, epoch) in volume.iter().flat_map(|volume| to_end(volume, &request.node_id)) {
            give_back(asking, id, host, epoch).await?;
        }
        steps::reached(Step::LeaseReleased);
        Ok(ControllerUnpublishVolumeResponse {})
    }
}

/// Takes a lease, and answers with the volume's replicas, too. If the leases change meanwhile, another
/// controller may be in charge by now: then the caller decides whether this is still wanted.
async fn take_lease(
    asking: &Asking,
    mut acquire: api::AcquireLeaseRequest,
) -> Result<(api::AcquireLeaseResponse, Vec<api::Replica>), Refusal> {
    let (volume, replicas) = asking.volume_now(&acquire.volume).await?;
    acquire.seen_lease_revision = volume.lease_revision;
    let take = |client: Client| {
        let acquire = acquire.clone();
        async move { client.acquire_lease(acquire).await }
    };
    Ok((asking.ask(take).await?, replicas))
}

/// What is to end, as it was when the call came: the host's lease, or all that there are if no host is
/// named. With a host it is asked without a lease, too, of whichever it has (epoch 0): a request for one
/// may be on its way, and is refused after this.
fn to_end<'a>(volume: &'a api::Volume, host: &'a str) -> Vec<(&'a str, u64)> {
    let leases = volume.leases.iter().filter(|lease| host.is_empty() || lease.host == host);
    let found: Vec<_> = leases.map(|lease| (lease.host.as_str(), lease.epoch)).collect();
    if found.is_empty() && !host.is_empty() { vec![(host, 0)] } else { found }
}

/// Gives this lease back, and none that the host was granted after the call came.
async fn give_back(asking: &Asking, id: &str, host: &str, epoch: u64) -> Result<(), Refusal> {
    loop {
        let volume = match asking.volume_now(id).await {
            Err(Refusal::VolumeUnknown(_)) => return Ok(()),
            found => found?.0,
        };
        if epoch == 0 && volume.leases.iter().any(|lease| lease.host == host) {
            return Err(Refusal::LeasesChanged(volume.name));
        }
        let seen_lease_revision = volume.lease_revision;
        let (volume, host) = (volume.id, host.to_owned());
        let release = api::ReleaseLeaseRequest { volume, host, epoch, seen_lease_revision };
        let give_back = |client: Client| {
            let release = release.clone();
            async move { client.release_lease(release).await }
        };
        match asking.ask(give_back).await {
            Err(refusal) if refusal.code() == Code::Aborted && asking.pause().await => {}
            answer => return answer.map(drop),
        }
    }
}

/// Where the volume is served, the best first: on the host itself, by its leader, by its other
/// replicas, by the rest. A node tells its peers where it is, and serves NBD there too.
fn addresses(
    host: &str,
    leader: u32,
    replicas: &[api::Replica],
    nodes: &[api::Node],
    nbd_port: u16,
) -> Vec<Address> {
    let mut ranked = BTreeMap::new();
    for node in nodes {
        let Some((name, _)) = node.peer_address.rsplit_once(':') else { continue };
        let Ok(address) = Address::parse(&format!("{name}:{nbd_port}")) else { continue };
        let rank = if node.name == host {
            0
        } else if node.id == leader {
            1
        } else if replicas.iter().any(|replica| replica.node == node.id) {
            2
        } else {
            3
        };
        ranked.insert((rank, node.id), address);
    }
    ranked.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_address_comes_first_and_nodes_without_one_not_at_all() {
        let node = |id: u32, name: &str, peer_address: &str| api::Node {
            id,
            name: name.to_owned(),
            peer_address: peer_address.to_owned(),
            ..Default::default()
        };
        let nodes = [
            node(1, "a", "10.0.0.1:7500"),
            node(2, "b", "10.0.0.2:7500"),
            node(3, "c", ""),
            node(4, "d", "10.0.0.4:7500"),
            node(5, "e", "[fd00::5]:7500"),
        ];
        let replica = |node| api::Replica { node, ..Default::default() };
        let replicas = [replica(2), replica(3), replica(4)];
        let order: Vec<String> =
            addresses("e", 4, &replicas, &nodes, 10809).iter().map(Address::to_string).collect();
        let expected = ["[fd00::5]:10809", "10.0.0.4:10809", "10.0.0.2:10809", "10.0.0.1:10809"];
        assert_eq!(order, expected);
    }
}
