//! What the kernel says of its NBD devices in /sys.

use std::path::PathBuf;

use super::super::Attachment;

/// What `backend` says of a device of ours.
pub(super) fn backend(attachment: &Attachment) -> String {
    format!("ballast/{}/{}", attachment.volume_id, attachment.export)
}

/// The devices that the kernel has, with what their `backend` says.
pub(super) fn devices() -> Vec<(u32, String)> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let device = |entry: std::fs::DirEntry| {
        let number = entry.file_name().to_str()?.strip_prefix("nbd")?.parse().ok()?;
        let backend = std::fs::read_to_string(entry.path().join("backend")).ok()?;
        // Only a connected device has a pid.
        entry.path().join("pid").exists().then(|| (number, backend.trim().to_owned()))
    };
    let mut found: Vec<(u32, String)> = entries.filter_map(device).collect();
    found.sort();
    found
}

/// What the `backend` of a device says, if it is connected or open.
pub(super) fn backend_of(index: u32) -> Option<String> {
    devices().into_iter().find(|(it, _)| *it == index).map(|(_, backend)| backend)
}

/// The volume's id and the export of a device, if it is one of ours.
pub(super) fn ours(index: u32) -> Option<(String, String)> {
    let backend = backend_of(index)?;
    let (volume_id, export) = backend.strip_prefix("ballast/")?.split_once('/')?;
    Some((volume_id.to_owned(), export.to_owned()))
}

/// The node of a device in /dev.
pub(super) fn path_of(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// Hardware queues of a device: the connections that the kernel uses.
pub(super) fn queues(index: u32) -> u16 {
    let queues = std::fs::read_dir(format!("/sys/block/nbd{index}/mq"));
    queues.map_or(1, |queues| u16::try_from(queues.count()).unwrap_or(1).max(1))
}

/// Numbers that change with each request of a device; none while requests are under way.
pub(super) fn quiet_at(index: u32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/sys/block/nbd{index}/stat")).ok()?;
    quiet(&text).then_some(text)
}

/// The ninth number counts the requests under way.
fn quiet(stat: &str) -> bool {
    stat.split_ascii_whitespace().nth(8) == Some("0")
}

/// Processors that this machine may have: the kernel makes no more queues for a device.
pub(super) fn processors() -> u16 {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible");
    text.ok().and_then(|text| count(&text)).unwrap_or(1)
}

/// Of a list as `0-3` or `0`.
fn count(list: &str) -> Option<u16> {
    let last: u16 = list.trim().rsplit([',', '-']).next()?.parse().ok()?;
    last.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        assert_eq!(count("0-3\n"), Some(4));
        assert_eq!(count("0\n"), Some(1));
        assert_eq!(count("0,2-11\n"), Some(12));
        assert_eq!(count("\n"), None);
        assert!(quiet("  1 0 8 3 5 0 40 9 0 12 12 0 0 0 0 0 0\n"));
        assert!(!quiet("  1 0 8 3 5 0 40 9 2 12 12 0 0 0 0 0 0\n"));
        assert!(!quiet(""));
        assert!(processors() >= 1);
    }
}
