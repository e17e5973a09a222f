//! Drives `ballast-verify`: the load that knows what was acknowledged.

use std::io::{BufRead, BufReader};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::machine::Machine;
use crate::process::{self, Running};
use crate::scratch::{self, Scratch};
use crate::wait;

/// Seconds that reading everything back may take.
const READ_BACK: u64 = 180;

/// A running load.
pub struct Verify {
    process: Running,
    lines: Receiver<Value>,
    latest: Value,
    connected: String,
    /// Times at which connections broke, in milliseconds since 1970.
    pub lost: Vec<u64>,
}

/// What a load said in the end.
#[derive(Debug, Clone)]
pub struct Report {
    /// Everything, as the tool printed it.
    pub json: Value,
}

impl Verify {
    /// Starts a load on these addresses; `options` as in the tool's help.
    ///
    /// # Panics
    /// When the tool is not built.
    pub fn start(scratch: &Scratch, uris: &[&str], options: &[&str]) -> Verify {
        let program = scratch::program("ballast-verify");
        let program = program.display().to_string();
        let mut command = vec![program.as_str(), "--until-stdin-closes"];
        command.extend(options);
        command.extend(uris);
        let log = scratch.path().join("verify.log");
        let mut process = Running::start(&log, &command, true);
        let out = process.child().stdout.take().expect("standard output is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let Ok(value) = serde_json::from_str(&line) else { continue };
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        Verify { process, lines, latest: Value::Null, connected: String::new(), lost: Vec::new() }
    }

    /// Takes the next line; false when there will be none.
    fn take(&mut self, limit: Duration) -> Option<Value> {
        match self.lines.recv_timeout(limit) {
            Ok(value) => {
                self.note(&value);
                Some(value)
            }
            Err(RecvTimeoutError::Timeout) => Some(Value::Null),
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }

    fn note(&mut self, value: &Value) {
        match value["event"].as_str() {
            Some("progress") => self.latest = value.clone(),
            Some("connected") => {
                self.connected = value["uri"].as_str().unwrap_or_default().to_string();
            }
            Some("lost") => self.lost.push(value["unix_ms"].as_u64().unwrap_or(0)),
            _ => {}
        }
    }

    /// The address of the last connection that was made.
    pub fn served_by(&self) -> &str {
        &self.connected
    }

    /// Writes acknowledged so far, as of the last line that was taken.
    pub fn writes(&self) -> u64 {
        self.latest["writes"].as_u64().unwrap_or(0)
    }

    /// Waits until this many more writes were acknowledged than now.
    ///
    /// # Panics
    /// When they do not come in time, or the tool gives up.
    #[track_caller]
    pub fn progress(&mut self, more: u64, seconds: u64) {
        // What is in the channel now was said before.
        while let Ok(value) = self.lines.try_recv() {
            self.note(&value);
        }
        let goal = self.writes() + more;
        self.until(&format!("{more} more writes"), seconds, |value| {
            value["writes"].as_u64().is_some_and(|writes| writes >= goal)
        });
    }

    /// Waits for a progress line that satisfies this.
    ///
    /// # Panics
    /// As [`Verify::progress`].
    #[track_caller]
    pub fn until(&mut self, what: &str, seconds: u64, fine: impl Fn(&Value) -> bool) {
        let start = Instant::now();
        while start.elapsed().as_secs() < seconds {
            let Some(value) = self.take(Duration::from_millis(200)) else {
                panic!("the load ended while waiting for {what}: {}", self.process.log());
            };
            assert!(value["event"] != "failed", "the load gave up: {value}");
            if value["event"] == "progress" && fine(&value) {
                return;
            }
        }
        panic!("{what} did not come in {seconds} s; last: {}", self.latest);
    }

    /// Has the tool stand still until [`Verify::go_on`]: it asks for nothing, nor takes an answer.
    ///
    /// # Panics
    /// When it is gone, or does not stand still.
    #[track_caller]
    pub fn hold(&self) {
        self.process.signal(Signal::SIGSTOP);
        let pid = self.process.pid();
        wait::until_true("the load stands still", 20, || process::is_stopped(pid));
    }

    /// Has the tool go on.
    ///
    /// # Panics
    /// When it is gone.
    #[track_caller]
    pub fn go_on(&self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// Ends the load, lets the tool read everything back, and returns its report.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn finish(mut self) -> Report {
        drop(self.process.child().stdin.take());
        let start = Instant::now();
        while start.elapsed().as_secs() < READ_BACK {
            match self.take(Duration::from_millis(200)) {
                None => break,
                Some(value) if value["event"] == "failed" => panic!("the load gave up: {value}"),
                Some(value) if value["event"] == "report" => return Report { json: value },
                Some(_) => {}
            }
        }
        panic!("no report in {READ_BACK} s: {}", self.process.log());
    }
}

impl Report {
    /// Whether all that was acknowledged is there, and nothing else.
    ///
    /// # Panics
    /// When not; the message lists what was found.
    #[track_caller]
    pub fn assert_ok(&self) {
        assert!(self.json["ok"] == true, "{:#}", self.json);
        assert!(self.number("writes") > 0, "the load wrote nothing: {:#}", self.json);
    }

    /// A number of the report.
    ///
    /// # Panics
    /// When there is no such number.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        self.json[name].as_u64().unwrap_or_else(|| panic!("no {name} in {}", self.json))
    }

    /// The longest stall that touches this interval, in milliseconds (all times in ms since 1970).
    pub fn longest_stall_between(&self, from: u64, to: u64) -> u64 {
        self.stalls_between(from, to).map(|(_, ms)| ms).max().unwrap_or(0)
    }

    /// The same, each without the time in it that the machine itself stood still.
    pub fn longest_stall_on(&self, machine: &Machine, from: u64, to: u64) -> u64 {
        let theirs = |(begin, ms): (u64, u64)| {
            let paused = machine.paused_between(begin, begin + ms);
            if paused > 0 {
                println!(
                    "a stall of {ms} ms, of which the machine itself stood still for {paused}"
                );
            }
            ms.saturating_sub(paused)
        };
        self.stalls_between(from, to).map(theirs).max().unwrap_or(0)
    }

    /// Beginnings and lengths of the stalls that touch an interval.
    fn stalls_between(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        let stalls = self.json["stalls"].as_array().cloned().unwrap_or_default();
        let stalls = stalls.into_iter().map(|stall| {
            let number = |name: &str| stall[name].as_u64().unwrap_or(0);
            (number("unix_ms"), number("ms"))
        });
        stalls.filter(move |(begin, ms)| *begin < to && begin + ms > from)
    }
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_millis() as u64)
}
