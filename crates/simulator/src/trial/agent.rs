//! What a host does when it is asked: the agent's own rules, step by step, so that it can die between any two of them.
//!
//! This follows the agent: claims with expiry by the host's clock, generations that fence, one change of an instance at a
//! time, idempotence, the guard. A difference between the two is a defect of one of them.

use std::collections::BTreeSet;

use greenlight_model::action::{Blame, Verb};
use greenlight_model::host::{Claim, Guard, HostReport, Ledger, LedgerEntry, LedgerEvent, MigrationTrace};
use greenlight_model::id::{ContentHash, Generation, ReleaseId, RolloutId};

use super::host::ProcessTruth;
use super::scenario::{Badness, FaultKind, Ms};
use super::site::{CLAIM_MS, CONFIRM_TIMEOUT_MS, START_TIMEOUT_MS, STOP_TIMEOUT_MS, of_release, stamp};
use super::trial::{Event, Trial};

/// How long a change waits for another one of the same instance to end.
const CHANGE_WAIT_MS: Ms = 2_000;
const CHANGE_INTERVAL_MS: Ms = 100;
const PROBE_INTERVAL_MS: Ms = 150;
/// A claim that ends later than this was written before the clock was set back.
const CLAIM_MAX_MS: i64 = 600_000;
/// Time between two steps of one request.
const STEP_MS: Ms = 5;

/// What an agent is asked.
#[derive(Debug, Clone)]
pub(super) enum Request {
    Observe,
    Preflight,
    /// `ended` is the ended rollout whose claim is given up first.
    Claim {
        rollout: RolloutId,
        generation: Generation,
        ended: Option<RolloutId>,
    },
    Unclaim {
        rollout: RolloutId,
    },
    Stage {
        release: ReleaseId,
        rollout: RolloutId,
    },
    Smoke {
        release: ReleaseId,
    },
    Migrate {
        release: ReleaseId,
        rollout: RolloutId,
    },
    Activate {
        release: Option<ReleaseId>,
        generation: Generation,
        rollout: RolloutId,
        is_guarded: bool,
    },
    Confirm {
        release: ReleaseId,
        generation: Generation,
        rollout: RolloutId,
    },
    Prune {
        keep: BTreeSet<ReleaseId>,
        rollout: RolloutId,
    },
    /// The host's own: nobody asks for it.
    GoBack {
        serial: u32,
    },
}

impl Request {
    pub(super) fn verb(&self) -> Option<Verb> {
        Some(match self {
            Self::Observe | Self::GoBack { .. } => return None,
            Self::Preflight => Verb::Preflight,
            Self::Claim { .. } => Verb::Claim,
            Self::Unclaim { .. } => Verb::Unclaim,
            Self::Stage { .. } => Verb::Stage,
            Self::Smoke { .. } => Verb::Smoke,
            Self::Migrate { .. } => Verb::Migrate,
            Self::Activate { .. } => Verb::Activate,
            Self::Confirm { .. } => Verb::Confirm,
            Self::Prune { .. } => Verb::Prune,
        })
    }
}

/// Why an agent did not do it.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) why: String,
    pub(super) blame: Blame,
}

pub(super) type Answered = Result<Option<Box<HostReport>>, Refusal>;

/// Who asked, and what the answer is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct From {
    pub(super) controller: usize,
    pub(super) purpose: Purpose,
    /// When the action was begun that this belongs to.
    pub(super) began: Ms,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A step of an action.
    Job { job: u32, serial: u32 },
    /// A look.
    Look { serial: u32 },
    /// A claim renewed.
    Renew { service: usize },
    /// Nobody waits for it.
    Nothing,
}

/// A request under way on a host.
pub(super) struct Task {
    pub(super) from: From,
    pub(super) host: usize,
    pub(super) service: usize,
    pub(super) request: Request,
    phase: u8,
    has_lock: bool,
    deadline: Ms,
    boots: u32,
    is_hanging: bool,
}

impl Task {
    /// Whether it holds its instance's lock.
    pub(super) fn is_changing(&self) -> bool {
        self.has_lock
    }
}

enum Next {
    /// Go on after so long.
    After(Ms),
    /// It is over.
    Ended(Result<(), Refusal>),
    /// The host is gone.
    Gone,
}

fn refuse(blame: Blame, why: &str) -> Refusal {
    Refusal { why: why.to_owned(), blame }
}

