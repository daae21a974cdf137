//! The controller killed at its step boundaries, and what becomes of the rollout.
//!
//! Three hosts over ssh behind HAProxy, blue-green, under a load that never pauses and whose requests are never tried
//! again. A first rollout names all boundaries that it passes. Then, for points spread over all of them, a deploy ends
//! there as by `kill -9`, and somebody goes on or turns back: the next controller, or one from another copy of the project
//! that shares nothing but the record log and the releases. Each ends with all hosts on one release and in traffic, no
//! claim left, and no request failed. The next deploy begins where the last one ended.
//!
//! `GREENLIGHT_KILL_POINTS=all` takes every boundary; a number takes so many. Looks at hosts and balancers are more than
//! half of all boundaries and much alike, so they get a third of the points.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use greenlight_testbed::{Bed, HaProxy, Init, Load, LoadHandle};
use serde_json::Value;
use support::{DEADLINE, Site};
use tempfile::TempDir;

const HOSTS: [&str; 3] = ["web1", "web2", "web3"];
const PORT: u16 = 8000;

const FLEET: &str = r#"
[service.web]

[service.web.process.web]
run = "python3 app.py --port {port}"
port = 8000
health = { http = "/health", release = "/version" }
start_timeout = "20s"
stop_timeout = "5s"

[environment.production]
hosts.web = ["web[1-3]"]
balancer = { haproxy = "lb:/run/haproxy/admin.sock", backend = "web" }
strategy = { kind = "blue-green", floor = 1 }
timeouts = { drain = "10s", admit = "20s" }
"#;

/// Nothing here may hide a failure from the client: a request goes to one server once.
const BALANCER: &str = "\
frontend web-in
    bind :80
    default_backend web

backend web
    balance roundrobin
    retries 0
    option httpchk GET /health
    timeout check 5s
    default-server check inter 200ms fall 3 rise 1
";

/// Points in a run that nobody asked for more of, over both beds.
const POINTS: usize = 62;
/// Of these so many at least must have been passed: the last boundaries of a rollout come and go with its looks.
const REACHED_MIN: usize = 60;
/// Beds among which the points are dealt.
const BEDS: usize = 2;
/// Boundaries of a rollout over three hosts, at least.
const BOUNDARIES_MIN: usize = 60;
/// A deploy or its continuation takes some 3 s.
const ROLLOUT_DEADLINE: Duration = Duration::from_secs(90);
/// Requests of the load in a second, over all its connections.
const REQUESTS_PER_SECOND: u32 = 30;

#[test]
fn killed_at_each_boundary_and_gone_on_with_1_of_2() {
    table(0);
}

#[test]
fn killed_at_each_boundary_and_gone_on_with_2_of_2() {
    table(1);
}

/// A controller that stood still while another one went on, and then wakes: its machine was suspended, say.
#[test]
fn a_controller_that_wakes_late_changes_nothing() {
    let bed = bed("late");
    let haproxy = haproxy(&bed);
    let mut table = Table::begin(&bed, &haproxy);
    for (sleeps_at, ways) in [
        // It wakes with a decision that was right when it was made.
        ("before the record that drain of web1/web began", &["abort"][..]),
        // It wakes with a message to a host that has seen a later generation by now.
        ("after the record that activate of web1/web began", &["resume", "deploy"]),
        ("after the record that confirm of web1/web began", &["abort"]),
    ] {
        let old = table.version();
        let new = table.release();
        let mut late = table.site.begin_with(&["deploy", "production"], |command| {
            command.env("GREENLIGHT_STOP_AT", sleeps_at);
        });
        late.wait_for("stopped at boundary");
        let mut all_on = old.clone();
        for way in ways {
            // The next release is built where the project is; the other copy has the same records and releases.
            let arguments =
                if *way == "deploy" { vec!["deploy", "production", &old] } else { vec![*way, "production"] };
            let code = i32::from(*way == "abort");
            table.elsewhere(&arguments).exits(code);
            all_on.clone_from(match *way {
                "resume" => &new,
                _ => &old,
            });
        }
        table.are_on(&all_on);
        late.signal("CONT");
        let late = late.end_within(ROLLOUT_DEADLINE);
        assert!(late.code.is_some(), "{late}");
        table.are_on(&all_on);
        table.load.wait_for(20, DEADLINE).unwrap();
        let report = table.load.report();
        assert_eq!(report.failed, 0, "{sleeps_at}: {:#?}\n{late}", report.reasons);
    }
}

