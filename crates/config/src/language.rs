//! The language: every table and key of greenlight.toml, with its description and an example.
//!
//! This is the one place that names keys. What a value means together with others is in [`crate::check`].

use std::time::Duration;

use greenlight_model::fleet::{BecomeRoot, ManagerKind, OnFailure};
use greenlight_model::id::{
    EnvironmentName, HostName, ProcessName, ProfileName, RoleName, ServiceName, UserName, VariableName,
};
use greenlight_model::quantity::Percent;
use serde_json::{Value, json};
use toml::de::DeValue;

use crate::canary::{CanaryTable, ComparisonTable};
use crate::gates::{GateTable, Member};
use crate::problem::Problems;
use crate::read::{
    At, Key, List, Map, Node, OneOrMany, Read, Refusal, Short, Shorthand, Table, read_integer, table,
};
use crate::requires::Requires;
use crate::text::{
    AbsolutePath, Address, Command, Glob, HaproxyPlace, HostPattern, Lease, Limit, Line, Link, LogPath,
    RelativePath, Script, SocketPlace, StrategyKind, UrlPath, Word,
};

table! {
    /// A fleet: what is released (services), where (environments) and where secret values come from.
    FleetFile, "the fleet file", {
        /// What is released: code or configuration with its processes, by name.
        service [required]: Map<ServiceName, Service> = "{ web = { build = [\"make\"] } }",
        /// Where it runs: dev, staging, production …, by name.
        environment: Map<EnvironmentName, Environment> = "{ production = { hosts = { web = [\"web1\"] } } }",
        /// Where the values of secrets come from, by the variable under which processes read them.
        secret: Map<VariableName, Secret> = "{ DATABASE_URL = { age = \"secrets.age\" } }",
        /// Who holds which role, for approvals and actions: `user` wherever they work, or `user@machine`.
        role: Map<RoleName, List<Member>> = "{ operator = [\"ann\", \"bob\"] }",
    }
}

table! {
    /// What is released. Builds happen in a clean checkout of one commit; the same bytes go to every host.
    Service, "a service", {
        /// Where its tree comes from. Default: the repository that the fleet file is in.
        source: Source = "{ git = \".\", branch = \"main\" }",
        /// Build steps, each a script for `sh -e`, run one after another in a clean checkout.
        build: List<Script> = "[\"make css js\"]",
        /// What belongs to the release, as patterns of paths. Default: everything.
        include: List<Glob> = "[\"**\"]",
        /// What does not belong to it, as patterns of paths.
        exclude: List<Glob> = "[\"tests/**\"]",
        /// Files and directories that outlive releases, relative to the release; a trailing `/` marks a directory.
        shared: List<RelativePath> = "[\"var/uploads/\", \"config/local.ini\"]",
        /// Steps on each host before anything is switched, each a script for `sh -e` run in the release's directory.
        prepare: List<Script> = "[\"python3 -m venv venv\", \"venv/bin/pip install -r requirements.txt\"]",
        /// What a host must have: disk, memory, packages, versions of runtimes, outside services.
        requires: Requires = "{ python = \">=3.11\", packages = [\"libpq5\"], disk = \"2GiB\" }",
        /// What changes the database: a command, run once per rollout in the new release's directory on one host.
        migrate: Short<Migrate> = "\"venv/bin/alembic upgrade head\"",
        /// Secrets that its processes read, by variable. Each has its source in `[secret.NAME]`.
        secrets: List<VariableName> = "[\"DATABASE_URL\"]",
        /// How many releases a host keeps, besides those that an environment could go back to. Default: 5.
        keep_releases: Count = "5",
        /// What runs, by name. A service without processes is configuration.
        process: Map<ProcessName, Process> = "{ web = { run = \"bin/web --port {port}\", port = 7071 } }",
    }
}

table! {
    /// A git repository and a place in it.
    Source, "a source", {
        /// Path (relative to the fleet file) or address of the repository. Default: `.`.
        git: Line = "\".\"",
        /// The branch that is built when no commit is named.
        branch: Word = "\"main\"",
        /// The directory inside the repository that is the service. Default: the whole repository.
        directory: RelativePath = "\"web\"",
    }
}

