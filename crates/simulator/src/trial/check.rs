//! Checkers: each judges by what truly is on hosts, at balancers and in the log, and shares no code with planner or
//! interlock.
//!
//! A promise holds for what Greenlight does. What a fault did is excused, and so is what Greenlight could not know yet: a
//! fault excuses for as long as a look and its time-out take ([`KNOWN_AFTER_MS`]).

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::action::{Action, ActionResult, Blame, Verb};
use greenlight_model::decision::Outcome;
use greenlight_model::host::LedgerEvent;
use greenlight_model::id::{Instance, ReleaseId, RolloutId, ServiceName};
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::{Direction, Note, OperatorRequest, Plan};
use greenlight_model::traffic::Admission;

use super::agent::is_claim_current;
use super::scenario::{FaultKind, Ms, Scenario};
use super::site::{Site, TIMEOUTS, of_release};
use super::trial::Trial;

/// After so long a controller that looks must have seen what happened: the interval of looks, and the time-out of one
/// that hangs, twice.
const KNOWN_AFTER_MS: Ms = 10_000;

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
}

#[derive(Default)]
struct Database {
    /// The release whose migration runs, and for which rollout.
    running: Option<(ReleaseId, RolloutId)>,
    done: BTreeSet<ReleaseId>,
    /// Begun and not ended, by rollout.
    broken: BTreeSet<(ReleaseId, RolloutId)>,
}

impl Checker {
    pub(super) fn new(scenario: &Scenario) -> Self {
        Self {
            rollouts: BTreeMap::new(),
            databases: scenario.services.iter().map(|_| Database::default()).collect(),
            has_two: false,
            has_clock_jumps: false,
            has_weather: false,
            last_end: None,
        }
    }

    pub(super) fn migration_broken(&mut self, service: usize) {
        let database = &mut self.databases[service];
        database.broken.extend(database.running.take());
    }

    /// It ended with an error, and says so: the operator may deploy it again.
    pub(super) fn migration_failed(&mut self, service: usize) {
        let database = &mut self.databases[service];
        database.broken.extend(database.running.take());
    }

    pub(super) fn migration_done(&mut self, service: usize) {
        let database = &mut self.databases[service];
        database.done.extend(database.running.take().map(|(release, _)| release));
    }

    /// Whether an instance is on its way back in the latest rollout.
    pub(super) fn goes_back_now(&self, site: &Site, host: usize, service: usize) -> bool {
        let latest = self.rollouts.values().next_back();
        let instance = site.instances[host][service].as_ref();
        latest.zip(instance).is_some_and(|(seen, instance)| seen.goes_back(instance))
    }
}

impl Seen {
    fn goes_back(&self, instance: &Instance) -> bool {
        self.turned_back.is_some() || self.left_out.contains_key(instance)
    }

    fn wanted(&self, instance: &Instance) -> Option<ReleaseId> {
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
            | RecordBody::RolloutAdopted { .. }
            | RecordBody::MigrationDone { .. } => {}
            RecordBody::RolloutStarted { plan, .. } => self.started(plan),
            RecordBody::ActionStarted { rollout, action, .. } => self.action_started(rollout, action),
            RecordBody::ActionFinished { rollout, action, result, .. } => {
                let Some(seen) = self.check.rollouts.get_mut(rollout) else { return };
                let began = seen.started.remove(action);
                let ActionResult::Failed { blame, .. } = result else { return };
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
        };
        self.check.rollouts.insert(plan.id.clone(), seen);
    }

    fn action_started(&mut self, rollout: &RolloutId, action: &Action) {
        let complaint = self.judge_start(rollout, action);
        if let Some((checker, what)) = complaint {
            self.violation(checker, |_| what);
        }
        let now = self.now;
        let Some(seen) = self.check.rollouts.get_mut(rollout) else { return };
        let instance = action.instance().clone();
        seen.started.insert(action.clone(), now);
        match action.verb() {
            Verb::Drain => {
                seen.drained_at.insert(instance.clone(), now);
                seen.changed.insert(instance);
            }
            Verb::Activate | Verb::Deactivate => {
                seen.touched.insert(instance.clone());
                seen.changed.insert(instance);
            }
            Verb::Migrate => {
                seen.changed.insert(instance);
            }
            _ => {}
        }
    }

