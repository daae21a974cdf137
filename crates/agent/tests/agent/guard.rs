//! The guard with a real application under the agent's own supervision: what happens when nobody confirms.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use greenlight_link::message::Request;
use greenlight_model::action::Blame;
use greenlight_model::host::{Guard, InstanceReport, InstanceSpec, LedgerEvent};

use crate::support::{Host, ROLLOUT, Release, desired, get, is_alive, kill, pid, release, wait_until, web};

/// Long enough for an activation and a confirmation on a busy machine where those are meant to win.
const LONG: Option<Duration> = Some(Duration::from_secs(120));
const SHORT: Option<Duration> = Some(Duration::from_secs(2));

/// A host that runs v1, confirmed, with v2 staged under generation 2.
fn host_with_v1(v2: &Release) -> (Host, InstanceSpec, Release) {
    let mut host = Host::new();
    let mut spec = host.spec();
    web(&mut spec).start_timeout = Duration::from_secs(10);
    let v1 = release("v1", "normal");
    host.deploy(&spec, &v1, 1);
    host.confirm(&spec, &v1, 1).unwrap();
    host.claim(&spec, ROLLOUT, 2).unwrap();
    host.stage(&spec, v2).unwrap();
    (host, spec, v1)
}

fn guard_of(report: &InstanceReport) -> &Guard {
    report.ledger.guard.as_ref().expect("armed")
}

/// The process that waits.
fn timer(host: &Host) -> u32 {
    let bytes = fs::read(host.root().join(".greenlight/guard/timer.json")).unwrap();
    let timer: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    timer["identity"]["pid"].as_u64().unwrap().try_into().unwrap()
}

fn wait_for_end(host: &mut Host, spec: &InstanceSpec) -> InstanceReport {
    let mut last = None;
    wait_until("the guard fires", || {
        let report = host.observe(spec);
        let is_over = report.ledger.guard.is_none();
        last = Some(report);
        is_over
    });
    last.unwrap()
}

#[track_caller]
fn assert_nothing_is_left(host: &Host, timer: u32) {
    wait_until("the guard's process ends", || !is_alive(timer));
    assert!(!host.root().join(".greenlight/guard").exists());
}

fn events(report: &InstanceReport) -> Vec<LedgerEvent> {
    let of_two = report.ledger.history.iter().filter(|entry| entry.generation.0 == 2);
    of_two.map(|entry| entry.event).filter(|event| *event != LedgerEvent::Staged).collect()
}

#[test]
fn what_nobody_confirms_goes_back_and_may_be_tried_again() {
    let v2 = release("v2", "normal");
    let (mut host, spec, v1) = host_with_v1(&v2);
    let began = Instant::now();
    let report = host.activate_guarded(&spec, Some(&v2), 2, SHORT).unwrap();
    let guard = guard_of(&report);
    assert_eq!((guard.back_to, guard.generation.0, &guard.lost), (Some(v1.mark.id), 2, &None));
    let timer = timer(&host);
    // The controller is gone, and the agent with it.
    host.hang_up();
    assert_eq!(get(&spec, "/version"), "v2");
    wait_until("v1 answers", || {
        std::panic::catch_unwind(|| get(&spec, "/version")).is_ok_and(|version| version == "v1")
    });
    assert!(began.elapsed() >= Duration::from_secs(2), "not before its time: {:?}", began.elapsed());

    host.reconnect();
    let report = wait_for_end(&mut host, &spec);
    assert_eq!((report.proven(), report.ledger.active), (Some(v1.mark.id), Some(v1.mark.id)));
    assert_eq!((report.ledger.generation.0, report.ledger.last_good), (2, Some(v1.mark.id)));
    use LedgerEvent::{Confirmed, Proven, Switched, TurnedBack};
    assert_eq!(events(&report), [Switched, Proven, Switched, TurnedBack]);
    let entry = report.ledger.went_back().unwrap();
    assert_eq!((entry.detail.as_str(), entry.release), ("not confirmed within 2.0s", Some(v1.mark.id)));
    assert_nothing_is_left(&host, timer);

    // A confirmation that comes too late says what happened, and blames nobody.
    let late = host.confirm(&spec, &v2, 2).unwrap_err();
    assert!(late.message.contains("went back by itself") && late.blame == Blame::Passing, "{late:?}");

    // The same generation with the same content is still accepted, and guarded anew.
    let again = host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap();
    assert_eq!((guard_of(&again).back_to, again.ledger.went_back()), (Some(v1.mark.id), None));
    let timer = self::timer(&host);
    let confirmed = host.confirm(&spec, &v2, 2).unwrap();
    assert_eq!((confirmed.ledger.last_good, &confirmed.ledger.guard), (Some(v2.mark.id), &None));
    assert_eq!(confirmed.ledger.times_gone_back(confirmed.ledger.generation), 1);
    assert_eq!(events(&confirmed).last(), Some(&Confirmed));
    assert_nothing_is_left(&host, timer);
    host.clean_up(&spec, 3);
}

