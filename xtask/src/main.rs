//! What a developer runs: the tests in their order, a bed of hosts, the check of dependencies.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program whose only reader is the person who runs it"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bed;
mod bed_tests;
mod deny;
mod dependencies;
mod layers;
#[cfg(test)]
mod promises;
mod syntax;
mod test;
mod workbench;

use workbench::Tool;

/// Runs the project's tests and its test bed.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole test run, as continuous integration does it: formatting, lints, the layer rule, dependencies,
    /// unit tests, and the tests on a bed of real hosts. Exits with 0, 1 (something failed) or 2 (something is
    /// missing on this machine).
    Test(test::Options),
    /// Real hosts on this machine, to try things on. Needs root, or sudo without a password.
    Bed(bed::Options),
    /// Rollouts in simulated fleets in which things die: `simulate --help` tells the options.
    #[command(disable_help_flag = true)]
    Simulate(workbench::Passed),
    /// Breaks planner, interlock and records on purpose: the simulation must see each. `mutate --help` tells the options.
    #[command(disable_help_flag = true)]
    Mutate(workbench::Passed),
    /// Hostile inputs for every place where bytes of others come in: `fuzz --help` tells the options.
    #[command(disable_help_flag = true)]
    Fuzz(workbench::Passed),
    /// `bench planner [--json]`: what a decision costs, for 10 to 10,000 hosts. `bench verdict [--json]`: how often healthy
    /// canaries are aborted, and how long faulty ones live. `bench router [--json]`: the built-in router beside HAProxy and
    /// nginx. `bench --help` tells of the others.
    #[command(disable_help_flag = true)]
    Bench(workbench::Passed),
    /// `soak router`: the built-in router under load, changed all the time in front of backends that die.
    #[command(disable_help_flag = true)]
    Soak(workbench::Passed),
    /// Licences, bans and sources of all dependencies by cargo-deny, which is installed below target/tools when
    /// it is missing.
    Deny,
}

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Bed(#[from] greenlight_testbed::Error),
    #[error("{0}")]
    Refused(String),
    #[error("cannot {doing}: {source}")]
    System { doing: String, source: std::io::Error },
}

impl Error {
    fn system(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::System { doing, source }
    }
}

/// The whole is in order; something failed; something is missing.
const FAILED: u8 = 1;
const MISSING: u8 = 2;

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Test(options) => test::run(&options),
        Command::Bed(options) => bed::run(options),
        Command::Simulate(passed) => workbench::run(Tool::Simulate, &passed),
        Command::Mutate(passed) => workbench::run(Tool::Mutate, &passed),
        Command::Fuzz(passed) => workbench::run(Tool::Fuzz, &passed),
        Command::Soak(passed) => workbench::run(Tool::Soak, &passed),
        Command::Bench(passed) => workbench::run(Tool::Bench, &passed),
        Command::Deny => deny::run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::from(match error {
            Error::Refused(_) => MISSING,
            _ => FAILED,
        })
    })
}

/// The root of the workspace.
fn workspace_root() -> PathBuf {
    // Set by `cargo run`; the other one holds when the program is started by itself.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let mut path = PathBuf::from(manifest);
    path.pop();
    path
}

/// Cargo, in the root of the workspace.
fn cargo() -> std::process::Command {
    let mut command = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace_root());
    command
}
