//! never-format-data: what a volume holds is decided by its own record in the cluster.
//!
//! A file system is made only after the volume's replicas agreed that nothing was ever written to it.
//! Where they do not agree, what is there is mounted, and a probe that finds nothing is an error and
//! never a reason to format. What is said is said under the host's lease: a host that was overtaken
//! can't speak of what the next one is making.

use std::path::Path;
use std::time::Duration;

use ballast_api::{Client, v1 as api};
use tokio::runtime::Handle;

use super::journal;
use super::record::Record;
use crate::cluster::Asking;
use crate::error::Refusal;
use crate::host::{HostError, disks, tools};
use crate::steps::{self, Step};

/// How long making a file system may take: little is written to a blank volume.
const MAKE_TIME: Duration = Duration::from_secs(120);

/// How long a check may take: it replays a journal, and walks everything only after errors.
const CHECK_TIME: Duration = Duration::from_secs(900);

/// Sees to it that the device holds the file system of the record.
///
/// # Errors
/// When it holds something else, or nothing that can be seen and was written to before.
pub fn ensure(asking: &Asking, record: &Record, device: &Path) -> Result<(), Refusal> {
    if !record.read_only {
        let answer = ask(asking, record, api::VolumeContent::Formatting)?;
        if !answer.refused {
            steps::reached(Step::FormattingNoted);
            tracing::info!(volume = record.volume_id, fs = record.fs_type, "formatting");
            make(device, &record.fs_type, answer.ever_written)?;
            steps::reached(Step::Made);
            let recorded = ask(asking, record, api::VolumeContent::Filesystem)?;
            steps::reached(Step::ContentNoted);
            if recorded.refused {
                return Err(unusable(record, "its content changed while it was formatted"));
            }
        }
    }
    match disks::probe(device)? {
        Some(found) if found == record.fs_type => {}
        Some(found) => {
            return Err(unusable(
                record,
                &format!("it holds {found}, and {} is wanted", record.fs_type),
            ));
        }
        None => return Err(unusable(record, why_nothing(asking, record)?)),
    }
    match record.read_only {
        true => refuse_unread(record, device),
        false if record.fs_type == "ext4" => check_ext4(record, device),
        false => Ok(()),
    }
}

/// Why no file system is found.
fn why_nothing(asking: &Asking, record: &Record) -> Result<&'static str, Refusal> {
    // Only asked, and as anybody may: a lease that only reads says nothing of the content.
    let asked = set(asking, record, api::VolumeContent::Unspecified, 0)?;
    Ok(match asked.ever_written {
        false => {
            "nothing was ever written to it, so it holds no file system, and none is made for \
             reading only: stage it once for writing"
        }
        true => {
            "it was written to, and no file system is found on it: it is not formatted, \
             since that would destroy what may be there; look at it with blkid and the file \
             system's own tools, or delete the volume"
        }
    })
}

/// Mounted with its journal unread, a file system must show all the same what was confirmed.
fn refuse_unread(record: &Record, device: &Path) -> Result<(), Refusal> {
    match journal::must_be_replayed(&record.fs_type, device)? {
        false => Ok(()),
        true => Err(unusable(
            record,
            "its last host ended without an unmount, and what it confirmed may be in the journal \
             only, which can't be replayed for reading only: mount it once for writing",
        )),
    }
}

/// Notes that a volume is used as a raw device, so that nobody ever formats it.
///
/// # Errors
/// When the cluster can't be asked.
pub fn ensure_raw(asking: &Asking, record: &Record) -> Result<(), Refusal> {
    if record.read_only {
        return Ok(());
    }
    // Refused where a file system is known to be: then it is never formatted either.
    ask(asking, record, api::VolumeContent::Raw).map(drop)
}

fn ask(
    asking: &Asking,
    record: &Record,
    content: api::VolumeContent,
) -> Result<api::SetVolumeContentResponse, Refusal> {
    set(asking, record, content, record.epoch)
}

fn set(
    asking: &Asking,
    record: &Record,
    content: api::VolumeContent,
    epoch: u64,
) -> Result<api::SetVolumeContentResponse, Refusal> {
    let request = api::SetVolumeContentRequest {
        volume: record.volume_id.clone(),
        content: content as i32,
        fs_type: record.fs_type.clone(),
        epoch,
    };
    let set = |client: Client| {
        let request = request.clone();
        async move { client.set_volume_content(request).await }
    };
    Handle::current().block_on(asking.ask(set))
}

/// A blank volume reads as zeroes everywhere, so nothing needs to be zeroed; one on which an earlier
/// attempt ended half way does not.
fn make(device: &Path, fs_type: &str, ever_written: bool) -> Result<(), HostError> {
    let device = device.display().to_string();
    let (program, options): (&str, &[&str]) = match (fs_type, ever_written) {
        ("xfs", false) => ("mkfs.xfs", &["-q", "-f", "-K"]),
        ("xfs", true) => ("mkfs.xfs", &["-q", "-f"]),
        (_, false) => {
            ("mkfs.ext4", &["-q", "-F", "-m0", "-E", "nodiscard,assume_storage_prezeroed=1"])
        }
        (_, true) => ("mkfs.ext4", &["-q", "-F", "-m0", "-E", "discard"]),
    };
    tools::must(program, &[options, &[device.as_str()]].concat(), MAKE_TIME).map(drop)
}

fn check_ext4(record: &Record, device: &Path) -> Result<(), Refusal> {
    let name = device.display().to_string();
    let ended = tools::run("e2fsck", &["-p", &name], CHECK_TIME)?;
    match ended.code {
        0 => Ok(()),
        // Errors that could be corrected without a question were.
        1 | 2 => {
            tracing::warn!(volume = record.volume_id, said = ended.output.trim(), "corrected");
            Ok(())
        }
        _ => {
            let problem = format!(
                "its file system has errors that need a person ({}): run e2fsck on it",
                tools::failed("e2fsck", &ended)
            );
            Err(unusable(record, &problem))
        }
    }
}

fn unusable(record: &Record, problem: &str) -> Refusal {
    Refusal::ContentUnusable { volume: record.volume_id.clone(), problem: problem.to_owned() }
}
