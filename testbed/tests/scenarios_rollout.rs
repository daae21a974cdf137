//! Scenarios of rollouts behind a real HAProxy, under load: rolling, halves, rings, and back.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::Duration;

use greenlight_testbed::{Bed, HaProxy, Init, Load};
use support::{DEADLINE, Site, action_of, fleet};

/// Keeps HAProxy's own log in memory, with microseconds, where `show events` reads it.
const LOG: &str = "ring events\n    format timed\n    maxlen 1200\n    size 262144\n\nglobal\n    log ring@events local0\n\n";

const WEB: &str = r#"
[environment.production]
hosts.web = ["px[1-2]"]
balancer = { haproxy = "lb:/run/haproxy/admin.sock", backend = "web" }
timeouts = { admit = "20s" }
"#;

/// HAProxy in front of a port of these hosts.
fn haproxy(bed: &Bed, backend: &str, port: u16, hosts: &[&str]) -> HaProxy {
    let servers: Vec<_> = hosts.iter().map(|host| (*host, (bed.host(host).address(), port).into())).collect();
    let web = HaProxy::web(80, backend, "/health", &servers);
    bed.haproxy("lb", &format!("{LOG}{web}    log global\n")).unwrap()
}

/// What HAProxy logged of servers that left traffic (`out`) and were let in again and UP (`in`), in order.
fn changes(haproxy: &HaProxy) -> Vec<(&'static str, String)> {
    const CHANGES: [(&str, &str); 3] =
        [("enters drain state", "out"), (" is DOWN", "out"), ("is UP (leaving forced drain)", "in")];
    let log = haproxy.command("show events events").unwrap();
    let lines = log.lines().filter_map(|line| line.split_once("Server web/").map(|(_, rest)| rest));
    lines
        .filter_map(|rest| {
            let server = rest.split_whitespace().next()?;
            let (_, change) = CHANGES.into_iter().find(|(words, _)| rest.contains(words))?;
            Some((change, server.to_owned()))
        })
        .collect()
}

#[test]
fn a15_two_hosts_change_one_after_the_other_and_no_request_fails() {
    let bed = Bed::builder("a15").hosts(["px1", "px2"], Init::None).host("lb", Init::None).up().unwrap();
    let haproxy = haproxy(&bed, "web", 8000, &["px1", "px2"]);
    let site = Site::new(&bed, &fleet("web", 8000, WEB));
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&[("px1", "v1"), ("px2", "v1")]);
    haproxy.wait_until_up("web", DEADLINE).unwrap();

    let load = Load::to((haproxy.host().address(), 80).into()).connections(4).per_second(200).start(&bed);
    load.wait_for(100, DEADLINE).unwrap();
    let before = changes(&haproxy).len();
    site.release("v2", &[]);
    let ended = site.greenlight(&["deploy", "production"]).exits(0);
    load.wait_for(100, DEADLINE).unwrap();
    let report = load.stop().unwrap();
    println!("{ended}{report:?}\n{}", haproxy.command("show events events").unwrap());
    assert_eq!((report.failed, &report.reasons), (0, &vec![]), "{report:?}");
    assert!(report.versions["v1"] > 100 && report.versions["v2"] > 100, "{report:?}");
    site.runs("web", 8000, &[("px1", "v2"), ("px2", "v2")]);

    // HAProxy's own log: the first was let in and UP before the second was taken out.
    let mut changes: Vec<_> = changes(&haproxy).split_off(before);
    // A process that restarts is also seen as down, while it is out already.
    changes.dedup();
    let order: Vec<_> = changes.iter().map(|(change, server)| (*change, server.as_str())).collect();
    assert_eq!(order, [("out", "px1"), ("in", "px1"), ("out", "px2"), ("in", "px2")]);
    // And the second was restarted only after it had been taken out.
    let begun = site.begun("production");
    let of = |action: &str| begun.iter().position(|begun| begun == action).unwrap();
    assert!(of("admit px1") < of("drain px2") && of("drain px2") < of("activate px2"), "{begun:?}");
}

