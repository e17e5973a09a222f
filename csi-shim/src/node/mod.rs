//! The Node service: a volume on this host.
//!
//! Each call works on a thread of its own to its end, also when its caller has gone: the repeated
//! call then finds the work done, or gets ABORTED while it still runs. Nothing here holds state but
//! the locks; see `record` for what survives.

mod content;
mod expand;
mod journal;
mod publish;
mod record;
mod stage;
mod stats;
mod unstage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::NODE_TOPOLOGY_KEY;
use crate::attach::Attacher;
use crate::cluster::{Asking, Cluster};
use crate::context::Address;
use crate::controller::answer;
use crate::error::{Refusal, required};
use crate::host::{HostError, mounts};
use crate::locks::{Held, Locks};
use crate::names;
use crate::v1::node_server::Node;
use crate::v1::node_service_capability::{Rpc, Type, rpc};
use crate::v1::*;
use record::Records;

/// What the service can do: each bit has a working call, and a test that makes it.
pub const CAPABILITIES: [rpc::Type; 4] = [
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::ExpandVolume,
    rpc::Type::SingleNodeMultiWriter,
];

/// What the command line says about this host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its name.
    pub node_id: String,
    /// Its topology, without its name.
    pub segments: BTreeMap<String, String>,
    /// The most volumes; 0 = no limit of its own.
    pub max_volumes: u32,
    /// NBD addresses to try first.
    pub addresses: Vec<Address>,
}

/// The service.
pub struct NodeService {
    host: Host,
    cluster: Cluster,
    worker: Arc<Worker>,
}

/// What the threads of the calls share.
struct Worker {
    attacher: Box<dyn Attacher>,
    records: Records,
    locks: Locks,
    addresses: Vec<Address>,
}

impl NodeService {
    /// `state` is a folder that exists.
    ///
    /// # Errors
    /// When records can't be kept there.
    pub fn new(
        host: Host,
        cluster: Cluster,
        attacher: Box<dyn Attacher>,
        state: &Path,
    ) -> Result<NodeService, HostError> {
        let records = Records::open(state)?;
        let (locks, addresses) = (Locks::default(), host.addresses.clone());
        let worker = Arc::new(Worker { attacher, records, locks, addresses });
        Ok(NodeService { host, cluster, worker })
    }

    /// Does a call's work on a thread.
    async fn work<Q, A>(
        &self,
        call: &'static str,
        request: Request<Q>,
        about: String,
        work: impl FnOnce(&Worker, &Asking, Q) -> Result<A, Refusal> + Send + 'static,
    ) -> Result<Response<A>, Status>
    where
        Q: Send + 'static,
        A: Send + 'static,
    {
        let asking = self.cluster.asked_by(&request);
        let worker = Arc::clone(&self.worker);
        let request = request.into_inner();
        let done = tokio::task::spawn_blocking(move || {
            answer(call, &about, work(&worker, &asking, request))
        });
        done.await.unwrap_or_else(|_| Err(Refusal::CallBroken(call).into()))
    }
}

impl Worker {
    fn hold(&self, volume_id: &str) -> Result<Held, Refusal> {
        self.locks.hold(required("volume_id", volume_id)?)
    }
}

/// A volume id that can name a file; others name no volume of this driver.
fn known_id(volume_id: &str) -> Result<&str, Refusal> {
    match names::is_volume_id(volume_id) {
        true => Ok(volume_id),
        false => Err(Refusal::VolumeUnknown(volume_id.to_owned())),
    }
}

/// An absolute path, as the mount table has it.
fn path(field: &'static str, text: &str) -> Result<PathBuf, Refusal> {
    let text = text.trim_end_matches('/');
    let plain = text.starts_with('/') && !text.split('/').any(|part| part == "..");
    match text {
        "" => Err(Refusal::FieldMissing(field)),
        _ if plain => Ok(mounts::resolve(Path::new(text))),
        _ => Err(Refusal::PathInvalid { field, path: text.to_owned() }),
    }
}

/// Where a staged volume is looked for: any text, since what is not there is NOT_FOUND.
fn place(field: &'static str, text: &str) -> Result<PathBuf, Refusal> {
    match text.trim_end_matches('/') {
        "" => Err(Refusal::FieldMissing(field)),
        text => Ok(mounts::resolve(Path::new(text))),
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("NodeStageVolume", request, about, |worker, asking, request| {
            worker.stage(asking, &request)
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("NodeUnstageVolume", request, about, |worker, _, request| {
            worker.unstage(&request)
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("NodePublishVolume", request, about, |worker, _, request| {
            worker.publish(&request)
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("NodeUnpublishVolume", request, about, |worker, _, request| {
            worker.unpublish(&request)
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("NodeGetVolumeStats", request, about, |worker, _, request| worker.stats(&request))
            .await
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("NodeExpandVolume", request, about, |worker, asking, request| {
            worker.expand(asking, &request)
        })
        .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability =
            |kind| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind as i32 })) };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let mut segments = self.host.segments.clone();
        segments.insert(NODE_TOPOLOGY_KEY.to_owned(), self.host.node_id.clone());
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.host.node_id.clone(),
            max_volumes_per_node: i64::from(self.host.max_volumes),
            accessible_topology: Some(Topology { segments }),
        }))
    }
}
