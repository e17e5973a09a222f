//! Files and folders.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::HostError;
use crate::steps::{self, Step};

/// Writes a file so that after a crash it is the old one or the new one, whole.
///
/// # Errors
/// When the file system refuses.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    let new = path.with_extension("new");
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut file = File::create(&new).map_err(HostError::file(&new, "made"))?;
    file.write_all(bytes).map_err(HostError::file(&new, "written"))?;
    file.sync_all().map_err(HostError::file(&new, "synced"))?;
    steps::reached(Step::RecordHalfWritten);
    fs::rename(&new, path).map_err(HostError::file(path, "replaced"))?;
    sync_folder(folder)
}

/// Removes a file, durably, and what [`write_atomically`] left of it when it was killed; what is not
/// there is no error.
///
/// # Errors
/// When the file system refuses.
pub fn remove(path: &Path) -> Result<(), HostError> {
    let mut removed = false;
    for path in [&path.with_extension("new"), path] {
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(HostError::file(path, "removed")(error)),
            Ok(()) => removed = true,
        }
    }
    if removed { sync_folder(path.parent().unwrap_or(Path::new("/"))) } else { Ok(()) }
}

/// Removes a file or an empty folder, whichever there is.
///
/// # Errors
/// When there is something else, or the file system refuses.
pub fn remove_target(path: &Path) -> Result<(), HostError> {
    let removed = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(there) if there.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
    };
    removed.map_err(HostError::file(path, "removed"))
}

/// Makes a folder with its parents.
///
/// # Errors
/// When the file system refuses.
pub fn make_folder(path: &Path) -> Result<(), HostError> {
    fs::create_dir_all(path).map_err(HostError::file(path, "made"))
}

/// Makes an empty file unless there is one.
///
/// # Errors
/// When the file system refuses.
pub fn make_file(path: &Path) -> Result<(), HostError> {
    let file = File::options().create(true).append(true).open(path);
    file.map(drop).map_err(HostError::file(path, "made"))
}

fn sync_folder(folder: &Path) -> Result<(), HostError> {
    File::open(folder).and_then(|it| it.sync_all()).map_err(HostError::file(folder, "synced"))
}
