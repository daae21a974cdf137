//! The controller killed at its step boundaries, and what becomes of the rollout.
//!
//! A first rollout names all boundaries that it passes. Then, for points spread over all of them, a deploy ends there as by
//! `kill -9`, and somebody goes on or turns back: the next controller, or one from another copy of the project that shares
//! nothing but the record log and the releases. The same with controllers that go on with a rollout of which the first one
//! died, or turn it back, and die in their turn. Each ends with all hosts on one release and in traffic, no claim left, and
//! no request failed. The next deploy begins where the last one ended.
//!
//! `GREENLIGHT_KILL_POINTS=all` takes every boundary; a number takes so many. Looks at hosts and balancers are more than
//! half of all boundaries and much alike, so they get a third of the points.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use greenlight_testbed::{Bed, HaProxy, Init};
use support::served::{self, HOSTS, Served};
use support::{PROCESS, Site};
use tempfile::TempDir;

/// Points in a run that nobody asked for more of, over both beds.
const POINTS: usize = 62;
/// Beds among which the points of a deploy are dealt.
const BEDS: usize = 2;
/// Points in each of those that die while they go on or turn back.
const POINTS_GOING_ON: usize = 10;
/// One of so many points need not be passed: the last boundaries of a rollout come and go with its looks.
const UNREACHED_ONE_OF: usize = 31;
/// Boundaries of a rollout over three hosts, at least.
const BOUNDARIES_MIN: usize = 60;
/// A deploy or its continuation takes some 3 s.
const ROLLOUT_DEADLINE: Duration = Duration::from_secs(90);
/// Requests of the load in a second, over all its connections.
const REQUESTS_PER_SECOND: u32 = 30;

#[test]
fn killed_at_each_boundary_and_gone_on_with_1_of_2() {
    table("kill0", Dying::Deploy, 0, BEDS);
}

#[test]
fn killed_at_each_boundary_and_gone_on_with_2_of_2() {
    table("kill1", Dying::Deploy, 1, BEDS);
}

#[test]
fn killed_while_it_goes_on_with_a_rollout_and_gone_on_with() {
    table("kill-resume", Dying::Resume, 0, 1);
}

#[test]
fn killed_while_it_turns_a_rollout_back_and_gone_on_with() {
    table("kill-abort", Dying::Abort, 0, 1);
}

/// A controller that stood still while another one went on, and then wakes: its machine was suspended, say.
#[test]
fn a_controller_that_wakes_late_changes_nothing() {
    let bed = served::bed("late", Init::None);
    let haproxy = served::haproxy(&bed, "", "");
    let mut table = Table::begin(&bed, &haproxy);
    for (sleeps_at, ways) in [
        // It wakes with a decision that was right when it was made.
        ("before the record that drain of web1/web began", &["abort"][..]),
        // It wakes with a message to a host that has seen a later generation by now.
        ("after the record that activate of web1/web began", &["resume", "deploy"]),
        ("after the record that confirm of web1/web began", &["abort"]),
    ] {
        let old = table.served.version(HOSTS[0]);
        let new = table.served.release();
        let mut late = table.served.site.begin_with(&["deploy", "production"], |command| {
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
        table.served.are_on(&all_on);
        late.signal("CONT");
        let late = late.end_within(ROLLOUT_DEADLINE);
        assert!(late.code.is_some(), "{late}");
        table.served.are_on(&all_on);
        let report = table.served.settled();
        assert_eq!(report.failed, 0, "{sleeps_at}: {:#?}\n{late}", report.reasons);
    }
}

/// Which controller dies at the points of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dying {
    /// The one that begins.
    Deploy,
    /// One that goes on after the first has died.
    Resume,
    /// One that turns back after the first has died.
    Abort,
}

impl Dying {
    fn command(self) -> &'static str {
        match self {
            Self::Deploy => "deploy",
            Self::Resume => "resume",
            Self::Abort => "abort",
        }
    }

    /// Where the first controller died before: with as much as possible left to do.
    fn first_dies_at(self) -> Option<&'static str> {
        match self {
            Self::Deploy => None,
            Self::Resume => Some("after the record that activate of web1/web began"),
            Self::Abort => Some("after the record that activate of web2/web began"),
        }
    }

    fn points(self) -> usize {
        if self == Self::Deploy { POINTS } else { POINTS_GOING_ON }
    }

    /// How it ends when nothing happens to it, and with which of the two releases.
    fn ends<'v>(self, old: &'v str, new: &'v str) -> (i32, &'v str) {
        if self == Self::Abort { (1, old) } else { (0, new) }
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
    served: Served<'a>,
    /// Another copy of the project.
    elsewhere: TempDir,
    rows: Vec<Row>,
}

