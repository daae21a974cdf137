//! Scenarios of a canary, under load, with a real HAProxy and with the built-in router in front: A21, and guards.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::print_stdout, reason = "what was measured stands in the output of the test")]

mod support;

use std::time::{Duration, Instant};

use greenlight_testbed::{Bed, Init, Load, LoadHandle, LoadReport, greenlight_binary, wait};
use serde_json::Value;
use support::{DEADLINE, Site, fleet};

/// Until a verdict: it takes thousands of requests, and machines are busy.
const VERDICT_DEADLINE: Duration = Duration::from_secs(240);
/// Alert to the last request that the canary gets.
const SWITCH_MS_MAX: i64 = 1_000;
const ROUTER: &str = "/run/router.sock";

fn environment(balancer: &str, canary: &str) -> String {
    let rest = format!(
        "[environment.production]\nhosts.web = [\"px[1-2]\"]\nbalancer = {{ {balancer} }}\ntimeouts = {{ admit = \"20s\" }}\n\
         strategy = \"canary\"\n\n[environment.production.canary]\nwarmup = \"0s\"\n{canary}\n"
    );
    fleet("web", 8000, &rest)
}

/// The built-in router on `lb`, in front of port 8000 of these hosts. It ends with the bed.
fn start_router(bed: &Bed, hosts: &[&str]) {
    let lb = bed.host("lb");
    lb.write("/usr/local/bin/greenlight", 0o755, std::fs::read(greenlight_binary().unwrap()).unwrap())
        .unwrap();
    let backend = |host: &&str| {
        let address = format!("{}:8000", bed.host(host).address());
        serde_json::json!({ "name": host, "address": address, "health": "/health" })
    };
    let state =
        serde_json::json!({ "generation": 1, "backends": hosts.iter().map(backend).collect::<Vec<_>>() });
    lb.write("/etc/router.json", 0o644, state.to_string()).unwrap();
    let words = ["router", "--listen", "0.0.0.0:80", "--control", ROUTER, "--state", "/etc/router.json"];
    let mut command = lb.command("setsid").unwrap();
    command.args(["--fork", "/usr/local/bin/greenlight"]).args(words);
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    command.stderr(std::fs::File::create(bed.directory().join("router.log")).unwrap());
    assert!(command.status().unwrap().success());
    wait::until("the router", DEADLINE, || {
        if lb.exists(ROUTER).map_err(|error| error.to_string())? {
            Ok(())
        } else {
            Err("no socket".to_owned())
        }
    })
    .unwrap();
}

fn load(bed: &Bed) -> Load {
    Load::to((bed.host("lb").address(), 80).into()).connections(8).per_second(400)
}

/// Nothing but what the application itself answered.
#[track_caller]
fn is_nothing_lost(report: &LoadReport) {
    let foreign = report.statuses.keys().any(|status| ![200, 500].contains(status));
    assert_eq!((foreign, report.statuses.values().sum::<u64>()), (false, report.requests), "{report:?}");
}

/// Waits until a version gets nothing of several hundred requests.
fn is_left_alone(running: &LoadHandle, version: &str) {
    let begun = Instant::now();
    let seen = || (running.report().requests, running.report().versions.get(version).copied());
    let mut last = seen();
    wait::until(&format!("{version} to be left alone"), DEADLINE, || {
        let now = seen();
        if now.1 != last.1 {
            last = now;
        } else if now.0 > last.0 + 300 {
            return Ok(());
        }
        Err(format!("requests and those of {version}: {last:?}, {now:?}"))
    })
    .unwrap();
    println!("{version} gets nothing any more, {:?} after its controller was killed", begun.elapsed());
}

/// When the rollout turned back, and why.
fn turned_back(site: &Site<'_>) -> (i64, String) {
    let records = site.records("production");
    let of = |record: &&Value| record["body"]["note"]["turn"] == "turn_back";
    let record = records.iter().find(of).unwrap_or_else(|| panic!("{records:#?}"));
    (ms_of_day(record["at"].as_str().unwrap()), record["body"]["note"]["why"].as_str().unwrap().to_owned())
}

