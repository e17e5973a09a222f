//! Structured logs, to standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// The consensus library tells every step at `info`; what an administrator needs of it is told by
/// our own code.
const QUIET: &str = "openraft=warn";

/// Starts logging. Only the first call of a process has an effect.
pub fn start(log: &Log) {
    let Ok(filter) = filter(&log.level) else { return };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // A shard's thread has its name.
        .with_thread_names(true)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // An error means that something logs already.
    let _ = match log.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}

/// Whether `level` can be understood; the text says what is wrong.
///
/// # Errors
/// What is wrong with it.
pub fn check_level(level: &str) -> Result<(), String> {
    filter(level).map(drop)
}

fn filter(level: &str) -> Result<EnvFilter, String> {
    let wrong = || {
        format!(
            "{level:?} is not a level: use error, warn, info, debug or trace, alone or as \
             TARGET=LEVEL, separated by commas"
        )
    };
    let known = |word: &str| {
        let level = word.rsplit('=').next().unwrap_or(word).trim();
        ["off", "error", "warn", "info", "debug", "trace"].contains(&level)
    };
    if !level.split(',').all(known) {
        return Err(wrong());
    }
    EnvFilter::builder().parse(format!("{QUIET},{level}")).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked() {
        for level in ["info", "debug", "warn,ballast_node=debug", "off"] {
            assert!(check_level(level).is_ok(), "{level}");
        }
        for level in ["", "loud", "info,ballast_node", "ballast_node=loud"] {
            assert!(check_level(level).is_err(), "{level}");
        }
    }
}
