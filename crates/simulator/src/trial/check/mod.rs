//! Checkers: each judges by what truly is on hosts, at balancers and in the log, and shares no code with planner or
//! interlock.
//!
//! A promise holds for what Greenlight does. What a fault did is excused, and so is what Greenlight could not know yet: a
//! fault excuses for as long as a look and its time-out take ([`KNOWN_AFTER_MS`]).

mod begin;
mod clients;
mod end;
mod hosts;
mod share;
#[cfg(test)]
mod tests;
mod turn;

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::action::{Action, ActionResult, Blame, Verb};
use greenlight_model::id::{Instance, ReleaseId, RolloutId, ServiceName};
use greenlight_model::migration::MigrationPhase;
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::{OperatorRequest, Plan};
use greenlight_model::traffic::Admission;

use super::controller::OBSERVE_TIMEOUT_MS;
use super::look::LOOK_INTERVAL_MS;
use super::scenario::{Ms, Scenario};
use super::site::{Site, release};
use super::trial::Trial;

/// After so long a controller that looks has seen what happened, or that the host does not answer: an answer that was given
/// just before arrives as late as one is waited for, the next look begins an interval later, and that one hangs, or the
/// action that was decided upon it does.
const KNOWN_AFTER_MS: Ms = LOOK_INTERVAL_MS + 2 * OBSERVE_TIMEOUT_MS + SENT_WITHIN_MS;
/// How long it may take from a decision until what was decided is there.
const SENT_WITHIN_MS: Ms = 2_000;

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which checker saw it.
    pub checker: &'static str,
    /// What was wrong.
    pub what: String,
    /// When, in milliseconds.
    pub at: Ms,
}

/// What the checkers remember.
pub(super) struct Checker {
    pub(super) rollouts: BTreeMap<RolloutId, Seen>,
    databases: Vec<Database>,
    pub(super) has_two: bool,
    pub(super) has_clock_jumps: bool,
    pub(super) has_weather: bool,
    pub(super) last_end: Option<Ms>,
}

/// A rollout, by its records and by what was true meanwhile.
pub(super) struct Seen {
    pub(super) plan: Plan,
    turned_back: Option<Ms>,
    left_out: BTreeMap<Instance, Ms>,
    /// Per service, how many ran something before.
    ran_before: BTreeMap<ServiceName, usize>,
    is_held: bool,
    changed: BTreeSet<Instance>,
    touched: BTreeSet<Instance>,
    drained_at: BTreeMap<Instance, Ms>,
    waves_proven: BTreeMap<usize, Ms>,
    /// Instances that were as they should be when the rollout started.
    were_good: BTreeSet<Instance>,
    started: BTreeMap<Action, Ms>,
    failures: BTreeMap<(Instance, Verb), (usize, bool)>,
    /// What each instance truly ran, where it ran anything.
    ran_at_start: BTreeMap<Instance, ReleaseId>,
    /// Of each canary, by its wave.
    steps_passed: BTreeMap<usize, usize>,
    /// When the present step of the canary began: the one before passed, or its hosts were let in.
    step_began: Ms,
    /// Answers of the canary to clients since then, by service.
    canary_answers: BTreeMap<usize, u64>,
    /// Steps for which a person was asked.
    asked: BTreeSet<(usize, usize)>,
}

#[derive(Default)]
struct Database {
    /// The release whose migration runs, and for which rollout.
    running: Option<(ReleaseId, MigrationPhase, RolloutId)>,
    done: BTreeSet<(ReleaseId, MigrationPhase)>,
    /// Releases whose migration ran, and those that ran before anything was rolled out.
    fits: BTreeSet<ReleaseId>,
    /// Broken off in the middle: nobody knows how far it came.
    broken: BTreeSet<(ReleaseId, MigrationPhase)>,
    /// Ended with an error before the first switch, by rollout.
    failed: BTreeSet<(ReleaseId, RolloutId)>,
}

