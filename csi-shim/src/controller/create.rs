//! CreateVolume.

use ballast_api::{Client, v1 as api};

use super::ControllerService;
use crate::cluster::Asking;
use crate::error::{Refusal, required};
use crate::parameters::{self, Parameters, Placement};
use crate::size::{Wanted, to_wire};
use crate::steps::{self, Step};
use crate::v1::volume_content_source::Type as Source;
use crate::v1::{CreateVolumeRequest, CreateVolumeResponse, TopologyRequirement, Volume};
use crate::{NODE_TOPOLOGY_KEY, modes, names};

impl ControllerService {
    /// Finds the volume, or has the cluster make it and waits until it can be used.
    pub(super) async fn create(
        &self,
        asking: &Asking,
        request: &CreateVolumeRequest,
    ) -> Result<CreateVolumeResponse, Refusal> {
        let name = names::volume_name(required("name", &request.name)?);
        modes::parse_all(&request.volume_capabilities)?;
        let parameters = Parameters::parse(&request.parameters)?;
        parameters::refuse_mutable(&request.mutable_parameters)?;
        if let Some(source) = &request.volume_content_source {
            return Err(Refusal::ContentSourceUnsupported(match source.r#type {
                Some(Source::Volume(_)) => "volume",
                _ => "snapshot",
            }));
        }
        let wanted = Wanted::parse(request.capacity_range.as_ref())?;
        let _held = self.locks.hold(&name)?;
        let volume = match asking.find(&name).await? {
            Some((volume, _)) => same(volume, &wanted, &parameters)?,
            None => {
                let preferred = match parameters.placement {
                    Placement::Spread => Vec::new(),
                    Placement::Local => {
                        preferred_nodes(asking, request.accessibility_requirements.as_ref()).await?
                    }
                };
                let request = api::CreateVolumeRequest {
                    name,
                    size_bytes: wanted.size()?,
                    replicas: parameters.replicas,
                    preferred_nodes: preferred,
                };
                let create = |client: Client| {
                    let request = request.clone();
                    async move { client.create_volume(request).await }
                };
                let volume = asking.ask(create).await?.volume;
                steps::reached(Step::VolumeCreated);
                volume.ok_or(Refusal::AnswerIncomplete("volume"))?
            }
        };
        let volume = asking.ready(volume).await?;
        let volume = Volume { volume_context: parameters.volume_context(), ..to_csi(&volume) };
        Ok(CreateVolumeResponse { volume: Some(volume) })
    }
}

/// A volume as the orchestrator sees it. Every host reaches it, so it names no topology.
pub(super) fn to_csi(volume: &api::Volume) -> Volume {
    Volume {
        capacity_bytes: to_wire(volume.size_bytes),
        volume_id: volume.id.clone(),
        ..Volume::default()
    }
}

fn same(
    volume: api::Volume,
    wanted: &Wanted,
    parameters: &Parameters,
) -> Result<api::Volume, Refusal> {
    let replicas = (volume.replicas != parameters.replicas).then(|| {
        format!("it has {} replicas, and {} are wanted", volume.replicas, parameters.replicas)
    });
    match wanted.problem_with(volume.size_bytes).or(replicas) {
        None => Ok(volume),
        Some(difference) => Err(Refusal::VolumeDiffers { name: volume.name, difference }),
    }
}

/// The storage nodes that bear the names of the preferred hosts, in that order. A host without
/// storage is nobody's preference: `placement` asks for nearness, and never makes a volume fail.
async fn preferred_nodes(
    asking: &Asking,
    requirement: Option<&TopologyRequirement>,
) -> Result<Vec<String>, Refusal> {
    let Some(requirement) = requirement else { return Ok(Vec::new()) };
    let hosts = requirement.preferred.iter().filter_map(|it| it.segments.get(NODE_TOPOLOGY_KEY));
    let hosts: Vec<&String> = hosts.collect();
    if hosts.is_empty() {
        return Ok(Vec::new());
    }
    let list = |client: Client| async move { client.list_nodes(api::ListNodesRequest {}).await };
    let nodes = asking.ask(list).await?.nodes;
    let mut preferred: Vec<String> = Vec::new();
    for host in hosts {
        let known = nodes.iter().any(|node| node.name == *host);
        if known && !preferred.contains(host) {
            preferred.push(host.clone());
        }
    }
    Ok(preferred)
}
