//! The bed itself: what the other tests stand on has to hold.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use greenlight_testbed::http::{Connection, Request};
use greenlight_testbed::{APPLICATION, Bed, Error, HaProxy, Host, Init, Load, Sudo, states, wait};

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn hosts_of_every_kind_boot_and_answer_over_ssh() {
    let bed = Bed::builder("kinds")
        .host("one", Init::Systemd)
        .host("two", Init::Supervisord)
        .host("three", Init::None)
        .up()
        .unwrap();
    for (name, process) in [("one", "systemd"), ("two", "tini"), ("three", "tini")] {
        assert_eq!(bed.ssh(name, &["hostname"]).unwrap(), format!("{name}\n"));
        assert_eq!(bed.host(name).run("cat", &["/proc/1/comm"]).unwrap(), format!("{process}\n"));
    }
    let state = bed.ssh("one", &["systemctl", "is-system-running"]).unwrap();
    assert_eq!(state.trim(), "running", "{}", bed.ssh("one", &["systemctl", "--failed"]).unwrap());
    let status = bed.ssh("two", &["supervisorctl", "status"]).unwrap();
    assert!(status.contains("sshd") && status.contains("RUNNING"), "{status}");

    // Each has a key of its own, which the controller knows and insists on.
    let keys: Vec<_> =
        bed.hosts().iter().map(|host| host.read("/etc/ssh/ssh_host_ed25519_key.pub").unwrap()).collect();
    assert!(keys[0] != keys[1] && keys[1] != keys[2]);
    std::fs::write(bed.known_hosts(), "").unwrap();
    let refused = bed.ssh("one", &["true"]).unwrap_err().to_string();
    assert!(refused.contains("Host key verification failed"), "{refused}");
    bed.down().unwrap();
}

#[test]
fn hosts_reach_each_other_and_nothing_else() {
    let bed = Bed::builder("network").hosts(["a", "b"], Init::None).up().unwrap();
    bed.ssh("a", &["ping", "-c1", "-W5", "b"]).unwrap();
    bed.ssh("a", &["ping", "-c1", "-W5", &bed.hub_address().to_string()]).unwrap();
    // A path outward would be a default route in the hub.
    assert_eq!(bed.run("ip", &["route", "show", "default"]).unwrap(), "");
    let other = Bed::builder("network").hosts(["a"], Init::None).up().unwrap();
    assert_ne!(bed.hub_address(), other.hub_address());
    let address = other.host("a").address().to_string();
    bed.ssh("a", &["ping", "-c1", "-W1", &address]).unwrap_err();
    assert_eq!(other.ssh("a", &["hostname"]).unwrap(), "a\n");
}

#[test]
fn users_log_in_and_become_root_only_where_they_may() {
    let bed = Bed::builder("users").host("web", Init::Systemd).up().unwrap();
    bed.host("web").add_user("deploy", Sudo::Everything).unwrap();
    bed.host("web").add_user("guest", Sudo::Nothing).unwrap();
    assert_eq!(bed.ssh("deploy@web", &["sudo", "-n", "id", "-un"]).unwrap(), "root\n");
    assert_eq!(bed.ssh("guest@web", &["id", "-un"]).unwrap(), "guest\n");
    let refused = bed.ssh("guest@web", &["sudo", "-n", "id"]).unwrap_err().to_string();
    assert!(refused.contains("a password is required"), "{refused}");
    let own = bed.ssh("guest@web", &["systemctl", "--user", "is-system-running", "--wait"]).unwrap();
    assert_eq!(own.trim(), "running");
}