table! {
    /// The command that changes the database.
    Migrate, "a migration", {
        /// Program and arguments; no shell.
        run [required]: Command = "\"venv/bin/alembic upgrade head\"",
        /// How long it may take. Default: 10m.
        timeout: Limit = "\"10m\"",
        /// Program and arguments of what takes away what older code needs; run when every host runs the release.
        contract: Command = "\"venv/bin/alembic upgrade contract@head\"",
        /// Program and arguments that show what `run` would do and change nothing; where it fails, `run` is not begun.
        dry_run: Command = "\"venv/bin/python manage.py migrate --plan\"",
        /// Program and arguments that keep a copy of the database; run before a part that takes something away.
        backup: Command = "\"bin/backup\"",
        /// The release's files that hold what `run` does, as patterns of paths; what is new in them since the release that
        /// runs is read for what it takes away. Default: where the tool that `run` calls has them.
        files: List<Glob> = "[\"migrations/*.up.sql\"]",
        /// The same of `contract`. Default: where the tool that `contract` calls has them.
        contract_files: List<Glob> = "[\"contract/*.sql\"]",
        /// The variable with the address of the PostgreSQL database; its advisory lock is held meanwhile, with `psql`.
        lock: VariableName = "\"DATABASE_URL\"",
        /// How long a statement waits for a lock of PostgreSQL. Default: 10s.
        lock_timeout: Limit = "\"10s\"",
        /// How long one statement may take in PostgreSQL. Default: 5m.
        statement_timeout: Limit = "\"5m\"",
    }
}

impl Shorthand for Migrate {
    type Short = Command;
    fn from_short(short: At<Command>) -> Self {
        Self { run: Key::Is(short), ..Self::default() }
    }
}

table! {
    /// Something that runs, under the host's own manager of processes.
    Process, "a process", {
        /// Program and arguments, relative to the release; split into words as a shell does, but no shell runs. `{port}` stands for the port.
        run [required]: Command = "\"venv/bin/gunicorn --bind 0.0.0.0:{port} app:app\"",
        /// The port it listens on.
        port: Port = "7071",
        /// How it proves that it works: a path that answers 2xx.
        health: Short<Health> = "{ http = \"/health\", release = \"/version\" }",
        /// Variables in its environment.
        variables: Map<VariableName, String> = "{ LOG_LEVEL = \"info\" }",
        /// Where standard output goes, relative to the service's directory on the host. Default: `logs/PROCESS.stdout`.
        stdout: LogPath = "\"logs/web.stdout\"",
        /// Where standard error goes; never the same file. Default: `logs/PROCESS.stderr`.
        stderr: LogPath = "\"logs/web.stderr\"",
        /// Named variations, such as debug.
        profile: Map<ProfileName, Profile> = "{ debug = { variables = { LOG_LEVEL = \"debug\" } } }",
        /// The account it runs under. Default: the one that Greenlight works under.
        user: UserName = "\"app\"",
        /// A start on another port, before the live process is touched.
        smoke: Smoke = "{ port = 17071 }",
        /// How long it may take to answer as the release. Default: 30s.
        start_timeout: Limit = "\"30s\"",
        /// How long it may take to be gone after being asked to stop; then it is killed. Default: 10s.
        stop_timeout: Duration = "\"10s\"",
        /// Program and arguments that stop it, instead of the signal TERM. Believed only when the process is gone.
        stop: Command = "\"bin/stop\"",
    }
}

table! {
    /// How a process proves that it works.
    Health, "a health check", {
        /// A path that answers 2xx when the process is healthy.
        http: UrlPath = "\"/health\"",
        /// A path whose answer contains the release: its id, label or commit, as plain text or anywhere in JSON.
        release: UrlPath = "\"/version\"",
    }
}

impl Shorthand for Health {
    type Short = UrlPath;
    fn from_short(short: At<UrlPath>) -> Self {
        Self { http: Key::Is(short), ..Self::default() }
    }
}

table! {
    /// A named variation of a process.
    Profile, "a profile", {
        /// Variables added to, or put in place of, the process's own.
        variables: Map<VariableName, String> = "{ LOG_LEVEL = \"debug\" }",
        /// Another command.
        run: Command = "\"bin/web --debug\"",
    }
}

table! {
    /// A start on another port that never touches the live process.
    Smoke, "a smoke start", {
        /// The port for it.
        port [required]: Port = "17071",
    }
}

table! {
    /// Where the value of a secret comes from: a file that is encrypted with age, or a command.
    Secret, "a secret", {
        /// An age-encrypted file of the repository with lines `NAME=value`, relative to the fleet file.
        age: Line = "\"secrets.age\"",
        /// The identity file that opens it; `~` is the home directory. Default: `~/.config/greenlight/identity.txt`.
        identity: Line = "\"~/.config/greenlight/identity.txt\"",
        /// A command that prints the value: program and arguments, no shell.
        command: Command = "\"pass show web/database\"",
    }
}

