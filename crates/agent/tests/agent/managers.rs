//! The same application under systemd and under supervisord. These tests change the machine that they run on, so they are ignored
//! unless asked for: as root, on a host that is there for it, `agent --ignored managers::systemd`. They fail where the manager is missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{
    Host, ROLLOUT, free_port, get, is_alive, kill, members_of, mode_of, pid, process, release, wait_until,
    walk, web,
};
use greenlight_link::message::Request;
use greenlight_model::action::Blame;
use greenlight_model::check::CheckOutcome;
use greenlight_model::fleet::{ManagerKind, Smoke};
use greenlight_model::host::ProcessState;

/// What of a manager the scenario needs to know.
struct Expected {
    kind: ManagerKind,
    /// The file that the manager reads for the process.
    settings: PathBuf,
    /// An argument that cannot be written into that file, when there is one.
    impossible: Option<&'static str>,
    /// The account that the process is to run under, where the agent may choose.
    user: Option<&'static str>,
    /// How it says that a process failed at once.
    failed: &'static str,
}

#[test]
#[ignore = "changes the machine: needs root and systemd"]
fn systemd() {
    run(&Expected {
        kind: ManagerKind::Systemd,
        settings: PathBuf::from("/etc/systemd/system/greenlight-web-web.service"),
        impossible: None,
        user: Some("www-data"),
        failed: "exit status 1",
    });
}

#[test]
#[ignore = "changes the machine: needs an account with a systemd of its own"]
fn systemd_user() {
    let home = std::env::var("HOME").unwrap();
    run(&Expected {
        kind: ManagerKind::SystemdUser,
        settings: Path::new(&home).join(".config/systemd/user/greenlight-web-web.service"),
        impossible: None,
        user: None,
        failed: "exit status 1",
    });
}

#[test]
#[ignore = "changes the machine: needs root and supervisord"]
fn supervisord() {
    run(&Expected {
        kind: ManagerKind::Supervisord,
        settings: PathBuf::from("/etc/supervisor/conf.d/greenlight-web-web.conf"),
        impossible: Some("two\nlines"),
        user: Some("www-data"),
        failed: "as soon as it was started",
    });
}

