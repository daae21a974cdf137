//! Scenarios in which something is wrong, and what Greenlight refuses, halts at, or turns back.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use greenlight_testbed::{Bed, Init};
use support::{Site, fleet};

const HOSTS: &str = "\n[environment.production]\nhosts.web = [\"px[1-3]\"]\n";

fn bed(name: &str) -> Bed {
    Bed::builder(name).hosts(["px1", "px2", "px3"], Init::None).up().unwrap()
}

fn all(version: &str) -> [(&str, &str); 3] {
    ["px1", "px2", "px3"].map(|host| (host, version))
}

#[test]
fn a1_a_shared_log_is_refused_by_check_and_by_deploy() {
    let bed = Bed::builder("a1").host("px1", Init::None).up().unwrap();
    let shared = "stdout = \"logs/all.log\"\nstderr = \"logs/all.log\"\n";
    let site = Site::new(&bed, &fleet("web", 8000, &format!("{shared}{}", HOSTS.replace("px[1-3]", "px1"))));
    for arguments in [&["check"][..], &["plan", "production"], &["deploy", "production"]] {
        let ended = site.greenlight(arguments).exits(2);
        println!("{ended}");
        ended.says(&["process `web`", "stderr = \"logs/all.log\"", "greenlight.toml"]);
    }
    site.is_untouched("web", "px1");
}

#[test]
fn a13_a_stop_that_does_not_stop_halts_the_rollout_there() {
    let bed = bed("a13");
    let stop = "stop = \"python3 -c pass\"\nstop_timeout = \"2s\"\n";
    let toml = fleet("web", 8000, &format!("{stop}{HOSTS}")).replacen("stop_timeout = \"5s\"\n", "", 1);
    let site = Site::new(&bed, &toml);
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v1"));
    let pids = all("").map(|(host, _)| site.pid(host, 8000));

    site.release("v2", &[]);
    let ended = site.greenlight(&["deploy", "production"]);
    println!("{ended}");
    // The old process was never gone, so the host runs what it ran; nothing was changed that would have to go back.
    let ended = ended.exits(1).says(&[
        "px1/web",
        "the stop command of process web",
        "the process is still alive",
        &pids[0],
    ]);
    ended.ends_with(&all("v1"));
    assert_eq!(all("").map(|(host, _)| site.pid(host, 8000)), pids, "no process was restarted");
    site.runs("web", 8000, &all("v1"));
    let begun = site.begun("production");
    assert!(!begun.iter().any(|begun| begun == "activate px2" || begun == "activate px3"), "{begun:?}");
}

#[test]
fn a14_a_crash_on_the_predecessors_state_is_found_on_the_first_wave() {
    let bed = bed("a14");
    let stateful = fleet("web", 8000, HOSTS).replace("--port {port}", "--port {port} --state /var/lib/web");
    let site = Site::new(&bed, &stateful);
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v1"));
    let pids = all("").map(|(host, _)| site.pid(host, 8000));

    site.release("v2", &[("STATE_INTOLERANT", "")]);
    let ended = site.greenlight(&["deploy", "production"]).exits(1);
    println!("{ended}");
    ended
        .says(&["TURNED BACK", "px1/web", "cannot read the state that v1 left in /var/lib/web"])
        .ends_with(&all("v1"));
    site.runs("web", 8000, &all("v1"));
    let after = all("").map(|(host, _)| site.pid(host, 8000));
    assert_ne!(after[0], pids[0], "px1 was tried");
    assert_eq!(after[1..], pids[1..], "the others were not");
    site.greenlight(&["releases"]).exits(0).says(&["bad"]);
    site.greenlight(&["deploy", "production", "v2"]).exits(2).says(&[
        "v2",
        "is marked bad",
        "it ended with exit status 1",
    ]);
}

#[test]
fn a19_a_smoke_start_leaves_the_live_process_alone() {
    let bed = bed("a19");
    let site = Site::new(&bed, &fleet("web", 8000, &format!("smoke = {{ port = 18000 }}\n{HOSTS}")));
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v1"));
    let pids = all("").map(|(host, _)| site.pid(host, 8000));

    // What the smoke start finds is found while everything runs.
    site.release("v2", &[("UNHEALTHY", "")]);
    let ended = site.greenlight(&["deploy", "production"]).exits(1);
    println!("{ended}");
    ended.says(&["smoke", "/health"]);
    site.runs("web", 8000, &all("v1"));
    assert_eq!(all("").map(|(host, _)| site.pid(host, 8000)), pids);
    let begun = site.begun("production");
    assert!(begun.iter().any(|begun| begun == "smoke px1"), "{begun:?}");
    assert!(!begun.iter().any(|begun| begun.starts_with("activate")), "{begun:?}");
    for host in ["px1", "px2", "px3"] {
        let listening = bed.host(host).run("ss", &["-Hltn"]).unwrap();
        assert!(listening.contains(":8000") && !listening.contains(":18000"), "{listening}");
        // Nothing of the smoke start runs on: one process of the application, and its supervisor.
        let running = bed.host(host).run("ps", &["-eo", "pid,args"]).unwrap();
        assert_eq!(running.matches("app.py --port").count(), 1, "{running}");
    }
    // And a good one passes it.
    site.release("v3", &[]);
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v3"));
}

#[test]
fn a22_a_data_file_in_the_release_is_found_before_anything_changes() {
    let bed = bed("a22");
    let site = Site::new(&bed, &fleet("web", 8000, HOSTS));
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v1"));
    let pids = all("").map(|(host, _)| site.pid(host, 8000));
    let database = "/srv/web/current/bucket.sqlite3";
    bed.host("px2").write(database, 0o644, "SQLite format 3\0").unwrap();

    site.release("v2", &[]);
    let ended = site.greenlight(&["deploy", "production"]).exits(1);
    println!("{ended}");
    ended.says(&["px2", "bucket.sqlite3", "shared"]);
    site.runs("web", 8000, &all("v1"));
    assert_eq!(all("").map(|(host, _)| site.pid(host, 8000)), pids);
    assert_eq!(bed.host("px2").read(database).unwrap(), "SQLite format 3\0");
    let begun = site.begun("production");
    assert!(begun.iter().all(|begun| begun.starts_with("preflight")), "{begun:?}");
}