impl Checker {
    pub(super) fn new(scenario: &Scenario) -> Self {
        Self {
            rollouts: BTreeMap::new(),
            databases: (0..scenario.services.len())
                .map(|service| {
                    let before = if scenario.is_first { 0 } else { 2 };
                    let fits = (0..before).map(|number| release(service, number)).collect();
                    Database { fits, ..Database::default() }
                })
                .collect(),
            has_two: false,
            has_clock_jumps: false,
            has_weather: false,
            last_end: None,
        }
    }

    pub(super) fn migration_broken(&mut self, service: usize) {
        let database = &mut self.databases[service];
        database.broken.extend(database.running.take().map(|(release, part, _)| (release, part)));
    }

    /// It ended with an error, and says so: the operator may deploy it again.
    pub(super) fn migration_failed(&mut self, service: usize) {
        let database = &mut self.databases[service];
        // What comes last is run again by whoever resumes.
        let failed = database.running.take().filter(|(_, part, _)| part.is_expand());
        database.failed.extend(failed.map(|(release, _, rollout)| (release, rollout)));
    }

    pub(super) fn migration_done(&mut self, service: usize) {
        let database = &mut self.databases[service];
        if let Some((release, part, _)) = database.running.take() {
            database.done.insert((release, part));
            database.fits.insert(release);
        }
    }

    /// Whether an instance is on its way back in the latest rollout.
    pub(super) fn goes_back_now(&self, site: &Site, host: usize, service: usize) -> bool {
        let latest = self.rollouts.values().next_back();
        let instance = site.instances[host][service].as_ref();
        latest.zip(instance).is_some_and(|(seen, instance)| seen.goes_back(instance))
    }
}

impl Seen {
    pub(super) fn goes_back(&self, instance: &Instance) -> bool {
        self.turned_back.is_some() || self.left_out.contains_key(instance)
    }

    pub(super) fn wanted(&self, instance: &Instance) -> Option<ReleaseId> {
        if self.goes_back(instance) {
            self.plan.baseline.get(instance).copied().flatten()
        } else {
            self.plan.targets.get(&instance.service).copied()
        }
    }
}

