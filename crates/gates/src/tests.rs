//! Every gate by what turns it green, and by what must not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::decision::Outcome;
use greenlight_model::evidence::Fact;
use greenlight_model::fleet::{After, Balancer, BalancerKind};
use greenlight_model::gate::{
    ApprovalGate, Checklist, CommandGate, CoverageGate, Freeze, Gates, KnownFailure, LintGate, ProbeGate,
    TestsGate, TrafficGate,
};
use greenlight_model::id::CheckName;
use greenlight_model::rollout::Direction;
use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth};

use crate::testing::{Site, digest, release};

fn name(text: &str) -> CheckName {
    text.parse().unwrap()
}

fn done() -> Option<Outcome> {
    Some(Outcome::Done { left_out: BTreeMap::new() })
}

fn ran(passed: u32, failures: &[&str]) -> Fact {
    let failures: Vec<String> = failures.iter().map(|&test| test.to_owned()).collect();
    let failed = u32::try_from(failures.len()).unwrap();
    Fact::Tests { suite: name("unit"), passed, skipped: 0, failed, failures }
}

#[test]
fn a_later_environment_waits_for_the_earlier_one() {
    let light = |ended: Option<Outcome>, is_partial: bool, seconds_later: u64| {
        let mut site = Site::new(Gates::default());
        let soak = Duration::from_secs(60);
        site.production().after = Some(After { environment: "staging".parse().unwrap(), soak });
        site.rolled("staging", 2, ended, is_partial);
        site.now += Duration::from_secs(seconds_later);
        site
    };
    let gate = "after staging (web)";
    light(done(), false, 60).is(gate, "green", &["1m 0s"]);
    light(done(), false, 59).is(gate, "amber", &["59.0s of 1m 0s"]);
    light(None, false, 60).is(gate, "amber", &["has not ended"]);
    let turned_back = Some(Outcome::TurnedBack { why: "it crashed".to_owned() });
    light(turned_back, false, 60).is(gate, "red", &["it crashed"]);
    let left_out = BTreeMap::from([("a/web".to_owned().try_into().unwrap(), "gone".to_owned())]);
    light(Some(Outcome::Done { left_out }), false, 60).is(gate, "red", &["missing on a/web"]);
    // Some of its hosts are not the environment.
    light(done(), true, 60).is(gate, "red", &["never went", "greenlight deploy staging"]);
    // Nothing stands in the way back.
    let mut back = light(None, true, 0);
    back.direction = Direction::Back;
    assert!(back.lights().is_empty());
}

#[test]
fn tests_pass_for_exactly_the_release_and_only_known_ones_may_fail() {
    let known = KnownFailure {
        test: "t.slow".to_owned(),
        owner: "ann".to_owned(),
        until: "2026-11-21".parse().unwrap(),
    };
    let tests = TestsGate { suites: BTreeSet::from([name("unit")]), known_failures: vec![known] };
    let site = || Site::new(Gates { tests: Some(tests.clone()), ..Gates::default() });
    let gate = "tests (web)";
    let add = "greenlight evidence add web=v2 --suite unit --junit FILE";
    site().is(gate, "red", &["no result of the suite unit for v2", add]);

    let mut other = site();
    other.add(1, ran(9, &[]));
    // One that was said to be of an environment is no test run of the release.
    other.add_here("production", None, ran(9, &[]));
    other.is(gate, "red", &["no result"]);

    let with = |fact: Fact| {
        let mut site = site();
        site.add(2, fact);
        site
    };
    with(ran(9, &[])).is(gate, "green", &["unit: 9 passed"]);
    with(ran(9, &["t.slow"])).is(gate, "green", &["1 known to fail"]);
    with(ran(9, &["t.slow", "t.new"])).is(gate, "red", &["1 test failed", "t.new"]);
    with(ran(0, &[])).is(gate, "red", &["no test at all"]);
    with(Fact::Exit { name: name("unit"), code: 0 }).is(gate, "green", &[]);
    with(Fact::Exit { name: name("unit"), code: 2 }).is(gate, "red", &["exit code 2"]);
    with(Fact::Exit { name: name("e2e"), code: 0 }).is(gate, "red", &["no result"]);
    // More failed than were kept by name: some of them may be unknown.
    let many = Fact::Tests {
        suite: name("unit"),
        passed: 1,
        skipped: 0,
        failed: 2,
        failures: vec!["t.slow".to_owned()],
    };
    with(many).is(gate, "red", &["not kept"]);
    let mut late = with(ran(9, &["t.slow"]));
    late.now += Duration::from_secs(86_400);
    late.is(gate, "red", &["date has passed", "of ann, until 2026-11-21"]);
    // The last run counts.
    let mut again = with(ran(9, &["t.new"]));
    again.add(2, ran(10, &[]));
    again.is(gate, "green", &["10 passed"]);
}