#[test]
fn a9_the_old_half_serves_all_when_the_first_half_fails() {
    let hosts = ["px1", "px2", "px3", "px4"];
    let bed = Bed::builder("a9").hosts(hosts, Init::None).host("lb", Init::None).up().unwrap();
    let haproxy = haproxy(&bed, "web", 8000, &hosts);
    let environment = WEB.replace("px[1-2]", "px[1-4]")
        + "strategy = { kind = \"halves\", keep_for = \"1h\", floor = 2 }\n";
    let site = Site::new(&bed, &fleet("web", 8000, &environment));
    let rolling = environment.replace("halves\", keep_for = \"1h\"", "rolling\", batch = 4");
    site.fleet(&fleet("web", 8000, &rolling));
    let old = hosts.map(|host| (host, "v1"));
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&old);
    haproxy.wait_until_up("web", DEADLINE).unwrap();
    site.fleet(&fleet("web", 8000, &environment));
    let pids = ["px3", "px4"].map(|host| site.pid(host, 8000));

    let load = Load::to((haproxy.host().address(), 80).into()).connections(4).per_second(100).start(&bed);
    load.wait_for(50, DEADLINE).unwrap();
    site.release("v2", &[("UNHEALTHY", "")]);
    // Within the process's 20 s to answer, and the way back.
    let started = std::time::Instant::now();
    let ended = site.greenlight(&["deploy", "production"]).exits(1);
    let took = started.elapsed();
    load.wait_for(50, DEADLINE).unwrap();
    let report = load.stop().unwrap();
    println!("{ended}{took:?} {report:?}");
    ended.says(&["TURNED BACK", "GET /health on port 8000 answered 500"]).ends_with(&old);
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!((report.failed, report.versions["v1"]), (0, report.requests), "{report:?}");
    site.runs("web", 8000, &old);
    // The old half served all the while: its processes are the same.
    assert_eq!(["px3", "px4"].map(|host| site.pid(host, 8000)), pids);
    haproxy.wait_until_up("web", DEADLINE).unwrap();
    let begun = site.begun("production");
    assert!(!begun.iter().any(|begun| begun == "activate px3" || begun == "activate px4"), "{begun:?}");
}

#[test]
fn a8_a_red_stage_keeps_operational_hosts_untouched() {
    let bed = Bed::builder("a8").hosts(["dev", "stage", "ops1", "ops2"], Init::None).up().unwrap();
    let environments = r#"
[environment.dev]
hosts.web = ["dev"]

[environment.stage]
hosts.web = ["stage"]
after = { environment = "dev" }

[environment.operational]
hosts.web = ["ops[1-2]"]
after = { environment = "stage" }
"#;
    let stateful = |text: &str| text.replace("--port {port}", "--port {port} --state /var/lib/web");
    let site = Site::new(&bed, &stateful(&fleet("web", 8000, environments)));
    site.greenlight(&["deploy", "operational"]).exits(3).says(&["stage", "nothing was changed"]);
    site.greenlight(&["deploy", "dev"]).exits(0);
    site.greenlight(&["deploy", "stage"]).exits(0);
    site.greenlight(&["deploy", "operational"]).exits(0).ends_with(&[("ops1", "v1"), ("ops2", "v1")]);
    bed.host("dev").run("rm", &["/var/lib/web/written-by"]).unwrap();
    let pids = ["ops1", "ops2"].map(|host| site.pid(host, 8000));

    // A release that dev accepts and stage does not: its own state there was left by another version.
    site.release("v2", &[("STATE_INTOLERANT", "")]);
    site.greenlight(&["deploy", "dev"]).exits(0);
    site.greenlight(&["deploy", "stage"]).exits(1).says(&["TURNED BACK"]).ends_with(&[("stage", "v1")]);
    let ended = site.greenlight(&["deploy", "operational"]);
    println!("{ended}");
    ended.exits(2).says(&["v2", "is marked bad"]);
    // Not bad any more, it still has not been through stage.
    site.greenlight(&["releases", "mark", "v2", "--good"]).exits(0);
    site.greenlight(&["deploy", "operational"]).exits(3).says(&["stage", "nothing was changed"]);
    site.greenlight(&["plan", "operational"]).exits(3);
    site.runs("web", 8000, &[("ops1", "v1"), ("ops2", "v1")]);
    assert_eq!(["ops1", "ops2"].map(|host| site.pid(host, 8000)), pids);
    for host in ["ops1", "ops2"] {
        let releases = bed.host(host).run("ls", &["/srv/web/releases"]).unwrap();
        assert_eq!(releases.lines().count(), 1, "{releases}");
    }
}

