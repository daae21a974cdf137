//! What dies in the middle of a rollout besides its controller: a host, its link, its disk, its agent, the balancer, each
//! while the first host is being staged, drained, activated and confirmed.
//!
//! A phase is held open by something that waits: a step of `prepare`, a request that is not answered, a start that does not
//! listen, a controller that is stopped. So each fault strikes where it is to strike, however busy the machine is. Every
//! case ends with all hosts on one release and in traffic; the load's requests fail only on a host that died.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::Write as _;
use std::time::{Duration, Instant};

use greenlight_testbed::http::Request;
use greenlight_testbed::{Bed, HaProxy, Host, Init, Load, LoadHandle, wait};
use serde_json::Value;
use support::{Begun, DEADLINE, Ended, Site};

const HOSTS: [&str; 3] = ["web1", "web2", "web3"];
const PORT: u16 = 8000;

const FLEET: &str = r#"
[service.web]
prepare = ["while test -e /run/hold-stage; do : > /run/hold-stage.seen; sleep 0.05; done"]

[service.web.process.web]
run = "sh start.sh {port}"
port = 8000
health = { http = "/health", release = "/version" }
start_timeout = "30s"
stop_timeout = "5s"

[environment.production]
hosts.web = ["web[1-3]"]
balancer = { haproxy = "lb:/run/haproxy/admin.sock", backend = "web" }
strategy = { kind = "blue-green", floor = 1 }
timeouts = { connect = "5s", drain = "90s", admit = "20s" }
"#;

/// What it logs goes nowhere: an application that fails because it cannot log would fail by itself on a full disk.
const START: &str = r#"
while test -e /run/hold-start; do : > /run/hold-start.seen; sleep 0.05; done
exec python3 app.py --port "$1" > /dev/null
"#;

/// Nothing here may hide a failure from the client: a request goes to one server once. A reload ends a client's idle
/// connection only with an answer. `x-server` chooses a server.
const BALANCER: &str = "\
frontend web-in
    bind :80
    option idle-close-on-response
    default_backend web

backend web
    balance roundrobin
    retries 0
    option httpchk GET /health
    timeout check 5s
    load-server-state-from-file global
    default-server check inter 200ms fall 3 rise 1
    use-server web1 if { req.hdr(x-server) web1 }
";

/// What takes all room on the small file system.
const FILL: &str = "/srv/fill";

/// A rollout whose hosts do not answer takes up to 20 s to notice, and as long to go back.
const ROLLOUT_DEADLINE: Duration = Duration::from_secs(150);

/// Where a rollout is when something dies. It is the first host, alone in its wave, that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Staging,
    Draining,
    Activating,
    Confirming,
}

impl Phase {
    /// The file on the host that keeps it in this phase, where it is one.
    fn hold(self) -> Option<&'static str> {
        match self {
            Self::Staging => Some("/run/hold-stage"),
            Self::Draining => Some("/run/hold-request"),
            Self::Activating => Some("/run/hold-start"),
            Self::Confirming => None,
        }
    }
}

/// What happens to the first host, or to the balancer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// All of its processes end at once; it refuses connections until it has booted.
    HostKilled,
    /// The same without a word: it does not even refuse.
    HostCrashed,
    LinkCut,
    /// What it says is lost on the way to the controller; what it hears is not.
    LinkCutOneWay,
    DiskFull,
    AgentKilled,
    BalancerReloaded,
    /// Its servers begin as the configuration has them: all in traffic.
    BalancerReloadedWithoutState,
}

/// When what was struck comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heals {
    /// At once.
    AtOnce,
    /// When the deploy has ended.
    WhenEnded,
}

