//! The fleet: all services and environments, as `greenlight.toml` states them, resolved and complete.
//!
//! Guarantees: every host, service and process named inside exists; defaults are filled in. `config` is the one place
//! that makes a `Fleet` from text; what breaks a rule never becomes one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::canary::Canary;
use crate::gate::{Gates, Roles};
use crate::id::{
    EnvironmentName, HostName, Instance, ProcessName, ProfileName, ServiceName, UserName, VariableName,
};
use crate::migration::MigrationPhase;
use crate::quantity::{Percent, duration_ms};
use crate::requirements::Requirements;

/// All services and environments.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fleet {
    /// What is released.
    pub services: BTreeMap<ServiceName, Service>,
    /// Where it runs.
    pub environments: BTreeMap<EnvironmentName, Environment>,
    /// Where secret values come from.
    pub secrets: BTreeMap<VariableName, SecretSource>,
    /// Who holds which role.
    #[serde(default)]
    pub roles: Roles,
}

/// Where the value of a secret comes from. The value itself is never part of a fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretSource {
    /// A line `NAME=value` in an age-encrypted file of the repository.
    Age {
        /// The file, relative to the fleet file.
        file: String,
        /// The identity file that opens it; `~` is the home directory.
        identity: String,
    },
    /// What a command prints on its standard output, less one trailing newline.
    Command {
        /// Program and arguments; no shell.
        argv: Vec<String>,
    },
}

/// What is released: code or configuration, with its processes, checks and migrations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// Where its tree comes from.
    pub source: Source,
    /// Build steps, each a script for `sh -e`, run in a clean checkout.
    pub build: Vec<String>,
    /// Globs of what belongs to the release; empty means everything.
    pub include: Vec<String>,
    /// Globs of what does not.
    pub exclude: Vec<String>,
    /// Files and directories that outlive releases, relative to the release; a trailing `/` marks a directory.
    pub shared: Vec<String>,
    /// Steps on each host after the bytes are there and before anything is switched (dependencies), each a script for
    /// `sh -e` run in the release's directory.
    pub prepare: Vec<String>,
    /// What a host must have.
    pub requires: Requirements,
    /// What changes the database; once per rollout.
    pub migrate: Option<Migration>,
    /// What runs.
    pub processes: BTreeMap<ProcessName, Process>,
    /// Secrets that its processes read, by variable.
    pub secrets: BTreeSet<VariableName>,
    /// How many releases a host keeps, besides those that an environment could go back to.
    pub keep_releases: u32,
}

/// A git repository and a place in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Path (relative to the fleet file) or address of the repository.
    pub git: String,
    /// The branch that is built when no commit is named.
    pub branch: Option<String>,
    /// The directory inside the repository that is the service; the whole repository when absent.
    pub directory: Option<String>,
}

/// The step that changes a database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// Program and arguments, run in the new release's directory on one host before the first activation.
    pub argv: Vec<String>,
    /// How long it may take.
    #[serde(with = "duration_ms")]
    pub timeout: Duration,
    /// Program and arguments of what takes away what older code needs: run when every instance runs the release.
    #[serde(default)]
    pub contract: Option<Vec<String>>,
    /// Program and arguments that show what `argv` would do and change nothing; when it fails, `argv` is not run.
    #[serde(default)]
    pub dry_run: Option<Vec<String>>,
    /// Program and arguments that keep a copy of the database; run before a part that takes something away.
    #[serde(default)]
    pub backup: Option<Vec<String>>,
    /// Patterns of the release's files that hold what `argv` does; from these is read what it takes away.
    #[serde(default)]
    pub files: Vec<String>,
    /// The same of `contract`.
    #[serde(default)]
    pub contract_files: Vec<String>,
    /// The variable with the address of the PostgreSQL database on which an advisory lock is held meanwhile.
    #[serde(default)]
    pub lock: Option<VariableName>,
    /// How long a statement waits for a lock of the database; given to PostgreSQL's clients.
    #[serde(with = "duration_ms", default = "lock_timeout")]
    pub lock_timeout: Duration,
    /// How long one statement may take; given to PostgreSQL's clients.
    #[serde(with = "duration_ms", default = "statement_timeout")]
    pub statement_timeout: Duration,
}

/// A migration that waits longer for a lock makes everybody behind it wait as well.
fn lock_timeout() -> Duration {
    Migration::LOCK_TIMEOUT
}

