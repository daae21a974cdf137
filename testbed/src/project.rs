//! A project to deploy: a git repository in a temporary directory, and the application of the tests.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::command::run;
use crate::host::write_file;
use crate::{Bed, Error};

/// The source of the test application, one Python file without dependencies. What it serves, and the files
/// by which a release of it can be made to fail, stand at its head.
pub const APPLICATION: &str = include_str!("../apps/app.py");

/// The program under test: `GREENLIGHT_BIN`, which `cargo xtask test` sets to what it has built.
pub fn greenlight_binary() -> Result<PathBuf, Error> {
    let path = std::env::var_os("GREENLIGHT_BIN").map(PathBuf::from).filter(|path| path.is_file());
    path.ok_or_else(|| Error::Machine {
        reason: "GREENLIGHT_BIN does not name the greenlight program; cargo xtask test --only bed builds it and sets it"
            .into(),
    })
}

/// A git repository that ends with this value.
#[derive(Debug)]
pub struct Project {
    directory: TempDir,
}

impl Project {
    /// An empty repository on branch main.
    pub fn new() -> Result<Self, Error> {
        let directory = TempDir::with_prefix("greenlight-project-")
            .map_err(Error::io("create a directory in", std::env::temp_dir()))?;
        let project = Self { directory };
        project.git(&["init", "--quiet", "--initial-branch=main"])?;
        Ok(project)
    }

    /// A repository with the test application at a version, committed.
    pub fn with_application(version: &str) -> Result<Self, Error> {
        let project = Self::new()?;
        project.write("app.py", APPLICATION)?;
        project.write("VERSION", version)?;
        project.commit(version)?;
        Ok(project)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a file, with its directories.
    pub fn write(&self, name: &str, content: &str) -> Result<(), Error> {
        self.write_with_mode(name, 0o644, content)
    }

    /// Writes a file that can be executed.
    pub fn write_executable(&self, name: &str, content: &str) -> Result<(), Error> {
        self.write_with_mode(name, 0o755, content)
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path().join(name);
        fs::remove_file(&path).map_err(Error::io("remove", &path))
    }

    /// Commits all there is and returns the commit.
    pub fn commit(&self, message: &str) -> Result<String, Error> {
        self.git(&["add", "--all"])?;
        self.git(&["commit", "--quiet", "--allow-empty", "--message", message])?;
        Ok(self.git(&["rev-parse", "HEAD"])?.trim().to_owned())
    }

    /// Runs git in the project, without the developer's own settings.
    pub fn git(&self, arguments: &[&str]) -> Result<String, Error> {
        let mut command = Command::new("git");
        for (name, value) in [
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_CONFIG_SYSTEM", "/dev/null"),
            ("GIT_AUTHOR_NAME", "Tester"),
            ("GIT_AUTHOR_EMAIL", "tester@bed.invalid"),
            ("GIT_COMMITTER_NAME", "Tester"),
            ("GIT_COMMITTER_EMAIL", "tester@bed.invalid"),
        ] {
            command.env(name, value);
        }
        run(command.args(arguments).current_dir(self.path()))
    }

    /// `greenlight` as an operator would start it on the controller of a bed, in this project.
    pub fn greenlight(&self, bed: &Bed, arguments: &[&str]) -> Result<Command, Error> {
        let program: OsString = greenlight_binary()?.into();
        let mut command = bed.hub_command(program);
        command.args(arguments).current_dir(self.path());
        Ok(command)
    }

    fn write_with_mode(&self, name: &str, mode: u32, content: &str) -> Result<(), Error> {
        let path = self.path().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        write_file(&path, mode, content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_a_repository_with_commits() {
        let project = Project::with_application("v1").unwrap();
        let first = project.git(&["rev-parse", "HEAD"]).unwrap();
        project.write("VERSION", "v2").unwrap();
        let second = project.commit("v2").unwrap();
        assert_eq!(project.git(&["rev-parse", "HEAD~1"]).unwrap(), first);
        assert_eq!(project.git(&["show", &format!("{second}:VERSION")]).unwrap(), "v2");
    }
}
