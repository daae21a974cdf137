//! What dies in the middle of a rollout besides its controller: a host, its link, its disk, its agent, the balancer, each
//! while the first host is being staged, drained, activated and confirmed.
//!
//! A phase is held open by something that waits: a step of `prepare`, a request that is not answered, a start that does not
//! listen, a controller that is stopped. So each fault strikes where it is to strike, however busy the machine is. Every
//! case ends with all hosts on one release and in traffic; the load's requests fail only on a host that died.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use greenlight_testbed::http::Request;
use greenlight_testbed::{HaProxy, Host, Init, Load, LoadHandle, wait};
use support::served::{self, HOSTS, PORT, Served};
use support::{Begun, DEADLINE, Ended, Site};

const PREPARE: &str =
    r#"prepare = ["while test -e /run/hold-stage; do : > /run/hold-stage.seen; sleep 0.05; done"]"#;

const PROCESS: &str = r#"
run = "sh start.sh {port}"
health = { http = "/health", release = "/version" }
start_timeout = "30s"
stop_timeout = "5s"
"#;

/// A deploy that had nothing to complain of.
const DONE: [&str; 2] = ["", "DONE in"];

/// What it logs goes nowhere: an application that fails because it cannot log would fail by itself on a full disk.
const START: &str = r#"
while test -e /run/hold-start; do : > /run/hold-start.seen; sleep 0.05; done
exec python3 app.py --port "$1" > /dev/null
"#;

/// It knows its servers' states again after a reload. `x-server` chooses a server.
const BACKEND: &str = "    \
    load-server-state-from-file global
    use-server web1 if { req.hdr(x-server) web1 }
";

/// Requests of the load in a second, over all its connections.
const REQUESTS_PER_SECOND: u32 = 50;

const TIMEOUTS: &str = r#"connect = "5s", drain = "90s", admit = "20s""#;

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
    AtOnce,
    /// When the deploy has ended.
    Later,
}