fn statement_timeout() -> Duration {
    Migration::STATEMENT_TIMEOUT
}

impl Migration {
    /// How long a statement waits for a lock where nothing is stated: all who come after it wait as long.
    pub const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
    /// How long a statement may take where nothing is stated.
    pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(300);

    /// A migration of which nothing else is known.
    #[must_use]
    pub fn new(argv: Vec<String>, timeout: Duration) -> Self {
        Self {
            argv,
            timeout,
            contract: None,
            dry_run: None,
            backup: None,
            files: Vec::new(),
            contract_files: Vec::new(),
            lock: None,
            lock_timeout: Self::LOCK_TIMEOUT,
            statement_timeout: Self::STATEMENT_TIMEOUT,
        }
    }

    /// What runs in this part, if there is something.
    #[must_use]
    pub fn command(&self, phase: MigrationPhase) -> Option<&[String]> {
        match phase {
            MigrationPhase::Expand => Some(&self.argv),
            MigrationPhase::Contract => self.contract.as_deref(),
        }
    }

    /// The patterns of the files that hold what this part does.
    #[must_use]
    pub fn files(&self, phase: MigrationPhase) -> &[String] {
        match phase {
            MigrationPhase::Expand => &self.files,
            MigrationPhase::Contract => &self.contract_files,
        }
    }
}

/// One process of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its name.
    pub name: ProcessName,
    /// Program and arguments, relative to the release's directory. `{port}` stands for the port.
    pub argv: Vec<String>,
    /// The port it listens on, when it does.
    pub port: Option<u16>,
    /// How it proves that it works.
    pub health: Option<Health>,
    /// Variables in its environment.
    pub variables: BTreeMap<VariableName, String>,
    /// Where standard output goes, relative to the service's root.
    pub stdout: String,
    /// Where standard error goes; never the same file.
    pub stderr: String,
    /// Named variations, such as debug.
    pub profiles: BTreeMap<ProfileName, Profile>,
    /// The account it runs under; the link's user when absent.
    pub user: Option<UserName>,
    /// A start on another port, before the live process is touched.
    pub smoke: Option<Smoke>,
    /// How long it may take to answer as the release.
    #[serde(with = "duration_ms")]
    pub start_timeout: Duration,
    /// How long it may take to be gone after being asked to stop; then it is killed.
    #[serde(with = "duration_ms")]
    pub stop_timeout: Duration,
    /// Program and arguments that stop it, instead of SIGTERM. Believed only when the process is gone.
    pub stop_argv: Option<Vec<String>>,
}

/// How a process proves that it works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// A path that answers 2xx when the process is healthy.
    pub http: Option<String>,
    /// A path whose answer contains the release: its id, label or commit, as plain text or anywhere in JSON.
    pub release: Option<String>,
}

/// A named variation of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Variables added to, or put in place of, the process's own.
    pub variables: BTreeMap<VariableName, String>,
    /// Another command.
    pub argv: Option<Vec<String>>,
}

/// A start on another port that never touches the live process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Smoke {
    /// The port for it.
    pub port: u16,
}

/// dev, staging, production …
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Its name.
    pub name: EnvironmentName,
    /// The branch whose pushes go here.
    pub branch: Option<String>,
    /// The hosts of each service, in the order in which they are changed.
    pub hosts: BTreeMap<ServiceName, Vec<HostName>>,
    /// How each host is reached and what differs there. Every host of `hosts` and of `balancers` is in it.
    pub host_settings: BTreeMap<HostName, HostSettings>,
    /// How waves are cut.
    pub strategy: Strategy,
    /// Instances of a service that must keep serving while others change.
    pub floor: Floor,
    /// How many hosts of the whole environment may be left out after failing, before the rollout is given up.
    pub failure_budget: u32,
    /// What happens when the budget is spent.
    pub on_failure: OnFailure,
    /// The environment that must have finished this release before.
    pub after: Option<After>,
    /// What else must be green before anything changes.
    #[serde(default)]
    pub gates: Gates,
    /// Hosts that are changed last and serve only when the others cannot.
    pub standby: BTreeSet<HostName>,
    /// What sends requests to the hosts.
    pub balancers: Vec<Balancer>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// What is tagged in git when a rollout has brought its releases to the whole environment.
    #[serde(default)]
    pub tag: Option<Tagging>,
    /// How often a failed action is tried again before it counts.
    pub retries: u32,
    /// Variables added to every process's environment.
    pub variables: BTreeMap<VariableName, String>,
}

