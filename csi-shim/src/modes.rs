//! Access modes of the specification, and the leases and uses that they become.

use ballast_api::v1::LeaseMode;

use crate::error::Refusal;
use crate::v1::VolumeCapability;
use crate::v1::volume_capability::access_mode::Mode;
use crate::v1::volume_capability::{AccessType, MountVolume};

/// The file systems that volumes are formatted with, the first by default.
pub const FILE_SYSTEMS: [&str; 2] = ["ext4", "xfs"];

/// A checked capability: how a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// The lease that it takes.
    pub lease: LeaseMode,
    /// Whether the mode itself allows no writes.
    pub read_only: bool,
    /// How it is used on the host.
    pub access: Access,
}

/// As a device or mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// A raw block device.
    Block,
    /// A file system.
    Mount {
        /// As asked for; empty = not said.
        fs_type: String,
        /// Options for mount(8).
        flags: Vec<String>,
    },
}

impl Access {
    /// Whether it is a raw block device.
    pub fn is_block(&self) -> bool {
        matches!(self, Access::Block)
    }
}

/// Checks a capability.
///
/// # Errors
/// INVALID_ARGUMENT for what is missing or not supported.
pub fn parse(capability: Option<&VolumeCapability>) -> Result<Use, Refusal> {
    let capability = capability.ok_or(Refusal::FieldMissing("volume_capability"))?;
    let mode = capability.access_mode.as_ref().map_or(Mode::Unknown, |mode| mode.mode());
    let access = match &capability.access_type {
        None => return Err(Refusal::FieldMissing("volume_capability.access_type")),
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => mounted(mount)?,
    };
    let (lease, read_only) = match mode {
        Mode::SingleNodeWriter => (LeaseMode::SingleNodeWriter, false),
        Mode::SingleNodeReaderOnly => (LeaseMode::SingleNodeWriter, true),
        Mode::SingleNodeSingleWriter => (LeaseMode::SingleNodePublisher, false),
        Mode::SingleNodeMultiWriter => (LeaseMode::SingleNodeMultiWriter, false),
        Mode::MultiNodeReaderOnly => (LeaseMode::Readers, true),
        Mode::MultiNodeMultiWriter if access.is_block() => (LeaseMode::Writers, false),
        Mode::MultiNodeMultiWriter => {
            return Err(unsupported(
                "a file system can't be mounted on several nodes for writing: use \
                 volumeMode Block, or ReadWriteOnce",
            ));
        }
        Mode::MultiNodeSingleWriter => {
            return Err(unsupported(
                "MULTI_NODE_SINGLE_WRITER is not supported: use MULTI_NODE_READER_ONLY or a \
                 single-node mode",
            ));
        }
        Mode::Unknown => return Err(Refusal::FieldMissing("volume_capability.access_mode")),
    };
    Ok(Use { lease, read_only, access })
}

/// Checks all capabilities of a volume.
///
/// # Errors
/// As [`parse`]; also when there is none.
pub fn parse_all(capabilities: &[VolumeCapability]) -> Result<Vec<Use>, Refusal> {
    if capabilities.is_empty() {
        return Err(Refusal::FieldMissing("volume_capabilities"));
    }
    capabilities.iter().map(|capability| parse(Some(capability))).collect()
}

fn mounted(mount: &MountVolume) -> Result<Access, Refusal> {
    let fs_type = check_fs_type(&mount.fs_type)?.to_owned();
    if !mount.volume_mount_group.is_empty() {
        return Err(unsupported(
            "volume_mount_group is not supported: let the orchestrator set the group \
             (fsGroupPolicy File)",
        ));
    }
    Ok(Access::Mount { fs_type, flags: mount.mount_flags.clone() })
}

/// A file system that volumes can be formatted with, or none said.
///
/// # Errors
/// INVALID_ARGUMENT for any other.
pub fn check_fs_type(fs_type: &str) -> Result<&str, Refusal> {
    if fs_type.is_empty() || FILE_SYSTEMS.contains(&fs_type) {
        return Ok(fs_type);
    }
    Err(unsupported(&format!("file system {fs_type:?} is not supported: use ext4 or xfs")))
}

fn unsupported(text: &str) -> Refusal {
    Refusal::CapabilityUnsupported(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::volume_capability::{AccessMode, BlockVolume};

    fn parsed(mode: Mode, block: bool) -> Option<(LeaseMode, bool)> {
        let access_type = match block {
            true => AccessType::Block(BlockVolume {}),
            false => AccessType::Mount(MountVolume::default()),
        };
        let capability = VolumeCapability {
            access_type: Some(access_type),
            access_mode: Some(AccessMode { mode: mode as i32 }),
        };
        parse(Some(&capability)).ok().map(|it| (it.lease, it.read_only))
    }

    #[test]
    fn every_mode_is_a_lease_or_is_refused() {
        for block in [false, true] {
            let writers = block.then_some((LeaseMode::Writers, false));
            let table = [
                (Mode::Unknown, None),
                (Mode::SingleNodeWriter, Some((LeaseMode::SingleNodeWriter, false))),
                (Mode::SingleNodeReaderOnly, Some((LeaseMode::SingleNodeWriter, true))),
                (Mode::MultiNodeReaderOnly, Some((LeaseMode::Readers, true))),
                (Mode::MultiNodeSingleWriter, None),
                (Mode::MultiNodeMultiWriter, writers),
                (Mode::SingleNodeSingleWriter, Some((LeaseMode::SingleNodePublisher, false))),
                (Mode::SingleNodeMultiWriter, Some((LeaseMode::SingleNodeMultiWriter, false))),
            ];
            for (mode, lease) in table {
                assert_eq!(parsed(mode, block), lease, "{mode:?}, block {block}");
            }
        }
    }

    #[test]
    fn half_a_capability_is_none() {
        assert!(parse(None).is_err());
        assert!(parse(Some(&VolumeCapability::default())).is_err());
        assert!(parse_all(&[]).is_err());
        assert!(check_fs_type("btrfs").is_err());
    }
}