    fn judge_start(&self, rollout: &RolloutId, action: &Action) -> Option<(&'static str, String)> {
        let seen = self.check.rollouts.get(rollout)?;
        let instance = action.instance();
        let (host, service) = self.site.place(instance);
        let verb = action.verb();
        if !seen.plan.baseline.contains_key(instance) {
            return Some(("ownership", format!("{instance} is not part of the rollout")));
        }
        // A confirmation keeps the host from going back by itself, so it may come also then.
        if seen.is_held && seen.turned_back.is_none() && verb != Verb::Confirm {
            return Some(("hold", format!("{verb} of {instance} was begun while the rollout is held")));
        }
        if let Some((count, is_final)) = seen.failures.get(&(instance.clone(), verb))
            && (*is_final || *count > usize::try_from(self.scenario.retries).unwrap_or(usize::MAX))
        {
            return Some(("retries", format!("{verb} of {instance} is tried again after {count} failures")));
        }
        let is_forward = match action {
            Action::Activate { generation, .. } => *generation == seen.plan.generation,
            Action::Migrate { .. } => true,
            Action::Drain { .. } => !seen.goes_back(instance),
            _ => false,
        };
        if is_forward && seen.goes_back(instance) {
            return Some(("turned back", format!("{verb} of {instance} was begun after it turned back")));
        }
        if is_forward && seen.changed.is_empty() && self.is_gate_amber() {
            return Some(("gates", format!("{verb} of {instance} was begun while a gate is amber")));
        }
        if let Action::Activate { release, .. } = action {
            if is_forward && self.history.bad.contains_key(release) {
                return Some(("bad release", format!("a bad release is activated on {instance}")));
            }
            if Some(*release) != seen.wanted(instance) {
                return Some(("order", format!("{instance} is to run something else")));
            }
        }
        if is_forward && matches!(verb, Verb::Drain | Verb::Activate) {
            let complaint = self.judge_order(seen, instance);
            if complaint.is_some() {
                return complaint;
            }
        }
        if let Action::Prune { keep, .. } = action {
            let truth = &self.hosts[host].instances[service];
            let ledger = &truth.ledger;
            let needed = [ledger.active, ledger.previous, ledger.last_good, truth.linked];
            if !self.is_excused(host, service)
                && let Some(lost) = needed.into_iter().flatten().find(|release| !keep.contains(release))
            {
                let number = of_release(lost).1;
                return Some(("prune", format!("v{number} of {instance} would be removed")));
            }
        }
        None
    }

    /// Earlier waves are what they were to become, and a kept half and standbys have waited for their time.
    fn judge_order(&self, seen: &Seen, instance: &Instance) -> Option<(&'static str, String)> {
        let waves = &seen.plan.waves;
        let own = waves.iter().position(|wave| wave.instances.contains(instance))?;
        let target = *seen.plan.targets.get(&instance.service)?;
        let not_yet = |other: &Instance| {
            let (host, service) = self.site.place(other);
            let wanted = seen.plan.targets.get(&other.service).copied().unwrap_or(target);
            !seen.goes_back(other)
                && !self.is_good(host, service, wanted)
                && !self.is_beyond_us(host, service)
        };
        for wave in &waves[..own] {
            if let Some(other) = wave.instances.iter().find(|other| not_yet(other)) {
                return Some((
                    "order",
                    format!("{instance} is changed while {other} of an earlier wave is not proven"),
                ));
            }
        }
        let (host, _) = self.site.place(instance);
        if self.scenario.standby.contains(&host) {
            let mut others = seen
                .plan
                .baseline
                .keys()
                .filter(|other| !self.scenario.standby.contains(&self.site.place(other).0));
            if let Some(other) = others.find(|other| not_yet(other)) {
                return Some(("standby", format!("standby {instance} is changed before {other} is proven")));
            }
        }
        let after = Ms::try_from(waves[own].after.as_millis()).unwrap_or(Ms::MAX);
        if own > 0 && after > 0 && !self.check.has_clock_jumps {
            let proven_at = seen.waves_proven.get(&(own - 1)).copied();
            if proven_at.is_none_or(|proven_at| self.now < proven_at + after) {
                return Some(("fallback", format!("{instance} is changed while it is kept as the way back")));
            }
        }
        None
    }

