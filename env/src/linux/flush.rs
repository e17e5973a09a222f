//! Group flush: one fdatasync for all writes of a file that were waiting for it. Write path: step 5.
//!
//! Owns which writes are waiting, and for which flush. Used where RWF_DSYNC is slow (see
//! [`SyncBy`]). A write that is alone has its flush chained to it by the ring and comes here only if
//! that is put off. A write is durable when a flush that began after it was complete has succeeded.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ballast_block::limits::RING_PUT_OFF_MAX;
use io_uring::{opcode, squeue, types};

use super::open::Handle;

/// How writes of regular files are made durable (devices always use the flag).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncBy {
    /// What suits the disk: `Flush` on one that has a volatile cache and no FUA, else `Flag`.
    #[default]
    Disk,
    /// RWF_DSYNC. Without FUA the kernel then ends the write on a worker bound to the CPU of the
    /// disk's interrupt, and each write waits for its time slice when that CPU is busy.
    Flag,
    /// A write without the flag, then fdatasync, shared by the writes that wait at that time.
    Flush,
}

/// The flushes of all files of a ring. A flush takes the place of at least one write in the
/// ring's queues, so there are never more of both than permits.
#[derive(Default)]
pub(super) struct Flushes {
    files: Vec<Option<File>>,
}

struct File {
    handle: Arc<Handle>,
    /// Slots of the writes that the flush in flight makes durable; none: no flush in flight.
    running: Vec<usize>,
    /// Slots of the writes that were complete after it began.
    waiting: Vec<usize>,
    put_off: u32,
}

impl File {
    fn entry(&self) -> squeue::Entry {
        entry(&self.handle)
    }
}

/// A flush of a file.
pub(super) fn entry(handle: &Handle) -> squeue::Entry {
    let fd = types::Fd(handle.as_raw_fd());
    opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
}

/// Whether the kernel wants to be asked again.
pub(super) fn is_put_off(result: i32) -> bool {
    matches!(-result, libc::EINTR | libc::EAGAIN)
}

/// What a flush's completion means.
pub(super) enum Flushed {
    /// Submit this again.
    Again(squeue::Entry),
    /// These writes have ended; with this error number, if any.
    Ended(Vec<usize>, Option<i32>),
}

impl Flushes {
    /// The write in `slot` is complete and waits for a flush.
    pub(super) fn add(&mut self, handle: &Arc<Handle>, slot: usize) {
        let known = self.files.iter_mut().flatten().find(|file| Arc::ptr_eq(&file.handle, handle));
        if let Some(file) = known {
            file.waiting.push(slot);
            return;
        }
        let handle = handle.clone();
        let file = Some(File { handle, running: Vec::new(), waiting: vec![slot], put_off: 0 });
        match self.files.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = file,
            None => self.files.push(file),
        }
    }

    /// A flush to start, with its number.
    pub(super) fn next(&mut self) -> Option<(usize, squeue::Entry)> {
        self.files.iter_mut().enumerate().find_map(|(number, place)| {
            let file = place.as_mut()?;
            if !file.running.is_empty() || file.waiting.is_empty() {
                return None;
            }
            file.running = std::mem::take(&mut file.waiting);
            Some((number, file.entry()))
        })
    }

    /// Takes the completion of a flush into account.
    pub(super) fn complete(&mut self, number: usize, result: i32) -> Flushed {
        let place = &mut self.files[number];
        let file = place.as_mut().expect("a flush in flight keeps its file");
        if is_put_off(result) && file.put_off < RING_PUT_OFF_MAX {
            file.put_off += 1;
            return Flushed::Again(file.entry());
        }
        file.put_off = 0;
        let mut ended = std::mem::take(&mut file.running);
        let failed = (result < 0).then_some(-result);
        if failed.is_some() {
            // The disk may have dropped what these wrote, too: a later flush that succeeds would
            // prove nothing for them.
            ended.append(&mut file.waiting);
        }
        if file.waiting.is_empty() {
            *place = None;
        }
        Flushed::Ended(ended, failed)
    }
}

/// The result of one of the writes that a flush ended.
pub(super) fn result(failed: Option<i32>) -> io::Result<()> {
    failed.map_or(Ok(()), |number| Err(io::Error::from_raw_os_error(number)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::OpenMode;
    use crate::linux::open::open;

    fn handle() -> Arc<Handle> {
        let program = std::env::current_exe().unwrap();
        Arc::new(open(&program, OpenMode::ReadOnly, SyncBy::Flush).unwrap())
    }

    fn ended(flushed: Flushed) -> (Vec<usize>, Option<i32>) {
        match flushed {
            Flushed::Ended(slots, failed) => (slots, failed),
            Flushed::Again(_) => panic!("not put off"),
        }
    }

    #[test]
    fn writes_that_wait_share_the_next_flush() {
        let (mut flushes, file, other) = (Flushes::default(), handle(), handle());
        flushes.add(&file, 1);
        flushes.add(&file, 2);
        flushes.add(&other, 3);
        assert_eq!(flushes.next().unwrap().0, 0);
        assert_eq!(flushes.next().unwrap().0, 1);
        flushes.add(&file, 4);
        assert!(flushes.next().is_none(), "one flush of a file at a time");
        assert_eq!(ended(flushes.complete(0, 0)), (vec![1, 2], None));
        assert_eq!(ended(flushes.complete(1, 0)), (vec![3], None));
        assert_eq!(flushes.next().unwrap().0, 0);
        assert_eq!(ended(flushes.complete(0, 0)), (vec![4], None));
        assert_eq!(Arc::strong_count(&file), 1, "an idle file is let go");
    }

    #[test]
    fn a_failed_flush_fails_all_that_was_written_before_its_end() {
        let (mut flushes, file) = (Flushes::default(), handle());
        flushes.add(&file, 1);
        assert!(flushes.next().is_some());
        flushes.add(&file, 2);
        assert!(matches!(flushes.complete(0, -libc::EINTR), Flushed::Again(_)));
        let (slots, failed) = ended(flushes.complete(0, -libc::EIO));
        assert_eq!((slots, failed), (vec![1, 2], Some(libc::EIO)));
        assert!(flushes.next().is_none());
        assert_eq!(result(failed).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}
