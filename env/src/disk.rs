//! Files and disks.
//!
//! Contract (held by the conformance suite on the real and on the simulated disk):
//! buffers are owned by the operation and come back with it, also on error; dropping the future
//! neither cancels the operation nor frees its memory. Offsets, lengths and memory of `read_at`
//! and `write_at` are whole blocks. A `write_at` that returned `Ok` is on stable storage. One that
//! failed or never returned may be there whole, in part (any subset of its 512-byte sectors) or
//! not at all. Concurrent writes of one file may land in any order. Writing or discarding past the
//! end is an `InvalidInput` error and changes nothing; through a `ReadOnly` open it is
//! `PermissionDenied`. An operation starts when its future is first polled, or waits for its turn.

use std::future::Future;
use std::io;
use std::path::Path;

use ballast_block::AlignedBuf;
use bytes::Bytes;

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file or device, for reading and writing, locked against a second opener: fails
    /// with `WouldBlock` when another process (or another open of the same node) holds it.
    Exclusive,
    /// An existing file or device, for reading only, not locked.
    ReadOnly,
    /// A new regular file of that many bytes, locked; fails with `AlreadyExists`.
    CreateNew {
        /// Its size in bytes; the space is allocated.
        size: u64,
    },
}

/// Opens files.
pub trait Disk {
    /// An open file.
    type File: File;

    /// Opens a file, partition or disk for direct I/O.
    fn open(
        &self,
        path: &Path,
        mode: OpenMode,
    ) -> impl Future<Output = io::Result<Self::File>> + 'static;
}

/// An open file or device. Closed (and unlocked) when dropped.
pub trait File: 'static {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` (its whole length) from `offset`.
    ///
    /// Reading past the end is an `UnexpectedEof` error.
    fn read_at(
        &self,
        offset: u64,
        buffer: AlignedBuf,
    ) -> impl Future<Output = (io::Result<()>, AlignedBuf)> + 'static;

    /// Writes `parts` back to back at `offset`, durable when it returns `Ok` (O_DIRECT, with
    /// RWF_DSYNC or a flush behind it). Every part is block-aligned in memory and a whole number of blocks.
    fn write_at(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
    ) -> impl Future<Output = io::Result<()>> + 'static;

    /// Gives the range back to the device; it reads as zeroes or as before. Best effort, no
    /// promise on durability.
    fn discard(&self, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> + 'static;
}
