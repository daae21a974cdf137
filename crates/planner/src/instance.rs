//! One instance's way to what it is to run, each step derived from what is observed: staged? drained? switched and
//! proven? confirmed? admitted and seen up? The same code goes forward and back; only the wanted release differs.

use greenlight_model::action::{Action, Verb};
use greenlight_model::decision::{Step, Wait};
use greenlight_model::host::{InstanceReport, LedgerEntry, LedgerEvent};
use greenlight_model::id::{Generation, ReleaseId};
use greenlight_model::world::Traffic;

use crate::view::{Facts, View, later};

/// Where an instance stands.
pub(crate) enum Stand {
    /// It runs what it is to run, proven and confirmed, and gets the requests it should.
    Complete,
    /// This is next.
    Step(Step),
    /// This is next, and takes a serving instance out: the floor decides when.
    TakeOut(Step),
    /// It would be admitted, but its wave goes together and is not ready.
    Ready,
    /// Something else must happen first.
    Wait(Wait),
    /// It cannot get there.
    Failed(String),
}

/// What is next for an instance on the way to its wanted release.
pub(crate) fn advance(view: &View<'_>, facts: &Facts<'_>, may_admit: bool) -> Stand {
    if let Some(wait) = facts.in_flight_wait() {
        return Stand::Wait(wait);
    }
    let Some(report) = facts.report else { return out_of_reach(view, facts) };
    let Some(release) = facts.release else { return take_off(view, facts, report) };
    if let Some(why) = view.refused(facts.instance, Verb::Activate) {
        return Stand::Failed(why);
    }
    if !facts.runs(release) {
        return switch(view, facts, report, release);
    }
    if !facts.is_confirmed(release) {
        return confirm(view, facts, report, release);
    }
    admit(view, facts, release, may_admit)
}

/// The confirmation of what this rollout switched, where it is due and can be had now.
pub(crate) fn confirmation(view: &View<'_>, facts: &Facts<'_>) -> Option<Step> {
    let (report, release) = (facts.report?, facts.release?);
    if !facts.is_touched || !facts.runs(release) || facts.is_confirmed(release) {
        return None;
    }
    match confirm(view, facts, report, release) {
        Stand::Step(step) if step.action.verb() == Verb::Confirm => Some(step),
        _ => None,
    }
}

fn confirm(view: &View<'_>, facts: &Facts<'_>, report: &InstanceReport, release: ReleaseId) -> Stand {
    let why = format!("{} proves {}; a fresh connection confirms it", facts.instance, view.title(release));
    let generation = report.ledger.generation;
    let action = Action::Confirm { instance: facts.instance.clone(), release, generation };
    agent_step(view, facts, action, why)
}

/// Whether nothing but admission is missing.
pub(crate) fn is_ready(facts: &Facts<'_>) -> bool {
    facts.release.is_some_and(|release| facts.runs(release) && facts.is_confirmed(release))
}

/// An action that the host's agent performs: the host must be in reach, the instance claimed, and the action not
/// already given up.
pub(crate) fn agent_step(view: &View<'_>, facts: &Facts<'_>, action: Action, why: String) -> Stand {
    if let Some(why) = view.spent(facts.instance, action.verb()) {
        return Stand::Failed(why);
    }
    obstacle(view, facts).unwrap_or_else(|| Stand::Step(claim_first(view, facts, Step { action, why })))
}

/// What stands before any change of the instance through its agent: reach, and somebody else's claim.
fn obstacle(view: &View<'_>, facts: &Facts<'_>) -> Option<Stand> {
    if facts.unreachable.is_some() {
        return Some(out_of_reach(view, facts));
    }
    if let Some(wait) = foreign_claim(view, facts) {
        return Some(Stand::Wait(wait));
    }
    let is_claimed = facts.is_claimed(view.world);
    let spent = view.spent(facts.instance, Verb::Claim).filter(|_| !is_claimed);
    spent.map(Stand::Failed)
}

/// The step, or the claim that has to come before it.
fn claim_first(view: &View<'_>, facts: &Facts<'_>, step: Step) -> Step {
    if facts.is_claimed(view.world) {
        return step;
    }
    let why = format!("the lease of {} is to be ours before it is changed", facts.instance);
    Step { action: Action::Claim { instance: facts.instance.clone() }, why }
}

pub(crate) fn foreign_claim(view: &View<'_>, facts: &Facts<'_>) -> Option<Wait> {
    facts.foreign_claim(view.world).map(|claim| Wait::Claim {
        instance: facts.instance.clone(),
        holder: claim.holder.clone(),
        rollout: claim.rollout.clone(),
        expires_at: claim.expires_at,
    })
}

