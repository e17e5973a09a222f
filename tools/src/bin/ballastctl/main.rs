//! `ballastctl`: what an administrator asks of a running cluster.
//!
//! Owns the command line, and how answers look to people (tables) and to programs (JSON). Decides
//! nothing: every answer and every refusal is the cluster's. Exit code 0 = done, 1 = refused or no
//! answer, 2 = wrong usage. The answer goes to standard output, everything else to standard error.

mod cli;
mod confirm;
mod create;
mod leases;
mod render;
mod run;
mod size;
mod table;
mod time;
mod view;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;
use crate::run::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&Failure::Runtime(error)),
    };
    match runtime.block_on(run::run(&cli)) {
        Ok(answer) => print(&answer),
        Err(failure) => fail(&failure),
    }
}

fn print(answer: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(answer.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        // `ballastctl volume list | head` closes its end: that is not a failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(&Failure::Output(error)),
    }
}

fn fail(failure: &Failure) -> ExitCode {
    // Nothing is left to be done if standard error is closed as well.
    let _ = writeln!(io::stderr(), "error: {failure}");
    ExitCode::from(failure.exit_code())
}
