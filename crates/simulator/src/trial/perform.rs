//! Actions on their way: which calls each makes, one after the other, and what is looked at afterwards.

use greenlight_model::action::{Action, ActionResult, Blame};
use greenlight_model::host::HostReport;
use greenlight_model::id::Instance;
use greenlight_model::migration::MigrationPhase;
use greenlight_model::traffic::{Admission, BalancerReport};

use super::agent::{Answered, From, Purpose, Request};
use super::controller::{LEDGER_TIMEOUT_MS, OBSERVE_TIMEOUT_MS};
use super::scenario::Ms;
use super::site::{START_TIMEOUT_MS, STOP_TIMEOUT_MS, TIMEOUTS};
use super::traffic::{BALANCER_TIMEOUT_MS, Command};
use super::trial::{Event, Trial, is_guarded};

/// An action that a controller has under way.
pub(super) struct Job {
    action: Action,
    /// When it was begun.
    began: Ms,
    /// Which call of it is waited for.
    serial: u32,
    step: Step,
    result: ActionResult,
    /// What was seen of the host before an admission.
    before: Option<(u32, Result<HostReport, String>)>,
    traffic: Vec<(usize, u32, BalancerReport)>,
}

enum Step {
    /// The look before a confirmation, over a fresh connection, or before an admission.
    Fresh,
    /// The request itself.
    Call,
    /// The look afterwards.
    Look,
    /// Setting the balancers of the service, of which this one is next.
    Set(usize),
    /// Reading them.
    Read(usize),
}

