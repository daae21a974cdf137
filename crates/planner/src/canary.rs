//! A canary's share of the traffic, and when it gets the next one.
//!
//! The share is set while the canary is still out of traffic, raised step by step, and ended as soon as the wave is proven,
//! or when everything has gone back: a canary that goes back is drained first of all.
//!
//! Not in here: how the canary is judged (`verdict`); only what follows from the answer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::action::{Action, Verb};
use greenlight_model::canary::{Answer, Judgement, Judging, OnInconclusive, Until};
use greenlight_model::decision::Wait;
use greenlight_model::fleet::Strategy;
use greenlight_model::id::{HostName, ReleaseId, ServiceName};
use greenlight_model::quantity::{Percent, human_duration};
use greenlight_model::rollout::Note;
use greenlight_model::traffic::{BalancerReport, weights};
use greenlight_model::world::{Traffic, World};

use crate::instance::{Stand, balancer, foreign_claim, is_ready};
use crate::moves::Moves;
use crate::view::{Facts, View, later};

/// What a canary is to get of the traffic.
pub(crate) struct Share {
    /// The share; none where every server is to have its usual weight.
    share: Option<Percent>,
    /// The hosts that get it together.
    canaries: BTreeSet<HostName>,
}

/// What judging a step leads to.
pub(crate) enum Turn {
    /// Record this.
    Note(Note),
    /// It goes on.
    Wait(Wait),
}

/// For each service with a canary the share that its canary is to have, where the balancers show something else; none where
/// every server is to have its usual weight.
pub(crate) fn shares<'a>(
    world: &'a World,
    facts: &[Facts<'a>],
    waves: &[Vec<usize>],
) -> BTreeMap<&'a ServiceName, Share> {
    let rollout = &world.rollout;
    let services = shared_services(world);
    let open = rollout.open_canary();
    let canaries = || {
        let of_canaries = rollout.plan.waves.iter().zip(waves).filter(|(wave, _)| !wave.steps.is_empty());
        of_canaries.flat_map(|(_, places)| places).filter_map(|place| facts.get(*place))
    };
    let members = |service: &ServiceName| -> Vec<&Facts<'a>> {
        let places = open.and_then(|index| waves.get(index)).into_iter().flatten();
        let members = places.filter_map(|place| facts.get(*place));
        members.filter(|one| one.instance.service == *service).collect()
    };
    let mut due = BTreeMap::new();
    for service in services {
        let wanted = match open.and_then(|wave| rollout.canary_step(wave)) {
            // One that is to go back and is still there keeps its share until it gets no requests: it is never to get more.
            None if rollout.is_turning_back()
                && canaries().any(|one| one.instance.service == *service && stays_behind(one)) =>
            {
                continue;
            }
            None => None,
            Some((_, step)) => {
                let members = members(service);
                let mut stay = members.iter().filter(|one| !one.is_left_out).peekable();
                // Before its members are ready there is nothing to be shared out.
                if stay.peek().is_none() || !stay.all(|facts| is_ready(facts)) {
                    continue;
                }
                // One that was left out and is still there is no stable one.
                let canaries = members.iter().filter(|one| !one.is_left_out || stays_behind(one));
                Some((step.share, canaries.map(|facts| facts.instance.host.clone()).collect()))
            }
        };
        if !is_shared_out(world, service, wanted.as_ref()) {
            let (share, canaries) = wanted.unzip();
            due.insert(service, Share { share, canaries: canaries.unwrap_or_default() });
        }
    }
    due
}

/// The services whose traffic is shared out by weights that are ours: those of the plan's canaries; and, when all waves are
/// proven, every one where the environment has canaries: an earlier rollout that got stuck may have left one its share.
fn shared_services(world: &World) -> BTreeSet<&ServiceName> {
    let rollout = &world.rollout;
    let plan = &rollout.plan;
    let canaries = plan.waves.iter().filter(|wave| !wave.steps.is_empty()).flat_map(|wave| &wave.instances);
    let of_plan = canaries.map(|instance| &instance.service);
    let is_over = rollout.waves_proven.len() == plan.waves.len();
    let has_canaries = matches!(world.environment.strategy, Strategy::Canary(_));
    of_plan.chain(plan.targets.keys().filter(|_| is_over && has_canaries)).collect()
}

