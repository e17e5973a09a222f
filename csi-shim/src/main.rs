//! `ballast-csi`: the process. Everything is in the library.

use std::process::ExitCode;

use clap::Parser;

use ballast_csi_shim::cli::Cli;
use ballast_csi_shim::link::{self, LinkCli};
use ballast_csi_shim::serve;

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    if words.nth(1).is_some_and(|word| word == link::SUBCOMMAND) {
        return link(words);
    }
    let cli = Cli::parse();
    serve::start_logging(&cli.log_level);
    match serve::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ballast-csi: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn link(words: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let name = std::ffi::OsString::from(link::SUBCOMMAND);
    let cli = LinkCli::parse_from(std::iter::once(name).chain(words));
    serve::start_logging("info");
    match link::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}
