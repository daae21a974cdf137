//! What actions do to a world: to a host's ledger, link and processes, and to the balancers' servers.

use std::collections::BTreeSet;
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::Action;
use greenlight_model::host::{
    Answer, Claim, InstanceReport, LedgerEntry, LedgerEvent, ProcessReport, ProcessState,
};
use greenlight_model::id::{Generation, HostName, Instance, ReleaseId};
use greenlight_model::quantity::Percent;
use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth, weights};
use greenlight_model::world::World;

/// What is different from the moment an action that changes processes or a database is begun. A ledger says first what
/// is about to be done.
pub(crate) fn begin(world: &mut World, action: &Action) {
    match action {
        Action::Migrate { instance, release } => {
            enter(world, instance, LedgerEvent::MigrationBegun, Some(*release));
        }
        Action::Contract { instance, release } => {
            enter(world, instance, LedgerEvent::ContractionBegun, Some(*release));
        }
        _ => {}
    }
    let (Action::Activate { instance, generation, .. } | Action::Deactivate { instance, generation }) =
        action
    else {
        return;
    };
    let rollout = world.rollout.plan.id.clone();
    if let Some(report) = report_mut(world, instance) {
        report.ledger.generation = *generation;
        report.ledger.rollout = Some(rollout);
        for process in report.processes.values_mut() {
            *process = stopped("it is being switched");
        }
    }
    for server in servers_mut(world, instance) {
        server.health = ServerHealth::Down;
        server.sessions = 0;
    }
}

/// What is different when an action has succeeded.
pub(crate) fn succeed(world: &mut World, action: &Action) {
    match action {
        Action::Preflight { .. } | Action::Smoke { .. } => {}
        Action::Claim { instance } => {
            let claim = Claim {
                rollout: world.rollout.plan.id.clone(),
                holder: world.rollout.plan.started_by.clone(),
                reason: format!("rollout to {}", world.environment.name),
                expires_at: later(world.now, world.environment.timeouts.claim),
            };
            change(world, instance, |report| report.ledger.claim = Some(claim));
        }
        Action::Stage { instance, release } => {
            change(world, instance, |report| {
                report.staged.insert(*release);
            });
            enter(world, instance, LedgerEvent::Staged, Some(*release));
        }
        Action::Migrate { instance, release } => {
            enter(world, instance, LedgerEvent::Migrated, Some(*release));
        }
        Action::Contract { instance, release } => {
            enter(world, instance, LedgerEvent::Contracted, Some(*release));
        }
        Action::Drain { instance } => {
            servers_mut(world, instance).for_each(|server| server.admission = Admission::Drain);
        }
        Action::Activate { instance, release, generation } => {
            switch(world, instance, Some(*release), *generation);
            run(world, instance, *release);
            enter(world, instance, LedgerEvent::Proven, Some(*release));
        }
        Action::Deactivate { instance, generation } => {
            switch(world, instance, None, *generation);
            change(world, instance, |report| report.processes.clear());
            enter(world, instance, LedgerEvent::Deactivated, None);
        }
        Action::Confirm { instance, release, generation } => {
            change(world, instance, |report| {
                report.ledger.last_good = Some(*release);
                report.ledger.confirmed = Some(*generation);
            });
            enter(world, instance, LedgerEvent::Confirmed, Some(*release));
        }
        Action::Admit { instance } => {
            servers_mut(world, instance).for_each(|server| server.admission = Admission::Ready);
        }
        Action::Share { instance, canaries, share } => share_out(world, instance, canaries, *share),
        Action::Prune { instance, keep } => {
            change(world, instance, |report| report.staged.retain(|release| keep.contains(release)));
        }
        Action::Unclaim { instance } => change(world, instance, |report| report.ledger.claim = None),
    }
}

/// What is left behind by an activation that failed because the release does not work: it is switched to, and dead.
pub(crate) fn break_release(world: &mut World, action: &Action, why: &str) {
    let Action::Activate { instance, release, generation } = action else { return };
    switch(world, instance, Some(*release), *generation);
    run(world, instance, *release);
    crash(world, instance, why);
    enter(world, instance, LedgerEvent::Failed, Some(*release));
}