#[test]
fn a16_rollback_goes_where_it_is_told_and_never_to_a_bad_release() {
    let bed = Bed::builder("a16").hosts(["px1", "px2"], Init::None).host("lb", Init::None).up().unwrap();
    let haproxy = haproxy(&bed, "web", 8000, &["px1", "px2"]);
    let site = Site::new(&bed, &fleet("web", 8000, WEB));
    for version in ["v1", "v2", "v3"] {
        if version != "v1" {
            site.release(version, &[]);
        }
        site.greenlight(&["deploy", "production"]).exits(0);
    }
    haproxy.wait_until_up("web", DEADLINE).unwrap();
    let load = Load::to((haproxy.host().address(), 80).into()).connections(2).per_second(100).start(&bed);
    load.wait_for(20, DEADLINE).unwrap();

    // Without a release: the last that was healthy on the whole environment.
    let both = |version| [("px1", version), ("px2", version)];
    let ended = site.greenlight(&["rollback", "production"]).exits(0).ends_with(&both("v2"));
    println!("{ended}");
    site.runs("web", 8000, &both("v2"));
    // To a named one.
    site.greenlight(&["rollback", "production", "v1"]).exits(0).ends_with(&both("v1"));
    site.runs("web", 8000, &both("v1"));
    // On one host.
    let ended = site.greenlight(&["rollback", "production", "v3", "--host", "px2"]).exits(0);
    println!("{ended}");
    site.runs("web", 8000, &[("px1", "v1"), ("px2", "v3")]);
    // Never to a bad one, by name or by itself.
    site.greenlight(&["releases", "mark", "v2", "--bad", "it loses mail"]).exits(0);
    let begun = site.json(&["history", "production"])["rollouts"].as_array().unwrap().len();
    site.greenlight(&["rollback", "production", "v2"]).exits(2).says(&[
        "v2",
        "is marked bad: it loses mail",
        "greenlight releases mark",
    ]);
    assert_eq!(site.json(&["history", "production"])["rollouts"].as_array().unwrap().len(), begun);
    site.runs("web", 8000, &[("px1", "v1"), ("px2", "v3")]);
    site.greenlight(&["deploy", "production", "v3"]).exits(0).ends_with(&both("v3"));
    site.greenlight(&["rollback", "production"]).exits(0).ends_with(&both("v1"));
    site.runs("web", 8000, &both("v1"));

    let report = load.stop().unwrap();
    println!("{report:?}");
    assert_eq!((report.failed, &report.reasons), (0, &vec![]), "{report:?}");
    let versions: Vec<_> = report.versions.keys().map(String::as_str).collect();
    assert_eq!(versions, ["v1", "v2", "v3"]);
}