/// One fault in one phase.
struct Case {
    fault: Fault,
    phase: Phase,
    heals: Heals,
    /// How the deploy ends.
    exits: i32,
    /// What the operator reads: first what is wrong, then how it ended.
    says: &'static [&'static str],
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::HostKilled => "host killed",
            Self::HostCrashed => "host crashed",
            Self::LinkCut => "link cut",
            Self::LinkCutOneWay => "link cut one way",
            Self::DiskFull => "disk full",
            Self::AgentKilled => "agent killed",
            Self::BalancerReloaded => "balancer reloaded",
            Self::BalancerReloadedWithoutState => "balancer reloaded, no state",
        }
    }

    /// Whether requests that are sent to the host may fail.
    fn takes_the_host(self) -> bool {
        matches!(self, Self::HostKilled | Self::HostCrashed | Self::LinkCut)
    }

    fn strike(self, table: &Table<'_>) {
        let host = table.victim();
        match self {
            Self::HostKilled => host.kill().unwrap(),
            Self::HostCrashed => host.crash().unwrap(),
            Self::LinkCut => host.cut().unwrap(),
            Self::LinkCutOneWay => host.mute_to(table.site.bed.hub_address()).unwrap(),
            Self::DiskFull => fill(host),
            Self::AgentKilled => kill_agents(host),
            Self::BalancerReloaded => table.haproxy.reload(true).unwrap(),
            Self::BalancerReloadedWithoutState => table.haproxy.reload(false).unwrap(),
        }
    }

    fn heal(self, table: &Table<'_>) {
        let host = table.victim();
        match self {
            Self::HostKilled => host.boot().unwrap(),
            Self::HostCrashed => {
                host.heal().unwrap();
                host.boot().unwrap();
            }
            Self::LinkCut => host.heal().unwrap(),
            Self::LinkCutOneWay => host.unmute_to(table.site.bed.hub_address()).unwrap(),
            Self::DiskFull => {
                host.run("rm", &["-f", FILL]).unwrap();
            }
            Self::AgentKilled | Self::BalancerReloaded | Self::BalancerReloadedWithoutState => {}
        }
    }
}

struct Row {
    case: String,
    /// What the operator read.
    lines: Vec<String>,
    way: String,
    seconds: f64,
    requests: u64,
    failed: u64,
    all_on: String,
}

struct Table<'a> {
    site: &'a Site<'a>,
    haproxy: &'a HaProxy,
    load: LoadHandle,
    releases: usize,
    rows: Vec<Row>,
}

impl<'a> Table<'a> {
    fn begin(site: &'a Site<'a>, haproxy: &'a HaProxy) -> Self {
        site.project.write("start.sh", START).unwrap();
        site.release("r1", &[]);
        site.greenlight(&["deploy", "production"]).exits(0);
        haproxy.wait_until_up("web", DEADLINE).unwrap();
        let load = Load::to((haproxy.host().address(), 80).into())
            .connections(4)
            .per_second(50)
            .timeout(Duration::from_secs(30))
            .start(site.bed);
        load.wait_for(50, DEADLINE).unwrap();
        Self { site, haproxy, load, releases: 1, rows: Vec::new() }
    }

