//! The way forward, strategy by strategy.

use super::*;

#[test]
fn rolling_one_by_one() {
    let run = expect(
        &fleet("web: b a"),
        &[
            "drain b/web",
            "activate v2 b/web",
            "confirm b/web",
            "admit b/web",
            "wave 1 proven",
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "admit a/web",
            "wave 2 proven",
            "done",
        ],
    );
    assert_eq!(run.trace[..3], ["preflight a/web b/web", "claim a/web b/web", "stage a/web b/web"]);
}

#[test]
fn rolling_in_shares() {
    let strategy = rolling(&[share(50)]);
    expect(
        &Fleet { strategy, ..fleet("web: a b c d") },
        &[
            "drain a/web b/web",
            "activate v2 a/web b/web",
            "confirm a/web b/web",
            "admit a/web b/web",
            "wave 1 proven",
            "drain c/web d/web",
            "activate v2 c/web d/web",
            "confirm c/web d/web",
            "admit c/web d/web",
            "wave 2 proven",
            "done",
        ],
    );
}

#[test]
fn rolling_in_growing_batches_under_the_floor() {
    let strategy = rolling(&[BatchSize::Count(1), BatchSize::Count(2)]);
    expect(
        &Fleet { strategy, floor: Floor::Count(3), ..fleet("web: a b c d") },
        &[
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "admit a/web",
            "wave 1 proven",
            "drain b/web",
            "activate v2 b/web",
            "confirm b/web",
            "admit b/web",
            "drain c/web",
            "activate v2 c/web",
            "confirm c/web",
            "admit c/web",
            "wave 2 proven",
            "drain d/web",
            "activate v2 d/web",
            "confirm d/web",
            "admit d/web",
            "wave 3 proven",
            "done",
        ],
    );
}

#[test]
fn blue_green_makes_the_first_half_ready_before_traffic_moves() {
    expect(
        &Fleet { strategy: Strategy::BlueGreen, ..fleet("web: a b c d") },
        &[
            "drain a/web b/web",
            "activate v2 a/web b/web",
            "confirm a/web b/web",
            "admit a/web b/web",
            "wave 1 proven",
            "drain c/web d/web",
            "activate v2 c/web d/web",
            "confirm c/web d/web",
            "admit c/web d/web",
            "wave 2 proven",
            "done",
        ],
    );
}

#[test]
fn blue_green_waits_for_the_slowest_before_it_admits() {
    // b's activation is lost on the way once; a is not admitted alone.
    let mut lost = 0;
    let fail = |action: &Action| {
        let is_lost = action.verb() == Verb::Activate && *action.instance() == instance("b/web") && lost == 0;
        lost += u32::from(is_lost);
        is_lost.then(|| fault("link lost", Blame::Passing))
    };
    let world = Fleet { strategy: Strategy::BlueGreen, ..fleet("web: a b c d") }.world();
    let run = run(world, Faults { fail: Box::new(fail), ..Faults::default() });
    let trace = run.trace[3..8].join(" | ");
    assert_eq!(
        trace,
        "drain a/web b/web | activate v2 a/web b/web | failed: activate b/web: link lost | confirm a/web, activate v2 b/web | confirm b/web"
    );
    assert_eq!(run.trace[8], "admit a/web b/web");
    assert_eq!(run.trace.last().unwrap(), "done");
}

#[test]
fn halves_keep_the_old_half_and_the_standby_goes_last() {
    let strategy = Strategy::Halves { keep_for: Duration::from_secs(3600) };
    let run = expect(
        &Fleet { strategy, standby: "s", ..fleet("web: s a b") },
        &[
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "admit a/web",
            "wave 1 proven",
            "drain b/web",
            "activate v2 b/web",
            "confirm b/web",
            "admit b/web",
            "wave 2 proven",
            "drain s/web",
            "activate v2 s/web",
            "confirm s/web",
            "admit s/web",
            "wave 3 proven",
            "done",
        ],
    );
    let proven = &run.world.rollout.waves_proven;
    assert!(proven[&1].duration_since(proven[&0]).as_secs() >= 3600);
    assert!(proven[&2].duration_since(proven[&1]).as_secs() < 60);
}

#[test]
fn a_single_host_has_no_floor() {
    expect(
        &fleet("web: a"),
        &["drain a/web", "activate v2 a/web", "confirm a/web", "admit a/web", "wave 1 proven", "done"],
    );
}

#[test]
fn a_service_without_a_balancer_keeps_its_floor_too() {
    let strategy = rolling(&[BatchSize::Count(3)]);
    expect(
        &Fleet { strategy, floor: Floor::Count(2), ..fleet("worker: a b c") },
        &[
            "activate v2 a/worker",
            "confirm a/worker, activate v2 b/worker",
            "confirm b/worker, activate v2 c/worker",
            "confirm c/worker",
            "wave 1 proven",
            "done",
        ],
    );
}

#[test]
fn services_that_share_a_host_change_with_it() {
    let run = expect(
        &fleet("web: a b; worker: b"),
        &[
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "admit a/web",
            "wave 1 proven",
            "drain b/web, activate v2 b/worker",
            "activate v2 b/web",
            "confirm b/worker",
            "confirm b/web",
            "admit b/web",
            "wave 2 proven",
            "done",
        ],
    );
    assert!(run.trace.contains(&"unclaim a/web b/web b/worker".to_owned()));
}

#[test]
fn a_first_deploy_needs_no_capacity() {
    expect(
        &Fleet { is_first: true, ..fleet("web: a b") },
        &[
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "admit a/web",
            "wave 1 proven",
            "drain b/web",
            "activate v2 b/web",
            "confirm b/web",
            "admit b/web",
            "wave 2 proven",
            "done",
        ],
    );
}

