//! A volume as a file system of this machine: nbdfuse makes a file of it, a loop device a disk.

use std::path::{Path, PathBuf};

use crate::process::{Running, output, run};
use crate::scratch::{Scratch, unmount_below};
use crate::wait;

/// A volume as a block device.
#[derive(Debug)]
pub struct BlockDevice {
    /// `/dev/loopN`.
    pub path: String,
    folder: PathBuf,
    fuse: Running,
}

impl BlockDevice {
    /// Attaches the volume at this address.
    ///
    /// # Panics
    /// When FUSE or loop devices are not to be had.
    #[track_caller]
    pub fn attach(scratch: &Scratch, uri: &str) -> BlockDevice {
        let folder = scratch.path().join("fuse");
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        let file = folder.join("volume").display().to_string();
        std::fs::write(&file, "").expect("a file can be made");
        let log = scratch.path().join("nbdfuse.log");
        let mut fuse = Running::start(&log, &["nbdfuse", &file, uri], false);
        wait::until_true("the file of nbdfuse", 20, || {
            assert!(fuse.is_running(), "nbdfuse ended: {}", fuse.log());
            std::fs::metadata(&file).is_ok_and(|file| file.len() > 0)
        });
        let path = run("losetup", &["--find", "--show", &file]).trim().to_string();
        BlockDevice { path, folder, fuse }
    }

    /// Detaches in order, so that everything written is at the server.
    ///
    /// # Panics
    /// When something still uses it.
    #[track_caller]
    pub fn detach(mut self) {
        run("losetup", &["-d", &self.path]);
        let file = self.folder.join("volume").display().to_string();
        wait::until_true("the release of the loop device", 20, || {
            output("umount", &[&file]).status.success()
        });
        assert_eq!(self.fuse.wait(20), 0, "nbdfuse: {}", self.fuse.log());
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        unmount_below(&self.folder);
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mounted {
    folder: PathBuf,
    mounted: bool,
}

impl Mounted {
    /// Mounts a device in this folder, which is made.
    ///
    /// # Panics
    /// When the kernel refuses.
    #[track_caller]
    pub fn mount(device: &str, folder: &Path) -> Mounted {
        std::fs::create_dir_all(folder).expect("a folder can be made");
        run("mount", &[device, &folder.display().to_string()]);
        Mounted { folder: folder.to_path_buf(), mounted: true }
    }

    /// Unmounts, with everything written.
    ///
    /// # Panics
    /// When something still uses it.
    #[track_caller]
    pub fn unmount(mut self) {
        run("umount", &[&self.folder.display().to_string()]);
        self.mounted = false;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            unmount_below(&self.folder);
        }
    }
}

/// Makes a file system, fills it, unmounts, checks it, mounts it again and compares every file.
///
/// # Panics
/// When a byte differs or the check finds anything.
#[track_caller]
pub fn holds_files(scratch: &Scratch, uri: &str, make: &[&str], check: &[&str]) {
    let device = BlockDevice::attach(scratch, uri);
    let with_device = |command: &[&str]| {
        let arguments = [&command[1..], &[device.path.as_str()]].concat();
        run(command[0], &arguments)
    };
    with_device(make);
    let folder = scratch.path().join("mounted");
    let files = folder.join("files").display().to_string();
    let mounted = Mounted::mount(&device.path, &folder);
    run("cp", &["-a", "/usr/share/perl", &files]);
    let big = folder.join("big").display().to_string();
    run("dd", &["if=/dev/urandom", &format!("of={big}"), "bs=1M", "count=64", "status=none"]);
    let sum = run("sha256sum", &[&big]);
    run("rm", &["-r", &files]);
    run("cp", &["-a", "/usr/share/perl", &files]);
    mounted.unmount();
    with_device(check);
    device.detach();

    // Everything again through a new attachment: nothing may have lived in a cache only.
    let device = BlockDevice::attach(scratch, uri);
    let mounted = Mounted::mount(&device.path, &folder);
    run("diff", &["-r", "--no-dereference", "/usr/share/perl", &files]);
    assert_eq!(run("sha256sum", &[&big]), sum, "the big file");
    mounted.unmount();
    device.detach();
}

/// The commands for ext4.
pub const EXT4: (&[&str], &[&str]) =
    (&["mkfs.ext4", "-q", "-F", "-E", "nodiscard"], &["e2fsck", "-f", "-n"]);
/// The commands for xfs.
pub const XFS: (&[&str], &[&str]) = (&["mkfs.xfs", "-q", "-f", "-K"], &["xfs_repair", "-n"]);