    fn noted(&mut self, rollout: &RolloutId, note: &Note) {
        let now = self.now;
        match note {
            Note::WaveProven { wave } => {
                let complaint = self.check.rollouts.get(rollout).and_then(|seen| {
                    let not_good = |instance: &&Instance| {
                        let (host, service) = self.site.place(instance);
                        let Some(target) = seen.plan.targets.get(&instance.service) else { return false };
                        !seen.left_out.contains_key(*instance)
                            && !self.is_good(host, service, *target)
                            && !self.is_beyond_us(host, service)
                    };
                    seen.plan.waves[*wave].instances.iter().find(not_good).cloned()
                });
                if let Some(instance) = complaint {
                    self.violation("wave", |_| {
                        format!("wave {} is called proven, and {instance} is not", wave + 1)
                    });
                }
                if let Some(seen) = self.check.rollouts.get_mut(rollout) {
                    seen.waves_proven.insert(*wave, now);
                }
            }
            Note::LeaveOut { instance, .. } => {
                let budget = usize::try_from(self.scenario.failure_budget).unwrap_or(usize::MAX);
                let Some(seen) = self.check.rollouts.get_mut(rollout) else { return };
                seen.left_out.insert(instance.clone(), now);
                seen.failures.retain(|(failed, _), _| failed != instance);
                let hosts: BTreeSet<_> = seen.left_out.keys().map(|instance| &instance.host).collect();
                let count = hosts.len();
                let of_service = |one: &&Instance| one.service == instance.service;
                let is_last =
                    seen.plan.baseline.keys().filter(of_service).all(|one| seen.left_out.contains_key(one));
                if count > budget {
                    self.violation("budget", |_| format!("{count} hosts are left out, and {budget} may be"));
                } else if is_last {
                    self.violation("budget", |_| {
                        format!("the last instance of a service, {instance}, is left out")
                    });
                }
                self.check_excuse(&format!("{instance} is left out"));
            }
            Note::TurnBack { .. } => {
                if let Some(seen) = self.check.rollouts.get_mut(rollout) {
                    turn_back(seen, now);
                }
                self.check_excuse("it turns back");
            }
            Note::Hold { why } => {
                let begun = LedgerEvent::MigrationBegun;
                let is_known_to_a_host = || {
                    self.hosts
                        .iter()
                        .flat_map(|host| &host.instances)
                        .any(|truth| truth.ledger.history.iter().any(|entry| entry.event == begun))
                };
                let Some(seen) = self.check.rollouts.get(rollout) else { return };
                let is_begun = seen.started.keys().any(|action| action.verb() == Verb::Migrate);
                if why.contains("migration of")
                    && why.contains("is not known")
                    && !is_begun
                    && !is_known_to_a_host()
                {
                    self.violation("reasons", |_| format!("it holds, and this is not true: {why}"));
                }
                if let Some(seen) = self.check.rollouts.get_mut(rollout) {
                    seen.is_held = true;
                }
                self.check_excuse("it holds");
            }
        }
    }

    /// Without any fault nothing fails.
    fn check_excuse(&mut self, what: &str) {
        if self.scenario.faults.is_empty() {
            self.violation("no fault", |_| format!("{what}, and nothing went wrong"));
        }
    }

    fn ended(&mut self, rollout: &RolloutId, outcome: &Outcome) {
        self.check.last_end = Some(self.now);
        let name = match outcome {
            Outcome::Done { left_out } if left_out.is_empty() => "done",
            Outcome::Done { .. } => "done, some left out",
            Outcome::Refused { .. } => "refused",
            Outcome::TurnedBack { .. } => "turned back",
            Outcome::Stuck { .. } => "stuck",
        };
        *self.report.outcomes.entry(name).or_default() += 1;
        let complaint = self.judge_end(rollout, outcome);
        if let Some(what) = complaint {
            self.violation("outcome", |_| what);
        }
    }