impl Trial<'_> {
    /// A request has arrived.
    pub(super) fn arrives(&mut self, from: From, host: usize, service: usize, request: Request) {
        if !self.hosts[host].is_up {
            return;
        }
        let answer = match request {
            Request::Observe => self
                .observe(host)
                .map(|report| Some(Box::new(report)))
                .map_err(|why| Refusal { why, blame: Blame::Host }),
            request => {
                self.task_serial += 1;
                let id = self.task_serial;
                let is_hanging = request.verb().is_some_and(|verb| self.hangs(host, verb));
                let boots = self.hosts[host].boots;
                let deadline = self.now + CHANGE_WAIT_MS;
                let task = Task {
                    from,
                    host,
                    service,
                    request,
                    phase: 0,
                    has_lock: false,
                    deadline,
                    boots,
                    is_hanging,
                };
                self.tasks.insert(id, task);
                return self.step_task(id);
            }
        };
        self.answer(from, host, answer);
    }

    /// The connection of a controller has ended: what need not be finished is killed.
    pub(super) fn connection_ends(&mut self, controller: usize, only_host: Option<usize>) {
        let ended: Vec<u32> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.from.controller == controller && task.from.purpose != Purpose::Nothing)
            .filter(|(_, task)| only_host.is_none_or(|host| host == task.host))
            .filter(|(_, task)| {
                let is_finished_anyway = matches!(
                    task.request,
                    Request::Activate { .. }
                        | Request::GoBack { .. }
                        | Request::Confirm { .. }
                        | Request::Claim { .. }
                        | Request::Unclaim { .. }
                        | Request::Prune { .. }
                );
                !is_finished_anyway
            })
            .map(|(id, _)| *id)
            .collect();
        for id in ended {
            self.drop_task(id);
        }
    }

    /// The agents of a host are killed, or the host itself.
    pub(super) fn agents_die(&mut self, host: usize, with_guard: bool) {
        let ids: Vec<u32> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.host == host)
            .filter(|(_, task)| with_guard || !matches!(task.request, Request::GoBack { .. }))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.drop_task(id);
        }
    }

    fn drop_task(&mut self, id: u32) {
        let Some(task) = self.tasks.remove(&id) else { return };
        if matches!(task.request, Request::Migrate { .. }) && task.phase == 2 {
            self.check.migration_broken(task.service);
        }
        let instance = &mut self.hosts[task.host].instances[task.service];
        if instance.lock == Some(id) {
            instance.lock = None;
        }
    }

    /// The next step of a request.
    pub(super) fn step_task(&mut self, id: u32) {
        let Some(mut task) = self.tasks.remove(&id) else { return };
        if !self.hosts[task.host].is_up || self.hosts[task.host].boots != task.boots {
            return;
        }
        let (host, service) = (task.host, task.service);
        let wants_lock = !matches!(
            task.request,
            Request::Preflight | Request::Claim { .. } | Request::Unclaim { .. } | Request::Observe
        );
        let next = if wants_lock && !task.has_lock {
            let instance = &mut self.hosts[host].instances[service];
            if instance.lock.is_none() {
                instance.lock = Some(id);
                task.has_lock = true;
                self.check_alone(&task);
                Next::After(STEP_MS)
            } else if self.now < task.deadline {
                Next::After(CHANGE_INTERVAL_MS)
            } else if matches!(task.request, Request::GoBack { .. }) {
                // The guard waits longer: it has nobody who would ask it again.
                task.deadline = self.now + CHANGE_WAIT_MS;
                Next::After(CHANGE_INTERVAL_MS)
            } else {
                Next::Ended(Err(refuse(Blame::Passing, "another change of this instance is under way")))
            }
        } else if task.is_hanging && self.hangs(host, task.request.verb().unwrap_or(Verb::Preflight)) {
            Next::After(500)
        } else {
            self.next_step(&mut task)
        };
        match next {
            Next::After(ms) => {
                self.tasks.insert(id, task);
                self.after(ms, Event::Task(id));
            }
            Next::Ended(result) => {
                if !self.hosts[host].is_up {
                    return;
                }
                let instance = &mut self.hosts[host].instances[service];
                if instance.lock == Some(id) {
                    instance.lock = None;
                }
                let answer = result.map(|()| None);
                self.answer(task.from, host, answer);
            }
            Next::Gone => {}
        }
    }

    fn next_step(&mut self, task: &mut Task) -> Next {
        if let Some(verb) = task.request.verb()
            && task.phase == self.fails_in_phase(verb)
            && let Some(blame) = self.command_fails(task.host, verb)
        {
            if verb == Verb::Activate && task.phase > 1 {
                let (release, generation) = match &task.request {
                    Request::Activate { release, generation, .. } => (*release, *generation),
                    _ => (None, Generation(0)),
                };
                self.note(task.host, task.service, LedgerEvent::Failed, release, generation);
            }
            if verb == Verb::Migrate && task.phase == 2 {
                self.check.migration_failed(task.service);
                if blame != Blame::Passing
                    && let Request::Migrate { release, .. } = task.request
                {
                    let generation = self.hosts[task.host].instances[task.service].ledger.generation;
                    let event = LedgerEvent::MigrationFailed;
                    self.note(task.host, task.service, event, Some(release), generation);
                }
            }
            return Next::Ended(Err(refuse(blame, "it failed by chance")));
        }
        let done = match task.request.clone() {
            Request::Observe => Ok(Next::Ended(Ok(()))),
            Request::Preflight => self.preflight(task),
            Request::Claim { rollout, generation, ended } => {
                self.claim(task, &rollout, generation, ended.as_ref())
            }
            Request::Unclaim { rollout } => self.unclaim(task, &rollout),
            Request::Stage { release, rollout } => self.stage(task, release, &rollout),
            Request::Smoke { release } => self.smoke(task, release),
            Request::Migrate { release, rollout } => self.migrate(task, release, &rollout),
            Request::Activate { release: Some(release), generation, rollout, is_guarded } => {
                self.activate(task, release, generation, &rollout, is_guarded)
            }
            Request::Activate { release: None, generation, rollout, .. } => {
                self.deactivate(task, generation, &rollout)
            }
            Request::Confirm { release, generation, rollout } => {
                self.confirm(task, release, generation, &rollout)
            }
            Request::Prune { keep, rollout } => self.prune(task, &keep, &rollout),
            Request::GoBack { serial } => self.go_back(task, serial),
        };
        match done {
            Ok(next) => {
                task.phase += 1;
                next
            }
            Err(refusal) => Next::Ended(Err(refusal)),
        }
    }

    /// In which step a command of this kind fails when it does: an activation in the middle, with nothing running.
    fn fails_in_phase(&self, verb: Verb) -> u8 {
        match verb {
            Verb::Activate => 1 + 3 * u8::from(self.scenario.seed.is_multiple_of(2)),
            Verb::Migrate => 1 + u8::from(self.scenario.seed.is_multiple_of(2)),
            Verb::Stage => 1,
            _ => 0,
        }
    }

    fn preflight(&mut self, task: &Task) -> Result<Next, Refusal> {
        if task.phase == 0 {
            return Ok(Next::After(30));
        }
        if self.is_disk_full(task.host) {
            return Err(refuse(Blame::Host, "disk: no space"));
        }
        Ok(Next::Ended(Ok(())))
    }

    fn claim(
        &mut self,
        task: &Task,
        rollout: &RolloutId,
        generation: Generation,
        ended: Option<&RolloutId>,
    ) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        if let Some(ended) = ended {
            self.unclaim(task, ended)?;
        }
        let now = self.host_ms(host);
        let expires_at = stamp(CLAIM_MS, now);
        self.update(host, service, |ledger| {
            if let Some(claim) = &ledger.claim
                && claim.rollout != *rollout
                && is_current(claim, now)
            {
                return Err(refuse(Blame::Host, "the instance is claimed by another rollout"));
            }
            let is_own = ledger.rollout.as_ref() == Some(rollout);
            if generation < ledger.generation || generation == ledger.generation && !is_own {
                return Err(refuse(Blame::Host, "the host has already seen a newer generation"));
            }
            ledger.claim = Some(Claim {
                rollout: rollout.clone(),
                holder: String::new(),
                reason: String::new(),
                expires_at,
            });
            Ok(())
        })?;
        Ok(Next::Ended(Ok(())))
    }

    fn unclaim(&mut self, task: &Task, rollout: &RolloutId) -> Result<Next, Refusal> {
        self.update(task.host, task.service, |ledger| {
            if ledger.claim.as_ref().is_some_and(|claim| claim.rollout == *rollout) {
                ledger.claim = None;
            }
            Ok(())
        })?;
        Ok(Next::Ended(Ok(())))
    }

    fn stage(&mut self, task: &Task, release: ReleaseId, rollout: &RolloutId) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        match task.phase {
            0 => {
                self.check_claim(host, service, rollout)?;
                let is_staged = self.hosts[host].instances[service].staged.contains(&release);
                Ok(if is_staged {
                    Next::Ended(Ok(()))
                } else {
                    Next::After(self.numbers.between(100, 2_000))
                })
            }
            1 => {
                if self.is_disk_full(host) {
                    return Err(refuse(Blame::Host, "no space left on device"));
                }
                self.hosts[host].instances[service].staged.insert(release);
                Ok(Next::After(STEP_MS))
            }
            _ => {
                let generation = self.hosts[host].instances[service].ledger.generation;
                self.note_or(host, service, LedgerEvent::Staged, Some(release), generation)?;
                Ok(Next::Ended(Ok(())))
            }
        }
    }

    fn smoke(&mut self, task: &Task, release: ReleaseId) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        if task.phase == 0 {
            if !self.hosts[host].instances[service].staged.contains(&release) {
                return Err(refuse(Blame::Host, "it is not staged on this host"));
            }
            return Ok(Next::After(self.numbers.between(200, 900)));
        }
        match self.badness(host, service, release) {
            Some(Badness::AtStart | Badness::NeverAnswers) => {
                Err(refuse(Blame::Release, "it does not answer on its smoke port"))
            }
            _ => Ok(Next::Ended(Ok(()))),
        }
    }

    fn migrate(&mut self, task: &mut Task, release: ReleaseId, rollout: &RolloutId) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        match task.phase {
            0 => {
                self.check_claim(host, service, rollout)?;
                match self.hosts[host].instances[service].ledger.migration(release) {
                    Some(MigrationTrace::Done) => Ok(Next::Ended(Ok(()))),
                    Some(MigrationTrace::Begun) => Err(refuse(
                        Blame::Host,
                        "the migration was begun before, and how it ended is not known",
                    )),
                    Some(MigrationTrace::Failed) | None => Ok(Next::After(STEP_MS)),
                }
            }
            1 => {
                let generation = self.hosts[host].instances[service].ledger.generation;
                self.note_or(host, service, LedgerEvent::MigrationBegun, Some(release), generation)?;
                if !self.hosts[host].is_up {
                    return Ok(Next::Gone);
                }
                self.migration_begins(service, release, rollout);
                Ok(Next::After(self.numbers.between(200, 1_500)))
            }
            2 => {
                self.check.migration_done(service);
                Ok(Next::After(STEP_MS))
            }
            _ => {
                let generation = self.hosts[host].instances[service].ledger.generation;
                self.note_or(host, service, LedgerEvent::Migrated, Some(release), generation)?;
                Ok(Next::Ended(Ok(())))
            }
        }
    }

    fn activate(
        &mut self,
        task: &mut Task,
        release: ReleaseId,
        generation: Generation,
        rollout: &RolloutId,
        is_guarded: bool,
    ) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        let has_process = self.scenario.services[service].has_process;
        let failed = |trial: &mut Self, refusal: Refusal| {
            trial.note(host, service, LedgerEvent::Failed, Some(release), generation);
            Err(refusal)
        };
        match task.phase {
            0 => {
                self.accept(host, service, Some(release), generation, rollout)?;
                Ok(Next::After(STEP_MS))
            }
            1 => {
                let truth = &self.hosts[host].instances[service];
                if !truth.staged.contains(&release) {
                    return failed(self, refuse(Blame::Host, "it is not staged on this host"));
                }
                let is_proven = self.answers_as(host, service, release);
                if truth.ledger.active == Some(release) && truth.runs.contains(&release) && is_proven {
                    self.hosts[host].instances[service].is_proven = true;
                    self.note_or(host, service, LedgerEvent::Proven, Some(release), generation)?;
                    return Ok(Next::Ended(Ok(())));
                }
                if is_guarded {
                    if let Err(refusal) = self.arm(host, service, generation) {
                        return failed(self, refusal);
                    }
                    if !self.hosts[host].is_up {
                        return Ok(Next::Gone);
                    }
                }
                let back = self.stop(host, service, task.from.began, is_back(&task.request, rollout, self));
                Ok(Next::After(back))
            }
            2 => {
                if self.is_disk_full(host) {
                    return failed(self, refuse(Blame::Host, "no space left on device"));
                }
                let truth = &mut self.hosts[host].instances[service];
                truth.process = None;
                truth.runs.insert(release);
                truth.linked = Some(release);
                truth.is_proven = false;
                Ok(Next::After(STEP_MS))
            }
            3 => {
                self.switch_ledger(host, service, release, generation)?;
                Ok(Next::After(STEP_MS))
            }
            4 => {
                if has_process {
                    self.start(host, service, release);
                }
                task.deadline = self.now + START_TIMEOUT_MS;
                Ok(Next::After(PROBE_INTERVAL_MS))
            }
            _ => {
                let truth = &self.hosts[host].instances[service];
                let is_ready = !has_process || truth.answers();
                if is_ready {
                    self.hosts[host].instances[service].is_proven = true;
                    self.note_or(host, service, LedgerEvent::Proven, Some(release), generation)?;
                    return Ok(Next::Ended(Ok(())));
                }
                if truth.process.is_none() {
                    return failed(self, refuse(Blame::Release, "it ended while it started"));
                }
                if self.now >= task.deadline {
                    return failed(self, refuse(Blame::Release, "it did not answer in time"));
                }
                task.phase -= 1;
                Ok(Next::After(PROBE_INTERVAL_MS))
            }
        }
    }

    fn switch_ledger(
        &mut self,
        host: usize,
        service: usize,
        release: ReleaseId,
        generation: Generation,
    ) -> Result<(), Refusal> {
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            if ledger.active != Some(release) {
                ledger.previous = ledger.active.or(ledger.previous);
                ledger.active = Some(release);
            }
            enter(ledger, now, LedgerEvent::Switched, Some(release), generation);
            Ok(())
        })
    }

    fn deactivate(
        &mut self,
        task: &mut Task,
        generation: Generation,
        rollout: &RolloutId,
    ) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        match task.phase {
            0 => {
                self.accept(host, service, None, generation, rollout)?;
                Ok(Next::After(STEP_MS))
            }
            1 => Ok(Next::After(self.stop(host, service, task.from.began, true))),
            2 => {
                let truth = &mut self.hosts[host].instances[service];
                truth.process = None;
                truth.linked = None;
                truth.is_proven = false;
                Ok(Next::After(STEP_MS))
            }
            _ => {
                self.forget_active(host, service, generation)?;
                Ok(Next::Ended(Ok(())))
            }
        }
    }

    fn confirm(
        &mut self,
        task: &mut Task,
        release: ReleaseId,
        generation: Generation,
        rollout: &RolloutId,
    ) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        self.check_claim(host, service, rollout)?;
        let truth = &self.hosts[host].instances[service];
        if truth.ledger.generation != generation {
            return Err(refuse(Blame::Host, "the host is at another generation"));
        }
        if truth.ledger.went_back().is_some() {
            return Err(refuse(Blame::Passing, "the host went back by itself"));
        }
        if !self.answers_as(host, service, release) {
            return Err(refuse(Blame::Release, "it cannot be confirmed"));
        }
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            if ledger.confirmed != Some(generation) {
                ledger.last_good = Some(release);
                ledger.confirmed = Some(generation);
                enter(ledger, now, LedgerEvent::Confirmed, Some(release), generation);
            }
            ledger.guard = None;
            Ok(())
        })?;
        let truth = &mut self.hosts[host].instances[service];
        truth.guard_serial = None;
        // What answers as what it was switched to is proven, also when the agent that was to say so has died.
        truth.is_proven = true;
        Ok(Next::Ended(Ok(())))
    }

    fn prune(
        &mut self,
        task: &Task,
        keep: &BTreeSet<ReleaseId>,
        rollout: &RolloutId,
    ) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        self.check_claim(host, service, rollout)?;
        let truth = &self.hosts[host].instances[service];
        let ledger = &truth.ledger;
        let guarded = ledger.guard.as_ref().and_then(|guard| guard.back_to);
        let own = [ledger.active, ledger.previous, ledger.last_good, truth.linked, guarded];
        let kept: BTreeSet<ReleaseId> = keep.iter().copied().chain(own.into_iter().flatten()).collect();
        let removed: Vec<ReleaseId> = truth.staged.difference(&kept).copied().collect();
        let generation = ledger.generation;
        for release in &removed {
            self.check_prune(host, service, *release);
            let truth = &mut self.hosts[host].instances[service];
            truth.staged.remove(release);
            truth.runs.remove(release);
        }
        if !removed.is_empty() {
            self.note_or(host, service, LedgerEvent::Pruned, None, generation)?;
        }
        Ok(Next::Ended(Ok(())))
    }

    /// The guard's own way back.
    fn go_back(&mut self, task: &mut Task, serial: u32) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        let ledger = &self.hosts[host].instances[service].ledger;
        let Some(guard) = ledger.guard.clone().filter(|guard| {
            guard.armed_at_ms == u64::from(serial)
                && guard.generation == ledger.generation
                && ledger.confirmed != Some(guard.generation)
        }) else {
            return Ok(Next::Ended(Ok(())));
        };
        let has_process = self.scenario.services[service].has_process;
        let generation = guard.generation;
        match task.phase {
            0 => {
                self.say(|trial| format!("{} goes back by itself", trial.place(host, service)));
                let truth = &self.hosts[host].instances[service];
                let is_there = guard.back_to.is_some_and(|back| {
                    truth.ledger.active == Some(back) && self.answers_as(host, service, back)
                });
                if is_there {
                    // It never came to be switched.
                    task.phase = 3;
                    return Ok(Next::After(STEP_MS));
                }
                if guard.back_to.is_some_and(|back| !truth.staged.contains(&back)) {
                    self.end_guard(host, service, &guard, LedgerEvent::Failed)?;
                    return Ok(Next::Ended(Ok(())));
                }
                Ok(Next::After(self.stop(host, service, task.from.began, true)))
            }
            1 => {
                let truth = &mut self.hosts[host].instances[service];
                truth.process = None;
                truth.is_proven = false;
                truth.linked = guard.back_to;
                Ok(Next::After(STEP_MS))
            }
            2 => {
                match guard.back_to {
                    Some(back_to) => self.switch_ledger(host, service, back_to, generation)?,
                    None => self.forget_active(host, service, generation)?,
                }
                if let Some(back_to) = guard.back_to.filter(|_| has_process) {
                    self.start(host, service, back_to);
                }
                task.deadline = self.now + START_TIMEOUT_MS;
                Ok(Next::After(PROBE_INTERVAL_MS))
            }
            _ => {
                let truth = &self.hosts[host].instances[service];
                let is_ready = guard.back_to.is_none() || !has_process || truth.answers();
                if !is_ready && truth.process.is_some() && self.now < task.deadline {
                    task.phase -= 1;
                    return Ok(Next::After(PROBE_INTERVAL_MS));
                }
                let event = if is_ready { LedgerEvent::TurnedBack } else { LedgerEvent::Failed };
                self.end_guard(host, service, &guard, event)?;
                self.hosts[host].instances[service].is_proven = is_ready && guard.back_to.is_some();
                Ok(Next::Ended(Ok(())))
            }
        }
    }

    fn end_guard(
        &mut self,
        host: usize,
        service: usize,
        guard: &Guard,
        event: LedgerEvent,
    ) -> Result<(), Refusal> {
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            ledger.guard = None;
            enter(ledger, now, event, guard.back_to, guard.generation);
            Ok(())
        })
    }

    fn forget_active(&mut self, host: usize, service: usize, generation: Generation) -> Result<(), Refusal> {
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            let was = ledger.active.take();
            ledger.previous = was.or(ledger.previous);
            enter(ledger, now, LedgerEvent::Deactivated, was, generation);
            Ok(())
        })
    }

    /// Whether it is switched to a release and answers as it.
    fn answers_as(&self, host: usize, service: usize, release: ReleaseId) -> bool {
        let truth = &self.hosts[host].instances[service];
        truth.linked == Some(release)
            && (!self.scenario.services[service].has_process
                || truth.process.is_some_and(|one| one.is_ready && one.release == release))
    }

    /// Arms the guard of an activation. A second try of the same generation goes back to where the first would have.
    fn arm(&mut self, host: usize, service: usize, generation: Generation) -> Result<(), Refusal> {
        let truth = &mut self.hosts[host].instances[service];
        truth.serial += 1;
        let serial = truth.serial;
        let ledger = &truth.ledger;
        let is_own = ledger.history.iter().rev().any(|entry| {
            entry.event == LedgerEvent::Switched
                && entry.generation == generation
                && entry.release == ledger.active
        });
        let back_to = match &ledger.guard {
            Some(guard) if guard.generation == generation => guard.back_to,
            _ if is_own && ledger.active.is_some() => ledger.previous,
            _ => ledger.active,
        };
        let limit_ms = STOP_TIMEOUT_MS + START_TIMEOUT_MS + CONFIRM_TIMEOUT_MS;
        let fires_at = stamp(limit_ms, self.host_ms(host));
        self.update(host, service, |ledger| {
            ledger.guard = Some(Guard {
                generation,
                back_to,
                limit: std::time::Duration::from_millis(limit_ms),
                fires_at,
                boot: String::new(),
                armed_at_ms: u64::from(serial),
                lost: None,
            });
            Ok(())
        })?;
        if self.hosts[host].is_up {
            self.hosts[host].instances[service].guard_serial = Some(serial);
            self.after(limit_ms, Event::GuardFires { host, service, serial });
        }
        Ok(())
    }

    /// The time of a guard is up.
    pub(super) fn guard_fires(&mut self, host: usize, service: usize, serial: u32) {
        if self.hosts[host].instances[service].guard_serial != Some(serial) {
            return;
        }
        // It was decided when it was armed: a host does not know what has become of the others since.
        let limit_ms = STOP_TIMEOUT_MS + START_TIMEOUT_MS + CONFIRM_TIMEOUT_MS;
        let began = self.now.saturating_sub(limit_ms);
        let from = From { controller: usize::MAX, purpose: Purpose::Nothing, began };
        self.arrives(from, host, service, Request::GoBack { serial });
    }

    /// Stops what runs; how long that takes.
    fn stop(&mut self, host: usize, service: usize, began: Ms, goes_back: bool) -> Ms {
        let takes_ms = self.numbers.between(50, 400);
        if self.hosts[host].instances[service].process.is_some() {
            self.check_stop(host, service);
        }
        let served = self.serves(host, service);
        let truth = &mut self.hosts[host].instances[service];
        truth.is_proven = false;
        if let Some(process) = &mut truth.process {
            // From here on it takes nothing new, and it ends also when whoever stops it dies.
            truth.serial += 1;
            let serial = truth.serial;
            *process = ProcessTruth { is_ready: false, is_stopping: true, serial, ..*process };
            self.after(takes_ms, Event::ProcessEnds { host, service, serial });
        }
        if served {
            self.check_floor(host, service, began, goes_back);
        }
        self.cut_sessions(host, service);
        takes_ms
    }

    /// Starts a release's process.
    pub(super) fn start(&mut self, host: usize, service: usize, release: ReleaseId) {
        let badness = self.badness(host, service, release);
        let takes_ms = self.numbers.between(100, 1_200);
        let now = self.now;
        let truth = &mut self.hosts[host].instances[service];
        truth.serial += 1;
        let serial = truth.serial;
        let requests_left = match badness {
            Some(Badness::UnderTraffic(count)) => Some(count),
            _ => None,
        };
        truth.process = Some(ProcessTruth {
            release,
            started_at: now,
            is_ready: false,
            is_stopping: false,
            serial,
            requests_left,
        });
        match badness {
            Some(Badness::AtStart) => self.after(takes_ms / 2, Event::ProcessEnds { host, service, serial }),
            Some(Badness::NeverAnswers) => {}
            Some(Badness::After(ms)) => {
                self.after(takes_ms, Event::ProcessAnswers { host, service, serial });
                self.after(takes_ms + ms, Event::ProcessEnds { host, service, serial });
            }
            Some(Badness::UnderTraffic(_)) | None => {
                self.after(takes_ms, Event::ProcessAnswers { host, service, serial });
            }
        }
    }

    fn badness(&self, host: usize, service: usize, release: ReleaseId) -> Option<Badness> {
        let (_, number) = of_release(release);
        self.scenario.faults.iter().find_map(|fault| match &fault.kind {
            FaultKind::BadRelease { service: bad, release: found, how, on }
                if *bad == service && *found == number && on.is_none_or(|on| on == host) =>
            {
                Some(*how)
            }
            _ => None,
        })
    }

    fn check_claim(&self, host: usize, service: usize, rollout: &RolloutId) -> Result<(), Refusal> {
        let truth = &self.hosts[host].instances[service];
        if truth.is_damaged {
            return Err(refuse(Blame::Host, "the ledger is damaged"));
        }
        claim_of(&truth.ledger, rollout, self.host_ms(host))
    }

    /// Takes over a generation, or refuses it.
    fn accept(
        &mut self,
        host: usize,
        service: usize,
        release: Option<ReleaseId>,
        generation: Generation,
        rollout: &RolloutId,
    ) -> Result<(), Refusal> {
        let content = content(release, rollout);
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            claim_of(ledger, rollout, now)?;
            if generation < ledger.generation {
                return Err(refuse(Blame::Host, "the generation is stale"));
            }
            if generation == ledger.generation && ledger.content.is_some_and(|known| known != content) {
                return Err(refuse(Blame::Host, "the generation was used for something else"));
            }
            if ledger.guard.as_ref().is_some_and(|guard| guard.generation != generation) {
                ledger.guard = None;
            }
            ledger.generation = generation;
            ledger.content = Some(content);
            ledger.rollout = Some(rollout.clone());
            Ok(())
        })?;
        let truth = &mut self.hosts[host].instances[service];
        if truth.ledger.guard.is_none() {
            truth.guard_serial = None;
        }
        Ok(())
    }

    /// Reads, changes and writes a ledger. The host may lose power in between.
    pub(super) fn update(
        &mut self,
        host: usize,
        service: usize,
        change: impl FnOnce(&mut Ledger) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let is_full = self.is_disk_full(host);
        let truth = &mut self.hosts[host].instances[service];
        if truth.is_damaged {
            return Err(refuse(Blame::Host, "the ledger is damaged"));
        }
        if is_full {
            return Err(refuse(Blame::Host, "write the ledger: no space left on device"));
        }
        if let Some((lasts, keeps_new)) = self.hosts[host].crashes_at_write.take() {
            let truth = &mut self.hosts[host].instances[service];
            let before = truth.ledger.clone();
            let result = change(&mut truth.ledger);
            if !keeps_new || result.is_err() {
                truth.ledger = before;
            }
            self.count("crash in a ledger write");
            self.host_crashes(host, true, lasts);
            return Ok(());
        }
        let truth = &mut self.hosts[host].instances[service];
        change(&mut truth.ledger)?;
        let seen = truth.ledger.generation;
        if seen < truth.generation_seen {
            self.violation("generation", |trial| {
                format!("the generation of {} fell to {seen}", trial.place(host, service))
            });
        } else {
            truth.generation_seen = seen;
        }
        Ok(())
    }

    fn note(
        &mut self,
        host: usize,
        service: usize,
        event: LedgerEvent,
        release: Option<ReleaseId>,
        generation: Generation,
    ) {
        // That it failed is said in the answer as well; a disk that is full has no room for it.
        let _ = self.note_or(host, service, event, release, generation);
    }

    fn note_or(
        &mut self,
        host: usize,
        service: usize,
        event: LedgerEvent,
        release: Option<ReleaseId>,
        generation: Generation,
    ) -> Result<(), Refusal> {
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            enter(ledger, now, event, release, generation);
            Ok(())
        })
    }

    pub(super) fn host_ms(&self, host: usize) -> i64 {
        i64::try_from(self.now).unwrap_or(i64::MAX).saturating_add(self.hosts[host].clock_ms)
    }
}

