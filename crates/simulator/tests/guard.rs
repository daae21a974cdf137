//! What planner and interlock make of hosts that went back by themselves, and of migrations that only ledgers know.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use greenlight_model::decision::Outcome;
use greenlight_model::host::{Answer, LedgerEntry, LedgerEvent, ProcessState};
use greenlight_model::id::{Generation, ReleaseId};
use greenlight_model::rollout::{FormerMigration, OperatorRequest};
use greenlight_model::world::World;
use greenlight_simulator::{Faults, Turn};

use support::{Driver, Fleet, fleet, instance, report_mut, start};

const A: &str = "a/web";

fn enter(world: &mut World, event: LedgerEvent, release: Option<ReleaseId>, generation: Generation) {
    let detail = "not confirmed within 1m 30s".to_owned();
    let entry = LedgerEntry { at: start(), event, release, generation, rollout: None, detail };
    report_mut(world, &instance(A)).ledger.history.push(entry);
}

/// The host of `a/web` does what its guard does.
fn go_back(world: &mut World) {
    let generation = world.rollout.plan.generation;
    let old = world.rollout.plan.baseline[&instance(A)];
    let now = world.now;
    let report = report_mut(world, &instance(A));
    report.linked = old;
    report.ledger.previous = report.ledger.active;
    report.ledger.active = old;
    for process in report.processes.values_mut() {
        process.state = ProcessState::Running { pid: 1, started_at: now };
        process.answer = Answer::Release { release: old.unwrap(), proof: "simulated".to_owned() };
    }
    enter(world, LedgerEvent::Switched, old, generation);
    enter(world, LedgerEvent::TurnedBack, old, generation);
}

/// Up to the moment at which `a/web` was activated and not confirmed.
fn activated(fleet: &Fleet) -> Driver<'static> {
    let mut driver = Driver::new(fleet.world(), Faults::default());
    let is_old = |world: &World| {
        world.report(&instance(A)).unwrap().ledger.active == world.rollout.plan.baseline[&instance(A)]
    };
    while is_old(driver.simulation.world()) {
        driver.turn();
    }
    driver
}

fn count(trace: &[String], line: &str) -> usize {
    trace.iter().filter(|found| *found == line).count()
}

#[test]
fn a_host_that_went_back_is_activated_again() {
    let mut driver = activated(&fleet("web: a b"));
    go_back(driver.simulation.world_mut());
    let run = driver.finish();
    assert_eq!(count(&run.trace, "activate v2 a/web"), 2, "{:#?}", run.trace);
    assert_eq!(run.trace.last().unwrap(), "done");
}

#[test]
fn one_that_does_so_again_and_again_has_failed() {
    let mut driver = activated(&Fleet { retries: 1, ..fleet("web: a b") });
    // Once under an earlier controller of the rollout, and now again.
    go_back(driver.simulation.world_mut());
    go_back(driver.simulation.world_mut());
    let run = driver.finish();
    let why = "a/web: the host went back by itself 2 times: not confirmed within 1m 30s";
    assert_eq!(run.outcome, Some(Outcome::TurnedBack { why: why.to_owned() }), "{:#?}", run.trace);
}

#[test]
fn an_activation_that_is_cut_after_the_host_went_back_once_has_not_crashed() {
    let mut driver = activated(&fleet("web: a b"));
    let plan = driver.simulation.world().rollout.plan.clone();
    let new = Some(plan.targets[&"web".parse().unwrap()]);
    let world = driver.simulation.world_mut();
    go_back(world);
    // Switched again, and not started: the agent died in the middle.
    let report = report_mut(world, &instance(A));
    (report.linked, report.ledger.active) = (new, new);
    for process in report.processes.values_mut() {
        process.state = ProcessState::Stopped;
    }
    enter(world, LedgerEvent::Switched, new, plan.generation);
    let run = driver.finish();
    assert_eq!(run.trace.last().unwrap(), "done", "{:#?}", run.trace);
}

#[test]
fn an_abort_finds_the_old_release_where_the_host_went_back() {
    let mut driver = activated(&fleet("web: a b"));
    go_back(driver.simulation.world_mut());
    driver.simulation.ask(OperatorRequest::Abort, "no").unwrap();
    let run = driver.finish();
    assert_eq!(run.trace.last().unwrap(), "turned back: aborted by op@desk: no");
    assert_eq!(count(&run.trace, "activate v1 a/web"), 1, "{:#?}", run.trace);
}

#[test]
fn a_migration_that_only_a_ledger_knows_to_be_begun_is_held() {
    let mut world = Fleet { migrating: "web", ..fleet("web: a b") }.world();
    let new = world.rollout.plan.targets[&"web".parse().unwrap()];
    enter(&mut world, LedgerEvent::MigrationBegun, Some(new), Generation(1));
    let mut driver = Driver::new(world, Faults::default());
    while !matches!(driver.turn(), Turn::Stopped(_)) {}
    let trace = driver.trace();
    assert!(trace.contains("hold: the migration of v2 was begun and how it ended is not known"), "{trace}");
    assert!(!trace.lines().any(|line| line.starts_with("migrate")), "{trace}");
}

/// A world whose migration is run first, and what it comes to: migrated, held, or skipped.
fn migrated(change: impl FnOnce(&mut World, ReleaseId)) -> &'static str {
    let mut world = Fleet { migrating: "web", ..fleet("web: a b") }.world();
    let new = world.rollout.plan.targets[&"web".parse().unwrap()];
    change(&mut world, new);
    let mut driver = Driver::new(world, Faults::default());
    while !matches!(driver.turn(), Turn::Stopped(_) | Turn::Ended(_)) {}
    let trace = driver.trace();
    match (trace.contains("migrate a/web"), trace.contains("hold: the migration of v2 was begun")) {
        (true, false) => "migrated",
        (false, true) => "held",
        (false, false) if trace.ends_with("done") => "skipped",
        _ => panic!("{trace}"),
    }
}

fn former(world: &mut World, is_done: bool) {
    let former = FormerMigration { on: instance(A), is_done };
    world.rollout.migrated_before.insert("web".parse().unwrap(), former);
}

#[test]
fn a_migration_that_ran_in_an_earlier_rollout_is_skipped() {
    assert_eq!(migrated(|_, _| {}), "migrated");
    assert_eq!(migrated(|world, _| former(world, true)), "skipped");
    // A rollout over some hosts only does not ask those where it ran.
    let elsewhere = |world: &mut World, new: ReleaseId| {
        let b = instance("b/web");
        enter(world, LedgerEvent::Migrated, Some(new), Generation(1));
        world.rollout.plan.baseline.remove(&instance(A));
        world.rollout.plan.waves.iter_mut().for_each(|wave| wave.instances.retain(|one| *one == b));
        world.rollout.plan.waves.retain(|wave| !wave.instances.is_empty());
    };
    assert_eq!(migrated(elsewhere), "skipped");
}

#[test]
fn a_migration_of_an_earlier_rollout_whose_end_only_a_lost_ledger_knew_is_held() {
    assert_eq!(migrated(|world, _| former(world, false)), "held");
    // A ledger that is there and knows of no beginning is believed.
    let staged = |world: &mut World, new: ReleaseId| {
        former(world, false);
        enter(world, LedgerEvent::Staged, Some(new), Generation(1));
    };
    assert_eq!(migrated(staged), "migrated");
}
