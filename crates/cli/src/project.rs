//! The project that a command works on: its fleet file, its depot and its record log.

use std::collections::{BTreeMap, BTreeSet};
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
        let tags = self
            .fleet
            .environments
            .values()
            .filter_map(|environment| environment.tag.as_ref()?.moving.clone());
        depot
            .map(|depot| Arc::new(depot.with_moving_tags(tags.collect())))
            .map_err(|error| Failure::from_error(Exit::Failed, &error))
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

    /// The secrets that a preflight asks outside services with. One that cannot be had is told, and its check fails.
    pub(crate) fn secrets_to_reach(
        &self,
        environment: &Environment,
        printer: &Printer,
    ) -> BTreeMap<VariableName, SecretValue> {
        let services = environment.hosts.keys().filter_map(|service| self.fleet.services.get(service));
        let names: BTreeSet<VariableName> = services.flat_map(|service| service.requires.secrets()).collect();
        let mut values = BTreeMap::new();
        for name in names {
            let one = BTreeSet::from([name]);
            match greenlight_controller::resolve_secrets(&self.fleet, &one, &self.directory) {
                Ok(value) => values.extend(value),
                Err(error) => printer.warning(Failure::from_error(Exit::Failed, &error).message),
            }
        }
        values
    }

    fn secrets(
        &self,
        environment: &Environment,
    ) -> Result<BTreeMap<VariableName, SecretValue>, greenlight_controller::SecretError> {
        let names = environment
            .hosts
            .keys()
            .filter_map(|service| self.fleet.services.get(service))
            .flat_map(|service| service.secrets.iter().cloned().chain(service.requires.secrets()))
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

    /// The hosts.
    pub(crate) fn hosts(&self) -> &Arc<Hosts> {
        &self.hosts
    }

    /// What asks the hosts and balancers.
    pub(crate) fn gatherer(&self, log: &Log) -> Arc<Gatherer> {
        let services = &self.project.fleet.services;
        Arc::new(Gatherer::new(self.environment, services, log.history(), Arc::clone(&self.hosts)))
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

/// Who works here: `user@machine`, for records and roles.
///
/// The kernel says who it is, not the environment, which anybody can set: the account that somebody logged in with, which
/// stays the same through `sudo` and `su` (`/proc/self/loginuid`); where nobody logged in (a service, a container), the account
/// that this runs under, and for root the one that called `sudo`. Whoever may write to the project's records can still write
/// anything there: on one machine that is what their permissions are for.
fn who() -> String {
    let machine = rustix::system::uname();
    let user = person_of_a_test().unwrap_or_else(|| {
        let login = std::fs::read_to_string("/proc/self/loginuid").ok();
        let own = rustix::process::getuid().as_raw();
        let uid = person(login.as_deref(), own, std::env::var("SUDO_UID").ok().as_deref());
        account_name(uid)
    });
    format!("{user}@{}", machine.nodename().to_string_lossy())
}

/// In a build for tests, several people can work under one account.
fn person_of_a_test() -> Option<String> {
    if cfg!(debug_assertions) { std::env::var("GREENLIGHT_TEST_PERSON").ok() } else { None }
}

/// The number of the account that stands for the person: `login` as the kernel shows it, `own` that of this process, `sudo` what
/// `sudo` leaves behind, which only root could have made up.
fn person(login: Option<&str>, own: u32, sudo: Option<&str>) -> u32 {
    // Nobody logged in: what began this is no session.
    const UNSET: u32 = u32::MAX;
    let login = login.and_then(|text| text.trim().parse().ok()).filter(|uid| *uid != UNSET);
    let caller = || sudo.filter(|_| own == 0)?.parse().ok();
    // Somebody who logged in as root and is no more to be told from others is root.
    login.or_else(caller).unwrap_or(own)
}

/// The name of an account, also of one that a directory service knows.
fn account_name(uid: u32) -> String {
    let accounts = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    if let Some(name) = account(&accounts, uid) {
        return name.to_owned();
    }
    // A machine without `getent` has no directory service either.
    let asked = std::process::Command::new("getent").args(["passwd", &uid.to_string()]).output();
    let printed =
        asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    account(&printed, uid).map_or_else(|| format!("uid{uid}"), str::to_owned)
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
    use super::{account, person};

    #[test]
    fn an_account_is_found_by_its_number() {
        let accounts = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:7:7::/:\ndeploy:x:1000:1000:,,,:/home/deploy:/bin/bash\n";
        for (uid, name) in [(0, Some("root")), (1000, Some("deploy")), (7, None), (100, None)] {
            assert_eq!(account(accounts, uid), name, "{uid}");
        }
    }

    #[test]
    fn a_person_is_who_logged_in_whatever_the_account() {
        for (login, own, sudo, uid) in [
            (Some("1001\n"), 1001, None, 1001),
            (Some("1001\n"), 0, Some("1001"), 1001),
            // A shared account, and one that would like to be somebody else.
            (Some("1001\n"), 1500, Some("1002"), 1001),
            (Some("4294967295"), 1500, Some("1002"), 1500),
            (Some("4294967295"), 0, Some("1002"), 1002),
            (None, 0, Some("x"), 0),
            (None, 1001, None, 1001),
            (Some("0"), 0, Some("1002"), 0),
        ] {
            assert_eq!(person(login, own, sudo), uid, "{login:?} {own} {sudo:?}");
        }
    }
}