fn run(expected: &Expected) {
    let mut host = Host::with_program(Path::new("/no/program/is/needed"));
    assert!(host.facts.managers.contains(&expected.kind), "{:?}", host.facts);
    let mut spec = host.spec();
    // As root, what `auto` finds is the manager that this host has.
    spec.manager = if host.facts.is_root { ManagerKind::Auto } else { expected.kind };
    spec.secrets = ["TOKEN".parse().unwrap()].into();
    let secrets = [("TOKEN", "planted \"$ecret\" %h `of` \\ this\ntest ; # '")];
    let hard = ["it's", "$HOME ${PATH}", "50% %h %(x)s", "a ;b #c", "say \"hi\" \\ back", "", "grün"];
    let mut generation = 0;
    let mut next = || {
        generation += 1;
        generation
    };

    web(&mut spec).argv.extend(hard.map(str::to_owned));
    web(&mut spec).user = expected.user.map(|user| user.parse().unwrap());
    web(&mut spec).variables.insert("GREETING".parse().unwrap(), "it's $5 & \"more\" %h \\ ;".to_owned());
    let v1 = release("v1", "normal");
    for check in host.preflight(&spec, v1.mark.id).values() {
        assert_eq!(check.outcome, CheckOutcome::Passed, "{check:?}");
    }

    // Everything reaches the process as it was stated; the secret is in no file that others can read.
    let number = next();
    host.claim(&spec, ROLLOUT, number).unwrap();
    host.stage_with(&spec, &v1, &secrets).unwrap();
    let first = host.activate(&spec, Some(&v1), number).unwrap();
    assert_eq!(first.proven(), Some(v1.mark.id), "{first:?}");
    let user = expected.user.unwrap_or(&host.facts.user);
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let uid =
        passwd.lines().find(|line| line.starts_with(&format!("{user}:"))).unwrap().split(':').nth(2).unwrap();
    let shown = hard.map(|argument| match argument.contains('\'') {
        true => format!("\"{argument}\""),
        false => format!("'{}'", argument.replace('\\', "\\\\")),
    });
    assert_eq!(get(&spec, "/arguments"), format!("[{}]{uid}", shown.join(", ")));
    let environment = get(&spec, "/environment");
    for line in
        ["GREENLIGHT_SERVICE=web", "GREETING=it's $5 & \"more\" %h \\ ;", &format!("TOKEN={}", secrets[0].1)]
    {
        assert!(environment.contains(&format!("{line}\n")), "{line} is not in {environment}");
    }
    assert!(!fs::read_to_string(&expected.settings).unwrap().contains("planted"));
    for path in walk(&host.root()) {
        let holds = String::from_utf8_lossy(&fs::read(&path).unwrap()).contains("planted");
        assert!(!holds || mode_of(&path) == 0o600, "{}", path.display());
    }
    assert_eq!(fs::read_to_string(host.root().join("logs/web.stdout")).unwrap(), "starting v1\n");
    assert_eq!(fs::read_to_string(host.root().join("logs/web.stderr")).unwrap(), "mode normal\n");

    // Doing it again restarts nothing.
    let number = next();
    host.claim(&spec, ROLLOUT, number).unwrap();
    assert_eq!(pid(&host.activate(&spec, Some(&v1), number).unwrap()), pid(&first));

    // The manager starts again what fails.
    kill(pid(&first), "-9");
    let mut again = 0;
    wait_until("it is started again", || {
        let report = host.observe(&spec);
        let ProcessState::Running { pid, .. } = report.processes.values().next().unwrap().state else {
            return false;
        };
        again = pid;
        pid != crate::support::pid(&first) && report.proven() == Some(v1.mark.id)
    });

    // A smoke start beside it (A19).
    let v2 = release("v2", "normal");
    web(&mut spec).smoke = Some(Smoke { port: free_port() });
    let number = next();
    host.claim(&spec, ROLLOUT, number).unwrap();
    host.stage_with(&spec, &v2, &secrets).unwrap();
    host.ask(Request::Smoke { spec: spec.clone(), release: v2.mark.clone() }).unwrap();
    assert_eq!(pid(&host.observe(&spec)), again);
    let second = host.activate(&spec, Some(&v2), number).unwrap();
    assert_eq!((second.proven(), get(&spec, "/version").as_str()), (Some(v2.mark.id), "v2"));
    assert!(!is_alive(again));

    // A start that must not be believed (A14), and the way back.
    web(&mut spec).start_timeout = Duration::from_secs(8);
    for (mode, why) in [("crash", expected.failed), ("wrong", "v999"), ("flapping", "ended")] {
        let bad = release("v3", mode);
        let number = next();
        host.claim(&spec, ROLLOUT, number).unwrap();
        host.stage_with(&spec, &bad, &secrets).unwrap();
        let error = host.activate(&spec, Some(&bad), number).unwrap_err();
        assert!(error.message.contains(why) && error.blame == Blame::Release, "{mode}: {error:?}");
        assert!(error.output.contains(&format!("mode {mode}")), "{mode}: {error:?}");
        let number = next();
        host.claim(&spec, ROLLOUT, number).unwrap();
        assert_eq!(host.activate(&spec, Some(&v2), number).unwrap().proven(), Some(v2.mark.id), "{mode}");
    }

    // A stop that must not be believed (A13).
    web(&mut spec).stop_argv = Some(vec!["true".to_owned()]);
    let number = next();
    host.claim(&spec, ROLLOUT, number).unwrap();
    let before = pid(&host.activate(&spec, Some(&v2), number).unwrap());
    web(&mut spec).stop_argv = None;
    let number = next();
    host.claim(&spec, ROLLOUT, number).unwrap();
    let error = host.activate(&spec, Some(&v1), number).unwrap_err();
    assert!(
        error.message.contains("still alive") && error.message.contains(&before.to_string()),
        "{error:?}"
    );
    assert_eq!((pid(&host.observe(&spec)), get(&spec, "/version").as_str()), (before, "v2"));
    mend_stop_command(&host, &v2.mark.id.to_string());

    // What ignores the request to stop is killed, with what it started.
    web(&mut spec).stop_timeout = Duration::from_secs(1);
    for mode in ["stubborn", "child"] {
        let stubborn = release("v4", mode);
        let number = next();
        host.claim(&spec, ROLLOUT, number).unwrap();
        host.stage_with(&spec, &stubborn, &secrets).unwrap();
        let before = pid(&host.activate(&spec, Some(&stubborn), number).unwrap());
        let number = next();
        host.claim(&spec, ROLLOUT, number).unwrap();
        host.activate(&spec, Some(&v1), number).unwrap();
        assert!(!is_alive(before) && members_of(before).is_empty(), "{mode}");
    }

    // What the manager cannot be told is refused with the reason.
    if let Some(argument) = expected.impossible {
        let mut spec = spec.clone();
        web(&mut spec).argv.push(argument.to_owned());
        let number = next();
        host.claim(&spec, ROLLOUT, number).unwrap();
        assert!(host.activate(&spec, Some(&v1), number).unwrap_err().message.contains("control characters"));
    }

    // A consumer without a port; then it is taken off, and nothing of ours is left.
    let mut worker = process("worker", 0);
    (worker.port, worker.health) = (None, None);
    worker.argv = ["sleep", "600"].map(str::to_owned).into();
    spec.processes.insert(worker.name.clone(), worker);
    let number = next();
    host.claim(&spec, ROLLOUT, number).unwrap();
    let both = host.activate(&spec, Some(&v1), number).unwrap();
    assert_eq!((both.processes.len(), both.proven()), (2, Some(v1.mark.id)), "{both:?}");
    host.clean_up(&spec, next());
    assert!(!expected.settings.exists());
    assert!(!host.observe(&spec).is_running());

    // What somebody else wrote under our name is not touched.
    fs::write(&expected.settings, "# mine\n").unwrap();
    let number = next();
    let check = &host.preflight(&spec, v1.mark.id)["manager"];
    assert!(check.outcome == CheckOutcome::Failed && check.found.contains("not greenlight's"), "{check:?}");
    host.claim(&spec, ROLLOUT, number).unwrap();
    assert!(host.activate(&spec, Some(&v1), number).unwrap_err().message.contains("not greenlight's"));
    assert_eq!(fs::read_to_string(&expected.settings).unwrap(), "# mine\n");
    fs::remove_file(&expected.settings).unwrap();
}

/// Takes the stop command out of what the host remembers, as an operator would by hand after A13.
fn mend_stop_command(host: &Host, release: &str) {
    let path = host.root().join(format!(".greenlight/runs/{release}.json"));
    let mut run: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    run["desired"]["spec"]["processes"]["web"]["stop_argv"] = serde_json::Value::Null;
    fs::write(&path, run.to_string()).unwrap();
}