#[test]
fn coverage_has_a_floor_and_does_not_fall() {
    let gate = CoverageGate { floor: "80%".parse().unwrap(), may_fall: false };
    let site = |may_fall: bool, before: Option<(u64, u64)>, now: Option<(u64, u64)>| {
        let gate = CoverageGate { may_fall, ..gate.clone() };
        let mut site = Site::new(Gates { coverage: Some(gate), ..Gates::default() });
        site.rolled("production", 1, done(), false);
        for (number, measured) in [(1, before), (2, now)] {
            if let Some((covered, lines)) = measured {
                site.add(number, Fact::Coverage { covered, lines });
            }
        }
        site
    };
    let name = "coverage (web)";
    site(false, Some((80, 100)), None).is(name, "red", &["no coverage is recorded for v2", "--cobertura"]);
    site(false, Some((80, 100)), Some((80, 100))).is(name, "green", &["80.0%"]);
    // 79.99 % is not 80 %.
    site(true, None, Some((7_999, 10_000))).is(name, "red", &["79.9%", "80%"]);
    site(false, Some((900, 1000)), Some((8_999, 10_000))).is(name, "red", &["89.9%", "90.0% in v1"]);
    site(true, Some((900, 1000)), Some((8_999, 10_000))).is(name, "green", &[]);
    site(false, None, Some((90, 100))).is(name, "red", &["recorded for v1", "evidence add web=v1"]);
}

#[test]
fn an_analysis_may_find_nothing_new() {
    let site = |before: Option<&[(&str, u32)]>, now: Option<&[(&str, u32)]>| {
        let gate = LintGate { tools: BTreeSet::from([name("pylint")]) };
        let mut site = Site::new(Gates { lint: Some(gate), ..Gates::default() });
        site.rolled("production", 1, done(), false);
        for (number, found) in [(1, before), (2, now)] {
            if let Some(found) = found {
                let findings = found.iter().map(|(text, count)| ((*text).to_owned(), *count)).collect();
                site.add(number, Fact::Lint { tool: name("pylint"), findings });
            }
        }
        site
    };
    let gate = "lint (web)";
    site(None, None).is(gate, "red", &["no report of pylint for v2", "--pylint FILE"]);
    site(None, Some(&[])).is(gate, "green", &["found nothing"]);
    site(None, Some(&[("a", 1)])).is(gate, "red", &["recorded for v1"]);
    site(Some(&[("a", 1), ("b", 1)]), Some(&[("a", 1)])).is(gate, "green", &["none of them new"]);
    site(Some(&[("a", 1)]), Some(&[("a", 2)])).is(gate, "red", &["a new finding (not in v1): a"]);
    site(Some(&[("a", 1)]), Some(&[("b", 1), ("c", 1)])).is(gate, "red", &["2 new findings", "b, c"]);
}

fn approvals(count: u32, four_eyes: bool) -> Gates {
    let gate = ApprovalGate { role: "operator".parse().unwrap(), count, four_eyes };
    Gates { approvals: vec![gate], ..Gates::default() }
}

fn approve(site: &mut Site, by: &str, plan: u8, text: &str) {
    site.by = by.to_owned();
    let role = "operator".parse().unwrap();
    site.add_here("production", Some(digest(plan)), Fact::Approval { role, plan: text.to_owned() });
}

