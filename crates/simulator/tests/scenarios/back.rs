//! Rollouts that fail, leave hosts out or turn back.

use super::*;

#[test]
fn a_second_wave_that_fails_turns_all_back_old_in_before_new_out() {
    let strategy = rolling(&[BatchSize::Count(2)]);
    let fleet = Fleet { strategy, floor: Floor::Count(2), ..fleet("web: a b c d") };
    expect_with(
        fleet.world(),
        failing(Verb::Activate, "c/web", Blame::Release),
        &[
            "drain a/web b/web",
            "activate v2 a/web b/web",
            "confirm a/web b/web",
            "admit a/web b/web",
            "wave 1 proven",
            "drain c/web d/web",
            "activate v2 c/web d/web",
            "failed: activate c/web: it broke",
            "turn back, 1 bad: c/web: activate failed: it broke",
            "activate v1 c/web d/web",
            "confirm c/web d/web",
            "admit c/web d/web",
            "drain a/web b/web",
            "activate v1 a/web b/web",
            "confirm a/web b/web",
            "admit a/web b/web",
            "turned back: c/web: activate failed: it broke",
        ],
    );
}

/// The floor would let the new ones out at once; the old ones, which need only be let in, go first all the same.
#[test]
fn what_was_only_drained_is_let_in_before_the_new_is_taken_out() {
    let fleet = Fleet { strategy: Strategy::BlueGreen, ..fleet("web: a b c d") };
    let mut driver = Driver::new(fleet.world(), Faults::default());
    while driver.simulation.world().rollout.waves_proven.is_empty()
        || driver.simulation.world().in_flight.is_empty()
    {
        driver.turn();
    }
    driver.simulation.ask(OperatorRequest::Abort, "").unwrap();
    let trace = driver.finish().trace.join("\n");
    let back = trace.split_once("wave 1 proven\ndrain c/web d/web\n").unwrap().1;
    assert!(back.starts_with("admit c/web d/web\ndrain a/web b/web\nactivate v1 a/web b/web\n"), "{trace}");
}

#[test]
fn a_first_deploy_that_fails_is_taken_off() {
    expect_with(
        Fleet { is_first: true, floor: Floor::Count(2), ..fleet("web: a b c") }.world(),
        failing(Verb::Activate, "b/web", Blame::Release),
        &[
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "admit a/web",
            "wave 1 proven",
            "drain b/web",
            "activate v2 b/web",
            "failed: activate b/web: it broke",
            "turn back, 1 bad: b/web: activate failed: it broke",
            "drain a/web, deactivate b/web",
            "deactivate a/web",
            "turned back: b/web: activate failed: it broke",
        ],
    );
}

#[test]
fn the_budget_leaves_one_out_and_it_goes_back_by_itself() {
    expect_with(
        Fleet { failure_budget: 1, ..fleet("web: a b c") }.world(),
        failing(Verb::Activate, "b/web", Blame::Host),
        &[
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "admit a/web",
            "wave 1 proven",
            "drain b/web",
            "activate v2 b/web",
            "failed: activate b/web: it broke",
            "leave out b/web: activate failed: it broke",
            "wave 2 proven",
            "drain c/web, activate v1 b/web",
            "activate v2 c/web",
            "confirm b/web",
            "confirm c/web",
            "admit b/web",
            "admit c/web",
            "wave 3 proven",
            "done without b/web",
        ],
    );
}

#[test]
fn one_that_cannot_go_back_stays_out_and_is_named() {
    let fail = |action: &Action| {
        let is_b = *action.instance() == instance("b/web");
        (is_b && action.verb() == Verb::Activate).then(|| fault("disk is dead", Blame::Host))
    };
    let faults = || Faults { fail: Box::new(fail), ..Faults::default() };
    let spared = Fleet { failure_budget: 1, ..fleet("web: a b c") };
    let run = run(spared.world(), faults());
    let Some(Outcome::Done { left_out }) = run.outcome else { panic!("{}", run.trace.join("\n")) };
    assert_eq!(
        left_out[&instance("b/web")],
        "activate failed: disk is dead; and it could not go back: activate failed: disk is dead"
    );
    // With a floor of 2 the third cannot leave while the second stays out, which spends the budget; nor can the first
    // go back.
    let run = support::run(Fleet { floor: Floor::Count(2), ..spared }.world(), faults());
    let Some(Outcome::Stuck { instances, .. }) = run.outcome else { panic!("{}", run.trace.join("\n")) };
    assert_eq!(
        instances[&instance("a/web")],
        "taking it out would leave fewer than 2 of 3 instances of web serving, and 1 cannot serve again"
    );
    assert_eq!(instances[&instance("b/web")], "activate failed: disk is dead");
}

