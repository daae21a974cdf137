//! The whole agent with a real application under its own supervision: real directories, processes, sockets.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use crate::support::{
    Host, ROLLOUT, desired, free_port, get, is_alive, kill, members_of, mode_of, pid, process, release,
    release_of, wait_until, walk, web,
};
use greenlight_link::message::{Event, Reply, Request, Stream};
use greenlight_model::action::Blame;
use greenlight_model::check::CheckOutcome;
use greenlight_model::fleet::Migration;
use greenlight_model::fleet::Smoke;
use greenlight_model::host::{LedgerEvent, MigrationTrace, ProcessState};
use greenlight_model::id::Generation;
use greenlight_model::migration::MigrationPhase;

#[test]
fn a_release_goes_out_and_back() {
    let mut host = Host::new();
    let mut spec = host.spec();
    spec.shared = vec!["var/uploads/".to_owned()];
    web(&mut spec).variables.insert("GREETING".parse().unwrap(), "it's $5 & \"more\"".to_owned());
    let (v1, v2) = (release("v1", "normal"), release("v2", "normal"));
    assert_eq!(host.observe(&spec).proven(), None);
    assert!(!host.root().exists(), "looking creates nothing");

    let first = host.deploy(&spec, &v1, 1);
    assert_eq!(
        (first.ledger.active, first.ledger.previous, first.linked),
        (Some(v1.mark.id), None, Some(v1.mark.id))
    );
    let target = fs::read_link(host.root().join("current")).unwrap();
    assert_eq!(target.to_str().unwrap(), format!("releases/{}", v1.mark.id));
    let environment = get(&spec, "/environment");
    for line in [
        "GREENLIGHT_ENVIRONMENT=test",
        "GREENLIGHT_SERVICE=web",
        &format!("GREENLIGHT_RELEASE={}", v1.mark.id),
        &format!("PORT={}", web(&mut spec).port.unwrap()),
        "GREETING=it's $5 & \"more\"",
    ] {
        assert!(environment.lines().any(|found| found == line), "{line} is not in {environment}");
    }
    assert!(!environment.contains("CARGO"), "the agent's own environment came through: {environment}");
    assert_eq!(fs::read_to_string(host.root().join("logs/web.stdout")).unwrap(), "starting v1\n");
    assert_eq!(fs::read_to_string(host.root().join("logs/web.stderr")).unwrap(), "mode normal\n");
    assert_eq!(mode_of(&host.root().join("logs/web.stderr")), 0o640);
    fs::write(host.root().join("current/var/uploads/picture"), "data").unwrap();

    // Doing it again restarts nothing, neither under the same number nor under the next.
    assert_eq!(pid(&host.activate(&spec, Some(&v1), 1).unwrap()), pid(&first));
    host.claim(&spec, ROLLOUT, 2).unwrap();
    assert_eq!(pid(&host.activate(&spec, Some(&v1), 2).unwrap()), pid(&first));

    let second = host.deploy(&spec, &v2, 3);
    assert!(!is_alive(pid(&first)), "the old process is gone");
    assert_eq!(get(&spec, "/version"), "v2");
    assert_eq!(
        fs::read_to_string(host.root().join("current/var/uploads/picture")).unwrap(),
        "data",
        "it outlives releases"
    );
    assert_eq!(second.ledger.previous, Some(v1.mark.id));
    let confirm = |generation| Request::Confirm {
        spec: spec.clone(),
        release: v2.mark.id,
        generation: Generation(generation),
        rollout: ROLLOUT.parse().unwrap(),
    };
    assert!(host.ask(confirm(2)).unwrap_err().message.contains("generation"));
    let Reply::Instance(confirmed) = host.ask(confirm(3)).unwrap() else { panic!("no report") };
    assert_eq!(
        (confirmed.ledger.last_good, confirmed.ledger.confirmed),
        (Some(v2.mark.id), Some(Generation(3)))
    );

    // The controller goes, the application stays; another connection sees it as it is, and goes back.
    host.reconnect();
    assert_eq!(pid(&host.observe(&spec)), pid(&second));
    let third = host.activate(&spec, Some(&v1), 4).unwrap();
    assert_eq!((third.proven(), get(&spec, "/version").as_str()), (Some(v1.mark.id), "v1"));

    let stale = host.activate(&spec, Some(&v2), 3).unwrap_err();
    assert!(stale.message.contains("stale") && stale.blame == Blame::Host, "{stale}");
    assert!(
        host.activate(&spec, Some(&v2), 4).unwrap_err().message.contains("already used for something else")
    );
    assert_eq!(pid(&host.observe(&spec)), pid(&third), "a refusal touches nothing");

    let gone = host.activate(&spec, None, 5).unwrap();
    assert_eq!((gone.linked, gone.ledger.active, gone.is_running()), (None, None, false));
    assert!(!is_alive(pid(&third)) && !host.root().join("current").exists());
    let events: Vec<LedgerEvent> = gone.ledger.history.iter().map(|entry| entry.event).collect();
    use LedgerEvent::{Confirmed, Deactivated, Proven, Staged, Switched};
    assert_eq!(
        events,
        [
            Staged,
            Switched,
            Proven,
            Proven,
            Proven,
            Staged,
            Switched,
            Proven,
            Confirmed,
            Switched,
            Proven,
            Deactivated
        ]
    );
}