/// One of so many `parts` of the table of those that die like this.
fn table(name: &str, dying: Dying, part: usize, parts: usize) {
    let bed = served::bed(name, Init::None);
    let haproxy = served::haproxy(&bed, "", "");
    let mut table = Table::begin(&bed, &haproxy);
    let all = table.count(dying);
    let points = points(&all, dying.points()).into_iter().skip(part).step_by(parts);
    // Each bed has all ways, and no two go the same way at neighbouring points.
    for (turn, point) in points.enumerate() {
        table.die_and_go_on(dying, point, Way::ALL[(turn + part) % Way::ALL.len()]);
    }
    table.end(all.len());
}

/// A boundary at which a controller is to die.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    /// Its number in the run that was counted.
    number: usize,
    name: String,
    /// Whether it is found by its name, which it alone has, or by its number.
    is_named: bool,
}

/// The boundaries at which controllers are to die, in their order.
fn points(all: &[Point], count: usize) -> Vec<Point> {
    let count = match std::env::var("GREENLIGHT_KILL_POINTS").ok().as_deref() {
        Some("all") => return all.to_vec(),
        Some(number) => number.parse::<usize>().unwrap(),
        None => count,
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
    fn begin(bed: &'a Bed, haproxy: &'a HaProxy) -> Self {
        let fleet = served::fleet("", PROCESS, r#"drain = "10s", admit = "20s""#);
        let served = Served::begin(Site::new(bed, &fleet), haproxy, REQUESTS_PER_SECOND);
        let elsewhere = tempfile::tempdir().unwrap();
        let (here, there) = (served.site.project.path(), elsewhere.path());
        std::fs::write(there.join("greenlight.toml"), fleet).unwrap();
        std::fs::create_dir(there.join(".greenlight")).unwrap();
        for name in ["records.sqlite", "depot"] {
            symlink(here.join(".greenlight").join(name), there.join(".greenlight").join(name)).unwrap();
        }
        Self { served, elsewhere, rows: Vec::new() }
    }

    /// The boundaries that a command passes which nobody disturbs.
    fn count(&mut self, dying: Dying) -> Vec<Point> {
        let old = self.served.version(HOSTS[0]);
        let new = self.served.release();
        self.first_dies(dying);
        let (code, all_on) = dying.ends(&old, &new);
        let listed = self.killed_at(dying.command(), "list").exits(code);
        let lines = listed.stderr.lines().filter_map(|line| line.strip_prefix("boundary ")?.split_once(": "));
        let lines: Vec<_> = lines.map(|(number, name)| (number.parse().unwrap(), name.to_owned())).collect();
        let is_alone = |name: &String| lines.iter().filter(|(_, other)| other == name).count() == 1;
        let point = |(number, name): &(usize, String)| Point {
            number: *number,
            name: name.clone(),
            is_named: is_alone(name),
        };
        let all: Vec<Point> = lines.iter().map(point).collect();
        assert!(all.len() >= BOUNDARIES_MIN, "it has {} boundaries:\n{listed}", all.len());
        self.served.are_on(all_on);
        all
    }

    /// Begins a rollout of which the first controller dies, where that is to be before.
    fn first_dies(&self, dying: Dying) {
        if let Some(boundary) = dying.first_dies_at() {
            let first = self.killed_at("deploy", boundary);
            assert_eq!(first.signal, Some(9), "{first}");
        }
    }

    /// A controller that dies at a boundary, and what becomes of its rollout.
    fn die_and_go_on(&mut self, dying: Dying, point: Point, way: Way) {
        let before = self.served.load.report();
        let old = self.served.version(HOSTS[0]);
        let new = self.served.release();
        let began = Instant::now();
        self.first_dies(dying);
        let Point { number, name, is_named } = point;
        let died = self.killed_at(dying.command(), &if is_named { name } else { number.to_string() });
        let mut lines = died.stderr.lines();
        let boundary = lines.find_map(|line| line.strip_prefix("killed at boundary ")?.split_once(": "));
        let boundary = boundary.map(|(_, name)| name.to_owned());
        let (way, all_on) = match &boundary {
            Some(_) => {
                assert_eq!(died.signal, Some(9), "{died}");
                self.go_on(way, &old, &new)
            }
            // Fewer looks than in the one that was counted: it was over before it came to this one.
            None => {
                let (code, all_on) = dying.ends(&old, &new);
                died.exits(code);
                ("not reached".to_owned(), all_on.to_owned())
            }
        };
        let seconds = began.elapsed().as_secs_f64();
        self.served.are_on(&all_on);
        let after = self.served.settled();
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
        let printed = &self.served.site.printed;
        assert_eq!(failed, 0, "{way} after {boundary:?}: {:#?}\n{}", after.reasons, printed.borrow());
        printed.borrow_mut().clear();
    }

    /// Resumes or aborts what was left. The way that it was, and the release that all hosts must be on.
    fn go_on(&self, way: Way, old: &str, new: &str) -> (String, String) {
        let site = &self.served.site;
        // What somebody has turned back is not gone on with.
        let asked_back = |record: &serde_json::Value| record["body"]["request"] == "abort";
        let is_back = way.command() == "abort" || site.records("production").iter().any(asked_back);
        let arguments = [way.command(), "production"];
        let ended = match way.is_elsewhere() {
            true => self.elsewhere(&arguments),
            false => site.begin(&arguments).end_within(ROLLOUT_DEADLINE),
        };
        if ended.code == Some(2) && ended.stderr.contains("no rollout of production is open") {
            // It died before the rollout was recorded, or after its end was.
            return (format!("{}: none open", way.name()), self.served.version(HOSTS[0]));
        }
        let (code, release) = if is_back { (1, old) } else { (0, new) };
        ended.exits(code);
        (way.name().to_owned(), release.to_owned())
    }

    /// Runs a command in the other copy of the project.
    fn elsewhere(&self, arguments: &[&str]) -> support::Ended {
        let begun = self.served.site.begin_with(arguments, |command| {
            command.current_dir(self.elsewhere.path());
        });
        begun.end_within(ROLLOUT_DEADLINE)
    }

    fn killed_at(&self, command: &str, boundary: &str) -> support::Ended {
        let begun = self.served.site.begin_with(&[command, "production"], |command| {
            command.env("GREENLIGHT_KILL_AT", boundary);
        });
        begun.end_within(ROLLOUT_DEADLINE)
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
        served::show(&text);
    }

    fn end(self, all: usize) {
        self.print();
        let Self { served, rows, .. } = self;
        let reached = rows.iter().filter(|row| !row.boundary.is_empty()).count();
        let names: BTreeSet<&str> = rows.iter().map(|row| row.boundary.as_str()).collect();
        let report = served.load.stop().unwrap();
        served::show(&format!(
            "{reached} of {} points reached, {} different boundaries of {all}; {} requests, {} failed, in {:.0} s\n",
            rows.len(),
            names.len(),
            report.requests,
            report.failed,
            report.seconds
        ));
        assert_eq!(report.failed, 0, "{:#?}", report.reasons);
        let unreached_max = (rows.len() / UNREACHED_ONE_OF).max(1);
        assert!(rows.len() - reached <= unreached_max, "only {reached} of {} points", rows.len());
    }
}