/// Who goes on, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Resume,
    Abort,
    ResumeElsewhere,
    AbortElsewhere,
}

impl Way {
    const ALL: [Self; 4] = [Self::Resume, Self::Abort, Self::ResumeElsewhere, Self::AbortElsewhere];

    fn name(self) -> &'static str {
        match self {
            Self::Resume => "resume",
            Self::Abort => "abort",
            Self::ResumeElsewhere => "resume elsewhere",
            Self::AbortElsewhere => "abort elsewhere",
        }
    }

    fn command(self) -> &'static str {
        if matches!(self, Self::Resume | Self::ResumeElsewhere) { "resume" } else { "abort" }
    }

    fn is_elsewhere(self) -> bool {
        matches!(self, Self::ResumeElsewhere | Self::AbortElsewhere)
    }
}

struct Row {
    point: usize,
    boundary: String,
    way: String,
    seconds: f64,
    requests: u64,
    failed: u64,
    all_on: String,
}

struct Table<'a> {
    site: Site<'a>,
    load: LoadHandle,
    /// Another copy of the project.
    elsewhere: TempDir,
    /// Releases so far, the first included.
    releases: usize,
    rows: Vec<Row>,
}

fn bed(name: &str) -> Bed {
    Bed::builder(name).hosts(HOSTS, Init::None).host("lb", Init::None).up().unwrap()
}

fn haproxy(bed: &Bed) -> HaProxy {
    let servers: String =
        HOSTS.iter().map(|name| format!("    server {name} {}:{PORT}\n", bed.host(name).address())).collect();
    bed.haproxy("lb", &format!("{BALANCER}{servers}")).unwrap()
}

fn table(part: usize) {
    let bed = bed(&format!("kill{part}"));
    let haproxy = haproxy(&bed);
    let mut table = Table::begin(&bed, &haproxy);
    let all = table.count();
    let points = points(&all).into_iter().skip(part).step_by(BEDS);
    // Each bed has all ways, and the two do not go the same way at neighbouring points.
    for (turn, point) in points.enumerate() {
        table.die_and_go_on(point, Way::ALL[(turn + part) % Way::ALL.len()]);
    }
    table.end(all.len());
}

/// A boundary at which a deploy is to die.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    /// Its number in the rollout that was counted.
    number: usize,
    name: String,
    /// Whether it is found by its name, which it alone has, or by its number.
    is_named: bool,
}

/// The boundaries at which deploys are to die, in their order.
fn points(all: &[Point]) -> Vec<Point> {
    let count = match std::env::var("GREENLIGHT_KILL_POINTS").ok().as_deref() {
        Some("all") => return all.to_vec(),
        Some(number) => number.parse::<usize>().unwrap(),
        None => POINTS,
    };
    let (steps, looks): (Vec<Point>, Vec<Point>) = all.iter().cloned().partition(|point| point.is_named);
    let spread = |points: Vec<Point>, count: usize| {
        let count = count.min(points.len());
        (0..count).map(|index| points[index * points.len() / count].clone()).collect::<Vec<_>>()
    };
    let mut chosen = [spread(looks, count / 3), spread(steps, count - count / 3)].concat();
    chosen.sort();
    chosen
}

