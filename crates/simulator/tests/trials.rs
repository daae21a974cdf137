//! What the simulated fleet with faults found once, kept by name; and some seeds of it, in every test run.
//!
//! Each scenario broke a promise before what is named here was mended. More seeds: `cargo xtask simulate`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use greenlight_model::action::{Blame, Verb};
use greenlight_model::canary::{Canary, CanaryStep, Judging, OnInconclusive, Until};
use greenlight_model::fleet::{BatchSize, Floor, OnFailure, Strategy};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::{Direction, OperatorRequest};
use greenlight_model::traffic::Admission;
use greenlight_simulator::trial::{Badness, Fault, FaultKind, Part, Scenario, ServiceShape, run};

/// Seeds that every test run goes through.
const SEEDS: u64 = 400;

fn service(hosts: &[usize], balancers: usize) -> ServiceShape {
    ServiceShape { hosts: hosts.to_vec(), balancers, migrates: false, has_smoke: false, has_process: true }
}

fn migrating(hosts: &[usize], balancers: usize) -> ServiceShape {
    ServiceShape { migrates: true, ..service(hosts, balancers) }
}

fn share(percent: u8) -> Percent {
    Percent::try_from(percent).unwrap()
}

fn fault(at: u64, lasts: u64, kind: FaultKind) -> Fault {
    Fault { at, lasts, kind }
}

fn kill(at: u64, lasts: u64, boundaries: u8, then: OperatorRequest) -> Fault {
    fault(at, lasts, FaultKind::KillController { amid: None, boundaries, then })
}

/// One host after the other, forward, without anything that a test does not ask for.
fn scenario(seed: u64, hosts: usize, services: &[ServiceShape], faults: &[Fault]) -> Scenario {
    Scenario {
        seed,
        hosts,
        services: services.to_vec(),
        strategy: Strategy::Rolling { batch: vec![BatchSize::Count(1)] },
        floor: Floor::Count(1),
        failure_budget: 0,
        on_failure: OnFailure::TurnBack,
        retries: 0,
        standby: Vec::new(),
        direction: Direction::Forward,
        is_first: false,
        only: Vec::new(),
        has_guard: false,
        starts_at_boot: true,
        lends: true,
        requests_needed: 4,
        faults: faults.to_vec(),
    }
}

fn halves(keep_for_ms: u64) -> Strategy {
    Strategy::Halves { keep_for: Duration::from_millis(keep_for_ms) }
}

fn check(scenario: &Scenario) {
    let report = run(scenario, true);
    if let Some(violation) = report.violation {
        panic!("{violation:?}\n{scenario:?}\n{}", report.trace.join("\n"));
    }
}

#[test]
fn an_admission_broken_off_between_two_balancers_is_not_done() {
    let faults = [kill(8_253, 9_291, 22, OperatorRequest::Resume)];
    let services = [migrating(&[0, 1, 2], 2)];
    check(&Scenario { strategy: halves(0), ..scenario(267, 3, &services, &faults) });
}

#[test]
fn a_drain_broken_off_between_two_balancers_is_taken_back_by_an_abort() {
    let faults = [kill(9_968, 1_758, 14, OperatorRequest::Abort)];
    let services = [service(&[0, 1, 2, 3], 2), service(&[0, 1, 2, 3], 0)];
    check(&Scenario {
        strategy: halves(8_000),
        floor: Floor::Count(2),
        on_failure: OnFailure::Hold,
        ..scenario(181, 4, &services, &faults)
    });
}

#[test]
fn a_drain_that_was_given_up_and_comes_late_is_counted_as_out() {
    let faults = [fault(16_325, 19_038, FaultKind::Messages { lost: 10, repeated: 5, late: 3_000 })];
    let services = [service(&[0, 1, 2, 3, 4], 2), service(&[1, 3, 4], 1)];
    check(&Scenario {
        floor: Floor::Share(share(60)),
        standby: vec![2],
        starts_at_boot: false,
        ..scenario(2295, 5, &services, &faults)
    });
}