#[test]
fn the_last_instance_of_a_service_is_never_left_out() {
    let run = run(
        Fleet { failure_budget: 5, ..fleet("web: a") }.world(),
        failing(Verb::Activate, "a/web", Blame::Release),
    );
    assert_eq!(run.trace.last().unwrap(), "turned back: a/web: activate failed: it broke");
}

#[test]
fn a_crash_after_the_proof_is_a_failure() {
    let crash = |action: &Action| {
        let is_new_b =
            *action.instance() == instance("b/web") && action.release().unwrap().as_bytes()[0] == 2;
        is_new_b.then_some(Duration::from_secs(6))
    };
    let run = run(fleet("web: a b c").world(), Faults { crash: Box::new(crash), ..Faults::default() });
    let turned = run.trace.iter().find(|line| line.starts_with("turn back")).unwrap();
    assert_eq!(turned, "turn back, 0 bad: b/web: it proved v2 and no longer does: process main: it crashed");
    assert!(run.trace.last().unwrap().starts_with("turned back"), "{}", run.trace.join("\n"));
}

/// Before it is confirmed, and between that and its admission.
#[test]
fn a_crash_right_after_the_proof_is_not_tried_again() {
    for after_ms in [100, 600] {
        let crash = |action: &Action| {
            (action.release().unwrap().as_bytes()[0] == 2).then_some(Duration::from_millis(after_ms))
        };
        let run = run(fleet("web: a b").world(), Faults { crash: Box::new(crash), ..Faults::default() });
        assert_eq!(run.trace.iter().filter(|line| line.starts_with("activate v2")).count(), 1);
        assert_eq!(
            run.trace.last().unwrap(),
            "turned back: a/web: it proved v2 and no longer does: process main: it crashed"
        );
    }
}

#[test]
fn one_that_the_balancer_does_not_see_up_has_failed() {
    let mut driver = Driver::new(fleet("web: a b").world(), Faults::default());
    loop {
        let turn = driver.turn();
        // The balancer's own check of a fails whatever a says.
        if let BalancerReport::Servers(servers) = &mut driver.simulation.world_mut().traffic[0]
            && matches!(turn, Turn::Passed(_))
        {
            servers.get_mut(&host("a")).unwrap().health = ServerHealth::Down;
        }
        if matches!(turn, Turn::Noted(_)) {
            break;
        }
    }
    assert!(
        driver.trace().ends_with(
            "turn back, 0 bad: a/web: the balancer does not see it up 30.0s after it was admitted"
        ),
        "{}",
        driver.trace()
    );
}

#[test]
fn a_host_lost_in_its_turn_is_waited_for_and_then_given_up() {
    let mut driver = Driver::new(fleet("web: a b c").world(), Faults::default());
    while !driver.simulation.world().rollout.touched.contains(&instance("b/web")) {
        driver.turn();
    }
    cut(driver.simulation.world_mut(), "b", true);
    let run = driver.finish();
    assert!(
        run.trace.iter().any(|line| line.contains("turn back, 0 bad: b/web: it cannot be reached since"))
    );
    assert_eq!(run.trace.last().unwrap(), "stuck: b/web");
    let Some(Outcome::Stuck { instances, .. }) = run.outcome else { panic!("{}", run.trace.join("\n")) };
    assert!(instances[&instance("b/web")].starts_with("it cannot be reached since"));
}

#[test]
fn a_migration_that_fails_turns_back_and_marks_the_release() {
    expect_with(
        Fleet { migrating: "web", ..fleet("web: a b") }.world(),
        failing(Verb::Migrate, "*", Blame::Release),
        &[
            "migrate a/web",
            "failed: migrate a/web: it broke",
            "turn back, 1 bad: the migration of v2 failed on a/web: it broke",
            "turned back: the migration of v2 failed on a/web: it broke",
        ],
    );
}

#[test]
fn a_smoke_start_that_fails_turns_back_before_any_change() {
    let run = expect_with(
        Fleet { has_smoke: true, ..fleet("web: a b") }.world(),
        failing(Verb::Smoke, "b/web", Blame::Release),
        &[
            "failed: smoke b/web: it broke",
            "turn back, 1 bad: b/web: smoke failed: it broke",
            "turned back: b/web: smoke failed: it broke",
        ],
    );
    assert!(run.world.rollout.touched.is_empty());
}

#[test]
fn a_release_marked_bad_in_the_middle_goes_back() {
    let mut driver = Driver::new(fleet("web: a b").world(), Faults::default());
    while driver.simulation.world().rollout.waves_proven.is_empty() {
        driver.turn();
    }
    for facts in driver.simulation.world_mut().releases.values_mut().filter(|facts| facts.title == "v2") {
        facts.bad = Some("it leaks".to_owned());
    }
    assert_eq!(driver.finish().trace.last().unwrap(), "turned back: v2 is marked bad: it leaks");
}
