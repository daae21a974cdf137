//! Rollouts, each with what is to happen from the first change on. Every turn is judged by the checker as well.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod back;
mod canary;
mod forward;
mod previewed;
mod refused;
#[path = "../support/mod.rs"]
mod support;
mod waiting;

use std::time::Duration;

use greenlight_model::action::{Action, Blame, Verb};
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::fleet::{BatchSize, Floor, OnFailure, Strategy};
use greenlight_model::migration::{Loss, MigrationPhase};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::{Direction, MigrationState, OperatorRequest};
use greenlight_model::traffic::{Admission, BalancerReport, ServerHealth};
use greenlight_model::world::{Gate, Light, World};
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
