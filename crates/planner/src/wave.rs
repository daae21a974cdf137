//! Wave by wave: the next one begins when every instance of the one before is proven and admitted, and stays so.

use greenlight_model::decision::{Decision, Wait};
use greenlight_model::id::Instance;
use greenlight_model::rollout::Note;

use crate::back::{self, GoneBack};
use crate::decide::{Phase, conclude};
use crate::failure::GivenUp;
use crate::instance::{Stand, advance, is_ready, out_of_reach};
use crate::moves::Moves;
use crate::room::Rooms;
use crate::view::{Facts, View, later};

/// Works on the first wave that is not proven, while those before it are watched.
pub(crate) fn waves(view: &View<'_>) -> Phase {
    let mut rooms = Rooms::new(view);
    let mut failures = Vec::new();
    let mut moves = Moves::default();
    for index in 0..view.rollout().plan.waves.len() {
        if view.rollout().waves_proven.contains_key(&index) {
            watch(view, index, &mut moves, &mut failures);
            if moves.is_empty() {
                continue;
            }
            break;
        }
        let is_complete = work(view, index, &mut rooms, &mut moves, &mut failures);
        if is_complete && failures.is_empty() {
            return Phase::Decided(Decision::Note(Note::WaveProven { wave: index }));
        }
        break;
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

/// Moves the instances of a wave. True when all of them are where they are to be.
fn work<'a>(
    view: &View<'a>,
    index: usize,
    rooms: &mut Rooms<'a>,
    moves: &mut Moves,
    failures: &mut Vec<GivenUp<'a>>,
) -> bool {
    let plan = &view.rollout().plan;
    let members = || view.wave(index).filter(|facts| !facts.is_left_out);
    let is_together = plan.waves[index].together;
    let may_admit = !is_together || members().all(is_ready);
    let stands: Vec<(&Facts<'a>, Stand)> =
        members().map(|facts| (facts, advance(view, facts, may_admit))).collect();
    let incomplete: Vec<Instance> = stands
        .iter()
        .filter(|(_, stand)| !matches!(stand, Stand::Complete))
        .map(|(facts, _)| facts.instance.clone())
        .collect();
    if incomplete.is_empty() {
        return true;
    }
    if let Some(wait) = fallback(view, index) {
        moves.wait(wait);
        return false;
    }
    // What left-out instances cannot give back to capacity decides whether a floor can still be kept.
    let gone_back = back::stands(view, |facts| facts.is_left_out);
    let lost = GoneBack::lost(&gone_back);
    for (facts, stand) in stands {
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
    false
}

/// The old half is kept for a while after the wave before it was proven.
fn fallback(view: &View<'_>, index: usize) -> Option<Wait> {
    let wave = view.rollout().plan.waves.get(index)?;
    let proven_at = view.rollout().waves_proven.get(&index.checked_sub(1)?)?;
    let until = later(*proven_at, wave.after);
    (view.world.now < until).then_some(Wait::Fallback { until })
}
