//! A mounted file system that is a single file: the kernel's FUSE protocol (version 7.31), as far as a
//! loop device uses it.
//!
//! Layouts are those of the kernel's `include/uapi/linux/fuse.h`, little endian here as everywhere
//! that this project runs. The root itself is the file, so nothing is ever looked up by name.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};

/// The type under which the file system is mounted.
pub const FS_TYPE: &str = "fuse.ballast";

/// The largest read or write that the kernel sends us: what a volume takes as one write.
pub const TRANSFER_BYTES: usize = ballast_block::limits::TRANSFER_BYTES_MAX;

/// What one read of the device must have room for: a header, a write's own, the data.
pub const REQUEST_BYTES: usize = TRANSFER_BYTES + 4096;

const HEADER_BYTES: usize = 40;
const VERSION: (u32, u32) = (7, 31);
const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
const PARALLEL_DIRECT_IO: u32 = 1 << 15;
const MAX_PAGES: u32 = 1 << 22;
/// Requests that the kernel keeps under way in the background.
const BACKGROUND: u16 = 64;
const BLOCK: u32 = 4096;

/// Fallocate that leaves no data and the size as it is; loop devices discard and zero so.
const PUNCH_HOLE: u32 = 0x02;
const ZERO_RANGE: u32 = 0x10;

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Its number, for the reply.
    pub unique: u64,
    /// What.
    pub operation: Operation<'a>,
}

/// The operations that a loop device leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// The greeting, with the kernel's version and flags.
    Init {
        /// Major version.
        major: u32,
        /// What the kernel can do.
        flags: u32,
    },
    /// Size and kind of the file.
    GetAttributes,
    /// A handle.
    Open,
    /// Bytes.
    Read {
        /// From here.
        offset: u64,
        /// So many.
        length: u32,
    },
    /// Bytes.
    Write {
        /// From here.
        offset: u64,
        /// These.
        data: &'a [u8],
    },
    /// Zeroes.
    Zero {
        /// From here.
        offset: u64,
        /// So many.
        length: u64,
    },
    /// Make durable what was written.
    Sync,
    /// How full it is: of no meaning here.
    StatFs,
    /// The end of a handle, and its flush before.
    Close,
    /// No reply is wanted.
    Forget,
    /// The unmount's farewell.
    Destroy,
    /// What is not supported.
    Other(u32),
}

/// Mounts the file system over a file and returns the device through which it is served.
///
/// # Errors
/// When the kernel has no FUSE, or refuses.
pub fn mount_over(path: &Path, read_only: bool) -> io::Result<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open("/dev/fuse")?;
    let options = format!(
        "fd={},rootmode=100600,user_id=0,group_id=0,max_read={TRANSFER_BYTES}",
        device.as_raw_fd()
    );
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    mount(Some("ballast"), path, Some(FS_TYPE), flags, Some(options.as_str()))?;
    Ok(device)
}

/// Reads one request; `None` for bytes that are none.
pub fn parse(bytes: &[u8]) -> Option<Request<'_>> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (opcode, unique) = (u32_at(4)?, u64_at(8)?);
    let body = HEADER_BYTES;
    let operation = match opcode {
        2 | 36 | 42 => Operation::Forget,
        3 => Operation::GetAttributes,
        14 => Operation::Open,
        15 => Operation::Read { offset: u64_at(body + 8)?, length: u32_at(body + 16)? },
        16 => {
            let length = u32_at(body + 16)? as usize;
            let data = bytes.get(body + 40..body + 40 + length)?;
            Operation::Write { offset: u64_at(body + 8)?, data }
        }
        17 => Operation::StatFs,
        18 | 25 => Operation::Close,
        20 => Operation::Sync,
        26 => Operation::Init { major: u32_at(body)?, flags: u32_at(body + 12)? },
        38 => Operation::Destroy,
        43 if u32_at(body + 24)? & (PUNCH_HOLE | ZERO_RANGE) != 0 => {
            Operation::Zero { offset: u64_at(body + 8)?, length: u64_at(body + 16)? }
        }
        other => Operation::Other(other),
    };
    Some(Request { unique, operation })
}

