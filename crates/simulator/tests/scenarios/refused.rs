//! Rollouts that are refused before anything is changed.

use super::*;

fn check(world: greenlight_model::world::World, faults: Faults<'_>, expected: &str) {
    let run = run(world, faults);
    assert_eq!(run.trace.last().unwrap(), &format!("refused: {expected}"));
}

#[test]
fn every_failing_preflight_is_named() {
    check(
        fleet("web: a b c").world(),
        failing(Verb::Preflight, "a/web c/web", Blame::Host),
        "a/web: preflight failed: it broke; c/web: preflight failed: it broke",
    );
}

#[test]
fn an_unreachable_host_has_failed_its_preflight() {
    let mut world = fleet("web: a b").world();
    cut(&mut world, "b", true);
    check(
        world,
        Faults::default(),
        "b/web: it cannot be reached since 2027-01-15T08:00:00Z: connection timed out",
    );
}

#[test]
fn a_passing_preflight_failure_is_tried_again() {
    let run = run(fleet("web: a").world(), failing(Verb::Preflight, "a/web", Blame::Passing));
    assert_eq!(
        run.trace,
        [
            "preflight a/web",
            "failed: preflight a/web: it broke",
            "preflight a/web",
            "failed: preflight a/web: it broke",
            "refused: a/web: preflight failed (2 times): it broke",
        ]
    );
}

#[test]
fn a_foreign_claim_names_holder_and_reason_and_ours_are_given_back() {
    let mut world = fleet("web: a b").world();
    report_mut(&mut world, &instance("b/web")).ledger.claim = Some(foreign_claim(600));
    let run = run(world, Faults::default());
    assert_eq!(
        run.trace.last().unwrap(),
        "refused: b/web: other@desk holds it for \"deploy web v9 to production\" (rollout production-9) until 2027-01-15T08:10:00Z"
    );
}

#[test]
fn a_claim_that_a_host_refuses_gives_the_others_back() {
    let run = run(fleet("web: a b").world(), failing(Verb::Claim, "b/web", Blame::Host));
    assert_eq!(
        run.trace[1..],
        [
            "claim a/web b/web",
            "failed: claim b/web: it broke",
            "unclaim a/web",
            "refused: b/web: claim failed: it broke"
        ]
    );
}

#[test]
fn an_expired_claim_is_no_obstacle() {
    let mut world = fleet("web: a").world();
    report_mut(&mut world, &instance("a/web")).ledger.claim = Some(foreign_claim(-1));
    assert_eq!(run(world, Faults::default()).trace.last().unwrap(), "done");
}

#[test]
fn bytes_that_do_not_arrive_change_nothing() {
    let expected = "failed: stage b/web: it broke";
    let run = run(fleet("web: a b").world(), failing(Verb::Stage, "b/web", Blame::Host));
    assert_eq!(
        run.trace[2..],
        ["stage a/web b/web", expected, "unclaim a/web b/web", "refused: b/web: stage failed: it broke"]
    );
}

#[test]
fn a_floor_that_no_step_can_keep_is_found_before() {
    check(
        Fleet { floor: Floor::Count(2), ..fleet("web: a b") }.world(),
        Faults::default(),
        "the floor asks for 2 of 2 instances of web to keep serving, and the strategy takes out 1 at once: lower the floor, or choose a strategy that changes fewer together",
    );
}

#[test]
fn a_server_that_the_balancer_does_not_know_is_found_before() {
    let mut world = fleet("web: a b").world();
    if let BalancerReport::Servers(servers) = &mut world.traffic[0] {
        servers.remove(&host("b"));
    }
    check(world, Faults::default(), "haproxy lb:9999 web has no server b");
}

#[test]
fn a_server_in_maintenance_is_found_before() {
    let mut world = fleet("web: a b").world();
    if let BalancerReport::Servers(servers) = &mut world.traffic[0] {
        servers.get_mut(&host("b")).unwrap().admission = Admission::Maintenance;
    }
    check(
        world,
        Faults::default(),
        "haproxy lb:9999 web has server b in maintenance, where somebody put it by hand or by configuration; set it to `drain` or `ready` there, or leave its host out of the rollout",
    );
}

#[test]
fn a_balancer_that_does_not_answer_is_found_before() {
    let mut world = fleet("web: a b").world();
    world.traffic = vec![BalancerReport::Unreachable { why: "refused".to_owned() }];
    world.now += world.environment.timeouts.connect;
    check(world, Faults::default(), "haproxy lb:9999 web: refused");
}

#[test]
fn a_bad_release_is_refused() {
    let mut world = Fleet { direction: Direction::Back, ..fleet("web: a b") }.world();
    for facts in world.releases.values_mut().filter(|facts| facts.title == "v2") {
        facts.bad = Some("it leaks".to_owned());
    }
    check(world, Faults::default(), "v2 is marked bad: it leaks");
}
