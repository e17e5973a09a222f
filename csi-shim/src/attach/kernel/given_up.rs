//! Devices that were given up: disconnected for good, because the lease has ended or the volume is
//! deleted, while somebody may still have their names.
//!
//! The kernel gives the number of a device that is disconnected and not open to the next one that is
//! connected. Whoever goes on using the name, a program that makes a file system or a pod with a raw
//! device, would then use another volume. So each is open here until its volume is detached; what is kept
//! in the folder says so to a later life of the process. A device that works is not held open: what its
//! users wrote is written back when the last of them closes it.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex};

use super::super::Attachment;
use super::kept::{Keeper, Kept};
use super::sysfs::{self, path_of};
use super::{disconnect, locked};
use crate::host::{HostError, within};
use crate::limits::ANSWER_TIME;

/// Them, by volume; without a pin where there is no name that anybody could use.
#[derive(Default)]
pub(super) struct GivenUp(Mutex<BTreeMap<String, Option<Pin>>>);

impl GivenUp {
    /// Those that an earlier life gave up since the host was started, as far as nobody else has them.
    pub(super) fn in_earlier_lives(keeper: &Keeper) -> GivenUp {
        let given_up = GivenUp::default();
        for volume_id in keeper.volumes() {
            let Some((index, boot)) = keeper.read(&volume_id).given_up else { continue };
            if boot != this_boot() {
                continue;
            }
            let pin = match Pin::new(index) {
                Ok(pin) => pin,
                Err(error) => {
                    tracing::info!(index, volume_id, %error, "was given up, and is gone");
                    continue;
                }
            };
            let of_volume = format!("ballast/{volume_id}/");
            match sysfs::backend_of(index) {
                Some(backend) if !backend.starts_with(&of_volume) => {
                    tracing::error!(index, volume_id, backend, "was given up, and is another's");
                    continue;
                }
                // It may not have come to that.
                Some(backend) => {
                    if let Err(error) = disconnect_of(&backend, index) {
                        tracing::error!(index, volume_id, %error, "not given up");
                        continue;
                    }
                }
                None => {}
            }
            tracing::info!(index, volume_id, "was given up: kept until it is unstaged");
            locked(&given_up.0).insert(volume_id, Some(pin));
        }
        given_up
    }

    /// Whether this volume's device is one.
    pub(super) fn has(&self, volume_id: &str) -> bool {
        locked(&self.0).contains_key(volume_id)
    }

    /// Gives a device up: what waits for a server fails, now and from now on. One that has become
    /// another's, or is being taken away, is left alone.
    ///
    /// # Errors
    /// When the kernel refuses, or what a later life has to know can't be kept.
    pub(super) fn add(
        &self,
        keeper: &Keeper,
        attachment: &Attachment,
        index: u32,
    ) -> Result<(), HostError> {
        let (volume_id, backend) = (&attachment.volume_id, sysfs::backend(attachment));
        let is_its_own = || sysfs::backend_of(index).as_ref() == Some(&backend);
        if !is_its_own() {
            return Ok(());
        }
        let kept = keeper.read(volume_id);
        keeper.write(volume_id, &Kept { given_up: Some((index, this_boot())), ..kept })?;
        let pin = Pin::new(index);
        let pin = pin.inspect_err(|error| tracing::warn!(index, %error, "not held open")).ok();
        if is_its_own() {
            disconnect_of(&backend, index)?;
            locked(&self.0).insert(volume_id.to_owned(), pin);
        }
        Ok(())
    }

    /// Lets a volume's device go, which nobody uses any more.
    pub(super) fn let_go(&self, volume_id: &str) {
        drop(locked(&self.0).remove(volume_id));
    }
}

/// Disconnects a device, unless it is another's by now.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn disconnect_of(backend: &str, index: u32) -> Result<(), HostError> {
    match sysfs::backend_of(index) {
        Some(now) if now == backend => disconnect(index),
        _ => Ok(()),
    }
}

/// What tells this run of the host from every other: numbers of devices begin anew with each.
fn this_boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// A device that is open, or is being opened: the kernel counts one whose partitions it still reads.
struct Pin {
    /// Where the thread that opens leaves the file, which may be after this has gone.
    file: Arc<Mutex<Option<File>>>,
}

impl Pin {
    /// # Errors
    /// When there is no device of this number.
    fn new(index: u32) -> Result<Pin, HostError> {
        let path = path_of(index);
        let file = Arc::new(Mutex::new(None));
        let (place, name) = (Arc::downgrade(&file), path.clone());
        let open = move || {
            let opened = File::open(name)?;
            if let Some(place) = place.upgrade() {
                *locked(&place) = Some(opened);
            }
            std::io::Result::Ok(())
        };
        match within(&format!("opening {}", path.display()), ANSWER_TIME, open) {
            Ok(opened) => opened.map_err(HostError::file(&path, "opened"))?,
            Err(error) => tracing::warn!(index, %error, "goes on"),
        }
        Ok(Pin { file })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let file = locked(&self.file).take();
        // The last to close a device waits until all is written to it.
        std::thread::spawn(move || drop(file));
    }
}
