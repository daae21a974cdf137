//! Each checker is shown what it is there to see.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::action::{Action, ActionDetail, ActionResult, Blame, Verb};
use greenlight_model::decision::{Outcome, Step};
use greenlight_model::fleet::{BatchSize, Floor, OnFailure, Strategy};
use greenlight_model::host::{Claim, LedgerEntry, LedgerEvent};
use greenlight_model::id::{Generation, Instance, RolloutId};
use greenlight_model::migration::MigrationPhase;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{Direction, Note, OperatorRequest};
use greenlight_model::world::Unreachable;

use super::super::agent::{From, Purpose, Request};
use super::super::scenario::{Fault, FaultKind, Part, Scenario, ServiceShape};
use super::super::site::{release, stamp};
use super::super::trial::Trial;

mod share;

/// Four hosts behind one balancer, one after the other, of which two must serve; a migration comes first.
fn scenario() -> Scenario {
    let service = ServiceShape {
        hosts: vec![0, 1, 2, 3],
        balancers: 1,
        migrates: true,
        has_smoke: false,
        has_process: true,
    };
    Scenario {
        seed: 1,
        hosts: 4,
        services: vec![service],
        strategy: Strategy::Rolling { batch: vec![BatchSize::Count(1)] },
        floor: Floor::Count(2),
        failure_budget: 1,
        on_failure: OnFailure::TurnBack,
        retries: 0,
        standby: Vec::new(),
        direction: Direction::Forward,
        is_first: false,
        only: Vec::new(),
        has_guard: true,
        starts_at_boot: true,
        lends: true,
        requests_needed: 4,
        // One that never happens here: without any, nothing may fail.
        faults: vec![Fault { at: 50_000, lasts: 0, kind: FaultKind::Gate }],
    }
}

