//! NodeGetVolumeStats.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::statvfs::{Statvfs, statvfs};

use super::record::Record;
use super::{Worker, known_id, place};
use crate::error::{Refusal, required};
use crate::host::{HostError, disks, mounts, within};
use crate::size::to_wire;
use crate::v1::volume_usage::Unit;
use crate::v1::{NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, VolumeUsage};

/// A file system whose server is gone must not hold the kubelet's housekeeping.
const STATS_TIME: Duration = Duration::from_secs(5);

impl Worker {
    /// Bytes and inodes of a file system, or the size of a device.
    pub(super) fn stats(
        &self,
        request: &NodeGetVolumeStatsRequest,
    ) -> Result<NodeGetVolumeStatsResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let path = place("volume_path", &request.volume_path)?;
        let missing = || Refusal::NotAt { volume: id.to_owned(), path: path.clone() };
        let record = self.records.read(known_id(id)?)?.ok_or_else(missing)?;
        if !holds(&record, &path) || (!record.block && mounts::at(&path)?.is_none()) {
            return Err(missing());
        }
        if record.block {
            let is_device =
                std::fs::metadata(&path).is_ok_and(|it| it.file_type().is_block_device());
            let device = if is_device { path } else { self.device(&record)? };
            let total = to_wire(disks::size(&device)?);
            let usage = VolumeUsage { total, unit: Unit::Bytes as i32, ..Default::default() };
            return Ok(NodeGetVolumeStatsResponse { usage: vec![usage], volume_condition: None });
        }
        let owned = path.clone();
        let stats = within("statvfs", STATS_TIME, move || statvfs(&owned))?;
        let stats = stats.map_err(HostError::mount(&path, "looked at"))?;
        Ok(NodeGetVolumeStatsResponse { usage: usage(&stats), volume_condition: None })
    }
}

fn holds(record: &Record, path: &Path) -> bool {
    record.staging == path || record.published.iter().any(|it| it.target == path)
}

fn usage(stats: &Statvfs) -> Vec<VolumeUsage> {
    let block = stats.fragment_size();
    let bytes = |blocks: u64| to_wire(blocks.saturating_mul(block));
    vec![
        VolumeUsage {
            total: bytes(stats.blocks()),
            available: bytes(stats.blocks_available()),
            used: bytes(stats.blocks().saturating_sub(stats.blocks_free())),
            unit: Unit::Bytes as i32,
        },
        VolumeUsage {
            total: to_wire(stats.files()),
            available: to_wire(stats.files_free()),
            used: to_wire(stats.files().saturating_sub(stats.files_free())),
            unit: Unit::Inodes as i32,
        },
    ]
}
