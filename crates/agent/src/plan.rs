//! How one process is run: every name resolved, every placeholder filled, before anything is touched.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use greenlight_model::fleet::{Health, Process};
use greenlight_model::host::{InstanceSpec, ReleaseMark};
use greenlight_model::id::{ProcessName, ReleaseId, ServiceName};
use serde::{Deserialize, Serialize};

use crate::account::{self, Account};
use crate::command;
use crate::environment;
use crate::failure::{OrHost as _, Outcome, host, release, with_sources};
use crate::files;
use crate::layout::Layout;

/// How one process of one release is run. No value of a secret is in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) service: ServiceName,
    pub(crate) process: ProcessName,
    pub(crate) release: ReleaseId,
    /// An absolute program, and its arguments.
    pub(crate) argv: Vec<String>,
    /// The release's own directory, not the link to it: the process stays where it was started.
    pub(crate) directory: PathBuf,
    /// Variables, the release's own among them; secrets are apart.
    pub(crate) variables: BTreeMap<String, String>,
    /// A file with more variables that only its owner may read.
    pub(crate) secrets: Option<PathBuf>,
    /// The account it runs under, where it is not the agent's own.
    pub(crate) account: Option<Account>,
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
    pub(crate) port: Option<u16>,
    pub(crate) health: Option<Health>,
    pub(crate) start_timeout: Duration,
    pub(crate) stop_timeout: Duration,
    pub(crate) stop_argv: Option<Vec<String>>,
}

/// Where a process is started: its port, and where its output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) port: Option<u16>,
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
}

impl Plan {
    /// The plan for a process as the fleet states it.
    pub(crate) fn resolve(
        layout: &Layout,
        spec: &InstanceSpec,
        mark: &ReleaseMark,
        process: &Process,
    ) -> Outcome<Self> {
        let place = Place {
            port: process.port,
            stdout: layout.under_root(&process.stdout),
            stderr: layout.under_root(&process.stderr),
        };
        Self::resolve_at(layout, spec, mark, process, place)
    }

    /// The same at another place (a smoke start).
    pub(crate) fn resolve_at(
        layout: &Layout,
        spec: &InstanceSpec,
        mark: &ReleaseMark,
        process: &Process,
        place: Place,
    ) -> Outcome<Self> {
        let profile = match spec.profiles.get(&process.name) {
            None => None,
            Some(name) => Some(process.profiles.get(name).ok_or_else(|| {
                host(format!(
                    "process {} is to run under the profile {name}, which it does not have",
                    process.name
                ))
            })?),
        };
        let mut variables = base_variables(spec, mark);
        variables.insert("GREENLIGHT_PROCESS".to_owned(), process.name.to_string());
        if let Some(port) = place.port {
            variables.insert("PORT".to_owned(), port.to_string());
        }
        let profile_variables = profile.iter().flat_map(|profile| &profile.variables);
        for (name, value) in process.variables.iter().chain(profile_variables) {
            variables.insert(name.as_str().to_owned(), value.clone());
        }
        environment::check(variables.iter().map(|(name, value)| (name.as_str(), value.as_str())))
            .map_err(|error| host(format!("process {}: {error}", process.name)))?;

        let directory = layout.release(mark.id);
        let stated = profile.and_then(|profile| profile.argv.as_ref()).unwrap_or(&process.argv);
        let path = variables.get("PATH").map_or(command::PATH, String::as_str);
        let resolve = |stated: &[String]| -> Outcome<Vec<String>> {
            let mut argv = fill_port(&process.name, stated, place.port)?;
            let program =
                argv.first().ok_or_else(|| host(format!("process {} has no program", process.name)))?;
            argv[0] = find_program(program, &directory, path)
                .ok_or_else(|| {
                    release(format!(
                        "process {}: the program `{program}` is neither in the release nor in {path}",
                        process.name
                    ))
                })?
                .to_str()
                .ok_or_else(|| {
                    host(format!("process {}: the path of its program is not UTF-8", process.name))
                })?
                .to_owned();
            Ok(argv)
        };
        let secrets = layout.secrets(mark.id);
        Ok(Self {
            service: spec.service.clone(),
            process: process.name.clone(),
            release: mark.id,
            argv: resolve(stated)?,
            stop_argv: process.stop_argv.as_deref().map(resolve).transpose()?,
            directory,
            variables,
            secrets: (!spec.secrets.is_empty()).then_some(secrets),
            account: account_of(process)?,
            stdout: place.stdout,
            stderr: place.stderr,
            port: place.port,
            health: process.health.clone(),
            start_timeout: process.start_timeout,
            stop_timeout: process.stop_timeout,
        })
    }