table! {
    /// Where services run, and how they are changed there.
    Environment, "an environment", {
        /// The branch whose pushes go here.
        branch: Word = "\"production\"",
        /// The hosts of each service, in the order in which they are changed; ranges such as `web[1-4]` are hosts too.
        hosts [required]: Map<ServiceName, List<HostPattern>> = "{ web = [\"ol-web[3-4]\", \"px[01-12]-ops\"] }",
        /// The user for ssh, on every host that does not name its own. Default: what ssh itself would take.
        user: UserName = "\"deploy\"",
        /// The directory under which each service has its own, on every host that does not name its own. Default: `/srv`.
        root: AbsolutePath = "\"/srv\"",
        /// What runs the processes, on every host that does not say otherwise. Default: auto.
        manager: ManagerKind = "\"auto\"",
        /// Whether Greenlight becomes root, on every host that does not say otherwise. Default: auto.
        become_root: BecomeRoot = "\"auto\"",
        /// How single hosts are reached and what differs there; a key may be a range.
        host: Map<HostPattern, Host> = "{ ol-web3 = { address = \"10.0.0.3\" } }",
        /// What sends requests to the hosts.
        balancer: OneOrMany<Balancer> = "{ haproxy = \"ol-www1:/run/haproxy/admin.sock\", backend = \"web\" }",
        /// How waves are cut: `rolling`, `blue-green`, `halves` or `canary`. Default: rolling, one host at a time.
        strategy: Short<Strategy> = "{ kind = \"rolling\", batch = \"25%\", floor = \"50%\" }",
        /// How a canary is led on and judged. Only with that strategy.
        canary: CanaryTable = "{ steps = [\"5% until pass\", \"50% until pass\"] }",
        /// How many hosts may be left out after failing, before the rollout is given up. Default: 0.
        failure_budget: Count = "0",
        /// What happens when the budget is spent. Default: turn-back.
        on_failure: OnFailure = "\"turn-back\"",
        /// How often a failed action is tried again before it counts. Default: 2.
        retries: Count = "2",
        /// The environment that must have finished the release before.
        after: After = "{ environment = \"staging\", soak = \"3d\" }",
        /// What else must be green before anything changes.
        gate: GateTable = "{ approval = { role = \"operator\" } }",
        /// What is tagged in git when a rollout has brought its releases to every host: `deploy-YYYY-MM-DD` (UTC), at least.
        tag: Tag = "{ moving = \"production\", push = \"origin\" }",
        /// Hosts that are changed last and serve only when the others cannot.
        standby: List<HostPattern> = "[\"px8-ops\"]",
        /// How long things may take.
        timeouts: Timeouts = "{ connect = \"20s\", drain = \"30s\" }",
        /// Variables added to every process's environment.
        variables: Map<VariableName, String> = "{ STAGE = \"production\" }",
    }
}

table! {
    /// Tags in git for what has gone out.
    Tag, "a tag", {
        /// A tag that moves along.
        moving: Word = "\"production\"",
        /// The remote that the tags are pushed to. Default: none.
        push: Word = "\"origin\"",
    }
}

table! {
    /// How one host, or each of a range, is reached and what differs there.
    Host, "a host", {
        /// Where balancers and probes from outside find it. Default: its name.
        address: Address = "\"10.0.0.3\"",
        /// The user for ssh. Default: the environment's.
        user: UserName = "\"root\"",
        /// What is given to ssh. Default: the host's name.
        destination: Word = "\"ol-web3.example.org\"",
        /// How it is reached: `ssh`, or `local` for this machine. Default: ssh.
        link: Link = "\"ssh\"",
        /// The directory under which each service has its own. Default: the environment's.
        root: AbsolutePath = "\"/opt\"",
        /// Ports that differ from the processes' own.
        ports: Map<ProcessName, Port> = "{ web = 7072 }",
        /// What runs the processes. Default: the environment's.
        manager: ManagerKind = "\"systemd\"",
        /// Whether Greenlight becomes root. Default: the environment's.
        become_root: BecomeRoot = "\"never\"",
        /// The name that the host must call itself, before anything changes there.
        hostname: Word = "\"ol-web3\"",
        /// The operating system that it must have: the beginning of `PRETTY_NAME` in its `/etc/os-release`.
        os: Line = "\"Debian GNU/Linux 12\"",
    }
}

table! {
    /// What sends requests to the instances of one service: HAProxy or the built-in router.
    Balancer, "a balancer", {
        /// HAProxy's runtime API: a socket on a host, or `tcp://ADDRESS:PORT`.
        haproxy: HaproxyPlace = "\"ol-www1:/run/haproxy/admin.sock\"",
        /// The built-in router's control socket on a host.
        router: SocketPlace = "\"ol-www1:/run/greenlight/router.sock\"",
        /// The backend whose servers are the hosts. Default: the service's name.
        backend: Word = "\"web\"",
        /// The service behind it. May be left out when only one service of the environment has a port.
        service: ServiceName = "\"web\"",
        /// What the backend calls a host, where that is not the host's name.
        servers: Map<HostName, Word> = "{ ol-web3 = \"web3\" }",
    }
}