    fn judge_end(&self, rollout: &RolloutId, outcome: &Outcome) -> Option<String> {
        let seen = self.check.rollouts.get(rollout)?;
        for (instance, before) in &seen.plan.baseline {
            let (host, service) = self.site.place(instance);
            let truth = &self.hosts[host].instances[service];
            if self.is_beyond_us(host, service) {
                continue;
            }
            let is_drained = self.balancers_of(service).any(|(_, balancer)| {
                balancer.servers[host]
                    .is_some_and(|server| server.admission == Admission::Drain && !server.is_foreign)
            });
            let is_changed = seen.touched.contains(instance) || is_drained;
            let is_back = || match before {
                _ if !seen.were_good.contains(instance) => true,
                Some(release) if is_changed => self.is_good(host, service, *release),
                None if seen.touched.contains(instance) => truth.linked.is_none() && truth.process.is_none(),
                _ => true,
            };
            match outcome {
                Outcome::Done { left_out } if left_out.contains_key(instance) => {
                    let could_not =
                        left_out.get(instance).is_some_and(|why| why.contains("could not go back"));
                    if !could_not && !is_back() {
                        return Some(format!("{instance} was left out, and is not as it was before"));
                    }
                }
                Outcome::Done { .. } => {
                    let target = seen.plan.targets.get(&instance.service).copied()?;
                    if !self.is_good(host, service, target) {
                        return Some(format!("done, and {instance} does not serve its target"));
                    }
                    let ledger = &truth.ledger;
                    if ledger.last_good != Some(target) || ledger.confirmed != Some(ledger.generation) {
                        return Some(format!("done, and {instance} was not confirmed"));
                    }
                }
                Outcome::Refused { .. } => {
                    if seen.changed.contains(instance) {
                        return Some(format!("refused, and {instance} was changed"));
                    }
                }
                Outcome::Stuck { instances, .. } if instances.contains_key(instance) => {
                    if self.scenario.faults.is_empty() {
                        return Some(format!("{instance} is stuck, and nothing went wrong"));
                    }
                }
                Outcome::Stuck { instances, .. } if instances.is_empty() => {
                    return Some("stuck, and nothing is named".to_owned());
                }
                Outcome::TurnedBack { .. } | Outcome::Stuck { .. } => {
                    if !is_back() {
                        return Some(format!("turned back, and {instance} is not as it was before"));
                    }
                }
            }
        }
        None
    }

    /// The end of the whole simulation.
    pub(super) fn check_end(&mut self) {
        if self.scenario.faults.is_empty() {
            let ends: Vec<&str> = self.report.outcomes.keys().copied().collect();
            if !matches!(ends.as_slice(), [] | ["done"] | ["refused"]) {
                self.violation("no fault", |_| format!("nothing went wrong, and it ended {ends:?}"));
            }
        }
        for host in 0..self.hosts.len() {
            for service in 0..self.scenario.services.len() {
                let truth = &self.hosts[host].instances[service];
                let Some(claim) = &truth.ledger.claim else { continue };
                let is_ended =
                    self.history.rollouts.get(&claim.rollout).is_none_or(|one| one.outcome.is_some());
                let is_current = is_claim_current(claim, self.host_ms(host));
                let is_ours_to_mend = !self.check.has_weather
                    && !self.check.has_two
                    && !self.was_hit_within(host, service, 30_000)
                    && !self.hits_commands(host);
                if is_ended && is_current && is_ours_to_mend {
                    let rollout = claim.rollout.clone();
                    self.violation("claims", |trial| {
                        format!("{rollout} has ended and still claims {}", trial.place(host, service))
                    });
                    return;
                }
            }
        }
    }

    fn hits_commands(&self, host: usize) -> bool {
        self.scenario.faults.iter().any(|fault| {
            matches!(fault.kind, FaultKind::CommandFails { host: at, .. } | FaultKind::CommandHangs { host: at, .. } if at == host)
        })
    }

    /// The time is up: what is waited for must be true.
    pub(super) fn check_waits(&mut self) {
        if self.scenario.faults.is_empty() {
            self.violation("no fault", |trial| format!("it does not end: {}", trial.why_not_ended()));
        }
    }

    pub(super) fn why_not_ended(&self) -> String {
        let waits =
            self.controllers.iter().rev().find(|one| one.is_alive).map(|one| format!("{:?}", one.waits()));
        waits.unwrap_or_else(|| "nobody drives it".to_owned())
    }

