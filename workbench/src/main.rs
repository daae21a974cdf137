//! What a developer measures with: the simulated fleet with faults.
//!
//! `cargo xtask simulate` builds this program, in release, with only the crates that the command needs, and passes its
//! arguments on.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program whose only reader is the person who runs it"
)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod simulate;

/// Measures what Greenlight decides and withstands.
#[derive(Debug, Parser)]
#[command(name = "greenlight-workbench", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Rollouts in simulated fleets in which things die, judged by checkers of their own. Exits with 1 when one is
    /// violated.
    Simulate(simulate::Options),
}

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}")]
    Refused(String),
}

/// What was measured is not as it should be.
const FAILED: u8 = 1;
/// The command could not be done.
const REFUSED: u8 = 2;

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Simulate(options) => simulate::run(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(FAILED),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(REFUSED)
        }
    }
}