/// Sends a reply: an error number, or what was asked for. One system call, never blocking.
///
/// # Errors
/// `NotFound` when the kernel has given the request up; others when the mount is gone.
pub fn reply(device: &File, unique: u64, result: Result<&[u8], i32>) -> io::Result<()> {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(number) => (-number, &[][..]),
    };
    let length = 16 + body.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend((length as u32).to_le_bytes());
    bytes.extend(error.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(body);
    (&*device).write(&bytes).map(drop)
}

/// The answer to the kernel's greeting.
pub fn init_body(flags: u32) -> Vec<u8> {
    let ours = ASYNC_READ | BIG_WRITES | PARALLEL_DIRECT_IO | MAX_PAGES;
    let mut body = Vec::with_capacity(64);
    for number in [VERSION.0, VERSION.1, TRANSFER_BYTES as u32, flags & ours] {
        body.extend(number.to_le_bytes());
    }
    body.extend(BACKGROUND.to_le_bytes());
    body.extend((BACKGROUND / 4 * 3).to_le_bytes());
    body.extend((TRANSFER_BYTES as u32).to_le_bytes());
    // Times in nanoseconds.
    body.extend(1u32.to_le_bytes());
    body.extend(((TRANSFER_BYTES / BLOCK as usize) as u16).to_le_bytes());
    body.resize(64, 0);
    body
}

/// A file of this size. Never cached: it may grow.
pub fn attributes_body(size: u64, read_only: bool) -> Vec<u8> {
    let mode: u32 = 0o100_000 | if read_only { 0o400 } else { 0o600 };
    let mut body = vec![0; 16];
    for number in [1, size, size / 512, 0, 0, 0] {
        body.extend(number.to_le_bytes());
    }
    for number in [0, 0, 0, mode, 1, 0, 0, 0, BLOCK, 0] {
        body.extend(number.to_le_bytes());
    }
    body
}

/// A handle: the file needs none.
pub fn open_body() -> Vec<u8> {
    vec![0; 16]
}

/// How many bytes were written.
pub fn write_body(length: u32) -> Vec<u8> {
    let mut body = length.to_le_bytes().to_vec();
    body.resize(8, 0);
    body
}

/// A full file system.
pub fn statfs_body(size: u64) -> Vec<u8> {
    let mut body = Vec::with_capacity(80);
    for number in [size / u64::from(BLOCK), 0, 0, 1, 0] {
        body.extend(number.to_le_bytes());
    }
    for number in [BLOCK, 255, BLOCK] {
        body.extend(number.to_le_bytes());
    }
    body.resize(80, 0);
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_BYTES + body.len()) as u32).to_le_bytes().to_vec();
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(7u64.to_le_bytes());
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn requests_are_read_and_short_ones_are_none() {
        let mut write = vec![0; 8];
        write.extend(4096u64.to_le_bytes());
        write.extend(3u32.to_le_bytes());
        write.resize(40, 0);
        write.extend(b"abc");
        let write = bytes(16, &write);
        let operation = Operation::Write { offset: 4096, data: b"abc" };
        assert_eq!(parse(&write), Some(Request { unique: 7, operation }));
        for end in 0..write.len() {
            assert_eq!(parse(&write[..end]), None, "{end}");
        }
        assert_eq!(parse(&bytes(22, &[])).unwrap().operation, Operation::Other(22));
        let mut punch = vec![0; 8];
        punch.extend(8192u64.to_le_bytes());
        punch.extend(4096u64.to_le_bytes());
        punch.extend(3u32.to_le_bytes());
        let operation = Operation::Zero { offset: 8192, length: 4096 };
        assert_eq!(parse(&bytes(43, &punch)).unwrap().operation, operation);
    }

    #[test]
    fn bodies_have_the_kernels_lengths() {
        assert_eq!(init_body(u32::MAX).len(), 64);
        assert_eq!(attributes_body(1 << 30, false).len(), 16 + 88);
        assert_eq!((open_body().len(), write_body(1).len(), statfs_body(1).len()), (16, 8, 80));
    }
}
