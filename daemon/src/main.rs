//! `ballastd`: reads its configuration, brings the real outside world, runs a storage node.
//!
//! Owns the command line, the configuration file, the administration and metrics listeners and
//! the development cluster. What a node does is in `node`. Exit codes: 0 done, 1 failed, 2 wrong
//! usage or configuration.

mod admin;
mod cli;
mod config;
mod dev;
mod error;
mod format;
mod http;
mod logging;
mod process;
mod prometheus;
mod run;
mod settings;
mod shard;
mod size;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    ballast_env::linux::keep_memory();
    let result = match Cli::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Format(arguments) => format::run(&arguments),
        Command::Dev(arguments) => dev::run(&arguments),
        Command::DevNode(arguments) => dev::node::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ballastd: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