/// A host that does not answer is waited for as long as connecting to it may take.
pub(crate) fn out_of_reach(view: &View<'_>, facts: &Facts<'_>) -> Stand {
    let (since, why) = match &facts.unreachable {
        Some(unreachable) => (unreachable.since, unreachable.why.clone()),
        None => (view.rollout().started_at, "it has not reported yet".to_owned()),
    };
    if later(since, view.world.environment.timeouts.connect) <= view.world.now {
        return Stand::Failed(format!("it cannot be reached since {since:.0}: {why}"));
    }
    Stand::Wait(Wait::Unreachable { host: facts.instance.host.clone(), since, why })
}

/// Towards running `release`, which it does not.
fn switch(view: &View<'_>, facts: &Facts<'_>, report: &InstanceReport, release: ReleaseId) -> Stand {
    let instance = facts.instance;
    if !report.staged.contains(&release) {
        let why = format!("{} is not on {} yet", view.title(release), instance.host);
        return agent_step(view, facts, Action::Stage { instance: instance.clone(), release }, why);
    }
    let failed = crash(view, facts, report, release).or_else(|| gone_back(view, facts, report));
    if let Some(why) = failed {
        return Stand::Failed(why);
    }
    let generation = facts.generation;
    let action = Action::Activate { instance: instance.clone(), release, generation };
    leave(view, facts, report, &action, &format!("it is to run {}", view.title(release)))
}

/// Towards running nothing.
fn take_off(view: &View<'_>, facts: &Facts<'_>, report: &InstanceReport) -> Stand {
    let ledger = &report.ledger;
    let is_off = report.linked.is_none() && ledger.active.is_none() && !report.is_running();
    if is_off && (!facts.is_touched || ledger.generation >= facts.generation) {
        return Stand::Complete;
    }
    let action = Action::Deactivate { instance: facts.instance.clone(), generation: facts.generation };
    leave(view, facts, report, &action, "it ran nothing before this rollout")
}

/// Out of traffic, and then the change itself.
fn leave(
    view: &View<'_>,
    facts: &Facts<'_>,
    report: &InstanceReport,
    change: &Action,
    purpose: &str,
) -> Stand {
    let instance = facts.instance;
    if let Some(why) = newer(report, facts.generation).or_else(|| view.spent(instance, change.verb())) {
        return Stand::Failed(why);
    }
    if let Some(stand) = obstacle(view, facts) {
        return stand;
    }
    let change = |why: String| claim_first(view, facts, Step { action: change.clone(), why });
    let drain = |why: String| {
        claim_first(view, facts, Step { action: Action::Drain { instance: instance.clone() }, why })
    };
    match &facts.traffic {
        Traffic::Unknown { .. } => balancer(view, facts),
        Traffic::None if facts.serves => {
            Stand::TakeOut(change(format!("{purpose}; no balancer is before it")))
        }
        Traffic::None => Stand::Step(change(format!("{purpose}; it does not serve"))),
        Traffic::Known { admitted: true, .. } => match view.spent(instance, Verb::Drain) {
            Some(why) => Stand::Failed(why),
            None if facts.serves => Stand::TakeOut(drain(format!("{purpose}, and still gets requests"))),
            None => Stand::Step(drain(format!(
                "{purpose}; it does not serve, but would get requests as soon as it is up"
            ))),
        },
        Traffic::Known { sessions: 0, .. } => {
            Stand::Step(change(format!("{purpose}; it gets no requests and has no sessions")))
        }
        Traffic::Known { sessions, .. } => match view.rollout().drained_at.get(instance) {
            // Somebody else took it out, at a time that is not known. Draining it again gives its sessions their time.
            None => match view.spent(instance, Verb::Drain) {
                Some(why) => Stand::Failed(why),
                None => Stand::Step(drain(format!(
                    "it gets no requests, and its {sessions} sessions get their time to end"
                ))),
            },
            Some(drained_at) => {
                let until = later(*drained_at, view.world.environment.timeouts.drain);
                if view.world.now < until {
                    let instance = instance.clone();
                    return Stand::Wait(Wait::Sessions { instance, left: *sessions, until });
                }
                Stand::Step(change(format!("{purpose}; the time for its last {sessions} sessions is up")))
            }
        },
    }
}

