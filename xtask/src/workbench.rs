//! The commands that measure: they are a program of their own, built with only the crates that the command needs, which gets
//! its arguments as they are.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use clap::Args;

use crate::test::target_directory;
use crate::{Error, FAILED, cargo};

/// What is passed on.
#[derive(Debug, Args)]
pub(crate) struct Passed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// A command of the workbench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Simulate,
    Mutate,
    Bench,
    Fuzz,
    Soak,
}

impl Tool {
    /// Cargo, about to build the workbench and to run this; arguments may follow.
    pub(crate) fn command(self) -> Command {
        let mut command = cargo();
        command.args([
            "run",
            "--quiet",
            "--locked",
            "--package",
            "greenlight-workbench",
            "--no-default-features",
        ]);
        let name = match self {
            Self::Simulate => "simulate",
            Self::Mutate => "mutate",
            Self::Bench => {
                command.args(["--features", "bench"]);
                "bench"
            }
            Self::Fuzz => {
                command.args(["--features", "fuzz"]);
                "fuzz"
            }
            Self::Soak => {
                command.args(["--features", "soak"]);
                "soak"
            }
        };
        // Hostile inputs are to meet every check; the others count seconds.
        if self != Self::Fuzz {
            command.arg("--release");
        }
        command.args(["--", name]);
        command
    }
}

pub(crate) fn run(tool: Tool, passed: &Passed) -> Result<ExitCode, Error> {
    let mut command = tool.command();
    command.args(&passed.arguments);
    if tool == Tool::Bench && passed.arguments.first().is_some_and(|first| first == "router") {
        // What is measured is the program itself, as it is delivered.
        let built =
            cargo().args(["build", "--quiet", "--release", "--locked", "--package", "greenlight"]).status();
        if !built.map_err(Error::system("start cargo build"))?.success() {
            return Ok(ExitCode::from(FAILED));
        }
        command.arg("--greenlight").arg(target_directory()?.join("release/greenlight"));
    }
    let status = command.status().map_err(Error::system("start cargo run"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(FAILED)))
}
