//! Growth of a device in use.
//!
//! The kernel takes a new size without a new connection, and the server's sessions take requests up to
//! the volume's new end (docs/nbd.md, "Size"). So nothing is hung up, and a writer waits only while the
//! kernel lets the requests under way come back. Where that does not do, new connections do it.

use super::super::Attachment;
use super::sockets::{is_lost, size_at};
use super::sysfs::{self, path_of};
use super::{BLOCK, SIZE_BYTES, Shared, Streams, can_be_read, locked, number, reconfigure};
use crate::host::{HostError, disks, poll};
use crate::limits::{ANSWER_TIME, DEVICE_TIME};
use crate::steps::{self, Step};

/// What came of a growth without new connections.
enum Grown {
    /// The device has the volume's size.
    Done,
    /// The volume itself is still smaller than it is to be.
    NotYet,
    /// It takes new connections, for this reason.
    Not(String),
}

impl Shared {
    /// Has a device grow to what its volume is now, `at_least` so many bytes, and returns its size.
    ///
    /// # Errors
    /// [`HostError::Slow`] when it is smaller for too long; what makes new connections fail.
    pub(super) fn grow(
        &self,
        index: u32,
        attachment: &Attachment,
        at_least: u64,
    ) -> Result<u64, HostError> {
        let device = path_of(index);
        let slow = || HostError::Slow {
            what: format!("the growth of {}", device.display()),
            after: DEVICE_TIME,
        };
        let held = self.device(index);
        let mut streams = locked(&held);
        if disks::size(&device)? < at_least {
            match self.grow_in_place(&streams, index, attachment, at_least) {
                Grown::Done => tracing::info!(index, at_least, "has grown"),
                Grown::NotYet => return Err(slow()),
                Grown::Not(why) => {
                    tracing::info!(index, why, "grows with new connections");
                    let connections = if attachment.read_only { sysfs::queues(index) } else { 1 };
                    self.reconnect(&mut streams, index, attachment, connections, DEVICE_TIME)?;
                }
            }
        }
        let grown = || disks::size(&device).ok().filter(|size| *size >= at_least);
        poll(DEVICE_TIME, grown).ok_or_else(slow)
    }

    fn grow_in_place(
        &self,
        streams: &Streams,
        index: u32,
        attachment: &Attachment,
        at_least: u64,
    ) -> Grown {
        // The server of the device's own connections, no other: what it has told one client, all of
        // its sessions take.
        let Some(server) = self.keeper.read(&attachment.volume_id).server else {
            return Grown::Not("its server is not known".to_owned());
        };
        let mut volume = size_at(&server, &attachment.export);
        let asked_again = poll(ANSWER_TIME, || {
            if volume.as_ref().is_ok_and(|size| *size < at_least) {
                volume = size_at(&server, &attachment.export);
            }
            volume.as_ref().map_or(true, |size| *size >= at_least).then_some(())
        });
        let size = match volume {
            Ok(size) if asked_again.is_some() => size,
            Ok(_) => return Grown::NotYet,
            Err(error) => return Grown::Not(error.to_string()),
        };
        // A new size waits for requests under way. Were they to wait for a connection, the kernel would
        // take none meanwhile.
        let device = path_of(index);
        if streams.iter().any(is_lost) || !can_be_read(&device, 0, ANSWER_TIME) {
            return Grown::Not("its connection is lost".to_owned());
        }
        // While it waits for requests under way, the kernel takes no word about any NBD device of this
        // host. So it is told when there are none, if there is such a moment.
        poll(ANSWER_TIME, || sysfs::quiet_at(index));
        if let Err(error) = reconfigure(index, attachment, number(SIZE_BYTES, size)) {
            return Grown::Not(format!("the kernel takes no size alone ({error})"));
        }
        steps::reached(Step::SizeTold);
        if !can_be_read(&device, size - BLOCK, ANSWER_TIME) {
            return Grown::Not("its new end can't be read".to_owned());
        }
        Grown::Done
    }
}