/// Whether a canary that is on its way back may still answer requests as what it was on trial with.
fn stays_behind(facts: &Facts<'_>) -> bool {
    let gets_requests = !matches!(facts.traffic, Traffic::None | Traffic::Known { admitted: false, .. });
    let is_back = facts.release.is_some_and(|release| facts.runs(release));
    facts.is_touched && gets_requests && !is_back
}

/// Whether every balancer of a service that can be read gives these hosts this share, or every server its usual weight.
fn is_shared_out(
    world: &World,
    service: &ServiceName,
    wanted: Option<&(Percent, BTreeSet<HostName>)>,
) -> bool {
    let balancers = world.environment.balancers.iter().zip(&world.traffic);
    let mut reports =
        balancers.filter(|(balancer, _)| balancer.service == *service).map(|(_, report)| report);
    reports.all(|report| {
        let BalancerReport::Servers(servers) = report else { return true };
        match wanted {
            None => servers.values().all(|server| server.weight == server.normal_weight),
            Some((share, hosts)) => {
                let wanted = weights(servers, hosts, *share);
                servers.iter().all(|(host, server)| wanted.get(host) == Some(&server.weight))
            }
        }
    })
}

/// Brings what canaries get of the traffic to what it is to be. False while there is something to do; what cannot be done is
/// returned.
pub(crate) fn share_out(view: &View<'_>, moves: &mut Moves) -> Result<bool, String> {
    let mut is_done = true;
    let waves = &view.rollout().plan.waves;
    for service in shared_services(view.world) {
        let of_service = || view.facts.iter().filter(|facts| facts.instance.service == *service);
        if let Some(unknown) = of_service().find(|facts| matches!(facts.traffic, Traffic::Unknown { .. })) {
            is_done = false;
            take(moves, balancer(view, unknown));
        }
        let Some(share) = view.shares.get(service) else { continue };
        is_done = false;
        let is_sharing = |facts: &&Facts<'_>| {
            facts.in_flight.is_some_and(|in_flight| in_flight.action.verb() == Verb::Share)
        };
        if let Some(wait) = of_service().find(is_sharing).and_then(Facts::in_flight_wait) {
            moves.wait(wait);
            continue;
        }
        let spent = of_service().find_map(|facts| Some((facts, view.spent(facts.instance, Verb::Share)?)));
        if let Some((facts, why)) = spent {
            return Err(format!("{}: {why}", facts.instance));
        }
        // Whoever speaks for the service must have nothing else to do.
        let is_canary = |facts: &&Facts<'_>| {
            waves.iter().any(|wave| !wave.steps.is_empty() && wave.instances.contains(facts.instance))
        };
        let speakers = || of_service().filter(|facts| facts.in_flight.is_none() && !facts.is_left_out);
        let speaker = speakers().find(is_canary).or_else(|| speakers().next());
        let Some(facts) = speaker else {
            of_service().filter_map(|facts| facts.in_flight_wait()).for_each(|wait| moves.wait(wait));
            continue;
        };
        if let Some(wait) = foreign_claim(view, facts) {
            moves.wait(wait);
            continue;
        }
        let why = match share.share {
            None => "the canary is over: every server gets its usual part of the traffic".to_owned(),
            Some(share) => format!("the canary's hosts together get {share} of the traffic"),
        };
        let canaries = share.canaries.clone();
        moves.step(Action::Share { instance: facts.instance.clone(), canaries, share: share.share }, why);
    }
    Ok(is_done)
}

fn take(moves: &mut Moves, stand: Stand) {
    if let Stand::Wait(wait) = stand {
        moves.wait(wait);
    }
}