impl Trial<'_> {
    /// Begins to perform an action.
    pub(super) fn perform(&mut self, index: usize, action: Action) {
        let controller = &mut self.controllers[index];
        controller.serial += 1;
        let id = controller.serial;
        let step = match &action {
            Action::Confirm { .. } | Action::Admit { .. } => Step::Fresh,
            Action::Drain { .. } | Action::Share { .. } => Step::Set(0),
            _ => Step::Call,
        };
        let result = ActionResult::Succeeded;
        let job =
            Job { action, began: self.now, serial: id, step, result, before: None, traffic: Vec::new() };
        self.go_on(index, id, job);
    }

    /// Makes the next call of a job.
    fn go_on(&mut self, index: usize, id: u32, mut job: Job) {
        let controller = &mut self.controllers[index];
        controller.serial += 1;
        job.serial = controller.serial;
        let purpose = Purpose::Job { job: id, serial: job.serial };
        let (host, service) = self.site.place(job.action.instance());
        match job.step {
            Step::Fresh | Step::Look => {
                self.send(index, purpose, job.began, host, service, Request::Observe, OBSERVE_TIMEOUT_MS);
            }
            Step::Call => {
                let (request, timeout) = self.request_of(index, &job.action);
                self.send(index, purpose, job.began, host, service, request, timeout);
            }
            Step::Set(from) | Step::Read(from) => {
                let next = self.balancers_of(service).map(|(balancer, _)| balancer).find(|one| *one >= from);
                let Some(balancer) = next else {
                    if matches!(job.step, Step::Set(_)) {
                        job.step = Step::Read(0);
                        return self.go_on(index, id, job);
                    }
                    let Job { action, result, before, traffic, .. } = job;
                    return self.finished(index, action, result, before, traffic);
                };
                let command = match (&job.step, &job.action) {
                    (Step::Read(_), _) => Command::Read,
                    (_, Action::Share { canaries, share, .. }) => {
                        let hosts = canaries.iter().map(|host| self.site.host_places[host]).collect();
                        Command::Share { hosts, share: *share }
                    }
                    (_, Action::Drain { .. }) => Command::Set { host, admission: Admission::Drain },
                    _ => Command::Set { host, admission: Admission::Ready },
                };
                self.command(index, purpose, job.began, balancer, command);
                let event = Event::BalancerTimedOut { controller: index, balancer, purpose };
                self.after(BALANCER_TIMEOUT_MS, event);
            }
        }
        self.controllers[index].jobs.insert(id, job);
    }

    fn request_of(&self, index: usize, action: &Action) -> (Request, Ms) {
        let controller = &self.controllers[index];
        let rollout = controller.rollout.clone();
        let ms = |duration: std::time::Duration| Ms::try_from(duration.as_millis()).unwrap_or(Ms::MAX);
        let activate = ms(TIMEOUTS.activate) + START_TIMEOUT_MS + STOP_TIMEOUT_MS;
        let folded = controller.history.rollouts.get(&rollout);
        match action {
            Action::Preflight { .. } => (Request::Preflight, ms(TIMEOUTS.activate)),
            Action::Claim { instance } => {
                let generation = folded.map(|folded| folded.desired(instance).1).unwrap_or_default();
                let (host, service) = self.site.place(instance);
                let ended = self.ended_claim(index, host, service);
                (Request::Claim { rollout, generation, ended }, LEDGER_TIMEOUT_MS)
            }
            Action::Unclaim { .. } => (Request::Unclaim { rollout }, LEDGER_TIMEOUT_MS),
            Action::Stage { release, .. } => {
                (Request::Stage { release: *release, rollout }, ms(TIMEOUTS.stage))
            }
            Action::Smoke { release, .. } => (Request::Smoke { release: *release }, activate),
            Action::Migrate { release, .. } => {
                let part = MigrationPhase::Expand;
                (Request::Migrate { release: *release, part, rollout }, 4_000 + LEDGER_TIMEOUT_MS)
            }
            Action::Contract { release, .. } => {
                let part = MigrationPhase::Contract;
                (Request::Migrate { release: *release, part, rollout }, 4_000 + LEDGER_TIMEOUT_MS)
            }
            Action::Activate { release, generation, .. } => {
                let is_forward = folded.is_some_and(|folded| {
                    folded.plan.generation == *generation && is_guarded(self.scenario, folded.plan.direction)
                });
                let (release, generation) = (Some(*release), *generation);
                (Request::Activate { release, generation, rollout, is_guarded: is_forward }, activate)
            }
            Action::Deactivate { generation, .. } => {
                let generation = *generation;
                (Request::Activate { release: None, generation, rollout, is_guarded: false }, activate)
            }
            Action::Confirm { release, generation, .. } => {
                let (release, generation) = (*release, *generation);
                (Request::Confirm { release, generation, rollout }, LEDGER_TIMEOUT_MS)
            }
            Action::Prune { keep, .. } => {
                (Request::Prune { keep: keep.clone(), rollout }, ms(TIMEOUTS.stage))
            }
            // These go to balancers.
            Action::Drain { .. } | Action::Admit { .. } | Action::Share { .. } => {
                (Request::Observe, OBSERVE_TIMEOUT_MS)
            }
        }
    }

    /// A host's answer has arrived.
    pub(super) fn answered(&mut self, from: From, host: usize, result: Answered) {
        if !self.controllers[from.controller].is_alive {
            return;
        }
        match from.purpose {
            Purpose::Nothing => {}
            Purpose::Renew { service } => self.renewed(from.controller, host, service),
            Purpose::Look { serial } => {
                self.looked(from.controller, host, serial, seen(result));
            }
            Purpose::Job { job, serial } => self.job_answered(from.controller, job, serial, result),
        }
    }

    /// A host has not answered in time.
    pub(super) fn timed_out(&mut self, index: usize, host: usize, purpose: Purpose) {
        if !self.controllers[index].is_alive {
            return;
        }
        let why = || "it did not answer in time".to_owned();
        match purpose {
            Purpose::Nothing => {}
            Purpose::Renew { service } => self.renewed(index, host, service),
            Purpose::Look { serial } => self.looked(index, host, serial, Err(why())),
            Purpose::Job { job, serial } => {
                let refusal = super::agent::Refusal { why: why(), blame: Blame::Passing };
                self.job_answered(index, job, serial, Err(refusal));
            }
        }
    }

    fn job_answered(&mut self, index: usize, id: u32, serial: u32, result: Answered) {
        let Some(mut job) = self.controllers[index].jobs.remove(&id) else { return };
        if job.serial != serial {
            self.controllers[index].jobs.insert(id, job);
            return;
        }
        if self.boundary(index).is_err() {
            return;
        }
        match job.step {
            Step::Look => {
                let Job { action, result: outcome, traffic, .. } = job;
                return self.finished(index, action, outcome, Some((serial, seen(result))), traffic);
            }
            Step::Fresh if matches!(job.action, Action::Admit { .. }) => {
                let seen = seen(result);
                job.step = Step::Set(0);
                if let Some(why) = self.why_not_admitted(index, job.action.instance(), &seen) {
                    job.result = ActionResult::Failed { why, blame: Blame::Passing };
                    job.step = Step::Read(0);
                }
                job.before = Some((serial, seen));
            }
            Step::Fresh => {
                let place = self.site.place(job.action.instance()).1;
                let name = &self.site.names[place];
                let release = job.action.release();
                job.step = Step::Call;
                let failed = match &result {
                    Err(refusal) => Some((refusal.why.clone(), Blame::Passing)),
                    Ok(report) => report
                        .as_ref()
                        .and_then(|report| report.instances.get(name)?.why_not_proven(release?))
                        .map(|why| (why, Blame::Release)),
                };
                if let Some((why, blame)) = failed {
                    job.result = ActionResult::Failed { why, blame };
                    job.step = Step::Look;
                }
            }
            Step::Call => {
                if let Err(refusal) = result {
                    job.result = ActionResult::Failed { why: refusal.why, blame: refusal.blame };
                }
                job.step = Step::Look;
            }
            Step::Set(_) | Step::Read(_) => {}
        }
        self.go_on(index, id, job);
    }

    /// Why an instance that has just been looked at is not let in; one that was not switched is also when its host is silent.
    fn why_not_admitted(
        &self,
        index: usize,
        instance: &Instance,
        seen: &Result<HostReport, String>,
    ) -> Option<String> {
        let controller = &self.controllers[index];
        let rollout = controller.history.rollouts.get(&controller.rollout)?;
        match seen {
            Err(why) => rollout.touched.contains(instance).then(|| why.clone()),
            Ok(report) => {
                report.instances.get(&instance.service)?.why_not_proven(rollout.desired(instance).0?)
            }
        }
    }

    /// A balancer has answered, or has not in time.
    pub(super) fn balancer_answered(
        &mut self,
        index: usize,
        balancer: usize,
        purpose: Purpose,
        result: Result<BalancerReport, String>,
    ) {
        if !self.controllers[index].is_alive {
            return;
        }
        match purpose {
            Purpose::Look { serial } => self.read(index, balancer, serial, result),
            Purpose::Job { job: id, serial } => {
                let Some(mut job) = self.controllers[index].jobs.remove(&id) else { return };
                if job.serial != serial {
                    self.controllers[index].jobs.insert(id, job);
                    return;
                }
                if self.boundary(index).is_err() {
                    return;
                }
                job.step = match (&job.step, result) {
                    (Step::Read(_), result) => {
                        let report = result.unwrap_or_else(|why| BalancerReport::Unreachable { why });
                        job.traffic.push((balancer, serial, report));
                        Step::Read(balancer + 1)
                    }
                    (_, Ok(_)) => Step::Set(balancer + 1),
                    (_, Err(why)) => {
                        job.result = ActionResult::Failed { why, blame: Blame::Passing };
                        Step::Read(0)
                    }
                };
                self.go_on(index, id, job);
            }
            Purpose::Renew { .. } | Purpose::Nothing => {}
        }
    }
}

fn seen(result: Answered) -> Result<HostReport, String> {
    match result {
        Ok(Some(report)) => Ok(*report),
        Ok(None) => Err("an answer to something else".to_owned()),
        Err(refusal) => Err(refusal.why),
    }
}