#[test]
fn what_is_confirmed_or_replaced_stays_and_leaves_nothing() {
    let v2 = release("v2", "normal");
    let (mut host, spec, v1) = host_with_v1(&v2);
    let report = host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap();
    let (running, first) = (pid(&report), timer(&host));
    // What is active already is not guarded, and what guards it goes on.
    host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap();
    assert!(timer(&host) == first && is_alive(first));
    host.reconnect();
    let confirmed = host.confirm(&spec, &v2, 2).unwrap();
    assert_eq!((pid(&confirmed), confirmed.ledger.guard), (running, None));
    assert_nothing_is_left(&host, first);

    // What was confirmed is not on trial again, though it must be mended.
    fs::remove_file(host.root().join("current")).unwrap();
    let mended = host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap();
    assert_eq!((mended.proven(), mended.ledger.guard), (Some(v2.mark.id), None));

    // An activation of another generation takes the guard's place.
    host.claim(&spec, ROLLOUT, 3).unwrap();
    let report = host.activate_guarded(&spec, Some(&v1), 3, LONG).unwrap();
    let (old, third) = (guard_of(&report).clone(), timer(&host));
    assert_eq!(old.back_to, Some(v2.mark.id));
    host.claim(&spec, ROLLOUT, 4).unwrap();
    let report = host.activate(&spec, Some(&v2), 4).unwrap();
    assert_eq!(report.ledger.guard, None, "the way back is not guarded");
    assert_nothing_is_left(&host, third);
    // A timer that could not be stopped finds itself replaced.
    fire(&host, &old, true);
    let after = host.observe(&spec);
    assert_eq!((pid(&after), after.ledger), (pid(&report), report.ledger));
    host.clean_up(&spec, 5);
}

/// Runs what a timer runs.
#[track_caller]
fn fire(host: &Host, guard: &Guard, works: bool) {
    let status = Command::new(env!("CARGO_BIN_EXE_greenlight-agent"))
        .args(["agent", "guard", "--root", host.root().to_str().unwrap()])
        .args([
            "--generation",
            &guard.generation.to_string(),
            "--armed-at-ms",
            &guard.armed_at_ms.to_string(),
        ])
        .status();
    assert_eq!(status.unwrap().success(), works);
}

#[test]
fn it_waits_for_an_activation_that_hangs() {
    let v2 = release("v2", "slow");
    let (mut host, mut spec, v1) = host_with_v1(&v2);
    web(&mut spec).start_timeout = Duration::from_secs(4);
    let guard = Some(Duration::from_millis(500));
    let id = host.send(Request::Activate { desired: desired(&spec, Some(&v2), 2), guard });
    host.wait_for_phase(id, "probing web");
    let timer = timer(&host);
    host.reconnect();
    let report = wait_for_end(&mut host, &spec);
    use LedgerEvent::{Failed, Switched, TurnedBack};
    assert_eq!(events(&report), [Switched, Failed, Switched, TurnedBack]);
    assert_eq!((report.proven(), get(&spec, "/version").as_str()), (Some(v1.mark.id), "v1"));
    assert_nothing_is_left(&host, timer);
    host.clean_up(&spec, 3);
}

