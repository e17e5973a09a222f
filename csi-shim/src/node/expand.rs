//! NodeExpandVolume: the device first, then the file system on it, both while mounted.

use std::time::Duration;

use tokio::runtime::Handle;

use super::{Worker, known_id, place};
use crate::cluster::Asking;
use crate::error::{Refusal, required};
use crate::host::{mounts, tools};
use crate::modes;
use crate::size::{Wanted, to_wire};
use crate::steps::{self, Step};
use crate::v1::{NodeExpandVolumeRequest, NodeExpandVolumeResponse};

/// Growing a file system writes a little metadata per group.
const GROW_TIME: Duration = Duration::from_secs(300);

impl Worker {
    /// Grows what is on this host to what the volume is in the cluster.
    pub(super) fn expand(
        &self,
        asking: &Asking,
        request: &NodeExpandVolumeRequest,
    ) -> Result<NodeExpandVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let path = place("volume_path", &request.volume_path)?;
        let wanted = Wanted::parse(request.capacity_range.as_ref())?;
        if let Some(capability) = &request.volume_capability {
            modes::parse(Some(capability))?;
        }
        let id = known_id(id)?;
        let _held = self.hold(id)?;
        let missing = || Refusal::NotAt { volume: id.to_owned(), path: path.clone() };
        let record = self.records.read(id)?.ok_or_else(missing)?;
        let here = record.staging == path || record.published.iter().any(|it| it.target == path);
        if !here {
            return Err(missing());
        }
        let required = wanted.required.unwrap_or(0);
        let volume = Handle::current().block_on(asking.grown(id, required))?;
        if let Some(problem) = wanted.problem_with(volume.size_bytes) {
            return Err(Refusal::CapacityOutOfRange(format!(
                "volume {:?}: {problem}; expand it in the controller first",
                volume.name
            )));
        }
        let device = self.device(&record)?;
        let size = self.attacher.grow(&record.attachment(), volume.size_bytes)?;
        steps::reached(Step::DeviceGrown);
        if !record.block && !record.read_only {
            let device = device.display().to_string();
            let staging = record.staging.display().to_string();
            if mounts::at(&record.staging)?.is_none() {
                return Err(Refusal::NotStaged(id.to_owned()));
            }
            match record.fs_type.as_str() {
                "xfs" => tools::must("xfs_growfs", &["-d", &staging], GROW_TIME)?,
                _ => tools::must("resize2fs", &[&device], GROW_TIME)?,
            };
            steps::reached(Step::FileSystemGrown);
        }
        Ok(NodeExpandVolumeResponse { capacity_bytes: to_wire(size) })
    }
}