#[test]
fn an_approval_is_of_the_plan_that_was_shown() {
    let gate = "approval operator";
    let mut site = Site::new(approvals(2, false));
    site.is(gate, "red", &["nobody has", "greenlight approve production web=v2 --role operator"]);
    approve(&mut site, "bob@desk", 1, "");
    approve(&mut site, "bob@laptop", 1, "");
    site.is(gate, "red", &["1 of 2", "(bob)"]);
    approve(&mut site, "eve@desk", 1, "");
    site.is(gate, "green", &["bob, eve approved this plan"]);
    // Who is no operator, or no more one, does not count.
    approve(&mut site, "tom@desk", 1, "");
    site.fleet
        .roles
        .insert("operator".parse().unwrap(), BTreeSet::from(["bob".to_owned(), "eve@home".to_owned()]));
    site.is(gate, "red", &["1 of 2", "eve is no operator any more", "tom is no operator"]);

    let mut moved = Site::new(approvals(1, false));
    let before = format!("1 activate a/web {}\n1 admit a/web\n", release(2));
    approve(&mut moved, "bob@desk", 9, &before);
    moved.plan = Some((digest(1), format!("{before}2 activate b/web {}\n", release(2))));
    moved.is(gate, "red", &["not the one that bob approved", "new is `2 activate b/web 020202020202`"]);
    // In another environment it says nothing.
    let mut elsewhere = Site::new(approvals(1, false));
    elsewhere.by = "bob@desk".to_owned();
    let fact = Fact::Approval { role: "operator".parse().unwrap(), plan: String::new() };
    elsewhere.add_here("staging", Some(digest(1)), fact);
    elsewhere.is(gate, "red", &["nobody has"]);
    // Without a plan there is nothing that could have been approved.
    approve(&mut elsewhere, "bob@desk", 1, "");
    elsewhere.plan = None;
    elsewhere.is(gate, "red", &["made anew"]);
}

#[test]
fn four_eyes_are_not_those_of_who_built_or_asks() {
    let gate = "approval operator";
    let mut site = Site::new(approvals(1, true));
    approve(&mut site, "ann@home", 1, "");
    site.is(gate, "red", &["ann built the release"]);
    approve(&mut site, "bob@desk", 1, "");
    site.is(gate, "green", &["bob"]);
    site.asked_by = Some("bob@laptop".to_owned());
    site.is(gate, "red", &["bob asks for the rollout"]);
    let mut two = Site::new(approvals(1, false));
    approve(&mut two, "ann@home", 1, "");
    two.is(gate, "green", &[]);
}

#[test]
fn a_checklist_needs_what_is_required() {
    let list = Checklist {
        required: vec!["backup".to_owned(), "support told".to_owned()],
        optional: vec!["cake".to_owned()],
    };
    let mut site = Site::new(Gates { checklist: Some(list), release_note: true, ..Gates::default() });
    let tick = |item: &str| Fact::Tick { item: item.to_owned(), note: String::new() };
    site.is("release_note (web)", "red", &["v2 has no note", "--note FILE"]);
    site.add_here("production", None, tick("backup"));
    site.add_here("staging", None, tick("support told"));
    site.is("checklist", "red", &["not ticked: \"support told\";", "greenlight tick production"]);
    site.add_here("production", None, tick("support told"));
    site.is("checklist", "green", &["all 2", "optional and open: \"cake\""]);
    site.add(1, Fact::Note { text: "old".to_owned() });
    site.is("release_note (web)", "red", &[]);
    site.add(2, Fact::Note { text: "new\nlook".to_owned() });
    site.is("release_note (web)", "green", &["bob@desk: new"]);
}