    fn victim(&self) -> &'a Host {
        self.site.bed.host(HOSTS[0])
    }

    fn case(&mut self, case: &Case) {
        let Case { fault, phase, heals, exits, says } = case;
        let (before, errors, began) = (self.load.report(), self.errors(), Instant::now());
        let old = self.site.answer(HOSTS[1], PORT);
        let (deploy, session) = self.hold_in(*phase);
        let new = format!("r{}", self.releases);
        fault.strike(self);
        if *heals == Heals::AtOnce {
            fault.heal(self);
        }
        self.release(*phase, &deploy);
        let ended = deploy.end_within(ROLLOUT_DEADLINE);
        if (*fault, *phase) == (Fault::DiskFull, Phase::Staging) {
            self.one_line_and_nothing_left(&ended, &old);
        }
        if *heals == Heals::WhenEnded {
            fault.heal(self);
        }
        drop(session);
        let ended = ended.says(says).exits(*exits);
        let mut way = format!("exit {exits}");
        if *exits != 0 {
            if *exits == 1 {
                // What was turned back or refused is as it was, without anybody's help.
                wait::until("the host to answer as before", DEADLINE, || {
                    let answer = self.site.bed.get(self.site.address(HOSTS[0], PORT), "/version");
                    let text = answer.map_err(|error| error.to_string())?.text();
                    if text.contains(&format!("{old:?}")) { Ok(()) } else { Err(text) }
                })
                .unwrap();
            }
            self.site.begin(&["deploy", "production"]).end_within(ROLLOUT_DEADLINE).exits(0);
            way.push_str(", deploy");
        }
        let seconds = began.elapsed().as_secs_f64();
        self.are_on(&new);
        self.load.wait_for(20, DEADLINE).unwrap();
        let after = self.load.report();
        let failed = after.failed - before.failed;
        let line = |text: &str| {
            let found = ended.stderr.lines().chain(ended.stdout.lines()).find(|line| line.contains(text));
            found.unwrap_or_default().trim().to_owned()
        };
        self.rows.push(Row {
            case: format!("{}, {phase:?}", fault.name()),
            lines: says.iter().map(|text| line(text)).collect(),
            way,
            seconds,
            requests: after.requests - before.requests,
            failed,
            all_on: new,
        });
        if fault.takes_the_host() {
            let others = |errors: &[(String, u64)]| {
                errors.iter().filter(|(server, _)| server != HOSTS[0]).cloned().collect::<Vec<_>>()
            };
            assert_eq!(others(&self.errors()), others(&errors), "requests failed on hosts that were well");
        } else {
            assert_eq!(failed, 0, "{} in {phase:?}: {:#?}\n{ended}", fault.name(), after.reasons);
        }
        self.site.printed.borrow_mut().clear();
    }

    /// Asserts that a staging that found no room is one line of its host, and that nothing of it is there.
    fn one_line_and_nothing_left(&self, ended: &Ended, old: &str) {
        let lines = ended.stderr.lines().filter(|line| line.contains("web1/web  ")).collect::<Vec<_>>();
        assert!(lines.len() == 1 && lines[0].contains("the disk is full"), "{lines:#?}\n{ended}");
        let list = ["-c", "cat /srv/web/releases/*/VERSION; ls -A /srv/web/.greenlight/tmp"];
        let left = self.victim().run("sh", &list).unwrap();
        assert_eq!(left.trim(), old, "releases on the host, and what was half done");
    }

    /// Requests that failed on each server, as HAProxy counts them since it was started.
    fn errors(&self) -> Vec<(String, u64)> {
        let statistics = self.haproxy.command("show stat").unwrap();
        let mut lines = statistics.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let header = lines.next().unwrap();
        let place =
            |name: &str| header.iter().position(|column| column.trim_start_matches("# ") == name).unwrap();
        let (proxy, server) = (place("pxname"), place("svname"));
        let counts = ["econ", "eresp", "hrsp_5xx"].map(place);
        lines
            .filter(|row| row.len() > counts[2] && row[proxy] == "web" && row[server].starts_with("web"))
            .map(|row| {
                let sum = counts.iter().map(|count| row[*count].parse::<u64>().unwrap()).sum();
                (row[server].to_owned(), sum)
            })
            .collect()
    }

    /// Begins a deploy of a new release and comes back when its first host is in the middle of a phase, with the request
    /// that keeps a session open there.
    fn hold_in(&mut self, phase: Phase) -> (Begun<'a>, Option<LoadHandle>) {
        self.releases += 1;
        self.site.release(&format!("r{}", self.releases), &[]);
        let host = self.victim();
        if let Some(hold) = phase.hold() {
            host.run("rm", &["-f", &format!("{hold}.seen")]).unwrap();
            host.write(hold, 0o644, "").unwrap();
        }
        let session = (phase == Phase::Draining).then(|| self.open_session());
        // What it says of sessions is said to who asks for more.
        let arguments = ["deploy", "production", "--verbose"];
        let arguments = &arguments[..if phase == Phase::Draining { 3 } else { 2 }];
        let mut deploy = self.site.begin_with(arguments, |command| {
            if phase == Phase::Confirming {
                command.env("GREENLIGHT_STOP_AT", "before the record that confirm of web1/web began");
            }
        });
        match phase {
            Phase::Confirming => deploy.wait_for("stopped at boundary"),
            Phase::Draining => deploy.wait_for("sessions to end"),
            Phase::Staging | Phase::Activating => self.wait_for_file(phase),
        }
        (deploy, session)
    }

    /// Lets the phase go on, where its host still can.
    fn release(&self, phase: Phase, deploy: &Begun<'_>) {
        match phase.hold() {
            Some(hold) if self.victim().is_up() => {
                self.victim().run("rm", &["-f", hold]).unwrap();
            }
            Some(_) => {}
            None => deploy.signal("CONT"),
        }
    }

    fn wait_for_file(&self, phase: Phase) {
        let seen = format!("{}.seen", phase.hold().unwrap());
        wait::until(&format!("{seen} on the host"), DEADLINE, || {
            if self.victim().exists(&seen).unwrap() { Ok(()) } else { Err("it is not there".to_owned()) }
        })
        .unwrap();
    }

    /// A request to the first host that is not answered until the file is gone.
    fn open_session(&self) -> LoadHandle {
        let session = Load::to((self.haproxy.host().address(), 80).into())
            .connections(1)
            .per_second(1)
            .timeout(Duration::from_secs(180))
            .requests(|_| Request::get("/held?by=/run/hold-request").header("x-server", HOSTS[0]))
            .start(self.site.bed);
        self.wait_for_file(Phase::Draining);
        session
    }

    /// Asserts that every host is on this release, proven, in traffic and nobody's.
    #[track_caller]
    fn are_on(&self, version: &str) {
        let ended = self.site.greenlight(&["status", "production", "--json"]);
        let status: Value = serde_json::from_str(&ended.stdout).unwrap();
        let environment = &status["environments"][0];
        assert_eq!(environment["open"], Value::Null, "{ended}");
        let instances = environment["instances"].as_array().unwrap();
        for instance in instances {
            assert_eq!(instance["proven"], instance["release"], "{ended}");
            assert_eq!(instance["report"]["ledger"]["claim"], Value::Null, "{ended}");
            assert_eq!(instance["traffic"]["admitted"], true, "{ended}");
            assert_eq!(instance["traffic"]["up"], true, "{ended}");
        }
        for host in HOSTS {
            assert_eq!(self.site.answer(host, PORT), version, "the answer of {host}:\n{ended}");
        }
        ended.exits(0);
    }

    fn print(&self) {
        let mut text = format!(
            "\n{:<40} {:<16} {:>7} {:>8} {:>6}  {}\n",
            "fault, phase", "how it ended", "seconds", "requests", "failed", "all hosts on"
        );
        for Row { case, lines, way, seconds, requests, failed, all_on } in &self.rows {
            text.push_str(&format!(
                "{case:<40} {way:<16} {seconds:>7.1} {requests:>8} {failed:>6}  {all_on}\n"
            ));
            lines.iter().for_each(|line| text.push_str(&format!("    {line}\n")));
        }
        // Not by `print!`, which a test that passes keeps to itself: the table is what it is for.
        std::io::stdout().lock().write_all(text.as_bytes()).unwrap();
    }
}

