//! Everything before the first change: checks, claims, bytes, smoke starts.

use std::collections::BTreeSet;

use greenlight_model::action::{Action, Verb};
use greenlight_model::check;
use greenlight_model::decision::{Step, Wait};
use greenlight_model::id::{ReleaseId, ServiceName};
use greenlight_model::rollout::Direction;
use greenlight_model::traffic::{Admission, BalancerReport};
use greenlight_model::world::World;

use crate::decide::{Phase, conclude};
use crate::failure::{GivenUp, Verdict, judge, list};
use crate::finish;
use crate::instance::{Stand, agent_step, out_of_reach};
use crate::moves::Moves;
use crate::room::Rooms;
use crate::view::{Facts, View, later};

/// Every instance is checked, all at once. One that fails refuses the rollout, and every failing one is named: so all
/// answers are waited for. A host that cannot be reached has failed.
pub(crate) fn preflight(view: &View<'_>) -> Phase {
    let mut moves = Moves::default();
    let mut failures = Vec::new();
    for facts in view.facts.iter().filter(|facts| !facts.is_left_out) {
        if facts.is_checked {
            continue;
        }
        match check(view, facts) {
            Stand::Failed(why) => failures.push(GivenUp { instance: facts.instance, why }),
            stand => take(&mut moves, stand),
        }
    }
    let unread = unread_balancers(view);
    let is_late = later(view.rollout().started_at, view.world.environment.timeouts.connect) <= view.world.now;
    if !is_late {
        unread.iter().for_each(|(title, why)| {
            moves.wait(Wait::Balancer { title: title.clone(), why: why.clone() });
        });
    }
    if !moves.is_empty() {
        return Phase::Decided(moves.proceed());
    }
    let mut whys: Vec<String> = unread.into_iter().map(|(title, why)| format!("{title}: {why}")).collect();
    if !failures.is_empty() {
        whys.push(list(failures.iter().map(|failure| (failure.instance, failure.why.as_str()))));
    }
    if !view.has_changed() {
        whys.extend(otherwise_than_planned(view));
        whys.extend(uneven_versions(view));
        whys.extend(unknown_servers(view));
        whys.extend(servers_in_maintenance(view));
        whys.extend(impossible_floor(view));
    }
    if whys.is_empty() { Phase::Over } else { Phase::Decided(finish::refuse(view, whys.join("; "))) }
}

fn check(view: &View<'_>, facts: &Facts<'_>) -> Stand {
    if let Some(wait) = facts.in_flight_wait() {
        return Stand::Wait(wait);
    }
    if let Some(why) = view.spent(facts.instance, Verb::Preflight) {
        return Stand::Failed(why);
    }
    let Some(release) = facts.release else { return Stand::Complete };
    // A host that was never heard of is asked: its answer, or its silence, is the check.
    if facts.unreachable.is_some() {
        return out_of_reach(view, facts);
    }
    let why = format!("{} must be able to take {}", facts.instance.host, view.title(release));
    Stand::Step(Step { action: Action::Preflight { instance: facts.instance.clone(), release }, why })
}

/// What an instance goes back to is what the plan found there. A host that was silent then, or was changed since, runs
/// something else: going back would take that away.
fn otherwise_than_planned(view: &View<'_>) -> Vec<String> {
    let title = |release: Option<ReleaseId>| release.map_or("nothing".to_owned(), |id| view.title(id));
    let differs = |facts: &&Facts<'_>| facts.report.is_some_and(|report| report.linked != facts.baseline);
    let described = view.facts.iter().filter(differs).filter_map(|facts| {
        let (instance, runs) = (facts.instance, title(facts.report?.linked));
        Some(format!(
            "{instance} runs {runs}, and the plan was made for {}: plan again",
            title(facts.baseline)
        ))
    });
    described.collect()
}

/// Hosts of one service that differ in what must be the same on all: they would answer differently for the same request.
fn uneven_versions(view: &View<'_>) -> Vec<String> {
    let versions = &view.rollout().versions;
    if versions.is_empty() {
        return Vec::new();
    }
    let uneven = check::uneven(versions).into_iter();
    uneven.map(|uneven| format!("{}: not the same version everywhere: {uneven}", uneven.service)).collect()
}

