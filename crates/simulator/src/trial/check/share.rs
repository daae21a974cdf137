//! What a canary gets of the traffic, and what that rests on.

use std::collections::BTreeSet;

use greenlight_model::canary::{Answer, OnInconclusive, Until};
use greenlight_model::decision::{Decision, Outcome};
use greenlight_model::fleet::Strategy;
use greenlight_model::id::{Instance, ReleaseId, RolloutId};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::Note;

use super::super::scenario::{FaultKind, Ms};
use super::super::trial::Trial;
use super::{KNOWN_AFTER_MS, Seen};

impl Seen {
    /// The canary that is not proven yet, by the index of its wave, and how many of its steps have passed.
    fn canary(&self) -> Option<(usize, usize)> {
        let wave = (0..self.plan.waves.len()).find(|wave| !self.waves_proven.contains_key(wave))?;
        let is_canary = !self.plan.waves[wave].steps.is_empty();
        is_canary.then(|| (wave, self.steps_passed.get(&wave).copied().unwrap_or(0)))
    }

    /// An instance was let in.
    pub(super) fn admitted(&mut self, instance: &Instance, now: Ms) {
        if self.canary().is_some_and(|(wave, _)| self.plan.waves[wave].instances.contains(instance)) {
            self.step_began = now;
        }
    }

    /// The most that it may get of the traffic now; none when it has passed all steps, and gets its usual part.
    fn due(&self, wave: usize, passed: usize) -> Option<Percent> {
        self.plan.waves[wave].steps.get(passed).map(|step| step.share)
    }
}

