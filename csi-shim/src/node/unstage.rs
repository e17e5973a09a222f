//! NodeUnstageVolume: unmount and detach, also when no server answers any more.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::record::Record;
use super::{Worker, known_id, path};
use crate::error::{Refusal, required};
use crate::host::{HostError, mounts};
use crate::names;
use crate::steps::{self, Step};
use crate::v1::{NodeUnstageVolumeRequest, NodeUnstageVolumeResponse};

/// How long what was written may take to get to servers that answer.
const WRITE_BACK_TIME: Duration = Duration::from_secs(60);

/// How long a server may be silent before it counts as gone: longer than an election or a restart.
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

    /// Unmounts and detaches.
    pub(super) fn take_down(&self, record: &Record) -> Result<(), Refusal> {
        if !record.block {
            self.unmount_staged(record, &record.staging)?;
            steps::reached(Step::Unmounted);
        }
        self.attacher.detach(&record.attachment())?;
        steps::reached(Step::Detached);
        Ok(())
    }

    /// An unmount writes what is in memory only. Servers that answer are given the time that it
    /// takes; when none does, waiting helps nobody: requests are made to fail, and what never got to
    /// a server is lost, as with a host that dies.
    fn unmount_staged(&self, record: &Record, staging: &Path) -> Result<(), Refusal> {
        let attachment = record.attachment();
        let first = mounts::unmount(staging, SILENCE);
        let Err(HostError::Slow { .. }) = first else { return Ok(first?) };
        if self.attacher.answers(&attachment, SILENCE) {
            return Ok(mounts::unmount(staging, WRITE_BACK_TIME)?);
        }
        tracing::error!(
            volume = record.volume_id,
            "no server answers: what this host did not write yet is given up"
        );
        self.attacher.abort(&attachment)?;
        if mounts::unmount(staging, SILENCE).is_err() {
            mounts::unmount_lazily(staging)?;
        }
        Ok(())
    }
}
