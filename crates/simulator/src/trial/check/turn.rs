//! The turns that a rollout takes: waves called proven, hosts left out, holds.

use std::collections::BTreeSet;

use greenlight_model::action::{ActionResult, Blame};
use greenlight_model::host::LedgerEvent;
use greenlight_model::id::{Instance, RolloutId};
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::Note;

use super::super::trial::Trial;
use super::turn_back;

impl Trial<'_> {
    pub(super) fn noted(&mut self, rollout: &RolloutId, note: &Note) {
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
                let complaint =
                    self.check.rollouts.get(rollout).and_then(|seen| self.judge_canary_proven(seen, *wave));
                if let Some(what) = complaint {
                    self.violation("verdict", |_| what);
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
            Note::StepPassed { wave, step, .. } => self.step_passed(rollout, *wave, *step),
            Note::Ask { wave, step, .. } => {
                if let Some(seen) = self.check.rollouts.get_mut(rollout) {
                    seen.is_held = true;
                    seen.asked.insert((*wave, *step));
                }
            }
            Note::Hold { why } => {
                let begun = [LedgerEvent::MigrationBegun, LedgerEvent::ContractionBegun];
                let is_known_to_a_host = || {
                    self.hosts
                        .iter()
                        .flat_map(|host| &host.instances)
                        .any(|truth| truth.ledger.history.iter().any(|entry| begun.contains(&entry.event)))
                };
                if why.contains("migration of")
                    && why.contains("is not known")
                    && !self.is_a_migration_unanswered()
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

    /// Whether the log has the beginning of a migration, and no answer about its end.
    fn is_a_migration_unanswered(&self) -> bool {
        self.log.iter().enumerate().any(|(place, record)| {
            let RecordBody::ActionStarted { action: begun, .. } = &record.body else { return false };
            let is_answer = |later: &Record| {
                let RecordBody::ActionFinished { action, result, .. } = &later.body else { return false };
                let is_silence = matches!(result, ActionResult::Failed { blame: Blame::Passing, .. });
                action == begun && !is_silence
            };
            begun.migration_phase().is_some() && !self.log[place..].iter().any(is_answer)
        })
    }

    /// Without any fault nothing fails.
    fn check_excuse(&mut self, what: &str) {
        if self.scenario.faults.is_empty() && !self.may_be_undecided() {
            self.violation("no fault", |_| format!("{what}, and nothing went wrong"));
        }
    }
}
