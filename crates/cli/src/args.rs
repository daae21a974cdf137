//! What the user may type. What it means is decided in `commands`.

mod lights;
mod report;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use greenlight_model::check::CheckPattern;
use greenlight_model::id::{EnvironmentName, HostName, ProcessName, RolloutId, ServiceName};

pub(crate) use lights::{Approve, Confirm, Evidence, EvidenceAction, EvidenceAdd, Gates, Override, Tick};
pub(crate) use report::{Issue, IssueAction, IssueAdd, Report, ReportFormat, TaskAction, TaskAdd, Tasks};

/// Releases for fleets of plain servers: staged, verified, reversible.
///
/// The fleet is described in greenlight.toml; `greenlight init` writes one. Every command explains itself with --help.
///
/// Exit codes: 0 done · 1 failed, and turned back or nothing changed · 2 wrong usage or configuration ·
/// 3 held or waiting for a person or a gate · 4 failed and not fully turned back.
#[derive(Debug, Parser)]
#[command(name = "greenlight", version, max_term_width = 110)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The fleet file [default: greenlight.toml here or in a directory above].
    #[arg(long, short = 'f', global = true, value_name = "PATH", env = "GREENLIGHT_FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Print the result as JSON on standard output (docs/reference/json.md); progress stays on standard error.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Colour: on terminals, always or never.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(crate) color: Color,
    /// Say less: no progress, only results and errors.
    #[arg(long, short = 'q', global = true)]
    pub(crate) quiet: bool,
    /// Say more: every wait, the output of every step.
    #[arg(long, short = 'v', global = true, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
    /// A configuration file for ssh instead of the user's own (`ssh -F`).
    #[arg(long, global = true, value_name = "PATH", env = "GREENLIGHT_SSH_CONFIG")]
    pub(crate) ssh_config: Option<PathBuf>,
}