#[test]
fn of_two_looks_that_overlap_the_later_one_is_believed() {
    let messages = FaultKind::Messages { lost: 0, repeated: 5, late: 500 };
    let faults = [
        fault(2_095, 1_981, FaultKind::CrashAtWrite { host: 1, keeps_new: false }),
        fault(9_814, 8_877, messages),
    ];
    let services = [service(&[0, 1, 2, 3, 4], 0), service(&[0, 1, 4], 1)];
    check(&Scenario {
        strategy: Strategy::Rolling { batch: vec![BatchSize::Share(share(34))] },
        floor: Floor::Share(share(50)),
        retries: 2,
        direction: Direction::Back,
        ..scenario(4565, 5, &services, &faults)
    });
}

#[test]
fn a_migration_that_is_asked_for_twice_runs_once() {
    let faults = [fault(1_808, 2_966, FaultKind::Messages { lost: 0, repeated: 30, late: 50 })];
    let services = [migrating(&[0, 1, 2], 2), migrating(&[0, 1, 2], 0)];
    check(&Scenario {
        strategy: Strategy::Rolling { batch: vec![BatchSize::Count(1), BatchSize::Share(share(50))] },
        floor: Floor::Share(share(60)),
        on_failure: OnFailure::Hold,
        ..scenario(14634, 3, &services, &faults)
    });
}

#[test]
fn nothing_decided_before_a_hold_is_begun_after_it() {
    let faults = [
        fault(7_650, 1_343, FaultKind::Messages { lost: 0, repeated: 5, late: 3_000 }),
        fault(14_411, 1_106, FaultKind::Asks(OperatorRequest::Hold)),
    ];
    let services = [migrating(&[0, 1, 2, 4], 1), migrating(&[0, 1, 4], 2)];
    check(&Scenario {
        strategy: Strategy::Rolling { batch: vec![BatchSize::Count(1), BatchSize::Share(share(50))] },
        floor: Floor::Share(share(60)),
        on_failure: OnFailure::Hold,
        ..scenario(3433, 5, &services, &faults)
    });
}

#[test]
fn hosts_outside_the_rollout_that_ran_nothing_do_not_raise_the_floor_of_its_way_back() {
    let faults = [fault(5_886, 2_248, FaultKind::Asks(OperatorRequest::Abort))];
    check(&Scenario {
        strategy: halves(8_000),
        floor: Floor::Share(share(50)),
        is_first: true,
        only: vec![0, 2],
        ..scenario(3086, 3, &[service(&[0, 1, 2], 1)], &faults)
    });
}

#[test]
fn a_way_back_ends_when_a_drain_cannot_be_had() {
    let faults = [
        fault(8_508, 6_142, FaultKind::Crash { host: 2, keeps_disk: true }),
        fault(15_982, 9_168, FaultKind::CutBalancer { balancer: 1 }),
    ];
    let services = [service(&[0, 1, 2], 1), service(&[0, 1, 2], 2)];
    check(&Scenario { floor: Floor::Count(2), ..scenario(14207, 3, &services, &faults) });
}

#[test]
fn a_way_back_ends_when_an_untouched_host_has_lost_its_disk() {
    let faults = [
        fault(1_040, 10_468, FaultKind::ByHand { balancer: 0, host: 1, admission: Admission::Maintenance }),
        fault(36_661, 6_693, FaultKind::Crash { host: 1, keeps_disk: false }),
    ];
    let services = [migrating(&[0, 1], 1), migrating(&[0, 1], 0)];
    check(&scenario(2113, 2, &services, &faults));
}

#[test]
fn two_controllers_of_two_machines_do_not_drive_at_once() {
    let faults = [
        fault(10_099, 6_328, FaultKind::Deploys { release: 1, part: Part::All }),
        fault(11_258, 1_538, FaultKind::SecondController),
        fault(15_653, 1_383, FaultKind::CutBalancer { balancer: 0 }),
    ];
    let services = [service(&[0, 1, 2, 3, 4, 5, 6, 7, 8], 1)];
    check(&Scenario {
        strategy: halves(0),
        floor: Floor::Share(share(60)),
        retries: 1,
        direction: Direction::Back,
        ..scenario(7888, 9, &services, &faults)
    });
}

#[test]
fn a_clock_that_is_wrong_does_not_claim_for_ever() {
    for by_ms in [40_000, -40_000, 4_000_000] {
        for kind in [FaultKind::HostClock { host: 0, by_ms }, FaultKind::ControllerClock { by_ms }] {
            let faults = [fault(1_918, 1_659, kind)];
            check(&scenario(100_444, 4, &[service(&[0, 1, 2, 3], 1)], &faults));
        }
    }
}

