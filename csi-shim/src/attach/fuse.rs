//! A link process that serves the volume as a file, and a loop device on that file.
//!
//! For hosts without the kernel's NBD client, and for development only: see `link` for why.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Attacher, Attachment, State};
use crate::host::{HostError, disks, files, mounts, poll, within};
use crate::link::{self, fuse};
use crate::steps::{self, Step};

/// How long a new link may look for a server; longer than it does by itself.
const START_TIME: Duration = Duration::from_secs(30);

/// How long a link may take to end, or to learn a new size.
const LINK_TIME: Duration = Duration::from_secs(15);

/// After so long a link that has not grown is told once more: longer than it takes to find a server.
const TELL_AGAIN: Duration = Duration::from_secs(3);

/// Links and loop devices.
#[derive(Debug)]
pub struct FuseAttacher {
    folder: PathBuf,
    program: PathBuf,
}

impl FuseAttacher {
    /// Keeps its files below `folder`; links run this `program`.
    pub fn new(folder: &Path, program: &Path) -> FuseAttacher {
        FuseAttacher { folder: folder.join("attach"), program: program.to_owned() }
    }

    fn folder_of(&self, attachment: &Attachment) -> PathBuf {
        self.folder.join(&attachment.volume_id)
    }

    fn file_of(&self, attachment: &Attachment) -> PathBuf {
        self.folder_of(attachment).join("volume")
    }

    fn start_link(&self, attachment: &Attachment) -> Result<(), HostError> {
        let (folder, file) = (self.folder_of(attachment), self.file_of(attachment));
        files::make_folder(&folder)?;
        files::make_file(&file)?;
        let log_path = folder.join("link.log");
        let log = File::create(&log_path).map_err(HostError::file(&log_path, "made"))?;
        let mut command = Command::new(&self.program);
        command.arg(link::SUBCOMMAND).arg("--file").arg(&file);
        command.args(["--export", &attachment.export]);
        for address in &attachment.addresses {
            command.args(["--address", address.as_str()]);
        }
        if attachment.read_only {
            command.arg("--read-only");
        }
        let missing = |error| HostError::ProgramMissing {
            program: self.program.display().to_string(),
            error,
        };
        // A process group of its own: what is told to this one's is not told to the link.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let start = Instant::now();
        let mut child = command.spawn().map_err(missing)?;
        steps::reached(Step::LinkStarted);
        let mut ended = None;
        let ready = poll(START_TIME, || {
            ended = child.try_wait().ok().flatten();
            let mounted = is_mounted(&file).unwrap_or(false);
            (mounted || ended.is_some()).then_some(mounted)
        });
        if ready == Some(true) {
            // It is this process's child until then, and init's after; somebody must see its end.
            std::thread::spawn(move || child.wait());
            steps::reached(Step::LinkMounted);
            tracing::debug!(program = "link", ms = start.elapsed().as_millis(), "serves");
            return Ok(());
        }
        // It may have ended already.
        let _ = child.kill();
        let _ = child.wait();
        let mut said = String::new();
        // Without a log there is less to say.
        let _ = File::open(&log_path).and_then(|mut log| log.read_to_string(&mut said));
        let output = said.trim().lines().last().unwrap_or("no answer in time").to_owned();
        if ended.and_then(|status| status.code()) == Some(i32::from(link::LEASE_OVER_EXIT)) {
            return Err(HostError::LeaseOver(output));
        }
        let status = ended.map_or_else(|| "killed".to_owned(), |status| status.to_string());
        Err(HostError::Program { program: "the link".to_owned(), status, output })
    }

    /// The processes that serve the file; the word with its name is on their command line.
    fn links(&self, attachment: &Attachment) -> Vec<(Pid, Vec<String>)> {
        let file = self.file_of(attachment).display().to_string();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let words = |pid: i32| -> Option<(Pid, Vec<String>)> {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let words: Vec<String> = line
                .split(|byte| *byte == 0)
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect();
            let is_link = words.iter().any(|word| word == link::SUBCOMMAND);
            (is_link && words.contains(&file)).then_some((Pid::from_raw(pid), words))
        };
        pids.filter_map(words).collect()
    }
}

fn is_mounted(file: &Path) -> Result<bool, HostError> {
    Ok(mounts::at(file)?.is_some_and(|mount| mount.fs_type == fuse::FS_TYPE))
}

/// Whether a loop device can be used. The kernel names the file of one that is being made, by a losetup
/// whose driver was killed, before it has a size.
fn has_size(device: &Path) -> bool {
    let size = || disks::size(device).ok().filter(|size| *size > 0);
    poll(LINK_TIME, size).is_some()
}

