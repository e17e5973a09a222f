//! Whether a file system shows everything when it is mounted with its journal unread.
//!
//! What was confirmed may be in the journal only, if the last host ended without an unmount. A device
//! that can't be written can't have its journal replayed, so such a file system would lack it.

use std::path::Path;
use std::time::Duration;

use crate::host::{HostError, disks, tools};

/// How long a look may take: a log's transactions are listed meanwhile.
const LOOK_TIME: Duration = Duration::from_secs(60);

/// Whether the journal of an unmounted file system holds what is not in its place yet.
///
/// # Errors
/// When the device can't be read, or is no file system of this type.
pub fn must_be_replayed(fs_type: &str, device: &Path) -> Result<bool, HostError> {
    let unknown = |said: &str| {
        HostError::Unexpected(format!(
            "what is in the journal on {} can't be told: {said}",
            device.display()
        ))
    };
    if fs_type == "xfs" {
        let said = tools::must("xfs_logprint", &["-t", &device.display().to_string()], LOOK_TIME)?;
        return xfs_log_is_dirty(&said).ok_or_else(|| unknown("xfs_logprint does not say"));
    }
    let block = disks::read_block(device, 0, LOOK_TIME)?;
    ext4_needs_recovery(&block).ok_or_else(|| unknown("it has no superblock of ext4"))
}

/// The superblock lies 1024 bytes behind the device's beginning
/// (the kernel's Documentation/filesystems/ext4/super.rst).
fn ext4_needs_recovery(block: &[u8; 4096]) -> Option<bool> {
    const SUPERBLOCK: usize = 1024;
    const MAGIC: usize = SUPERBLOCK + 0x38;
    const FEATURE_INCOMPAT: usize = SUPERBLOCK + 0x60;
    const RECOVER: u8 = 0x4;
    let is_ext4 = block[MAGIC..MAGIC + 2] == [0x53, 0xef];
    // Little-endian: the flag is in the first byte.
    is_ext4.then_some(block[FEATURE_INCOMPAT] & RECOVER != 0)
}

fn xfs_log_is_dirty(said: &str) -> Option<bool> {
    let line = said.lines().find(|line| line.contains("log tail:") && line.contains("state:"))?;
    match line.split("state:").nth(1)?.trim() {
        "<CLEAN>" => Some(false),
        "<DIRTY>" => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_not_taken_for_clean() {
        let mut block = [0; 4096];
        assert_eq!(ext4_needs_recovery(&block), None);
        (block[0x438], block[0x439]) = (0x53, 0xef);
        assert_eq!(ext4_needs_recovery(&block), Some(false));
        block[0x460] = 0x46;
        assert_eq!(ext4_needs_recovery(&block), Some(true));
        let said =
            |state: &str| format!("x:\n    log tail: 8 head: 16 state: {state}\n\nLOG REC\n");
        assert_eq!(xfs_log_is_dirty(&said("<CLEAN>")), Some(false));
        assert_eq!(xfs_log_is_dirty(&said("<DIRTY>")), Some(true));
        assert_eq!(xfs_log_is_dirty(&said("<ODD>")), None);
        assert_eq!(xfs_log_is_dirty(""), None);
    }
}