#[test]
fn the_same_seed_goes_the_same_way() {
    for seed in 0..20 {
        let scenario = Scenario::from_seed(seed);
        assert_eq!(run(&scenario, true).trace, run(&scenario, true).trace, "seed {seed}");
    }
}

#[test]
fn some_seeds_break_no_promise() {
    let mut outcomes = std::collections::BTreeMap::<&str, u64>::new();
    for seed in 0..SEEDS {
        let report = run(&Scenario::from_seed(seed), false);
        assert_eq!(report.violation, None, "cargo xtask simulate --seed {seed}");
        for (outcome, count) in report.outcomes {
            *outcomes.entry(outcome).or_default() += count;
        }
    }
    // Every way to end must be among what was tried, or the checkers see nothing.
    for outcome in ["done", "done, some left out", "refused", "turned back", "stuck"] {
        assert!(outcomes.get(outcome).is_some_and(|count| *count > 3), "{outcome}: {outcomes:?}");
    }
}

#[test]
fn of_several_that_are_half_in_traffic_none_waits_for_another() {
    let faults = [
        fault(369, 18_897, FaultKind::Messages { lost: 2, repeated: 30, late: 3_000 }),
        fault(4_346, 4_138, FaultKind::RestartBalancer { balancer: 1, has_state: false }),
        fault(17_959, 1_756, FaultKind::Crash { host: 1, keeps_disk: false }),
    ];
    let services = [service(&[0, 1, 2, 3], 2), service(&[0, 1, 3], 0)];
    check(&Scenario {
        strategy: halves(3_000),
        floor: Floor::Share(share(50)),
        direction: Direction::Back,
        starts_at_boot: false,
        ..scenario(17_952_813_777_088, 4, &services, &faults)
    });
}

#[test]
fn a_guard_that_fired_on_a_full_disk_is_started_again() {
    let faults = [fault(7_417, 17_659, FaultKind::DiskFull { host: 1 })];
    let web = ServiceShape { has_smoke: true, ..service(&[0, 1, 2], 1) };
    let worker = ServiceShape { has_process: false, ..service(&[0, 1, 2], 0) };
    check(&Scenario {
        floor: Floor::Share(share(50)),
        has_guard: true,
        starts_at_boot: false,
        ..scenario(17_952_813_768_112, 3, &[web, worker], &faults)
    });
}

#[test]
fn what_was_only_drained_is_let_in_while_its_host_is_silent() {
    let faults = [
        fault(11_318, 1_259, FaultKind::Deploys { release: 1, part: Part::All }),
        fault(13_328, 20_192, FaultKind::CutBalancer { balancer: 0 }),
        fault(18_450, 23_112, FaultKind::Crash { host: 0, keeps_disk: true }),
    ];
    check(&Scenario {
        strategy: Strategy::BlueGreen,
        ..scenario(17_952_813_694_396, 1, &[service(&[0], 1)], &faults)
    });
}

#[test]
fn a_migration_that_failed_is_not_run_again_when_it_is_asked_for_twice() {
    let faults = [
        fault(0, 20_000, FaultKind::CommandFails { host: 0, verb: Verb::Migrate, blame: Blame::Release }),
        fault(2_147, 2_250, FaultKind::Messages { lost: 0, repeated: 5, late: 500 }),
    ];
    let web = ServiceShape { has_smoke: true, ..migrating(&[0, 1], 0) };
    check(&Scenario {
        strategy: Strategy::Rolling { batch: vec![BatchSize::Count(1), BatchSize::Share(share(50))] },
        floor: Floor::Count(0),
        ..scenario(112_062, 2, &[web], &faults)
    });
}

#[test]
fn no_wave_is_called_proven_by_what_a_silent_host_said_last() {
    let faults = [
        fault(4_174, 3_823, FaultKind::ProcessDies { host: 0, service: 0 }),
        fault(4_997, 21_640, FaultKind::Messages { lost: 40, repeated: 30, late: 3_000 }),
    ];
    check(&Scenario {
        strategy: Strategy::BlueGreen,
        floor: Floor::Share(share(50)),
        failure_budget: 2,
        ..scenario(296_402, 2, &[migrating(&[0, 1], 0), service(&[0, 1], 1)], &faults)
    });
}

