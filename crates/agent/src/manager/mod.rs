//! What runs the processes of a host, behind one trait: systemd, supervisord, or the agent's own supervision.
//!
//! Guarantees: only processes that greenlight itself has set up are started, stopped or removed; what is running is told by process
//! id and start time, as the kernel shows them.

pub(crate) mod own;
pub(crate) mod supervisord;
pub(crate) mod systemd;

use std::path::{Path, PathBuf};
use std::time::Duration;

use greenlight_model::fleet::ManagerKind;
use greenlight_model::id::{ProcessName, ServiceName};

use crate::failure::Outcome;
use crate::layout::Layout;
use crate::plan::Plan;
use crate::process::Identity;

/// How long a manager may take to answer, beyond what a process itself may take to stop.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// What a manager says of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Live {
    /// It runs.
    Running(Identity),
    /// It is about to run.
    Starting,
    /// It does not run, and is not to.
    Stopped,
    /// It is to run and does not.
    Ended {
        /// How it ended.
        why: String,
    },
}

/// What runs processes.
pub(crate) trait Manager {
    /// Whether it can be used for these processes by the account that the agent works under; says how to mend it when not.
    fn check(&self, processes: &[&ProcessName]) -> Outcome<()>;

    /// Sets the process up and starts it. It need not work yet when this returns, but its program has been found.
    fn start(&self, plan: &Plan) -> Outcome<()>;

    /// Asks the process to end, kills it and all that belongs to it when it takes longer than `timeout`, and keeps it from being
    /// started again. Nothing to do for a process that does not run or is not known.
    fn stop(&self, process: &ProcessName, timeout: Duration) -> Outcome<()>;

    /// What the process is now.
    fn state(&self, process: &ProcessName) -> Outcome<Live>;

    /// The files that [`Manager::start`] writes for the process, with their content, which may hold secrets.
    fn written(&self, plan: &Plan) -> Outcome<Vec<(PathBuf, String)>>;

    /// Removes what [`Manager::start`] set up. The process must have been stopped.
    fn remove(&self, process: &ProcessName) -> Outcome<()>;

    /// Has a command run once, as the agent's account, each time the manager itself is started, as it is at a boot; in place of
    /// what was to run before. `None` for nothing. A manager that is not there at a boot runs nothing then.
    fn at_boot(&self, argv: Option<&[String]>) -> Outcome<()>;
}

/// One service on this host, as managers need it.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    pub(crate) service: ServiceName,
    pub(crate) layout: Layout,
    /// The program that our own supervision is started with.
    pub(crate) program: PathBuf,
}

/// The manager of that kind.
pub(crate) fn of(kind: ManagerKind, site: Site) -> Box<dyn Manager> {
    match resolve(kind) {
        ManagerKind::Systemd => Box::new(systemd::Systemd::new(site, systemd::Scope::System)),
        ManagerKind::SystemdUser => Box::new(systemd::Systemd::new(site, systemd::Scope::User)),
        ManagerKind::Supervisord => Box::new(supervisord::Supervisord::new(site)),
        ManagerKind::Agent | ManagerKind::Auto => Box::new(own::Own::new(site)),
    }
}

/// The kind that `Auto` stands for on this host: always the same one, whoever asks.
pub(crate) fn resolve(kind: ManagerKind) -> ManagerKind {
    match kind {
        ManagerKind::Auto if Path::new(systemd::BOOTED).exists() => ManagerKind::Systemd,
        ManagerKind::Auto if supervisord::is_there() => ManagerKind::Supervisord,
        ManagerKind::Auto => ManagerKind::Agent,
        stated => stated,
    }
}

/// What runs processes on this host, best first.
pub(crate) fn found() -> Vec<ManagerKind> {
    let mut found = Vec::new();
    if Path::new(systemd::BOOTED).exists() {
        found.push(ManagerKind::Systemd);
    }
    if systemd::has_user_manager() {
        found.push(ManagerKind::SystemdUser);
    }
    if supervisord::is_there() {
        found.push(ManagerKind::Supervisord);
    }
    found.push(ManagerKind::Agent);
    found
}

/// The name under which a manager of the host knows what it runs for a service at a boot. No process's name begins like this.
pub(crate) fn at_boot_name(service: &ServiceName) -> String {
    format!("greenlight_guard-{service}")
}

/// The name under which a manager of the host knows a process.
pub(crate) fn unit_name(service: &ServiceName, process: &ProcessName) -> String {
    format!("greenlight-{service}-{process}")
}
