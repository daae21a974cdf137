//! What happens on hosts and at databases.

use greenlight_model::id::{ReleaseId, RolloutId};
use greenlight_model::migration::MigrationPhase;
use greenlight_model::rollout::Direction;

use super::super::site::of_release;
use super::super::trial::Trial;

impl Trial<'_> {
    /// A release is about to be removed.
    pub(in crate::trial) fn check_prune(&mut self, host: usize, service: usize, release: ReleaseId) {
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
    pub(in crate::trial) fn migration_begins(
        &mut self,
        service: usize,
        release: ReleaseId,
        part: MigrationPhase,
        rollout: &RolloutId,
    ) {
        let older = self.site.instances.iter().zip(&self.hosts).position(|(instances, host)| {
            instances[service].is_some()
                && host.instances[service].linked.is_some_and(|linked| linked != release)
        });
        if part == MigrationPhase::Contract
            && let Some(host) = older
        {
            self.violation("migration", |trial| {
                format!(
                    "older code may run on {}, and what it needs is taken away",
                    trial.place(host, service)
                )
            });
        }
        let database = &mut self.check.databases[service];
        let complaint = if database.running.is_some() {
            Some("beside another one")
        } else if database.done.contains(&(release, part)) {
            Some("a second time")
        } else if database.broken.contains(&(release, part)) {
            Some("again after an unknown end")
        } else if database.failed.contains(&(release, rollout.clone())) {
            Some("again after it failed in the same rollout")
        } else {
            None
        };
        database.running = Some((release, part, rollout.clone()));
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

    /// A release has been switched to, and is about to be started.
    pub(in crate::trial) fn check_schema(&mut self, host: usize, service: usize, release: ReleaseId) {
        let migrates = self.scenario.services[service].migrates;
        if migrates && !self.check.databases[service].fits.contains(&release) {
            let number = of_release(release).1;
            self.violation("schema", |trial| {
                format!(
                    "v{number} is switched to on {}, and its migration has not run",
                    trial.place(host, service)
                )
            });
        }
    }

    /// Two changes of one instance at once.
    pub(in crate::trial) fn check_alone(&mut self, task: &super::super::agent::Task) {
        let (host, service) = (task.host, task.service);
        let is_shared = self
            .tasks
            .values()
            .any(|other| (other.host, other.service) == (host, service) && other.is_changing());
        if is_shared {
            self.violation("lock", |trial| format!("two changes at once of {}", trial.place(host, service)));
        }
    }
}
