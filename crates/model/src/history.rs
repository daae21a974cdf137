//! The history: what all records together say, and the one function that folds them.
//!
//! Guarantees: [`History::apply`] judges live writes and replay alike; an illegal record is a typed error and changes
//! nothing.

use std::collections::BTreeMap;

use crate::Timestamp;
use crate::action::{Action, ActionResult, Blame, Verb};
use crate::charter::{Charter, Found};
use crate::check::Check;
use crate::decision::Running;
use crate::evidence::Recorded;
use crate::fleet::Service;
use crate::id::{EnvironmentName, ReleaseId, RolloutId, ServiceName};
use crate::journal::{Journal, Signature};
use crate::manifest::Release;
use crate::migration::{Loss, MigrationPhase};
use crate::record::{IllegalRecord, Record, RecordBody};
use crate::rollout::{
    Course, Direction, Failure, FormerMigration, Held, MigrationState, Note, OperatorRequest, Plan, Rollout,
};
use crate::world::InFlight;

/// Everything the records say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// The number of the last record.
    pub last_seq: u64,
    /// Every rollout, by id.
    pub rollouts: BTreeMap<RolloutId, Rollout>,
    /// What ran where when each ended rollout ended.
    pub running: BTreeMap<RolloutId, Running>,
    /// Ids in the order in which they started.
    pub order: Vec<RolloutId>,
    /// Why each bad release is bad.
    pub bad: BTreeMap<ReleaseId, String>,
    /// How each service was defined when its release last went to an environment.
    pub definitions: BTreeMap<(EnvironmentName, ReleaseId), Service>,
    /// The parts of each release's migration in each environment, where they ran or may have run.
    pub migrations: BTreeMap<(EnvironmentName, ReleaseId, MigrationPhase), FormerMigration>,
    /// Releases of adopted rollouts: the depot of this project need not have them.
    pub releases: BTreeMap<ReleaseId, Release>,
    /// All evidence, in the order in which it came.
    pub evidence: Vec<Recorded>,
    /// What people saw and have to do.
    pub journal: Journal,
}

impl History {
    /// Takes one more record.
    ///
    /// # Errors
    /// When it cannot follow; the history is unchanged then.
    pub fn apply(&mut self, record: &Record) -> Result<(), IllegalRecord> {
        if record.seq != self.last_seq + 1 {
            return Err(IllegalRecord::Sequence { last: self.last_seq, found: record.seq });
        }
        match &record.body {
            RecordBody::ReleaseMarked { release, bad } => {
                match bad {
                    Some(why) => self.bad.insert(*release, why.clone()),
                    None => self.bad.remove(release),
                };
            }
            RecordBody::RolloutStarted { plan, services } => {
                self.start(plan, record.at)?;
                for (name, service) in services {
                    if let Some(release) = plan.targets.get(name) {
                        self.definitions.insert((plan.environment.clone(), *release), service.clone());
                    }
                }
            }
            RecordBody::RolloutAdopted { charter, found } => self.adopt(charter, found, record.at)?,
            RecordBody::ActionStarted { rollout, action, .. } => {
                let open = self.open_mut(rollout)?;
                begin(open, action, record.at);
                self.migrates(rollout, action, None);
            }
            RecordBody::ActionFinished { rollout, action, result, detail, .. } => {
                let open = self.open_mut(rollout)?;
                finish(open, action, result, &detail.checks, record.at);
                self.migrates(rollout, action, Some(result));
            }
            RecordBody::Noted { rollout, note } => {
                turn(self.open_mut(rollout)?, note, record);
                if let Note::TurnBack { why, bad } = note {
                    self.bad.extend(bad.iter().map(|release| (*release, why.clone())));
                }
            }
            RecordBody::OperatorAsked { rollout, request, why } => {
                ask(self.open_mut(rollout)?, *request, why, record);
            }
            RecordBody::MigrationDone { rollout, service, phase, .. } => {
                let open = self.open_mut(rollout)?;
                open.migrations_mut(*phase).insert(service.clone(), MigrationState::Done);
                let plan = &open.plan;
                let on = plan.baseline.keys().find(|instance| instance.service == *service).cloned();
                if let Some((release, on)) = plan.targets.get(service).copied().zip(on) {
                    let key = (plan.environment.clone(), release, *phase);
                    self.migrations.insert(key, FormerMigration { on, is_done: true });
                }
            }
            RecordBody::DatabaseRestored { environment, why } => {
                let of_environment =
                    self.rollouts.values_mut().filter(|rollout| rollout.plan.environment == *environment);
                of_environment.for_each(|rollout| rollout.restored = Some(why.clone()));
            }
            RecordBody::Journal { entry } => {
                let signature = Signature { by: record.by.clone(), at: record.at };
                self.journal.apply(record.seq, entry, signature)?;
            }
            RecordBody::EvidenceAdded { evidence } => self.evidence.push(Recorded {
                seq: record.seq,
                at: record.at,
                by: record.by.clone(),
                evidence: evidence.clone(),
            }),
            RecordBody::RolloutEnded { rollout, outcome, running } => {
                let open = self.open_mut(rollout)?;
                open.outcome = Some(outcome.clone());
                open.ended_at = Some(record.at);
                self.running.insert(rollout.clone(), running.clone());
            }
        }
        self.last_seq = record.seq;
        Ok(())
    }