impl<'a> Table<'a> {
    fn begin(bed: &'a Bed, haproxy: &HaProxy) -> Self {
        let site = Site::new(bed, FLEET);
        site.greenlight(&["deploy", "production"]).exits(0);
        haproxy.wait_until_up("web", DEADLINE).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let (here, there) = (site.project.path(), elsewhere.path());
        std::fs::write(there.join("greenlight.toml"), FLEET).unwrap();
        std::fs::create_dir(there.join(".greenlight")).unwrap();
        for name in ["records.sqlite", "depot"] {
            symlink(here.join(".greenlight").join(name), there.join(".greenlight").join(name)).unwrap();
        }
        let load = Load::to((haproxy.host().address(), 80).into())
            .connections(4)
            .per_second(REQUESTS_PER_SECOND)
            .timeout(Duration::from_secs(30))
            .start(bed);
        load.wait_for(50, DEADLINE).unwrap();
        Self { site, load, elsewhere, releases: 1, rows: Vec::new() }
    }

    /// The boundaries that a rollout passes which nobody disturbs.
    fn count(&mut self) -> Vec<Point> {
        let version = self.release();
        let deploy = self.deploy("list").exits(0);
        let lines = deploy.stderr.lines().filter_map(|line| line.strip_prefix("boundary ")?.split_once(": "));
        let lines: Vec<_> = lines.map(|(number, name)| (number.parse().unwrap(), name.to_owned())).collect();
        let is_alone = |name: &String| lines.iter().filter(|(_, other)| other == name).count() == 1;
        let point = |(number, name): &(usize, String)| Point {
            number: *number,
            name: name.clone(),
            is_named: is_alone(name),
        };
        let all: Vec<Point> = lines.iter().map(point).collect();
        assert!(all.len() >= BOUNDARIES_MIN, "a rollout has {} boundaries:\n{deploy}", all.len());
        self.are_on(&version);
        all
    }

    /// A deploy that dies at a boundary, and what becomes of it.
    fn die_and_go_on(&mut self, point: Point, way: Way) {
        let before = self.load.report();
        let old = self.version();
        let new = self.release();
        let began = Instant::now();
        let Point { number, name, is_named } = point;
        let deploy = self.deploy(&if is_named { name } else { number.to_string() });
        let mut lines = deploy.stderr.lines();
        let boundary = lines.find_map(|line| line.strip_prefix("killed at boundary ")?.split_once(": "));
        let boundary = boundary.map(|(_, name)| name.to_owned());
        let (way, all_on) = match &boundary {
            Some(_) => {
                assert_eq!(deploy.signal, Some(9), "{deploy}");
                self.go_on(way, &old, &new)
            }
            // Fewer looks than in the rollout that was counted: it was over before it came to this one.
            None => ("not reached".to_owned(), {
                deploy.exits(0);
                new
            }),
        };
        let seconds = began.elapsed().as_secs_f64();
        self.are_on(&all_on);
        // Long enough to see what comes of the end, too.
        self.load.wait_for(20, DEADLINE).unwrap();
        let after = self.load.report();
        let failed = after.failed - before.failed;
        self.rows.push(Row {
            point: number,
            boundary: boundary.clone().unwrap_or_default(),
            way: way.clone(),
            seconds,
            requests: after.requests - before.requests,
            failed,
            all_on,
        });
        if failed > 0 {
            self.print();
        }
        assert_eq!(
            failed,
            0,
            "{way} after {boundary:?}: {:#?}\n{}",
            after.reasons,
            self.site.printed.borrow()
        );
        self.site.printed.borrow_mut().clear();
    }

    /// Resumes or aborts what was left. The way that it was, and the release that all hosts must be on.
    fn go_on(&self, way: Way, old: &str, new: &str) -> (String, String) {
        let arguments = [way.command(), "production"];
        let ended = match way.is_elsewhere() {
            true => self.elsewhere(&arguments),
            false => self.site.begin(&arguments).end_within(ROLLOUT_DEADLINE),
        };
        if ended.code == Some(2) && ended.stderr.contains("no rollout of production is open") {
            // It died before the rollout was recorded, or after its end was.
            return (format!("{}: none open", way.name()), self.version());
        }
        let (code, release) = if way.command() == "resume" { (0, new) } else { (1, old) };
        ended.exits(code);
        (way.name().to_owned(), release.to_owned())
    }

