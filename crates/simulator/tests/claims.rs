//! Claims end when nobody renews them: whoever goes on with a rollout later takes them anew, and nothing is changed without.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use greenlight_model::Timestamp;
use greenlight_model::action::Verb;
use greenlight_model::decision::Outcome;
use greenlight_model::rollout::OperatorRequest;
use greenlight_model::world::World;
use greenlight_simulator::{Faults, Turn};
use support::*;

/// Whether an instance has this rollout's claim at a moment.
fn is_claimed(world: &World, name: &str) -> bool {
    let claim = world.report(&instance(name)).unwrap().ledger.claim.clone();
    claim.is_some_and(|claim| claim.rollout == world.rollout.plan.id && claim.expires_at > world.now)
}

#[test]
fn a_controller_that_comes_back_after_the_claims_ran_out_takes_them_anew() {
    for (request, is_back) in [(OperatorRequest::Resume, false), (OperatorRequest::Abort, true)] {
        let mut driver = Driver::new(fleet("web: a b c").world(), Faults::default());
        // Until the first instance was admitted again, and the others are still to come.
        while !driver.simulation.world().rollout.admitted_at.contains_key(&instance("a/web")) {
            driver.turn();
        }
        let world = driver.simulation.world_mut();
        for name in ["a/web", "b/web", "c/web"] {
            report_mut(world, &instance(name)).ledger.claim.as_mut().unwrap().expires_at = Timestamp::MIN;
        }
        driver.simulation.ask(request, "").unwrap();
        let mut outcome = None;
        while outcome.is_none() {
            let before = driver.simulation.world().clone();
            match driver.turn() {
                Turn::Began(steps) => {
                    for step in steps {
                        let is_by_host = matches!(
                            step.action.verb(),
                            Verb::Stage | Verb::Activate | Verb::Confirm | Verb::Prune
                        );
                        let name = step.action.instance().to_string();
                        assert!(
                            !is_by_host || is_claimed(&before, &name),
                            "{:?}\n{}",
                            step.action,
                            driver.trace()
                        );
                    }
                }
                Turn::Ended(ended) => outcome = Some(ended),
                Turn::Passed(_) | Turn::Noted(_) | Turn::Stopped(_) => {}
            }
        }
        assert_eq!(matches!(outcome, Some(Outcome::TurnedBack { .. })), is_back, "{outcome:?}");
        for (host, seen) in &driver.simulation.world().inventory {
            let report = &seen.report.as_ref().unwrap().1;
            assert!(report.instances.values().all(|instance| instance.ledger.claim.is_none()), "{host}");
        }
    }
}