    /// What earlier rollouts have done of a part of the migrations of a plan.
    #[must_use]
    pub fn migrated_before(
        &self,
        plan: &Plan,
        phase: MigrationPhase,
    ) -> BTreeMap<ServiceName, FormerMigration> {
        let of_target = |(service, target): (&ServiceName, &ReleaseId)| {
            let former = self.migrations.get(&(plan.environment.clone(), *target, phase))?;
            Some((service.clone(), former.clone()))
        };
        plan.targets.iter().filter_map(of_target).collect()
    }

    /// A rollout of a plan as it begins, with what the records know of its migrations.
    #[must_use]
    pub fn begun(&self, plan: &Plan, at: Timestamp) -> Rollout {
        Rollout {
            migrated_before: self.migrated_before(plan, MigrationPhase::Expand),
            contracted_before: self.migrated_before(plan, MigrationPhase::Contract),
            ..Rollout::new(plan.clone(), at)
        }
    }

    /// Why a release cannot be gone back to with the code alone: since it last ran on the whole environment, a migration took
    /// away from the database what it may need. Says in which rollout, too.
    #[must_use]
    pub fn lost_since(
        &self,
        environment: &EnvironmentName,
        service: &ServiceName,
        release: ReleaseId,
    ) -> Option<(&RolloutId, &Loss)> {
        for rollout in self.of_environment(environment) {
            if rollout.is_whole() && rollout.plan.targets.get(service) == Some(&release) {
                return None;
            }
            if let Some(loss) = rollout.lost_of(service)
                && rollout.plan.targets.get(service) != Some(&release)
            {
                return Some((&rollout.plan.id, loss));
            }
        }
        None
    }

    /// The rollout of an environment that has not ended, if there is one.
    #[must_use]
    pub fn open_rollout(&self, environment: &EnvironmentName) -> Option<&Rollout> {
        self.of_environment(environment).find(|rollout| rollout.outcome.is_none())
    }

