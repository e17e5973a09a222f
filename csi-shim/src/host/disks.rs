//! Block devices: loop devices, sizes, what a probe sees.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{HostError, poll, tools, within};

/// How long a small tool may take.
const TOOL_TIME: Duration = Duration::from_secs(20);

/// How long a device may take to be let go by the kernel.
const RELEASE_TIME: Duration = Duration::from_secs(10);

/// Loop devices that stand on a file.
///
/// # Errors
/// When /sys is not there.
pub fn loops_on(file: &Path) -> Result<Vec<PathBuf>, HostError> {
    let folder = Path::new("/sys/block");
    let entries = fs::read_dir(folder).map_err(HostError::file(folder, "read"))?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
        if backing.is_ok_and(|backing| Path::new(backing.trim_end_matches('\n')) == file) {
            found.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    found.sort();
    Ok(found)
}

/// The loop device on a file, made if there is none. Reads and writes go past the page cache of the
/// file, so that what one host wrote is what another one reads.
///
/// # Errors
/// When losetup fails.
pub fn make_loop(file: &Path, read_only: bool) -> Result<PathBuf, HostError> {
    if let Some(device) = loops_on(file)?.into_iter().next() {
        return Ok(device);
    }
    let name = file.display().to_string();
    // Blocks as the volume has them: a file system made here fits any other attachment.
    let mut arguments = vec!["--find", "--show", "--direct-io=on", "--sector-size=4096"];
    if read_only {
        arguments.push("--read-only");
    }
    arguments.push(&name);
    let printed = tools::must("losetup", &arguments, TOOL_TIME)?;
    Ok(PathBuf::from(printed.trim()))
}

/// Takes a file's loop devices away and waits until the kernel has let them go.
///
/// # Errors
/// When one is in use.
pub fn remove_loops(file: &Path) -> Result<(), HostError> {
    for device in loops_on(file)? {
        tools::must("losetup", &["--detach", &device.display().to_string()], TOOL_TIME)?;
    }
    let gone = || loops_on(file).is_ok_and(|left| left.is_empty()).then_some(());
    poll(RELEASE_TIME, gone).ok_or_else(|| HostError::Slow {
        what: format!("the release of the loop device on {}", file.display()),
        after: RELEASE_TIME,
    })
}

/// Lets a loop device see that its file has grown.
///
/// # Errors
/// When losetup fails.
pub fn refresh_loop(device: &Path) -> Result<(), HostError> {
    let device = device.display().to_string();
    tools::must("losetup", &["--set-capacity", &device], TOOL_TIME).map(drop)
}

/// Bytes of a device or file.
///
/// # Errors
/// When it can't be opened in time.
pub fn size(path: &Path) -> Result<u64, HostError> {
    let owned = path.to_owned();
    let seek = move || File::open(&owned).and_then(|mut file| file.seek(SeekFrom::End(0)));
    let what = format!("opening {}", path.display());
    within(&what, TOOL_TIME, seek)?.map_err(HostError::file(path, "opened"))
}

/// Whether a block of a device or file can be read from where it really is.
pub fn read_past_caches(path: &Path, offset: u64) -> bool {
    read_directly(path, offset).is_ok()
}

/// A block of a device or file, from where it really is.
///
/// # Errors
/// When it can't be read in time.
pub fn read_block(path: &Path, offset: u64, time: Duration) -> Result<[u8; 4096], HostError> {
    let owned = path.to_owned();
    let what = format!("reading {}", path.display());
    within(&what, time, move || read_directly(&owned, offset))?
        .map_err(HostError::file(path, "read"))
}

fn read_directly(path: &Path, offset: u64) -> std::io::Result<[u8; 4096]> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let direct = nix::fcntl::OFlag::O_DIRECT.bits();
    let file = File::options().read(true).custom_flags(direct).open(path)?;
    // Direct reads of devices want memory that begins at a block.
    let mut block = AlignedBlock([0; 4096]);
    file.read_exact_at(&mut block.0, offset)?;
    Ok(block.0)
}

#[repr(align(4096))]
struct AlignedBlock([u8; 4096]);

/// The file system that a probe sees, if any: never a reason to format.
///
/// # Errors
/// When the device can't be read, or the probe sees several.
pub fn probe(device: &Path) -> Result<Option<String>, HostError> {
    let name = device.display().to_string();
    let arguments = ["--probe", "--output", "value", "--match-tag", "TYPE", &name];
    let ended = tools::run("blkid", &arguments, TOOL_TIME)?;
    match ended.code {
        0 => Ok(Some(ended.output.trim().to_owned()).filter(|kind| !kind.is_empty())),
        // Nothing was found.
        2 if ended.errors.trim().is_empty() => Ok(None),
        _ => Err(tools::failed("blkid", &ended)),
    }
}
