//! The hosts' own guard: a controller that dies after it sent an activation, and a line that is cut, under each manager of
//! processes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use greenlight_testbed::{Bed, Host, Init, Sudo, wait};
use serde_json::Value;
use support::{DEADLINE, Site};

/// One host per manager: its name, what boots it, and what runs the service there, which chooses the guard's timer too.
const HOSTS: [(&str, Init, &str); 4] = [
    ("px1", Init::Systemd, "systemd"),
    ("px2", Init::Supervisord, "supervisord"),
    ("px3", Init::None, "agent"),
    ("px4", Init::Systemd, "systemd-user"),
];
const NAMES: [&str; 4] = ["px1", "px2", "px3", "px4"];
/// The account that has a systemd of its own on px4.
const USER: &str = "deploy";
const PORT: u16 = 8000;

/// All hosts change at once, so that all of them wait for their confirmation at once.
const FLEET: &str = r#"
[service.web]

[service.web.process.web]
run = "python3 app.py --port {port}"
port = 8000
health = { http = "/health", release = "/version" }
start_timeout = "8s"
stop_timeout = "2s"

[environment.production]
hosts.web = ["px[1-4]"]
host.px4 = { user = "deploy", root = "/home/deploy/srv", manager = "systemd-user" }
strategy = { kind = "rolling", batch = [4], floor = 0 }
timeouts = { confirm = "2s" }
"#;
/// What `timeouts.confirm` and the process's own times make of it.
const LIMIT: Duration = Duration::from_secs(12);
/// From the moment at which a guard fires: two seconds to stop, eight to start and prove, and what the manager itself takes on a
/// busy machine.
const GOING_BACK: Duration = Duration::from_secs(16);
/// Between the switch and the first answer, so that the controller dies before there is anything to confirm.
const SLOW_START_MS: &str = "4000";

/// The hosts, one of which has an account with a systemd of its own.
fn bed(name: &str) -> Bed {
    let bed = HOSTS.into_iter().fold(Bed::builder(name), |bed, (name, init, _)| bed.host(name, init));
    let bed = bed.up().unwrap();
    bed.host("px4").add_user(USER, Sudo::Nothing).unwrap();
    bed.host("px4").run("loginctl", &["enable-linger", USER]).unwrap();
    wait::until("the user's manager", DEADLINE, || {
        let state = bed.ssh("deploy@px4", &["systemctl --user is-system-running"]);
        state.map_err(|error| error.to_string())
    })
    .unwrap();
    bed
}

#[test]
fn hosts_go_back_by_themselves_when_nobody_confirms() {
    let bed = bed("guard");
    let site = Site::new(&bed, FLEET);
    site.greenlight(&["deploy", "production"])
        .exits(0)
        .says(&["guard: web goes back by itself after 12.0s unless confirmed"])
        .ends_with(&all_on("v1"));
    leaves_nothing(&bed);

    // One host does not even hear that the controller has gone. What it had begun is turned back.
    site.release("v2", &[("SLOW_START", SLOW_START_MS)]);
    let killed = kill_before_confirmation(&site, "v2");
    bed.host("px3").cut().unwrap();
    println!("{:#?}", go_back(&bed, &NAMES, killed, "v1"));
    bed.host("px3").heal().unwrap();
    let pids = HOSTS.map(|(name, ..)| site.pid(name, PORT));
    site.greenlight(&["abort", "production"]).exits(1).says(&["TURNED BACK"]).ends_with(&all_on("v1"));
    answer_as(&site, "v1");
    assert_eq!(HOSTS.map(|(name, ..)| site.pid(name, PORT)), pids, "what had gone back is not started again");
    leaves_nothing(&bed);

    // The same again; somebody looks, and goes on.
    let killed = kill_before_confirmation(&site, "v2");
    site.greenlight(&["status", "production"]).says(&["goes back to v1", "by itself in", "unless confirmed"]);
    println!("{:#?}", go_back(&bed, &NAMES, killed, "v1"));
    leaves_nothing(&bed);
    site.greenlight(&["status", "production"]).exits(3).says(&[
        "went back to v1",
        "by itself",
        "not confirmed within 12.0s",
        "next: px1/web activate v2",
    ]);
    let document = site.json(&["status", "production"]);
    for instance in document["environments"][0]["instances"].as_array().unwrap() {
        let ledger = &instance["report"]["ledger"];
        let last = ledger["history"].as_array().unwrap().last().unwrap();
        assert_eq!(last["event"], "turned_back", "{ledger}");
        assert_eq!(last["generation"], ledger["generation"], "the generation stays: {ledger}");
        assert_eq!(ledger["guard"], Value::Null);
    }
    site.greenlight(&["resume", "production"]).exits(0).ends_with(&all_on("v2"));
    answer_as(&site, "v2");
    leaves_nothing(&bed);
}