#[test]
fn an_agent_that_is_killed_at_any_step_leaves_the_way_back() {
    let v2 = release("v2", "normal");
    let (mut host, spec, v1) = host_with_v1(&v2);
    let phases = ["arming the guard", "stopping web", "switching", "starting web", "probing web"];
    for (phase, generation) in phases.iter().zip(2..) {
        host.claim(&spec, ROLLOUT, generation).unwrap();
        let mut agent = host.connect_to_process(Path::new(env!("CARGO_BIN_EXE_greenlight-agent")));
        let guard = Some(Duration::from_secs(1));
        let id = host.send(Request::Activate { desired: desired(&spec, Some(&v2), generation), guard });
        host.wait_for_phase(id, phase);
        kill(agent.id(), "-9");
        agent.wait().unwrap();
        host.reconnect();
        let report = wait_for_end(&mut host, &spec);
        assert_eq!(report.proven(), Some(v1.mark.id), "{phase}: {report:?}");
        assert_eq!(get(&spec, "/version"), "v1", "{phase}");
        assert_eq!(report.ledger.active, Some(v1.mark.id), "{phase}");
    }
    host.clean_up(&spec, 7);
}

#[test]
fn on_a_machine_that_was_started_anew_the_next_look_begins_its_time_anew() {
    let v2 = release("v2", "normal");
    let (mut host, spec, v1) = host_with_v1(&v2);
    let report = host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap();
    let guard = guard_of(&report).clone();
    // As the ledger would be found after a boot.
    let path = host.root().join(".greenlight/ledger");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace(&guard.boot, "of-yesterday")).unwrap();
    let seen = host.observe(&spec);
    let anew = guard_of(&seen);
    assert_eq!((anew.rearmed.as_deref(), &anew.lost), (Some("the machine was started anew"), &None));
    assert_eq!((anew.back_to, anew.limit, anew.generation), (guard.back_to, guard.limit, guard.generation));
    assert!(anew.armed_at_ms > guard.armed_at_ms && anew.fires_at > guard.fires_at, "{anew:?}");
    let timer = timer(&host);
    assert!(is_alive(timer));
    // Another look, and what the host's manager runs at a boot, find it waiting.
    let root = host.root();
    let rearm = ["agent", "rearm", "--root", root.to_str().unwrap()];
    assert!(Command::new(env!("CARGO_BIN_EXE_greenlight-agent")).args(rearm).status().unwrap().success());
    assert_eq!((guard_of(&host.observe(&spec)), self::timer(&host)), (anew, timer));
    // What was armed before the boot does nothing any more.
    fire(&host, &guard, true);
    let after = host.observe(&spec);
    assert_eq!((after.proven(), after.ledger.history.len()), (Some(v2.mark.id), report.ledger.history.len()));
    fire(&host, anew, true);
    let after = host.observe(&spec);
    assert_eq!((after.proven(), &after.ledger.guard), (Some(v1.mark.id), &None));
    let why = "not confirmed within 2m 0s, which began anew when the machine was started anew";
    assert_eq!(after.ledger.went_back().unwrap().detail, why);
    // It was fired by hand, so its own timer still waits, and would find nothing.
    kill(timer, "-9");
    host.clean_up(&spec, 3);
}

#[test]
fn a_failed_activation_is_tried_again_under_a_guard_that_leads_to_the_same_place() {
    let v2 = release("v2", "crash");
    let (mut host, spec, v1) = host_with_v1(&v2);
    host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap_err();
    let first = timer(&host);
    host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap_err();
    let second = timer(&host);
    assert!(first != second && !is_alive(first) && is_alive(second));
    let report = host.observe(&spec);
    assert_eq!((guard_of(&report).back_to, report.ledger.active), (Some(v1.mark.id), Some(v2.mark.id)));
    fire(&host, guard_of(&report), true);
    let report = host.observe(&spec);
    assert_eq!((report.proven(), get(&spec, "/version").as_str()), (Some(v1.mark.id), "v1"));
    // It was fired by hand, so its own timer still waits, and would find nothing.
    kill(second, "-9");
    host.clean_up(&spec, 3);
}

