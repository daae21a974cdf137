//! A canary: its share before its first request, judged step by step, and the way back.

use greenlight_model::canary::{
    Answer, Canary, CanaryStep, Guard, GuardMetric, Judgement, Judging, OnInconclusive, Until,
};
use greenlight_model::world::World;

use super::*;

fn percent(value: u8) -> Percent {
    Percent::try_from(value).unwrap()
}

fn until_pass(value: u8) -> CanaryStep {
    CanaryStep { share: percent(value), until: Until::Pass }
}

fn canary(steps: &[CanaryStep], on_inconclusive: OnInconclusive) -> Strategy {
    Strategy::Canary(Canary {
        hosts: BatchSize::Count(1),
        batch: vec![BatchSize::Share(percent(100))],
        steps: steps.to_vec(),
        judging: Judging {
            warmup: Duration::ZERO,
            max_time: Duration::from_secs(3600),
            on_inconclusive,
            false_aborts_per_mille: 10,
            compare: Vec::new(),
            guards: Vec::new(),
        },
    })
}

fn fleet_of(hosts: &str, steps: &[CanaryStep], on_inconclusive: OnInconclusive) -> Fleet {
    Fleet { strategy: canary(steps, on_inconclusive), ..fleet(hosts) }
}

fn judged(world: &mut World, step: usize, answer: Answer) {
    let services = std::iter::once("web".parse().unwrap()).collect();
    let why = "errors: 42 of 1998, 161 of 18002".to_owned();
    world.judgement = Some(Judgement { wave: 0, step, services, answer, why });
}

fn weights(world: &World) -> Vec<(String, u32)> {
    let BalancerReport::Servers(servers) = &world.traffic[0] else { panic!() };
    servers.iter().map(|(host, server)| (host.to_string(), server.weight)).collect()
}

/// Runs until a line of the trace begins so, with the world as it is then.
fn until<'f>(world: World, faults: Faults<'f>, line: &str) -> Driver<'f> {
    let mut driver = Driver::new(world, faults);
    while !driver.trace().lines().any(|seen| seen.starts_with(line)) {
        let turn = driver.turn();
        assert!(!matches!(turn, Turn::Ended(_) | Turn::Stopped(_)), "no `{line}` in\n{}", driver.trace());
    }
    driver
}

#[test]
fn it_takes_its_shares_one_after_another_and_the_rest_follows() {
    let run = expect(
        &fleet_of("web: a b c", &[until_pass(5), until_pass(50)], OnInconclusive::Hold),
        &[
            "drain a/web",
            "activate v2 a/web",
            "confirm a/web",
            "share 5% of web to a",
            "admit a/web",
            "step 1 passed",
            "share 50% of web to a",
            "step 2 passed",
            "share web as usual",
            "wave 1 proven",
            "drain b/web c/web",
            "activate v2 b/web c/web",
            "confirm b/web c/web",
            "admit b/web c/web",
            "wave 2 proven",
            "done",
        ],
    );
    assert!(weights(&run.world).iter().all(|(_, weight)| *weight == 100));
}

#[test]
fn a_step_for_a_time_needs_no_pass() {
    let time = CanaryStep { share: percent(10), until: Until::Elapsed(Duration::from_secs(7200)) };
    let run = run(fleet_of("web: a b", &[time], OnInconclusive::TurnBack).world(), Faults::default());
    assert_eq!(run.outcome, Some(Outcome::Done { left_out: Default::default() }), "{}", run.trace.join("\n"));
    assert!(run.world.now.duration_since(start()).as_secs() > 7200);
}

#[test]
fn one_that_is_worse_is_drained_first_of_all_and_its_release_is_bad() {
    let fleet = fleet_of("web: a b c", &[until_pass(5), until_pass(50)], OnInconclusive::Hold);
    let mut driver = until(fleet.world(), Faults::default(), "share 50%");
    judged(driver.simulation.world_mut(), 1, Answer::Abort);
    let run = driver.finish();
    let tail: Vec<&str> =
        run.trace.iter().map(String::as_str).skip_while(|line| !line.starts_with("turn back")).collect();
    assert_eq!(
        tail[..7],
        [
            "turn back, 1 bad: the canary is worse, errors: 42 of 1998, 161 of 18002",
            // Its lease has run out here, where nobody renews it.
            "claim a/web",
            "drain a/web",
            "activate v1 a/web",
            "confirm a/web",
            "admit a/web",
            "share web as usual",
        ]
    );
    assert!(matches!(run.outcome, Some(Outcome::TurnedBack { .. })));
    assert!(weights(&run.world).iter().all(|(_, weight)| *weight == 100));
}

#[test]
fn it_is_turned_back_while_somebody_holds_the_rollout() {
    let fleet = fleet_of("web: a b", &[until_pass(5)], OnInconclusive::Hold);
    let mut driver = until(fleet.world(), Faults::default(), "admit a/web");
    driver.simulation.ask(OperatorRequest::Hold, "lunch").unwrap();
    judged(driver.simulation.world_mut(), 0, Answer::Abort);
    assert!(matches!(driver.finish().outcome, Some(Outcome::TurnedBack { .. })));
}

