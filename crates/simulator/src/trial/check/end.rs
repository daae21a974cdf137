//! How rollouts end, and what they leave behind.

use greenlight_model::decision::Outcome;
use greenlight_model::id::RolloutId;
use greenlight_model::traffic::Admission;

use super::super::ledger::is_claim_current;
use super::super::scenario::FaultKind;
use super::super::trial::Trial;

impl Trial<'_> {
    pub(super) fn ended(&mut self, rollout: &RolloutId, outcome: &Outcome) {
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
        if let Some(what) = self.judge_shares_left(seen, outcome) {
            return Some(what);
        }
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
    pub(in crate::trial) fn check_end(&mut self) {
        if self.scenario.faults.is_empty() {
            let ends: Vec<&str> = self.report.outcomes.keys().copied().collect();
            if !matches!(ends.as_slice(), [] | ["done"] | ["refused"]) && !self.may_be_undecided() {
                self.violation("no fault", |_| format!("nothing went wrong, and it ended {ends:?}"));
            }
        }
        for host in 0..self.hosts.len() {
            for service in 0..self.scenario.services.len() {
                let truth = &self.hosts[host].instances[service];
                let Some(claim) = &truth.ledger.claim else { continue };
                let is_ended =
                    self.history.rollouts.get(&claim.rollout).is_some_and(|one| one.outcome.is_some());
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
    pub(in crate::trial) fn check_waits(&mut self) {
        if self.scenario.faults.is_empty() {
            self.violation("no fault", |trial| format!("it does not end: {}", trial.why_not_ended()));
        }
    }

    pub(in crate::trial) fn why_not_ended(&self) -> String {
        let waits =
            self.controllers.iter().rev().find(|one| one.is_alive).map(|one| format!("{:?}", one.waits()));
        waits.unwrap_or_else(|| "nobody drives it".to_owned())
    }
}