    /// The whole environment, secrets included. For starting a program; never for showing.
    pub(crate) fn environment(&self) -> Outcome<BTreeMap<String, String>> {
        let mut all = BTreeMap::new();
        let account = match &self.account {
            Some(account) => account.clone(),
            None => Account::own()?,
        };
        for name in ["USER", "LOGNAME"] {
            all.insert(name.to_owned(), account.name.clone());
        }
        all.insert("HOME".to_owned(), account.home);
        all.extend(self.variables.clone());
        all.extend(self.secret_variables()?);
        Ok(all)
    }

    /// The secrets' variables.
    pub(crate) fn secret_variables(&self) -> Outcome<BTreeMap<String, String>> {
        let Some(path) = &self.secrets else { return Ok(BTreeMap::new()) };
        environment::read(path).map_err(|error| {
            host(format!(
                "process {}: cannot read its secrets from {}: {}. Stage the release again",
                self.process,
                path.display(),
                with_sources(&error)
            ))
        })
    }

    /// Creates the two log files and their directories where they are missing, readable for the owner's group only.
    pub(crate) fn create_logs(&self) -> Outcome<()> {
        for path in [&self.stdout, &self.stderr] {
            self.open_log(path)?;
        }
        Ok(())
    }

    /// Opens one of the two log files for appending.
    pub(crate) fn open_log(&self, path: &Path) -> Outcome<std::fs::File> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let doing = || format!("open the log {} of process {}", path.display(), self.process);
        if let Some(parent) = path.parent() {
            files::create_directory(parent, 0o755).or_host(doing)?;
        }
        let is_new = !path.exists();
        let file =
            std::fs::OpenOptions::new().append(true).create(true).mode(0o640).open(path).or_host(doing)?;
        if let (true, Some(account)) = (is_new, &self.account) {
            std::os::unix::fs::fchown(&file, Some(account.uid), Some(account.gid)).or_host(doing)?;
        }
        Ok(file)
    }
}