/// What stands against a rollout beyond what its hosts say: balancers that cannot be read or do not know a host, servers that a
/// person took out, a floor that no wave could keep.
#[must_use]
pub fn objections(world: &World) -> Vec<String> {
    let view = &View::new(world);
    let unread = unread_balancers(view).into_iter().map(|(title, why)| format!("{title}: {why}"));
    let mut whys: Vec<String> = unread.collect();
    whys.extend(unknown_servers(view));
    whys.extend(servers_in_maintenance(view));
    whys.extend(impossible_floor(view));
    whys
}

/// A balancer that answers and does not know an instance would leave it without requests for ever.
fn unknown_servers(view: &View<'_>) -> Vec<String> {
    let world = view.world;
    let mut whys = Vec::new();
    for (balancer, report) in world.environment.balancers.iter().zip(&world.traffic) {
        let BalancerReport::Servers(servers) = report else { continue };
        let missing: Vec<&str> = view
            .facts
            .iter()
            .filter(|facts| facts.instance.service == balancer.service)
            .filter(|facts| !servers.contains_key(&facts.instance.host))
            .map(|facts| balancer.server(&facts.instance.host))
            .collect();
        if !missing.is_empty() {
            whys.push(format!("{} has no server {}", balancer.title(), missing.join(", ")));
        }
    }
    whys
}

/// Balancers that cannot be read, and why, as long as nothing is claimed: a rollout does not begin without them. Later they
/// are waited for.
fn unread_balancers(view: &View<'_>) -> Vec<(String, String)> {
    if view.has_changed() || view.facts.iter().any(|facts| facts.has_our_claim(view.rollout())) {
        return Vec::new();
    }
    let world = view.world;
    let reports = world.environment.balancers.iter().zip(&world.traffic);
    reports
        .filter(|(balancer, _)| view.rollout().plan.targets.contains_key(&balancer.service))
        .filter_map(|(balancer, report)| match report {
            BalancerReport::Unreachable { why } => Some((balancer.title(), why.clone())),
            BalancerReport::Servers(_) => None,
        })
        .collect()
}

/// A server that a person took out is not let in again by us, so a rollout over it could not end well.
fn servers_in_maintenance(view: &View<'_>) -> Vec<String> {
    let world = view.world;
    let mut whys = Vec::new();
    for (balancer, report) in world.environment.balancers.iter().zip(&world.traffic) {
        let BalancerReport::Servers(servers) = report else { continue };
        let of_service = view.facts.iter().filter(|facts| facts.instance.service == balancer.service);
        let is_out =
            |host| servers.get(host).is_some_and(|server| server.admission == Admission::Maintenance);
        for facts in of_service.filter(|facts| is_out(&facts.instance.host)) {
            let server = balancer.server(&facts.instance.host);
            whys.push(format!(
                "{} has server {server} in maintenance, where somebody put it by hand or by configuration; set it to \
                 `drain` or `ready` there, or leave its host out of the rollout",
                balancer.title()
            ));
        }
    }
    whys
}

/// A floor that a wave can never keep is found before anything changes, not in the middle.
fn impossible_floor(view: &View<'_>) -> BTreeSet<String> {
    let rooms = Rooms::new(view);
    let mut whys = BTreeSet::new();
    for (index, wave) in view.rollout().plan.waves.iter().enumerate() {
        for service in view.rollout().plan.targets.keys() {
            let of_service = || view.wave(index).filter(|facts| facts.instance.service == *service);
            let must_leave =
                |facts: &Facts<'_>| facts.serves && facts.release.is_some_and(|release| !facts.runs(release));
            if !of_service().any(must_leave) {
                continue;
            }
            // A canary is let in together as well: when all of it has its share.
            let is_together = wave.together || !wave.steps.is_empty();
            let out = if is_together { of_service().count() } else { 1 };
            whys.extend(rooms.never_allows(service, out));
        }
    }
    whys
}

