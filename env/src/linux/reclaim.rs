//! A process that serves its own host's file systems, and the kernel's search for free memory.
//!
//! Owns the two settings against waiting for oneself; both are the whole process's. When memory is
//! short, the kernel makes whoever allocates write dirty pages of file systems out. Where those
//! lie on a volume of this node, the writing waits for this process: which must then neither be
//! the one that writes them out, nor wait until its own pages are read back from a disk.
//! docs/guide/memory.md says what remains.

use std::io;

use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// Linux's number for it; the `libc` crate has none.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that this process is part of the way to a disk (`PR_SET_IO_FLUSHER`): what it
/// allocates never waits for file systems or block devices, and writing dirty pages is slowed
/// down for it only as far as it made them. Call it before there are threads: later ones, and the
/// kernel's workers of `io_uring`, inherit it.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_RESOURCE`; `InvalidInput` on a kernel before 5.6.
pub fn mark_io_flusher() -> io::Result<()> {
    let (yes, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: numbers only; the kernel refuses what it does not know.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, yes, unused, unused, unused) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// Keeps every page of this process, now and later, in memory from its first use on: its code too.
///
/// Only pages that are used count (`MCL_ONFAULT`), so this costs no memory by itself. It is not
/// done under a limit (`RLIMIT_MEMLOCK`): later allocations that exceed it would fail.
///
/// # Errors
/// `PermissionDenied` where the limit can't be lifted (`CAP_SYS_RESOURCE`, or no limit to begin
/// with) and the process may not pass it either (`CAP_IPC_LOCK`); `InvalidInput` on a kernel
/// before 4.4.
pub fn lock_memory() -> io::Result<()> {
    let all = MlockAllFlags::MCL_CURRENT
        | MlockAllFlags::MCL_FUTURE
        | MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    let limit = Resource::RLIMIT_MEMLOCK;
    let (soft, hard) = getrlimit(limit)?;
    if setrlimit(limit, RLIM_INFINITY, RLIM_INFINITY).is_ok() {
        return Ok(mlockall(all)?);
    }
    // Under a limit of nothing, only who may pass any limit succeeds.
    setrlimit(limit, 0, hard)?;
    let locked = mlockall(all);
    setrlimit(limit, soft, hard)?;
    Ok(locked?)
}
