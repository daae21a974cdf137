//! The project that a command works on: its fleet file, its depot and its record log.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use greenlight_config::Parsed;
use greenlight_controller::{Artifacts, Gathered, Gatherer, Hosts};
use greenlight_depot::Depot;
use greenlight_link::message::SecretValue;
use greenlight_model::fleet::{Environment, Fleet};

use greenlight_model::id::{EnvironmentName, VariableName};
use greenlight_store::Log;
use tokio::runtime::Runtime;

use crate::args::Global;
use crate::failure::{Exit, Failure, Mistakes};
use crate::printer::Printer;

/// The name of the fleet file.
pub(crate) const FLEET_FILE: &str = "greenlight.toml";
/// A fleet file beyond this is a mistake.
const FLEET_FILE_BYTES_MAX: u64 = 4 << 20;

/// A project with a fleet file that has no mistakes.
pub(crate) struct Project {
    pub(crate) directory: PathBuf,
    pub(crate) fleet: Fleet,
    /// `user@machine`, for the records.
    pub(crate) by: String,
    ssh_config: Option<PathBuf>,
}

impl Project {
    /// Finds and reads the fleet file.
    pub(crate) fn open(global: &Global, printer: &Printer) -> Result<Self, Failure> {
        let path = find(global.file.as_deref())?;
        let (name, text) = read(&path)?;
        let Parsed { fleet, warnings } = greenlight_config::parse(&text).map_err(|problems| {
            let count = problems.len();
            let mistakes = if count == 1 { "one mistake" } else { "mistakes" };
            let what = if count == 1 { mistakes.to_owned() } else { format!("{count} {mistakes}") };
            Failure {
                mistakes: Some(Box::new(Mistakes { name: name.clone(), text: text.clone(), problems })),
                ..Failure::usage(format!("{name} has {what}; nothing was done"))
            }
        })?;
        for warning in warnings {
            let (line, _) = greenlight_config::line_column(&text, warning.span.start);
            printer.warning(format!("{name}:{line}: {}", warning.message));
        }
        let directory = path.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf);
        Ok(Self { directory, fleet, by: who(), ssh_config: global.ssh_config.clone() })
    }

    /// The environment of this name, or what there is instead.
    pub(crate) fn environment(&self, name: &EnvironmentName) -> Result<&Environment, Failure> {
        self.fleet.environments.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.fleet.environments.keys().map(EnvironmentName::as_str).collect();
            Failure::usage(format!("there is no environment `{name}`"))
                .help(format!("{FLEET_FILE} has {}", known.join(", ")))
        })
    }

    /// The named environments, or all.
    pub(crate) fn environments(&self, name: Option<&EnvironmentName>) -> Result<Vec<&Environment>, Failure> {
        match name {
            Some(name) => Ok(vec![self.environment(name)?]),
            None => Ok(self.fleet.environments.values().collect()),
        }
    }

    /// Where the project keeps what is not in the repository.
    pub(crate) fn state_directory(&self) -> Result<PathBuf, Failure> {
        let directory = self.directory.join(".greenlight");
        DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(|error| {
            Failure::new(Exit::Failed, format!("cannot make {}: {error}", directory.display()))
        })?;
        Ok(directory)
    }

    pub(crate) fn evidence_directory(&self) -> Result<PathBuf, Failure> {
        Ok(self.state_directory()?.join("evidence"))
    }

    pub(crate) fn depot(&self) -> Result<Arc<Depot>, Failure> {
        let depot = Depot::open(&self.state_directory()?.join("depot"));
        depot.map(Arc::new).map_err(|error| Failure::from_error(Exit::Failed, &error))
    }

    pub(crate) fn log(&self) -> Result<Log, Failure> {
        let path = self.state_directory()?.join("records.sqlite");
        Log::open(&path).map_err(|error| Failure::from_error(Exit::Failed, &error))
    }

    /// The environment's hosts, not connected yet.
    pub(crate) fn hosts(&self, environment: &Environment) -> Result<Arc<Hosts>, Failure> {
        let program = std::env::current_exe().map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("cannot find this program's own file, which is sent to hosts: {error}"),
            )
        })?;
        Ok(Hosts::new(environment, program, self.ssh_config.clone()))
    }

    /// Asks every host and balancer of an environment.
    pub(crate) async fn gather(
        &self,
        environment: &Environment,
        log: &Log,
    ) -> Result<(Arc<Gatherer>, Gathered), Failure> {
        Ok(self.gather_over(self.hosts(environment)?, environment, log).await)
    }

    async fn gather_over(
        &self,
        hosts: Arc<Hosts>,
        environment: &Environment,
        log: &Log,
    ) -> (Arc<Gatherer>, Gathered) {
        let gatherer = Arc::new(Gatherer::new(environment, &self.fleet.services, log.history(), hosts));
        let gathered = gatherer.gather().await;
        (gatherer, gathered)
    }

    /// The releases and the secrets that an environment's services need.
    pub(crate) fn artifacts(&self, environment: &Environment) -> Result<Artifacts, Failure> {
        let secrets = self.secrets(environment).map_err(|error| Failure::from_error(Exit::Usage, &error))?;
        Ok(Artifacts { depot: self.depot()?, secrets, evidence_directory: self.evidence_directory()? })
    }

    /// The same for going back, which secrets that cannot be had now do not stop: a release that is on its hosts has
    /// them there. A host that lacks the release, and so would need them, says so when it is staged.
    pub(crate) fn artifacts_for_the_way_back(
        &self,
        environment: &Environment,
        printer: &Printer,
    ) -> Result<Artifacts, Failure> {
        let secrets = self.secrets(environment).unwrap_or_else(|error| {
            let why = Failure::from_error(Exit::Usage, &error).message;
            printer.warning(format!("going back with the secrets that are on the hosts: {why}"));
            BTreeMap::new()
        });
        Ok(Artifacts { depot: self.depot()?, secrets, evidence_directory: self.evidence_directory()? })
    }

    fn secrets(
        &self,
        environment: &Environment,
    ) -> Result<BTreeMap<VariableName, SecretValue>, greenlight_controller::SecretError> {
        let names = environment
            .hosts
            .keys()
            .filter_map(|service| self.fleet.services.get(service))
            .flat_map(|service| service.secrets.iter().cloned())
            .collect();
        greenlight_controller::resolve_secrets(&self.fleet, &names, &self.directory)
    }
}