#[test]
fn the_same_release_again_changes_nothing() {
    let run = run(Fleet { is_again: true, migrating: "web", ..fleet("web: a b") }.world(), Faults::default());
    assert_eq!(
        run.trace,
        [
            "preflight a/web b/web",
            "claim a/web b/web",
            "wave 1 proven",
            "wave 2 proven",
            "unclaim a/web b/web",
            "done"
        ]
    );
}

#[test]
fn what_an_interrupted_rollout_left_unconfirmed_is_confirmed() {
    let mut world = Fleet { is_again: true, ..fleet("web: a b") }.world();
    report_mut(&mut world, &instance("b/web")).ledger.confirmed = None;
    expect_with(world, Faults::default(), &["wave 1 proven", "confirm b/web", "wave 2 proven", "done"]);
}

#[test]
fn sessions_get_their_time_to_end() {
    let mut driver = Driver::new(Fleet { sessions: 3, ..fleet("web: a b") }.world(), Faults::default());
    while driver.simulation.world().rollout.drained_at.is_empty() {
        driver.turn();
    }
    // The drain itself takes 200 ms; the sessions last longer than the turn after it.
    driver.turn();
    let greenlight_model::decision::Decision::Proceed { steps, waits } =
        greenlight_planner::decide(driver.simulation.world())
    else {
        panic!("it waits")
    };
    assert!(steps.is_empty());
    let until = driver.simulation.world().rollout.drained_at[&instance("a/web")] + Duration::from_secs(30);
    assert_eq!(waits[0], Wait::Sessions { instance: instance("a/web"), left: 3, until });
    assert_eq!(driver.finish().trace.last().unwrap(), "done");
}

#[test]
fn smoke_and_migrations_come_before_the_first_change() {
    let run = run(
        Fleet { has_smoke: true, migrating: "api web", balanced: Vec::new(), ..fleet("api: b; web: a b") }
            .world(),
        Faults::default(),
    );
    assert_eq!(
        run.trace[2..7],
        [
            "stage a/web b/api b/web",
            "smoke a/web b/api b/web",
            "migrate b/api",
            "migrate a/web",
            "activate v2 b/api, activate v2 b/web"
        ]
    );
}

/// A fleet whose migration takes something away at its end.
fn contracting(fleet: Fleet) -> World {
    let mut world = Fleet { migrating: "web", ..fleet }.world();
    let web = world.services.get_mut(&"web".parse().unwrap()).unwrap();
    web.migrate.as_mut().unwrap().contract = Some(vec!["contract".to_owned()]);
    world
}

#[test]
fn what_a_migration_takes_away_comes_when_everything_runs_the_release() {
    let world = contracting(fleet("web: a b"));
    let trace = run(world, Faults::default()).trace;
    let end = ["wave 2 proven", "contract a/web", "unclaim a/web b/web", "done"];
    assert!(trace.ends_with(&end.map(str::to_owned)), "{trace:#?}");
    let world = contracting(Fleet { is_again: true, ..fleet("web: a b") });
    expect_with(world, Faults::default(), &["wave 1 proven", "wave 2 proven", "contract a/web", "done"]);
}

#[test]
fn nothing_is_taken_away_while_older_code_may_run() {
    let world = contracting(Fleet { failure_budget: 1, ..fleet("web: a b c") });
    let run = run(world, failing(Verb::Activate, "c/web", Blame::Release));
    assert!(run.trace.last().is_some_and(|line| line.starts_with("done")), "{:#?}", run.trace);
    assert!(!run.trace.iter().any(|line| line.contains("contract")), "{:#?}", run.trace);
}

#[test]
fn what_takes_away_and_fails_is_held_and_not_turned_back() {
    let run = run(contracting(fleet("web: a b")), failing(Verb::Contract, "a/web", Blame::Release));
    let is_held = |line: &String| line.starts_with("hold: ") && line.contains("runs it again");
    assert!(run.trace.iter().any(is_held), "{:#?}", run.trace);
    assert_eq!(run.trace.last().unwrap(), "stopped");
}

#[test]
fn where_something_was_taken_away_a_rollout_holds_instead_of_turning_back() {
    let mut world = Fleet { migrating: "web", ..fleet("web: a b") }.world();
    world.rollout.plan.losses.push(Loss {
        service: "web".parse().unwrap(),
        phase: MigrationPhase::Expand,
        place: "2.sql:1".to_owned(),
        statement: "DROP TABLE users".to_owned(),
        what: "takes away the table users".to_owned(),
    });
    let run = run(world, failing(Verb::Activate, "b/web", Blame::Release));
    let is_held = |line: &String| line.starts_with("hold: ") && line.contains("2.sql:1: DROP TABLE users");
    assert!(run.trace.iter().any(is_held), "{:#?}", run.trace);
    assert_eq!(run.trace.last().unwrap(), "stopped");
}

#[test]
fn a_rollback_goes_at_once_as_far_as_the_floor_allows() {
    let fleet = Fleet {
        direction: Direction::Back,
        migrating: "web",
        has_smoke: true,
        strategy: Strategy::Halves { keep_for: Duration::from_secs(3600) },
        standby: "s",
        floor: Floor::Count(2),
        ..fleet("web: a b c s")
    };
    expect(
        &fleet,
        &[
            "drain a/web b/web",
            "activate v2 a/web b/web",
            "confirm a/web b/web",
            "admit a/web b/web",
            "drain c/web",
            "activate v2 c/web",
            "confirm c/web",
            "admit c/web",
            "wave 1 proven",
            "drain s/web",
            "activate v2 s/web",
            "confirm s/web",
            "admit s/web",
            "wave 2 proven",
            "done",
        ],
    );
}
