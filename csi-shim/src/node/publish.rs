//! NodePublishVolume and NodeUnpublishVolume: a staged volume where a pod sees it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::record::{Published, Record};
use super::{Worker, known_id, path};
use crate::error::{Refusal, required};
use crate::host::mounts::Mount;
use crate::host::{HostError, files, mounts};
use crate::modes::{self, Use};
use crate::names;
use crate::steps::{self, Step};
use crate::v1::{
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse,
};

/// A bind mount is taken away without writing anything.
const UNMOUNT_TIME: Duration = Duration::from_secs(20);

impl Worker {
    /// Binds the staged volume to the target path.
    pub(super) fn publish(
        &self,
        request: &NodePublishVolumeRequest,
    ) -> Result<NodePublishVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let wanted = modes::parse(request.volume_capability.as_ref())?;
        if request.staging_target_path.is_empty() {
            return Err(Refusal::NotStaged(id.to_owned()));
        }
        let id = known_id(id)?;
        let _held = self.hold(id)?;
        let staged = self.records.read(id)?;
        let record = staged.ok_or_else(|| Refusal::NotStaged(id.to_owned()))?;
        if record.block != wanted.access.is_block() {
            return Err(Refusal::StagedDiffers(id.to_owned()));
        }
        let read_only = request.readonly || wanted.read_only || record.read_only;
        if record.block && read_only && !record.read_only {
            return Err(Refusal::DeviceWritable(id.to_owned()));
        }
        let source = self.source(&record)?;
        let mut record = record;
        self.admit(&mut record, &wanted, &target, read_only)?;
        steps::reached(Step::TargetNoted);
        match mounts::at(&target)? {
            Some(there) if shows(&there, &source, record.block)? => {
                // A death between the bind and the remount leaves it writable.
                if read_only && !there.read_only() {
                    mounts::remount_read_only(&target)?;
                }
                return Ok(NodePublishVolumeResponse {});
            }
            Some(_) => mounts::unmount_lazily(&target)?,
            None => {}
        }
        if record.block {
            files::make_file(&target)?
        } else {
            files::make_folder(&target)?
        }
        steps::reached(Step::TargetMade);
        mounts::bind(&source, &target)?;
        steps::reached(Step::Bound);
        if read_only {
            mounts::remount_read_only(&target)?;
        }
        Ok(NodePublishVolumeResponse {})
    }

    /// What is bound: the mounted file system, or the device.
    fn source(&self, record: &Record) -> Result<PathBuf, Refusal> {
        let device = self.device(record)?;
        if record.block {
            return Ok(device);
        }
        let numbers = mounts::device_numbers(&device)?;
        match mounts::at(&record.staging)? {
            Some(mounted) if mounted.device == numbers => Ok(record.staging.clone()),
            _ => Err(Refusal::NotStaged(record.volume_id.clone())),
        }
    }

    /// Notes the target before anything is mounted there, unless the volume's mode forbids it.
    fn admit(
        &self,
        record: &mut Record,
        wanted: &Use,
        target: &Path,
        read_only: bool,
    ) -> Result<(), Refusal> {
        let known = record.published.iter().find(|it| it.target == target);
        if let Some(known) = known {
            if known.read_only == read_only {
                return Ok(());
            }
            if mounts::at(target)?.is_some() {
                return Err(Refusal::PublishedDiffers {
                    volume: record.volume_id.clone(),
                    target: target.to_owned(),
                });
            }
        }
        let one = record.single_publisher
            || wanted.lease == ballast_api::v1::LeaseMode::SingleNodePublisher;
        let mut others = Vec::new();
        for other in &record.published {
            // What was noted and never mounted counts no more.
            if other.target != target && mounts::at(&other.target)?.is_some() {
                others.push(other.clone());
            }
        }
        if let Some(other) = others.first().filter(|_| one) {
            return Err(Refusal::PublishedOnce {
                volume: record.volume_id.clone(),
                target: other.target.clone(),
            });
        }
        others.push(Published { target: target.to_owned(), read_only });
        record.published = others;
        Ok(self.records.write(record)?)
    }

    /// Undoes NodePublishVolume. What is not there is no error.
    pub(super) fn unpublish(
        &self,
        request: &NodeUnpublishVolumeRequest,
    ) -> Result<NodeUnpublishVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let _held = self.hold(id)?;
        match mounts::unmount(&target, UNMOUNT_TIME) {
            // The pod is gone, whatever still looks: the file system stays until it is unstaged.
            Err(HostError::Mount { .. } | HostError::Slow { .. }) => {
                mounts::unmount_lazily(&target)?;
            }
            done => done?,
        }
        steps::reached(Step::Unbound);
        files::remove_target(&target)?;
        steps::reached(Step::TargetRemoved);
        if names::is_volume_id(id)
            && let Some(mut record) = self.records.read(id)?
        {
            let before = record.published.len();
            record.published.retain(|published| published.target != target);
            if record.published.len() != before {
                self.records.write(&record)?;
                steps::reached(Step::TargetForgotten);
            }
        }
        Ok(NodeUnpublishVolumeResponse {})
    }
}

/// Whether a mount is of this source. A device's file is told by its name below /dev.
fn shows(mount: &Mount, source: &Path, block: bool) -> Result<bool, HostError> {
    if block {
        let name = |path: &Path| path.file_name().map(|name| name.to_owned());
        return Ok(mount.fs_type == "devtmpfs" && name(&mount.root) == name(source));
    }
    Ok(mounts::at(source)?.is_some_and(|staged| staged.device == mount.device))
}
