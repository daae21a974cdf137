//! Any fleet, any strategy, any failures, an abort at any moment: the checker judges every turn, and the rollout ends.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::Duration;

use greenlight_model::action::{Action, Blame, Verb};
use greenlight_model::canary::{Canary, CanaryStep, Judging, OnInconclusive, Until};
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::fleet::{BatchSize, Floor, OnFailure, Strategy};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::{Direction, OperatorRequest};
use greenlight_simulator::{Fault, Faults, Turn};
use support::*;

/// Seeds that are run. A failing one is named in the panic and runs alone with `SEED=n`.
const SEEDS: u64 = 1_500;
/// How often a stopped rollout is resumed before it is aborted.
const RESUMES_MAX: u32 = 2;

/// A small generator of numbers (SplitMix64), so that a seed is all that is needed to run again what failed.
#[derive(Clone)]
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()].clone()
    }
}

fn share(percent: u8) -> Percent {
    Percent::try_from(percent).unwrap()
}

fn any_fleet(numbers: &mut Numbers) -> Fleet {
    let names = ["a", "b", "c", "d", "e", "f"];
    let hosts = |numbers: &mut Numbers| {
        let count = usize::try_from(numbers.below(names.len() as u64)).unwrap() + 1;
        let start = usize::try_from(numbers.below(names.len() as u64)).unwrap();
        (0..count).map(|index| names[(start + index) % names.len()]).collect::<Vec<_>>().join(" ")
    };
    let mut text = format!("web: {}", hosts(numbers));
    if numbers.chance(50) {
        text.push_str(&format!("; worker: {}", hosts(numbers)));
    }
    let strategy = match numbers.below(5) {
        0 => rolling(&[BatchSize::Count(1)]),
        1 => rolling(&[BatchSize::Count(1), BatchSize::Share(share(50))]),
        2 => Strategy::BlueGreen,
        3 => any_canary(numbers),
        _ => Strategy::Halves { keep_for: Duration::from_secs(60) },
    };
    Fleet {
        strategy,
        floor: numbers.pick(&[Floor::Count(0), Floor::Count(1), Floor::Count(2), Floor::Share(share(60))]),
        failure_budget: u32::try_from(numbers.below(3)).unwrap(),
        on_failure: numbers.pick(&[OnFailure::TurnBack, OnFailure::Hold]),
        retries: u32::try_from(numbers.below(3)).unwrap(),
        standby: numbers.pick(&["", "", "c"]),
        balanced: numbers.pick(&[
            vec!["web".to_owned()],
            vec!["web".to_owned(), "worker".to_owned()],
            Vec::new(),
        ]),
        direction: numbers.pick(&[Direction::Forward, Direction::Forward, Direction::Back]),
        is_first: numbers.chance(20),
        migrating: numbers.pick(&["", "web", "web worker"]),
        has_smoke: numbers.chance(30),
        is_again: false,
        sessions: numbers.below(3),
        ..fleet(&text)
    }
}

fn any_canary(numbers: &mut Numbers) -> Strategy {
    let step = |value, until| CanaryStep { share: share(value), until };
    let steps = numbers.pick(&[
        vec![step(5, Until::Pass)],
        vec![step(1, Until::Elapsed(Duration::from_secs(60))), step(50, Until::Pass), step(99, Until::Pass)],
    ]);
    Strategy::Canary(Canary {
        hosts: numbers.pick(&[BatchSize::Count(1), BatchSize::Share(share(50))]),
        batch: vec![BatchSize::Count(1)],
        steps,
        judging: Judging {
            warmup: Duration::ZERO,
            max_time: Duration::from_secs(60),
            on_inconclusive: OnInconclusive::Hold,
            false_aborts_per_mille: 10,
            compare: Vec::new(),
            guards: Vec::new(),
        },
    })
}

fn any_faults(numbers: &Numbers, percent: u64) -> Faults<'static> {
    let (mut fails, mut crashes) = (numbers.clone(), Numbers(numbers.0 ^ 0xffff));
    let fail = move |action: &Action| {
        if !fails.chance(percent) {
            return None;
        }
        let blame = match action.verb() {
            Verb::Activate | Verb::Smoke | Verb::Migrate | Verb::Confirm => {
                fails.pick(&[Blame::Release, Blame::Host, Blame::Passing])
            }
            Verb::Drain | Verb::Admit | Verb::Share => Blame::Passing,
            _ => fails.pick(&[Blame::Host, Blame::Passing, Blame::Passing]),
        };
        let takes_effect = blame == Blame::Passing && fails.chance(50);
        Some(Fault { why: "by chance".to_owned(), blame, takes_effect })
    };
    let crash =
        move |_: &Action| (crashes.chance(percent)).then(|| Duration::from_millis(crashes.below(20_000)));
    Faults { fail: Box::new(fail), crash: Box::new(crash) }
}

/// A wait that only a person or the outside can end is true when the world says the same.
fn is_true(wait: &Wait, world: &greenlight_model::world::World) -> bool {
    match wait {
        Wait::Floor { service, serving, floor } => {
            let count = |instance: &&greenlight_model::id::Instance| {
                instance.service == *service && support::checker::serves(world, instance)
            };
            world.rollout.plan.baseline.keys().filter(count).count() == *serving && serving <= floor
        }
        Wait::Wave { instances, .. } => !instances.is_empty(),
        Wait::Held { .. } => world.rollout.held.is_some(),
        _ => false,
    }
}

