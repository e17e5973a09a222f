//! Other people's programs: mkfs, fsck, losetup.
//!
//! A program dies with the thread that waits for it, so that none of a killed process's goes on
//! beside the one that a repeated call starts.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{HostError, poll};
use crate::steps;

/// How long a killed program may take to end.
const KILL_TIME: Duration = Duration::from_secs(2);

/// The most that is kept of what a program says; the rest is read and forgotten.
const OUTPUT_MAX: u64 = 64 * 1024;

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; 128 and more for a signal.
    pub code: i32,
    /// Its standard output.
    pub output: String,
    /// Its standard error.
    pub errors: String,
}

/// Runs a program to its end, however that is.
///
/// # Errors
/// When it can't be started or takes too long; it is killed then.
pub fn run(program: &str, arguments: &[&str], time: Duration) -> Result<Ended, HostError> {
    use std::os::unix::process::ExitStatusExt;
    let missing = |error| HostError::ProgramMissing { program: program.to_owned(), error };
    let start = Instant::now();
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", program])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    steps::reached_start_of(program, arguments);
    let output = child.stdout.take().map(read_all);
    let errors = child.stderr.take().map(read_all);
    let Some(status) = poll(time, || child.try_wait().ok().flatten()) else {
        end(program, child);
        return Err(HostError::Slow { what: program.to_owned(), after: time });
    };
    let text = |reader: Option<std::thread::JoinHandle<String>>| {
        reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
    };
    let (output, errors) = (text(output), text(errors));
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    tracing::debug!(program, code, ms = start.elapsed().as_millis(), "ran");
    Ok(Ended { code, output, errors })
}

/// Kills a program, and waits for its end no longer than most take. One that waits for a server in
/// the kernel dies when that lets go; until then it holds its device, which a repeated call sees.
fn end(program: &str, mut child: Child) {
    // It may have ended by itself.
    let _ = child.kill();
    if poll(KILL_TIME, || child.try_wait().ok().flatten()).is_none() {
        tracing::warn!(program, pid = child.id(), "killed, and held by the kernel still");
        // Somebody must see its end.
        std::thread::spawn(move || child.wait());
    }
}

/// Runs a program that must succeed and returns what it printed.
///
/// # Errors
/// When it does not.
pub fn must(program: &str, arguments: &[&str], time: Duration) -> Result<String, HostError> {
    let ended = run(program, arguments, time)?;
    if ended.code == 0 { Ok(ended.output) } else { Err(failed(program, &ended)) }
}

/// The error of a program that did not do its work.
pub fn failed(program: &str, ended: &Ended) -> HostError {
    let said = format!("{} {}", ended.errors.trim(), ended.output.trim());
    let words: Vec<&str> = said.split_whitespace().collect();
    let mut output = words.join(" ");
    // Enough for people; a status has to fit into the headers of a reply.
    if let Some((end, _)) = output.char_indices().nth(800) {
        output.truncate(end);
    }
    let status = format!("exit code {}", ended.code);
    HostError::Program { program: program.to_owned(), status, output }
}

fn read_all(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read until an error is what there is.
        let _ = pipe.by_ref().take(OUTPUT_MAX).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_end_well_badly_or_are_killed() {
        let second = Duration::from_secs(10);
        assert_eq!(must("echo", &["hello"], second).unwrap(), "hello\n");
        let error = must("sh", &["-c", "echo why >&2; exit 3"], second).unwrap_err().to_string();
        assert!(error.contains("exit code 3") && error.contains("why"), "{error}");
        let slow = run("sleep", &["60"], Duration::from_millis(50)).unwrap_err();
        assert!(matches!(slow, HostError::Slow { .. }));
        let much = must("head", &["--bytes=1000000", "/dev/zero"], second).unwrap();
        assert_eq!(much.len() as u64, OUTPUT_MAX);
    }

    /// As a program does whose last request waits for a server in the kernel.
    #[test]
    fn what_holds_on_after_the_kill_is_not_waited_for() {
        let start = Instant::now();
        // The child of the killed one keeps its pipes, and ends of its own.
        let holds = ["-c", "sleep 20 & wait"];
        let slow = run("sh", &holds, Duration::from_millis(500)).unwrap_err();
        assert!(matches!(slow, HostError::Slow { .. }));
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}
