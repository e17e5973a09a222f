//! Opening files and devices: direct I/O, the lock, the size.
//!
//! Owns the file descriptor and its lock. Blocks: runs on a helper thread.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ballast_block::BLOCK_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg};
use nix::unistd::Whence;
use thiserror::Error;

use super::flush::SyncBy;
use crate::disk::OpenMode;

/// Why a file was not opened; inside an [`io::Error`] of the kind that
/// [`Disk::open`](crate::disk::Disk::open) promises.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another open holds its lock.
    #[error("{0}: in use by another process or another pool of this one; stop that first")]
    Locked(PathBuf),
    /// A device that is mounted or claimed.
    #[error("{0}: the device is mounted or claimed (file system, LVM, RAID); release it first")]
    Claimed(PathBuf),
    /// Its file system has no O_DIRECT, or only in larger units than a block.
    #[error("{0}: no direct I/O in blocks of 4096 bytes here; use ext4, XFS or a block device")]
    NoDirectIo(PathBuf),
    /// Neither a regular file nor a block device.
    #[error("{0}: neither a regular file nor a block device")]
    WrongType(PathBuf),
    /// The space of a new file can't be allocated.
    #[error(
        "{path}: {size} bytes can't be allocated ({source}); give a smaller size or free space"
    )]
    Allocation {
        /// The new file.
        path: PathBuf,
        /// Its size, in bytes.
        size: u64,
        /// What the file system says.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{path}: {call}: {source}")]
    Call {
        /// The file.
        path: PathBuf,
        /// The system call.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
}

impl From<OpenError> for io::Error {
    fn from(error: OpenError) -> Self {
        let kind = match &error {
            OpenError::Locked(_) | OpenError::Claimed(_) => io::ErrorKind::WouldBlock,
            OpenError::NoDirectIo(_) => io::ErrorKind::Unsupported,
            OpenError::WrongType(_) => io::ErrorKind::InvalidInput,
            OpenError::Allocation { source, .. } | OpenError::Call { source, .. } => source.kind(),
        };
        io::Error::new(kind, error)
    }
}

/// An open file descriptor. Unlocked, then closed, when dropped: operations hold a reference.
pub(super) struct Handle {
    descriptor: Descriptor,
    kind: Kind,
    size: u64,
    flushes: bool,
}

enum Descriptor {
    /// Unlocks explicitly when dropped: the kernel may hold on to the open file a little longer
    /// than its last completion, and the lock with it.
    Locked(Flock<File>),
    ReadOnly(File),
}

/// What kind of file it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    Device,
}

nix::ioctl_write_ptr_bad!(
    /// Discards a range of bytes: offset, length.
    block_discard,
    nix::request_code_none!(0x12, 119),
    [u64; 2]
);

impl Handle {
    /// Its size in bytes, as it was when opened.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether a write is followed by a flush, instead of carrying RWF_DSYNC.
    pub(super) fn flushes(&self) -> bool {
        self.flushes
    }

    pub(super) fn is_writable(&self) -> bool {
        matches!(self.descriptor, Descriptor::Locked(_))
    }

    /// Discards a range of a device; blocks.
    pub(super) fn discard_device(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the fd is open and the range is two numbers, as BLKDISCARD expects.
        unsafe { block_discard(self.as_raw_fd(), &[offset, length]) }?;
        Ok(())
    }
}

impl AsRawFd for Handle {
    fn as_raw_fd(&self) -> RawFd {
        match &self.descriptor {
            Descriptor::Locked(file) => file.as_raw_fd(),
            Descriptor::ReadOnly(file) => file.as_raw_fd(),
        }
    }
}

/// Opens `path`; blocks.
pub(super) fn open(path: &Path, mode: OpenMode, sync_by: SyncBy) -> io::Result<Handle> {
    let mut options = OpenOptions::new();
    options.read(true);
    let flags = match mode {
        // On a block device O_EXCL also keeps mounts and other users of the device out; on a
        // regular file that exists it means nothing.
        OpenMode::Exclusive => {
            options.write(true);
            libc::O_DIRECT | libc::O_EXCL
        }
        OpenMode::ReadOnly => libc::O_DIRECT,
        OpenMode::CreateNew { .. } => {
            options.write(true).create_new(true).mode(0o600);
            libc::O_DIRECT
        }
    };
    let file =
        options.custom_flags(flags).open(path).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => OpenError::Claimed(path.to_owned()),
            Some(libc::EINVAL) if is_wrong_type(path) => OpenError::WrongType(path.to_owned()),
            Some(libc::EINVAL) => OpenError::NoDirectIo(path.to_owned()),
            _ => failed(path, "open", source),
        })?;
    let OpenMode::CreateNew { size } = mode else {
        return existing(path, file, mode, sync_by);
    };
    let file = lock(path, file)?;
    create(path, &file, size).inspect_err(|_| {
        // Nobody can have used it: the lock is ours. A second error says no more than the first.
        drop(std::fs::remove_file(path));
    })?;
    let flushes = flushes(&file, sync_by);
    Ok(Handle { descriptor: Descriptor::Locked(file), kind: Kind::Regular, size, flushes })
}

