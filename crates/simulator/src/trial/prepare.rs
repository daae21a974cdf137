//! What a host does before a switch and after the rollout: checks, claims, bytes, trial starts, migrations, removals.

use std::collections::BTreeSet;

use greenlight_model::action::Blame;
use greenlight_model::host::{Claim, LedgerEvent, MigrationTrace};
use greenlight_model::id::{Generation, ReleaseId, RolloutId};
use greenlight_model::migration::MigrationPhase;

use super::agent::{Next, Refusal, STEP_MS, Task, refuse};
use super::ledger::is_current;
use super::scenario::Badness;
use super::site::{CLAIM_MS, stamp};
use super::trial::Trial;

impl Trial<'_> {
    pub(super) fn preflight(&mut self, task: &Task) -> Result<Next, Refusal> {
        if task.phase == 0 {
            return Ok(Next::After(30));
        }
        if self.is_disk_full(task.host) {
            return Err(refuse(Blame::Host, "disk: no space"));
        }
        Ok(Next::Ended(Ok(())))
    }

    pub(super) fn claim(
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

    pub(super) fn unclaim(&mut self, task: &Task, rollout: &RolloutId) -> Result<Next, Refusal> {
        self.update(task.host, task.service, |ledger| {
            if ledger.claim.as_ref().is_some_and(|claim| claim.rollout == *rollout) {
                ledger.claim = None;
            }
            Ok(())
        })?;
        Ok(Next::Ended(Ok(())))
    }

    pub(super) fn stage(
        &mut self,
        task: &Task,
        release: ReleaseId,
        rollout: &RolloutId,
    ) -> Result<Next, Refusal> {
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

    pub(super) fn smoke(&mut self, task: &Task, release: ReleaseId) -> Result<Next, Refusal> {
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

    pub(super) fn migrate(
        &mut self,
        task: &mut Task,
        release: ReleaseId,
        part: MigrationPhase,
        rollout: &RolloutId,
    ) -> Result<Next, Refusal> {
        let (host, service) = (task.host, task.service);
        let (begun, done) = match part {
            MigrationPhase::Expand => (LedgerEvent::MigrationBegun, LedgerEvent::Migrated),
            MigrationPhase::Contract => (LedgerEvent::ContractionBegun, LedgerEvent::Contracted),
        };
        match task.phase {
            0 => {
                self.check_claim(host, service, rollout)?;
                match self.hosts[host].instances[service].ledger.migration(release, part) {
                    Some(MigrationTrace::Done) => Ok(Next::Ended(Ok(()))),
                    Some(MigrationTrace::Begun) => Err(refuse(
                        Blame::Host,
                        "the migration was begun before, and how it ended is not known",
                    )),
                    Some(MigrationTrace::Failed)
                        if self.hosts[host].instances[service]
                            .ledger
                            .failed_migration(release, rollout)
                            .is_some() =>
                    {
                        Err(refuse(Blame::Release, "it failed before in this rollout"))
                    }
                    Some(MigrationTrace::Failed) | None => Ok(Next::After(STEP_MS)),
                }
            }
            1 => {
                let generation = self.hosts[host].instances[service].ledger.generation;
                self.note_or(host, service, begun, Some(release), generation)?;
                if !self.hosts[host].is_up {
                    return Ok(Next::Gone);
                }
                self.migration_begins(service, release, part, rollout);
                Ok(Next::After(self.numbers.between(200, 1_500)))
            }
            2 => {
                self.check.migration_done(service);
                Ok(Next::After(STEP_MS))
            }
            _ => {
                let generation = self.hosts[host].instances[service].ledger.generation;
                self.note_or(host, service, done, Some(release), generation)?;
                Ok(Next::Ended(Ok(())))
            }
        }
    }

    pub(super) fn prune(
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
}
