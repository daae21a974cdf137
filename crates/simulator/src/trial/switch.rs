//! What a host does to switch: stop, link, start, prove, confirm; and the guard that goes back by itself.

use greenlight_model::action::Blame;
use greenlight_model::host::{Guard, LedgerEvent};
use greenlight_model::id::{Generation, ReleaseId, RolloutId};

use super::agent::{From, Next, Purpose, Refusal, Request, STEP_MS, Task, refuse};
use super::host::ProcessTruth;
use super::ledger::enter;
use super::scenario::{Badness, FaultKind, Ms};
use super::site::{CONFIRM_TIMEOUT_MS, START_TIMEOUT_MS, STOP_TIMEOUT_MS, of_release, stamp};
use super::trial::{Event, Trial};

const PROBE_INTERVAL_MS: Ms = 150;

impl Trial<'_> {
    pub(super) fn activate(
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
                self.check_schema(host, service, release);
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

    pub(super) fn deactivate(
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

    pub(super) fn confirm(
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
        let ledger = &self.hosts[host].instances[service].ledger;
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
        self.start_timer(host, service, generation, back_to, None)
    }

    /// Starts the timer of a guard again that is armed and has none: the machine was started anew. At the boot, where something
    /// is started then; else at the next look.
    pub(super) fn rearm(&mut self, host: usize, service: usize) {
        let truth = &self.hosts[host].instances[service];
        if truth.guard_serial.is_some() || truth.lock.is_some() || truth.is_damaged {
            return;
        }
        let Some(guard) = truth.ledger.guard.clone() else { return };
        let why = "the machine was started anew".to_owned();
        // Where the disk is full, the next look tries it again.
        let _ = self.start_timer(host, service, guard.generation, guard.back_to, Some(why));
    }

    /// Starts a guard's timer and enters it into the ledger.
    fn start_timer(
        &mut self,
        host: usize,
        service: usize,
        generation: Generation,
        back_to: Option<ReleaseId>,
        rearmed: Option<String>,
    ) -> Result<(), Refusal> {
        let truth = &mut self.hosts[host].instances[service];
        truth.serial += 1;
        let serial = truth.serial;
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
                rearmed,
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

    /// The guard's own way back.
    pub(super) fn go_back(&mut self, task: &mut Task, serial: u32) -> Result<Next, Refusal> {
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
                let gone_back = &mut self.hosts[host].instances[service].gone_back;
                let times = if gone_back.0 == generation { gone_back.1 } else { 0 };
                *gone_back = (generation, times + 1);
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
            Some(Badness::UnderTraffic(_) | Badness::AnswersWrongly(_)) | None => {
                self.after(takes_ms, Event::ProcessAnswers { host, service, serial });
            }
        }
    }

    pub(super) fn badness(&self, host: usize, service: usize, release: ReleaseId) -> Option<Badness> {
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
}

/// Whether the activation is on its way back, by its generation: a rollout's second is odd.
pub(super) fn is_back(request: &Request, rollout: &RolloutId, trial: &Trial<'_>) -> bool {
    let Request::Activate { generation, .. } = request else { return false };
    trial.check.rollouts.get(rollout).is_some_and(|one| one.plan.generation != *generation)
}
