//! Hosts that were silent: what is not known of them is never taken for good.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use greenlight_model::decision::Outcome;
use greenlight_simulator::{Faults, Turn};
use support::*;

/// A host that does not answer when the plan is made stands in it as running nothing. When it answers in time for the
/// checks, going back would take off what it runs.
#[test]
fn a_plan_that_did_not_know_what_a_host_runs_is_refused() {
    let mut world = fleet("web: a b c").world();
    world.rollout.plan.baseline.insert(instance("b/web"), None);
    let run = run(world, Faults::default());
    let Some(Outcome::Refused { why }) = &run.outcome else {
        panic!("{:?}\n{}", run.outcome, run.trace.join("\n"))
    };
    assert_eq!(why, "b/web runs v1, and the plan was made for nothing: plan again");
    assert!(run.world.rollout.touched.is_empty());
}

/// What a host last said is no proof that it still runs, when the rollout is about to be called done.
#[test]
fn a_host_of_a_proven_wave_that_falls_silent_is_waited_for_and_then_failed() {
    for comes_back in [true, false] {
        let mut driver = Driver::new(fleet("web: a b").world(), Faults::default());
        while !driver.simulation.world().rollout.waves_proven.contains_key(&0) {
            driver.turn();
        }
        cut(driver.simulation.world_mut(), "a", true);
        let outcome = loop {
            match driver.turn() {
                Turn::Ended(outcome) => break outcome,
                Turn::Passed(_) if comes_back => cut(driver.simulation.world_mut(), "a", false),
                _ => {}
            }
        };
        let is_done = matches!(outcome, Outcome::Done { .. });
        assert_eq!(is_done, comes_back, "{outcome:?}\n{}", driver.trace());
        if !comes_back {
            assert!(format!("{outcome:?}").contains("it cannot be reached since"), "{outcome:?}");
        }
    }
}