table! {
    /// A way to cut waves.
    Strategy, "a strategy", {
        /// `rolling` (batches), `blue-green` (two waves, traffic moves at once), `halves` (the old half is kept for a while) or
        /// `canary` (a few hosts take a share of the traffic and are judged, then batches).
        kind [required]: StrategyKind = "\"rolling\"",
        /// Sizes of the batches, as numbers or shares of the hosts; the last repeats. Only rolling and canary. Default: 1.
        batch: OneOrMany<Amount> = "[1, 5, \"20%\"]",
        /// Instances that must keep serving while others change, as a number or a share. Default: 1 where there is more than one.
        floor: Amount = "\"50%\"",
        /// For how long the old half is kept. Only halves. Default: 10m.
        keep_for: Duration = "\"10m\"",
    }
}

impl Shorthand for Strategy {
    type Short = StrategyKind;
    fn from_short(short: At<StrategyKind>) -> Self {
        Self { kind: Key::Is(short), ..Self::default() }
    }
}

table! {
    /// The environment that must have finished the release before.
    After, "an `after`", {
        /// Which.
        environment [required]: EnvironmentName = "\"staging\"",
        /// For how long it must have run there. Default: no time.
        soak: Duration = "\"3d\"",
    }
}

table! {
    /// How long things may take.
    Timeouts, "the timeouts", {
        /// Connecting to a host. Default: 20s.
        connect: Limit = "\"20s\"",
        /// How long a claim holds without being renewed, from 10s to 1h: so long a host waits for a controller that died
        /// before another may go on without its records. Default: 2m.
        claim: Lease = "\"2m\"",
        /// Sending a release to a host, its `prepare` steps included. Default: 15m.
        stage: Limit = "\"15m\"",
        /// Switching and restarting, beyond the processes' own start and stop timeouts. Default: 60s.
        activate: Limit = "\"60s\"",
        /// Confirming an activation over a fresh connection, beyond the processes' own start and stop timeouts; then the
        /// host goes back by itself. Default: 30s.
        confirm: Limit = "\"30s\"",
        /// Waiting for sessions to end; then they are cut. Default: 30s.
        drain: Duration = "\"30s\"",
        /// Waiting for the balancer to see an instance as up. Default: 30s.
        admit: Limit = "\"30s\"",
    }
}

/// A whole number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count(pub(crate) u32);

/// More of anything that is counted is a slip of the finger.
const COUNT_MAX: u32 = 10_000;

impl Read for Count {
    const EXPECTED: &'static str = "a whole number";
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        read_integer(node, Self::EXPECTED, 0..=COUNT_MAX, problems).map(Self)
    }
    fn schema() -> Value {
        json!({ "type": "integer", "minimum": 0, "maximum": COUNT_MAX })
    }
}

/// A TCP port.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Port(pub(crate) u16);

impl Read for Port {
    const EXPECTED: &'static str = "a port number";
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        let number = read_integer(node, Self::EXPECTED, 1..=u32::from(u16::MAX), problems)?;
        u16::try_from(number).ok().map(Self)
    }
    fn schema() -> Value {
        json!({ "type": "integer", "minimum": 1, "maximum": u16::MAX })
    }
}

/// A number of hosts, or a share of them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Amount {
    Count(u32),
    Share(Percent),
}

impl Read for Amount {
    const EXPECTED: &'static str = "a number such as 1 or a share such as \"25%\"";
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        match node.value.get_ref() {
            DeValue::String(text) => match text.parse() {
                Ok(share) => Some(Self::Share(share)),
                Err(error) => {
                    let error: greenlight_model::quantity::InvalidQuantity = error;
                    node.bad_value(Refusal::new(error.to_string()), problems);
                    None
                }
            },
            _ => read_integer(node, Self::EXPECTED, 0..=COUNT_MAX, problems).map(Self::Count),
        }
    }
    fn schema() -> Value {
        json!({ "anyOf": [
            { "type": "integer", "minimum": 0, "maximum": COUNT_MAX },
            { "type": "string", "pattern": "^[0-9]{1,3} *%$" },
        ] })
    }
}

/// Which table a key belongs to, for one that was written in another.
pub(crate) fn home_of(key: &str) -> Option<&'static str> {
    fn home<T: Table>(key: &str) -> Option<&'static str> {
        T::FIELDS.iter().any(|field| field.key == key).then_some(T::TITLE)
    }
    home::<Service>(key)
        .or_else(|| home::<Process>(key))
        .or_else(|| home::<Environment>(key))
        .or_else(|| home::<Strategy>(key))
        .or_else(|| home::<Balancer>(key))
        .or_else(|| home::<Host>(key))
        .or_else(|| home::<Timeouts>(key))
        .or_else(|| home::<GateTable>(key))
        .or_else(|| home::<CanaryTable>(key))
        .or_else(|| home::<ComparisonTable>(key))
}
