//! Folders for one test each, most of them below `target/e2e`, gone when the test ends well.
//!
//! What an interrupted run left behind (processes, mounts, loop devices, folders) is removed
//! before the first test of the next run, and only if its owner is dead.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use crate::process;

static SWEEP: Once = Once::new();

/// A folder of its own for one test.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes it, named after the test and this process.
    ///
    /// # Panics
    /// When the file system refuses.
    pub fn new(test: &str) -> Scratch {
        SWEEP.call_once(sweep);
        Scratch::below(&root(), test)
    }

    /// One that other users may enter: the way to `target` may be closed to them.
    ///
    /// # Panics
    /// When the file system refuses.
    pub fn public(test: &str) -> Scratch {
        SWEEP.call_once(sweep);
        Scratch::below(&public_root(), test)
    }

    fn below(root: &Path, test: &str) -> Scratch {
        let path = root.join(format!("{test}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder can be made");
        Scratch { path }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it, as text for command lines.
    pub fn file(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    /// Keeps the folder of a failed test: its logs say why.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("left for you to look at: {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("{} stays: {error}", self.path.display());
        }
    }
}

/// The build's `target/e2e`.
pub fn root() -> PathBuf {
    binaries().parent().expect("binaries lie in target/PROFILE").join("e2e")
}

fn public_root() -> PathBuf {
    std::env::temp_dir().join("ballast-e2e")
}

/// The folder of the built programs, found from where the test itself lies, or the benchmark.
pub fn binaries() -> PathBuf {
    let test = std::env::current_exe().expect("a process knows its program");
    let folder = test.parent().expect("a program lies in a folder");
    match folder.ends_with("deps") {
        true => folder.parent().expect("tests lie in target/PROFILE/deps").to_path_buf(),
        false => folder.to_path_buf(),
    }
}

/// A program of this project.
///
/// # Panics
/// When it has not been built.
pub fn program(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(path.exists(), "{} is missing: cargo build --workspace --bins", path.display());
    path
}

/// Removes what runs that were interrupted left behind.
fn sweep() {
    let entries = [root(), public_root()].into_iter().filter_map(|root| fs::read_dir(root).ok());
    for entry in entries.flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.rsplit('-').next().and_then(|pid| pid.parse().ok());
        if owner.is_some_and(|pid| !process::is_alive(pid)) {
            clear(&entry.path());
        }
    }
}

fn clear(folder: &Path) {
    for pid in process::with_argument_below(folder) {
        process::kill_and_wait(pid);
    }
    unmount_below(folder);
    // A folder that cannot be removed now is tried again by the next run.
    let _ = fs::remove_dir_all(folder);
}

/// Unmounts everything below a folder, the innermost first, with its loop devices.
pub fn unmount_below(folder: &Path) {
    let folder = folder.display().to_string();
    let loops = Command::new("losetup").args(["-nO", "NAME,BACK-FILE"]).output();
    let loops = loops.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let ours: Vec<&str> = loops
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(_, file)| file.trim().starts_with(&folder))
        .map(|(device, _)| device)
        .collect();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut words = line.split(' ');
        let (source, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        if ours.contains(&source) || target.starts_with(&folder) {
            let _ = Command::new("umount").args(["-l", target]).status();
        }
    }
    for device in ours {
        let _ = Command::new("losetup").args(["-d", device]).status();
    }
}
