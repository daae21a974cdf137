//! The end of a rollout: old releases removed, claims given back, the outcome said.

use std::collections::BTreeSet;

use greenlight_model::action::{Action, Verb};
use greenlight_model::decision::{Decision, Outcome};
use greenlight_model::id::ReleaseId;

use crate::back;
use crate::moves::Moves;
use crate::room::Rooms;
use crate::view::{Facts, View};

/// Every wave is proven: left-out instances settle, old releases go, claims are given back.
pub(crate) fn done(view: &View<'_>) -> Decision {
    let mut moves = Moves::default();
    let stuck = back::left_out(view, &mut Rooms::new(view), &mut moves);
    if moves.is_empty() {
        prune(view, &mut moves);
    }
    if moves.is_empty() {
        unclaim(view, &mut moves);
    }
    if !moves.is_empty() {
        return moves.proceed();
    }
    let mut left_out = view.rollout().left_out.clone();
    for (instance, why) in stuck {
        if let Some(reason) = left_out.get_mut(&instance) {
            reason.push_str(&format!("; and it could not go back: {why}"));
        }
    }
    Decision::End(Outcome::Done { left_out })
}

/// The end of a rollout that changed nothing: what is under way ends, claims are given back.
pub(crate) fn refuse(view: &View<'_>, why: String) -> Decision {
    let mut moves = Moves::default();
    unclaim(view, &mut moves);
    if moves.is_empty() { Decision::End(Outcome::Refused { why }) } else { moves.proceed() }
}

/// Gives back every claim that can be. One that cannot runs out by itself.
pub(crate) fn unclaim(view: &View<'_>, moves: &mut Moves) {
    for facts in &view.facts {
        if let Some(wait) = facts.in_flight_wait() {
            moves.wait(wait);
        } else if is_ours(view, facts) && view.spent(facts.instance, Verb::Unclaim).is_none() {
            let action = Action::Unclaim { instance: facts.instance.clone() };
            moves.step(action, "the rollout is over");
        }
    }
}

/// Removes what nothing needs. A failure here costs disk space, not the rollout.
fn prune(view: &View<'_>, moves: &mut Moves) {
    let plan = &view.rollout().plan;
    let of_plan: BTreeSet<ReleaseId> =
        plan.targets.values().copied().chain(plan.baseline.values().flatten().copied()).collect();
    for facts in &view.facts {
        if let Some(wait) = facts.in_flight_wait() {
            moves.wait(wait);
            continue;
        }
        let is_due = is_ours(view, facts)
            && facts.is_claimed(view.world)
            && !view.rollout().pruned.contains(facts.instance)
            && view.spent(facts.instance, Verb::Prune).is_none();
        if let Some(keep) = kept(facts, &of_plan).filter(|_| is_due) {
            let action = Action::Prune { instance: facts.instance.clone(), keep };
            moves.step(action, "releases that nothing needs any more are removed");
        }
    }
}

/// What stays on an instance whatever else its host keeps, or nothing when there is nothing to remove: the releases of
/// the plan and all that its ledger could go back to.
fn kept(facts: &Facts<'_>, of_plan: &BTreeSet<ReleaseId>) -> Option<BTreeSet<ReleaseId>> {
    let report = facts.report?;
    let ledger = &report.ledger;
    let mut keep = of_plan.clone();
    keep.extend([ledger.active, ledger.previous, ledger.last_good].into_iter().flatten());
    (!report.staged.is_subset(&keep)).then_some(keep)
}

fn is_ours(view: &View<'_>, facts: &Facts<'_>) -> bool {
    facts.unreachable.is_none() && facts.has_our_claim(view.rollout())
}
