//! The demo's site: a project in a git repository, three hosts and a router, all in one directory.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use greenlight_controller::clock;
use greenlight_link::message::Request;
use greenlight_model::host::{ClaimRequest, Desired};
use greenlight_model::id::Generation;
use greenlight_router::{BackendSpec, BackendState, RouterClient, RouterState};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::args::{Color, Global};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{FLEET_FILE, Project, runtime};

const HOSTS: [&str; 3] = ["one", "two", "three"];
/// How long the router may take to answer on its socket, or to end.
const ROUTER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a host may take to stop its process.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// The demo's site, running.
pub(crate) struct Site {
    pub(crate) directory: PathBuf,
    pub(crate) program: PathBuf,
    pub(crate) router_address: SocketAddr,
    router: RouterProcess,
}

/// The router's process, recognised by its start time: a process id alone may belong to somebody else by now.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct RouterProcess {
    pid: i32,
    started: u64,
    address: SocketAddr,
}

impl Site {
    /// Makes the directory and starts the router; the hosts run nothing yet.
    pub(crate) fn build(story: &Printer) -> Result<Self, Failure> {
        let program = std::env::current_exe().map_err(|error| cannot("find this program's file", &error))?;
        let name = format!("greenlight-demo-{}", clock::now().as_millisecond());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory)
            .map_err(|error| cannot(&format!("make {}", directory.display()), &error))?;
        let [router, one, two, three] = free_ports()?;
        let ports = [one, two, three];
        write(&directory.join(FLEET_FILE), &fleet_file(&program, &directory, ports))?;
        write(&directory.join(".gitignore"), ".greenlight/\nhosts/\nrouter*\n")?;
        for host in HOSTS {
            let root = directory.join("hosts").join(host);
            std::fs::create_dir_all(&root)
                .map_err(|error| cannot(&format!("make {}", root.display()), &error))?;
        }
        git(&directory, &["init", "--quiet", "--initial-branch", "main"])?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, router));
        let router = start_router(&program, &directory, address, ports)?;
        let site = Self { directory, program, router_address: address, router };
        let text =
            serde_json::to_string(&site.router).map_err(|error| cannot("describe the router", &error))?;
        write(&site.directory.join("router.json"), &text)?;
        story.progress(format!(
            "three hosts and a router on http://{address}/, in {}",
            site.directory.display()
        ));
        Ok(site)
    }

    /// A site that an earlier `demo --keep` left running.
    pub(crate) fn reopen(directory: &Path) -> Result<Self, Failure> {
        let path = directory.join("router.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Failure::usage(format!(
                "{} is not a demo's directory: cannot read {}: {error}",
                directory.display(),
                path.display()
            ))
            .help("`greenlight demo --keep` prints its directory, and the command that stops it")
        })?;
        let router: RouterProcess = serde_json::from_str(&text)
            .map_err(|error| Failure::usage(format!("{} is not a demo's: {error}", path.display())))?;
        let program = std::env::current_exe().map_err(|error| cannot("find this program's file", &error))?;
        Ok(Self { directory: directory.to_owned(), program, router_address: router.address, router })
    }

    /// Commits a version of the application: what it calls itself, and its page.
    pub(crate) fn commit(&self, tag: &str, answers_as: &str, page: &str) -> Result<(), Failure> {
        write(&self.directory.join("VERSION"), &format!("{answers_as}\n"))?;
        write(&self.directory.join("page.txt"), &format!("{page}\n"))?;
        git(&self.directory, &["add", "VERSION", "page.txt", FLEET_FILE, ".gitignore"])?;
        git(&self.directory, &["commit", "--quiet", "--message", &format!("{tag}: {page}")])?;
        git(&self.directory, &["tag", tag])
    }

    /// From here on a release is tried by a part of the traffic first.
    pub(crate) fn use_canary(&self) -> Result<(), Failure> {
        let path = self.directory.join(FLEET_FILE);
        let text = std::fs::read_to_string(&path).map_err(|error| cannot("read the fleet file", &error))?;
        let text = text.replace(ROLLING, CANARY) + CANARY_TABLE;
        write(&path, &text)
    }

    /// The next version answers every so many requests with an error.
    pub(crate) fn plant_fault(&self, every: u32) -> Result<(), Failure> {
        write(&self.directory.join("FAULT"), &format!("{every}\n"))?;
        git(&self.directory, &["add", "FAULT"])
    }

    /// Stops everything and removes the directory.
    pub(crate) fn remove(&self) -> Result<(), Failure> {
        self.stop_hosts()?;
        stop_router(&self.router)?;
        let directory = &self.directory;
        // Releases are read-only on purpose; the owner may write to their directories again before removing them.
        make_writable(directory);
        std::fs::remove_dir_all(directory)
            .map_err(|error| cannot(&format!("remove {}", directory.display()), &error))
    }

    /// Takes the service off every host that has it, as a rollout would.
    fn stop_hosts(&self) -> Result<(), Failure> {
        let global = Global {
            file: Some(self.directory.join(FLEET_FILE)),
            json: false,
            color: Color::Auto,
            quiet: true,
            verbose: false,
            ssh_config: None,
        };
        let project = Project::open(&global, &Printer::new(&global))?;
        let log = project.log()?;
        let Some(environment) = project.fleet.environments.values().next() else { return Ok(()) };
        let runtime = runtime()?;
        runtime.block_on(async {
            let (gatherer, gathered) = project.gather(environment, &log).await?;
            for instance in environment.instances() {
                let Some(report) = gathered.report(&instance) else { continue };
                let Some(spec) = gatherer.spec(&instance, report.linked) else { continue };
                let generation = Generation(report.ledger.generation.0 + 2);
                // A demo that was interrupted may have left its claim, which is then the one to go on with.
                let own = clock::rollout_id(&environment.name, clock::now(), &project.by);
                let rollout = report.ledger.claim.as_ref().map_or(own, |claim| claim.rollout.clone());
                let claim = ClaimRequest {
                    rollout: rollout.clone(),
                    holder: project.by.clone(),
                    reason: "the demo ends".to_owned(),
                    duration: STOP_TIMEOUT,
                    generation,
                };
                let desired = Desired { generation, rollout, release: None, spec: spec.clone() };
                let claim = Request::Claim { spec, claim, charter: None };
                for request in [claim, Request::Activate { desired, guard: None }] {
                    Arc::clone(gatherer.hosts())
                        .call(&instance.host, request, STOP_TIMEOUT, |_| {})
                        .await
                        .map_err(|error| Failure::from_error(Exit::Failed, &error))?;
                }
            }
            Ok(())
        })
    }
}

