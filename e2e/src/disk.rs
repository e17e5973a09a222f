//! A disk that fails when it is told to: a file as nbdkit's error filter gives it, and nbdfuse shows
//! it to this machine.

use std::path::{Path, PathBuf};

use crate::peer::{Peer, free_port, nbdkit};
use crate::process::Running;
use crate::scratch::{Scratch, unmount_below};
use crate::wait;

/// A disk that works until [`FailingDisk::fail`].
#[derive(Debug)]
pub struct FailingDisk {
    /// The file to be used.
    pub path: PathBuf,
    folder: PathBuf,
    trigger: PathBuf,
    _fuse: Running,
    _server: Peer,
}

impl FailingDisk {
    /// What is in the file `behind`, through a disk that can fail.
    ///
    /// # Panics
    /// When nbdkit or FUSE are not to be had.
    #[track_caller]
    pub fn over(scratch: &Scratch, behind: &Path) -> FailingDisk {
        let folder = scratch.path().join("failing-disk");
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        let (path, trigger) = (folder.join("disk"), scratch.path().join("disk-fails"));
        std::fs::write(&path, "").expect("a file can be made");
        let (behind, file) = (behind.display().to_string(), path.display().to_string());
        let errors = format!("error-file={}", trigger.display());
        let plugin = ["--filter=error", "file", &behind, "error=EIO", "error-rate=100%", &errors];
        let server = nbdkit(scratch, free_port(), &plugin);
        let log = scratch.path().join("nbdfuse.log");
        let mut fuse = Running::start(&log, &["nbdfuse", &file, &server.uri], false);
        wait::until_true("the file of nbdfuse", 20, || {
            assert!(fuse.is_running(), "nbdfuse ended: {}", fuse.log());
            std::fs::metadata(&path).is_ok_and(|file| file.len() > 0)
        });
        FailingDisk { path, folder, trigger, _fuse: fuse, _server: server }
    }

    /// From now on whatever is asked of it fails with EIO.
    ///
    /// # Panics
    /// When the file system refuses.
    pub fn fail(&self) {
        std::fs::write(&self.trigger, "").expect("a file can be made");
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        unmount_below(&self.folder);
    }
}
