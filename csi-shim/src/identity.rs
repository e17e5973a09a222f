//! The Identity service: who the driver is, what it can do, whether it is ready.

use tonic::{Request, Response, Status};

use crate::cluster::Cluster;
use crate::v1::identity_server::Identity;
use crate::v1::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use crate::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse,
};

/// The service.
pub struct IdentityService {
    cluster: Cluster,
    with_controller: bool,
}

impl IdentityService {
    /// `with_controller`: whether the Controller service is served beside it.
    pub fn new(cluster: Cluster, with_controller: bool) -> IdentityService {
        IdentityService { cluster, with_controller }
    }

    /// What the driver as a whole can do.
    pub fn capabilities(&self) -> Vec<PluginCapability> {
        let service = |kind: service::Type| Type::Service(Service { r#type: kind as i32 });
        let expansion = |kind: volume_expansion::Type| {
            Type::VolumeExpansion(VolumeExpansion { r#type: kind as i32 })
        };
        let mut types = Vec::new();
        if self.with_controller {
            types.push(service(service::Type::ControllerService));
        }
        types.push(service(service::Type::VolumeAccessibilityConstraints));
        types.push(expansion(volume_expansion::Type::Online));
        types.into_iter().map(|kind| PluginCapability { r#type: Some(kind) }).collect()
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: crate::DRIVER_NAME.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let capabilities = self.capabilities();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Ready whenever the process answers: a cluster that can't be asked now is no reason to
    /// restart the driver, and whoever needs the cluster is told so by the call that needs it. The
    /// first probe after the start only makes the connections.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let health = self.cluster.within(PROBE_TIME);
        let answer =
            health.ask(|client| async move { client.health(Default::default()).await }).await;
        if let Err(refusal) = answer {
            tracing::warn!(%refusal, "no daemon answers");
        }
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}

/// Well within the second that liveness probes wait by default.
const PROBE_TIME: std::time::Duration = std::time::Duration::from_millis(800);