/// Variables that everything of a release is run with: its processes, its prepare steps, its migration.
pub(crate) fn base_variables(spec: &InstanceSpec, mark: &ReleaseMark) -> BTreeMap<String, String> {
    [
        ("GREENLIGHT_RELEASE", mark.id.to_string()),
        ("GREENLIGHT_ENVIRONMENT", spec.environment.to_string()),
        ("GREENLIGHT_SERVICE", spec.service.to_string()),
        ("PATH", command::PATH.to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The account that a process runs under, where it is not the agent's own.
pub(crate) fn account_of(process: &Process) -> Outcome<Option<Account>> {
    let Some(name) = &process.user else { return Ok(None) };
    let account = Account::named(name.as_str())?.ok_or_else(|| {
        host(format!("process {} is to run as {name}, an account that the host does not have", process.name))
    })?;
    let own = Account::own()?;
    if account.uid == own.uid {
        return Ok(None);
    }
    if !account::is_root() {
        return Err(host(format!(
            "process {} is to run as {name}, and the agent, which works as {}, may not start it so: let the agent be root \
             (`sudo`), or connect as {name}",
            process.name, own.name
        )));
    }
    Ok(Some(account))
}

/// A program as it is started: in the release where it is there, else as stated, else from the search path.
pub(crate) fn find_program(program: &str, directory: &Path, path: &str) -> Option<PathBuf> {
    let in_release = directory.join(program);
    if in_release.is_file() {
        return Some(in_release);
    }
    if program.contains('/') {
        return None;
    }
    path.split(':')
        .filter(|place| place.starts_with('/'))
        .map(|place| Path::new(place).join(program))
        .find(|p| is_executable(p))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

fn fill_port(process: &ProcessName, argv: &[String], port: Option<u16>) -> Outcome<Vec<String>> {
    argv.iter()
        .map(|argument| match port {
            _ if argument.contains('\0') => {
                Err(host(format!("process {process}: an argument has a NUL byte")))
            }
            Some(port) => Ok(argument.replace("{port}", &port.to_string())),
            None if argument.contains("{port}") => Err(host(format!(
                "process {process}: `{argument}` stands for a port, and the process has none"
            ))),
            None => Ok(argument.clone()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use std::fs;

    #[test]
    fn a_process_is_resolved_or_refused() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let mark = fixture::mark(1, "v1");
        let release_directory = layout.release(mark.id);
        fs::create_dir_all(release_directory.join("bin")).unwrap();
        fs::write(release_directory.join("bin/app"), "").unwrap();

        let mut process = fixture::process("web", &["bin/app", "--listen", "0.0.0.0:{port}"]);
        process.port = Some(7071);
        process.variables.insert("MODE".parse().unwrap(), "normal".to_owned());
        let profile = greenlight_model::fleet::Profile {
            variables: [("MODE".parse().unwrap(), "debug".to_owned())].into(),
            argv: Some(vec!["sh".to_owned(), "-x".to_owned()]),
        };
        process.profiles.insert("debug".parse().unwrap(), profile);
        let mut spec = fixture::spec(root.path().to_str().unwrap(), [process.clone()]);

        let plan = Plan::resolve(&layout, &spec, &mark, &process).unwrap();
        assert_eq!(plan.argv[0], release_directory.join("bin/app").to_str().unwrap());
        assert_eq!(plan.argv[2], "0.0.0.0:7071");
        assert_eq!(plan.directory, release_directory);
        for (name, value) in [
            ("PORT", "7071"),
            ("GREENLIGHT_ENVIRONMENT", "test"),
            ("GREENLIGHT_SERVICE", "web"),
            ("MODE", "normal"),
        ] {
            assert_eq!(plan.variables[name], value);
        }
        assert_eq!(plan.variables["GREENLIGHT_RELEASE"], mark.id.to_string());

        spec.profiles.insert("web".parse().unwrap(), "debug".parse().unwrap());
        let plan = Plan::resolve(&layout, &spec, &mark, &process).unwrap();
        assert!(plan.argv[0].starts_with('/') && plan.argv[0].ends_with("/sh"), "{:?}", plan.argv);
        assert_eq!(plan.variables["MODE"], "debug");

        for (argv, why) in [
            (vec!["bin/none"], "neither in the release"),
            (vec!["no-such-program"], "neither in"),
            (vec![], "no program"),
        ] {
            let process = fixture::process("other", &argv);
            let error = Plan::resolve(&layout, &spec, &mark, &process).unwrap_err();
            assert!(error.message.contains(why), "{error}");
        }
        let portless = fixture::process("other", &["sh", "{port}"]);
        assert!(
            Plan::resolve(&layout, &spec, &mark, &portless)
                .unwrap_err()
                .message
                .contains("stands for a port")
        );
    }

    #[test]
    fn logs_are_two_private_files() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let process = fixture::process("web", &["sh"]);
        let spec = fixture::spec("", [process.clone()]);
        let plan = Plan::resolve(&layout, &spec, &fixture::mark(1, "v1"), &process).unwrap();
        plan.create_logs().unwrap();
        for name in ["web.stdout", "web.stderr"] {
            let mode = fs::metadata(root.path().join("logs").join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o640, "{name}");
        }
    }
}