#[test]
fn faults_and_their_end() {
    for init in [Init::Systemd, Init::Supervisord, Init::None] {
        let bed = Bed::builder("faults").host("web", init).up().unwrap();
        let host = bed.host("web");
        let quick = ["-o", "ConnectTimeout=2", "-o", "BatchMode=yes", "web", "hostname"];

        host.cut().unwrap();
        bed.run("ssh", &quick).unwrap_err();
        assert_eq!(host.run("hostname", &[]).unwrap(), "web\n", "it runs on while it is cut");
        host.heal().unwrap();
        assert_eq!(bed.ssh("web", &["hostname"]).unwrap(), "web\n");

        host.write("/srv/kept", 0o640, "on disk").unwrap();
        host.write("/run/lost", 0o600, "in memory").unwrap();
        host.crash().unwrap();
        assert!(!host.is_up());
        let error = host.command("true").unwrap_err();
        assert!(matches!(error, Error::HostState { state: "down", .. }), "{error}");
        bed.run("ssh", &quick).unwrap_err();

        host.heal().unwrap();
        host.boot().unwrap();
        assert_eq!(bed.ssh("web", &["stat", "-c", "%a", "/srv/kept"]).unwrap(), "640\n");
        assert_eq!(host.read("/srv/kept").unwrap(), "on disk");
        assert!(!host.exists("/run/lost").unwrap());
        let error = host.boot().unwrap_err();
        assert!(matches!(error, Error::HostState { state: "up already", .. }), "{error}");
    }
}

#[test]
fn a_limited_link_is_slow_until_the_limit_is_taken_away() {
    let bed = Bed::builder("rate").host("web", Init::None).up().unwrap();
    let seconds = || {
        let start = std::time::Instant::now();
        bed.ssh("web", &["head", "-c", "2000000", "/dev/zero"]).unwrap();
        start.elapsed().as_secs_f64()
    };
    // 2 MB at 4 Mbit/s take 4 s, less what the bucket lets through at once.
    bed.host("web").set_rate(Some(4000)).unwrap();
    let limited = seconds();
    assert!(limited > 3.0, "{limited}");
    bed.host("web").set_rate(None).unwrap();
    bed.host("web").set_rate(None).unwrap();
    let unlimited = seconds();
    assert!(unlimited < limited - 2.0, "{unlimited} after {limited}");
}

