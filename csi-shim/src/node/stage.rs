//! NodeStageVolume: attach, format once, mount.
//!
//! Each step looks first whether it is done, so that the call can be repeated after a death between
//! any two of them.

use std::path::Path;

use tokio::runtime::Handle;

use super::record::{Record, Staging};
use super::{Worker, content, known_id, path};
use crate::attach::State;
use crate::cluster::Asking;
use crate::context::PublishContext;
use crate::error::{Refusal, required};
use crate::host::{HostError, files, mounts, release};
use crate::modes::{self, Access, FILE_SYSTEMS};
use crate::parameters;
use crate::steps::{self, Step};
use crate::v1::{NodeStageVolumeRequest, NodeStageVolumeResponse};

impl Worker {
    /// Makes the volume a device of this host, and mounts it at the staging path.
    pub(super) fn stage(
        &self,
        asking: &Asking,
        request: &NodeStageVolumeRequest,
    ) -> Result<NodeStageVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let wanted = modes::parse(request.volume_capability.as_ref())?;
        let id = known_id(id)?;
        let context = PublishContext::parse(&request.publish_context)?;
        let fs_type = file_system(&wanted.access, request)?;
        let mut addresses = self.addresses.clone();
        addresses
            .extend(context.addresses.iter().filter(|it| !self.addresses.contains(it)).cloned());
        if addresses.is_empty() {
            return Err(Refusal::AddressMissing);
        }
        let (access, staging) = (&wanted.access, staging.as_path());
        let record = Record::new(Staging {
            volume_id: id,
            context: &context,
            addresses,
            access,
            fs_type,
            staging,
        });
        let _held = self.hold(id)?;
        let record = self.begin(record)?;
        steps::reached(Step::RecordWritten);
        if self.is_used(&record)? {
            return Ok(NodeStageVolumeResponse {});
        }
        // Servers refuse what they do not know, and might yet hear of it: that takes long to be sure of.
        Handle::current().block_on(asking.volume(id))?;
        self.refuse_held(&record)?;
        let device = self.attacher.attach(&record.attachment())?;
        steps::reached(Step::Attached);
        let done = match record.block {
            true => content::ensure_raw(asking, &record),
            false => self.mount(asking, &record, &device),
        };
        match done {
            Ok(()) => Ok(NodeStageVolumeResponse {}),
            Err(refusal) => Err(explain(asking, &record, refusal)),
        }
    }

    /// Whether the volume is attached under this lease and shows somewhere. Then nothing is left to
    /// do, and nothing may be undone: a server that is silent now may be back before anybody's
    /// patience ends, and an attachment that is made anew would be an I/O error to who uses it.
    fn is_used(&self, record: &Record) -> Result<bool, Refusal> {
        let State::Attached(device) = self.attacher.state(&record.attachment())? else {
            return Ok(false);
        };
        if record.block {
            return self.is_published(record).map(|target| target.is_some());
        }
        let mounted = mounts::at(&record.staging)?;
        Ok(mounted.is_some() && mounted.map(|it| it.device) == mounts::device_numbers(&device).ok())
    }

    /// Whether anything is there of what a record is about.
    fn is_anywhere(&self, record: &Record) -> Result<bool, Refusal> {
        let attached = self.attacher.state(&record.attachment())? != State::None;
        let mounted = !record.block && mounts::at(&record.staging)?.is_some();
        Ok(attached || mounted || self.is_published(record)?.is_some())
    }

    /// Writes the record of what is about to be done; what an earlier life recorded must agree.
    fn begin(&self, mut record: Record) -> Result<Record, Refusal> {
        if let Some(before) = self.records.read(&record.volume_id)? {
            let differs = !before.same_use(&record);
            if differs && self.is_anywhere(&before)? {
                return Err(Refusal::StagedDiffers(record.volume_id));
            }
            if before.epoch > record.epoch {
                return Err(Refusal::LeaseOld { volume: record.volume_id, epoch: record.epoch });
            }
            if differs {
                let volume = &record.volume_id;
                tracing::warn!(volume, "a record of what is no longer on this host gives way");
            } else if before.epoch < record.epoch {
                // The lease was given back and taken again: what was attached under it is fenced.
                self.refuse_in_use(&before)?;
                self.take_down(&before)?;
            } else {
                record.published = before.published;
            }
        }
        self.records.write(&record)?;
        Ok(record)
    }

    fn mount(&self, asking: &Asking, record: &Record, device: &Path) -> Result<(), Refusal> {
        if let Some(mounted) = mounts::at(&record.staging)? {
            if mounted.device == mounts::device_numbers(device)? {
                return Ok(());
            }
            // A mount of a device that is gone: of this volume's former attachment, as the path says.
            tracing::warn!(path = %record.staging.display(), "a dead mount is taken away");
            mounts::unmount_lazily(&record.staging)?;
        }
        if release::is_held(device)? {
            return Err(self.held(record));
        }
        content::ensure(asking, record, device)?;
        steps::reached(Step::Checked);
        files::make_folder(&record.staging)?;
        let mut options = record.flags.clone();
        if record.read_only {
            options.push("ro".to_owned());
            // Nobody else writes either, and a device that can't be written has its journal unread.
            let unread = if record.fs_type == "xfs" { "norecovery" } else { "noload" };
            options.push(unread.to_owned());
        }
        mounts::mount_device(device, &record.staging, &record.fs_type, &options)?;
        steps::reached(Step::Mounted);
        Ok(())
    }

    /// The device of a staged volume.
    pub(super) fn device(&self, record: &Record) -> Result<std::path::PathBuf, Refusal> {
        match self.attacher.state(&record.attachment())? {
            State::Attached(device) => Ok(device),
            State::None | State::Broken => Err(Refusal::NotStaged(record.volume_id.clone())),
        }
    }
}

/// Why a tool failed on the device, where the reason is that the host lost its lease meanwhile: the
/// tool itself saw no more than I/O errors.
fn explain(asking: &Asking, record: &Record, refusal: Refusal) -> Refusal {
    if !matches!(refusal, Refusal::Host(_)) {
        return refusal;
    }
    match Handle::current().block_on(asking.volume(&record.volume_id)) {
        Err(gone @ Refusal::VolumeUnknown(_)) => gone,
        Ok((volume, _)) if volume.leases.iter().all(|lease| lease.epoch != record.epoch) => {
            let over = format!("lease {} has ended meanwhile ({refusal})", record.epoch);
            HostError::LeaseOver(over).into()
        }
        _ => refusal,
    }
}

/// The file system: as the capability says, or the StorageClass, or the first.
fn file_system(access: &Access, request: &NodeStageVolumeRequest) -> Result<String, Refusal> {
    let Access::Mount { fs_type, flags } = access else { return Ok(String::new()) };
    if let Some(flag) = flags.iter().find(|flag| flag.contains(',') || flag.starts_with('-')) {
        return Err(Refusal::FlagInvalid(flag.clone()));
    }
    let of_class = request.volume_context.get(parameters::FS_TYPE).map(String::as_str);
    let named = [fs_type.as_str(), of_class.unwrap_or_default(), FILE_SYSTEMS[0]];
    let chosen = named.into_iter().find(|name| !name.is_empty()).unwrap_or(FILE_SYSTEMS[0]);
    Ok(modes::check_fs_type(chosen)?.to_owned())
}