/// While it is being learnt what is usual, no canary is taken out of traffic for the first time.
pub(crate) fn learning(view: &View<'_>, facts: &Facts<'_>) -> Option<Wait> {
    let settings = judging(&view.world.environment.strategy)?;
    let rollout = view.rollout();
    let until = later(rollout.started_at, settings.learning_time());
    let is_due = view.world.now < until && !rollout.drained_at.contains_key(facts.instance);
    is_due.then_some(Wait::Learning { until })
}

/// The canary was found to be worse: this wins over holds and waits.
pub(crate) fn aborted(world: &World) -> Option<Note> {
    let wave = world.rollout.open_canary()?;
    let judgement = world.judgement.as_ref().filter(|judgement| judgement.wave == wave)?;
    if judgement.answer != Answer::Abort {
        return None;
    }
    let bad: BTreeSet<ReleaseId> = judgement
        .services
        .iter()
        .filter_map(|service| world.rollout.plan.targets.get(service))
        .copied()
        .collect();
    Some(Note::TurnBack { why: format!("the canary is worse, {}", judgement.why), bad })
}

/// What follows for a wave whose members all have their share of the traffic. None when its last step is over.
pub(crate) fn judge(view: &View<'_>, wave: usize) -> Option<Turn> {
    let rollout = view.rollout();
    let (index, step) = rollout.canary_step(wave)?;
    let passed = |why: String| Some(Turn::Note(Note::StepPassed { wave, step: index, why }));
    let progress = rollout.canaries.get(&wave);
    let admitted =
        rollout.plan.waves.get(wave)?.instances.iter().filter_map(|one| rollout.admitted_at.get(one));
    let passed_at = progress.and_then(|canary| canary.passed_at);
    let since = admitted.copied().chain(passed_at).max().unwrap_or(rollout.started_at);
    let judgement = view.world.judgement.as_ref();
    let judgement = judgement.filter(|judgement| (judgement.wave, judgement.step) == (wave, index));
    let why = || judgement.map_or_else(|| "nothing has been counted yet".to_owned(), |told| told.why.clone());
    let requests_needed = match judgement {
        Some(Judgement { answer: Answer::Inconclusive { requests_needed }, .. }) => *requests_needed,
        _ => None,
    };
    let wait = |until| Wait::Verdict { share: step.share, why: why(), requests_needed, until };
    let settings = judging(&view.world.environment.strategy);
    match step.until {
        Until::Elapsed(time) => {
            let until = later(since, time);
            if view.world.now < until {
                return Some(Turn::Wait(wait(until)));
            }
            passed(format!("{} at {} without being worse; {}", human_duration(time), step.share, why()))
        }
        Until::Pass if judgement.is_some_and(|judgement| judgement.answer == Answer::Pass) => passed(why()),
        Until::Pass => {
            let until = later(since, settings.map_or(Duration::MAX, |judging| judging.max_time));
            if view.world.now < until {
                return Some(Turn::Wait(wait(until)));
            }
            let max_time = settings.map_or(Duration::MAX, |judging| judging.max_time);
            let undecided =
                format!("no verdict at {} within {}: {}", step.share, human_duration(max_time), why());
            match settings.map_or(OnInconclusive::Hold, |judging| judging.on_inconclusive) {
                OnInconclusive::Hold => Some(Turn::Wait(wait(until))),
                OnInconclusive::TurnBack => {
                    Some(Turn::Note(Note::TurnBack { why: undecided, bad: BTreeSet::new() }))
                }
                OnInconclusive::Ask if progress.and_then(|canary| canary.asked) == Some(index) => {
                    passed(format!("{undecided}; a person went on"))
                }
                OnInconclusive::Ask => Some(Turn::Note(Note::Ask { wave, step: index, why: undecided })),
            }
        }
    }
}

fn judging(strategy: &Strategy) -> Option<&Judging> {
    match strategy {
        Strategy::Canary(canary) => Some(&canary.judging),
        _ => None,
    }
}