    /// A process is about to be stopped by us.
    pub(super) fn check_stop(&mut self, host: usize, service: usize) {
        let instance = self.site.instances[host][service].clone();
        let mut complaint = None;
        for (index, balancer) in self.balancers_of(service) {
            let Some(server) = balancer.servers[host] else { continue };
            if server.admission == Admission::Ready && !server.is_foreign {
                complaint = Some(format!("it is stopped while balancer {index} sends it requests"));
            }
        }
        let sessions = self.sessions(host, service);
        if complaint.is_none() && sessions > 0 && !self.check.has_clock_jumps {
            let drain = Ms::try_from(TIMEOUTS.drain.as_millis()).unwrap_or(Ms::MAX);
            let drained_at = instance.as_ref().and_then(|instance| {
                self.check.rollouts.values().rev().find_map(|seen| seen.drained_at.get(instance).copied())
            });
            let is_time_up = drained_at.is_some_and(|at| at + drain <= self.now);
            if !is_time_up && !self.was_hit_within(host, service, KNOWN_AFTER_MS) {
                complaint = Some(format!("{sessions} sessions are cut before their time is up"));
            }
        }
        if let Some(what) = complaint {
            self.violation("drain", |trial| format!("{}: {what}", trial.place(host, service)));
        }
    }

    /// A server is about to be admitted by us.
    pub(super) fn check_admission(&mut self, host: usize, service: usize, began: Ms) {
        let truth = &self.hosts[host].instances[service];
        let is_proven = truth.is_proven && truth.answers();
        // One that was not switched is let in by what it last said, and its balancer checks it: whether a client was answered
        // by something unproven is judged apart.
        let is_switched = self.site.instances[host][service]
            .as_ref()
            .is_some_and(|instance| self.check.rollouts.values().any(|seen| seen.touched.contains(instance)));
        let is_reached = self.hosts[host].is_up && !self.is_cut(host, true) && !self.is_cut(host, false);
        if !is_proven
            && is_switched
            && is_reached
            && truth.hit_at.is_none_or(|hit| hit + KNOWN_AFTER_MS < began)
        {
            self.violation("admission", |trial| {
                format!("{} is admitted and proves nothing", trial.place(host, service))
            });
            return;
        }
        let linked = truth.linked;
        let is_bad = linked.is_some_and(|linked| self.history.bad.contains_key(&linked));
        let is_wanted = self.site.instances[host][service].as_ref().is_some_and(|instance| {
            self.check
                .rollouts
                .values()
                .any(|seen| seen.plan.baseline.get(instance).copied().flatten() == linked)
        });
        if is_bad && !is_wanted && !self.is_recent_mark() {
            self.violation("bad release", |trial| {
                format!("{} is admitted with a bad release", trial.place(host, service))
            });
        }
    }

    fn is_recent_mark(&self) -> bool {
        // A mark that was written while the admission was on its way could not be known.
        self.log.iter().rev().any(|record| {
            matches!(
                &record.body,
                RecordBody::ReleaseMarked { .. } | RecordBody::Noted { note: Note::TurnBack { .. }, .. }
            ) && record.at
                >= super::site::stamp(self.now.saturating_sub(KNOWN_AFTER_MS), self.controller_clock_ms)
        })
    }

    /// A client has been answered.
    pub(super) fn check_answer(&mut self, balancer: usize, host: usize, service: usize, release: ReleaseId) {
        let truth = &self.hosts[host].instances[service];
        let is_foreign = self.balancers[balancer].servers[host].is_some_and(|server| server.is_foreign);
        let is_proven = truth.is_proven && truth.linked == Some(release);
        if !is_proven && !is_foreign {
            let number = of_release(release).1;
            self.violation("answers", |trial| {
                format!(
                    "clients of {} are answered by v{number}, which is not proven there",
                    trial.place(host, service)
                )
            });
        }
    }