#[test]
fn without_the_claim_nothing_is_changed() {
    let mut host = Host::new();
    let (spec, v1) = (host.spec(), release("v1", "normal"));
    let refused = host.ask(Request::Stage {
        spec: spec.clone(),
        release: v1.mark.clone(),
        rollout: ROLLOUT.parse().unwrap(),
        secrets: BTreeMap::new(),
    });
    assert!(refused.unwrap_err().message.contains("does not hold the claim"));
    host.claim(&spec, "other", 1).unwrap();
    let refused = host.claim(&spec, ROLLOUT, 1).unwrap_err();
    assert!(refused.message.contains("ada@desk") && refused.message.contains("a test"), "{refused}");
    assert!(host.activate(&spec, Some(&v1), 1).unwrap_err().message.contains("does not hold the claim"));
    host.ask(Request::Unclaim { spec: spec.clone(), rollout: "other".parse().unwrap() }).unwrap();
    host.claim(&spec, ROLLOUT, 1).unwrap();
    assert!(host.activate(&spec, Some(&v1), 1).unwrap_err().message.contains("not staged"));
}

/// A14 and what resembles it: a start that must not be believed, and the way back.
#[test]
fn a_release_that_does_not_work_is_found_and_the_old_one_comes_back() {
    let mut host = Host::new();
    let mut spec = host.spec();
    web(&mut spec).start_timeout = Duration::from_secs(5);
    let v1 = release("v1", "normal");
    host.deploy(&spec, &v1, 1);
    let mut generation = 1;
    for (mode, why, output) in [
        ("crash", "exit status 1", Some("cannot read the state file")),
        ("wrong", "it answers as `v999`", None),
        ("flapping", "ended", None),
    ] {
        let bad = release("v2", mode);
        generation += 1;
        host.claim(&spec, ROLLOUT, generation).unwrap();
        host.stage(&spec, &bad).unwrap();
        let error = host.activate(&spec, Some(&bad), generation).unwrap_err();
        assert!(error.message.contains(why), "{mode}: {error}");
        assert_eq!(error.blame, Blame::Release, "{mode}");
        if let Some(line) = output {
            assert!(error.output.iter().any(|found| found == line), "{mode}: {:?}", error.output);
            assert!(
                !error.output.iter().any(|found| found == "mode normal"),
                "lines of the old release: {:?}",
                error.output
            );
        }
        let report = host.observe(&spec);
        assert_eq!((report.linked, report.proven()), (Some(bad.mark.id), None), "{mode}");
        assert_eq!(report.ledger.history.last().unwrap().event, LedgerEvent::Failed, "{mode}");

        generation += 1;
        host.claim(&spec, ROLLOUT, generation).unwrap();
        let back = host.activate(&spec, Some(&v1), generation).unwrap();
        assert_eq!((back.proven(), get(&spec, "/version").as_str()), (Some(v1.mark.id), "v1"), "{mode}");
    }
    host.clean_up(&spec, generation + 1);
}

