//! Wave by wave: the next one begins when every instance of the one before is proven and admitted, and stays so.

use std::collections::BTreeSet;

use greenlight_model::decision::{Decision, Wait};
use greenlight_model::id::Instance;
use greenlight_model::rollout::Note;

use crate::back::{self, GoneBack};
use crate::canary;
use crate::decide::{Phase, conclude};
use crate::failure::{GivenUp, guilty};
use crate::instance::{Stand, advance, is_ready, out_of_reach};
use crate::moves::Moves;
use crate::room::Rooms;
use crate::view::{Facts, View, later};

/// Works on the first wave that is not proven, while those before it are watched.
pub(crate) fn waves(view: &View<'_>) -> Phase {
    let mut rooms = Rooms::new(view);
    let mut failures = Vec::new();
    let mut moves = Moves::default();
    let mut open = None;
    for index in 0..view.rollout().plan.waves.len() {
        if view.rollout().waves_proven.contains_key(&index) {
            watch(view, index, &mut moves, &mut failures);
            if moves.is_empty() {
                continue;
            }
            break;
        }
        open = Some(index);
        break;
    }
    if moves.is_empty() {
        match open {
            Some(index) => match work(view, index, &mut rooms, &mut moves, &mut failures) {
                Work::Turn(note) if failures.is_empty() => return Phase::Decided(Decision::Note(note)),
                Work::Turn(_) | Work::Open => {}
            },
            // The weights of a canary that was the last wave.
            None => {
                if let Err(why) = canary::share_out(view, &mut moves) {
                    return Phase::Decided(Decision::Note(Note::Hold { why }));
                }
            }
        }
    }
    conclude(view, &failures, moves, &mut rooms)
}

/// An instance of a proven wave that no longer proves its release has failed, whatever came after.
fn watch<'a>(view: &View<'a>, index: usize, moves: &mut Moves, failures: &mut Vec<GivenUp<'a>>) {
    for facts in view.wave(index).filter(|facts| !facts.is_left_out) {
        let Some(release) = facts.release else { continue };
        let stand = match facts.report {
            // What it last said is no proof that it still runs.
            _ if facts.unreachable.is_some() => out_of_reach(view, facts),
            None => out_of_reach(view, facts),
            Some(_) if facts.proven == Some(release) => Stand::Complete,
            Some(report) => {
                let why = report.why_not_proven(release).unwrap_or_default();
                Stand::Failed(format!("it proved {} and no longer does: {why}", view.title(release)))
            }
        };
        match stand {
            Stand::Failed(why) => failures.push(GivenUp { instance: facts.instance, why }),
            Stand::Wait(wait) => moves.wait(wait),
            _ => {}
        }
    }
}

/// How far a wave is.
enum Work {
    /// Record this.
    Turn(Note),
    /// It goes on.
    Open,
}

/// Moves the instances of a wave.
fn work<'a>(
    view: &View<'a>,
    index: usize,
    rooms: &mut Rooms<'a>,
    moves: &mut Moves,
    failures: &mut Vec<GivenUp<'a>>,
) -> Work {
    let plan = &view.rollout().plan;
    let members = || view.wave(index).filter(|facts| !facts.is_left_out);
    let is_canary = !plan.waves[index].steps.is_empty();
    if is_canary && members().next().is_none() {
        let why = "no host of the canary is left to be judged".to_owned();
        return Work::Turn(Note::TurnBack { why, bad: guilty(view) });
    }
    let is_together = plan.waves[index].together || is_canary;
    let is_shared_out = match canary::share_out(view, moves) {
        Ok(is_shared_out) => is_shared_out,
        Err(why) if is_canary => return Work::Turn(Note::TurnBack { why, bad: BTreeSet::new() }),
        Err(why) => return Work::Turn(Note::Hold { why }),
    };
    // A canary that is over ends before anything else is taken out.
    if !is_canary && !is_shared_out {
        return Work::Open;
    }
    let may_admit = !is_together || is_shared_out && members().all(is_ready);
    let stands: Vec<(&Facts<'a>, Stand)> = members()
        .map(|facts| match advance(view, facts, may_admit) {
            // A wave is not called proven by what a host that does not answer any more said last.
            Stand::Complete if facts.unreachable.is_some() => (facts, out_of_reach(view, facts)),
            stand => (facts, stand),
        })
        .collect();
    let incomplete: Vec<Instance> = stands
        .iter()
        .filter(|(_, stand)| !matches!(stand, Stand::Complete))
        .map(|(facts, _)| facts.instance.clone())
        .collect();
    if incomplete.is_empty() {
        if !is_shared_out {
            return Work::Open;
        }
        return match canary::judge(view, index) {
            None => Work::Turn(Note::WaveProven { wave: index }),
            Some(canary::Turn::Note(note)) => Work::Turn(note),
            Some(canary::Turn::Wait(wait)) => {
                moves.wait(wait);
                Work::Open
            }
        };
    }
    if let Some(wait) = fallback(view, index) {
        moves.wait(wait);
        return Work::Open;
    }
    // What left-out instances cannot give back to capacity decides whether a floor can still be kept.
    let gone_back = back::stands(view, |facts| facts.is_left_out);
    let lost = GoneBack::lost(&gone_back);
    for (facts, stand) in stands {
        let is_taken_out = matches!(stand, Stand::TakeOut(_));
        if let Some(wait) = canary::learning(view, facts).filter(|_| is_canary && is_taken_out) {
            moves.wait(wait);
            continue;
        }
        match stand {
            Stand::Step(step) => moves.step(step.action, step.why),
            Stand::Wait(wait) => moves.wait(wait),
            Stand::Failed(why) => failures.push(GivenUp { instance: facts.instance, why }),
            Stand::TakeOut(step) => match rooms.take(facts, false) {
                Ok(()) => {
                    let (serving, floor) = rooms.serving(&facts.instance.service, false);
                    moves.step(step.action, format!("{}; {serving} serve on, floor {floor}", step.why));
                }
                Err(wait) => {
                    let lost = lost.get(&facts.instance.service).copied().unwrap_or(0);
                    match rooms.is_hopeless(facts.instance, lost, false) {
                        Some(why) => failures.push(GivenUp { instance: facts.instance, why }),
                        None => moves.wait(wait),
                    }
                }
            },
            Stand::Complete | Stand::Ready => {}
        }
    }
    if is_together || index + 1 < plan.waves.len() {
        moves.wait(Wait::Wave { number: index + 1, instances: incomplete });
    }
    Work::Open
}

/// The old half is kept for a while after the wave before it was proven.
fn fallback(view: &View<'_>, index: usize) -> Option<Wait> {
    let wave = view.rollout().plan.waves.get(index)?;
    let proven_at = view.rollout().waves_proven.get(&index.checked_sub(1)?)?;
    let until = later(*proven_at, wave.after);
    (view.world.now < until).then_some(Wait::Fallback { until })
}
