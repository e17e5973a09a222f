//! NodeUnstageVolume: unmount and detach, also when no server answers any more.

use std::path::PathBuf;
use std::time::Duration;

use super::record::Record;
use super::{Worker, known_id, path};
use crate::error::{Refusal, required};
use crate::host::mounts;
use crate::host::release::{self, Patience, Release};
use crate::names;
use crate::steps::{self, Step};
use crate::v1::{NodeUnstageVolumeRequest, NodeUnstageVolumeResponse};

/// How long one call waits for what was written to get to servers that answer: less than the two
/// minutes that kubelet waits for a call. The next call goes on with it.
const WRITE_BACK_TIME: Duration = Duration::from_secs(60);

/// How long no request may be completed before the servers are asked whether they are there, and they
/// may be silent then: longer than an election or a restart.
const SILENCE: Duration = Duration::from_secs(20);

impl Worker {
    /// Undoes NodeStageVolume. What is not there is no error.
    pub(super) fn unstage(
        &self,
        request: &NodeUnstageVolumeRequest,
    ) -> Result<NodeUnstageVolumeResponse, Refusal> {
        let id = required("volume_id", &request.volume_id)?;
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let _held = self.hold(id)?;
        if !names::is_volume_id(id) {
            return Ok(NodeUnstageVolumeResponse {});
        }
        match self.records.read(known_id(id)?)? {
            Some(record) if record.staging == staging => {
                self.refuse_in_use(&record)?;
                self.take_down(&record)?;
                self.records.remove(id)?;
                steps::reached(Step::RecordRemoved);
            }
            // Staged elsewhere: not here.
            Some(_) => {}
            // Without a record there was no attachment; a mount may be left of other hands.
            None => {
                mounts::unmount(&staging, WRITE_BACK_TIME)?;
                // Of a record that was not whole yet.
                self.records.remove(id)?;
            }
        }
        Ok(NodeUnstageVolumeResponse {})
    }

    /// A volume that pods still see stays: the orchestrator unpublishes first.
    pub(super) fn refuse_in_use(&self, record: &Record) -> Result<(), Refusal> {
        match self.is_published(record)? {
            None => Ok(()),
            Some(target) => {
                Err(Refusal::PublishedStill { volume: record.volume_id.clone(), target })
            }
        }
    }

    /// Where a pod sees the volume, if one does.
    pub(super) fn is_published(&self, record: &Record) -> Result<Option<PathBuf>, Refusal> {
        for published in &record.published {
            if mounts::at(&published.target)?.is_some() {
                return Ok(Some(published.target.clone()));
            }
        }
        Ok(None)
    }

    /// Unmounts, waits until the kernel has let go of the device, and detaches it.
    pub(super) fn take_down(&self, record: &Record) -> Result<(), Refusal> {
        self.let_go(record)?;
        if !record.block {
            steps::reached(Step::Unmounted);
        }
        self.attacher.detach(&record.attachment())?;
        steps::reached(Step::Detached);
        Ok(())
    }

    /// An unmount writes what is in memory only. It gets the time that this takes, call after call, as
    /// long as requests are completed or a server answers. When neither is so, waiting helps nobody:
    /// requests are made to fail, and what never got to a server is lost, as with a host that dies.
    fn let_go(&self, record: &Record) -> Result<(), Refusal> {
        let attachment = record.attachment();
        let devices = || self.attacher.devices(&attachment);
        let unmount = || {
            let staging = (!record.block).then(|| record.staging.clone());
            move || staging.map_or(Ok(()), |staging| mounts::unmount_to_the_end(&staging))
        };
        let patience = Patience { silence: SILENCE, time: WRITE_BACK_TIME };
        match release::wait(devices, unmount(), patience)? {
            Release::Free => return Ok(()),
            Release::Slow => return Err(self.held(record)),
            Release::Stalled => {}
        }
        // A read may have to wait for its turn behind the writes of an unmount.
        let before = release::completed(&devices()?);
        if self.attacher.answers(&attachment, SILENCE) || release::completed(&devices()?) != before
        {
            return Err(self.held(record));
        }
        tracing::error!(
            volume = record.volume_id,
            "no server answers: what this host did not write yet is given up"
        );
        self.attacher.abort(&attachment)?;
        let patience = Patience { silence: SILENCE, time: SILENCE };
        if release::wait(devices, unmount(), patience)? == Release::Free {
            return Ok(());
        }
        if !record.block {
            mounts::unmount_lazily(&record.staging)?;
        }
        Err(self.held(record))
    }

    /// Nothing but the mount at the staging path may have the device: a check or another mount beside
    /// one that lives, or is still being written back, would destroy what it holds.
    pub(super) fn refuse_held(&self, record: &Record) -> Result<(), Refusal> {
        let attachment = record.attachment();
        let devices = || self.attacher.devices(&attachment);
        let patience = Patience { silence: SILENCE, time: SILENCE };
        match release::wait(devices, || Ok(()), patience)? {
            Release::Free => Ok(()),
            Release::Stalled | Release::Slow => Err(self.held(record)),
        }
    }

    pub(super) fn held(&self, record: &Record) -> Refusal {
        let devices = self.attacher.devices(&record.attachment()).unwrap_or_default();
        let names: Vec<String> = devices.iter().map(|it| it.display().to_string()).collect();
        Refusal::DeviceHeld { volume: record.volume_id.clone(), devices: names.join(", ") }
    }
}