const ROLLING: &str = r#"strategy = { kind = "rolling", batch = 1, floor = 2 }"#;
const CANARY: &str = r#"strategy = { kind = "canary", batch = 1, floor = 2 }"#;
const CANARY_TABLE: &str = r#"
[environment.demo.canary]
steps = ["20% for 3s", "50% until pass"]
warmup = "0s"
compare = [{ metric = "errors" }]
"#;

fn fleet_file(program: &Path, directory: &Path, ports: [u16; 3]) -> String {
    let mut text = format!(
        r#"# The demo's fleet: three hosts on this machine behind the built-in router.
[service.hello]
keep_releases = 3

[service.hello.process.web]
run = "'{program}' demo-application --port {{port}}"
port = {port}
health = {{ http = "/health", release = "/version" }}
start_timeout = "3s"

[environment.demo]
hosts.hello = ["one", "two", "three"]
manager = "agent"
{ROLLING}
balancer = {{ router = "one:{directory}/router.sock" }}
timeouts = {{ drain = "10s", admit = "10s" }}
"#,
        program = program.display(),
        directory = directory.display(),
        port = ports[0],
    );
    for (host, port) in HOSTS.iter().zip(ports) {
        text.push_str(&format!(
            "host.{host} = {{ link = \"local\", address = \"127.0.0.1\", root = \"{}/hosts/{host}\", ports = {{ web = {port} }} }}\n",
            directory.display()
        ));
    }
    text
}

