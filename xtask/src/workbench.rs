//! The commands that measure: they are a program of their own, built in release with only the crates that the command
//! needs, which gets its arguments as they are.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;

use crate::{Error, FAILED, cargo};

/// What is passed on.
#[derive(Debug, Args)]
pub(crate) struct Passed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds the workbench and runs one of its commands.
pub(crate) fn run(command: &str, passed: &Passed) -> Result<ExitCode, Error> {
    let status = cargo()
        .args(["run", "--quiet", "--release", "--locked", "--package", "greenlight-workbench"])
        .args(["--no-default-features", "--", command])
        .args(&passed.arguments)
        .status()
        .map_err(Error::system("start cargo run"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(FAILED)))
}