    /// The rollouts of an environment, latest first.
    pub fn of_environment<'a, 'b>(
        &'a self,
        environment: &'b EnvironmentName,
    ) -> impl Iterator<Item = &'a Rollout> + use<'a, 'b> {
        self.order
            .iter()
            .rev()
            .filter_map(|id| self.rollouts.get(id))
            .filter(move |rollout| rollout.plan.environment == *environment)
    }

    /// What an environment was last known to run when a rollout of this service had finished everywhere, none left out.
    #[must_use]
    pub fn current(&self, environment: &EnvironmentName, service: &ServiceName) -> Option<ReleaseId> {
        self.healthy(environment, service).next()
    }

    /// The releases that were healthy on the whole environment, latest first, each run of the same release once.
    pub fn healthy<'a>(
        &'a self,
        environment: &'a EnvironmentName,
        service: &'a ServiceName,
    ) -> impl Iterator<Item = ReleaseId> + 'a {
        let mut last = None;
        self.of_environment(environment).filter_map(move |rollout| {
            let target = rollout.plan.targets.get(service).copied().filter(|_| rollout.is_whole())?;
            (last.replace(target) != Some(target)).then_some(target)
        })
    }

    /// Where `rollback` without a release goes: the last release before the present one that was healthy on the whole
    /// environment and is not marked bad.
    #[must_use]
    pub fn way_back(
        &self,
        environment: &EnvironmentName,
        service: &ServiceName,
        present: Option<ReleaseId>,
    ) -> Option<ReleaseId> {
        // A rollback is itself a healthy run of an older release; going back again from there must lead further
        // back, never forth to what was just left. So the search starts below the run in which the present release
        // last went forward; where no record shows one, at the top.
        let runs: Vec<(ReleaseId, Direction)> = self
            .of_environment(environment)
            .filter(|rollout| rollout.is_whole())
            .filter_map(|rollout| Some((*rollout.plan.targets.get(service)?, rollout.plan.direction)))
            .collect();
        let below = runs
            .iter()
            .position(|(target, direction)| Some(*target) == present && *direction == Direction::Forward);
        runs[below.unwrap_or(0)..]
            .iter()
            .map(|(target, _)| *target)
            .find(|target| Some(*target) != present && !self.bad.contains_key(target))
            // Anything further back lacks it as well.
            .filter(|target| self.lost_since(environment, service, *target).is_none())
    }

    fn start(&mut self, plan: &Plan, at: Timestamp) -> Result<(), IllegalRecord> {
        if self.rollouts.contains_key(&plan.id) {
            return Err(IllegalRecord::StartedTwice(plan.id.clone()));
        }
        if let Some(open) = self.open_rollout(&plan.environment) {
            return Err(IllegalRecord::EnvironmentBusy {
                open: open.plan.id.clone(),
                environment: plan.environment.clone(),
            });
        }
        self.order.push(plan.id.clone());
        let rollout = self.begun(plan, at);
        self.rollouts.insert(plan.id.clone(), rollout);
        Ok(())
    }

    /// An action was begun, or has ended so: what is known of a migration now.
    fn migrates(&mut self, rollout: &RolloutId, action: &Action, result: Option<&ActionResult>) {
        let (Some(phase), Some(release)) = (action.migration_phase(), action.release()) else { return };
        let Some(rollout) = self.rollouts.get(rollout) else { return };
        let instance = action.instance();
        let key = (rollout.plan.environment.clone(), release, phase);
        let begun = |is_done: bool| Some(FormerMigration { on: instance.clone(), is_done });
        let known = match result {
            // What ran once has run.
            _ if self.migrations.get(&key).is_some_and(|former| former.is_done) => return,
            Some(ActionResult::Succeeded) => begun(true),
            Some(ActionResult::Failed { blame: Blame::Release, .. }) => None,
            // The host refused to begin it: what the rollout found known stays.
            Some(ActionResult::Failed { blame: Blame::Host, .. }) => {
                rollout.former_migrations(phase).get(&instance.service).cloned()
            }
            // No answer is no end.
            None | Some(ActionResult::Failed { blame: Blame::Passing, .. }) => begun(false),
        };
        match known {
            Some(known) => self.migrations.insert(key, known),
            None => self.migrations.remove(&key),
        };
    }

    fn adopt(&mut self, charter: &Charter, found: &Found, at: Timestamp) -> Result<(), IllegalRecord> {
        self.start(&charter.plan, charter.started_at)?;
        let environment = &charter.plan.environment;
        let definitions = charter.definitions.iter();
        self.definitions
            .extend(definitions.map(|(release, service)| ((environment.clone(), *release), service.clone())));
        self.releases.extend(charter.releases.iter().map(|(id, release)| (*id, release.clone())));
        let rollout = self.open_mut(&charter.plan.id)?;
        // Claims are taken when every check has passed, and without a claim it would not have been found.
        rollout.checked = charter.plan.baseline.keys().cloned().collect();
        rollout.touched.clone_from(&found.touched);
        rollout.drained_at = found.drained.iter().map(|instance| (instance.clone(), at)).collect();
        let begun = |service: &ServiceName| (service.clone(), MigrationState::Begun);
        rollout.migrations = found.migrating.iter().map(begun).collect();
        rollout.contractions = found.contracting.iter().map(begun).collect();
        if let Some(why) = &found.turning_back {
            turn_back(rollout, why.clone(), at);
        }
        Ok(())
    }

    fn open_mut(&mut self, id: &RolloutId) -> Result<&mut Rollout, IllegalRecord> {
        let rollout = self.rollouts.get_mut(id).ok_or_else(|| IllegalRecord::Unknown(id.clone()))?;
        if rollout.outcome.is_some() {
            return Err(IllegalRecord::Ended(id.clone()));
        }
        Ok(rollout)
    }
}

