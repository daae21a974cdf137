//! The hosts' own guard: a controller that dies after it sent an activation, and a line that is cut, under each manager of
//! processes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use greenlight_testbed::{Bed, Host, Init, wait};
use serde_json::Value;
use support::{DEADLINE, Site};

const HOSTS: [(&str, Init); 3] = [("px1", Init::Systemd), ("px2", Init::Supervisord), ("px3", Init::None)];
const PORT: u16 = 8000;

/// All hosts change at once, so that all of them wait for their confirmation at once.
const FLEET: &str = r#"
[service.web]

[service.web.process.web]
run = "python3 app.py --port {port}"
port = 8000
health = { http = "/health", release = "/version" }
start_timeout = "10s"
stop_timeout = "2s"

[environment.production]
hosts.web = ["px[1-3]"]
strategy = { kind = "rolling", batch = [3], floor = 0 }
timeouts = { confirm = "3s" }
"#;
/// What `timeouts.confirm` and the process's own times make of it.
const LIMIT: Duration = Duration::from_secs(15);
/// From the moment at which a guard fires: the process is stopped within its time, and the old one proves itself within its
/// own.
const GOING_BACK: Duration = Duration::from_secs(12);
/// Between the switch and the first answer, so that the controller dies before there is anything to confirm.
const SLOW_START_MS: &str = "5000";

#[test]
fn hosts_go_back_by_themselves_when_nobody_confirms() {
    let bed = HOSTS.into_iter().fold(Bed::builder("guard"), |bed, (name, init)| bed.host(name, init));
    let bed = bed.up().unwrap();
    let site = Site::new(&bed, FLEET);
    site.greenlight(&["deploy", "production"])
        .exits(0)
        .says(&["guard: web goes back by itself after 15.0s unless confirmed"])
        .ends_with(&[("px1", "v1"), ("px2", "v1"), ("px3", "v1")]);
    leaves_nothing(&bed);

    // Killed, gone back, and gone on with.
    site.release("v2", &[("SLOW_START", SLOW_START_MS)]);
    let killed = kill_before_confirmation(&site, "v2");
    site.greenlight(&["status", "production"]).says(&["goes back to v1", "by itself in", "unless confirmed"]);
    goes_back(&bed, killed, "v1");
    leaves_nothing(&bed);
    site.greenlight(&["status", "production"]).exits(3).says(&[
        "went back to v1",
        "by itself",
        "not confirmed within 15.0s",
        "next: px1/web activate v2",
    ]);
    let document = site.json(&["status", "production"]);
    for instance in document["environments"][0]["instances"].as_array().unwrap() {
        let ledger = &instance["report"]["ledger"];
        let history = ledger["history"].as_array().unwrap();
        assert_eq!(history.last().unwrap()["event"], "turned_back", "{ledger}");
        assert_eq!(
            history.last().unwrap()["generation"],
            ledger["generation"],
            "the generation stays: {ledger}"
        );
        assert_eq!(ledger["guard"], Value::Null);
    }
    site.greenlight(&["resume", "production"]).exits(0).ends_with(&[
        ("px1", "v2"),
        ("px2", "v2"),
        ("px3", "v2"),
    ]);
    site.runs("web", PORT, &[("px1", "v2"), ("px2", "v2"), ("px3", "v2")]);
    leaves_nothing(&bed);

    // The same, and one host does not even hear that the controller has gone; then everything is turned back.
    site.release("v3", &[("SLOW_START", SLOW_START_MS)]);
    let killed = kill_before_confirmation(&site, "v3");
    bed.host("px3").cut().unwrap();
    goes_back(&bed, killed, "v2");
    bed.host("px3").heal().unwrap();
    let pids = HOSTS.map(|(name, _)| site.pid(name, PORT));
    site.greenlight(&["abort", "production"]).exits(1).says(&["TURNED BACK"]).ends_with(&[
        ("px1", "v2"),
        ("px2", "v2"),
        ("px3", "v2"),
    ]);
    site.runs("web", PORT, &[("px1", "v2"), ("px2", "v2"), ("px3", "v2")]);
    assert_eq!(HOSTS.map(|(name, _)| site.pid(name, PORT)), pids, "what had gone back is not started again");
    leaves_nothing(&bed);
}

/// Deploys a release, and kills the controller when every host has switched to it and none answers yet.
fn kill_before_confirmation(site: &Site<'_>, version: &str) -> Instant {
    let deploy = site.begin(&["deploy", "production", "--yes"]);
    for (name, _) in HOSTS {
        let host = site.bed.host(name);
        wait::until(&format!("{name} to be switched"), DEADLINE, || {
            let linked = host.read("/srv/web/current/VERSION").unwrap();
            if linked == version { Ok(()) } else { Err(linked) }
        })
        .unwrap();
    }
    deploy.signal("KILL");
    let killed = Instant::now();
    assert_eq!(deploy.end().code, None, "the controller was killed");
    killed
}

/// Each host answers as this version again within the stated time. It asks itself, so a cut line does not matter.
fn goes_back(bed: &Bed, killed: Instant, version: &str) {
    std::thread::scope(|scope| {
        for (name, init) in HOSTS {
            scope.spawn(move || {
                let host = bed.host(name);
                wait::until(&format!("{name} to go back"), DEADLINE, || {
                    let is_over = ledger(host)["guard"].is_null();
                    let said = ask_itself(host)?;
                    if is_over && said == version { Ok(()) } else { Err(said) }
                })
                .unwrap();
                let took = killed.elapsed();
                println!("{name} ({init:?}): {:.1} s from the kill to {version}", took.as_secs_f64());
                assert!(took <= LIMIT + GOING_BACK, "{name} took {took:?}");
            });
        }
    });
}

fn ask_itself(host: &Host) -> Result<String, String> {
    const ASK: &str = "import json, urllib.request as u; print(json.load(u.urlopen('http://127.0.0.1:8000/version'))['version'])";
    let said = host.run("python3", &["-c", ASK]).map_err(|error| error.to_string())?;
    Ok(said.trim().to_owned())
}

fn ledger(host: &Host) -> Value {
    serde_json::from_str(&host.read("/srv/web/.greenlight/ledger").unwrap()).unwrap()
}

/// No guard has left a file, a process or a unit on any host.
fn leaves_nothing(bed: &Bed) {
    for (name, init) in HOSTS {
        let host = bed.host(name);
        assert!(!host.exists("/srv/web/.greenlight/guard").unwrap(), "{name}");
        wait::until(&format!("the guards of {name} to be gone"), DEADLINE, || {
            let processes = host.run("ps", &["-eo", "args"]).unwrap();
            let units = match init {
                Init::Systemd => {
                    host.run("systemctl", &["list-units", "--all", "--plain", "greenlight-guard-*"]).unwrap()
                }
                Init::Supervisord | Init::None => String::new(),
            };
            let left = [processes, units].concat();
            let left: Vec<_> = left
                .lines()
                .filter(|line| line.contains("agent guard") || line.contains("-guard-"))
                .collect();
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        })
        .unwrap();
    }
}
