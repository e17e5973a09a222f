//! Attachers: how a volume becomes a block device of this host.
//!
//! What is attached is found in the kernel, never remembered; so a call can be repeated after a
//! death at any point. An attachment lives on when this process ends.

pub mod fuse;
pub mod kernel;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::Nbd;
use crate::context::Address;
use crate::host::HostError;

/// What to attach.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The volume's id.
    pub volume_id: String,
    /// The NBD export, which names the lease.
    pub export: String,
    /// Where it is served, the best first.
    pub addresses: Vec<Address>,
    /// For reading only.
    pub read_only: bool,
}

/// How an attachment is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// There is none.
    None,
    /// There is something that can't be used: of another lease, or half of one.
    Broken,
    /// It can be used.
    Attached(PathBuf),
}

/// A way to attach.
pub trait Attacher: Send + Sync {
    /// Its name, for logs and records.
    fn name(&self) -> &'static str;

    /// What there is of this attachment.
    ///
    /// # Errors
    /// When the host can't tell.
    fn state(&self, attachment: &Attachment) -> Result<State, HostError>;

    /// The devices that are there of the volume: of any lease, in order or not.
    ///
    /// # Errors
    /// When the host can't tell.
    fn devices(&self, attachment: &Attachment) -> Result<Vec<PathBuf>, HostError>;

    /// Finds or makes the device. What is broken is removed first.
    ///
    /// # Errors
    /// When no server opens the export, or the host refuses.
    fn attach(&self, attachment: &Attachment) -> Result<PathBuf, HostError>;

    /// Has the device grow to what the volume is now, and returns its size in bytes.
    ///
    /// # Errors
    /// When it is not of at least this size in time.
    fn grow(&self, attachment: &Attachment, at_least: u64) -> Result<u64, HostError>;

    /// Whether the servers still serve the device: a block can be read within this time.
    fn answers(&self, attachment: &Attachment, time: Duration) -> bool;

    /// Makes every request that waits for a server fail, now and from now on.
    ///
    /// # Errors
    /// When the host refuses.
    fn abort(&self, attachment: &Attachment) -> Result<(), HostError>;

    /// Removes the device, with all that belongs to it. Nothing there is no error.
    ///
    /// # Errors
    /// When it is in use.
    fn detach(&self, attachment: &Attachment) -> Result<(), HostError>;
}

/// Whether the cluster says that the volume of this id is deleted; `false` when it can't tell. A server
/// that does not know a volume is no proof: it may have started a moment ago.
pub type IsDeleted = Box<dyn Fn(&str) -> bool + Send + Sync>;

/// The attacher that the command line asks for; how many connections the kernel has per device.
///
/// # Errors
/// When the host does not have it.
pub fn choose(
    nbd: Nbd,
    connections: u16,
    folder: &Path,
    program: &Path,
    is_deleted: IsDeleted,
) -> Result<Box<dyn Attacher>, HostError> {
    let kernel = || kernel::KernelAttacher::new(folder, connections, is_deleted);
    match nbd {
        Nbd::Kernel => Ok(Box::new(kernel()?)),
        Nbd::Auto if kernel::is_there() => Ok(Box::new(kernel()?)),
        Nbd::Auto | Nbd::Fuse => {
            tracing::warn!(
                "volumes are attached by processes of this host (fuse): for development only"
            );
            Ok(Box::new(fuse::FuseAttacher::new(folder, program)))
        }
    }
}