const DAY_MS: i64 = 86_400_000;

/// Of a time in UTC such as `2026-11-21T19:20:01.123456Z`.
fn ms_of_day(at: &str) -> i64 {
    let (_, time) = at.trim_end_matches('Z').split_once('T').unwrap();
    let parts: Vec<f64> = time.split(':').map(|part| part.parse().unwrap()).collect();
    ((parts[0] * 3600.0 + parts[1] * 60.0 + parts[2]) * 1000.0) as i64
}

/// From the alert to the last request that a version got; below 0 when it had got its last before.
fn switch_ms(report: &LoadReport, version: &str, alert_ms: i64) -> i64 {
    let last = i64::try_from(report.last_begun_ms[version]).unwrap() % DAY_MS;
    // Midnight may lie between them.
    (last - alert_ms + DAY_MS / 2).rem_euclid(DAY_MS) - DAY_MS / 2
}

/// The evidence file of the last rollout gives the same answer again.
#[track_caller]
fn replays(site: &Site<'_>, culprit: &str) {
    let history = site.json(&["history", "production", "-n", "1"]);
    let id = history["rollouts"][0]["plan"]["id"].as_str().unwrap();
    let path = site.project.path().join(format!(".greenlight/evidence/{id}-web.jsonl"));
    let replayed = site.json(&["verdict", "replay", path.to_str().unwrap()]);
    assert_eq!(replayed["conclusion"], replayed["recorded"], "{replayed:#}");
    assert_eq!(replayed["conclusion"]["verdict"], "abort", "{replayed:#}");
    assert!(replayed["conclusion"].to_string().contains(culprit), "{replayed:#}");
}

/// A21: 30 % of the traffic are 30 %; three errors of a hundred instead of one, at 10 % of the traffic, are found, and from
/// then on stable gets everything until a person says otherwise.
fn a21(bed: &Bed, balancer: &str) {
    let site = Site::new(bed, &environment(balancer, "steps = [\"30% for 1s\"]"));
    site.release("base", &[("ERRORS", "10")]);
    site.greenlight(&["deploy", "production"]).exits(0);
    site.fleet(&environment(balancer, "steps = [\"30% until pass\"]\ncompare = [{ metric = \"errors\" }]"));
    site.release("v2", &[("ERRORS", "10")]);
    let running = load(bed).start(bed);
    running.wait_for(100, DEADLINE).unwrap();
    let mut deploy = site.begin(&["deploy", "production", "--verbose"]);
    deploy.wait_for("canary at 30%");
    let of = |version: &str| running.report().versions.get(version).copied().unwrap_or(0) as f64;
    let before = (of("base"), of("v2"));
    // Twice as many as the scenario has: with 1,000 one run in 2,000 would be beyond its bounds by chance.
    running.wait_for(2_000, DEADLINE).unwrap();
    let (base, v2) = (of("base") - before.0, of("v2") - before.1);
    let share = v2 / (base + v2);
    println!("share at 30 %: {share:.3} of {}", base + v2);
    // The share is lent: it ends when the controller has died, and begins again when another one goes on.
    deploy.signal("KILL");
    deploy.end();
    is_left_alone(&running, "v2");
    let resumed = site.begin(&["resume", "production"]);
    let lent_before = of("v2");
    wait::until("v2 to get its share again", DEADLINE, || {
        let lent = of("v2") - lent_before;
        if lent > 50.0 { Ok(()) } else { Err(format!("{lent} requests")) }
    })
    .unwrap();
    site.greenlight(&["abort", "production"]).exits(0);
    resumed.end_within(VERDICT_DEADLINE).exits(1);

    site.fleet(&environment(balancer, "steps = [\"10% until pass\"]\ncompare = [{ metric = \"errors\" }]"));
    site.release("v3", &[("ERRORS", "30")]);
    let plan = site.greenlight(&["plan", "production"]);
    assert!(plan.stdout.contains("requests a minute now"), "{plan}");
    let ended = site.begin(&["deploy", "production"]).end_within(VERDICT_DEADLINE).exits(1);
    running.wait_for(500, DEADLINE).unwrap();
    let report = running.stop().unwrap();
    println!("{ended}{report:?}");
    is_nothing_lost(&report);
    assert!((0.25..=0.35).contains(&share), "{share}");
    let (at_ms, why) = turned_back(&site);
    assert!(why.contains("errors: canary") && why.contains("px1"), "{why}");
    let switch_ms = switch_ms(&report, "v3", at_ms);
    println!("the last request of the canary was begun {switch_ms} ms after the alert was recorded");
    assert!(switch_ms < SWITCH_MS_MAX, "{switch_ms} ms");
    replays(&site, "errors");
    site.runs("web", 8000, &[("px1", "base"), ("px2", "base")]);
    // Until a person enables it again.
    let refused = site.greenlight(&["deploy", "production"]).exits(2);
    assert!(refused.stderr.contains("is marked bad"), "{refused}");
    site.greenlight(&["releases", "mark", "v3", "--good"]).exits(0);
    site.greenlight(&["plan", "production"]).exits(0);
}

