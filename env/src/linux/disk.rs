//! Files and disks over the shard's ring. Write path: step 5 (append).
//!
//! Owns the checks of what callers pass and the choice of the system call. Never splits, merges or
//! orders writes beyond what one `write_at` asks for.

use std::future::Future;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use ballast_block::buffer::is_block_aligned;
use ballast_block::{AlignedBuf, BLOCK_SIZE};
use bytes::Bytes;

use super::LinuxEnv;
use super::open::{Handle, Kind, open};
use super::operation::{Operation, total};
use super::ring::Ring;
use crate::disk::{Disk, File, OpenMode};

impl Disk for LinuxEnv {
    type File = LinuxFile;

    /// Opening blocks (CreateNew allocates and syncs), so it runs on a helper thread.
    fn open(
        &self,
        path: &Path,
        mode: OpenMode,
    ) -> impl Future<Output = io::Result<LinuxFile>> + 'static {
        let (ring, path, sync_by) = (self.ring.clone(), path.to_owned(), self.sync_by);
        async move {
            let handle = blocking(move || open(&path, mode, sync_by)).await?;
            Ok(LinuxFile { ring, handle: Arc::new(handle) })
        }
    }
}

/// An open file, partition or disk.
pub struct LinuxFile {
    ring: Rc<Ring>,
    handle: Arc<Handle>,
}

impl File for LinuxFile {
    fn size(&self) -> u64 {
        self.handle.size()
    }

    fn read_at(
        &self,
        offset: u64,
        buffer: AlignedBuf,
    ) -> impl Future<Output = (io::Result<()>, AlignedBuf)> + 'static {
        let (ring, handle) = (self.ring.clone(), self.handle.clone());
        async move {
            let length = buffer.len() as u64;
            if let Err(error) = check_blocks(offset, length) {
                return (Err(error), buffer);
            }
            if offset.checked_add(length).is_none_or(|end| end > handle.size()) {
                return (Err(io::ErrorKind::UnexpectedEof.into()), buffer);
            }
            if buffer.is_empty() {
                return (Ok(()), buffer);
            }
            let (result, operation) = ring.run(Operation::read(handle, offset, buffer)).await;
            (result, operation.into_buffer())
        }
    }

    fn write_at(
        &self,
        offset: u64,
        mut parts: Vec<Bytes>,
    ) -> impl Future<Output = io::Result<()>> + 'static {
        let (ring, handle) = (self.ring.clone(), self.handle.clone());
        async move {
            parts.retain(|part| !part.is_empty());
            check_blocks(offset, total(&parts))?;
            if !parts.iter().all(|part| is_block_aligned(part)) {
                return Err(invalid("a part of the write is not block-aligned memory"));
            }
            check_range(&handle, offset, total(&parts))?;
            if parts.is_empty() {
                return Ok(());
            }
            ring.run(Operation::write(handle, offset, parts)).await.0
        }
    }

    /// On a device, BLKDISCARD. On a regular file, a hole: the file system gets the space back,
    /// so a later write there allocates anew (it may find the file system full, and it waits for
    /// the journal).
    fn discard(&self, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> + 'static {
        let (ring, handle) = (self.ring.clone(), self.handle.clone());
        async move {
            check_blocks(offset, length)?;
            check_range(&handle, offset, length)?;
            if length == 0 {
                return Ok(());
            }
            let result = match handle.kind() {
                Kind::Device => blocking(move || handle.discard_device(offset, length)).await,
                Kind::Regular => ring.run(Operation::punch(handle, offset, length)).await.0,
            };
            match result {
                // Best effort: some devices and file systems can't.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
                other => other,
            }
        }
    }
}

fn check_blocks(offset: u64, length: u64) -> io::Result<()> {
    let block = BLOCK_SIZE as u64;
    if offset.is_multiple_of(block) && length.is_multiple_of(block) {
        return Ok(());
    }
    Err(invalid("offset and length must be whole blocks"))
}

fn check_range(handle: &Handle, offset: u64, length: u64) -> io::Result<()> {
    if !handle.is_writable() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "opened for reading only"));
    }
    if offset.checked_add(length).is_none_or(|end| end > handle.size()) {
        return Err(invalid("the range ends behind the end of the file"));
    }
    Ok(())
}

fn invalid(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

/// Runs a blocking call on a helper thread; it goes on when the future is dropped.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(call).await.map_err(io::Error::other)?
}