#[test]
fn when_the_old_release_does_not_start_either_the_ledger_says_so() {
    let v2 = release("v2", "normal");
    let (mut host, spec, v1) = host_with_v1(&v2);
    let report = host.activate_guarded(&spec, Some(&v2), 2, SHORT).unwrap();
    assert!(report.ledger.guard.is_some());
    let timer = timer(&host);
    let mode = host.root().join(format!("releases/{}/MODE", v1.mark.id));
    fs::remove_file(&mode).unwrap();
    fs::write(&mode, "crash").unwrap();
    let report = wait_for_end(&mut host, &spec);
    let last = report.ledger.history.last().unwrap();
    assert_eq!((last.event, last.release), (LedgerEvent::Failed, Some(v1.mark.id)));
    for part in ["not confirmed within 2.0s", "could not go back by itself", "exit status 1"] {
        assert!(last.detail.contains(part), "{part} is not in {}", last.detail);
    }
    assert_eq!((report.proven(), report.ledger.times_gone_back(report.ledger.generation)), (None, 0));
    assert_nothing_is_left(&host, timer);
    // Another try is guarded by what ran before this generation, not by its own remains.
    let again = host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap();
    assert_eq!(guard_of(&again).back_to, Some(v1.mark.id));
    host.confirm(&spec, &v2, 2).unwrap();
    host.clean_up(&spec, 3);
}

#[test]
fn a_first_release_that_nobody_confirms_is_taken_off() {
    let mut host = Host::new();
    let (spec, v1) = (host.spec(), release("v1", "normal"));
    host.claim(&spec, ROLLOUT, 1).unwrap();
    host.stage(&spec, &v1).unwrap();
    let report = host.activate_guarded(&spec, Some(&v1), 1, SHORT).unwrap();
    let (running, timer) = (pid(&report), timer(&host));
    assert_eq!(guard_of(&report).back_to, None);
    let report = wait_for_end(&mut host, &spec);
    assert_eq!((report.linked, report.ledger.active, report.is_running()), (None, None, false));
    assert!(!is_alive(running) && report.ledger.went_back().is_some());
    assert_nothing_is_left(&host, timer);
}

#[test]
fn the_same_release_run_otherwise_goes_back_to_how_it_ran() {
    let mut host = Host::new();
    let (mut spec, v1) = (host.spec(), release("v1", "normal"));
    host.deploy(&spec, &v1, 1);
    let before = spec.clone();
    web(&mut spec).variables.insert("GREETING".parse().unwrap(), "new".to_owned());
    host.claim(&spec, ROLLOUT, 2).unwrap();
    host.activate_guarded(&spec, Some(&v1), 2, SHORT).unwrap();
    assert!(get(&spec, "/environment").contains("GREETING=new"));
    let report = wait_for_end(&mut host, &spec);
    assert_eq!(report.proven(), Some(v1.mark.id));
    assert!(!get(&before, "/environment").contains("GREETING"));
    host.clean_up(&spec, 3);
}

#[test]
fn without_a_guard_nothing_is_changed_and_a_lost_one_is_started_again_or_told() {
    let v2 = release("v2", "normal");
    let (mut host, spec, v1) = host_with_v1(&v2);
    let running = pid(&host.observe(&spec));
    host.set_program(Path::new("/bin/false"));
    let error = host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap_err();
    assert!(error.message.contains("the guard cannot be armed") && error.blame == Blame::Host, "{error:?}");
    let report = host.observe(&spec);
    assert_eq!((pid(&report), report.linked, report.ledger.guard), (running, Some(v1.mark.id), None));

    host.set_program(&PathBuf::from(env!("CARGO_BIN_EXE_greenlight-agent")));
    host.activate_guarded(&spec, Some(&v2), 2, LONG).unwrap();
    let timer = timer(&host);
    kill(timer, "-9");
    wait_until("the guard's process ends", || !is_alive(timer));
    host.set_program(Path::new("/bin/false"));
    let lost = guard_of(&host.observe(&spec)).lost.clone().expect("lost");
    assert!(lost.starts_with("its timer was ended, and it cannot be started again: the guard's"), "{lost}");
    host.set_program(&PathBuf::from(env!("CARGO_BIN_EXE_greenlight-agent")));
    let seen = host.observe(&spec);
    assert_eq!(guard_of(&seen).rearmed.as_deref(), Some("its timer was ended"));
    let timer = self::timer(&host);
    assert!(is_alive(timer) && guard_of(&seen).lost.is_none());
    let confirmed = host.confirm(&spec, &v2, 2).unwrap();
    assert_eq!((confirmed.proven(), confirmed.ledger.guard), (Some(v2.mark.id), None));
    assert_nothing_is_left(&host, timer);
    host.clean_up(&spec, 3);
}