#[test]
fn without_a_verdict_in_time_it_holds_turns_back_or_asks() {
    let undecided = |on_inconclusive| {
        let fleet = fleet_of("web: a b", &[until_pass(5), until_pass(50)], on_inconclusive);
        let mut driver = until(fleet.world(), Faults::default(), "admit a/web");
        judged(driver.simulation.world_mut(), 0, Answer::Inconclusive { requests_needed: Some(1400) });
        driver
    };
    let back = undecided(OnInconclusive::TurnBack).finish();
    assert!(
        matches!(&back.outcome, Some(Outcome::TurnedBack { why }) if why.contains("within 1h")),
        "{:?}",
        back.outcome
    );

    let held = undecided(OnInconclusive::Hold).finish();
    assert!(
        matches!(&held.waits[..], [Wait::Verdict { requests_needed: Some(1400), .. }]),
        "{:?}",
        held.waits
    );

    let mut driver = undecided(OnInconclusive::Ask);
    while !matches!(driver.turn(), Turn::Stopped(_)) {}
    assert!(
        driver
            .simulation
            .world()
            .rollout
            .held
            .as_ref()
            .is_some_and(|held| held.why.contains("no verdict at 5%"))
    );
    driver.simulation.ask(OperatorRequest::Resume, "seen").unwrap();
    let run = driver.finish();
    assert!(run.trace.iter().any(|line| line == "step 1 passed"), "{}", run.trace.join("\n"));
    assert_eq!(run.outcome, Some(Outcome::Done { left_out: Default::default() }));
}

#[test]
fn a_share_that_cannot_be_set_turns_it_back() {
    let faults = failing(Verb::Share, "*", Blame::Passing);
    let run = run(fleet_of("web: a b", &[until_pass(5)], OnInconclusive::Hold).world(), faults);
    assert!(
        run.trace.iter().any(|line| line.starts_with("turn back, 0 bad: a/web: share failed")),
        "{}",
        run.trace.join("\n")
    );
}

#[test]
fn a_share_that_was_changed_by_hand_or_has_lapsed_is_set_again() {
    let fleet = fleet_of("web: a b c", &[until_pass(5)], OnInconclusive::Hold);
    let mut driver = until(fleet.world(), Faults::default(), "admit a/web");
    let BalancerReport::Servers(servers) = &mut driver.simulation.world_mut().traffic[0] else { panic!() };
    servers.get_mut(&host("a")).unwrap().weight = 0;
    let run = driver.finish();
    assert_eq!(
        run.trace.iter().filter(|line| line.contains("share 5% of web to a")).count(),
        2,
        "{}",
        run.trace.join("\n")
    );
}

#[test]
fn a_canary_that_the_floor_does_not_let_out_is_refused() {
    let strategy = match canary(&[until_pass(10)], OnInconclusive::Hold) {
        Strategy::Canary(canary) => Strategy::Canary(Canary { hosts: BatchSize::Count(2), ..canary }),
        other => other,
    };
    let fleet = Fleet { strategy, floor: Floor::Count(2), ..fleet("web: a b c") };
    let run = run(fleet.world(), Faults::default());
    let Some(Outcome::Refused { why }) = run.outcome else { panic!("{:?}", run.outcome) };
    assert!(why.contains("the strategy takes out 2 at once"), "{why}");
}

#[test]
fn one_host_or_no_balancer_is_no_canary() {
    let steps = [until_pass(5)];
    let alone = fleet_of("web: a", &steps, OnInconclusive::Hold).world();
    assert!(alone.rollout.plan.waves.iter().all(|wave| wave.steps.is_empty()));
    let worker = Fleet { balanced: Vec::new(), ..fleet_of("web: a b", &steps, OnInconclusive::Hold) };
    let run = run(worker.world(), Faults::default());
    assert_eq!(run.outcome, Some(Outcome::Done { left_out: Default::default() }));
}

#[test]
fn a_canary_that_dies_under_its_traffic_is_turned_back() {
    let crash = |action: &Action| (*action.instance() == instance("a/web")).then(|| Duration::from_secs(30));
    let faults = Faults { crash: Box::new(crash), ..Faults::default() };
    let run = run(fleet_of("web: a b c", &[until_pass(5)], OnInconclusive::Hold).world(), faults);
    let back = run
        .trace
        .iter()
        .position(|line| line.starts_with("turn back"))
        .unwrap_or_else(|| panic!("{}", run.trace.join("\n")));
    assert!(run.trace[back].contains("no longer does"), "{}", run.trace[back]);
}

#[test]
fn with_a_guard_on_cpu_per_request_its_hosts_are_watched_before_the_first_is_touched() {
    let drained_after = |guards: Vec<Guard>| {
        let mut fleet = fleet_of("web: a b", &[until_pass(5)], OnInconclusive::Hold);
        let Strategy::Canary(canary) = &mut fleet.strategy else { panic!() };
        canary.judging.guards = guards;
        let mut driver = until(fleet.world(), Faults::default(), "drain a/web");
        let world = driver.simulation.world_mut();
        (world.now.duration_since(world.rollout.started_at).as_secs(), driver.finish().outcome)
    };
    let guard = |metric| Guard { metric, above_hundredths: 200, hold: Duration::from_secs(30) };
    let (unwatched, _) = drained_after(vec![guard(GuardMetric::Restarts)]);
    let (watched, outcome) = drained_after(vec![guard(GuardMetric::CpuPerRequest)]);
    assert!(unwatched < 30 && (30..90).contains(&watched), "{unwatched} s, {watched} s");
    assert_eq!(outcome, Some(Outcome::Done { left_out: Default::default() }));
}