#[test]
fn a21_haproxy_gets_no_more_than_a_part_of_a_bad_canary() {
    let bed = Bed::builder("a21h").hosts(["px1", "px2"], Init::None).host("lb", Init::None).up().unwrap();
    let servers: Vec<_> = ["px1", "px2"].map(|host| (host, (bed.host(host).address(), 8000).into())).into();
    let web = greenlight_testbed::HaProxy::web(80, "web", "/health", &servers);
    bed.haproxy("lb", &web).unwrap();
    a21(&bed, "haproxy = \"lb:/run/haproxy/admin.sock\", backend = \"web\"");
}

#[test]
fn a21_the_router_gets_no_more_than_a_part_of_a_bad_canary() {
    let bed = Bed::builder("a21r").hosts(["px1", "px2"], Init::None).host("lb", Init::None).up().unwrap();
    start_router(&bed, &["px1", "px2"]);
    a21(&bed, &format!("router = \"lb:{ROUTER}\""));
}

#[test]
fn a_canary_that_burns_processor_time_for_each_request_is_turned_back_by_its_guard() {
    let bed = Bed::builder("burn").hosts(["px1", "px2"], Init::None).host("lb", Init::None).up().unwrap();
    start_router(&bed, &["px1", "px2"]);
    let canary = "steps = [\"50% until pass\"]\ncompare = [{ metric = \"errors\" }]\n\
                  guard = [{ metric = \"cpu_per_request\", above = 2.0, hold = \"5s\" }]";
    let balancer = format!("router = \"lb:{ROUTER}\"");
    // There is no traffic yet that could be judged.
    let site = Site::new(&bed, &environment(&balancer, "steps = [\"50% for 1s\"]"));
    site.greenlight(&["deploy", "production"]).exits(0);
    site.fleet(&environment(&balancer, canary));
    let running = load(&bed).per_second(40).start(&bed);
    running.wait_for(100, DEADLINE).unwrap();
    site.release("v2", &[("BURN", "20")]);
    let ended = site.begin(&["deploy", "production"]).end_within(VERDICT_DEADLINE).exits(1);
    let report = running.stop().unwrap();
    println!("{ended}{report:?}");
    is_nothing_lost(&report);
    let (_, why) = turned_back(&site);
    assert!(why.contains("by a guard: px1: CPU per request"), "{why}");
    replays(&site, "CPU per request on px1");
    site.runs("web", 8000, &[("px1", "v1"), ("px2", "v1")]);
}