/// The table is shown however its last case came out.
impl Drop for Table<'_> {
    fn drop(&mut self) {
        self.print();
    }
}

fn haproxy(bed: &Bed) -> HaProxy {
    let servers: String =
        HOSTS.iter().map(|name| format!("    server {name} {}:{PORT}\n", bed.host(name).address())).collect();
    bed.haproxy("lb", &format!("{}{BALANCER}{servers}", HaProxy::STATE)).unwrap()
}

#[test]
fn a_host_or_its_link_goes_away_in_each_phase() {
    run(
        "faults-hosts",
        Init::Systemd,
        &[
            Case {
                fault: Fault::HostKilled,
                phase: Phase::Staging,
                heals: Heals::WhenEnded,
                exits: 1,
                says: &["web1 does not answer", "REFUSED, nothing was changed"],
            },
            Case {
                fault: Fault::HostKilled,
                phase: Phase::Draining,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &["web1 does not answer", "NOT FULLY TURNED BACK"],
            },
            Case {
                fault: Fault::HostCrashed,
                phase: Phase::Activating,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &["web1 does not answer", "NOT FULLY TURNED BACK"],
            },
            Case {
                fault: Fault::HostKilled,
                phase: Phase::Confirming,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &["web1 does not answer", "NOT FULLY TURNED BACK"],
            },
            Case {
                fault: Fault::LinkCut,
                phase: Phase::Staging,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::LinkCut,
                phase: Phase::Draining,
                heals: Heals::WhenEnded,
                exits: 1,
                says: &["web1 does not answer", "TURNED BACK, all as before"],
            },
            Case {
                fault: Fault::LinkCut,
                phase: Phase::Activating,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &["web1 does not answer", "NOT FULLY TURNED BACK"],
            },
            Case {
                fault: Fault::LinkCutOneWay,
                phase: Phase::Confirming,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &["web1 does not answer", "NOT FULLY TURNED BACK"],
            },
        ],
    );
}

