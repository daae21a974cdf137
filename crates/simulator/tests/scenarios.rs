//! Rollouts, each with what is to happen from the first change on. Every turn is judged by the checker as well.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::Duration;

use greenlight_model::action::{Action, Blame, Verb};
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::fleet::{BatchSize, Floor, OnFailure, Strategy};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::{Direction, MigrationState, OperatorRequest};
use greenlight_model::traffic::{Admission, BalancerReport, ServerHealth};
use greenlight_model::world::{Gate, Light};
use greenlight_simulator::{Fault, Faults, Turn, preview};
use support::*;

fn fault(why: &str, blame: Blame) -> Fault {
    Fault { why: why.to_owned(), blame, takes_effect: false }
}

/// Every attempt of this verb on these instances (`*` for all) fails, forward only.
fn failing<'f>(verb: Verb, instances: &'f str, blame: Blame) -> Faults<'f> {
    let fail = move |action: &Action| {
        let is_new = action.release().is_none_or(|release| release.as_bytes()[0] % 2 == 0);
        let is_meant = instances.split(' ').any(|name| name == "*" || *name == action.instance().to_string());
        (action.verb() == verb && is_new && is_meant).then(|| fault("it broke", blame))
    };
    Faults { fail: Box::new(fail), ..Faults::default() }
}

fn share(percent: u8) -> BatchSize {
    BatchSize::Share(Percent::try_from(percent).unwrap())
}

mod forward {
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
            let is_lost =
                action.verb() == Verb::Activate && *action.instance() == instance("b/web") && lost == 0;
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
        let run =
            run(Fleet { is_again: true, migrating: "web", ..fleet("web: a b") }.world(), Faults::default());
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
        let until =
            driver.simulation.world().rollout.drained_at[&instance("a/web")] + Duration::from_secs(30);
        assert_eq!(waits[0], Wait::Sessions { instance: instance("a/web"), left: 3, until });
        assert_eq!(driver.finish().trace.last().unwrap(), "done");
    }

    #[test]
    fn smoke_and_migrations_come_before_the_first_change() {
        let run = run(
            Fleet {
                has_smoke: true,
                migrating: "api web",
                balanced: Vec::new(),
                ..fleet("api: b; web: a b")
            }
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
}

mod refused {
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
}

mod back {
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
        assert!(
            back.starts_with("admit c/web d/web\ndrain a/web b/web\nactivate v1 a/web b/web\n"),
            "{trace}"
        );
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
        assert_eq!(
            turned,
            "turn back, 0 bad: b/web: it proved v2 and no longer does: process main: it crashed"
        );
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
}

mod waiting {
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
        driver.simulation.world_mut().traffic =
            vec![BalancerReport::Unreachable { why: "refused".to_owned() }];
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
}

mod previewed {
    use super::*;

    #[test]
    fn a_preview_says_what_would_happen_by_wave_and_when() {
        let preview = preview(&fleet("web: a b").world());
        assert_eq!(preview.outcome, Some(Outcome::Done { left_out: Default::default() }));
        assert_eq!((preview.error, preview.waits), (None, Vec::new()));
        let waves: Vec<Option<usize>> = preview.steps.iter().map(|step| step.wave).collect();
        assert_eq!(waves[..6], [None; 6]);
        assert_eq!(waves[6..14], [0, 0, 0, 0, 1, 1, 1, 1].map(Some));
        assert!(preview.steps.is_sorted_by_key(|step| step.at_ms));
        assert!(preview.took_ms > 20_000);
    }

    #[test]
    fn a_gate_is_shown_and_what_would_follow_it() {
        let mut world = fleet("web: a b").world();
        let green = preview(&world);
        let light = Light::Amber { why: "nobody has approved".to_owned() };
        world.gates.push(Gate { name: "approval".to_owned(), light });
        let amber = preview(&world);
        assert_eq!(amber.outcome, None);
        assert!(matches!(amber.waits[..], [Wait::Gate { .. }]));
        assert_eq!((&amber.steps, amber.digest_text()), (&green.steps, green.digest_text()));
    }

    #[test]
    fn the_digest_is_of_what_would_change() {
        let world = fleet("web: a b").world();
        let text = preview(&world).digest_text();
        let id = "02".repeat(32);
        let lines: Vec<String> = ["1", "2"]
            .iter()
            .zip(["a/web", "b/web"])
            .flat_map(|(wave, name)| {
                [
                    format!("{wave} drain {name}"),
                    format!("{wave} activate {name} {id} generation 2"),
                    format!("{wave} confirm {name} {id} generation 2"),
                    format!("{wave} admit {name}"),
                ]
            })
            .collect();
        assert_eq!(text, format!("greenlight plan 1\n{}\n", lines.join("\n")));
        // Bytes that are there already are no other plan; a server that was drained meanwhile is.
        let mut staged = world.clone();
        let target = *world.rollout.plan.targets.values().next().unwrap();
        report_mut(&mut staged, &instance("a/web")).staged.insert(target);
        assert_eq!(preview(&staged).digest_text(), text);
        let mut drained = world;
        if let BalancerReport::Servers(servers) = &mut drained.traffic[0] {
            servers.get_mut(&host("a")).unwrap().admission = greenlight_model::traffic::Admission::Drain;
        }
        assert_ne!(preview(&drained).digest_text(), text);
    }

    #[test]
    fn a_preview_that_cannot_end_says_what_it_would_wait_for() {
        let mut world = fleet("web: a b").world();
        world.traffic = vec![BalancerReport::Unreachable { why: "refused".to_owned() }];
        let preview = preview(&world);
        assert_eq!(preview.outcome, None);
        let why = "refused".to_owned();
        assert_eq!(preview.waits[0], Wait::Balancer { title: "haproxy lb:9999 web".to_owned(), why });
    }
}
