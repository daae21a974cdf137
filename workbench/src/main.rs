//! What a developer measures with: the simulated fleet with faults, mutations that it must see, what decisions cost, and
//! hostile inputs.
//!
//! `cargo xtask simulate`, `mutate`, `bench` and `fuzz` build this program with only the crates that the command needs, and
//! pass their arguments on. All are started in the workspace's root.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program whose only reader is the person who runs it"
)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[cfg(feature = "bench")]
mod bench;
#[cfg(any(feature = "bench", feature = "fuzz", feature = "soak"))]
#[cfg_attr(
    not(feature = "fuzz"),
    expect(dead_code, reason = "hostile inputs draw in more ways than simulated traffic")
)]
mod chance;
#[cfg(feature = "fuzz")]
mod fuzz;
#[cfg(any(feature = "bench", feature = "fuzz"))]
mod measure;
mod mutate;
mod simulate;
#[cfg(feature = "soak")]
mod soak;

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
    /// Breaks planner, interlock and records on purpose, one thing at a time. Exits with 1 when the simulation does not
    /// see one of them.
    Mutate(mutate::Options),
    /// Hostile inputs for every place where bytes of others come in. Exits with 1 when one fails.
    #[cfg(feature = "fuzz")]
    Fuzz(fuzz::Options),
    /// What decisions cost. Exits with 1 when they cost too much.
    #[cfg(feature = "bench")]
    Bench(bench::Options),
    /// A real component under load while it is changed and what it stands on dies. Exits with 1 when something is lost.
    #[cfg(feature = "soak")]
    Soak(soak::Options),
}

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}")]
    Refused(String),
    #[error("cannot {doing}: {source}")]
    System { doing: String, source: std::io::Error },
    #[error("cannot print the figures: {0}")]
    Json(#[source] serde_json::Error),
}

impl Error {
    fn system(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::System { doing, source }
    }
}

/// What was measured is not as it should be.
const FAILED: u8 = 1;
/// The command could not be done.
const REFUSED: u8 = 2;

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Simulate(options) => simulate::run(&options),
        Command::Mutate(options) => mutate::run(&options),
        #[cfg(feature = "fuzz")]
        Command::Fuzz(options) => fuzz::run(&options),
        #[cfg(feature = "bench")]
        Command::Bench(options) => bench::run(&options),
        #[cfg(feature = "soak")]
        Command::Soak(options) => soak::run(&options),
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