/// The processes of an instance die.
pub(crate) fn crash(world: &mut World, instance: &Instance, why: &str) {
    change(world, instance, |report| {
        for process in report.processes.values_mut() {
            let state = ProcessState::Failed { why: why.to_owned() };
            *process = ProcessReport { state, ..stopped("it does not run") };
        }
    });
    servers_mut(world, instance).for_each(|server| server.health = ServerHealth::Down);
}

/// The balancers of a service give these hosts this share, or every server its usual weight.
fn share_out(world: &mut World, instance: &Instance, canaries: &BTreeSet<HostName>, share: Option<Percent>) {
    let reports = world.traffic.iter_mut().zip(&world.environment.balancers);
    for (report, _) in reports.filter(|(_, balancer)| balancer.service == instance.service) {
        let BalancerReport::Servers(servers) = report else { continue };
        let wanted = share.map(|share| weights(servers, canaries, share)).unwrap_or_default();
        for (host, server) in servers {
            server.weight = wanted.get(host).copied().unwrap_or(server.normal_weight);
        }
    }
}

/// The balancers look whether the instance is up.
pub(crate) fn look(world: &mut World, instance: &Instance) {
    let is_up = world.report(instance).is_some_and(|report| report.proven().is_some());
    let health = if is_up { ServerHealth::Up } else { ServerHealth::Down };
    servers_mut(world, instance).for_each(|server| server.health = health);
}

/// The last sessions of a drained instance end.
pub(crate) fn end_sessions(world: &mut World, instance: &Instance) {
    servers_mut(world, instance)
        .filter(|server| server.admission != Admission::Ready)
        .for_each(|server| server.sessions = 0);
}

pub(crate) fn later(moment: Timestamp, by: Duration) -> Timestamp {
    moment.checked_add(by).unwrap_or(Timestamp::MAX)
}

fn switch(world: &mut World, instance: &Instance, release: Option<ReleaseId>, generation: Generation) {
    let rollout = world.rollout.plan.id.clone();
    change(world, instance, |report| {
        report.linked = release;
        let ledger = &mut report.ledger;
        if ledger.active != release {
            ledger.previous = ledger.active;
        }
        ledger.active = release;
        ledger.generation = generation;
        ledger.rollout = Some(rollout);
    });
    enter(world, instance, LedgerEvent::Switched, release);
}

fn run(world: &mut World, instance: &Instance, release: ReleaseId) {
    let now = world.now;
    let names =
        world.services.get(&instance.service).map(|service| service.processes.keys().cloned().collect());
    change(world, instance, |report| {
        let names: Vec<_> = names.unwrap_or_else(|| report.processes.keys().cloned().collect());
        let process = ProcessReport {
            state: ProcessState::Running { pid: 1, started_at: now },
            answer: Answer::Release { release, proof: "simulated".to_owned() },
            profile: None,
        };
        report.processes = names.into_iter().map(|name| (name, process.clone())).collect();
    });
}

fn enter(world: &mut World, instance: &Instance, event: LedgerEvent, release: Option<ReleaseId>) {
    let at = world.now;
    change(world, instance, |report| {
        let generation = report.ledger.generation;
        let detail = "simulated".to_owned();
        let rollout = report.ledger.claim.as_ref().map(|claim| claim.rollout.clone());
        report.ledger.history.push(LedgerEntry { at, event, release, generation, rollout, detail });
    });
}

fn change(world: &mut World, instance: &Instance, edit: impl FnOnce(&mut InstanceReport)) {
    if let Some(report) = report_mut(world, instance) {
        edit(report);
    }
}

fn report_mut<'a>(world: &'a mut World, instance: &Instance) -> Option<&'a mut InstanceReport> {
    let now = world.now;
    let (at, report) = world.inventory.get_mut(&instance.host)?.report.as_mut()?;
    *at = now;
    report.instances.get_mut(&instance.service)
}

fn servers_mut<'a>(world: &'a mut World, instance: &'a Instance) -> impl Iterator<Item = &'a mut Server> {
    let balancers = &world.environment.balancers;
    let reports = world.traffic.iter_mut().zip(balancers);
    reports.filter(|(_, balancer)| balancer.service == instance.service).filter_map(
        |(report, _)| match report {
            BalancerReport::Servers(servers) => servers.get_mut(&instance.host),
            BalancerReport::Unreachable { .. } => None,
        },
    )
}

fn stopped(why: &str) -> ProcessReport {
    ProcessReport {
        state: ProcessState::Stopped,
        answer: Answer::None { why: why.to_owned() },
        profile: None,
    }
}
