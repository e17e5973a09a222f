//! ControllerExpandVolume.

use ballast_api::{Client, v1 as api};

use super::ControllerService;
use crate::cluster::Asking;
use crate::error::{Refusal, required};
use crate::modes;
use crate::size::{Wanted, to_wire};
use crate::steps::{self, Step};
use crate::v1::{ControllerExpandVolumeRequest, ControllerExpandVolumeResponse};

impl ControllerService {
    /// Grows a volume, and answers when its replicas take writes up to there; one that is large
    /// enough stays as it is. The host must be told in any case:
    /// an attachment keeps the size that it began with until its node refreshes it.
    pub(super) async fn expand(
        &self,
        asking: &Asking,
        request: &ControllerExpandVolumeRequest,
    ) -> Result<ControllerExpandVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let range = request.capacity_range.as_ref();
        let range = range.ok_or(Refusal::FieldMissing("capacity_range"))?;
        let wanted = Wanted::parse(Some(range))?;
        if let Some(capability) = &request.volume_capability {
            modes::parse(Some(capability))?;
        }
        let _held = self.locks.hold(id)?;
        let (volume, _) = asking.volume(id).await?;
        if let Some(limit) = wanted.limit.filter(|limit| volume.size_bytes > *limit) {
            return Err(Refusal::CapacityOutOfRange(format!(
                "volume {:?} has {} bytes already, and the limit is {limit}: volumes do not shrink",
                volume.name, volume.size_bytes
            )));
        }
        let enough = wanted.required.is_none_or(|required| required <= volume.size_bytes);
        let size_bytes = if enough { volume.size_bytes } else { wanted.size()? };
        // Asked also for what it has: an earlier call may have ended when that was decided and not in
        // force yet, and a host that grows to it then would write where writes are refused.
        let request = api::ResizeVolumeRequest { volume: id.to_owned(), size_bytes };
        let resize = |client: Client| {
            let request = request.clone();
            async move { client.resize_volume(request).await }
        };
        asking.ask(resize).await?;
        steps::reached(Step::VolumeGrown);
        Ok(ControllerExpandVolumeResponse {
            capacity_bytes: to_wire(size_bytes),
            node_expansion_required: true,
        })
    }
}
