//! What is waited for, and what it is called.

use super::*;

fn gated(light: Light) -> greenlight_model::world::World {
    let mut world = fleet("web: a b").world();
    world.gates.push(Gate { name: "approval".to_owned(), light });
    world
}

fn red() -> Light {
    Light::Red { why: "nobody has approved".to_owned() }
}

#[test]
fn a_gate_stops_everything_before_the_first_change() {
    let run = run(gated(red()), Faults::default());
    assert_eq!(run.trace, ["stopped"]);
    let why = "nobody has approved".to_owned();
    assert_eq!(run.waits, [Wait::Gate { name: "approval".to_owned(), why }]);
}

#[test]
fn a_gate_that_turns_red_later_does_not_stop_half_a_rollout() {
    let mut driver = Driver::new(gated(Light::Green { why: "yes".to_owned() }), Faults::default());
    while driver.simulation.world().rollout.touched.is_empty() {
        driver.turn();
    }
    driver.simulation.world_mut().gates[0].light = red();
    assert_eq!(driver.finish().trace.last().unwrap(), "done");
}

#[test]
fn a_hold_begins_nothing_but_a_confirmation_and_a_resume_goes_on() {
    let mut driver = Driver::new(fleet("web: a b").world(), Faults::default());
    while driver.simulation.world().rollout.touched.is_empty() {
        driver.turn();
    }
    driver.simulation.ask(OperatorRequest::Hold, "lunch").unwrap();
    let begun = driver.begun();
    let waits = loop {
        if let Turn::Stopped(waits) = driver.turn() {
            break waits;
        }
    };
    // Its host would go back by itself otherwise.
    assert_eq!(driver.begun(), begun + 1);
    assert!(driver.trace().contains("confirm a/web"), "{}", driver.trace());
    assert_eq!(waits, [Wait::Held { by: "op@desk".to_owned(), why: "lunch".to_owned() }]);
    driver.simulation.ask(OperatorRequest::Resume, "").unwrap();
    assert_eq!(driver.finish().trace.last().unwrap(), "done");
}

#[test]
fn on_failure_hold_keeps_everything_for_a_person() {
    let fleet = Fleet { on_failure: OnFailure::Hold, ..fleet("web: a b") };
    let mut driver = Driver::new(fleet.world(), failing(Verb::Activate, "a/web", Blame::Release));
    while !matches!(driver.turn(), Turn::Stopped(_)) {}
    assert!(
        driver.trace().ends_with("hold: a/web: activate failed: it broke\nstopped"),
        "{}",
        driver.trace()
    );
    driver.simulation.ask(OperatorRequest::Abort, "no").unwrap();
    assert_eq!(driver.finish().trace.last().unwrap(), "turned back: aborted by op@desk: no");
}

#[test]
fn a_migration_of_unknown_end_holds_and_is_never_run_again() {
    let mut world = Fleet { migrating: "web", ..fleet("web: a b") }.world();
    world.rollout.migrations.insert("web".parse().unwrap(), MigrationState::Begun);
    let mut driver = Driver::new(world, Faults::default());
    while !matches!(driver.turn(), Turn::Stopped(_)) {}
    assert!(driver.trace().contains("hold: the migration of v2 was begun and how it ended is not known"));
    driver.simulation.ask(OperatorRequest::Resume, "").unwrap();
    while !matches!(driver.turn(), Turn::Stopped(_)) {}
    driver.simulation.ask(OperatorRequest::Abort, "").unwrap();
    let run = driver.finish();
    assert_eq!(run.trace.last().unwrap(), "turned back: aborted by op@desk");
    assert!(!run.trace.iter().any(|line| line.starts_with("migrate")));
}

#[test]
fn a_migration_that_the_ledger_knows_is_not_run_again() {
    let first = run(Fleet { migrating: "web", ..fleet("web: a b") }.world(), Faults::default());
    assert!(first.trace.contains(&"migrate a/web".to_owned()));
    let mut world = Fleet { migrating: "web", ..fleet("web: a b") }.world();
    let history = first.world.report(&instance("a/web")).unwrap().ledger.history.clone();
    report_mut(&mut world, &instance("a/web")).ledger.history = history;
    let second = run(world, Faults::default());
    assert!(!second.trace.iter().any(|line| line.starts_with("migrate")));
    assert_eq!(second.trace.last().unwrap(), "done");
}

#[test]
fn a_floor_that_others_break_is_waited_for_and_said() {
    let mut world = Fleet { floor: Floor::Count(2), ..fleet("web: a b c") }.world();
    if let BalancerReport::Servers(servers) = &mut world.traffic[0] {
        servers.get_mut(&host("c")).unwrap().health = ServerHealth::Down;
    }
    let run = run(world, Faults::default());
    assert_eq!(run.trace.last().unwrap(), "stopped");
    assert_eq!(run.waits[0], Wait::Floor { service: "web".parse().unwrap(), serving: 2, floor: 2 });
}

#[test]
fn a_balancer_that_cannot_be_read_is_waited_for() {
    let mut driver = Driver::new(fleet("web: a b").world(), Faults::default());
    while driver.simulation.world().rollout.touched.is_empty() {
        driver.turn();
    }
    let traffic = driver.simulation.world().traffic.clone();
    driver.simulation.world_mut().traffic = vec![BalancerReport::Unreachable { why: "refused".to_owned() }];
    while !matches!(driver.turn(), Turn::Stopped(_)) {}
    assert!(driver.trace().ends_with("confirm a/web\nstopped"), "{}", driver.trace());
    driver.simulation.world_mut().traffic = traffic;
    if let BalancerReport::Servers(servers) = &mut driver.simulation.world_mut().traffic[0] {
        servers.get_mut(&host("a")).unwrap().health = ServerHealth::Up;
    }
    assert_eq!(driver.finish().trace.last().unwrap(), "done");
}

#[test]
fn a_claim_lost_in_the_middle_is_waited_for() {
    let mut driver = Driver::new(fleet("web: a b").world(), Faults::default());
    while driver.simulation.world().rollout.waves_proven.is_empty() {
        driver.turn();
    }
    report_mut(driver.simulation.world_mut(), &instance("b/web")).ledger.claim = Some(foreign_claim(600));
    let run = driver.finish();
    assert_eq!(run.trace.last().unwrap(), "done");
    // It expires, is claimed again, and only then is the instance touched.
    assert!(
        run.trace.join("\n").contains("wave 1 proven\nclaim b/web\ndrain b/web"),
        "{}",
        run.trace.join("\n")
    );
}