fn begin(rollout: &mut Rollout, action: &Action, at: Timestamp) {
    rollout.under_way.insert(action.instance().clone(), InFlight { action: action.clone(), since: at });
    match action {
        Action::Drain { instance } => {
            // A drain is begun only of what gets requests: its sessions get their time anew.
            rollout.drained_at.insert(instance.clone(), at);
        }
        Action::Migrate { instance, .. } => {
            rollout.migrations.insert(instance.service.clone(), MigrationState::Begun);
        }
        Action::Contract { instance, .. } => {
            rollout.contractions.insert(instance.service.clone(), MigrationState::Begun);
        }
        Action::Activate { instance, .. } | Action::Deactivate { instance, .. } => {
            rollout.touched.insert(instance.clone());
        }
        _ => {}
    }
}

fn finish(rollout: &mut Rollout, action: &Action, result: &ActionResult, checks: &[Check], at: Timestamp) {
    // An answer that comes after another action was begun there does not end that one.
    if rollout.under_way.get(action.instance()).is_some_and(|begun| begun.action == *action) {
        rollout.under_way.remove(action.instance());
    }
    if let ActionResult::Failed { why, blame } = result {
        if let Some(phase) = action.migration_phase() {
            let service = action.instance().service.clone();
            rollout.migrations_mut(phase).insert(service, MigrationState::Failed);
        }
        if is_of_former_course(rollout, action) {
            return;
        }
        rollout.failures.push(Failure { at, action: action.clone(), why: why.clone(), blame: *blame });
        return;
    }
    match action {
        Action::Preflight { instance, .. } => {
            rollout.checked.insert(instance.clone());
            let overridden = |check: &&Check| rollout.plan.override_of(&instance.host, &check.name).is_some();
            let compared = checks.iter().filter(|check| !overridden(check));
            let versions: BTreeMap<String, String> =
                compared.filter_map(|check| Some((check.name.clone(), check.version.clone()?))).collect();
            if !versions.is_empty() {
                rollout.versions.insert(instance.clone(), versions);
            }
        }
        Action::Smoke { instance, .. } => {
            rollout.smoked.insert(instance.clone());
        }
        Action::Migrate { instance, .. } => {
            rollout.migrations.insert(instance.service.clone(), MigrationState::Done);
        }
        Action::Contract { instance, .. } => {
            rollout.contractions.insert(instance.service.clone(), MigrationState::Done);
        }
        Action::Admit { instance } => {
            rollout.drained_at.remove(instance);
            rollout.admitted_at.insert(instance.clone(), at);
        }
        Action::Prune { instance, .. } => {
            rollout.pruned.insert(instance.clone());
        }
        Action::Activate { instance, .. } => {
            // What was not let in as it was has been started anew since.
            let is_admission =
                |failed: &Action| failed.verb() == Verb::Admit && failed.instance() == instance;
            rollout.failures.retain(|failure| !is_admission(&failure.action));
        }
        _ => {}
    }
}

/// Whether the action was begun before its instance turned back. What it ends with says nothing about the way back.
fn is_of_former_course(rollout: &Rollout, action: &Action) -> bool {
    let (release, generation) = rollout.desired(action.instance());
    let is_former = match action {
        Action::Activate { generation: begun, .. }
        | Action::Deactivate { generation: begun, .. }
        | Action::Confirm { generation: begun, .. } => *begun != generation,
        other => other.release().is_some_and(|begun| Some(begun) != release),
    };
    rollout.goes_back(action.instance()) && is_former
}