/// Whether the activation is on its way back, by its generation: a rollout's second is odd.
fn is_back(request: &Request, rollout: &RolloutId, trial: &Trial<'_>) -> bool {
    let Request::Activate { generation, .. } = request else { return false };
    trial.check.rollouts.get(rollout).is_some_and(|one| one.plan.generation != *generation)
}

fn is_current(claim: &Claim, now_ms: i64) -> bool {
    let left = claim.expires_at.as_millisecond().saturating_sub(stamp(0, now_ms).as_millisecond());
    left > 0 && left <= CLAIM_MAX_MS
}

pub(super) fn is_claim_current(claim: &Claim, now_ms: i64) -> bool {
    is_current(claim, now_ms)
}

fn claim_of(ledger: &Ledger, rollout: &RolloutId, now_ms: i64) -> Result<(), Refusal> {
    match &ledger.claim {
        // Also when its time is up: nobody else has taken it.
        Some(claim) if claim.rollout == *rollout => Ok(()),
        Some(claim) if is_current(claim, now_ms) => {
            Err(refuse(Blame::Host, "another rollout holds the claim"))
        }
        _ => Err(refuse(Blame::Passing, "the instance is not claimed: it must be claimed first")),
    }
}

fn content(release: Option<ReleaseId>, rollout: &RolloutId) -> ContentHash {
    let mut bytes = [0u8; 32];
    bytes[0] = release.map_or(0, |release| release.as_bytes()[0]);
    for (place, byte) in bytes[1..].iter_mut().zip(rollout.as_str().bytes()) {
        *place = byte;
    }
    ContentHash::from_bytes(bytes)
}

fn enter(
    ledger: &mut Ledger,
    now_ms: i64,
    event: LedgerEvent,
    release: Option<ReleaseId>,
    generation: Generation,
) {
    let surplus = (ledger.history.len() + 1).saturating_sub(greenlight_model::host::LEDGER_HISTORY_MAX);
    ledger.history.drain(..surplus);
    let entry = LedgerEntry { at: stamp(0, now_ms), event, release, generation, detail: String::new() };
    ledger.history.push(entry);
}