/// One fault in one phase: when it is over, how the deploy ends, and what the operator reads: first what is wrong, then
/// how it ended.
type Case = (Fault, Phase, Heals, i32, [&'static str; 2]);

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
            Self::LinkCutOneWay => host.mute_to(table.served.site.bed.hub_address()).unwrap(),
            Self::DiskFull => fill(host),
            Self::AgentKilled => kill_agents(host),
            Self::BalancerReloaded => table.served.haproxy.reload(true).unwrap(),
            Self::BalancerReloadedWithoutState => table.served.haproxy.reload(false).unwrap(),
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
            Self::LinkCutOneWay => host.unmute_to(table.served.site.bed.hub_address()).unwrap(),
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
    served: Served<'a>,
    rows: Vec<Row>,
}

impl<'a> Table<'a> {
    fn victim(&self) -> &'a Host {
        self.served.site.bed.host(HOSTS[0])
    }

    fn case(&mut self, case: &Case) {
        let (fault, phase, heals, exits, says) = case;
        let (before, errors, began) = (self.served.load.report(), self.errors(), Instant::now());
        let old = self.served.version(HOSTS[1]);
        let new = self.served.release();
        let (deploy, session) = self.hold_in(*phase);
        fault.strike(self);
        if *heals == Heals::AtOnce {
            fault.heal(self);
        }
        self.release(*phase, &deploy);
        let ended = deploy.end_within(ROLLOUT_DEADLINE);
        if (*fault, *phase) == (Fault::DiskFull, Phase::Staging) {
            self.one_line_and_nothing_left(&ended, &old);
        }
        if *heals == Heals::Later {
            fault.heal(self);
        }
        drop(session);
        let ended = ended.says(says).exits(*exits);
        let mut way = format!("exit {exits}");
        if *exits != 0 {
            if *exits == 1 {
                // What was turned back or refused is as it was, without anybody's help.
                let site = &self.served.site;
                wait::until("the host to answer as before", DEADLINE, || {
                    let answer = site.bed.get(site.address(HOSTS[0], PORT), "/version");
                    let text = answer.map_err(|error| error.to_string())?.text();
                    if text.contains(&format!("{old:?}")) { Ok(()) } else { Err(text) }
                })
                .unwrap();
            }
            self.served.site.begin(&["deploy", "production"]).end_within(ROLLOUT_DEADLINE).exits(0);
            way.push_str(", deploy");
        }
        let seconds = began.elapsed().as_secs_f64();
        self.served.are_on(&new);
        let after = self.served.settled();
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
        self.served.site.printed.borrow_mut().clear();
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
        let statistics = self.served.haproxy.command("show stat").unwrap();
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

    /// Begins a deploy of the new release and comes back when its first host is in the middle of a phase, with the request
    /// that keeps a session open there.
    fn hold_in(&self, phase: Phase) -> (Begun<'_>, Option<LoadHandle>) {
        let host = self.victim();
        if let Some(hold) = phase.hold() {
            host.run("rm", &["-f", &format!("{hold}.seen")]).unwrap();
            host.write(hold, 0o644, "").unwrap();
        }
        let session = (phase == Phase::Draining).then(|| self.open_session());
        // What it says of sessions is said to who asks for more.
        let arguments = ["deploy", "production", "--verbose"];
        let arguments = &arguments[..if phase == Phase::Draining { 3 } else { 2 }];
        let mut deploy = self.served.site.begin_with(arguments, |command| {
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
        let session = Load::to((self.served.haproxy.host().address(), 80).into())
            .connections(1)
            .per_second(1)
            .timeout(Duration::from_secs(180))
            .requests(|_| Request::get("/held?by=/run/hold-request").header("x-server", HOSTS[0]))
            .start(self.served.site.bed);
        self.wait_for_file(Phase::Draining);
        session
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
        served::show(&text);
    }
}

/// The table is shown however its last case came out.
impl Drop for Table<'_> {
    fn drop(&mut self) {
        self.print();
    }
}

#[test]
fn a_host_or_its_link_goes_away_in_each_phase() {
    use Fault::{HostCrashed, HostKilled, LinkCut, LinkCutOneWay};
    use Heals::{AtOnce, Later};
    use Phase::{Activating, Confirming, Draining, Staging};
    const SILENT: &str = "web1 does not answer";
    run(
        "faults-hosts",
        Init::Systemd,
        &[
            (HostKilled, Staging, Later, 1, [SILENT, "REFUSED, nothing was changed"]),
            (HostKilled, Draining, Later, 4, [SILENT, "NOT FULLY TURNED BACK"]),
            (HostCrashed, Activating, Later, 4, [SILENT, "NOT FULLY TURNED BACK"]),
            (HostKilled, Confirming, Later, 4, [SILENT, "NOT FULLY TURNED BACK"]),
            (LinkCut, Staging, AtOnce, 0, DONE),
            (LinkCut, Draining, Later, 1, [SILENT, "TURNED BACK, all as before"]),
            (LinkCut, Activating, Later, 4, [SILENT, "NOT FULLY TURNED BACK"]),
            (LinkCutOneWay, Confirming, Later, 4, [SILENT, "NOT FULLY TURNED BACK"]),
        ],
    );
}

#[test]
fn a_disk_fills_up_and_an_agent_or_the_balancer_restarts_in_each_phase() {
    use Fault::{AgentKilled, BalancerReloaded, BalancerReloadedWithoutState, DiskFull};
    use Heals::{AtOnce, Later};
    use Phase::{Activating, Confirming, Draining, Staging};
    run(
        "faults-parts",
        Init::None,
        &[
            (DiskFull, Staging, Later, 1, ["stage failed", "REFUSED, nothing was changed"]),
            (
                DiskFull,
                Draining,
                Later,
                4,
                ["the file system /srv is full (0 B free, a change needs 1.0 MiB)", "NOT FULLY TURNED BACK"],
            ),
            (DiskFull, Activating, Later, 4, ["activate failed", "NOT FULLY TURNED BACK"]),
            (DiskFull, Confirming, Later, 4, ["confirm failed", "NOT FULLY TURNED BACK"]),
            (
                AgentKilled,
                Staging,
                AtOnce,
                0,
                ["the connection to web1 was lost during the staging", "DONE in"],
            ),
            (AgentKilled, Draining, AtOnce, 0, DONE),
            (
                AgentKilled,
                Activating,
                AtOnce,
                0,
                ["the connection to web1 was lost during the activation", "DONE in"],
            ),
            (AgentKilled, Confirming, AtOnce, 0, DONE),
            (BalancerReloaded, Staging, AtOnce, 0, DONE),
            (BalancerReloaded, Draining, AtOnce, 0, DONE),
            (BalancerReloaded, Activating, AtOnce, 0, DONE),
            (BalancerReloaded, Confirming, AtOnce, 0, DONE),
            (BalancerReloadedWithoutState, Staging, AtOnce, 0, DONE),
            (BalancerReloadedWithoutState, Draining, AtOnce, 0, DONE),
            (BalancerReloadedWithoutState, Activating, AtOnce, 0, DONE),
            (BalancerReloadedWithoutState, Confirming, AtOnce, 0, DONE),
        ],
    );
}

/// Runs cases on a bed, one after the other.
fn run(name: &str, init: Init, cases: &[Case]) {
    let bed = served::bed(name, init);
    if cases.iter().any(|(fault, ..)| *fault == Fault::DiskFull) {
        // As much as a preflight asks for, and a little more.
        bed.host(HOSTS[0]).run("mount", &["-t", "tmpfs", "-o", "size=80m", "tmpfs", "/srv"]).unwrap();
    }
    let haproxy = served::haproxy(&bed, HaProxy::STATE, BACKEND);
    let site = Site::new(&bed, &served::fleet(PREPARE, PROCESS, TIMEOUTS));
    site.project.write("start.sh", START).unwrap();
    site.release("r1", &[]);
    let served = Served::begin(site, &haproxy, REQUESTS_PER_SECOND);
    let mut table = Table { served, rows: Vec::new() };
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