impl Attacher for FuseAttacher {
    fn name(&self) -> &'static str {
        "fuse"
    }

    fn state(&self, attachment: &Attachment) -> Result<State, HostError> {
        let file = self.file_of(attachment);
        let (mounted, loops) = (is_mounted(&file)?, disks::loops_on(&file)?);
        let links = self.links(attachment);
        if !mounted && loops.is_empty() && links.is_empty() {
            return Ok(State::None);
        }
        let of_this_lease = links.iter().any(|(_, words)| words.contains(&attachment.export));
        Ok(match loops.into_iter().next() {
            Some(device) if mounted && of_this_lease => State::Attached(device),
            _ => State::Broken,
        })
    }

    fn devices(&self, attachment: &Attachment) -> Result<Vec<PathBuf>, HostError> {
        disks::loops_on(&self.file_of(attachment))
    }

    fn attach(&self, attachment: &Attachment) -> Result<PathBuf, HostError> {
        match self.state(attachment)? {
            State::Attached(device) if has_size(&device) && self.answers(attachment, LINK_TIME) => {
                return Ok(device);
            }
            State::None => {}
            _ => self.detach(attachment)?,
        }
        tracing::warn!(
            export = attachment.export,
            "attaching by a process of this host and a loop device: for development only"
        );
        self.start_link(attachment)?;
        disks::make_loop(&self.file_of(attachment), attachment.read_only)
    }

    fn grow(&self, attachment: &Attachment, at_least: u64) -> Result<u64, HostError> {
        let file = self.file_of(attachment);
        let State::Attached(device) = self.state(attachment)? else {
            return Err(HostError::Unexpected(format!("{} is not attached", attachment.export)));
        };
        if disks::size(&device)? >= at_least {
            return disks::size(&device);
        }
        let mut told: Option<Instant> = None;
        let grown = poll(LINK_TIME, || {
            // Again, since a server may not have heard of the growth when it was asked.
            if told.is_none_or(|told| told.elapsed() > TELL_AGAIN) {
                for (pid, _) in self.links(attachment) {
                    // One that has ended is noticed by whoever uses the device.
                    let _ = kill(pid, Signal::SIGHUP);
                }
                told = Some(Instant::now());
                steps::reached(Step::LinkTold);
            }
            let owned = file.clone();
            let look = move || std::fs::metadata(owned).map_or(0, |file| file.len());
            within("the file's size", LINK_TIME, look).ok().filter(|size| *size >= at_least)
        });
        let size = grown.ok_or_else(|| HostError::Slow {
            what: format!("the growth of {}", device.display()),
            after: LINK_TIME,
        })?;
        steps::reached(Step::LinkGrown);
        disks::refresh_loop(&device)?;
        Ok(size)
    }

    fn answers(&self, attachment: &Attachment, time: Duration) -> bool {
        let file = self.file_of(attachment);
        // The loop's own cache would answer for the server: ask the file, whose reads are not kept.
        within("reading the volume", time, move || disks::read_past_caches(&file, 0))
            .unwrap_or(false)
    }

    fn abort(&self, attachment: &Attachment) -> Result<(), HostError> {
        for (pid, _) in self.links(attachment) {
            tracing::warn!(pid = pid.as_raw(), export = attachment.export, "ending the link");
            // It may end by itself.
            let _ = kill(pid, Signal::SIGKILL);
        }
        let gone = || self.links(attachment).is_empty().then_some(());
        poll(LINK_TIME, gone).ok_or_else(|| HostError::Slow {
            what: format!("the end of the link of {}", attachment.export),
            after: LINK_TIME,
        })
    }

    fn detach(&self, attachment: &Attachment) -> Result<(), HostError> {
        let (folder, file) = (self.folder_of(attachment), self.file_of(attachment));
        if let Err(error) = disks::remove_loops(&file) {
            // A server that is gone keeps the device busy; with an error for each request it ends.
            tracing::warn!(%error, "the loop device does not go: its requests will fail");
            self.abort(attachment)?;
            disks::remove_loops(&file)?;
        }
        steps::reached(Step::LoopRemoved);
        if !is_mounted(&file)? {
            // A link that did not get so far has nothing to lose, and may mount at any moment.
            self.abort(attachment)?;
        }
        if mounts::unmount(&file, LINK_TIME).is_err() {
            self.abort(attachment)?;
            mounts::unmount_lazily(&file)?;
        }
        steps::reached(Step::LinkUnmounted);
        let gone = || self.links(attachment).is_empty().then_some(());
        if poll(LINK_TIME, gone).is_none() {
            self.abort(attachment)?;
        }
        steps::reached(Step::LinkEnded);
        for path in [file, folder.join("link.log")] {
            files::remove_target(&path)?;
        }
        files::remove_target(&folder)
    }
}