fn one(seed: u64) -> Outcome {
    let mut numbers = Numbers(seed);
    let fleet = any_fleet(&mut numbers);
    let percent = numbers.pick(&[0, 3, 10, 30]);
    let mut driver = Driver::new(fleet.world(), any_faults(&numbers, percent));
    let abort_at = if numbers.chance(50) { numbers.below(60) } else { u64::MAX };
    let lost =
        numbers.chance(20).then(|| (numbers.below(40), numbers.below(40), numbers.pick(&["a", "b", "c"])));
    let mut resumes = 0;
    for turn in 0.. {
        if let Some((from, length, name)) = lost
            && driver.simulation.world().inventory.contains_key(&host(name))
        {
            match turn {
                turn if turn == from => cut(driver.simulation.world_mut(), name, true),
                turn if turn == from + length => cut(driver.simulation.world_mut(), name, false),
                _ => {}
            }
        }
        if turn == abort_at {
            driver.simulation.ask(OperatorRequest::Abort, "").unwrap();
        }
        match driver.turn() {
            Turn::Ended(outcome) => return outcome,
            Turn::Stopped(waits) => {
                for wait in &waits {
                    assert!(
                        is_true(wait, driver.simulation.world()),
                        "{wait:?} is not true\n{}",
                        driver.trace()
                    );
                }
                // What waits for a lost host goes on when the host is back.
                if let Some((_, _, name)) = lost
                    && driver.simulation.world().unreachable(&host(name)).is_some()
                {
                    cut(driver.simulation.world_mut(), name, false);
                    continue;
                }
                assert!(
                    !driver.simulation.world().rollout.is_turning_back(),
                    "stopped on the way back: {waits:?}\n{}",
                    driver.trace()
                );
                resumes += 1;
                let is_held = driver.simulation.world().rollout.held.is_some();
                let request = match is_held && resumes <= RESUMES_MAX {
                    true => OperatorRequest::Resume,
                    false => OperatorRequest::Abort,
                };
                driver.simulation.ask(request, "").unwrap();
            }
            Turn::Began(_) | Turn::Passed(_) | Turn::Noted(_) => {}
        }
    }
    unreachable!("turns are counted by the driver")
}

#[test]
fn any_rollout_ends_and_breaks_no_promise() {
    if let Ok(seed) = std::env::var("SEED") {
        one(seed.parse().unwrap());
        return;
    }
    let mut ends = std::collections::BTreeMap::<&str, u64>::new();
    for seed in 0..SEEDS {
        let outcome = std::panic::catch_unwind(|| one(seed)).unwrap_or_else(|_| panic!("seed {seed}"));
        *ends
            .entry(match outcome {
                Outcome::Done { left_out } if left_out.is_empty() => "done",
                Outcome::Done { .. } => "left out",
                Outcome::Refused { .. } => "refused",
                Outcome::TurnedBack { .. } => "turned back",
                Outcome::Stuck { .. } => "stuck",
            })
            .or_default() += 1;
    }
    // Every way to end must be among what was tried, or the checks above see nothing.
    println!("{ends:?}");
    for (end, least) in
        [("done", 200), ("left out", 20), ("refused", 100), ("turned back", 200), ("stuck", 20)]
    {
        assert!(ends.get(end).is_some_and(|count| *count >= least), "{end}: {ends:?}");
    }
}

/// Wherever an operator aborts, everything is as it was before.
#[test]
fn an_abort_after_any_step_brings_everything_back() {
    let hour = Duration::from_secs(3600);
    for fleet in [
        fleet("web: a b c"),
        Fleet { floor: Floor::Count(2), strategy: rolling(&[BatchSize::Count(2)]), ..fleet("web: a b c d") },
        Fleet { strategy: Strategy::BlueGreen, ..fleet("web: a b c") },
        Fleet { strategy: Strategy::Halves { keep_for: hour }, standby: "s", ..fleet("web: a b s") },
        Fleet { migrating: "web", has_smoke: true, sessions: 2, ..fleet("web: a b; worker: b c") },
        Fleet { is_first: true, floor: Floor::Count(2), ..fleet("web: a b c") },
        Fleet { direction: Direction::Back, ..fleet("web: a b c d") },
        fleet("worker: a b"),
        fleet("web: a"),
    ] {
        let whole = run(fleet.world(), Faults::default());
        let whole_turns = whole.trace.len() * 4;
        let mut aborted = 0;
        for abort_at in 0..whole_turns {
            let mut driver = Driver::new(fleet.world(), Faults::default());
            let mut is_over = false;
            for _ in 0..abort_at {
                is_over = is_over || matches!(driver.turn(), Turn::Ended(_));
            }
            if is_over {
                break;
            }
            driver.simulation.ask(OperatorRequest::Abort, "").unwrap();
            let run = driver.finish();
            assert!(
                matches!(run.outcome, Some(Outcome::TurnedBack { .. })),
                "abort after {abort_at} turns\n{}",
                run.trace.join("\n")
            );
            aborted += 1;
        }
        assert!(aborted > whole.begun, "every step was tried");
    }
}