/// Tags in git for what has gone out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tagging {
    /// The tag that moves along, beside `deploy-YYYY-MM-DD`, which stays.
    pub moving: Option<String>,
    /// The remote that both are pushed to; to none when absent.
    pub push: Option<String>,
}

/// How one host is reached and what differs there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSettings {
    /// How the agent on it is reached.
    pub link: LinkKind,
    /// Where balancers and probes from outside find it; the host's name when absent.
    pub address: Option<String>,
    /// The directory under which each service has its own (`/srv`).
    pub root: String,
    /// Ports that differ from the process's own.
    pub ports: BTreeMap<ProcessName, u16>,
    /// What runs the processes.
    pub manager: ManagerKind,
    /// Whether the agent must be root (`sudo -n` when the user is not).
    pub become_root: BecomeRoot,
    /// Who the host must prove to be, before anything changes there.
    #[serde(default)]
    pub identity: HostIdentity,
}

/// What a host says of itself when it is the one that is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostIdentity {
    /// The name it calls itself.
    pub hostname: Option<String>,
    /// Its operating system: the words with which its name in `/etc/os-release` begins (`Debian GNU/Linux 12`).
    pub os: Option<String>,
}

/// How a host is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkKind {
    /// This machine: the agent is a child process.
    Local,
    /// The system's `ssh`, with the user's own configuration.
    Ssh {
        /// What is given to `ssh`; the host's name when absent.
        destination: Option<String>,
        /// The user; ssh's own choice when absent.
        user: Option<UserName>,
    },
}

/// What runs the processes of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ManagerKind {
    /// Whatever the host has: systemd, else supervisord, else the agent's own supervision.
    Auto,
    /// systemd's system manager.
    Systemd,
    /// systemd's manager of the user.
    SystemdUser,
    /// supervisord.
    Supervisord,
    /// The agent's own supervision.
    Agent,
}

/// Whether the agent works as root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BecomeRoot {
    /// When the manager needs it (systemd's system manager, supervisord), by `sudo -n`.
    Auto,
    /// Always, by `sudo -n` unless the user is root.
    Sudo,
    /// Never.
    Never,
}

/// A way to cut waves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Strategy {
    /// Batches one after another; the last size repeats until all hosts are done.
    Rolling {
        /// Sizes of the batches; never empty.
        batch: Vec<BatchSize>,
    },
    /// Two waves: the first half is made ready out of traffic, then traffic moves over at once, then the rest.
    BlueGreen,
    /// Two waves; the second half is kept on the old release as the way back for a while after the first is proven.
    Halves {
        /// For how long the old half is kept.
        #[serde(with = "duration_ms")]
        keep_for: Duration,
    },
    /// A small first wave that takes a stated share of the traffic, step by step, while it is judged; then batches.
    Canary(Canary),
}

/// How many hosts a batch has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchSize {
    /// A number of hosts, at least 1.
    Count(u32),
    /// A share of all hosts, at least one host.
    Share(Percent),
}

/// Capacity that must remain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Floor {
    /// A number of instances.
    Count(u32),
    /// A share of the service's instances, rounded up.
    Share(Percent),
}

impl Floor {
    /// The floor for a service with so many instances.
    #[must_use]
    pub fn of(self, instances: usize) -> usize {
        match self {
            Self::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
            Self::Share(percent) => percent.of_rounded_up(instances),
        }
    }
}

/// What happens when more hosts failed than the budget allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// What this rollout changed goes back.
    TurnBack,
    /// Everything stays as it is until a person decides.
    Hold,
}

/// An earlier environment that must have finished the release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct After {
    /// Which.
    pub environment: EnvironmentName,
    /// For how long it must have run there.
    #[serde(with = "duration_ms")]
    pub soak: Duration,
}

/// What sends requests to the instances of one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balancer {
    /// The service whose instances are behind it.
    pub service: ServiceName,
    /// What kind it is and how it is reached.
    pub kind: BalancerKind,
    /// The backend (HAProxy) whose servers are the hosts.
    pub backend: String,
    /// Server names that differ from the host's name.
    pub servers: BTreeMap<HostName, String>,
}