/// A13.
#[test]
fn a_stop_command_that_leaves_the_process_alive_is_not_believed() {
    let mut host = Host::new();
    let mut spec = host.spec();
    web(&mut spec).stop_argv = Some(vec!["true".to_owned()]);
    let (v1, v2) = (release("v1", "normal"), release("v2", "normal"));
    let before = host.deploy(&spec, &v1, 1);
    host.claim(&spec, ROLLOUT, 2).unwrap();
    host.stage(&spec, &v2).unwrap();
    let error = host.activate(&spec, Some(&v2), 2).unwrap_err();
    for part in ["`/usr/bin/true`", "exit status 0", "still alive", &pid(&before).to_string()] {
        assert!(error.message.contains(part), "{part} is not in {error}");
    }
    assert_eq!(error.blame, Blame::Host);
    let after = host.observe(&spec);
    assert_eq!(
        (after.linked, pid(&after), get(&spec, "/version").as_str()),
        (Some(v1.mark.id), pid(&before), "v1")
    );

    // A stop command that works is believed; the process is stopped as it was started, whatever the fleet file says now.
    fs::write(host.root().join("stop"), format!("kill -9 {}", pid(&before))).unwrap();
    let mut run: serde_json::Value = serde_json::from_slice(
        &fs::read(host.root().join(format!(".greenlight/runs/{}.json", v1.mark.id))).unwrap(),
    )
    .unwrap();
    run["desired"]["spec"]["processes"]["web"]["stop_argv"] =
        serde_json::json!(["sh", host.root().join("stop").to_str().unwrap()]);
    fs::write(host.root().join(format!(".greenlight/runs/{}.json", v1.mark.id)), run.to_string()).unwrap();
    web(&mut spec).stop_argv = None;
    host.claim(&spec, ROLLOUT, 3).unwrap();
    host.activate(&spec, Some(&v2), 3).unwrap();
    assert!(!is_alive(pid(&before)));
    host.clean_up(&spec, 4);
}

#[test]
fn what_ignores_the_request_to_stop_is_killed_with_its_children() {
    let mut host = Host::new();
    let mut spec = host.spec();
    web(&mut spec).stop_timeout = Duration::from_millis(500);
    for (generation, mode) in [(1, "stubborn"), (3, "child")] {
        let report = host.deploy(&spec, &release("v1", mode), generation);
        let group = pid(&report);
        host.clean_up(&spec, generation + 1);
        let left = members_of(group);
        assert!(left.is_empty(), "{mode}: {left:?}");
    }
}

/// A19.
#[test]
fn a_smoke_start_leaves_the_live_process_alone() {
    let mut host = Host::new();
    let mut spec = host.spec();
    let v1 = release("v1", "normal");
    let before = host.deploy(&spec, &v1, 1);
    web(&mut spec).smoke = Some(Smoke { port: free_port() });
    web(&mut spec).start_timeout = Duration::from_secs(5);
    let smoke_port = web(&mut spec).smoke.as_ref().unwrap().port;
    host.claim(&spec, ROLLOUT, 2).unwrap();
    for (mode, expected) in
        [("normal", None), ("crash", Some("it ended")), ("wrong", Some("answers as `v999`")), ("child", None)]
    {
        let v2 = release("v2", mode);
        host.stage(&spec, &v2).unwrap();
        let tried = host.ask(Request::Smoke { spec: spec.clone(), release: v2.mark.clone() });
        match (tried, expected) {
            (Ok(Reply::Done), None) => {
                let said = format!("the live process is unchanged: process {}", pid(&before));
                let is_said = |event: &Event| matches!(event, Event::Line { text, .. } if *text == said);
                assert!(host.events.iter().any(is_said), "{:?}", host.events);
            }
            (Err(error), Some(why)) => {
                assert!(error.message.contains(why) && error.blame == Blame::Release, "{mode}: {error}");
                assert!(!error.output.is_empty(), "{mode}: its lines come along");
            }
            (tried, _) => panic!("{mode}: {tried:?}"),
        }
        let after = host.observe(&spec);
        assert_eq!((pid(&after), get(&spec, "/version").as_str()), (pid(&before), "v1"), "{mode}");
        std::net::TcpListener::bind(("127.0.0.1", smoke_port)).expect("the smoke start is gone");
    }
    host.clean_up(&spec, 3);
}