impl Trial<'_> {
    /// The rollout that is open, as it was seen.
    fn seen_open(&self) -> Option<&Seen> {
        let open = self.history.open_rollout(&self.site.environment.name)?;
        self.check.rollouts.get(&open.plan.id)
    }

    /// Whether it began anew, and nobody can have seen that and set it right.
    fn was_restarted_lately(&self, balancer: usize) -> bool {
        let balancer = &self.balancers[balancer];
        balancer.restarted_at.is_some_and(|at| at.max(balancer.unseen_at) + KNOWN_AFTER_MS >= self.now)
    }

    /// Notes whether anybody can see a balancer.
    fn see(&mut self, balancer: usize) {
        let is_driven = self.controllers.iter().any(|controller| controller.is_alive);
        let is_held = self.seen_open().is_some_and(|seen| seen.is_held);
        let has_weather = self.active().any(|kind| matches!(kind, FaultKind::Messages { .. }));
        if !is_driven || is_held || has_weather || self.is_balancer_cut(balancer) {
            self.balancers[balancer].unseen_at = self.now;
        }
    }

    /// A client was answered by a release. What is on trial answers no more of them than it was given.
    pub(in crate::trial) fn check_share(&mut self, balancer: usize, host: usize, release: ReleaseId) {
        let service = self.balancers[balancer].service;
        self.see(balancer);
        let complaint = self.judge_answer(balancer, host, release);
        if let Some(complaint) = complaint
            && let Some(id) =
                self.history.open_rollout(&self.site.environment.name).map(|open| open.plan.id.clone())
        {
            if let Some(seen) = self.check.rollouts.get_mut(&id) {
                *seen.canary_answers.entry(service).or_default() += 1;
            }
            if let Some(what) = complaint {
                self.violation("share", |trial| format!("{}: {what}", trial.place(host, service)));
            }
        }
    }

    /// None when it was no answer of a canary; else what is wrong with it, if anything.
    fn judge_answer(&self, balancer: usize, host: usize, release: ReleaseId) -> Option<Option<String>> {
        let service = self.balancers[balancer].service;
        let seen = self.seen_open()?;
        let (wave, passed) = seen.canary()?;
        let due = seen.due(wave, passed)?;
        let instance = self.site.instances[host][service].as_ref()?;
        let is_target = seen.plan.targets.get(&instance.service) == Some(&release);
        if !is_target || !seen.plan.waves[wave].instances.contains(instance) {
            return None;
        }
        if seen.ran_at_start.get(instance) == Some(&release) {
            return Some(None);
        }
        let server = self.balancers[balancer].servers[host]?;
        if server.is_foreign || self.was_restarted_lately(balancer) {
            return Some(None);
        }
        Some(match &self.balancers[balancer].lent {
            None => Some("it is on trial and gets its usual part of the traffic".to_owned()),
            Some(lent) if !lent.hosts.contains(&host) => {
                Some("it is on trial and gets a part of the traffic that is not the canary's".to_owned())
            }
            Some(lent) => (lent.share > due).then(|| format!("it gets {}, and {due} is due", lent.share)),
        })
    }

    /// A balancer is about to give a canary its share.
    pub(in crate::trial) fn check_lent(
        &mut self,
        balancer: usize,
        hosts: &BTreeSet<usize>,
        share: Percent,
        began: Ms,
    ) {
        let complaint = self.judge_lent(balancer, hosts, share, began);
        if let Some(what) = complaint {
            self.violation("share", |_| what);
        }
    }

    fn judge_lent(
        &self,
        balancer: usize,
        hosts: &BTreeSet<usize>,
        share: Percent,
        began: Ms,
    ) -> Option<String> {
        let service = self.balancers[balancer].service;
        let seen = self.check.rollouts.values().next_back()?;
        if seen.turned_back.is_some_and(|at| at < began) {
            return Some(format!("{share} is given to a canary after the rollout turned back"));
        }
        if seen.turned_back.is_some() {
            return None;
        }
        let due = seen.canary().and_then(|(wave, passed)| Some((wave, seen.due(wave, passed)?)));
        let Some((wave, due)) = due else {
            return Some(format!("{share} is given to a canary that is over"));
        };
        if share > due {
            return Some(format!("{share} is given to a canary, and {due} is due"));
        }
        hosts.iter().find_map(|host| {
            let instance = self.site.instances[*host][service].as_ref()?;
            let target = *seen.plan.targets.get(&instance.service)?;
            let has_process = self.scenario.services[service].has_process;
            if !seen.plan.waves[wave].instances.contains(instance) {
                return Some(format!("{share} is given to {instance}, which is not the canary's"));
            }
            let is_proven = self.hosts[*host].instances[service].proves(target, has_process);
            (!is_proven && !self.is_beyond_us(*host, service) && !seen.left_out.contains_key(instance))
                .then(|| format!("{share} is given to {instance}, which does not prove its release"))
        })
    }

    /// What is lent was lent for longer.
    pub(in crate::trial) fn check_renewed(&mut self, balancer: usize, began: Ms) {
        let turned = self.check.rollouts.values().next_back().and_then(|seen| seen.turned_back);
        if turned.is_some_and(|at| at < began) {
            self.violation("share", |_| {
                format!("balancer {balancer}: a share is renewed after the rollout turned back")
            });
        }
    }

    /// A controller that knows that its canary is worse turns back, and does nothing else before.
    pub(in crate::trial) fn check_heeded(&mut self, index: usize, decision: &Decision) {
        let controller = &self.controllers[index];
        let is_worse =
            controller.world.judgement.as_ref().filter(|judgement| judgement.answer == Answer::Abort);
        let Some(worse) = is_worse else { return };
        let is_up_to_date = controller.history.last_seq == self.history.last_seq;
        let Some(seen) = self.check.rollouts.get(&controller.rollout) else { return };
        let is_open = seen.canary().is_some_and(|(wave, _)| wave == worse.wave);
        let is_heeded = matches!(decision, Decision::Note(Note::TurnBack { .. }) | Decision::End(_));
        if is_open && is_up_to_date && seen.turned_back.is_none() && !is_heeded {
            self.violation("verdict", |_| "the canary is worse, and the rollout goes on".to_owned());
        }
    }

    /// A step of a canary is called passed.
    pub(super) fn step_passed(&mut self, rollout: &RolloutId, wave: usize, step: usize) {
        let complaint = self.judge_step(rollout, wave, step);
        if let Some(what) = complaint {
            self.violation("verdict", |_| what);
        }
        let now = self.now;
        if let Some(seen) = self.check.rollouts.get_mut(rollout) {
            seen.steps_passed.insert(wave, step + 1);
            seen.canary_answers.clear();
            seen.step_began = now;
        }
    }

    fn judge_step(&self, rollout: &RolloutId, wave: usize, step: usize) -> Option<String> {
        let seen = self.check.rollouts.get(rollout)?;
        if seen.canary() != Some((wave, step)) {
            return Some(format!("step {} passes out of turn", step + 1));
        }
        let number = step + 1;
        match seen.plan.waves[wave].steps[step].until {
            Until::Elapsed(time) => {
                let ms = Ms::try_from(time.as_millis()).unwrap_or(Ms::MAX);
                let is_early = self.now < seen.step_began + ms && !self.check.has_clock_jumps;
                is_early.then(|| format!("step {number} passes before its time is up"))
            }
            Until::Pass if seen.asked.contains(&(wave, step)) => {
                seen.is_held.then(|| format!("step {number} passes, and nobody has answered"))
            }
            Until::Pass => {
                let members = seen.plan.waves[wave].instances.iter();
                let mut members = members.filter(|one| !seen.left_out.contains_key(*one));
                let unjudged = members.find(|instance| {
                    let (_, service) = self.site.place(instance);
                    let is_balanced = self.balancers_of(service).next().is_some();
                    let answers = seen.canary_answers.get(&service).copied().unwrap_or(0);
                    is_balanced && answers < self.scenario.requests_needed
                })?;
                Some(format!("step {number} passes, and {} was not judged", unjudged.service))
            }
        }
    }

    /// Whether it may come to nothing though nothing goes wrong: too few requests for a verdict in its time.
    pub(super) fn may_be_undecided(&self) -> bool {
        let Strategy::Canary(canary) = &self.scenario.strategy else { return false };
        canary.judging.on_inconclusive != OnInconclusive::Hold
    }

    /// A canary is proven when all of its steps have passed.
    pub(super) fn judge_canary_proven(&self, seen: &Seen, wave: usize) -> Option<String> {
        let steps = seen.plan.waves[wave].steps.len();
        let passed = seen.steps_passed.get(&wave).copied().unwrap_or(0);
        (passed < steps).then(|| {
            format!("wave {} is called proven, and {passed} of {steps} steps of its canary passed", wave + 1)
        })
    }

    /// Whatever a rollout leaves behind, it is no share of a canary.
    pub(super) fn judge_shares_left(&self, seen: &Seen, outcome: &Outcome) -> Option<String> {
        // One that is refused has changed nothing; one that is stuck leaves what is worse no more than it had.
        if matches!(outcome, Outcome::Stuck { .. } | Outcome::Refused { .. }) {
            return None;
        }
        self.balancers.iter().enumerate().find_map(|(index, balancer)| {
            let is_ours = seen.plan.targets.contains_key(&self.site.names[balancer.service]);
            let is_known = !self.is_balancer_cut(index) && !self.was_restarted_lately(index);
            (is_ours && is_known && balancer.lent.is_some())
                .then(|| format!("it has ended, and balancer {index} still gives a canary its share"))
        })
    }
}