#[test]
fn nothing_is_left_after_down() {
    let bed = Bed::builder("gone").host("web", Init::Systemd).host("lb", Init::None).up().unwrap();
    let (name, directory, hub) = (bed.name().to_owned(), bed.directory().to_owned(), bed.hub_address());
    let number = hub.octets()[2];
    // What a test forgot must end too, on a host and in the hub.
    bed.host("web").run("sh", &["-c", "setsid sleep 1000 >/dev/null 2>&1 &"]).unwrap();
    let mut forgotten = bed.hub_command("sleep").arg("1000").spawn().unwrap();
    assert!(states().unwrap().iter().any(|state| state.name == name));
    bed.down().unwrap();

    assert!(!forgotten.wait().unwrap().success());
    assert!(!directory.exists());
    assert!(states().unwrap().iter().all(|state| state.name != name));
    for entry in std::fs::read_dir("/run/netns").unwrap() {
        let entry = entry.unwrap().file_name().into_string().unwrap();
        assert!(!entry.starts_with(&format!("bed{number}-")), "{entry}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(directory.to_str().unwrap()));
    for root in ["/sys/fs/cgroup/greenlight-bed", "/sys/fs/cgroup/unified/greenlight-bed"] {
        assert!(!Path::new(root).join(format!("{number}-web")).exists());
    }
}

#[test]
fn what_a_killed_process_left_is_cleared_by_the_next_bed() {
    let mut holder = Command::new(env!("CARGO_BIN_EXE_bed-hold"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut name = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut name).unwrap();
    // The host's process 1, as the machine sees it.
    let root = Bed::open(name.trim()).unwrap().host("web").root_path().unwrap();
    assert!(root.join("etc/debian_version").exists());
    holder.kill().unwrap();
    holder.wait().unwrap();

    // Whichever bed comes up next clears it: this one, or that of a test beside this one.
    let _next = Bed::builder("next").host("web", Init::None).up().unwrap();
    assert!(!root.exists());
    assert!(states().unwrap().iter().all(|state| state.name != name.trim()));
}

#[test]
fn a_host_that_cannot_boot_says_why() {
    let bed = Bed::builder("unbootable").host("web", Init::None).up().unwrap();
    let host = bed.host("web");
    host.write("/etc/ssh/sshd_config.d/bad.conf", 0o644, "Nonsense yes\n").unwrap();
    host.kill().unwrap();
    let error = host.boot().unwrap_err().to_string();
    assert!(error.contains("its process 1 has ended") && error.contains("Nonsense"), "{error}");
}

#[test]
fn haproxy_and_postgresql_are_real() {
    let bed = Bed::builder("roles").host("lb", Init::None).host("db", Init::Systemd).up().unwrap();
    let error = bed.haproxy("lb", "backend web\n    nonsense\n").unwrap_err().to_string();
    assert!(error.contains("unknown keyword 'nonsense'"), "{error}");
    let nobody = SocketAddr::from((bed.host("db").address(), 9));
    let haproxy = bed.haproxy("lb", &HaProxy::web(80, "web", "/health", &[("db", nobody)])).unwrap();
    assert!(haproxy.command("set server web/db state drain").unwrap().trim().is_empty());
    wait::until("the check of a server that is not there", DEADLINE, || {
        let states = haproxy.server_states("web").unwrap();
        if states[0].1.starts_with("DOWN") { Ok(()) } else { Err(format!("{states:?}")) }
    })
    .unwrap();
    assert_eq!(bed.get((haproxy.host().address(), 80).into(), "/").unwrap().status, 503);

    let postgres = bed.postgres("db").unwrap();
    postgres.query("CREATE TABLE kept (number integer); INSERT INTO kept VALUES (7)").unwrap();
    assert_eq!(postgres.query("SELECT number FROM kept").unwrap(), "7\n");
    let wrong = postgres.url().replace(postgres.password(), "wrong");
    let refused = bed.host("lb").run("psql", &[&wrong, "--command", "SELECT 1"]).unwrap_err().to_string();
    assert!(refused.contains("password authentication failed"), "{refused}");
}

#[test]
fn the_application_behind_haproxy_under_load() {
    let bed = Bed::builder("load").hosts(["web1", "web2"], Init::None).host("lb", Init::None).up().unwrap();
    let start = |host: &Host, version: &str| {
        host.write("/srv/app.py", 0o755, APPLICATION).unwrap();
        host.write("/srv/VERSION", 0o644, version).unwrap();
        let script = "cd /srv && setsid python3 app.py --port 8000 > log 2>&1 & echo $!";
        host.run("sh", &["-c", script]).unwrap().trim().to_owned()
    };
    let address = |host: &str| SocketAddr::from((bed.host(host).address(), 8000));
    let first = start(bed.host("web1"), "v1");
    start(bed.host("web2"), "v2");
    let servers = [("web1", address("web1")), ("web2", address("web2"))];
    let haproxy = bed.haproxy("lb", &HaProxy::web(80, "web", "/health", &servers)).unwrap();
    haproxy.wait_until_up("web", DEADLINE).unwrap();

    let load = Load::to((haproxy.host().address(), 80).into()).connections(3).per_second(200);
    let load = load
        .requests(|number| match number % 4 {
            0 => Request::post("/", "text/plain", format!("write {number}")),
            1 => Request::get("/slow?ms=20"),
            _ => Request::get("/"),
        })
        .start(&bed);
    load.wait_for(200, DEADLINE).unwrap();
    // Drained before it is stopped, nobody misses it.
    haproxy.command("set server web/web1 state drain").unwrap();
    load.wait_for(50, DEADLINE).unwrap();
    bed.host("web1").run("kill", &[&first]).unwrap();
    load.wait_for(200, DEADLINE).unwrap();
    let report = load.stop().unwrap();
    assert_eq!((report.failed, &report.reasons), (0, &vec![]), "{report:?}");
    assert!(report.versions["v1"] >= 50 && report.versions["v2"] > report.versions["v1"], "{report:?}");
    assert!(report.written.len() as u64 > report.requests / 5 && report.median_ms > 0.0, "{report:?}");

    // And when the last one is gone, the load says so.
    bed.host("web2").crash().unwrap();
    let load = Load::to((haproxy.host().address(), 80).into()).timeout(Duration::from_secs(1)).start(&bed);
    load.wait_for(5, DEADLINE).unwrap();
    let report = load.stop().unwrap();
    assert!(report.failed >= 1 && !report.reasons.is_empty(), "{report:?}");
}

#[test]
fn the_application_fails_as_it_is_told_and_ends_gracefully() {
    let bed = Bed::builder("app").host("web", Init::None).up().unwrap();
    let host = bed.host("web");
    let address = SocketAddr::from((host.address(), 8000));
    host.write("/srv/app.py", 0o755, APPLICATION).unwrap();
    let run = |arguments: &str| {
        let script = format!("cd /srv && GREENLIGHT_RELEASE=r1 python3 app.py --port 8000 {arguments}");
        host.run("sh", &["-c", &script])
    };
    host.write("/srv/VERSION", 0o644, "v1").unwrap();
    let ends_with = |arguments: &str, message: &str| {
        let error = run(arguments).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    let remove = |name: &str| host.run("rm", &[&format!("/srv/{name}")]).map(drop).unwrap();

    host.write("/srv/BROKEN", 0o644, "").unwrap();
    ends_with("", "this release is broken");
    remove("BROKEN");
    host.write("/srv/STATE_INTOLERANT", 0o644, "").unwrap();
    host.write("/srv/state/written-by", 0o644, "v0").unwrap();
    ends_with("--state state", "cannot read the state that v0 left in state");
    remove("STATE_INTOLERANT");

    host.write("/srv/WRONG", 0o644, "v7").unwrap();
    host.write("/srv/UNHEALTHY", 0o644, "").unwrap();
    let started = run("--state state >log 2>&1 & echo $!").unwrap();
    let version = wait::until("the application", DEADLINE, || {
        bed.get(address, "/version").map_err(|error| error.to_string())
    });
    let version: serde_json::Value = serde_json::from_slice(&version.unwrap().body).unwrap();
    assert_eq!((version["release"].as_str(), version["version"].as_str()), (Some("v7"), Some("v7")));
    assert_eq!(bed.get(address, "/health").unwrap().status, 500);
    assert_eq!(host.read("/srv/state/written-by").unwrap(), "v7");

    // A request at work is finished, an idle connection is closed, and then the process is gone.
    bed.in_hub(|| {
        let mut idle = Connection::open(address, DEADLINE).unwrap();
        idle.send(&Request::get("/")).unwrap();
        let mut busy = Connection::open(address, DEADLINE).unwrap();
        busy.send(&Request::get("/")).unwrap();
        let answer = std::thread::scope(|scope| {
            let answer = scope.spawn(|| busy.send(&Request::get("/slow?ms=700")).unwrap());
            wait::until("the slow request to be at work", DEADLINE, || {
                let threads = host.run("ls", &[&format!("/proc/{}/task", started.trim())]).unwrap();
                if threads.lines().count() == 3 { Ok(()) } else { Err(threads) }
            })
            .unwrap();
            host.run("kill", &[started.trim()]).unwrap();
            answer.join().unwrap()
        });
        assert_eq!(answer.status, 200);
        idle.send(&Request::get("/")).unwrap_err();
    })
    .unwrap();
    wait::until("the application to be gone", DEADLINE, || {
        let alive = host.run("kill", &["-0", started.trim()]);
        if alive.is_err() { Ok(()) } else { Err("it lives".into()) }
    })
    .unwrap();
}