/// A22.
#[test]
fn data_inside_the_release_is_found_before_anything_changes() {
    let mut host = Host::new();
    let spec = host.spec();
    let (v1, v2) = (release("v1", "normal"), release("v2", "normal"));
    host.deploy(&spec, &v1, 1);
    let checks = host.preflight(&spec, v2.mark.id);
    for check in checks.values() {
        assert_eq!(check.outcome, CheckOutcome::Passed, "{check:?}");
    }
    assert_eq!(
        checks[&format!("port {}", spec.processes.values().next().unwrap().port.unwrap())].found,
        "held by the service itself"
    );
    fs::write(host.root().join("current/app.db"), "rows").unwrap();
    let check = &host.preflight(&spec, v2.mark.id)["data"];
    assert_eq!(check.outcome, CheckOutcome::Failed);
    assert!(check.found.contains("app.db") && check.mend.contains("shared = [\"app.db\"]"), "{check:?}");
    fs::remove_file(host.root().join("current/app.db")).unwrap();
    fs::remove_file(host.root().join("current/VERSION")).unwrap();
    fs::write(host.root().join("current/VERSION"), "patched").unwrap();
    let check = &host.preflight(&spec, v2.mark.id)["local edits"];
    assert!(check.outcome == CheckOutcome::Failed && check.found.contains("VERSION"), "{check:?}");
    host.clean_up(&spec, 2);
}

#[test]
fn secrets_reach_the_process_and_nothing_else() {
    const PLANTED: &str = "planted \"$ecret\" `of` this\ntest";
    let mut host = Host::new();
    let mut spec = host.spec();
    spec.secrets = ["TOKEN".parse().unwrap()].into();
    let v1 = release("v1", "normal");
    host.claim(&spec, ROLLOUT, 1).unwrap();
    host.begin_stage(&spec, &v1, &[]);
    host.reconnect();
    assert!(host.activate(&spec, Some(&v1), 1).unwrap_err().message.contains("stage"));
    host.stage_with(&spec, &v1, &[("TOKEN", PLANTED)]).unwrap();
    let report = host.activate(&spec, Some(&v1), 1).unwrap();
    assert!(get(&spec, "/environment").contains(&format!("TOKEN={PLANTED}")));
    let secrets = host.root().join(".greenlight/secrets");
    assert_eq!((mode_of(&secrets), mode_of(&secrets.join(format!("{}.env", v1.mark.id)))), (0o700, 0o600));
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", pid(&report))).unwrap();
    assert!(!arguments.contains("planted"));
    let mut looked_at = 0;
    for entry in walk(&host.root()) {
        let content = String::from_utf8_lossy(&fs::read(&entry).unwrap()).into_owned();
        assert!(!content.contains("planted") || entry.starts_with(&secrets), "{}", entry.display());
        looked_at += 1;
    }
    assert!(looked_at > 10, "only {looked_at} files were looked at");

    // Changed secrets are a reason to start again, and only then.
    host.stage_with(&spec, &v1, &[("TOKEN", PLANTED)]).unwrap();
    host.claim(&spec, ROLLOUT, 2).unwrap();
    assert_eq!(pid(&host.activate(&spec, Some(&v1), 2).unwrap()), pid(&report));
    host.stage_with(&spec, &v1, &[("TOKEN", "changed")]).unwrap();
    host.claim(&spec, ROLLOUT, 3).unwrap();
    assert_ne!(pid(&host.activate(&spec, Some(&v1), 3).unwrap()), pid(&report));
    assert!(get(&spec, "/environment").contains("TOKEN=changed"));
    host.clean_up(&spec, 4);
}

#[test]
fn preparing_is_part_of_staging() {
    let mut host = Host::new();
    let mut spec = host.spec();
    let v1 = release("v1", "normal");
    host.claim(&spec, ROLLOUT, 1).unwrap();
    spec.prepare = vec![
        "echo one; echo $GREENLIGHT_RELEASE > prepared".to_owned(),
        "echo broken >&2; false; echo not reached".to_owned(),
    ];
    let error = host.stage(&spec, &v1).unwrap_err();
    assert!(
        error.message.contains("step 2 of prepare") && error.message.contains("exit status 1"),
        "{error}"
    );
    assert_eq!((error.blame, error.output.as_slice()), (Blame::Release, &["broken".to_owned()][..]));
    let line = |text: &str, stream| Event::Line { process: None, stream, text: text.to_owned() };
    assert!(
        host.events.contains(&line("one", Stream::Stdout))
            && host.events.contains(&line("broken", Stream::Stderr))
    );
    assert!(host.observe(&spec).staged.is_empty(), "what is not prepared is not staged");
    assert!(!host.root().join(format!("releases/{}", v1.mark.id)).exists(), "and nothing of it is left");

    // It is killed, with all that it started, when the controller goes.
    spec.prepare = vec!["sleep 600 & echo $!; wait".to_owned()];
    let id = host.begin_stage(&spec, &v1, &[]);
    let sleeping: u32 = loop {
        if let Event::Line { text, .. } = host.next(id).unwrap() {
            break text.parse().unwrap();
        }
    };
    assert!(is_alive(sleeping));
    host.reconnect();
    wait_until("the step's child ends", || !is_alive(sleeping));

    spec.prepare = vec!["echo $GREENLIGHT_RELEASE > prepared".to_owned()];
    host.stage(&spec, &v1).unwrap();
    let prepared = host.root().join(format!("releases/{}/prepared", v1.mark.id));
    assert_eq!(fs::read_to_string(&prepared).unwrap().trim(), v1.mark.id.to_string());
    assert_eq!(host.observe(&spec).staged, [v1.mark.id].into());
    fs::remove_file(&prepared).unwrap();
    host.stage(&spec, &v1).unwrap();
    assert!(!prepared.exists(), "a staged release is not prepared again: it may be running");
}

