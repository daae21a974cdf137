//! The way back, of a whole rollout or of instances that were left out.
//!
//! Old in before new out: an instance that was only drained and still runs what it ran is let in first; one that runs the
//! failed release and does not serve goes back at once; one that serves the new release is taken out when the old ones
//! are in and the floor allows. What was never touched stays as it is.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::action::Verb;
use greenlight_model::decision::{Decision, Outcome, Wait};
use greenlight_model::id::{Instance, ServiceName};
use greenlight_model::rollout::Course;
use greenlight_model::world::Traffic;

use crate::canary;
use crate::finish;
use crate::instance::{Stand, admission, advance, balancer};
use crate::moves::Moves;
use crate::room::Rooms;
use crate::view::{Facts, View};

/// An instance on its way back, and where it stands.
pub(crate) struct GoneBack<'v, 'a> {
    facts: &'v Facts<'a>,
    stand: Stand,
}

impl GoneBack<'_, '_> {
    /// How many instances of each service will not serve again by what this rollout does: they could not go back, ran
    /// nothing before, or do not serve though nothing is left to be done for them.
    pub(crate) fn lost<'s>(all: &'s [GoneBack<'_, '_>]) -> BTreeMap<&'s ServiceName, usize> {
        let mut lost = BTreeMap::new();
        all.iter()
            .filter(|gone| !gone.facts.serves || gone.facts.is_drained)
            .filter(|gone| matches!(gone.stand, Stand::Failed(_) | Stand::Complete))
            .for_each(|gone| *lost.entry(&gone.facts.instance.service).or_default() += 1);
        lost
    }
}

/// The decision of a rollout that turns back.
pub(crate) fn decide(view: &View<'_>) -> Decision {
    let mut moves = Moves::default();
    let mut given_up = settle(&stands(view, |_| true), &mut Rooms::new(view), &mut moves);
    if moves.is_empty()
        && let Err(why) = canary::share_out(view, &mut moves)
        && let Some(facts) = view.facts.first()
    {
        given_up.entry(facts.instance.clone()).or_insert(why);
    }
    if moves.is_empty() {
        finish::unclaim(view, &mut moves);
    }
    if !moves.is_empty() {
        return moves.proceed();
    }
    let why = match &view.rollout().course {
        Course::TurningBack { why, .. } => why.clone(),
        Course::Forward => String::new(),
    };
    Decision::End(if given_up.is_empty() {
        Outcome::TurnedBack { why }
    } else {
        Outcome::Stuck { why, instances: given_up }
    })
}

/// Moves the instances that were left out, while the rollout goes on. Those that cannot go back are returned.
pub(crate) fn left_out(
    view: &View<'_>,
    rooms: &mut Rooms<'_>,
    moves: &mut Moves,
) -> BTreeMap<Instance, String> {
    if view.rollout().left_out.is_empty() {
        return BTreeMap::new();
    }
    settle(&stands(view, |facts| facts.is_left_out), rooms, moves)
}

/// Where each instance of a choice stands on its way back.
pub(crate) fn stands<'v, 'a>(
    view: &'v View<'a>,
    choice: impl Fn(&Facts<'a>) -> bool,
) -> Vec<GoneBack<'v, 'a>> {
    let chosen = view.facts.iter().filter(|facts| choice(facts));
    chosen.map(|facts| GoneBack { facts, stand: go_back(view, facts) }).collect()
}

fn settle(all: &[GoneBack<'_, '_>], rooms: &mut Rooms<'_>, moves: &mut Moves) -> BTreeMap<Instance, String> {
    let incoming: BTreeSet<&ServiceName> =
        all.iter().filter(|gone| is_coming_in(gone)).map(|gone| &gone.facts.instance.service).collect();
    let lost = GoneBack::lost(all);
    // What was told to drain and still gets requests from some balancer counts as out, and is itself kept in by the floor: of
    // several such none makes room for another.
    let mut kept_in: BTreeMap<&ServiceName, usize> = BTreeMap::new();
    for gone in all.iter().filter(|gone| matches!(gone.stand, Stand::TakeOut(_)) && !gone.facts.is_counted())
    {
        *kept_in.entry(&gone.facts.instance.service).or_default() += 1;
    }
    let mut given_up = BTreeMap::new();
    for GoneBack { facts, stand } in all {
        let instance = facts.instance;
        match stand {
            Stand::Step(step) => moves.step(step.action.clone(), step.why.clone()),
            Stand::Wait(wait) => moves.wait(wait.clone()),
            Stand::Failed(why) => {
                given_up.insert(instance.clone(), why.clone());
            }
            // Those that come in have their own step or wait, so this one is not forgotten.
            Stand::TakeOut(_) if incoming.contains(&instance.service) => {}
            Stand::TakeOut(step) => match rooms.take(facts, true) {
                Ok(()) => moves.step(step.action.clone(), step.why.clone()),
                Err(wait) => {
                    let of = |counts: &BTreeMap<&ServiceName, usize>| {
                        counts.get(&instance.service).copied().unwrap_or(0)
                    };
                    let others_kept_in = of(&kept_in) - usize::from(!facts.is_counted());
                    match rooms.is_hopeless(instance, of(&lost) + others_kept_in, true) {
                        Some(why) => {
                            given_up.insert(instance.clone(), why);
                        }
                        None => moves.wait(wait),
                    }
                }
            },
            Stand::Complete | Stand::Ready => {}
        }
    }
    given_up
}

fn go_back(view: &View<'_>, facts: &Facts<'_>) -> Stand {
    if let Some(wait) = facts.in_flight_wait() {
        return Stand::Wait(wait);
    }
    if facts.is_touched {
        return advance(view, facts, true);
    }
    if !facts.is_drained {
        return Stand::Complete;
    }
    match (&facts.traffic, facts.release) {
        (Traffic::Unknown { .. }, _) => balancer(view, facts),
        // It ran nothing, so there is nothing to let in.
        (_, None) | (Traffic::None, _) => Stand::Complete,
        (Traffic::Known { admitted, .. }, Some(release)) => {
            if facts.proven == Some(release) {
                // Also where it is shown as admitted: a drain that was given up as failed may have come late.
                admission(view, facts, release)
            } else if *admitted && !facts.is_partly_admitted {
                Stand::Complete
            } else {
                // It does not prove what it ran; only a start of that can bring it back into traffic.
                advance(view, facts, true)
            }
        }
    }
}

/// Whether an instance only has to be let in, and that is about to happen.
fn is_coming_in(gone: &GoneBack<'_, '_>) -> bool {
    match &gone.stand {
        Stand::Step(step) => step.action.verb() == Verb::Admit,
        Stand::Wait(Wait::BalancerHealth { .. }) => true,
        // One whose drain is under way is let in as soon as that ends.
        Stand::Wait(Wait::Action { verb, .. }) => {
            *verb == Verb::Admit || *verb == Verb::Drain && !gone.facts.is_touched
        }
        _ => false,
    }
}