#[test]
fn windows_open_freezes_end_and_traffic_falls() {
    let freeze = |when: &str| Freeze { when: when.parse().unwrap(), reason: "holidays".to_owned() };
    let mut site = Site::new(Gates {
        windows: vec![
            "Thu 09:00-16:00 America/Los_Angeles".parse().unwrap(),
            "Sun 10:00-11:00".parse().unwrap(),
        ],
        freezes: vec![freeze("11-20..11-22 Europe/Zurich"), freeze("2027-01-01..2027-01-02")],
        traffic: Some(TrafficGate { sessions_below: 10 }),
        ..Gates::default()
    });
    site.is("window", "amber", &["shut; it opens Sun 2026-11-22 10:00 UTC, in 18h 0m"]);
    site.is("freeze", "amber", &["until Mon 2026-11-23 00:00 Europe/Zurich", "holidays"]);
    site.production().balancers = vec![Balancer {
        service: "web".parse().unwrap(),
        kind: BalancerKind::HaproxyTcp { address: "lb:1".to_owned() },
        backend: "web".to_owned(),
        servers: BTreeMap::new(),
    }];
    let report = |sessions: u64| {
        let server = Server {
            admission: Admission::Ready,
            health: ServerHealth::Up,
            sessions,
            weight: 1,
            normal_weight: 1,
        };
        BalancerReport::Servers(BTreeMap::from([
            ("a".parse().unwrap(), server),
            ("b".parse().unwrap(), server),
        ]))
    };
    site.traffic = vec![report(5)];
    site.is("traffic", "amber", &["10 sessions", "fewer than 10"]);
    site.traffic = vec![report(4)];
    site.is("traffic", "green", &["8 sessions"]);
    site.traffic = vec![BalancerReport::Unreachable { why: "refused".to_owned() }];
    site.is("traffic", "red", &["cannot be read", "refused"]);
    site.now = "2026-11-26T18:00:00Z".parse().unwrap();
    site.is("window", "green", &["open until Thu 2026-11-26 16:00"]);
    site.is("freeze", "green", &[]);
}

#[test]
fn a_look_counts_for_a_while() {
    let command = CommandGate { argv: vec!["true".to_owned()], timeout: Duration::from_secs(1) };
    let probe = ProbeGate { address: "tcp://x:1".to_owned(), timeout: Duration::from_secs(1) };
    let mut site = Site::new(Gates {
        commands: BTreeMap::from([(name("backup"), command)]),
        probes: BTreeMap::from([(name("vendor"), probe)]),
        ..Gates::default()
    });
    site.is("command backup", "red", &["nobody has looked", "greenlight gates production web=v2"]);
    let ended = |code: Option<i32>, said: &str| Fact::Command {
        name: name("backup"),
        code,
        output: vec![said.to_owned()],
    };
    site.add_here("production", None, ended(Some(1), "too old"));
    site.is("command backup", "red", &["exit code 1: too old"]);
    site.add_here("production", None, ended(None, "cut"));
    site.is("command backup", "red", &["did not end by itself"]);
    site.add_here("production", None, ended(Some(0), ""));
    site.is("command backup", "green", &[]);
    let probed = |is_up| Fact::Probe { name: name("vendor"), is_up, found: "refused".to_owned() };
    site.add_here("production", None, probed(false));
    site.is("probe vendor", "red", &["refused"]);
    site.add_here("production", None, probed(true));
    site.is("probe vendor", "green", &[]);
    site.begun = Some(site.now);
    site.now += Duration::from_secs(601);
    // What was looked at when the rollout began counts while it waits; for another rollout it does not.
    site.is("command backup", "green", &[]);
    site.begun = None;
    site.is("command backup", "red", &["10m 1s old"]);
}

#[test]
fn an_override_is_green_and_says_so_for_these_releases_only() {
    let mut site = Site::new(approvals(1, false));
    let fact = Fact::Override { gate: "approval operator".to_owned(), why: "the site is down".to_owned() };
    site.add_here("staging", None, fact.clone());
    site.is("approval operator", "red", &[]);
    site.add(2, fact.clone());
    site.is("approval operator", "red", &[]);
    site.add_here("production", None, fact);
    site.is("approval operator", "green", &["overridden by bob@desk: the site is down", "nobody has"]);
    site.production().gates.release_note = true;
    site.is("release_note (web)", "red", &[]);
}