/// An environment whose hosts a command talks to more than once: each is connected when it is first needed, and stays so
/// until this is gone.
pub(crate) struct Connected<'a> {
    pub(crate) project: &'a Project,
    pub(crate) environment: &'a Environment,
    hosts: Arc<Hosts>,
    runtime: Runtime,
}

impl<'a> Connected<'a> {
    /// Nothing is connected yet.
    pub(crate) fn new(project: &'a Project, environment: &'a Environment) -> Result<Self, Failure> {
        Ok(Self { project, environment, hosts: project.hosts(environment)?, runtime: runtime()? })
    }

    /// Asks every host and balancer.
    pub(crate) async fn gather(&self, log: &Log) -> (Arc<Gatherer>, Gathered) {
        self.project.gather_over(Arc::clone(&self.hosts), self.environment, log).await
    }

    /// Runs what talks to the hosts to its end.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Lets go of the hosts at once, whatever is under way on a connection.
    pub(crate) fn end(self) {
        self.runtime.shutdown_background();
    }
}

/// The fleet file: the one named, else the nearest above here.
pub(crate) fn find(named: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return Ok(if path.is_dir() { path.join(FLEET_FILE) } else { path.to_owned() });
    }
    let here = std::env::current_dir()
        .map_err(|error| Failure::usage(format!("cannot read the current directory: {error}")))?;
    here.ancestors().map(|directory| directory.join(FLEET_FILE)).find(|path| path.is_file()).ok_or_else(
        || {
            Failure::usage(format!("no {FLEET_FILE} in {} or above", here.display()))
                .help("`greenlight init` writes one for this project; `greenlight demo` shows what it is for")
        },
    )
}

/// The file's name as people see it, and its text.
pub(crate) fn read(path: &Path) -> Result<(String, String), Failure> {
    let name = path
        .file_name()
        .map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    let cannot = |why: String| Failure::usage(format!("cannot read {}: {why}", path.display()));
    let length = std::fs::metadata(path).map_err(|error| cannot(error.to_string()))?.len();
    if length > FLEET_FILE_BYTES_MAX {
        return Err(cannot(format!("it has {length} bytes, more than {FLEET_FILE_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| cannot(error.to_string()))?;
    Ok((name, text))
}

/// Who works here: `user@machine`.
fn who() -> String {
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| {
        // Without a login (cron, CI) there is still an account.
        let uid = rustix::process::getuid().as_raw();
        let accounts = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        account(&accounts, uid).map_or_else(|| format!("uid{uid}"), str::to_owned)
    });
    let machine = rustix::system::uname();
    format!("{user}@{}", machine.nodename().to_string_lossy())
}

/// The name of an account in a file like `/etc/passwd`, when it is in there.
fn account(accounts: &str, uid: u32) -> Option<&str> {
    let uid = uid.to_string();
    accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        (fields.nth(1)? == uid).then_some(name)
    })
}

/// The runtime that commands talk to hosts on.
pub(crate) fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot start: {error}")))
}

#[cfg(test)]
mod tests {
    use super::account;

    #[test]
    fn an_account_is_found_by_its_number() {
        let accounts = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:7:7::/:\ndeploy:x:1000:1000:,,,:/home/deploy:/bin/bash\n";
        for (uid, name) in [(0, Some("root")), (1000, Some("deploy")), (7, None), (100, None)] {
            assert_eq!(account(accounts, uid), name, "{uid}");
        }
    }
}
