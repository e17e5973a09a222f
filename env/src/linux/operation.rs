//! One disk operation in the hands of the kernel: its memory, its submission entry, its progress.
//!
//! Pure but for the raw pointers in the entries. Never touches the ring.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ballast_block::AlignedBuf;
use ballast_block::limits::RING_PUT_OFF_MAX;
use bytes::Bytes;
use io_uring::{opcode, squeue, types};

use super::open::Handle;

/// Most vectors of one system call (UIO_MAXIOV).
const VECTORS_MAX: usize = 1024;

/// A disk operation: owns what the kernel reads or writes until its completion.
pub(super) struct Operation {
    file: Arc<Handle>,
    offset: u64,
    /// Bytes done, by the completions so far.
    done: u64,
    put_off: u32,
    work: Work,
}

/// What to do.
pub(super) enum Work {
    /// Fill the buffer.
    Read(AlignedBuf),
    /// Write the parts back to back, durably.
    Write {
        /// None of them empty.
        parts: Vec<Bytes>,
        /// The vectors of the entry in flight; they point into `parts`.
        vectors: Vec<libc::iovec>,
    },
    /// Punch a hole of so many bytes.
    Punch(u64),
}

/// What follows a completion.
pub(super) enum Step {
    /// Submit the rest.
    Again,
    /// All is written and waits for a flush of the file.
    Flush,
    /// The operation has ended.
    Done(io::Result<()>),
}

impl Operation {
    pub(super) fn read(file: Arc<Handle>, offset: u64, buffer: AlignedBuf) -> Self {
        Self { file, offset, done: 0, put_off: 0, work: Work::Read(buffer) }
    }

    pub(super) fn write(file: Arc<Handle>, offset: u64, parts: Vec<Bytes>) -> Self {
        let work = Work::Write { parts, vectors: Vec::new() };
        Self { file, offset, done: 0, put_off: 0, work }
    }

    pub(super) fn punch(file: Arc<Handle>, offset: u64, length: u64) -> Self {
        Self { file, offset, done: 0, put_off: 0, work: Work::Punch(length) }
    }

    /// Its file.
    pub(super) fn file(&self) -> &Arc<Handle> {
        &self.file
    }

    /// Whether a flush of its file must follow.
    pub(super) fn is_flushed_write(&self) -> bool {
        matches!(self.work, Work::Write { .. }) && self.file.flushes()
    }

    /// Whether one entry asks for all of it.
    pub(super) fn is_one_entry(&self) -> bool {
        match &self.work {
            Work::Write { parts, .. } => {
                parts.len() <= VECTORS_MAX && total(parts) <= TRANSFER_MAX as u64
            }
            Work::Read(buffer) => buffer.len() <= TRANSFER_MAX,
            Work::Punch(_) => true,
        }
    }

    /// The buffer of a read.
    pub(super) fn into_buffer(self) -> AlignedBuf {
        match self.work {
            Work::Read(buffer) => buffer,
            Work::Write { .. } | Work::Punch(_) => panic!("only a read has a buffer"),
        }
    }

    /// The entry for what is left to do. Valid as long as `self` lives and no other is made.
    pub(super) fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let offset = self.offset + self.done;
        let flags = if self.file.flushes() { 0 } else { libc::RWF_DSYNC };
        match &mut self.work {
            Work::Read(buffer) => {
                let rest = &mut buffer[self.done as usize..];
                opcode::Read::new(fd, rest.as_mut_ptr(), clamp(rest.len())).offset(offset).build()
            }
            Work::Write { parts, vectors } => {
                gather(parts, self.done, vectors);
                if let [one] = vectors[..] {
                    opcode::Write::new(fd, one.iov_base.cast(), clamp(one.iov_len))
                        .offset(offset)
                        .rw_flags(flags)
                        .build()
                } else {
                    opcode::Writev::new(fd, vectors.as_ptr(), vectors.len() as u32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build()
                }
            }
            Work::Punch(length) => opcode::Fallocate::new(fd, *length)
                .offset(offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
        }
    }

    /// Takes the result of a completion into account.
    pub(super) fn advance(&mut self, result: i32) -> Step {
        if result < 0 {
            let error = io::Error::from_raw_os_error(-result);
            let put_off = matches!(-result, libc::EINTR | libc::EAGAIN);
            if put_off && self.put_off < RING_PUT_OFF_MAX {
                self.put_off += 1;
                return Step::Again;
            }
            return Step::Done(Err(error));
        }
        self.put_off = 0;
        self.done += u64::from(result.unsigned_abs());
        let (length, at_end) = match &self.work {
            Work::Read(buffer) => (buffer.len() as u64, io::ErrorKind::UnexpectedEof),
            Work::Write { parts, .. } => (total(parts), io::ErrorKind::WriteZero),
            Work::Punch(_) => return Step::Done(Ok(())),
        };
        if self.done == length {
            return if self.is_flushed_write() { Step::Flush } else { Step::Done(Ok(())) };
        }
        // The rest of a file's last sector can't be transferred directly.
        if result == 0 || !self.done.is_multiple_of(SECTOR) {
            return Step::Done(Err(at_end.into()));
        }
        Step::Again
    }
}

/// What direct I/O always transfers whole, in bytes.
const SECTOR: u64 = 512;

/// Bytes of all parts.
pub(super) fn total(parts: &[Bytes]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

/// The kernel moves at most this much with one call.
const TRANSFER_MAX: usize = 0x7fff_f000;

fn clamp(length: usize) -> u32 {
    length.min(TRANSFER_MAX) as u32
}

/// Fills `vectors` with the memory of `parts` behind their first `done` bytes, neighbours in
/// memory as one; as many as one call takes.
fn gather(parts: &[Bytes], done: u64, vectors: &mut Vec<libc::iovec>) {
    vectors.clear();
    let mut skip = done as usize;
    for part in parts {
        if skip >= part.len() {
            skip -= part.len();
            continue;
        }
        let rest = &part[skip..];
        skip = 0;
        let base = rest.as_ptr().cast_mut();
        if let Some(last) = vectors.last_mut()
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base
        {
            last.iov_len += rest.len();
            continue;
        }
        if vectors.len() == VECTORS_MAX {
            return;
        }
        vectors.push(libc::iovec { iov_base: base.cast(), iov_len: rest.len() });
    }
}