/// Every instance is claimed before the first change. One that somebody else holds refuses the rollout.
pub(crate) fn claims(view: &View<'_>) -> Phase {
    // At the end claims are given back, also of a rollout that found nothing to change.
    if view.has_changed() || view.rollout().waves_proven.len() == view.rollout().plan.waves.len() {
        return Phase::Over;
    }
    // What refuses the rollout after it was claimed must not be claimed anew while it is given back.
    if let Some(Verdict::Refuse(why)) = judge(view, &staging(view).1) {
        return Phase::Decided(finish::refuse(view, why));
    }
    let mut moves = Moves::default();
    let mut failures = Vec::new();
    for facts in view.facts.iter().filter(|facts| !facts.is_left_out) {
        if facts.is_claimed(view.world) {
            continue;
        }
        match claim(view, facts) {
            Stand::Failed(why) => failures.push(GivenUp { instance: facts.instance, why }),
            stand => take(&mut moves, stand),
        }
    }
    if !failures.is_empty() {
        let why = list(failures.iter().map(|failure| (failure.instance, failure.why.as_str())));
        return Phase::Decided(finish::refuse(view, why));
    }
    if moves.is_empty() { Phase::Over } else { Phase::Decided(moves.proceed()) }
}

fn claim(view: &View<'_>, facts: &Facts<'_>) -> Stand {
    if let Some(wait) = facts.in_flight_wait() {
        return Stand::Wait(wait);
    }
    if facts.unreachable.is_some() || facts.report.is_none() {
        return out_of_reach(view, facts);
    }
    if let Some(claim) = facts.foreign_claim(view.world) {
        return Stand::Failed(format!(
            "{} holds it for \"{}\" (rollout {}) until {:.0}",
            claim.holder, claim.reason, claim.rollout, claim.expires_at
        ));
    }
    if let Some(why) = view.spent(facts.instance, Verb::Claim) {
        return Stand::Failed(why);
    }
    let why = format!("no other rollout may change {} meanwhile", facts.instance);
    Stand::Step(Step { action: Action::Claim { instance: facts.instance.clone() }, why })
}

/// The bytes go everywhere first, then each service that asks for it is started once beside the live process. Only when all
/// of it is done does the first instance change.
pub(crate) fn stage(view: &View<'_>) -> Phase {
    let (moves, failures) = staging(view);
    if moves.is_empty() && failures.is_empty() {
        return Phase::Over;
    }
    conclude(view, &failures, moves, &mut Rooms::new(view))
}

fn staging<'a>(view: &View<'a>) -> (Moves, Vec<GivenUp<'a>>) {
    let mut moves = Moves::default();
    let mut failures = Vec::new();
    for facts in view.facts.iter().filter(|facts| !facts.is_left_out) {
        let Some(release) = facts.release else { continue };
        if facts.runs(release) {
            continue;
        }
        match ready_to_switch(view, facts, release) {
            Stand::Failed(why) => failures.push(GivenUp { instance: facts.instance, why }),
            stand => take(&mut moves, stand),
        }
    }
    (moves, failures)
}

fn ready_to_switch(view: &View<'_>, facts: &Facts<'_>, release: ReleaseId) -> Stand {
    let instance = facts.instance;
    let Some(report) = facts.report else { return out_of_reach(view, facts) };
    let is_staged = report.staged.contains(&release);
    let is_smoked =
        !wants_smoke(view, &instance.service) || facts.is_touched || view.rollout().smoked.contains(instance);
    if is_staged && is_smoked {
        return Stand::Complete;
    }
    if let Some(wait) = facts.in_flight_wait() {
        return Stand::Wait(wait);
    }
    let title = view.title(release);
    if is_staged {
        let why = format!("{title} is started once beside the live process of {instance}");
        return agent_step(view, facts, Action::Smoke { instance: instance.clone(), release }, why);
    }
    let why = format!("{title} is not on {} yet", instance.host);
    agent_step(view, facts, Action::Stage { instance: instance.clone(), release }, why)
}

/// Going back is to something that ran before; it is not tried out again.
fn wants_smoke(view: &View<'_>, service: &ServiceName) -> bool {
    view.rollout().plan.direction == Direction::Forward
        && view
            .world
            .services
            .get(service)
            .is_some_and(|service| service.processes.values().any(|process| process.smoke.is_some()))
}

/// Adds what an instance needs. Preparation never takes one out of service, so the floor is not asked.
pub(crate) fn take(moves: &mut Moves, stand: Stand) {
    match stand {
        Stand::Step(step) | Stand::TakeOut(step) => moves.step(step.action, step.why),
        Stand::Wait(wait) => moves.wait(wait),
        Stand::Complete | Stand::Ready | Stand::Failed(_) => {}
    }
}
