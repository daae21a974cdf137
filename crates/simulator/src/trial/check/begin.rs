//! What is begun: in which order, when, and with what.

use greenlight_model::action::{Action, Verb};
use greenlight_model::id::{Instance, RolloutId};

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
}