/// Which balancer, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalancerKind {
    /// HAProxy's runtime API on a socket of a host, through that host's agent.
    HaproxySocket {
        /// The host.
        host: HostName,
        /// The socket's path there.
        path: String,
    },
    /// HAProxy's runtime API over TCP from the controller.
    HaproxyTcp {
        /// `address:port`.
        address: String,
    },
    /// The built-in router's control socket on a host, through that host's agent.
    Router {
        /// The host.
        host: HostName,
        /// The socket's path there.
        path: String,
    },
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// Connecting to a host, agent included.
    #[serde(with = "duration_ms")]
    pub connect: Duration,
    /// How long a claim holds without being renewed.
    #[serde(default = "usual_claim", with = "duration_ms")]
    pub claim: Duration,
    /// Sending a release to a host, its `prepare` steps included.
    #[serde(with = "duration_ms")]
    pub stage: Duration,
    /// Switching and restarting, beyond what the processes' own start and stop timeouts allow.
    #[serde(with = "duration_ms")]
    pub activate: Duration,
    /// Confirming an activation over a fresh connection, beyond the processes' own start and stop timeouts; then the
    /// host's guard goes back.
    #[serde(default = "usual_confirm", with = "duration_ms")]
    pub confirm: Duration,
    /// Waiting for sessions to end; then they are cut.
    #[serde(with = "duration_ms")]
    pub drain: Duration,
    /// Waiting for the balancer to see an admitted instance as up.
    #[serde(with = "duration_ms")]
    pub admit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            claim: usual_claim(),
            stage: Duration::from_secs(900),
            activate: Duration::from_secs(60),
            confirm: usual_confirm(),
            drain: Duration::from_secs(30),
            admit: Duration::from_secs(30),
        }
    }
}

/// Four renewals: three may get lost on a bad line.
fn usual_claim() -> Duration {
    Duration::from_secs(120)
}

/// Long enough for a fresh connection, a look and two answers over a slow line; short enough that a host whose controller died
/// is back before somebody has found the laptop.
fn usual_confirm() -> Duration {
    Duration::from_secs(30)
}

impl Process {
    /// How long it may take to stop it and start it again.
    #[must_use]
    pub fn switching(&self) -> Duration {
        self.stop_timeout + self.start_timeout
    }
}

impl Timeouts {
    /// How long after it was armed the guard of an activation goes back: what stopping and starting these processes may
    /// take, one after the other, and then the confirmation.
    #[must_use]
    pub fn guard<'a>(&self, processes: impl IntoIterator<Item = &'a Process>) -> Duration {
        processes.into_iter().map(Process::switching).sum::<Duration>() + self.confirm
    }
}

impl Environment {
    /// The instances of one service, in the order of the fleet file.
    pub fn instances_of<'a>(&'a self, service: &'a ServiceName) -> impl Iterator<Item = Instance> + 'a {
        self.hosts.get(service).into_iter().flatten().map(|host| Instance::new(host.clone(), service.clone()))
    }

    /// All instances, by service.
    pub fn instances(&self) -> impl Iterator<Item = Instance> + '_ {
        self.hosts.keys().flat_map(|service| self.instances_of(service))
    }

    /// The hosts that run a service, each once, in name order.
    #[must_use]
    pub fn service_hosts(&self) -> BTreeSet<HostName> {
        self.hosts.values().flatten().cloned().collect()
    }
}

impl Balancer {
    /// What its backend calls the instance on `host`.
    #[must_use]
    pub fn server<'a>(&'a self, host: &'a HostName) -> &'a str {
        self.servers.get(host).map_or(host.as_str(), String::as_str)
    }

    /// How people recognise it: `haproxy ol-www1:/run/haproxy/admin.sock web`.
    #[must_use]
    pub fn title(&self) -> String {
        let place = match &self.kind {
            BalancerKind::HaproxySocket { host, path } => format!("haproxy {host}:{path}"),
            BalancerKind::HaproxyTcp { address } => format!("haproxy {address}"),
            BalancerKind::Router { host, path } => format!("router {host}:{path}"),
        };
        format!("{place} {}", self.backend)
    }

    /// The host whose agent reaches it, when one does.
    #[must_use]
    pub fn host(&self) -> Option<&HostName> {
        match &self.kind {
            BalancerKind::HaproxySocket { host, .. } | BalancerKind::Router { host, .. } => Some(host),
            BalancerKind::HaproxyTcp { .. } => None,
        }
    }
}