fn turn(rollout: &mut Rollout, note: &Note, record: &Record) {
    match note {
        Note::WaveProven { wave } => {
            rollout.waves_proven.insert(*wave, record.at);
        }
        Note::StepPassed { wave, step, .. } => {
            let canary = rollout.canaries.entry(*wave).or_default();
            canary.passed = canary.passed.max(step + 1);
            canary.passed_at = Some(record.at);
        }
        Note::Ask { wave, step, why } => {
            rollout.canaries.entry(*wave).or_default().asked = Some(*step);
            rollout.held = Some(Held { by: "greenlight".to_owned(), why: why.clone() });
        }
        Note::LeaveOut { instance, why } => {
            rollout.left_out.insert(instance.clone(), why.clone());
            // What failed on the way forward says nothing about the way back.
            rollout.failures.retain(|failure| failure.action.instance() != instance);
        }
        Note::TurnBack { why, .. } => turn_back(rollout, why.clone(), record.at),
        Note::Hold { why } => {
            rollout.held = Some(Held { by: "greenlight".to_owned(), why: why.clone() });
        }
    }
}

fn ask(rollout: &mut Rollout, request: OperatorRequest, why: &str, record: &Record) {
    match request {
        OperatorRequest::Hold => {
            rollout.held = Some(Held { by: record.by.clone(), why: why.to_owned() });
        }
        OperatorRequest::Resume => {
            rollout.held = None;
            // The person who resumes has looked at what failed and wants it tried again. A migration that ended with an
            // error before the first switch turned the rollout back; only what it does last is left to be tried again.
            rollout.failures.clear();
            rollout.contractions.retain(|_, state| *state != MigrationState::Failed);
        }
        OperatorRequest::Abort if rollout.lost().is_some() => {
            // It was asked before this was known, by somebody who was not told.
            let lost = rollout.lost().map(ToString::to_string).unwrap_or_default();
            let why = format!("{} wanted it aborted, but the code alone cannot go back: {lost}", record.by);
            rollout.held = Some(Held { by: "greenlight".to_owned(), why });
        }
        OperatorRequest::Abort => {
            let why = if why.is_empty() { String::new() } else { format!(": {why}") };
            turn_back(rollout, format!("aborted by {}{why}", record.by), record.at);
        }
    }
}

