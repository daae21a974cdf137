//! `cargo xtask deny`: the check by cargo-deny itself. It compiles for minutes where it is missing, so the test
//! run checks the same rules in `dependencies` without it.

use std::process::{Command, ExitCode};

use crate::{Error, FAILED, cargo, workspace_root};

pub(crate) fn run() -> Result<ExitCode, Error> {
    let tools = workspace_root().join("target/tools");
    let own = tools.join("bin/cargo-deny");
    let on_path =
        Command::new("cargo-deny").arg("--version").output().is_ok_and(|output| output.status.success());
    let program = if on_path { "cargo-deny".into() } else { own };
    if !on_path && !program.exists() {
        println!("installing cargo-deny into {}, once: some minutes", tools.display());
        let status = cargo()
            .args(["install", "--locked", "--root"])
            .arg(&tools)
            .arg("cargo-deny")
            .status()
            .map_err(Error::system("start cargo install"))?;
        if !status.success() {
            return Ok(ExitCode::from(FAILED));
        }
    }
    let status = Command::new(&program)
        .args(["check", "bans", "licenses", "sources"])
        .current_dir(workspace_root())
        .status()
        .map_err(Error::system(format!("start {}", program.display())))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}