/// What is seen when this happens to a rollout that has just been started.
fn seen_in(scenario: &Scenario, happens: impl FnOnce(&mut Trial<'_>)) -> Option<(&'static str, String)> {
    let mut trial = Trial::new(scenario, false);
    trial.deploy(0, 2, Part::All);
    assert_eq!(trial.report.violation, None, "before anything happened");
    happens(&mut trial);
    trial.report.violation.map(|violation| (violation.checker, violation.what))
}

/// That this is seen by a checker, which says so.
fn sees(checker: &str, says: &str, happens: impl FnOnce(&mut Trial<'_>)) {
    sees_in(&scenario(), checker, says, happens);
}

fn sees_in(scenario: &Scenario, checker: &str, says: &str, happens: impl FnOnce(&mut Trial<'_>)) {
    match seen_in(scenario, happens) {
        Some((seen, what)) => {
            assert_eq!(seen, checker, "{what}");
            assert!(what.contains(says), "{what}");
        }
        None => panic!("{checker} does not see it: {says}"),
    }
}

fn web(host: usize) -> Instance {
    format!("h{host:03}/web").try_into().unwrap()
}

fn rollout() -> RolloutId {
    "r000".parse().unwrap()
}

fn write(trial: &mut Trial<'_>, body: RecordBody) {
    let record = Record { seq: trial.history.last_seq + 1, at: stamp(trial.now, 0), by: String::new(), body };
    trial.write(record);
}

fn begin(trial: &mut Trial<'_>, action: Action) {
    write(trial, RecordBody::ActionStarted { rollout: rollout(), action, why: String::new() });
}

fn note(trial: &mut Trial<'_>, note: Note) {
    write(trial, RecordBody::Noted { rollout: rollout(), note });
}

fn ask(trial: &mut Trial<'_>, request: OperatorRequest) {
    write(trial, RecordBody::OperatorAsked { rollout: rollout(), request, why: String::new() });
}

fn end(trial: &mut Trial<'_>, outcome: Outcome) {
    write(trial, RecordBody::RolloutEnded { rollout: rollout(), outcome, running: BTreeMap::new() });
}

fn drain(host: usize) -> Action {
    Action::Drain { instance: web(host) }
}

fn admit(host: usize) -> Action {
    Action::Admit { instance: web(host) }
}

fn activate(host: usize) -> Action {
    Action::Activate { instance: web(host), release: release(0, 2), generation: Generation(2) }
}

/// The host truly runs the target.
fn bring(trial: &mut Trial<'_>, host: usize) {
    let target = release(0, 2);
    let truth = &mut trial.hosts[host].instances[0];
    truth.linked = Some(target);
    truth.is_proven = true;
    if let Some(process) = &mut truth.process {
        process.release = target;
    }
}

#[test]
fn what_is_begun() {
    let some = Scenario { only: vec![0, 1], ..scenario() };
    sees_in(&some, "ownership", "h003/web is not part of the rollout", |trial| begin(trial, drain(3)));
    sees("hold", "drain of h000/web was begun while the rollout is held", |trial| {
        ask(trial, OperatorRequest::Hold);
        begin(trial, drain(0));
    });
    sees("retries", "drain of h000/web is tried again after 1 failures", |trial| {
        begin(trial, drain(0));
        let result = ActionResult::Failed { why: String::new(), blame: Blame::Passing };
        let (action, detail) = (drain(0), ActionDetail::default());
        write(trial, RecordBody::ActionFinished { rollout: rollout(), action, result, detail });
        begin(trial, drain(0));
    });
    sees("turned back", "activate of h000/web was begun after it turned back", |trial| {
        ask(trial, OperatorRequest::Abort);
        begin(trial, activate(0));
    });
    sees("gates", "drain of h000/web was begun while a gate is amber", |trial| {
        trial.active.insert(0);
        begin(trial, drain(0));
    });
    sees("bad release", "a bad release is activated on h000/web", |trial| {
        trial.mark_bad(2);
        begin(trial, activate(0));
    });
    sees("order", "h000/web is to run something else", |trial| {
        let (instance, release) = (web(0), release(0, 3));
        begin(trial, Action::Activate { instance, release, generation: Generation(2) });
    });
    sees("prune", "v1 of h000/web would be removed", |trial| {
        begin(trial, Action::Prune { instance: web(0), keep: BTreeSet::new() });
    });
}

#[test]
fn the_order_of_waves() {
    sees("order", "h001/web is changed while h000/web of an earlier wave is not proven", |trial| {
        begin(trial, drain(1));
    });
    let standby = Scenario { standby: vec![3], ..scenario() };
    sees_in(&standby, "standby", "standby h003/web is changed before h000/web is proven", |trial| {
        let plan = &mut trial.check.rollouts.get_mut(&rollout()).unwrap().plan;
        plan.waves = plan.waves.split_off(plan.waves.len() - 1);
        begin(trial, drain(3));
    });
    let keep_for = Duration::from_secs(8);
    let halves = Scenario { strategy: Strategy::Halves { keep_for }, ..scenario() };
    sees_in(&halves, "fallback", "h002/web is changed while it is kept as the way back", |trial| {
        bring(trial, 0);
        bring(trial, 1);
        note(trial, Note::WaveProven { wave: 0 });
        begin(trial, drain(2));
    });
    let together = Scenario { strategy: Strategy::BlueGreen, ..scenario() };
    sees_in(&together, "together", "h000/web is let in before h001/web of its wave is proven", |trial| {
        bring(trial, 0);
        begin(trial, admit(0));
    });
    sees("wave", "wave 1 is called proven, and h000/web is not", |trial| {
        note(trial, Note::WaveProven { wave: 0 });
    });
}

#[test]
fn what_a_controller_was_told() {
    sees("reach", "activate of h000/web was begun, and its host is out of reach", |trial| {
        trial.hosts[0].is_cut = true;
        let told = trial.controllers[0].world.inventory.get_mut(&web(0).host).unwrap();
        told.unreachable = Some(Unreachable { since: stamp(0, 0), why: String::new() });
        trial.check_told(0, &activate(0));
    });
    sees("claims", "drain of h000/web was begun, which somebody else holds", |trial| {
        let claim = Claim {
            rollout: "another".parse().unwrap(),
            holder: String::new(),
            reason: String::new(),
            expires_at: stamp(5_000, 0),
        };
        trial.hosts[0].instances[0].ledger.claim = Some(claim);
        tell(trial, 0);
        trial.check_told(0, &drain(0));
    });
    sees("staged", "v2 is activated on h000/web, where it is not complete", |trial| {
        trial.check_told(0, &activate(0));
    });
    sees("goes back", "h000/web is switched again, and its host went back by itself 1 times", |trial| {
        let truth = &mut trial.hosts[0].instances[0];
        truth.staged.insert(release(0, 2));
        truth.gone_back = (Generation(2), 1);
        truth.ledger.history.push(LedgerEntry {
            at: stamp(0, 0),
            event: LedgerEvent::TurnedBack,
            release: None,
            generation: Generation(2),
            rollout: None,
            detail: String::new(),
        });
        tell(trial, 0);
        trial.check_told(0, &activate(0));
    });
}

/// The controller looks at a host.
fn tell(trial: &mut Trial<'_>, host: usize) {
    let report = trial.observe(host).unwrap();
    let told = trial.controllers[0].world.inventory.get_mut(&web(host).host).unwrap();
    told.report = Some((stamp(0, 0), report));
}

#[test]
fn turns() {
    let leave_out = |host| Note::LeaveOut { instance: web(host), why: String::new() };
    sees("budget", "2 hosts are left out, and 1 may be", |trial| {
        note(trial, leave_out(0));
        note(trial, leave_out(1));
    });
    let one = Scenario { only: vec![0], ..scenario() };
    sees_in(&one, "budget", "the last instance of a service, h000/web, is left out", |trial| {
        note(trial, leave_out(0));
    });
    let calm = Scenario { faults: Vec::new(), ..scenario() };
    let turn_back = || Note::TurnBack { why: String::new(), bad: BTreeSet::new() };
    sees_in(&calm, "no fault", "it turns back, and nothing went wrong", |trial| note(trial, turn_back()));
    sees("reasons", "it holds, and this is not true: the migration of v2 was begun", |trial| {
        let why = "the migration of v2 was begun and how it ended is not known".to_owned();
        note(trial, Note::Hold { why });
    });
}

#[test]
fn how_it_ends() {
    let done = || Outcome::Done { left_out: BTreeMap::new() };
    sees("outcome", "done, and h000/web does not serve its target", |trial| end(trial, done()));
    sees("outcome", "done, and h000/web was not confirmed", |trial| {
        (0..4).for_each(|host| bring(trial, host));
        end(trial, done());
    });
    sees("outcome", "refused, and h000/web was changed", |trial| {
        begin(trial, drain(0));
        end(trial, Outcome::Refused { why: String::new() });
    });
    sees("outcome", "turned back, and h000/web is not as it was before", |trial| {
        begin(trial, activate(0));
        bring(trial, 0);
        end(trial, Outcome::TurnedBack { why: String::new() });
    });
    sees("outcome", "stuck, and nothing is named", |trial| {
        end(trial, Outcome::Stuck { why: String::new(), instances: BTreeMap::new() });
    });
    sees("claims", "r000 has ended and still claims h000/web", |trial| {
        trial.hosts[0].instances[0].ledger.claim = Some(Claim {
            rollout: rollout(),
            holder: String::new(),
            reason: String::new(),
            expires_at: stamp(5_000, 0),
        });
        end(trial, Outcome::Refused { why: String::new() });
        trial.check_end();
    });
    sees("abort", "it was aborted, and is held", |trial| {
        trial.operator_asks(OperatorRequest::Hold);
        (trial.is_mended, trial.has_aborted, trial.deadline) = (true, true, u64::MAX);
        trial.controllers.iter_mut().for_each(|one| one.is_alive = false);
        trial.care();
    });
    sees("does not end", "[]", |trial| {
        (trial.is_mended, trial.has_aborted, trial.deadline, trial.now) = (true, true, 0, 1);
        trial.care();
    });
}

#[test]
fn what_clients_get() {
    sees("drain", "h000/web: it is stopped while balancer 0 sends it requests", |trial| {
        trial.check_stop(0, 0);
    });
    sees("drain", "h000/web: 2 sessions are cut before their time is up", |trial| {
        let server = trial.balancers[0].servers[0].as_mut().unwrap();
        server.admission = greenlight_model::traffic::Admission::Drain;
        server.sessions = 2;
        trial.check_stop(0, 0);
    });
    sees("admission", "h000/web is admitted and proves nothing", |trial| {
        begin(trial, activate(0));
        trial.hosts[0].instances[0].is_proven = false;
        trial.check_admission(0, 0, 0);
    });
    // One that was not switched, too, when its host can be looked at.
    sees("admission", "h000/web is admitted and proves nothing", |trial| {
        trial.hosts[0].instances[0].is_proven = false;
        trial.check_admission(0, 0, 0);
    });
    sees("bad release", "h000/web is admitted with a bad release", |trial| {
        trial.mark_bad(2);
        trial.now = 60_000;
        bring(trial, 0);
        trial.check_admission(0, 0, 60_000);
    });
    sees("answers", "clients of h000/web are answered by v2, which is not proven there", |trial| {
        trial.check_answer(0, 0, 0, release(0, 2));
    });
    sees("floor", "without h000/web, 1 serve, and the floor is 2", |trial| {
        trial.hosts[1].is_up = false;
        trial.hosts[2].is_up = false;
        trial.check_floor(0, 0, 0, false);
    });
}

#[test]
fn what_happens_on_hosts() {
    let begin = |trial: &mut Trial<'_>, part| trial.migration_begins(0, release(0, 2), part, &rollout());
    let migrate = |trial: &mut Trial<'_>| begin(trial, MigrationPhase::Expand);
    sees("migration", "older code may run on h000/web", |trial| begin(trial, MigrationPhase::Contract));
    sees("migration", "the migration of web runs beside another one", |trial| {
        migrate(trial);
        migrate(trial);
    });
    sees("migration", "the migration of web runs a second time", |trial| {
        migrate(trial);
        trial.check.migration_done(0);
        migrate(trial);
    });
    sees("migration", "the migration of web runs again after an unknown end", |trial| {
        migrate(trial);
        trial.check.migration_broken(0);
        trial.migration_begins(0, release(0, 2), MigrationPhase::Expand, &"later".parse().unwrap());
    });
    sees("migration", "the migration of web runs again after it failed in the same rollout", |trial| {
        migrate(trial);
        trial.check.migration_failed(0);
        migrate(trial);
    });
    let back = Scenario { direction: Direction::Back, ..scenario() };
    sees_in(&back, "migration", "a migration runs on the way back", migrate);
    sees("schema", "v2 is switched to on h000/web, and its migration has not run", |trial| {
        trial.check_schema(0, 0, release(0, 2));
    });
    sees("prune", "v2 is removed from h000/web, which its rollout needs", |trial| {
        trial.check_prune(0, 0, release(0, 2));
    });
    sees("generation", "the generation of h000/web fell to 1", |trial| {
        trial.hosts[0].instances[0].generation_seen = Generation(2);
        assert!(trial.update(0, 0, |_| Ok(())).is_ok());
    });
    sees("lock", "two changes at once of h000/web", |trial| {
        for _ in 0..2 {
            trial.hosts[0].instances[0].lock = None;
            let from = From { controller: 0, purpose: Purpose::Nothing, began: 0 };
            let request = Request::Smoke { release: release(0, 1) };
            trial.arrives(from, 0, 0, request);
        }
    });
}

#[test]
fn what_the_log_and_the_interlock_say() {
    sees("records", "an illegal record was written", |trial| {
        end(trial, Outcome::Refused { why: String::new() });
        trial.report.violation = None;
        end(trial, Outcome::Refused { why: String::new() });
    });
    sees("interlock", "the interlock refuses to activate h000/web: rule 8 (retention)", |trial| {
        let rollout = trial.history.rollouts[&rollout()].clone();
        let world = &mut trial.controllers[0].world;
        world.in_flight.clear();
        world.rollout = rollout;
        let step = Step { action: activate(0), why: String::new() };
        assert!(trial.begin(0, vec![step]).is_ok());
    });
}

#[test]
fn a_rollout_without_faults_breaks_nothing() {
    let seen = seen_in(&Scenario { faults: Vec::new(), ..scenario() }, |trial| {
        assert_eq!(trial.history.rollouts[&rollout()].under_way.len(), 4);
        assert!(
            trial.history.rollouts[&rollout()]
                .under_way
                .values()
                .all(|one| one.action.verb() == Verb::Preflight)
        );
    });
    assert_eq!(seen, None);
}