fn is_wrong_type(path: &Path) -> bool {
    std::fs::metadata(path)
        .is_ok_and(|found| !found.is_file() && !found.file_type().is_block_device())
}

fn existing(path: &Path, file: File, mode: OpenMode, sync_by: SyncBy) -> io::Result<Handle> {
    let metadata = file.metadata().map_err(|source| failed(path, "stat", source))?;
    let (kind, size) = if metadata.is_file() {
        (Kind::Regular, metadata.len())
    } else if metadata.file_type().is_block_device() {
        let end = nix::unistd::lseek64(&file, 0, Whence::SeekEnd)
            .map_err(|errno| failed(path, "lseek", errno.into()))?;
        (Kind::Device, end.unsigned_abs())
    } else {
        return Err(OpenError::WrongType(path.to_owned()).into());
    };
    check_direct(path)?;
    let flushes = kind == Kind::Regular && flushes(&file, sync_by);
    let descriptor = match mode {
        OpenMode::ReadOnly => Descriptor::ReadOnly(file),
        OpenMode::Exclusive | OpenMode::CreateNew { .. } => Descriptor::Locked(lock(path, file)?),
    };
    Ok(Handle { descriptor, kind, size, flushes })
}

fn flushes(file: &File, sync_by: SyncBy) -> bool {
    match sync_by {
        SyncBy::Flag => false,
        SyncBy::Flush => true,
        SyncBy::Disk => file.metadata().is_ok_and(|found| needs_flush(found.dev())),
    }
}

/// Whether the disk under a file system has a volatile cache and can't write around it (FUA), as
/// far as sysfs tells.
fn needs_flush(device: u64) -> bool {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let own = format!("/sys/dev/block/{major}:{minor}");
    let attribute = |name: &str| {
        // A partition has no queue of its own, its disk above it has.
        std::fs::read_to_string(format!("{own}/queue/{name}"))
            .or_else(|_| std::fs::read_to_string(format!("{own}/../queue/{name}")))
    };
    let volatile = attribute("write_cache").is_ok_and(|text| text.trim() == "write back");
    volatile && attribute("fua").is_ok_and(|text| text.trim() == "0")
}

/// How often a lock that another holds is asked for again, and how long to wait in between: a process
/// that was killed holds its files until the kernel has ended what its ring had in flight, which is
/// after the process is gone.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

fn lock(path: &Path, mut file: File) -> Result<Flock<File>, OpenError> {
    for _ in 1..LOCK_TRIES {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((held, Errno::EWOULDBLOCK)) => file = held,
            Err((_, errno)) => return Err(failed(path, "flock", errno.into())),
        }
        // Nothing else runs yet on a shard that opens its pool.
        std::thread::sleep(LOCK_PAUSE);
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => OpenError::Locked(path.to_owned()),
        _ => failed(path, "flock", errno.into()),
    })
}

/// Allocates the space, and makes file and name survive a power loss. The extents are *unwritten*
/// then: the first write of each is followed by a commit of the file system's journal.
fn create(path: &Path, file: &File, size: u64) -> Result<(), OpenError> {
    check_direct(path)?;
    if size > 0 {
        let length = i64::try_from(size).map_err(|_| Errno::EFBIG);
        length
            .and_then(|length| nix::fcntl::fallocate(file, FallocateFlags::empty(), 0, length))
            .map_err(|errno| OpenError::Allocation {
            path: path.to_owned(),
            size,
            source: errno.into(),
        })?;
    }
    file.sync_all().map_err(|source| failed(path, "fsync", source))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let folder: OwnedFd =
        File::open(parent).map_err(|source| failed(parent, "open", source))?.into();
    nix::unistd::fsync(&folder).map_err(|errno| failed(parent, "fsync", errno.into()))
}

/// Where the kernel tells (6.1), direct I/O must work in blocks; some file systems accept the flag
/// and then refuse or buffer the I/O.
fn check_direct(path: &Path) -> Result<(), OpenError> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| failed(path, "statx", io::ErrorKind::InvalidInput.into()))?;
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: `name` ends with a zero byte and `answer` is valid for the write.
    let result = unsafe {
        libc::statx(libc::AT_FDCWD, name.as_ptr(), 0, libc::STATX_DIOALIGN, answer.as_mut_ptr())
    };
    if result != 0 {
        return Err(failed(path, "statx", io::Error::last_os_error()));
    }
    // SAFETY: plain numbers, zeroed above.
    let answer = unsafe { answer.assume_init() };
    let told = answer.stx_mask & libc::STATX_DIOALIGN != 0;
    let block = BLOCK_SIZE as u32;
    let fits = |align: u32| align > 0 && block.is_multiple_of(align);
    if told && !(fits(answer.stx_dio_offset_align) && fits(answer.stx_dio_mem_align)) {
        return Err(OpenError::NoDirectIo(path.to_owned()));
    }
    Ok(())
}

fn failed(path: &Path, call: &'static str, source: io::Error) -> OpenError {
    OpenError::Call { path: path.to_owned(), call, source }
}