fn canary_of(shares: &[u8], max_time_s: u64, on_inconclusive: OnInconclusive) -> Strategy {
    let step = |percent: &u8| CanaryStep { share: share(*percent), until: Until::Pass };
    Strategy::Canary(Canary {
        hosts: BatchSize::Count(1),
        batch: vec![BatchSize::Count(1)],
        steps: shares.iter().map(step).collect(),
        judging: Judging {
            warmup: Duration::ZERO,
            max_time: Duration::from_secs(max_time_s),
            on_inconclusive,
            false_aborts_per_mille: 10,
            compare: Vec::new(),
            guards: Vec::new(),
        },
    })
}

fn bad_canary(percent: u8) -> Fault {
    let how = Badness::AnswersWrongly(percent);
    fault(0, 0, FaultKind::BadRelease { service: 0, release: 2, how, on: None })
}

#[test]
fn a_canary_that_is_worse_and_cannot_be_taken_out_never_gets_more() {
    let faults = [bad_canary(100), fault(11_406, 12_707, FaultKind::Crash { host: 1, keeps_disk: true })];
    check(&Scenario {
        strategy: canary_of(&[10, 60], 12, OnInconclusive::TurnBack),
        lends: false,
        ..scenario(285, 2, &[service(&[0, 1], 1)], &faults)
    });
}

#[test]
fn a_canary_that_was_left_out_gets_no_stable_part_when_it_returns() {
    let faults = [
        fault(8_503, 3_894, FaultKind::CutBalancer { balancer: 0 }),
        fault(8_873, 11_416, FaultKind::CrashAtWrite { host: 0, keeps_new: false }),
    ];
    let Strategy::Canary(canary) = canary_of(&[20], 12, OnInconclusive::Ask) else { return };
    check(&Scenario {
        strategy: Strategy::Canary(Canary { hosts: BatchSize::Count(2), ..canary }),
        failure_budget: 2,
        floor: Floor::Count(0),
        lends: false,
        requests_needed: 8,
        ..scenario(875, 4, &[service(&[0, 1, 2, 3], 1)], &faults)
    });
}

#[test]
fn a_canary_beside_a_service_without_a_balancer_gets_its_verdict() {
    let worker = service(&[0, 1, 2], 0);
    let scenario = Scenario {
        strategy: canary_of(&[20], 30, OnInconclusive::Hold),
        ..scenario(2748, 3, &[service(&[0, 1, 2], 1), worker], &[])
    };
    let report = run(&scenario, false);
    assert_eq!(report.violation, None);
    assert_eq!(report.outcomes.into_iter().collect::<Vec<_>>(), [("done", 1)]);
}

#[test]
fn a_canary_that_answers_wrongly_is_turned_back_and_its_share_ended() {
    for lends in [false, true] {
        let faults = [bad_canary(100), kill(0, 6_000, 9, OperatorRequest::Resume)];
        let scenario = Scenario {
            strategy: canary_of(&[20, 50], 30, OnInconclusive::Hold),
            lends,
            ..scenario(1, 3, &[service(&[0, 1, 2], 2)], &faults)
        };
        let report = run(&scenario, false);
        assert_eq!(report.violation, None, "{lends}");
        assert_eq!(report.outcomes.into_iter().collect::<Vec<_>>(), [("turned back", 1)], "{lends}");
    }
}

#[test]
fn what_one_service_takes_away_is_waited_for_also_when_one_of_its_hosts_is_left_out_meanwhile() {
    let how = Badness::UnderTraffic(0);
    let faults = [fault(4_477, 25_356, FaultKind::BadRelease { service: 0, release: 2, how, on: Some(3) })];
    let web = ServiceShape { has_smoke: true, ..migrating(&[0, 1, 2, 3], 1) };
    let worker = ServiceShape { has_process: false, ..migrating(&[1, 2, 3], 0) };
    check(&Scenario {
        floor: Floor::Share(share(60)),
        failure_budget: 1,
        on_failure: OnFailure::Hold,
        starts_at_boot: false,
        lends: false,
        requests_needed: 0,
        ..scenario(14_371, 4, &[web, worker], &faults)
    });
}
