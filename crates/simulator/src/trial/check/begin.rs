//! What is begun: in which order, when, and with what.

use greenlight_model::action::{Action, Verb};
use greenlight_model::host::LedgerEvent;
use greenlight_model::id::{Instance, RolloutId};

use super::super::ledger::is_claim_current;
use super::super::scenario::Ms;
use super::super::site::of_release;
use super::super::trial::Trial;
use super::Seen;

impl Trial<'_> {
    pub(super) fn action_started(&mut self, rollout: &RolloutId, action: &Action) {
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
            Action::Migrate { .. } | Action::Contract { .. } => true,
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
        if verb == Verb::Admit && !seen.goes_back(instance) {
            let complaint = self.judge_together(seen, instance);
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

    /// Something was begun by a controller that had been told otherwise, and what it had been told is true.
    pub(in crate::trial) fn check_told(&mut self, index: usize, action: &Action) {
        let complaint = self.judge_told(index, action);
        if let Some((checker, what)) = complaint {
            self.violation(checker, |_| what);
        }
    }

    fn judge_told(&self, index: usize, action: &Action) -> Option<(&'static str, String)> {
        let controller = &self.controllers[index];
        let seen = self.check.rollouts.get(&controller.rollout)?;
        let (instance, verb) = (action.instance(), action.verb());
        let (host, service) = self.site.place(instance);
        let told = controller.world.inventory.get(&instance.host)?;
        let is_out_of_reach = !self.hosts[host].is_up || self.is_cut(host, true) || self.is_cut(host, false);
        // Balancers are reached without the host. What was not switched still is what it was.
        let needs_host = match verb {
            Verb::Drain | Verb::Share => false,
            Verb::Admit => seen.touched.contains(instance),
            _ => true,
        };
        if needs_host && told.unreachable.is_some() && is_out_of_reach {
            return Some(("reach", format!("{verb} of {instance} was begun, and its host is out of reach")));
        }
        let truth = &self.hosts[host].instances[service];
        let (_, report) = told.report.as_ref()?;
        let report = report.instances.get(&instance.service)?;
        let rollout = &controller.rollout;
        let is_held = truth.ledger.claim.as_ref().is_some_and(|claim| {
            let is_told = report.ledger.claim.as_ref().is_some_and(|told| told.rollout == claim.rollout);
            claim.rollout != *rollout && is_claim_current(claim, self.host_ms(host)) && is_told
        });
        if is_held && !matches!(verb, Verb::Preflight | Verb::Unclaim) {
            return Some(("claims", format!("{verb} of {instance} was begun, which somebody else holds")));
        }
        if let Action::Activate { release, generation, .. } = action {
            if !truth.staged.contains(release) && !report.staged.contains(release) {
                let number = of_release(*release).1;
                return Some((
                    "staged",
                    format!("v{number} is activated on {instance}, where it is not complete"),
                ));
            }
            let told_times = report
                .ledger
                .history
                .iter()
                .filter(|entry| entry.event == LedgerEvent::TurnedBack && entry.generation == *generation)
                .count();
            let true_times = if truth.gone_back.0 == *generation { truth.gone_back.1 } else { 0 };
            let times = true_times.min(u32::try_from(told_times).unwrap_or(u32::MAX));
            if times > self.scenario.retries {
                return Some((
                    "goes back",
                    format!("{instance} is switched again, and its host went back by itself {times} times"),
                ));
            }
        }
        None
    }

    /// A wave that goes together is let in when all of it is proven.
    fn judge_together(&self, seen: &Seen, instance: &Instance) -> Option<(&'static str, String)> {
        let wave = seen.plan.waves.iter().find(|wave| wave.together && wave.instances.contains(instance))?;
        let is_behind = |other: &&Instance| {
            let (host, service) = self.site.place(other);
            let has_process = self.scenario.services[service].has_process;
            let target = seen.plan.targets.get(&other.service);
            let truth = &self.hosts[host].instances[service];
            !seen.goes_back(other)
                && target.is_some_and(|target| !truth.proves(*target, has_process))
                && !self.is_beyond_us(host, service)
        };
        let other = wave.instances.iter().find(is_behind)?;
        Some(("together", format!("{instance} is let in before {other} of its wave is proven")))
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
}
