//! Waiting until the kernel has let go of devices.
//!
//! An unmount takes a file system out of the mount table first and writes what is in memory then, and
//! goes on when who asked for it was killed. So the table does not tell when a device may be taken
//! away. The kernel's claim on the device does: it ends after the last write.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::{HostError, within};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// How long an open may take. Where the kernel reads partitions first, it waits for a server.
const OPEN_TIME: Duration = Duration::from_secs(20);

/// How waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Nothing holds the devices.
    Free,
    /// They are held still, and no request of theirs was completed for the time named.
    Stalled,
    /// They are held still, and requests are being completed.
    Slow,
}

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Without any request completed.
    pub silence: Duration,
    /// In all.
    pub time: Duration,
}

/// Does work that ends when the kernel has written everything, and waits until nothing holds the
/// devices. What does not end in time goes on: a repeated call finds the devices held.
///
/// # Errors
/// Those of the work, and when the devices can't be looked at.
pub fn wait(
    devices: impl Fn() -> Result<Vec<PathBuf>, HostError>,
    work: impl FnOnce() -> Result<(), HostError> + Send + 'static,
    patience: Patience,
) -> Result<Release, HostError> {
    let (done, ended) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody may be waiting any more.
        let _ = done.send(work());
    });
    let start = Instant::now();
    let (mut moved, mut before) = (start, completed(&devices()?));
    let mut working = true;
    loop {
        if working {
            match ended.recv_timeout(PAUSE) {
                Ok(result) => {
                    result?;
                    working = false;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(HostError::Unexpected("an unmount broke off".to_owned()));
                }
            }
        } else {
            std::thread::sleep(PAUSE);
        }
        let devices = devices()?;
        if !working && !any_held(&devices)? {
            return Ok(Release::Free);
        }
        let now = completed(&devices);
        if now != before {
            (moved, before) = (Instant::now(), now);
        }
        if moved.elapsed() >= patience.silence {
            return Ok(Release::Stalled);
        }
        if start.elapsed() >= patience.time {
            return Ok(Release::Slow);
        }
    }
}

fn any_held(devices: &[PathBuf]) -> Result<bool, HostError> {
    for device in devices {
        match is_held(device) {
            Ok(false) => {}
            // Nothing is known, so it counts as held.
            Ok(true) | Err(HostError::Slow { .. }) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Whether something has a device for itself: a file system that is mounted anywhere or still being
/// unmounted, or a program that makes or checks one.
///
/// # Errors
/// When it can't be opened, or not in time.
pub fn is_held(device: &Path) -> Result<bool, HostError> {
    let owned = device.to_owned();
    // Closed on that thread, too: the last one to close a device writes what is in memory of it.
    let open =
        move || File::options().read(true).custom_flags(OFlag::O_EXCL.bits()).open(owned).map(drop);
    let opened = within(&format!("opening {}", device.display()), OPEN_TIME, open)?;
    match opened.as_ref().map_err(|error| error.raw_os_error().map(Errno::from_raw)) {
        Ok(()) => Ok(false),
        Err(Some(Errno::EBUSY)) => Ok(true),
        Err(Some(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV)) => Ok(false),
        Err(_) => opened.map(|()| false).map_err(HostError::file(device, "opened")),
    }
}

/// Requests completed by each device since it was made, with or without an error.
pub fn completed(devices: &[PathBuf]) -> Vec<u64> {
    // The kernel's Documentation/block/stat.rst: reads, writes, discards, flushes.
    const COUNTS: [usize; 4] = [0, 4, 11, 15];
    let count = |device: &PathBuf| {
        let name = device.file_name()?;
        let text = fs::read_to_string(Path::new("/sys/block").join(name).join("stat")).ok()?;
        let words: Vec<u64> = text.split_whitespace().filter_map(|it| it.parse().ok()).collect();
        Some(COUNTS.iter().filter_map(|at| words.get(*at)).sum())
    };
    // One that is gone has completed everything.
    devices.iter().map(|device| count(device).unwrap_or(u64::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Patience =
        Patience { silence: Duration::from_millis(50), time: Duration::from_secs(10) };

    #[test]
    fn work_that_does_not_end_is_silent_and_its_errors_are_told() {
        let none = || Ok(Vec::new());
        assert_eq!(wait(none, || Ok(()), SHORT).unwrap(), Release::Free);
        let (end, ended) = mpsc::channel::<()>();
        let hang = move || {
            let _ = ended.recv();
            Ok(())
        };
        assert_eq!(wait(none, hang, SHORT).unwrap(), Release::Stalled);
        drop(end);
        let fail = || Err(HostError::Unexpected("in use".to_owned()));
        assert!(wait(none, fail, SHORT).is_err());
        let gone = || Ok(vec![PathBuf::from("/dev/no such device")]);
        assert_eq!(wait(gone, || Ok(()), SHORT).unwrap(), Release::Free);
    }
}
