//! Named points between two steps of a call, at which tests stop the process.
//!
//! For tests only: with [`STOP_AT`] in its environment the process stops itself (SIGSTOP) when it gets
//! to one of the points named there, once at each. The test then kills it, or a server, and lets it go
//! on. Without the variable a point costs one comparison. Tests walk through [`Step::ALL`], so a new
//! point is tried without being listed anywhere else.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex, PoisonError};

use nix::sys::signal::{Signal, raise};

/// Names of points as `Debug` prints them, separated by commas.
pub const STOP_AT: &str = "BALLAST_CSI_TEST_STOP_AT";

/// The calls that have points in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// CreateVolume.
    Create,
    /// ControllerPublishVolume.
    ControllerPublish,
    /// NodeStageVolume, of a volume that was never used.
    Stage,
    /// NodePublishVolume.
    Publish,
    /// ControllerExpandVolume, to more than the volume has.
    ControllerExpand,
    /// NodeExpandVolume, of a volume that is published.
    NodeExpand,
    /// NodeUnpublishVolume.
    Unpublish,
    /// NodeUnstageVolume.
    Unstage,
    /// ControllerUnpublishVolume.
    ControllerUnpublish,
    /// DeleteVolume.
    Delete,
}

macro_rules! steps {
    ($($call:ident: $($(#[$doc:meta])* $step:ident,)*;)*) => {
        /// A point: what has just been done.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step {
            $($($(#[$doc])* $step,)*)*
        }

        impl Step {
            /// All of them, in the order in which a volume's life comes to them.
            pub const ALL: &[(Call, Step)] = &[$($((Call::$call, Step::$step),)*)*];
        }
    };
}

steps! {
    Create:
        /// The cluster has the volume.
        VolumeCreated,;
    ControllerPublish:
        /// The lease is taken.
        LeaseTaken,;
    Stage:
        /// The record's new file is there and has not its name yet.
        RecordHalfWritten,
        /// The record is there.
        RecordWritten,
        /// The link process was started.
        LinkStarted,
        /// The link serves the volume.
        LinkMounted,
        /// losetup was started.
        LoopStarted,
        /// What the kernel's connections will be is kept.
        ConnectionKept,
        /// The kernel has them.
        KernelConnected,
        /// The volume is a device.
        Attached,
        /// The volume's record says that it is being formatted.
        FormattingNoted,
        /// mkfs was started.
        MakeStarted,
        /// The file system is made.
        Made,
        /// The volume's record says what it holds.
        ContentNoted,
        /// e2fsck was started.
        CheckStarted,
        /// The file system is as it should be.
        Checked,
        /// mount was started.
        MountStarted,
        /// The file system is mounted.
        Mounted,;
    Publish:
        /// The record names the target.
        TargetNoted,
        /// The target is there.
        TargetMade,
        /// The target shows the volume.
        Bound,;
    ControllerExpand:
        /// The cluster has the volume's new size, and takes writes up to there.
        VolumeGrown,;
    NodeExpand:
        /// The link was told to look.
        LinkTold,
        /// The link's file has the new size.
        LinkGrown,
        /// losetup was started, to have the loop device look.
        LoopGrowthStarted,
        /// The kernel was told the new size.
        SizeTold,
        /// The device has the new size.
        DeviceGrown,
        /// resize2fs or xfs_growfs was started.
        GrowthStarted,
        /// The file system has the new size.
        FileSystemGrown,;
    Unpublish:
        /// The target shows the volume no longer.
        Unbound,
        /// The target is gone.
        TargetRemoved,
        /// The record does not name it.
        TargetForgotten,;
    Unstage:
        /// The file system is unmounted.
        Unmounted,
        /// The loop device is gone.
        LoopRemoved,
        /// The link's file is unmounted.
        LinkUnmounted,
        /// The link has ended.
        LinkEnded,
        /// The kernel has let go of the connections.
        KernelDisconnected,
        /// Nothing of the attachment is left.
        Detached,
        /// The record is gone.
        RecordRemoved,;
    ControllerUnpublish:
        /// The lease is given back.
        LeaseReleased,;
    Delete:
        /// The volume is deleted.
        VolumeDeleted,;
}

/// What only the kernel's NBD client comes to.
pub const OF_KERNEL: &[Step] =
    &[Step::ConnectionKept, Step::KernelConnected, Step::SizeTold, Step::KernelDisconnected];

/// What only links come to.
pub const OF_LINKS: &[Step] = &[
    Step::LinkStarted,
    Step::LinkMounted,
    Step::LoopStarted,
    Step::LinkTold,
    Step::LinkGrown,
    Step::LoopGrowthStarted,
    Step::LoopRemoved,
    Step::LinkUnmounted,
    Step::LinkEnded,
];

static TO_COME: LazyLock<Mutex<BTreeSet<String>>> = LazyLock::new(|| {
    let names = std::env::var(STOP_AT).unwrap_or_default();
    Mutex::new(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
});

/// Stops the process here, if a test wants it to.
pub fn reached(step: Step) {
    let mut to_come = TO_COME.lock().unwrap_or_else(PoisonError::into_inner);
    if to_come.is_empty() || !to_come.remove(&format!("{step:?}")) {
        return;
    }
    drop(to_come);
    // To this thread, which therefore goes no further; the others stop with it.
    if let Err(error) = raise(Signal::SIGSTOP) {
        tracing::error!(%error, ?step, "the process does not stop for its test");
    }
}

/// A tool was started.
pub fn reached_start_of(program: &str, arguments: &[&str]) {
    match program {
        "losetup" if arguments.contains(&"--set-capacity") => reached(Step::LoopGrowthStarted),
        "losetup" => reached(Step::LoopStarted),
        "mkfs.ext4" | "mkfs.xfs" => reached(Step::MakeStarted),
        "e2fsck" => reached(Step::CheckStarted),
        "mount" => reached(Step::MountStarted),
        "resize2fs" | "xfs_growfs" => reached(Step::GrowthStarted),
        _ => {}
    }
}