#[test]
fn a_disk_fills_up_and_an_agent_or_the_balancer_restarts_in_each_phase() {
    run(
        "faults-parts",
        Init::None,
        &[
            Case {
                fault: Fault::DiskFull,
                phase: Phase::Staging,
                heals: Heals::WhenEnded,
                exits: 1,
                says: &["stage failed", "REFUSED, nothing was changed"],
            },
            Case {
                fault: Fault::DiskFull,
                phase: Phase::Draining,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &[
                    "the file system /srv has 0 B free, and a change of /srv/web needs 1.0 MiB",
                    "NOT FULLY TURNED BACK",
                ],
            },
            Case {
                fault: Fault::DiskFull,
                phase: Phase::Activating,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &["activate failed", "NOT FULLY TURNED BACK"],
            },
            Case {
                fault: Fault::DiskFull,
                phase: Phase::Confirming,
                heals: Heals::WhenEnded,
                exits: 4,
                says: &["confirm failed", "NOT FULLY TURNED BACK"],
            },
            Case {
                fault: Fault::AgentKilled,
                phase: Phase::Staging,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["the connection to web1 was lost during the staging", "DONE in"],
            },
            Case {
                fault: Fault::AgentKilled,
                phase: Phase::Draining,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::AgentKilled,
                phase: Phase::Activating,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["the connection to web1 was lost during the activation", "DONE in"],
            },
            Case {
                fault: Fault::AgentKilled,
                phase: Phase::Confirming,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloaded,
                phase: Phase::Staging,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloaded,
                phase: Phase::Draining,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloaded,
                phase: Phase::Activating,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloaded,
                phase: Phase::Confirming,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloadedWithoutState,
                phase: Phase::Staging,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloadedWithoutState,
                phase: Phase::Draining,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloadedWithoutState,
                phase: Phase::Activating,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
            Case {
                fault: Fault::BalancerReloadedWithoutState,
                phase: Phase::Confirming,
                heals: Heals::AtOnce,
                exits: 0,
                says: &["DONE in"],
            },
        ],
    );
}

/// Runs cases on a bed, one after the other.
fn run(name: &str, init: Init, cases: &[Case]) {
    let bed = Bed::builder(name).hosts(HOSTS, init).host("lb", Init::None).up().unwrap();
    if cases.iter().any(|case| case.fault == Fault::DiskFull) {
        // As much as a preflight asks for, and a little more.
        bed.host(HOSTS[0]).run("mount", &["-t", "tmpfs", "-o", "size=80m", "tmpfs", "/srv"]).unwrap();
    }
    let haproxy = haproxy(&bed);
    let site = Site::new(&bed, FLEET);
    let mut table = Table::begin(&site, &haproxy);
    cases.iter().for_each(|case| table.case(case));
}

/// Ends the agents of controllers on a host, each by its id; what supervises processes is left alone.
fn kill_agents(host: &Host) {
    let list = "for d in /proc/[0-9]*; do tr '\\0' ' ' < $d/cmdline 2>/dev/null | grep -q '/agent-[0-9a-f]* agent *$' && echo ${d#/proc/}; done; true";
    let pids = host.run("sh", &["-c", list]).unwrap();
    assert!(!pids.trim().is_empty(), "no agent runs");
    let pids: Vec<&str> = pids.split_whitespace().collect();
    host.run("kill", &[&["-KILL"], &pids[..]].concat()).unwrap();
}

/// Leaves nothing free under /srv.
fn fill(host: &Host) {
    // It ends when there is no room left, which is its error.
    let output = host.command("dd").unwrap().args(["if=/dev/zero", &format!("of={FILL}"), "bs=1M"]).output();
    assert!(!output.unwrap().status.success(), "/srv of {} has no end", host.name());
}