    /// An instance that served has just been taken out by us.
    pub(super) fn check_floor(&mut self, host: usize, service: usize, began: Ms, goes_back: bool) {
        let members = &self.scenario.services[service].hosts;
        let all = members.len();
        let mut floor = if all <= 1 { 0 } else { self.scenario.floor.of(all) };
        if goes_back {
            let latest = self.check.rollouts.values().next_back();
            let ran_before = latest.and_then(|seen| seen.ran_before.get(&self.site.names[service]));
            floor = floor.min(ran_before.copied().unwrap_or(0));
        }
        let since = began.saturating_sub(KNOWN_AFTER_MS);
        if self.hosts[host].instances[service].hit_at.is_some_and(|hit| hit >= since) {
            // That it serves again could not be known.
            return;
        }
        let counts = |other: &&usize| {
            let truth = &self.hosts[**other].instances[service];
            **other != host && (self.serves(**other, service) || truth.hit_at.is_some_and(|hit| hit >= since))
        };
        let serving = members.iter().filter(counts).count();
        if serving < floor {
            self.violation("floor", |trial| {
                let place = trial.place(host, service);
                format!("without {place}, {serving} serve, and the floor is {floor}")
            });
        }
    }

    /// A release is about to be removed.
    pub(super) fn check_prune(&mut self, host: usize, service: usize, release: ReleaseId) {
        let Some(instance) = self.site.instances[host][service].clone() else { return };
        let open = self.history.open_rollout(&self.site.environment.name);
        let is_needed = open.is_some_and(|open| {
            open.plan.targets.get(&instance.service) == Some(&release)
                || open.plan.baseline.get(&instance).copied().flatten() == Some(release)
        });
        if is_needed {
            let number = of_release(release).1;
            self.violation("prune", |_| {
                format!("v{number} is removed from {instance}, which its rollout needs")
            });
        }
    }

    /// A migration begins at the database.
    pub(super) fn migration_begins(&mut self, service: usize, release: ReleaseId, rollout: &RolloutId) {
        let database = &mut self.check.databases[service];
        let complaint = if database.running.is_some() {
            Some("beside another one")
        } else if database.done.contains(&release) {
            Some("a second time")
        } else if database.broken.contains(&(release, rollout.clone())) {
            Some("again after an unknown end")
        } else {
            None
        };
        database.running = Some((release, rollout.clone()));
        if let Some(what) = complaint {
            self.violation("migration", |trial| {
                format!("the migration of {} runs {what}", trial.site.names[service])
            });
        }
        let is_back =
            self.check.rollouts.get(rollout).is_some_and(|seen| seen.plan.direction == Direction::Back);
        if is_back {
            self.violation("migration", |_| "a migration runs on the way back".to_owned());
        }
    }

    /// Two changes of one instance at once.
    pub(super) fn check_alone(&mut self, task: &super::agent::Task) {
        let (host, service) = (task.host, task.service);
        let is_shared = self
            .tasks
            .values()
            .any(|other| (other.host, other.service) == (host, service) && other.is_changing());
        if is_shared {
            self.violation("lock", |trial| format!("two changes at once of {}", trial.place(host, service)));
        }
    }

    /// Whether clients get answers from it by this release, proven, at every balancer.
    fn is_good(&self, host: usize, service: usize, release: ReleaseId) -> bool {
        let shape = &self.scenario.services[service];
        let is_admitted = self.balancers_of(service).all(|(_, balancer)| {
            // What somebody else took out is theirs to let in.
            balancer.servers[host]
                .is_some_and(|server| server.is_foreign || server.admission == Admission::Ready)
        });
        is_admitted && self.hosts[host].instances[service].proves(release, shape.has_process)
    }

    /// Whether a fault has touched it so lately that nobody can know yet, or keeps it out of reach.
    fn is_beyond_us(&self, host: usize, service: usize) -> bool {
        !self.hosts[host].is_up
            || self.is_cut(host, true)
            || self.is_cut(host, false)
            || self.was_hit_within(host, service, KNOWN_AFTER_MS)
    }

    fn is_excused(&self, host: usize, service: usize) -> bool {
        self.is_beyond_us(host, service)
    }

    fn was_hit_within(&self, host: usize, service: usize, ms: Ms) -> bool {
        self.hosts[host].instances[service].hit_at.is_some_and(|hit| hit + ms >= self.now)
    }
}

fn turn_back(seen: &mut Seen, now: Ms) {
    seen.is_held = false;
    if seen.turned_back.is_none() {
        seen.turned_back = Some(now);
        seen.failures.clear();
    }
}