    /// Runs a command in the other copy of the project.
    fn elsewhere(&self, arguments: &[&str]) -> support::Ended {
        let begun = self.site.begin_with(arguments, |command| {
            command.current_dir(self.elsewhere.path());
        });
        begun.end_within(ROLLOUT_DEADLINE)
    }

    fn release(&mut self) -> String {
        self.releases += 1;
        let version = format!("r{}", self.releases);
        self.site.release(&version, &[]);
        version
    }

    fn deploy(&self, kill_at: &str) -> support::Ended {
        let begun = self.site.begin_with(&["deploy", "production"], |command| {
            command.env("GREENLIGHT_KILL_AT", kill_at);
        });
        begun.end_within(ROLLOUT_DEADLINE)
    }

    /// What the first host answers.
    fn version(&self) -> String {
        self.site.answer(HOSTS[0], PORT)
    }

    /// Asserts that every host is on this release, proven, in traffic and nobody's.
    #[track_caller]
    fn are_on(&self, version: &str) {
        let ended = self.site.greenlight(&["status", "production", "--json"]).exits(0);
        let status: Value = serde_json::from_str(&ended.stdout).unwrap();
        let environment = &status["environments"][0];
        assert_eq!(environment["open"], Value::Null, "{ended}");
        let instances = environment["instances"].as_array().unwrap();
        assert_eq!(instances.len(), HOSTS.len(), "{ended}");
        for instance in instances {
            assert_eq!(instance["proven"], instance["release"], "{ended}");
            assert_eq!(instance["report"]["ledger"]["claim"], Value::Null, "{ended}");
            assert_eq!(instance["traffic"]["admitted"], true, "{ended}");
            assert_eq!(instance["traffic"]["up"], true, "{ended}");
        }
        let releases: BTreeSet<_> = instances.iter().map(|instance| instance["release"].as_str()).collect();
        assert_eq!(releases.len(), 1, "{ended}");
        for host in HOSTS {
            assert_eq!(self.site.answer(host, PORT), version, "the answer of {host}:\n{ended}");
        }
    }

    fn print(&self) {
        let mut text = format!(
            "\n{:>5}  {:<58} {:<26} {:>7} {:>8} {:>6}  {}\n",
            "point", "killed at", "way on", "seconds", "requests", "failed", "all hosts on"
        );
        for Row { point, boundary, way, seconds, requests, failed, all_on } in &self.rows {
            text.push_str(&format!(
                "{point:>5}  {boundary:<58} {way:<26} {seconds:>7.1} {requests:>8} {failed:>6}  {all_on}\n"
            ));
        }
        // Not by `print!`, which a test that passes keeps to itself: the table is what it is for.
        std::io::stdout().lock().write_all(text.as_bytes()).unwrap();
    }

    fn end(self, all: usize) {
        self.print();
        let Self { load, rows, .. } = self;
        let reached = rows.iter().filter(|row| !row.boundary.is_empty()).count();
        let names: BTreeSet<&str> = rows.iter().map(|row| row.boundary.as_str()).collect();
        let report = load.stop().unwrap();
        let text = format!(
            "{reached} of {} points reached, {} different boundaries of {all}; {} requests, {} failed, in {:.0} s\n",
            rows.len(),
            names.len(),
            report.requests,
            report.failed,
            report.seconds
        );
        std::io::stdout().lock().write_all(text.as_bytes()).unwrap();
        assert_eq!(report.failed, 0, "{:#?}", report.reasons);
        assert!(reached * POINTS >= rows.len() * REACHED_MIN, "only {reached} of {} points", rows.len());
    }
}