#[test]
fn supervision_starts_again_gives_up_and_outlives_its_agent() {
    let mut host = Host::new();
    let spec = host.spec();
    let v1 = release("v1", "normal");
    let first = pid(&host.deploy(&spec, &v1, 1));
    host.reconnect();
    kill(first, "-9");
    let mut second = 0;
    wait_until("it is started again", || {
        let report = host.observe(&spec);
        let ProcessState::Running { pid, .. } = report.processes.values().next().unwrap().state else {
            return false;
        };
        second = pid;
        pid != first && report.proven() == Some(v1.mark.id)
    });

    // Without its supervisor it runs on, is seen, and can be stopped.
    let state = fs::read_to_string(host.root().join(".greenlight/supervised/web/state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    let supervisor = u32::try_from(state["supervisor"]["pid"].as_u64().unwrap()).unwrap();
    kill(supervisor, "-9");
    wait_until("the supervisor ends", || !is_alive(supervisor));
    assert_eq!(pid(&host.observe(&spec)), second);
    let third = pid(&host.deploy(&spec, &release("v2", "normal"), 2));
    assert!(!is_alive(second) && is_alive(third));

    // The same when it was killed before it had written down what it started.
    let third = pid(&host.observe(&spec));
    let path = host.root().join(".greenlight/supervised/web/state.json");
    let mut state: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let supervisor = u32::try_from(state["supervisor"]["pid"].as_u64().unwrap()).unwrap();
    kill(supervisor, "-9");
    wait_until("the supervisor ends", || !is_alive(supervisor));
    state["child"] = serde_json::Value::Null;
    fs::write(&path, state.to_string()).unwrap();
    let fourth = pid(&host.deploy(&spec, &v1, 3));
    assert!(!is_alive(third) && is_alive(fourth));

    // One that only fails is given up.
    fs::remove_file(host.root().join("current/MODE")).unwrap();
    kill(fourth, "-9");
    wait_until("it is given up", || {
        let report = host.observe(&spec);
        let state = &report.processes.values().next().unwrap().state;
        matches!(state, ProcessState::Failed { why } if why.contains("not started again") && why.contains("MODE"))
    });
    host.clean_up(&spec, 4);
}

#[test]
fn an_activation_is_finished_when_the_controller_goes() {
    let mut host = Host::new();
    let spec = host.spec();
    let (v1, v2) = (release("v1", "normal"), release("v2", "normal"));
    host.deploy(&spec, &v1, 1);
    host.claim(&spec, ROLLOUT, 2).unwrap();
    host.stage(&spec, &v2).unwrap();
    let id = host.send(Request::Activate { desired: desired(&spec, Some(&v2), 2), guard: None });
    host.wait_for_phase(id, "stopping web");
    host.reconnect();
    let report = host.observe(&spec);
    assert_eq!(report.proven(), Some(v2.mark.id), "{report:?}");
    assert_eq!(report.ledger.history.last().unwrap().event, LedgerEvent::Proven);
    host.clean_up(&spec, 3);
}

#[test]
fn processes_come_and_go_with_the_fleet_file() {
    let mut host = Host::new();
    let mut spec = host.spec();
    let mut worker = process("worker", 0);
    (worker.port, worker.health) = (None, None);
    worker.argv = ["sleep", "600"].map(str::to_owned).into();
    spec.processes.insert(worker.name.clone(), worker.clone());
    let v1 = release("v1", "normal");
    let report = host.deploy(&spec, &v1, 1);
    let ProcessState::Running { pid: worker_pid, .. } = report.processes[&worker.name].state else {
        panic!("{report:?}")
    };
    assert!(format!("{report:?}").contains("working directory"));
    spec.processes.remove(&worker.name);
    host.claim(&spec, ROLLOUT, 2).unwrap();
    let report = host.activate(&spec, Some(&v1), 2).unwrap();
    assert_eq!((report.processes.len(), is_alive(worker_pid)), (1, false));
    assert!(!host.root().join(".greenlight/supervised/worker").exists());

    // A port that somebody else holds is found, and named, before the process is started in vain.
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    web(&mut spec).port = Some(held.local_addr().unwrap().port());
    host.claim(&spec, ROLLOUT, 3).unwrap();
    let error = host.activate(&spec, Some(&v1), 3).unwrap_err();
    assert!(
        error.message.contains(&format!("process {}", std::process::id())) && error.blame == Blame::Host,
        "{error}"
    );
    host.clean_up(&spec, 4);
}

#[test]
fn releases_that_nothing_needs_are_pruned() {
    let mut host = Host::new();
    let spec = host.spec();
    let releases = ["v1", "v2", "v3", "v4"].map(|label| release(label, "normal"));
    for (release, generation) in releases.iter().zip(1..) {
        host.deploy(&spec, release, generation);
    }
    let prune = |keep: &[usize], keep_releases| Request::Prune {
        spec: spec.clone(),
        keep: keep.iter().map(|number| releases[*number].mark.id).collect(),
        keep_releases,
        rollout: ROLLOUT.parse().unwrap(),
    };
    assert_eq!(host.ask(prune(&[0], 1)).unwrap(), Reply::Pruned([].into()));
    assert_eq!(host.ask(prune(&[0], 0)).unwrap(), Reply::Pruned([releases[1].mark.id].into()));
    assert_eq!(host.ask(prune(&[], 0)).unwrap(), Reply::Pruned([releases[0].mark.id].into()));
    assert_eq!(
        host.observe(&spec).staged,
        [releases[2].mark.id, releases[3].mark.id].into(),
        "active and previous stay"
    );
    host.clean_up(&spec, 5);
}

#[test]
fn migrations_commands_and_logs() {
    let mut host = Host::new();
    let spec = host.spec();
    let files = |label| [("bin/migrate", "#!/bin/sh\n"), ("VERSION", label)];
    let (v1, v2) = (release_of("v1", &files("v1")), release_of("v2", &files("v2")));
    host.claim(&spec, ROLLOUT, 1).unwrap();
    host.stage(&spec, &v1).unwrap();
    host.stage(&spec, &v2).unwrap();
    let migrate_for =
        |rollout: &str, release: &crate::support::Release, script: &str, timeout| Request::Migrate {
            spec: spec.clone(),
            release: release.mark.clone(),
            migration: Migration::new(["sh", "-c", script].map(str::to_owned).into(), timeout),
            phase: MigrationPhase::Expand,
            is_lossy: false,
            rollout: rollout.parse().unwrap(),
        };
    let migrate = |release, script, timeout| migrate_for(ROLLOUT, release, script, timeout);
    let long = Duration::from_secs(30);
    let whole = migrate(&v1, "cat VERSION; echo; echo to $GREENLIGHT_RELEASE", long);
    host.ask(whole.clone()).unwrap();
    let lines: Vec<String> = host.events.iter().filter_map(line_of).collect();
    assert_eq!(lines, ["v1".to_owned(), format!("to {}", v1.mark.id)]);
    let trace = |host: &mut Host, release: &crate::support::Release| {
        host.observe(&spec).ledger.migration(release.mark.id, MigrationPhase::Expand)
    };
    assert_eq!(trace(&mut host, &v1), Some(MigrationTrace::Done));
    host.ask(whole).unwrap();
    assert_eq!(
        host.events.iter().filter_map(line_of).count(),
        0,
        "it runs once, however often it is asked for"
    );

    let error = host.ask(migrate(&v2, "echo column exists >&2; exit 4", long)).unwrap_err();
    assert!(error.message.contains("exit status 4") && error.output == ["column exists"], "{error:?}");
    let again = host.ask(migrate(&v2, "echo again", long)).unwrap_err();
    assert!(again.message.starts_with(&error.message) && again.blame == error.blame, "{again:?}");
    assert_eq!(host.events.iter().filter_map(line_of).count(), 0, "once in a rollout, also when it failed");

    // Other rollouts come, and run it again.
    let hand_over = |host: &mut Host, from: &str, to: &str, generation| {
        host.ask(Request::Unclaim { spec: spec.clone(), rollout: from.parse().unwrap() }).unwrap();
        host.claim(&spec, to, generation).unwrap();
    };
    hand_over(&mut host, ROLLOUT, "test-2", 2);
    let slowly = migrate_for("test-2", &v2, "echo slowly; sleep 600", Duration::from_millis(300));
    let error = host.ask(slowly).unwrap_err();
    assert!(error.message.contains("300ms") && error.output == ["slowly"], "{error:?}");
    assert_eq!(trace(&mut host, &v2), Some(MigrationTrace::Failed));
    hand_over(&mut host, "test-2", "test-3", 3);
    let id = host.send(migrate_for("test-3", &v2, "echo begun; sleep 600", long));
    while !matches!(host.next(id), Ok(Event::Line { .. })) {}
    assert_eq!(trace(&mut host, &v2), Some(MigrationTrace::Begun), "written before it runs");
    host.reconnect();
    assert_eq!(trace(&mut host, &v2), Some(MigrationTrace::Begun), "how far it came is not known");
    let error = host.ask(migrate_for("test-3", &v2, "echo again", long)).unwrap_err();
    assert!(error.message.contains("how it ended is not known"), "{error:?}");

    let exec = |script: &str| Request::Exec {
        argv: ["sh", "-c", script].map(str::to_owned).into(),
        directory: Some("/".to_owned()),
        timeout: long,
    };
    assert_eq!(host.ask(exec("pwd; exit 7")).unwrap(), Reply::Exited { code: Some(7) });
    assert_eq!(host.events.iter().filter_map(line_of).collect::<Vec<_>>(), ["/"]);
    assert_eq!(host.ask(exec("kill -9 $$")).unwrap(), Reply::Exited { code: None });

    fs::create_dir_all(host.root().join("logs")).unwrap();
    fs::write(host.root().join("logs/web.stdout"), "a\nb\n").unwrap();
    fs::write(host.root().join("logs/web.stderr"), "c\n").unwrap();
    let logs = |process: &str, follow| Request::Logs {
        spec: spec.clone(),
        process: Some(process.parse().unwrap()),
        stream: None,
        lines: 1,
        follow,
    };
    host.ask(logs("web", false)).unwrap();
    assert_eq!(host.events.iter().filter_map(line_of).collect::<Vec<_>>(), ["b", "c"]);
    assert!(host.ask(logs("other", false)).unwrap_err().message.contains("it has: web"));
    let id = host.send(logs("web", true));
    assert!(host.next(id).is_ok());
    host.hang_up();
}

fn line_of(event: &Event) -> Option<String> {
    match event {
        Event::Line { text, .. } => Some(text.clone()),
        Event::Missing { .. } | Event::Phase { .. } | Event::Sampled(_) => None,
    }
}

/// As root, a process gets its own account and what it must write; anybody else is told that this cannot be.
#[test]
fn processes_run_under_their_account() {
    let mut host = Host::new();
    let mut spec = host.spec();
    spec.shared = vec!["data/".to_owned()];
    web(&mut spec).user = Some("nobody".parse().unwrap());
    let v1 = release("v1", "normal");
    if !host.facts.is_root {
        let check = &host.preflight(&spec, v1.mark.id)["user nobody"];
        assert!(
            check.outcome == CheckOutcome::Failed && check.found.contains("may not start it so"),
            "{check:?}"
        );
        return;
    }
    host.deploy(&spec, &v1, 1);
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let uid = passwd.lines().find(|line| line.starts_with("nobody:")).unwrap().split(':').nth(2).unwrap();
    assert_eq!(get(&spec, "/arguments"), format!("[]{uid}"));
    use std::os::unix::fs::MetadataExt as _;
    for path in ["shared/data", "logs/web.stdout"] {
        assert_eq!(fs::metadata(host.root().join(path)).unwrap().uid().to_string(), uid, "{path}");
    }
    host.clean_up(&spec, 2);
}
