//! `cargo xtask bed`: a bed that stays until it is taken down.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, ExitStatus};

use clap::{Args, Subcommand, ValueEnum};
use greenlight_testbed::{Base, Bed, HaProxy, Host, Init, cache_directory, down_all, states};

use crate::{Error, MISSING};

/// The port that the hosts' application is expected on behind `--haproxy`.
const APPLICATION_PORT: u16 = 8000;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Which bed, where there are several.
    #[arg(long, default_value = "dev", global = true)]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Boots hosts host1 … hostN.
    Up {
        /// How many.
        hosts: u8,
        /// What runs as process 1 on them.
        #[arg(long, value_enum, default_value = "systemd")]
        init: InitName,
        /// One more host, lb, with HAProxy on port 80 in front of port 8000 of the others.
        #[arg(long)]
        haproxy: bool,
        /// One more host, db, with PostgreSQL.
        #[arg(long)]
        postgres: bool,
    },
    /// Takes the bed down with its disks.
    Down {
        /// All beds that stay, and what killed processes left; not those of tests that run now.
        #[arg(long)]
        all: bool,
    },
    /// Lists all beds of this machine.
    Status,
    /// Opens a shell, or runs a command, on a host over ssh.
    Ssh {
        /// HOST or USER@HOST.
        host: String,
        /// The command.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Runs a command as root inside a host, or where the controller stands (hub), without ssh.
    Exec {
        /// The host, or hub.
        host: String,
        /// The command.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Takes a host's link down.
    Cut { host: String },
    /// Takes a host's link up again.
    Heal { host: String },
    /// Ends a host as a loss of power does.
    Crash { host: String },
    /// Boots a host that was crashed, on the disk it had.
    Boot { host: String },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum InitName {
    Systemd,
    Supervisord,
    None,
}

pub(crate) fn run(options: Options) -> Result<ExitCode, Error> {
    if let Some(code) = become_root()? {
        return Ok(code);
    }
    let name = &options.name;
    let on_host = |host: &str, act: fn(&Host) -> Result<(), greenlight_testbed::Error>| {
        act(find(&Bed::open(name)?, host)?)?;
        Ok(ExitCode::SUCCESS)
    };
    match options.action {
        Action::Up { hosts, init, haproxy, postgres } => up(name, hosts, init, haproxy, postgres),
        Action::Down { all: true } => {
            let names = down_all()?;
            println!("taken down: {}", if names.is_empty() { "none".into() } else { names.join(", ") });
            Ok(ExitCode::SUCCESS)
        }
        Action::Down { all: false } => {
            Bed::open(name)?.down()?;
            println!("bed {name} is gone");
            Ok(ExitCode::SUCCESS)
        }
        Action::Status => status(),
        Action::Ssh { host, command } => follow(Bed::open(name)?.hub_command("ssh").arg(host).args(command)),
        Action::Exec { host, command } => {
            let bed = Bed::open(name)?;
            let program = command.first().map_or("", String::as_str);
            let mut inside =
                if host == "hub" { bed.hub_command(program) } else { find(&bed, &host)?.command(program)? };
            follow(inside.args(command.iter().skip(1)))
        }
        Action::Cut { host } => on_host(&host, Host::cut),
        Action::Heal { host } => on_host(&host, Host::heal),
        Action::Crash { host } => on_host(&host, Host::crash),
        Action::Boot { host } => on_host(&host, |host| {
            host.heal()?;
            host.boot()
        }),
    }
}

fn up(name: &str, hosts: u8, init: InitName, haproxy: bool, postgres: bool) -> Result<ExitCode, Error> {
    if !Base::is_ready()? {
        println!(
            "building the base root of all hosts, once: about a minute, in {}",
            cache_directory().display()
        );
    }
    let init = match init {
        InitName::Systemd => Init::Systemd,
        InitName::Supervisord => Init::Supervisord,
        InitName::None => Init::None,
    };
    let names: Vec<_> = (1..=hosts).map(|number| format!("host{number}")).collect();
    let mut builder = Bed::builder(name).hosts(names.iter().map(String::as_str), init);
    if haproxy {
        builder = builder.host("lb", Init::None);
    }
    if postgres {
        builder = builder.host("db", Init::None);
    }
    let bed = builder.detached().up()?;
    println!("bed {name} is up; the controller stands at {}", bed.hub_address());
    for host in bed.hosts() {
        println!("  {:<16} {:<15} {:?}", host.name(), host.address(), host.init());
    }
    if haproxy {
        let servers: Vec<_> = names
            .iter()
            .filter_map(|name| {
                Some((name.as_str(), (bed.find_host(name)?.address(), APPLICATION_PORT).into()))
            })
            .collect();
        let haproxy = bed.haproxy("lb", &HaProxy::web(80, "web", "/health", &servers))?;
        println!("HAProxy: http://{}/ backend web, {} on lb", haproxy.host().address(), haproxy.socket());
    }
    if postgres {
        println!("PostgreSQL: {}", bed.postgres("db")?.url());
    }
    let named = if name == "dev" { String::new() } else { format!(" --name {name}") };
    let first = bed.hosts().first().map_or("HOST", Host::name);
    println!("\n  cargo xtask bed{named} ssh {first}             a shell on a host");
    println!("  cargo xtask bed{named} exec hub greenlight …  what you try, where the controller stands");
    println!("  cargo xtask bed{named} down                   the end of it");
    println!("\nIn the hub, plain ssh reads {}", bed.ssh_config().display());
    Ok(ExitCode::SUCCESS)
}

fn status() -> Result<ExitCode, Error> {
    let states = states()?;
    if states.is_empty() {
        println!("no beds");
    }
    for state in states {
        let until = if state.is_detached() { "until it is taken down" } else { "as long as its process" };
        println!("{}  10.99.{}.0/24, {until}, in {}", state.name, state.number, state.directory.display());
        for host in Bed::open(&state.name)?.hosts() {
            let is = if host.is_up() { "up" } else { "down" };
            println!("  {:<16} {:<15} {:?} {is}", host.name(), host.address(), host.init());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn find<'a>(bed: &'a Bed, name: &str) -> Result<&'a Host, Error> {
    bed.find_host(name).ok_or_else(|| {
        let names: Vec<_> = bed.hosts().iter().map(Host::name).collect();
        Error::Refused(format!("bed {} has no host {name}; it has {}", bed.name(), names.join(", ")))
    })
}

/// Runs a command with this process's own input and output, and ends as it ends.
fn follow(command: &mut Command) -> Result<ExitCode, Error> {
    let status = command.status().map_err(Error::system("start nsenter"))?;
    Ok(code(status))
}

fn code(status: ExitStatus) -> ExitCode {
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(crate::FAILED))
}

/// Runs this whole command again as root, when it is not. `None` when it is.
fn become_root() -> Result<Option<ExitCode>, Error> {
    if rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    if !sudo_works() {
        eprintln!(
            "error: the test bed needs root for its namespaces and mounts, and there is no sudo that works without a password; run:"
        );
        let words: Vec<_> = std::env::args().skip(1).collect();
        eprintln!("  sudo --preserve-env=PATH,HOME \"$(command -v cargo)\" xtask {}", words.join(" "));
        return Ok(Some(ExitCode::from(MISSING)));
    }
    let program = std::env::current_exe().map_err(Error::system("find this program"))?;
    let error = Command::new("sudo")
        .args(["-n", "--preserve-env=PATH,GREENLIGHT_BED", "--"])
        .arg(program)
        .args(std::env::args_os().skip(1))
        // Root's own home would hold another base.
        .env("GREENLIGHT_BED", cache_directory())
        .exec();
    Err(Error::system("start sudo")(error))
}

/// Whether sudo answers without asking.
pub(crate) fn sudo_works() -> bool {
    Command::new("sudo").args(["-n", "true"]).output().is_ok_and(|output| output.status.success())
}
