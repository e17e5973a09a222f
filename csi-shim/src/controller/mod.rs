//! The Controller service: volumes and leases of the cluster.
//!
//! Keeps nothing: every answer comes from the cluster. Calls for one volume run one at a time, and
//! those that change something to their end, also when their caller has gone.

mod capacity;
mod create;
mod expand;
mod list;
mod publish;

use std::collections::BTreeSet;

use tonic::{Request, Response, Status};

use crate::cluster::{Asking, Cluster};
use crate::error::{Refusal, required};
use crate::locks::Locks;
use crate::steps::{self, Step};
use crate::v1::controller_server::Controller;
use crate::v1::controller_service_capability::{Rpc, Type, rpc};
use crate::v1::*;
use crate::{modes, parameters};

/// What the service can do: each bit has a working call, and a test that makes it.
pub const CAPABILITIES: [rpc::Type; 9] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::GetCapacity,
    rpc::Type::PublishReadonly,
    rpc::Type::ExpandVolume,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
];

/// Which hosts volumes may be published to.
#[derive(Clone, Debug)]
pub enum Hosts {
    /// Those with the name of a storage node, and these.
    Known(BTreeSet<String>),
    /// Any: whether a host exists is not known then.
    Any,
}

/// The service.
#[derive(Clone)]
pub struct ControllerService {
    cluster: Cluster,
    hosts: Hosts,
    nbd_port: u16,
    locks: Locks,
}

impl ControllerService {
    /// For this cluster, whose nodes serve NBD on this port.
    pub fn new(cluster: Cluster, hosts: Hosts, nbd_port: u16) -> ControllerService {
        ControllerService { cluster, hosts, nbd_port, locks: Locks::default() }
    }

    /// Does a call's work to its end: a lease that were still being taken for a caller that has gone
    /// would come after the release that the next caller asks for, and stay.
    async fn work<Q, A, F>(
        &self,
        call: &'static str,
        request: Request<Q>,
        about: String,
        work: impl FnOnce(ControllerService, Asking, Q) -> F,
    ) -> Result<Response<A>, Status>
    where
        A: Send + 'static,
        F: Future<Output = Result<A, Refusal>> + Send + 'static,
    {
        let asking = self.cluster.asked_by(&request);
        let work = work(self.clone(), asking, request.into_inner());
        let done = tokio::spawn(async move { answer(call, &about, work.await) });
        done.await.unwrap_or_else(|_| Err(Refusal::CallBroken(call).into()))
    }

    async fn delete(&self, asking: &Asking, id: &str) -> Result<DeleteVolumeResponse, Refusal> {
        let id = required("volume_id", id)?;
        let _held = self.locks.hold(id)?;
        match asking.volume(id).await {
            Err(Refusal::VolumeUnknown(_)) => {}
            found => {
                found?;
                let request = ballast_api::v1::DeleteVolumeRequest { volume: id.to_owned() };
                let delete = |client: ballast_api::Client| {
                    let request = request.clone();
                    async move { client.delete_volume(request).await }
                };
                asking.ask(delete).await?;
                steps::reached(Step::VolumeDeleted);
            }
        }
        Ok(DeleteVolumeResponse {})
    }

    async fn validate(
        &self,
        asking: &Asking,
        request: ValidateVolumeCapabilitiesRequest,
    ) -> Result<ValidateVolumeCapabilitiesResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(Refusal::FieldMissing("volume_capabilities"));
        }
        let (volume, _) = asking.volume(id).await?;
        let problem = modes::parse_all(&request.volume_capabilities)
            .and_then(|_| parameters::refuse_mutable(&request.mutable_parameters))
            .and_then(|()| parameters::Parameters::parse(&request.parameters))
            .map(|parameters| {
                let asked = request.parameters.contains_key("replicas");
                (asked && parameters.replicas != volume.replicas)
                    .then(|| format!("the volume has {} replicas", volume.replicas))
            });
        let message = match problem {
            Ok(None) => {
                let confirmed = validate_volume_capabilities_response::Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                };
                return Ok(ValidateVolumeCapabilitiesResponse {
                    confirmed: Some(confirmed),
                    message: String::new(),
                });
            }
            Ok(Some(problem)) => problem,
            Err(refusal) => refusal.to_string(),
        };
        Ok(ValidateVolumeCapabilitiesResponse { confirmed: None, message })
    }
}

/// A result as the wire has it; refusals are told in the log too.
pub(crate) fn answer<T>(
    call: &'static str,
    about: &str,
    result: Result<T, Refusal>,
) -> Result<Response<T>, Status> {
    match result {
        Ok(answer) => {
            tracing::info!(call, about, "done");
            Ok(Response::new(answer))
        }
        Err(refusal) => {
            tracing::warn!(call, about, code = ?refusal.code(), %refusal, "refused");
            Err(refusal.into())
        }
    }
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let about = request.get_ref().name.clone();
        self.work("CreateVolume", request, about, |it, asking, request| async move {
            it.create(&asking, &request).await
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("DeleteVolume", request, about, |it, asking, request| async move {
            it.delete(&asking, &request.volume_id).await
        })
        .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Result<Response<ControllerPublishVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("ControllerPublishVolume", request, about, |it, asking, request| async move {
            it.publish(&asking, &request).await
        })
        .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<ControllerUnpublishVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("ControllerUnpublishVolume", request, about, |it, asking, request| async move {
            it.unpublish(&asking, &request).await
        })
        .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let asking = self.cluster.asked_by(&request);
        let request = request.into_inner();
        let id = request.volume_id.clone();
        answer("ValidateVolumeCapabilities", &id, self.validate(&asking, request).await)
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let asking = self.cluster.asked_by(&request);
        answer("ListVolumes", "", self.list(&asking, &request.into_inner()).await)
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        let asking = self.cluster.asked_by(&request);
        answer("GetCapacity", "", self.capacity(&asking, &request.into_inner()).await)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let capability = |kind| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind as i32 })),
        };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let about = request.get_ref().volume_id.clone();
        self.work("ControllerExpandVolume", request, about, |it, asking, request| async move {
            it.expand(&asking, &request).await
        })
        .await
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        let asking = self.cluster.asked_by(&request);
        let id = request.into_inner().volume_id;
        answer("ControllerGetVolume", &id, self.get(&asking, &id).await)
    }

    async fn create_snapshot(
        &self,
        _: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        Err(Refusal::CallUnsupported("CreateSnapshot").into())
    }

    async fn delete_snapshot(
        &self,
        _: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        Err(Refusal::CallUnsupported("DeleteSnapshot").into())
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        Err(Refusal::CallUnsupported("ListSnapshots").into())
    }

    async fn get_snapshot(
        &self,
        _: Request<GetSnapshotRequest>,
    ) -> Result<Response<GetSnapshotResponse>, Status> {
        Err(Refusal::CallUnsupported("GetSnapshot").into())
    }

    async fn controller_modify_volume(
        &self,
        _: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        Err(Refusal::CallUnsupported("ControllerModifyVolume").into())
    }
}
