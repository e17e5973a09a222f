//! The mount table, and changes to it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{HostError, tools, within};

/// How long mount(8) may take: a journal is replayed within.
const MOUNT_TIME: Duration = Duration::from_secs(120);

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Major and minor number of the file system's device.
    pub device: (u64, u64),
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// Options of the mount itself.
    pub options: String,
    /// Type of the file system.
    pub fs_type: String,
    /// What was given as the source.
    pub source: String,
}

impl Mount {
    /// Whether this mount allows no writes.
    pub fn read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }
}

/// The table of this process's namespace, in the order of mounting.
///
/// # Errors
/// When /proc is not there.
pub fn all() -> Result<Vec<Mount>, HostError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(HostError::file(path, "read"))?;
    Ok(text.lines().filter_map(parse).collect())
}

/// A path as the table has it: without links, whatever of it is there. Its last part is not asked,
/// since what is mounted there may wait for a server.
pub fn resolve(path: &Path) -> PathBuf {
    resolve_links(path, LINKS_MAX)
}

/// As many as the kernel follows.
const LINKS_MAX: u32 = 40;

fn resolve_links(path: &Path, links: u32) -> PathBuf {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return path.to_owned();
    };
    let parent = parent.canonicalize().unwrap_or_else(|_| resolve_links(parent, links));
    match parent.join(name).read_link() {
        Ok(to) if links > 0 => resolve_links(&parent.join(to), links - 1),
        _ => parent.join(name),
    }
}

/// What is mounted at a path ([`resolve`]), on top.
///
/// # Errors
/// As [`all`].
pub fn at(path: &Path) -> Result<Option<Mount>, HostError> {
    Ok(all()?.into_iter().rev().find(|mount| mount.target == path))
}

fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(2);
    let (major, minor) = before.next()?.split_once(':')?;
    let (root, target, options) = (before.next()?, before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (fs_type, source) = (after.next()?, after.next()?);
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: PathBuf::from(unescape(root)),
        target: PathBuf::from(unescape(target)),
        options: options.to_owned(),
        fs_type: fs_type.to_owned(),
        source: unescape(source),
    })
}

/// The kernel writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (first, code) {
            (b'\\', Some(code)) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            (first, _) => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The numbers of a block device.
///
/// # Errors
/// When it is not there.
pub fn device_numbers(device: &Path) -> Result<(u64, u64), HostError> {
    let number = fs::metadata(device).map_err(HostError::file(device, "looked at"))?.rdev();
    Ok((nix::sys::stat::major(number), nix::sys::stat::minor(number)))
}

/// Mounts a device with mount(8), which knows the options of every file system.
///
/// # Errors
/// When it fails.
pub fn mount_device(
    device: &Path,
    target: &Path,
    fs_type: &str,
    options: &[String],
) -> Result<(), HostError> {
    let (device, target) = (device.display().to_string(), target.display().to_string());
    let options = options.join(",");
    let mut arguments = vec!["-t", fs_type];
    if !options.is_empty() {
        arguments.extend(["-o", &options]);
    }
    arguments.extend([device.as_str(), target.as_str()]);
    tools::must("mount", &arguments, MOUNT_TIME).map(drop)
}

/// Mounts what is at one path at another, too.
///
/// # Errors
/// When the kernel refuses.
pub fn bind(source: &Path, target: &Path) -> Result<(), HostError> {
    let bind = MsFlags::MS_BIND;
    mount(Some(source), target, None::<&str>, bind, None::<&str>)
        .map_err(HostError::mount(target, "mounted"))
}

/// Makes a bind mount refuse writes. The other flags of the mount stay.
///
/// # Errors
/// When the kernel refuses.
pub fn remount_read_only(target: &Path) -> Result<(), HostError> {
    let options = at(target)?.map(|mount| mount.options).unwrap_or_default();
    let flag = |option: &str| match option {
        "nosuid" => MsFlags::MS_NOSUID,
        "nodev" => MsFlags::MS_NODEV,
        "noexec" => MsFlags::MS_NOEXEC,
        "noatime" => MsFlags::MS_NOATIME,
        "nodiratime" => MsFlags::MS_NODIRATIME,
        "relatime" => MsFlags::MS_RELATIME,
        _ => MsFlags::empty(),
    };
    let kept = options.split(',').fold(MsFlags::empty(), |flags, option| flags | flag(option));
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | kept;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .map_err(HostError::mount(target, "made read-only"))
}

/// Unmounts everything at a path; nothing there is no error. Waits so long for what must be written.
///
/// # Errors
/// When it is in use, or not done in time: then the kernel goes on, with nothing in the table any
/// more (see `release`).
pub fn unmount(target: &Path, time: Duration) -> Result<(), HostError> {
    let path = target.to_owned();
    let what = format!("the unmount of {}", target.display());
    within(&what, time, move || unmount_to_the_end(&path))?
}

/// Unmounts everything at a path, and returns when all is written, or never.
///
/// # Errors
/// When it is in use.
pub fn unmount_to_the_end(target: &Path) -> Result<(), HostError> {
    while let Some(before) = at(target)? {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Somebody else did it.
            Err(Errno::EINVAL | Errno::ENOENT) if at(target)?.as_ref() != Some(&before) => {}
            Err(error) => return Err(HostError::mount(target, "unmounted")(error)),
        }
    }
    Ok(())
}

/// Takes a mount out of the way at once, in use or not.
///
/// # Errors
/// When the kernel refuses.
pub fn unmount_lazily(target: &Path) -> Result<(), HostError> {
    while at(target)?.is_some() {
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        match umount2(target, flags) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(HostError::mount(target, "unmounted")(error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_table_are_read() {
        let line = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=x";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, (98, 0));
        assert_eq!(
            (mount.root.as_path(), mount.target.as_path()),
            (Path::new("/mnt1"), Path::new("/mnt 2"))
        );
        assert!(!mount.read_only());
        assert_eq!((mount.fs_type.as_str(), mount.source.as_str()), ("ext3", "/dev/root"));
        let none = "36 35 0:5 / /x ro,nosuid - tmpfs none rw";
        assert!(parse(none).unwrap().read_only());
        assert_eq!(unescape("a\\134b\\9"), "a\\b\\9");
        assert!(at(Path::new("/")).unwrap().is_some());
        assert_eq!(at(Path::new("/no such mount")).unwrap(), None);
    }

    #[test]
    fn paths_lose_their_links_as_far_as_they_are_there() {
        use std::os::unix::fs::symlink;
        let folder = std::env::temp_dir().join(format!("ballast-links-{}", std::process::id()));
        fs::create_dir_all(folder.join("real/place")).unwrap();
        let folder = folder.canonicalize().unwrap();
        symlink("real", folder.join("link")).unwrap();
        symlink("../link/place", folder.join("real/last")).unwrap();
        symlink("around", folder.join("around")).unwrap();
        let place = folder.join("real/place");
        for path in ["real/place", "link/place", "link/last", "./link//place", "link/../link/last"]
        {
            assert_eq!(resolve(&folder.join(path)), place, "{path}");
        }
        let missing = folder.join("real/a/b");
        assert_eq!(resolve(&folder.join("link/a/b")), missing);
        // The kernel gives up, too.
        assert_eq!(resolve(&folder.join("around")), folder.join("around"));
        assert_eq!(resolve(Path::new("/")), Path::new("/"));
        fs::remove_dir_all(folder).unwrap();
    }
}
