//! `ballast-verify`: loads a volume over NBD, remembers what was acknowledged, and proves it.
//!
//! Every written block says which write it came from. Connections may break at any moment: the
//! tool reconnects to any of the addresses that it was given and goes on. In the end each block
//! must hold its last acknowledged write, or one that got no answer and was never observed
//! undone. Anything else is a violation: lost, ghost, torn, misplaced or corrupt.
//!
//! Never trusts the server about anything but sizes, and needs no library of the project, so that
//! no bug of theirs can hide in it.

mod client;
mod journal;
mod load;
mod meter;
mod pattern;
mod readback;
mod report;

use std::io::Read;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;

use client::{Client, NbdUri};
use load::{Ended, Load};
use report::Reporter;

/// Loads a volume over NBD through failures, and checks that nothing acknowledged was lost.
#[derive(Parser, Debug)]
#[command(after_help = "Examples:\n  \
    ballast-verify nbd://127.0.0.1:10809/demo --seconds 30\n  \
    ballast-verify nbd://127.0.0.1:10809/demo nbd://127.0.0.1:10810/demo --until-stdin-closes")]
struct Arguments {
    /// Where the volume is served: nbd://HOST:PORT/EXPORT. More than one: tried in turn.
    #[arg(required = true)]
    uris: Vec<NbdUri>,
    /// How long to load.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Load until standard input is closed, however long that takes.
    #[arg(long)]
    until_stdin_closes: bool,
    /// Size of the region at the volume's start that is used, in MiB.
    #[arg(long, default_value_t = 64)]
    span_mib: u64,
    /// Requests in flight.
    #[arg(long, default_value_t = 16)]
    depth: usize,
    /// Largest write, in KiB (the smallest is 4).
    #[arg(long, default_value_t = 64)]
    max_kib: u32,
    /// Share of reads, in percent; they are verified too.
    #[arg(long, default_value_t = 20)]
    reads: u32,
    /// Share of trims and writes of zeroes, in percent.
    #[arg(long, default_value_t = 5)]
    zeroes: u32,
    /// Seed of offsets, sizes and contents.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The region holds zeroes now; without this, a block counts from its first write on.
    #[arg(long)]
    expect_zeroes: bool,
    /// A write refused for lack of space is not a failure (and must not be there later).
    #[arg(long)]
    allow_no_space: bool,
    /// Seconds without a connection, or without an answer, after which to give up.
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// In the end read everything through each address, not just one.
    #[arg(long)]
    verify_all: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let reporter = Reporter::new();
    match run(&arguments, &reporter) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            reporter.failed(&error.to_string());
            ExitCode::from(2)
        }
    }
}

/// Loads, reads back, reports; whether everything held.
fn run(arguments: &Arguments, reporter: &Reporter) -> Result<bool, client::ClientError> {
    let patience = Duration::from_secs(arguments.patience);
    let mut next = 0;
    let mut connection = reconnect(&arguments.uris, &mut next, patience)?;
    let load = Arc::new(Load::new(settings(arguments, connection.size)));
    stop_later(arguments, &load);
    let progress = load.clone();
    let watcher = reporter.clone();
    std::thread::spawn(move || watcher.watch(&progress));
    loop {
        let served = connection.uri.clone();
        reporter.connected(&served.to_string());
        match load.run(connection) {
            Ended::Stopped => break,
            Ended::Lost(reason) => reporter.lost(&served.to_string(), &reason),
        }
        connection = settled(arguments, &load, &mut next, reporter)?;
    }
    let through = if arguments.verify_all { arguments.uris.len() } else { 1 };
    for turn in 0..through {
        let uris =
            if arguments.verify_all { &arguments.uris[turn..=turn] } else { &arguments.uris };
        let mut connection = reconnect(uris, &mut 0, patience)?;
        readback::everything(&load, &mut connection)?;
        connection.disconnect();
    }
    Ok(reporter.finish(&load))
}

/// A new connection on which every unanswered write has been looked at.
fn settled(
    arguments: &Arguments,
    load: &Load,
    next: &mut usize,
    reporter: &Reporter,
) -> Result<Client, client::ClientError> {
    let patience = Duration::from_secs(arguments.patience);
    let start = Instant::now();
    loop {
        let mut connection = reconnect(&arguments.uris, next, patience)?;
        match readback::settle(load, &mut connection) {
            Ok(()) => return Ok(connection),
            Err(error) if start.elapsed() > patience => return Err(error),
            Err(error) => reporter.lost(&connection.uri.to_string(), &error.to_string()),
        }
    }
}

fn settings(arguments: &Arguments, size: u64) -> load::Settings {
    load::Settings {
        blocks: (size.min(arguments.span_mib << 20) / pattern::BLOCK as u64) as usize,
        depth: arguments.depth.max(1),
        max_blocks: (arguments.max_kib as usize * 1024 / pattern::BLOCK).max(1),
        read_percent: arguments.reads,
        zero_percent: arguments.zeroes,
        seed: arguments.seed,
        expect_zeroes: arguments.expect_zeroes,
        allow_no_space: arguments.allow_no_space,
        patience: Duration::from_secs(arguments.patience),
    }
}

fn stop_later(arguments: &Arguments, load: &Arc<Load>) {
    let load = load.clone();
    let seconds = arguments.seconds;
    let until_closed = arguments.until_stdin_closes;
    std::thread::spawn(move || {
        if until_closed {
            // What is written there means nothing; an error ends the load like a close.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
        } else {
            std::thread::sleep(Duration::from_secs(seconds));
        }
        load.stop();
    });
}

/// Tries the addresses in turn until one serves the volume.
fn reconnect(
    uris: &[NbdUri],
    next: &mut usize,
    patience: Duration,
) -> Result<Client, client::ClientError> {
    let start = Instant::now();
    loop {
        let uri = &uris[*next % uris.len()];
        *next += 1;
        match Client::connect(uri) {
            Ok(client) => return Ok(client),
            Err(error) if start.elapsed() > patience => return Err(error),
            // A refused connection returns at once: leave the machine to those that recover.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}