#[test]
fn batches_keep_the_floor_and_one_failing_host_is_left_out() {
    let hosts = ["px1", "px2", "px3", "px4"];
    let bed = Bed::builder("batch").hosts(hosts, Init::None).host("lb", Init::None).up().unwrap();
    let haproxy = haproxy(&bed, "web", 8000, &hosts);
    let environment = |rest: &str| fleet("web", 8000, &(WEB.replace("px[1-2]", "px[1-4]") + rest));
    let site = Site::new(&bed, &environment("strategy = { kind = \"rolling\", batch = \"25%\" }\n"));
    let waves = |site: &Site| {
        let plan = site.json(&["plan", "production"]);
        let waves = plan["plan"]["waves"].as_array().unwrap();
        waves.iter().map(|wave| wave["instances"].as_array().unwrap().len()).collect::<Vec<_>>()
    };
    assert_eq!(waves(&site), [1, 1, 1, 1]);
    site.fleet(&environment("strategy = { kind = \"rolling\", batch = 4 }\n"));
    site.greenlight(&["deploy", "production"]).exits(0);
    haproxy.wait_until_up("web", DEADLINE).unwrap();
    let load = Load::to((haproxy.host().address(), 80).into()).connections(4).per_second(100).start(&bed);
    load.wait_for(50, DEADLINE).unwrap();

    // The batch of two may take one host out at a time only, since three must serve.
    site.release("v2", &[]);
    site.fleet(&environment("strategy = { kind = \"rolling\", batch = [1, 2], floor = 3 }\n"));
    assert_eq!(waves(&site), [1, 2, 1]);
    let mark = changes(&haproxy).len();
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&hosts.map(|host| (host, "v2")));
    let mut out = std::collections::BTreeSet::new();
    for (change, server) in changes(&haproxy).split_off(mark) {
        if change == "in" {
            out.remove(&server);
        } else {
            out.insert(server);
        }
        assert!(out.len() <= 1, "{out:?} were out at once");
    }

    // One host may fail.
    bed.host("px2").run("rm", &["/usr/bin/python3"]).unwrap();
    site.release("v3", &[]);
    site.fleet(&environment("failure_budget = 1\nstrategy = { kind = \"rolling\", batch = \"50%\" }\n"));
    let ended = site.greenlight(&["deploy", "production"]).exits(0);
    println!("{ended}");
    let report = load.stop().unwrap();
    ended.says(&["left out", "px2"]).ends_with(&[("px1", "v3"), ("px3", "v3"), ("px4", "v3"), ("px2", "v2")]);
    assert_eq!((report.failed, &report.reasons), (0, &vec![]), "{report:?}");
}

#[test]
fn a_balancer_in_another_state_than_expected_is_named() {
    let bed = Bed::builder("maint").hosts(["px1", "px2"], Init::None).host("lb", Init::None).up().unwrap();
    let haproxy = haproxy(&bed, "web", 8000, &["px1", "px2"]);
    let site = Site::new(&bed, &fleet("web", 8000, WEB));
    site.greenlight(&["deploy", "production"]).exits(0);
    haproxy.wait_until_up("web", DEADLINE).unwrap();
    site.release("v2", &[]);

    // Someone took a server out by hand, and did not say why.
    haproxy.command("set server web/px1 state maint").unwrap();
    let ended = site.greenlight(&["deploy", "production"]);
    println!("{ended}");
    assert_ne!(ended.code, Some(0), "{ended}");
    ended.says(&["px1", "maint"]);
    assert_eq!(haproxy.server_states("web").unwrap()[0].1, "MAINT", "it stays as the person left it");
    haproxy.command("set server web/px1 state ready").unwrap();
    haproxy.wait_until_up("web", DEADLINE).unwrap();

    site.fleet(&fleet("web", 8000, &WEB.replace("backend = \"web\"", "backend = \"wbe\"")));
    let pids = ["px1", "px2"].map(|host| site.pid(host, 8000));
    let ended = site.greenlight(&["deploy", "production"]);
    println!("{ended}");
    assert_ne!(ended.code, Some(0), "{ended}");
    ended.says(&["wbe", "lb:/run/haproxy/admin.sock"]);
    assert_eq!(["px1", "px2"].map(|host| site.pid(host, 8000)), pids);
    let records = site.records("production");
    assert!(!records.iter().map(action_of).any(|action| action.starts_with("activate")), "{records:?}");
}