/// Back into traffic, and seen up there.
fn admit(view: &View<'_>, facts: &Facts<'_>, release: ReleaseId, may_admit: bool) -> Stand {
    let Traffic::Known { admitted, up, .. } = facts.traffic else {
        return match facts.traffic {
            Traffic::Unknown { .. } => balancer(view, facts),
            Traffic::None | Traffic::Known { .. } => Stand::Complete,
        };
    };
    if admitted && up && !facts.is_partly_admitted && !facts.is_drained {
        return Stand::Complete;
    }
    if !may_admit {
        return Stand::Ready;
    }
    // A drain since the last admission, or none by us at all, means that what is seen is not what we admitted.
    let is_admitted = admitted && !facts.is_partly_admitted && !facts.is_drained;
    let admitted_at = view.rollout().admitted_at.get(facts.instance).filter(|_| is_admitted);
    let Some(admitted_at) = admitted_at else {
        return admission(view, facts, release);
    };
    let timeout = view.world.environment.timeouts.admit;
    let until = later(*admitted_at, timeout);
    if view.world.now < until {
        return Stand::Wait(Wait::BalancerHealth { instance: facts.instance.clone(), until });
    }
    let timeout = greenlight_model::quantity::human_duration(timeout);
    Stand::Failed(format!("the balancer does not see it up {timeout} after it was admitted"))
}

/// The step that lets an instance back in which runs `release`.
pub(crate) fn admission(view: &View<'_>, facts: &Facts<'_>, release: ReleaseId) -> Stand {
    if let Some(why) = view.spent(facts.instance, Verb::Admit) {
        return Stand::Failed(why);
    }
    // A balancer is reached without the instance's host. One that we have not switched still runs what it proved before,
    // and its balancer checks it; one that we have switched may have gone back by itself meanwhile.
    if facts.is_touched && facts.unreachable.is_some() {
        return out_of_reach(view, facts);
    }
    if let Some(wait) = foreign_claim(view, facts) {
        return Stand::Wait(wait);
    }
    let why = format!("it proves {} and may take requests", view.title(release));
    Stand::Step(Step { action: Action::Admit { instance: facts.instance.clone() }, why })
}

/// The wait for a balancer that cannot be read.
pub(crate) fn balancer(view: &View<'_>, facts: &Facts<'_>) -> Stand {
    match view.balancer_wait(facts.instance) {
        Some(wait) => Stand::Wait(wait),
        None => Stand::Failed("its balancers do not agree about it".to_owned()),
    }
}

/// A switched instance that was proven under this generation and is no longer has crashed: trying again would go on
/// for ever. One that was never proven was interrupted on the way, and may be tried again; so may one whose host went back
/// by itself since it was proven.
fn crash(view: &View<'_>, facts: &Facts<'_>, report: &InstanceReport, release: ReleaseId) -> Option<String> {
    let ledger = &report.ledger;
    let is_ours = facts.is_touched
        && ledger.generation == facts.generation
        && ledger.active == Some(release)
        && report.linked == Some(release);
    let was_proven = || {
        ledger.confirmed == Some(facts.generation)
            || ledger
                .history
                .iter()
                .rev()
                .filter(|entry| entry.generation == facts.generation)
                .take_while(|entry| entry.event != LedgerEvent::TurnedBack)
                .any(|entry| entry.event == LedgerEvent::Proven && entry.release == Some(release))
    };
    if !is_ours || !was_proven() {
        return None;
    }
    let why = report.why_not_proven(release)?;
    Some(format!("it proved {} and no longer does: {why}", view.title(release)))
}

/// A host that goes back by itself again and again is one that confirmations do not reach in time.
fn gone_back(view: &View<'_>, facts: &Facts<'_>, report: &InstanceReport) -> Option<String> {
    let ledger = &report.ledger;
    let times = ledger.times_gone_back(facts.generation);
    let retries = usize::try_from(view.world.environment.retries).unwrap_or(usize::MAX);
    if times <= retries {
        return None;
    }
    let of_generation =
        |entry: &&LedgerEntry| entry.event == LedgerEvent::TurnedBack && entry.generation == facts.generation;
    let detail = ledger.history.iter().rev().find(of_generation).map_or("", |entry| entry.detail.as_str());
    let tries = if times == 1 { String::new() } else { format!(" {times} times") };
    Some(format!("the host went back by itself{tries}: {detail}"))
}

fn newer(report: &InstanceReport, generation: Generation) -> Option<String> {
    let seen = report.ledger.generation;
    (seen > generation).then(|| {
        let by = report.ledger.rollout.as_ref().map(|id| format!(" of rollout {id}")).unwrap_or_default();
        format!("its host has seen generation {seen}{by} and refuses {generation}")
    })
}
