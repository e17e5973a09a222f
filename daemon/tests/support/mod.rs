//! What the tests of the program share: a folder, the program run to its end, the program running.

#![allow(dead_code, reason = "each test uses its part")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest that anything here may take: the machine may be busy.
const LONG: Duration = Duration::from_secs(90);

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_ballastd");

/// A folder that is gone after the test, with every process that names it.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// A fresh one, on a file system with direct I/O.
    pub fn new(test: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A path in it, as text.
    pub fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// A configuration of one node with the pool `pool`, of cluster number `cluster`.
    pub fn config(&self, name: &str, cluster: u32, node: u32) -> String {
        let text = format!(
            "cluster = \"0f2b5c3e-7a4d-4c1b-9e56-{cluster:012}\"\nnode = {node}\npool = \"pool\"\n\
             [listen]\npeer = \"127.0.0.1:0\"\n\
             [[nodes]]\nid = {node}\nname = \"only\"\npeer = \"127.0.0.1:9\"\n"
        );
        fs::write(self.0.join(name), text).unwrap();
        self.file(name)
    }

    /// Processes that name this folder.
    pub fn processes(&self) -> Vec<i32> {
        let folder = self.0.display().to_string();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
        pids.filter(|pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&folder)
        })
        .collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if std::thread::panicking() {
            eprintln!("left for you to look at: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// Runs the program to its end.
pub fn ballastd(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args([&LONG.as_secs().to_string(), PROGRAM]).args(arguments);
    command.stdin(Stdio::null()).output().unwrap()
}

/// Ended with this code, without a panic, and the message says this.
#[track_caller]
pub fn assert_refused(output: &Output, code: i32, says: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.contains(says) && !text.contains("panicked"), "not {says:?}:\n{text}");
}

/// Looks again and again until there is an answer.
#[track_caller]
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LONG, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The program, running; what it prints goes to a file.
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts it.
    pub fn start(log: &Path, arguments: &[&str]) -> Self {
        Self::start_by(log, &[], arguments)
    }

    /// Starts it by a command that becomes it.
    pub fn start_by(log: &Path, by: &[&str], arguments: &[&str]) -> Self {
        let file = fs::File::create(log).unwrap();
        let words = [by, &[PROGRAM], arguments].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        Self { child: command.spawn().unwrap(), log: log.to_owned() }
    }

    /// What it printed so far.
    pub fn printed(&self) -> String {
        let mut text = String::new();
        let _ = fs::File::open(&self.log).unwrap().read_to_string(&mut text);
        text
    }

    /// Waits until it has printed this.
    #[track_caller]
    pub fn wait_printed(&mut self, what: &str) {
        until(what, || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "ended {ended:?}: {}", self.printed());
            self.printed().contains(what).then_some(())
        });
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        until("the end", || self.child.try_wait().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