fn start_router(
    program: &Path,
    directory: &Path,
    address: SocketAddr,
    ports: [u16; 3],
) -> Result<RouterProcess, Failure> {
    let backends = HOSTS
        .iter()
        .zip(ports)
        .map(|(host, port)| BackendSpec {
            name: (*host).to_owned(),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            weight: 100,
            state: BackendState::Drain,
            release: None,
            health: Some("/health".to_owned()),
        })
        .collect();
    let state = serde_json::to_string(&RouterState::new(1, backends))
        .map_err(|error| cannot("describe the router's backends", &error))?;
    write(&directory.join("router-state.json"), &state)?;
    let log = directory.join("router.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(|error| cannot("open the router's log", &error))?;
    let control = directory.join("router.sock");
    let child = Command::new(program)
        .args(["router", "--listen", &address.to_string(), "--control"])
        .arg(&control)
        .arg("--state")
        .arg(directory.join("router-state.json"))
        .arg("--access-log")
        .arg(directory.join("router-access.log"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        // A group of its own: ^C in the demo must not end the router while requests are counted.
        .process_group(0)
        .spawn()
        .map_err(|error| cannot("start the router", &error))?;
    let pid = i32::try_from(child.id()).map_err(|error| cannot("use the router's process id", &error))?;
    let client = RouterClient::new(&control);
    runtime()?.block_on(async {
        let deadline = tokio::time::Instant::now() + ROUTER_TIMEOUT;
        // The router makes its socket when it is ready, and nothing else tells so.
        let mut polls = tokio::time::interval(Duration::from_millis(20));
        loop {
            polls.tick().await;
            match client.get().await {
                Ok(_) => return Ok(()),
                Err(error) if tokio::time::Instant::now() > deadline => {
                    return Err(cannot("reach the router (see router.log in the demo's directory)", &error));
                }
                Err(_) => {}
            }
        }
    })?;
    let started = start_time(pid).ok_or_else(|| Failure::new(Exit::Failed, "the router ended at once"))?;
    Ok(RouterProcess { pid, started, address })
}

/// Ends the router if it is still the process that was started.
fn stop_router(router: &RouterProcess) -> Result<(), Failure> {
    if start_time(router.pid) != Some(router.started) {
        return Ok(());
    }
    let Some(pid) = Pid::from_raw(router.pid) else { return Ok(()) };
    kill_process(pid, Signal::TERM).map_err(|error| cannot("stop the router", &error))?;
    runtime()?.block_on(async {
        let deadline = tokio::time::Instant::now() + ROUTER_TIMEOUT;
        // Only the parent is told when a process ends, and that may have been another demo command.
        let mut polls = tokio::time::interval(Duration::from_millis(20));
        while start_time(router.pid) == Some(router.started) {
            polls.tick().await;
            if tokio::time::Instant::now() > deadline {
                let message = format!("the router (process {}) does not end", router.pid);
                return Err(Failure::new(Exit::Failed, message));
            }
        }
        Ok(())
    })
}

/// When a living process was started, in the kernel's clock ticks; none when it is gone or only waits to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Ports that nothing listens on; all are held at once, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N], Failure> {
    let mut held = Vec::with_capacity(N);
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .map_err(|error| cannot("find a free port", &error))?;
        *port = listener.local_addr().map_err(|error| cannot("find a free port", &error))?.port();
        held.push(listener);
    }
    Ok(ports)
}

fn git(directory: &Path, arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("git")
        .args([
            "-c",
            "user.name=Greenlight demo",
            "-c",
            "user.email=demo@localhost",
            "-c",
            "commit.gpgsign=false",
        ])
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| cannot("run git, which the demo needs", &error))?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(Exit::Failed, format!("git {} failed: {}", arguments.join(" "), why.trim())))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let written = std::fs::File::create(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| cannot(&format!("write {}", path.display()), &error))
}

fn make_writable(directory: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // What cannot be made writable is named by the removal that follows.
            let _ = std::fs::set_permissions(entry.path(), std::fs::Permissions::from_mode(0o755));
            make_writable(&entry.path());
        }
    }
}

fn cannot(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("cannot {what}: {error}"))
}