/// When to use colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// See it work: three hosts, a router and six rollouts on this machine, in a directory that is removed again.
    Demo(Demo),
    /// Look at this project and write a commented greenlight.toml for it.
    Init(Init),
    /// Check greenlight.toml: every mistake at once, with its line and what to do.
    Check,
    /// Print the JSON Schema of greenlight.toml, for editors.
    Schema,
    /// Build a release from a commit, in a clean checkout.
    Build(Build),
    /// List releases and where each runs; mark one bad or good.
    Releases(Releases),
    /// Check on every host whether a deployment could go there, as one table. Changes nothing.
    Preflight(Preflight),
    /// Show what a deployment would do, step by step. Changes nothing.
    Plan(Plan),
    /// Bring releases to an environment: staged everywhere, then wave by wave.
    Deploy(Deploy),
    /// Go back to the last release that was healthy on the whole environment, or to a named one.
    Rollback(Rollback),
    /// Add what tests and analyses found out about a release, for the gates; or list it.
    Evidence(Evidence),
    /// Show the light of every gate on the way into an environment, and what would turn it green.
    Gates(Gates),
    /// Agree to what a deployment would do. The approval is for exactly the plan that is shown.
    Approve(Approve),
    /// Agree to what migrations take away from a database.
    Confirm(Confirm),
    /// Tick an item of an environment's checklist.
    Tick(Tick),
    /// Let a gate be green although it is not, for these releases. It is recorded, with the reason.
    Override(Override),
    /// Show what runs where, and why a rollout is not moving.
    Status(Status),
    /// Let the running rollout finish what is under way and begin nothing new.
    Hold(Operator),
    /// Go on with a rollout that was held, interrupted or lost its controller.
    Resume(Resume),
    /// Turn the open rollout back.
    Abort(Abort),
    /// List the rollouts of an environment, or the steps of one.
    History(History),
    /// Write the deployment report of a rollout, from the records: Markdown, HTML or JSON.
    Report(Report),
    /// Note what you saw around a deployment, for its report.
    Issue(Issue),
    /// Note what somebody has to do, and let it wait for the green light of a role.
    Action(Tasks),
    /// Compare what runs with what was released: links, files, units, processes, their environment, balancers, host with host.
    /// Exit code 3 where they differ.
    Drift(Drift),
    /// Show each host: whether it answers, what it is, how processes run there.
    Hosts(Hosts),
    /// Show the last lines of the logs of a service's processes.
    Logs(Logs),
    /// Run a command on the hosts of an environment.
    Exec(Exec),
    /// Make the verdict on a canary again from its evidence file, or ask how often it would have been wrong.
    Verdict(Verdict),
    /// Run the built-in router.
    Router(Router),
    /// The part of Greenlight that runs on a host; started by the controller.
    #[command(hide = true)]
    Agent(Agent),
    /// The application that the demo deploys.
    #[command(hide = true)]
    DemoApplication(DemoApplication),
    /// Print the completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Leave everything running to play with; prints how to use it and how to stop it.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Stop what `demo --keep` left running in this directory, and remove it.
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "keep")]
    pub(crate) stop: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Print the file instead of writing it.
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// Which service.
    pub(crate) service: ServiceName,
    /// The commit, branch or tag [default: the service's branch, else HEAD].
    #[arg(long, value_name = "REVISION")]
    pub(crate) commit: Option<String>,
    /// What people are to call the release [default: what `git describe` says].
    #[arg(long)]
    pub(crate) label: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Releases {
    /// Only this service's.
    #[arg(long)]
    pub(crate) service: Option<ServiceName>,
    #[command(subcommand)]
    pub(crate) action: Option<ReleasesAction>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReleasesAction {
    /// Mark a release bad (it is refused from then on) or good again.
    Mark {
        /// Label, id or commit; SERVICE=RELEASE where that is not unique.
        release: String,
        /// Why it is bad.
        #[arg(long, value_name = "WHY", required_unless_present = "good")]
        bad: Option<String>,
        /// It is good again.
        #[arg(long, conflicts_with = "bad")]
        good: bool,
    },
    /// Remove old releases from this project. What an environment runs, or could go back to, always stays.
    Prune {
        /// How many of the newest of each service stay as well.
        #[arg(long, default_value_t = 10)]
        keep: usize,
    },
}

/// Which releases go where.
#[derive(Debug, Args)]
pub(crate) struct Targets {
    /// Which environment.
    pub(crate) environment: EnvironmentName,
    /// Label, id or commit of a release; SERVICE=RELEASE for one of several services. Without any: the head of each
    /// service's branch, built if it is not yet.
    #[arg(value_name = "RELEASE")]
    pub(crate) releases: Vec<String>,
    /// Only this service; may be repeated.
    #[arg(long = "service", value_name = "SERVICE")]
    pub(crate) services: Vec<ServiceName>,
    /// Only this host; may be repeated. The environment then runs mixed releases, which `status` shows.
    #[arg(long = "host", value_name = "HOST")]
    pub(crate) hosts: Vec<HostName>,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

/// Which failing checks do not stop a deployment.
#[derive(Debug, Default, Args)]
pub(crate) struct Overrides {
    /// Go on though this check of the preflight fails: `disk`, `package libpq5`, or on one host `web2:local edits`. May be
    /// repeated. It is recorded with the reason, and an approval is for exactly these.
    #[arg(long = "override", value_name = "CHECK", requires = "reason")]
    pub(crate) checks: Vec<CheckPattern>,
    /// Why. It is kept, and stands in the report.
    #[arg(long, value_name = "WHY", requires = "checks")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Preflight {
    #[command(flatten)]
    pub(crate) targets: Targets,
}

#[derive(Debug, Args)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) targets: Targets,
}

#[derive(Debug, Args)]
pub(crate) struct Deploy {
    #[command(flatten)]
    pub(crate) targets: Targets,
    #[command(flatten)]
    pub(crate) consent: Consent,
    /// Wait at gates that time turns green: a window, a freeze, a soak, traffic. Else it ends with exit code 3 there, as it
    /// always does at one that somebody must see to.
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Rollback {
    #[command(flatten)]
    pub(crate) targets: Targets,
    #[command(flatten)]
    pub(crate) consent: Consent,
    /// The database was put back as it was before its migrations: releases of before may be gone back to. Say from what.
    #[arg(long, value_name = "WHY")]
    pub(crate) database_restored: Option<String>,
}

/// Whether to ask before anything changes.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Consent {
    /// Do not ask before beginning. Without a terminal nothing is asked.
    #[arg(long, short = 'y')]
    pub(crate) yes: bool,
    /// Show the plan and change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Which environment [default: all].
    pub(crate) environment: Option<EnvironmentName>,
}

#[derive(Debug, Args)]
pub(crate) struct Operator {
    /// Which environment's rollout.
    pub(crate) environment: EnvironmentName,
    /// Why, for the record.
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct Resume {
    #[command(flatten)]
    pub(crate) operator: Operator,
    /// The migration of this service, whose end greenlight does not know, is done: somebody looked at the database.
    #[arg(long, value_name = "SERVICE")]
    pub(crate) migration_done: Vec<ServiceName>,
}

#[derive(Debug, Args)]
pub(crate) struct Abort {
    #[command(flatten)]
    pub(crate) operator: Operator,
    /// The database was put back as it was before its migrations: the code may go back. Say from what.
    #[arg(long, value_name = "WHY")]
    pub(crate) database_restored: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct History {
    /// Which environment [default: all].
    pub(crate) environment: Option<EnvironmentName>,
    /// The steps of this rollout.
    #[arg(long, value_name = "ID")]
    pub(crate) rollout: Option<RolloutId>,
    /// How many rollouts.
    #[arg(long, short = 'n', default_value_t = 20)]
    pub(crate) limit: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Drift {
    /// Which environment.
    pub(crate) environment: EnvironmentName,
}

#[derive(Debug, Args)]
pub(crate) struct Hosts {
    /// Which environment [default: all].
    pub(crate) environment: Option<EnvironmentName>,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Which environment.
    pub(crate) environment: EnvironmentName,
    /// Only this service.
    #[arg(long)]
    pub(crate) service: Option<ServiceName>,
    /// Only this process.
    #[arg(long)]
    pub(crate) process: Option<ProcessName>,
    /// Only this host; may be repeated.
    #[arg(long = "host", value_name = "HOST")]
    pub(crate) hosts: Vec<HostName>,
    /// Lines of each file.
    #[arg(long, short = 'n', default_value_t = 20)]
    pub(crate) lines: u32,
    /// Go on as lines are written.
    #[arg(long, short = 'F')]
    pub(crate) follow: bool,
    /// Only standard error.
    #[arg(long)]
    pub(crate) errors: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Which environment.
    pub(crate) environment: EnvironmentName,
    /// Only this host; may be repeated.
    #[arg(long = "host", value_name = "HOST")]
    pub(crate) hosts: Vec<HostName>,
    /// How long it may take.
    #[arg(long, default_value = "60s")]
    pub(crate) timeout: String,
    /// Program and arguments; no shell is involved.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Verdict {
    #[command(subcommand)]
    pub(crate) action: VerdictAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VerdictAction {
    /// Judge the counts of an evidence file again, with its explanation. Exits with 1 when the answer is not the one that
    /// the file says was given.
    Replay(Replay),
}

#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// The evidence file, as a canary rollout wrote it (docs/verdict.md).
    pub(crate) evidence: PathBuf,
    /// Judge the stable release against itself instead: each of its hosts in turn plays the canary of the others. How often would
    /// the same settings have cried wolf here?
    #[arg(long)]
    pub(crate) a_a: bool,
    /// How long a stretch of the past is judged at a time; each learns from the one before it.
    #[arg(long, value_name = "DURATION", default_value = "30m", requires = "a_a")]
    pub(crate) stretch: String,
}

/// How the router writes its access log.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum LogForm {
    Json,
    Common,
}

#[derive(Debug, Args)]
pub(crate) struct Router {
    /// The address to listen on.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: SocketAddr,
    /// The control socket to make.
    #[arg(long, value_name = "PATH")]
    pub(crate) control: PathBuf,
    /// The backends to begin with, as JSON.
    #[arg(long, value_name = "PATH")]
    pub(crate) state: Option<PathBuf>,
    /// Speak TLS, HTTP/2 with clients that can, and show this certificate, with those behind it that lead to its root (PEM). When
    /// the files change they are read anew.
    #[arg(long, value_name = "PATH", requires = "tls_key")]
    pub(crate) tls_certificate: Option<PathBuf>,
    /// The certificate's private key (PEM), which others than its owner and group must not be able to read.
    #[arg(long, value_name = "PATH", requires = "tls_certificate")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Where the state is kept over a restart, and with it an alert that holds the canary. What is there is used instead
    /// of --state unless it is older.
    #[arg(long, value_name = "PATH")]
    pub(crate) keep: Option<PathBuf>,
    /// Take over from the router that answers on the control socket, if one does, without refusing a connection: its listening
    /// sockets, its state in place of --state, its canary's lease, and as many threads. It ends when its requests have ended.
    #[arg(long)]
    pub(crate) take_over: bool,
    /// Where each request is logged, with the backend and the release that answered.
    #[arg(long, value_name = "PATH")]
    pub(crate) access_log: Option<PathBuf>,
    /// How: JSON lines, or the common log format with the decision behind it.
    #[arg(long, value_name = "FORM", default_value = "json", requires = "access_log")]
    pub(crate) access_log_form: LogForm,
    /// Log one of so many requests, by chance.
    #[arg(long, value_name = "COUNT", default_value_t = 1, requires = "access_log", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) access_log_one_in: u32,
    /// Where Prometheus may read the counts: `GET /metrics`. Whoever reaches it may read.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Do not count requests by release and route: a canary cannot be judged then.
    #[arg(long)]
    pub(crate) no_counts: bool,
    /// Threads, each with its own listening socket [default: one per core].
    #[arg(long)]
    pub(crate) workers: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct Agent {
    #[command(subcommand)]
    pub(crate) role: Option<AgentRole>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentRole {
    /// Keep one process of a service alive.
    Supervise {
        /// The service's directory.
        #[arg(long)]
        root: PathBuf,
        /// The process.
        #[arg(long)]
        process: ProcessName,
    },
    /// Go back from an activation that was not confirmed.
    Guard {
        /// The service's directory.
        #[arg(long)]
        root: PathBuf,
        /// The activation's number.
        #[arg(long)]
        generation: u64,
        /// When the guard was armed, in milliseconds since boot: tells it from others of the same activation.
        #[arg(long)]
        armed_at_ms: u64,
        /// How long to wait first; a timer of systemd has waited already.
        #[arg(long)]
        after_ms: Option<u64>,
    },
    /// Start the timer of a guard again that was armed before the machine was booted.
    Rearm {
        /// The service's directory.
        #[arg(long)]
        root: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DemoApplication {
    /// The port to listen on.
    #[arg(long)]
    pub(crate) port: u16,
}