fn turn_back(rollout: &mut Rollout, why: String, at: Timestamp) {
    rollout.held = None;
    if !rollout.is_turning_back() {
        rollout.failures.clear();
        rollout.course = Course::TurningBack { why, since: at };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::ActionDetail;
    use crate::decision::Outcome;
    use crate::id::{Generation, Instance};

    fn release(n: u8) -> ReleaseId {
        ReleaseId::from_bytes([n; 32])
    }

    fn plan(id: &str, direction: Direction, target: u8) -> Plan {
        Plan {
            id: id.parse().unwrap(),
            environment: "production".parse().unwrap(),
            direction,
            targets: BTreeMap::from([("web".parse().unwrap(), release(target))]),
            baseline: BTreeMap::from([(Instance::new("a".parse().unwrap(), "web".parse().unwrap()), None)]),
            waves: Vec::new(),
            generation: Generation(1),
            started_by: "op@desk".to_owned(),
            digest: None,
            is_partial: false,
            overrides: BTreeMap::new(),
            losses: Vec::new(),
        }
    }

    #[derive(Default)]
    struct Log {
        history: History,
    }

    impl Log {
        fn write(&mut self, body: RecordBody) -> Result<(), IllegalRecord> {
            let seq = self.history.last_seq + 1;
            self.history.apply(&Record { seq, at: Timestamp::UNIX_EPOCH, by: "op@desk".to_owned(), body })
        }

        fn run(&mut self, direction: Direction, target: u8) {
            let id = format!("production-{}", self.history.order.len());
            self.write(RecordBody::RolloutStarted {
                plan: plan(&id, direction, target),
                services: BTreeMap::new(),
            })
            .unwrap();
            let outcome = Outcome::Done { left_out: BTreeMap::new() };
            let rollout = id.parse().unwrap();
            self.write(RecordBody::RolloutEnded { rollout, outcome, running: BTreeMap::new() }).unwrap();
        }

        fn way_back(&self, present: u8) -> Option<ReleaseId> {
            self.history.way_back(
                &"production".parse().unwrap(),
                &"web".parse().unwrap(),
                Some(release(present)),
            )
        }
    }

    #[test]
    fn the_way_back_leads_further_back_each_time() {
        let mut log = Log::default();
        for target in [1, 2, 3] {
            log.run(Direction::Forward, target);
        }
        assert_eq!(log.way_back(3), Some(release(2)));
        log.run(Direction::Back, 2);
        assert_eq!(log.way_back(2), Some(release(1)));
        log.run(Direction::Back, 1);
        assert_eq!(log.way_back(1), None);
        // A release that no record shows going forward: the last healthy one.
        assert_eq!(log.way_back(9), Some(release(1)));
    }

    #[test]
    fn a_bad_release_is_no_way_back() {
        let mut log = Log::default();
        for target in [1, 2, 3] {
            log.run(Direction::Forward, target);
        }
        log.write(RecordBody::ReleaseMarked { release: release(2), bad: Some("leaks".to_owned()) }).unwrap();
        assert_eq!(log.way_back(3), Some(release(1)));
        log.write(RecordBody::ReleaseMarked { release: release(2), bad: None }).unwrap();
        assert_eq!(log.way_back(3), Some(release(2)));
    }

    #[test]
    fn a_rollout_to_some_hosts_says_nothing_about_the_whole() {
        let mut log = Log::default();
        log.run(Direction::Forward, 1);
        log.run(Direction::Forward, 2);
        let mut some = plan("production-some", Direction::Back, 1);
        some.is_partial = true;
        log.write(RecordBody::RolloutStarted { plan: some, services: BTreeMap::new() }).unwrap();
        let outcome = Outcome::Done { left_out: BTreeMap::new() };
        let rollout = "production-some".parse().unwrap();
        log.write(RecordBody::RolloutEnded { rollout, outcome, running: BTreeMap::new() }).unwrap();
        let current = log.history.current(&"production".parse().unwrap(), &"web".parse().unwrap());
        assert_eq!(current, Some(release(2)));
    }

    #[test]
    fn what_was_begun_before_the_turn_says_nothing_about_the_way_back() {
        let mut log = Log::default();
        let plan = plan("one", Direction::Forward, 2);
        let rollout = plan.id.clone();
        let instance = Instance::new("a".parse().unwrap(), "web".parse().unwrap());
        let generation = plan.generation;
        log.write(RecordBody::RolloutStarted { plan, services: BTreeMap::new() }).unwrap();
        let turn =
            Note::TurnBack { why: "the other failed".to_owned(), bad: std::collections::BTreeSet::new() };
        log.write(RecordBody::Noted { rollout: rollout.clone(), note: turn }).unwrap();
        for (generation, counts) in [(generation, 0), (generation.next(), 1)] {
            let action = Action::Activate { instance: instance.clone(), release: release(2), generation };
            let result =
                ActionResult::Failed { why: "it crashed".to_owned(), blame: crate::action::Blame::Release };
            let detail = ActionDetail::default();
            log.write(RecordBody::ActionFinished { rollout: rollout.clone(), action, result, detail })
                .unwrap();
            assert_eq!(log.history.rollouts[&rollout].failures.len(), counts);
        }
    }

    #[test]
    fn the_log_knows_what_earlier_rollouts_migrated() {
        let mut log = Log::default();
        let mut number = 0;
        let mut migrated = |ends: Option<ActionResult>, is_settled: bool| {
            number += 1;
            let plan = plan(&format!("production-{number}"), Direction::Forward, 2);
            let rollout = plan.id.clone();
            let instance = Instance::new("a".parse().unwrap(), "web".parse().unwrap());
            let action = Action::Migrate { instance, release: release(2) };
            let before = log.history.migrated_before(&plan, MigrationPhase::Expand);
            let start = RecordBody::RolloutStarted { plan, services: BTreeMap::new() };
            log.write(start).unwrap();
            assert_eq!(log.history.rollouts[&rollout].migrated_before, before);
            let why = String::new();
            let (of, begun) = (rollout.clone(), action.clone());
            log.write(RecordBody::ActionStarted { rollout: of, action: begun, why: why.clone() }).unwrap();
            if let Some(result) = ends {
                let (rollout, detail) = (rollout.clone(), ActionDetail::default());
                log.write(RecordBody::ActionFinished { rollout, action, result, detail }).unwrap();
            }
            if is_settled {
                let (rollout, service) = (rollout.clone(), "web".parse().unwrap());
                let phase = MigrationPhase::Expand;
                log.write(RecordBody::MigrationDone { rollout, service, phase, why: why.clone() }).unwrap();
            }
            let (outcome, running) = (Outcome::TurnedBack { why }, BTreeMap::new());
            log.write(RecordBody::RolloutEnded { rollout, outcome, running }).unwrap();
            before.get(&"web".parse().unwrap()).map(|former| former.is_done)
        };
        let failed = |blame: Blame| Some(ActionResult::Failed { why: String::new(), blame });
        // Each answers with what was known before it.
        assert_eq!(migrated(None, false), None);
        assert_eq!(migrated(failed(Blame::Release), false), Some(false), "begun, and nothing more is known");
        assert_eq!(migrated(failed(Blame::Passing), false), None, "it ended with an error");
        assert_eq!(migrated(None, true), Some(false), "no answer is no end");
        assert_eq!(migrated(failed(Blame::Release), false), Some(true), "a person said that it is done");
        assert_eq!(migrated(Some(ActionResult::Succeeded), false), Some(true), "what ran has run");
    }

    #[test]
    fn illegal_records_change_nothing() {
        let mut log = Log::default();
        log.write(RecordBody::RolloutStarted {
            plan: plan("one", Direction::Forward, 1),
            services: BTreeMap::new(),
        })
        .unwrap();
        let before = log.history.clone();
        let again = log.write(RecordBody::RolloutStarted {
            plan: plan("two", Direction::Forward, 2),
            services: BTreeMap::new(),
        });
        assert!(matches!(again, Err(IllegalRecord::EnvironmentBusy { .. })), "{again:?}");
        let unknown = log.write(RecordBody::OperatorAsked {
            rollout: "none".parse().unwrap(),
            request: OperatorRequest::Hold,
            why: String::new(),
        });
        assert_eq!(unknown, Err(IllegalRecord::Unknown("none".parse().unwrap())));
        let gap = Record {
            seq: 7,
            at: Timestamp::UNIX_EPOCH,
            by: String::new(),
            body: RecordBody::ReleaseMarked { release: release(1), bad: None },
        };
        assert_eq!(log.history.apply(&gap), Err(IllegalRecord::Sequence { last: 1, found: 7 }));
        assert_eq!(log.history, before);
    }

    #[test]
    fn an_abort_wins_over_a_hold_and_turns_back_once() {
        let mut log = Log::default();
        log.write(RecordBody::RolloutStarted {
            plan: plan("one", Direction::Forward, 1),
            services: BTreeMap::new(),
        })
        .unwrap();
        for request in [OperatorRequest::Hold, OperatorRequest::Abort, OperatorRequest::Abort] {
            let rollout = "one".parse().unwrap();
            log.write(RecordBody::OperatorAsked { rollout, request, why: "errors".to_owned() }).unwrap();
        }
        let rollout = &log.history.rollouts[&"one".parse().unwrap()];
        assert_eq!(rollout.held, None);
        assert!(
            matches!(&rollout.course, Course::TurningBack { why, .. } if why == "aborted by op@desk: errors")
        );
    }

    /// The bytes of version 2, as they stand in logs that people have.
    #[test]
    fn version_2_is_still_read() {
        let body =
            r#"{"record":"migration_done","rollout":"production-1","service":"web","why":"somebody looked"}"#;
        let read: RecordBody = serde_json::from_str(body).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), body);
    }

    /// The bytes of version 1, as they stand in logs that people have.
    #[test]
    fn version_1_is_still_read() {
        let body = r#"{"record":"action_finished","rollout":"production-1","action":{"do":"activate","instance":"a/web","release":"0101010101010101010101010101010101010101010101010101010101010101","generation":4},"result":{"ended":"failed","why":"it does not run","blame":"release"},"detail":{"took_ms":12}}"#;
        let read: RecordBody = serde_json::from_str(body).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), body);
    }
}
