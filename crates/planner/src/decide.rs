//! The course of a rollout: gates, checks, claims, bytes, migrations, then wave by wave, then what migrations take away, then
//! tidying up.
//!
//! Each phase looks at the world and either says what is missing, or lets the next phase speak. Nothing is remembered from
//! one decision to the next.

use std::collections::BTreeSet;

use greenlight_model::decision::{Decision, Wait};
use greenlight_model::rollout::Note;
use greenlight_model::world::{Light, World};

use crate::canary;
use crate::failure::{GivenUp, Verdict, judge};
use crate::instance::confirmation;
use crate::moves::Moves;
use crate::room::Rooms;
use crate::view::View;
use crate::{back, finish, migrate, prepare, wave};

/// What a phase answers.
pub(crate) enum Phase {
    /// It is not over: this is the decision.
    Decided(Decision),
    /// It has nothing left to do.
    Over,
}

/// What to do now, what is waited for and why, or how the rollout ended.
///
/// Pure, and linear in the instances of the rollout. `Decision::Note` is to be recorded and this asked again. Steps of
/// one decision may all be performed at once.
pub fn decide(world: &World) -> Decision {
    if let Some(outcome) = &world.rollout.outcome {
        return Decision::End(outcome.clone());
    }
    let view = View::new(world);
    // Turning back wins over holds, gates and waits of the way forward.
    if world.rollout.is_turning_back() {
        return back::decide(&view);
    }
    let is_held_for_good = world.rollout.held.is_some() && world.rollout.lost().is_some();
    if let Some(note) = canary::aborted(world).filter(|_| !is_held_for_good) {
        return Decision::Note(or_hold(world, note));
    }
    if let Some(held) = &world.rollout.held {
        let held = Wait::Held { by: held.by.clone(), why: held.why.clone() };
        return hold(&view, held);
    }
    match forward(&view) {
        Decision::Note(note) => Decision::Note(or_hold(world, note)),
        decision => decision,
    }
}

/// Older code is not put on a database from which something was taken away that it may need: where a turn would do that, a
/// person is asked instead.
fn or_hold(world: &World, note: Note) -> Note {
    let Some(loss) = world.rollout.lost() else { return note };
    let (Note::TurnBack { why, .. } | Note::LeaveOut { why, .. }) = &note else { return note };
    let environment = &world.environment.name;
    Note::Hold {
        why: format!(
            "{why}. It cannot go back with the code alone, because its migration took away what older code may need: {loss}. \
             Mend it and go on with `greenlight resume {environment}`; or put the database back from its backup, and then \
             `greenlight abort {environment} --database-restored REASON`"
        ),
    }
}

fn forward(view: &View<'_>) -> Decision {
    let phases = [
        bad_target,
        gates,
        prepare::preflight,
        prepare::claims,
        migrate::former,
        prepare::stage,
        migrate::expand,
        wave::waves,
        migrate::contract,
    ];
    for phase in phases {
        if let Phase::Decided(decision) = phase(view) {
            return decision;
        }
    }
    finish::done(view)
}

/// A release that was marked bad goes nowhere, also when somebody marks it in the middle.
fn bad_target(view: &View<'_>) -> Phase {
    let targets = view.rollout().plan.targets.values();
    let bad = targets.filter_map(|id| Some((*id, view.world.releases.get(id)?.bad.as_ref()?)));
    let Some((release, mark)) = bad.into_iter().next() else { return Phase::Over };
    let why = format!("{} is marked bad: {mark}", view.title(release));
    Phase::Decided(if view.has_changed() {
        Decision::Note(Note::TurnBack { why, bad: BTreeSet::new() })
    } else {
        finish::refuse(view, why)
    })
}

/// Gates are for the first change: a rollout that has begun is not left half done because a light went out.
fn gates(view: &View<'_>) -> Phase {
    if view.has_changed() {
        return Phase::Over;
    }
    let waits: Vec<Wait> = view
        .world
        .gates
        .iter()
        .filter_map(|gate| match &gate.light {
            Light::Green { .. } => None,
            Light::Amber { why } | Light::Red { why } => {
                Some(Wait::Gate { name: gate.name.clone(), why: why.clone() })
            }
        })
        .collect();
    if waits.is_empty() { Phase::Over } else { Phase::Decided(only_waits(view, waits)) }
}

/// Nothing new is begun, except that what was switched and proven is confirmed: a host that waits for that would go back
/// by itself, and the rollout would not stay as it was held.
fn hold(view: &View<'_>, held: Wait) -> Decision {
    let mut moves = Moves::default();
    moves.wait(held);
    for facts in &view.facts {
        match facts.in_flight_wait() {
            Some(wait) => moves.wait(wait),
            None => moves.steps.extend(confirmation(view, facts)),
        }
    }
    moves.proceed()
}

/// Nothing new is begun; what is under way is named as well.
fn only_waits(view: &View<'_>, mut waits: Vec<Wait>) -> Decision {
    waits.extend(view.facts.iter().filter_map(|facts| facts.in_flight_wait()));
    Decision::Proceed { steps: Vec::new(), waits }
}

/// Answers for a phase that found failures, or has something to do, or neither. Instances that were left out go back
/// meanwhile.
pub(crate) fn conclude(
    view: &View<'_>,
    failures: &[GivenUp<'_>],
    mut moves: Moves,
    rooms: &mut Rooms<'_>,
) -> Phase {
    match judge(view, failures) {
        Some(Verdict::Note(note)) => Phase::Decided(Decision::Note(note)),
        Some(Verdict::Refuse(why)) => Phase::Decided(finish::refuse(view, why)),
        None if moves.is_empty() => Phase::Over,
        None => {
            back::left_out(view, rooms, &mut moves);
            Phase::Decided(moves.proceed())
        }
    }
}