/// Each host loses its power with its guard armed, and comes back on its disk.
#[test]
fn hosts_that_were_booted_anew_go_back_all_the_same() {
    let bed = bed("guard-boot");
    let site = Site::new(&bed, FLEET);
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all_on("v1"));
    site.release("v2", &[("SLOW_START", SLOW_START_MS)]);
    kill_before_confirmation(&site, "v2");
    let boots = || NAMES.map(|name| bed.host(name).read("/proc/sys/kernel/random/boot_id").unwrap());
    let before = boots();
    std::thread::scope(|scope| {
        for host in bed.hosts() {
            host.kill().unwrap();
            scope.spawn(|| host.boot().unwrap());
        }
    });
    let booted = Instant::now();
    assert!(boots().iter().all(|boot| !before.contains(boot)), "a boot has an id of its own");

    // Where a manager is started at a boot, nobody has to look.
    println!("{:#?}", go_back(&bed, &["px1", "px2", "px4"], booted, "v1"));
    // Where there is none, nothing runs, and the next look begins the guard's time anew.
    let own = bed.host("px3");
    ask_itself(own).unwrap_err();
    assert_ne!(ledger(own)["guard"], Value::Null);
    let anew = ", which began anew when the machine was started anew";
    site.greenlight(&["status", "production"]).exits(3).says(&[
        "unless confirmed, its time having begun anew: the machine was started anew",
        &format!("not confirmed within 12.0s{anew}"),
    ]);
    println!("{:#?}", go_back(&bed, &["px3"], Instant::now(), "v1"));
    for name in NAMES {
        let ledger = ledger(bed.host(name));
        let last = ledger["history"].as_array().unwrap().last().unwrap();
        assert_eq!(last["event"], "turned_back", "{name}: {ledger}");
        assert!(last["detail"].as_str().unwrap().ends_with(anew), "{name}: {ledger}");
    }
    leaves_nothing(&bed);
    site.greenlight(&["resume", "production"]).exits(0).ends_with(&all_on("v2"));
    answer_as(&site, "v2");
    leaves_nothing(&bed);
}

fn all_on(version: &str) -> [(&'static str, &str); 4] {
    HOSTS.map(|(name, ..)| (name, version))
}

#[track_caller]
fn answer_as(site: &Site<'_>, version: &str) {
    for (name, ..) in HOSTS {
        assert_eq!(site.answer(name, PORT), version, "{name}");
    }
}

/// A path under the service's root.
fn under_root(name: &str, path: &str) -> String {
    let root = if name == "px4" { "/home/deploy/srv" } else { "/srv" };
    format!("{root}/web/{path}")
}

/// Deploys a release, and kills the controller when every host has switched to it and none answers yet.
fn kill_before_confirmation(site: &Site<'_>, version: &str) -> Instant {
    let deploy = site.begin(&["deploy", "production", "--yes"]);
    for (name, ..) in HOSTS {
        let host = site.bed.host(name);
        wait::until(&format!("{name} to be switched"), DEADLINE, || {
            let linked = host.read(&under_root(name, "current/VERSION")).unwrap();
            if linked == version { Ok(()) } else { Err(linked) }
        })
        .unwrap();
    }
    deploy.signal("KILL");
    let killed = Instant::now();
    assert_eq!(deploy.end().code, None, "the controller was killed");
    killed
}

/// Each of the hosts answers as this version again within the stated time. It asks itself, so a cut line does not matter.
fn go_back(bed: &Bed, names: &[&str], since: Instant, version: &str) -> Vec<String> {
    std::thread::scope(|scope| {
        let hosts = HOSTS.iter().filter(|(name, ..)| names.contains(name)).map(|(name, _, manager)| {
            scope.spawn(move || {
                let host = bed.host(name);
                wait::until(&format!("{name} to go back"), DEADLINE, || {
                    let is_over = ledger(host)["guard"].is_null();
                    let said = ask_itself(host)?;
                    if is_over && said == version { Ok(()) } else { Err(said) }
                })
                .unwrap();
                let took = since.elapsed();
                assert!(took <= LIMIT + GOING_BACK, "{name} took {took:?}");
                format!("{name} ({manager}): {:.1} s to {version}", took.as_secs_f64())
            })
        });
        // All are begun before the first is waited for.
        hosts.collect::<Vec<_>>().into_iter().map(|host| host.join().unwrap()).collect()
    })
}

fn ask_itself(host: &Host) -> Result<String, String> {
    const ASK: &str = "import json, urllib.request as u; print(json.load(u.urlopen('http://127.0.0.1:8000/version'))['version'])";
    let said = host.run("python3", &["-c", ASK]).map_err(|error| error.to_string())?;
    Ok(said.trim().to_owned())
}

fn ledger(host: &Host) -> Value {
    serde_json::from_str(&host.read(&under_root(host.name(), ".greenlight/ledger")).unwrap()).unwrap()
}

/// No guard has left a file, a process or a unit on any host.
fn leaves_nothing(bed: &Bed) {
    const LIST: &str = "list-units --all --plain greenlight-guard-*";
    for (name, _, manager) in HOSTS {
        let host = bed.host(name);
        assert!(!host.exists(&under_root(name, ".greenlight/guard")).unwrap(), "{name}");
        wait::until(&format!("the guards of {name} to be gone"), DEADLINE, || {
            let processes = host.run("ps", &["-eo", "args"]).unwrap();
            let units = match manager {
                "systemd" => {
                    let arguments: Vec<_> = LIST.split(' ').collect();
                    host.run("systemctl", &arguments).unwrap()
                }
                "systemd-user" => bed
                    .ssh("deploy@px4", &[&format!("systemctl --user {}", LIST.replace('*', "\\*"))])
                    .unwrap(),
                _ => String::new(),
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
