//! Processes that end with the test, one way or the other.
//!
//! Kills by process id only, and only what the test started.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// Seconds that any single command of a client may take.
const COMMAND_LIMIT: &str = "600";

/// Runs a command to its end and returns what it printed.
///
/// # Panics
/// When it fails; the message holds its output.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end, however that is.
///
/// # Panics
/// When the program is not there.
#[track_caller]
pub fn output(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new("timeout")
        .args(["-k", "5", COMMAND_LIMIT, program])
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// A process in the background. Dropping it kills it; so does the death of the test.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Running {
    /// Starts a command; its standard error goes to the log file, and so does its standard output
    /// unless it is to be read from [`Running::child`].
    ///
    /// # Panics
    /// When the program is not there or the log cannot be made.
    #[track_caller]
    pub fn start(log: &Path, command: &[&str], piped: bool) -> Running {
        let errors = File::options().create(true).append(true).open(log);
        let errors = errors.unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let out = match piped {
            true => Stdio::piped(),
            false => errors.try_clone().expect("a descriptor").into(),
        };
        // The kernel kills it when this thread ends, even if nothing here runs any more.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(command)
            .stdin(if piped { Stdio::piped() } else { Stdio::null() })
            .stdout(out)
            .stderr(errors)
            .spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Running { child, name: command.join(" "), log: log.to_path_buf() }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process, to talk to.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end and returns the exit code, or 128 plus the signal.
    ///
    /// # Panics
    /// When it does not end in time.
    #[track_caller]
    pub fn wait(&mut self, seconds: u64) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let what = format!("the end of {}", self.name);
        let status = wait::until(&what, seconds, || self.child.try_wait().ok().flatten());
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_running() {
            // It may end by itself between the look and the kill.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Sends a signal to a process that must be there.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap_or_else(|e| panic!("{signal} to {pid}: {e}"));
}

/// Whether a process runs; one that is dead and not yet reaped does not.
///
/// Its first thread may be dead while others still hold its files and locks: then it still runs.
pub fn is_alive(pid: u32) -> bool {
    let state = state(pid);
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    match state {
        None => false,
        Some('Z' | 'X') => threads() > 1,
        Some(_) => true,
    }
}

/// Whether a process stands still after SIGSTOP: all of its threads. The signal is taken by one of
/// them, and others go on for as long as that one waits for a processor.
pub fn is_stopped(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let mut states = tasks.flatten().map(|task| letter(&task.path().join("stat")));
    states.all(|state| state == Some('T'))
}

/// The letter by which /proc tells what a process does.
fn state(pid: u32) -> Option<char> {
    letter(Path::new(&format!("/proc/{pid}/stat")))
}

fn letter(stat: &Path) -> Option<char> {
    let stat = fs::read_to_string(stat).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next())
}

/// SIGKILL, and back when the process is gone with all that it held open.
///
/// # Panics
/// When it does not go.
#[track_caller]
pub fn kill_and_wait(pid: u32) {
    // It may be gone already.
    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    wait::until_true(&format!("the end of process {pid}"), 20, || !is_alive(pid));
}

/// Resident memory of a process, in bytes.
pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The word that follows this one on a process's command line.
pub fn word_after(pid: u32, word: &str) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line).into_owned();
    let mut words = line.split('\0').skip_while(|it| *it != word);
    words.nth(1).map(str::to_owned)
}

/// Processes with a path below this folder on their command line, but not this one.
pub fn with_argument_below(folder: &Path) -> Vec<u32> {
    let folder = folder.display().to_string();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_string_lossy().parse().ok());
    pids.filter(|pid: &u32| *pid != std::process::id())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.split('\0').any(|word| word.contains(&folder))
        })
        .collect()
}