impl Trial<'_> {
    /// A record has been written.
    pub(super) fn recorded(&mut self, body: &RecordBody) {
        match body {
            // Every controller here shares the log, so that none adopts anything; nobody settles a migration by hand.
            RecordBody::ReleaseMarked { .. }
            | RecordBody::EvidenceAdded { .. }
            | RecordBody::Journal { .. }
            | RecordBody::RolloutAdopted { .. }
            | RecordBody::MigrationDone { .. }
            | RecordBody::DatabaseRestored { .. } => {}
            RecordBody::RolloutStarted { plan, .. } => self.started(plan),
            RecordBody::ActionStarted { rollout, action, .. } => self.action_started(rollout, action),
            RecordBody::ActionFinished { rollout, action, result, .. } => {
                let now = self.now;
                let Some(seen) = self.check.rollouts.get_mut(rollout) else { return };
                let began = seen.started.remove(action);
                if action.verb() == Verb::Admit && *result == ActionResult::Succeeded {
                    seen.admitted(action.instance(), now);
                }
                let ActionResult::Failed { blame, .. } = result else {
                    if action.verb() == Verb::Activate {
                        seen.failures.remove(&(action.instance().clone(), Verb::Admit));
                    }
                    return;
                };
                let goes_back = seen.goes_back(action.instance());
                let turned = seen.turned_back.or_else(|| seen.left_out.get(action.instance()).copied());
                let is_former = turned.is_some_and(|at| began.is_none_or(|began| began <= at));
                if !is_former {
                    let key = (action.instance().clone(), action.verb());
                    let failed = seen.failures.entry(key).or_default();
                    failed.0 += 1;
                    // What ran before may be tried again: that it does not start is no fault of the release then.
                    failed.1 |= *blame == Blame::Host || *blame == Blame::Release && !goes_back;
                }
            }
            RecordBody::Noted { rollout, note } => self.noted(rollout, note),
            RecordBody::OperatorAsked { rollout, request, .. } => {
                let now = self.now;
                let Some(seen) = self.check.rollouts.get_mut(rollout) else { return };
                match request {
                    OperatorRequest::Hold => seen.is_held = true,
                    OperatorRequest::Resume => {
                        seen.is_held = false;
                        seen.failures.clear();
                    }
                    OperatorRequest::Abort => turn_back(seen, now),
                }
            }
            RecordBody::RolloutEnded { rollout, outcome, .. } => self.ended(rollout, outcome),
        }
    }

    fn started(&mut self, plan: &Plan) {
        let mut were_good = BTreeSet::new();
        for (instance, before) in &plan.baseline {
            let (host, service) = self.site.place(instance);
            let is_good = match before {
                Some(release) => self.is_good(host, service, *release),
                None => self.hosts[host].instances[service].linked.is_none(),
            };
            if is_good && self.hosts[host].is_up {
                were_good.insert(instance.clone());
            }
        }
        let mut ran_before: BTreeMap<ServiceName, usize> = BTreeMap::new();
        for (instance, (host, service)) in &self.site.places {
            let runs_something = match plan.baseline.get(instance) {
                Some(before) => before.is_some(),
                None => self.hosts[*host].instances[*service].linked.is_some(),
            };
            *ran_before.entry(instance.service.clone()).or_default() += usize::from(runs_something);
        }
        let seen = Seen {
            plan: plan.clone(),
            turned_back: None,
            left_out: BTreeMap::new(),
            ran_before,
            is_held: false,
            changed: BTreeSet::new(),
            touched: BTreeSet::new(),
            drained_at: BTreeMap::new(),
            waves_proven: BTreeMap::new(),
            were_good,
            started: BTreeMap::new(),
            failures: BTreeMap::new(),
            ran_at_start: plan
                .baseline
                .keys()
                .filter_map(|instance| {
                    let (host, service) = self.site.place(instance);
                    Some((instance.clone(), self.hosts[host].instances[service].linked?))
                })
                .collect(),
            steps_passed: BTreeMap::new(),
            step_began: self.now,
            canary_answers: BTreeMap::new(),
            asked: BTreeSet::new(),
        };
        self.check.rollouts.insert(plan.id.clone(), seen);
    }

    /// Whether clients get answers from it by this release, proven, at every balancer.
    pub(super) fn is_good(&self, host: usize, service: usize, release: ReleaseId) -> bool {
        let shape = &self.scenario.services[service];
        let is_admitted = self.balancers_of(service).all(|(_, balancer)| {
            // What somebody else took out is theirs to let in.
            balancer.servers[host]
                .is_some_and(|server| server.is_foreign || server.admission == Admission::Ready)
        });
        is_admitted && self.hosts[host].instances[service].proves(release, shape.has_process)
    }

    /// Whether a fault has touched it so lately that nobody can know yet, or keeps it out of reach.
    pub(super) fn is_beyond_us(&self, host: usize, service: usize) -> bool {
        !self.hosts[host].is_up
            || self.is_cut(host, true)
            || self.is_cut(host, false)
            || self.was_hit_within(host, service, KNOWN_AFTER_MS)
    }

    pub(super) fn is_excused(&self, host: usize, service: usize) -> bool {
        self.is_beyond_us(host, service)
    }

    pub(super) fn was_hit_within(&self, host: usize, service: usize, ms: Ms) -> bool {
        self.hosts[host].instances[service].hit_at.is_some_and(|hit| hit + ms >= self.now)
    }
}

pub(super) fn turn_back(seen: &mut Seen, now: Ms) {
    seen.is_held = false;
    if seen.turned_back.is_none() {
        seen.turned_back = Some(now);
        seen.failures.clear();
    }
}
