//! A rollout: what was asked for (the plan) and what has become of it, folded from records.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::action::{Action, Blame, Verb};
use crate::canary::{CanaryProgress, CanaryStep};
use crate::check::CheckPattern;
use crate::decision::Outcome;
use crate::id::{
    EnvironmentName, Generation, HostName, Instance, PlanDigest, ReleaseId, RolloutId, ServiceName,
};
use crate::migration::{Loss, MigrationPhase};
use crate::quantity::duration_ms;
use crate::world::InFlight;

/// What was asked for: fixed when the rollout starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which rollout.
    pub id: RolloutId,
    /// Where.
    pub environment: EnvironmentName,
    /// Forward or back.
    pub direction: Direction,
    /// The release each service is to run.
    pub targets: BTreeMap<ServiceName, ReleaseId>,
    /// What each instance ran when the plan was made, and goes back to.
    pub baseline: BTreeMap<Instance, Option<ReleaseId>>,
    /// The hosts that change together, in order. Every instance of the baseline is in exactly one.
    pub waves: Vec<Wave>,
    /// The generation of the way forward; turning back uses the next one.
    pub generation: Generation,
    /// Who asked: `user@machine`.
    pub started_by: String,
    /// What its preview showed; an approval binds to it.
    pub digest: Option<PlanDigest>,
    /// Whether hosts of the environment were left aside on purpose (`--host`): such a rollout says nothing about the
    /// whole environment.
    #[serde(default)]
    pub is_partial: bool,
    /// The checks that do not stop it though they fail, each with who asked's reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub overrides: BTreeMap<CheckPattern, String>,
    /// What its migrations take away from the database, as read from the releases when the plan was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub losses: Vec<Loss>,
}

impl Plan {
    /// Why a check on a host does not stop it, when somebody overrode that.
    #[must_use]
    pub fn override_of(&self, host: &HostName, check: &str) -> Option<&str> {
        let covering = self.overrides.iter().find(|(pattern, _)| pattern.covers(host, check));
        covering.map(|(_, reason)| reason.as_str())
    }
}

/// Forward to something new, or back to something that ran before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// `deploy`.
    Forward,
    /// `rollback`: no migration, no kept half, as many at once as the floor allows.
    Back,
}

/// The instances that change together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wave {
    /// Which.
    pub instances: BTreeSet<Instance>,
    /// Whether all of them must be proven before the first is admitted (blue-green).
    pub together: bool,
    /// How long the wave before this one must have been proven before this one begins (halves).
    #[serde(with = "duration_ms")]
    pub after: Duration,
    /// The shares of the traffic that it takes one after another once it is admitted, while it is judged; none where it takes
    /// its usual part at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<CanaryStep>,
}

/// A turn in the rollout's own course: recorded, then everything is decided anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "turn")]
pub enum Note {
    /// Every instance of the wave is proven and admitted.
    WaveProven {
        /// Its index in the plan, from 0.
        wave: usize,
    },
    /// A step of a canary is over: it gets its next share, or the wave is proven.
    StepPassed {
        /// The wave's index in the plan, from 0.
        wave: usize,
        /// The step's index, from 0.
        step: usize,
        /// What that rests on.
        why: String,
    },
    /// A step of a canary has had its time without a verdict: a person is asked, and the rollout held until then.
    Ask {
        /// The wave's index in the plan, from 0.
        wave: usize,
        /// The step's index, from 0.
        step: usize,
        /// What judging it has come to.
        why: String,
    },
    /// The instance failed; the budget allows to go on without it. It goes back to its baseline.
    LeaveOut {
        /// Which.
        instance: Instance,
        /// Why.
        why: String,
    },
    /// The budget is spent, or a step that all depend on failed: everything goes back.
    TurnBack {
        /// Why.
        why: String,
        /// Releases that look guilty and are marked bad.
        bad: BTreeSet<ReleaseId>,
    },
    /// The budget is spent and the environment asks to hold.
    Hold {
        /// Why.
        why: String,
    },
}

/// What an operator may ask of a running rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperatorRequest {
    /// Finish what is under way, begin nothing new.
    Hold,
    /// Go on.
    Resume,
    /// Go back. Wins over everything else.
    Abort,
}

/// Which way the rollout is going.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Course {
    /// To the targets.
    Forward,
    /// To the baseline.
    TurningBack {
        /// Why.
        why: String,
        /// Since when.
        since: Timestamp,
    },
}

/// A rollout as folded from its records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// What was asked for.
    pub plan: Plan,
    /// When it started.
    pub started_at: Timestamp,
    /// Which way it goes.
    pub course: Course,
    /// Who holds it and why, when somebody does.
    pub held: Option<Held>,
    /// Instances that passed their preflight.
    pub checked: BTreeSet<Instance>,
    /// What preflights found that every host of a service must have at the same version, by check.
    #[serde(default)]
    pub versions: BTreeMap<Instance, BTreeMap<String, String>>,
    /// Instances whose smoke start passed.
    pub smoked: BTreeSet<Instance>,
    /// Migrations that were begun, and whether they are done.
    pub migrations: BTreeMap<ServiceName, MigrationState>,
    /// What the records know of the same migrations from earlier rollouts: where they ran, or were begun without a known
    /// end. Hosts know it too, as far as they can be asked and still have their ledgers.
    pub migrated_before: BTreeMap<ServiceName, FormerMigration>,
    /// The same of what migrations do last, when nothing runs older code any more.
    #[serde(default)]
    pub contractions: BTreeMap<ServiceName, MigrationState>,
    /// And what the records know of these from earlier rollouts.
    #[serde(default)]
    pub contracted_before: BTreeMap<ServiceName, FormerMigration>,
    /// Why the database is as it was before its migrations, when a person said so.
    #[serde(default)]
    pub restored: Option<String>,
    /// Instances left out, with the reason.
    pub left_out: BTreeMap<Instance, String>,
    /// Failures of the present course, in order.
    pub failures: Vec<Failure>,
    /// When each instance was last told to drain, while it has not been admitted again.
    pub drained_at: BTreeMap<Instance, Timestamp>,
    /// When each instance was last admitted.
    pub admitted_at: BTreeMap<Instance, Timestamp>,
    /// Instances whose switch was begun in this rollout: only these have anything to turn back.
    pub touched: BTreeSet<Instance>,
    /// Actions that were begun and whose end was not recorded: under way while a controller drives the rollout, and else
    /// begun by one that died.
    pub under_way: BTreeMap<Instance, InFlight>,
    /// Instances that were pruned at the end.
    pub pruned: BTreeSet<Instance>,
    /// When each wave was proven, by index.
    pub waves_proven: BTreeMap<usize, Timestamp>,
    /// How far each canary wave is, by index; none for one that has not passed a step.
    pub canaries: BTreeMap<usize, CanaryProgress>,
    /// How it ended, when it has.
    pub outcome: Option<Outcome>,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// A hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Who.
    pub by: String,
    /// Why.
    pub why: String,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// Begun; whether it ended is not known.
    Begun,
    /// Done.
    Done,
    /// Failed.
    Failed,
}

/// A release's migration in an earlier rollout. One that ended with an error is none: it may be run again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerMigration {
    /// Where it was run.
    pub on: Instance,
    /// Whether it is known to have ended well; else how it ended is not known.
    pub is_done: bool,
}

/// An action that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// When.
    pub at: Timestamp,
    /// What.
    pub action: Action,
    /// Why.
    pub why: String,
    /// Whose fault it looks like.
    pub blame: Blame,
}

impl Rollout {
    /// Whether it brought its targets to every host of the environment.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.plan.is_partial
            && matches!(&self.outcome, Some(Outcome::Done { left_out }) if left_out.is_empty())
    }

    /// A rollout that has just started.
    #[must_use]
    pub fn new(plan: Plan, started_at: Timestamp) -> Self {
        Self {
            plan,
            started_at,
            course: Course::Forward,
            held: None,
            checked: BTreeSet::new(),
            versions: BTreeMap::new(),
            smoked: BTreeSet::new(),
            migrations: BTreeMap::new(),
            migrated_before: BTreeMap::new(),
            contractions: BTreeMap::new(),
            contracted_before: BTreeMap::new(),
            restored: None,
            left_out: BTreeMap::new(),
            failures: Vec::new(),
            drained_at: BTreeMap::new(),
            admitted_at: BTreeMap::new(),
            touched: BTreeSet::new(),
            under_way: BTreeMap::new(),
            pruned: BTreeSet::new(),
            waves_proven: BTreeMap::new(),
            canaries: BTreeMap::new(),
            outcome: None,
            ended_at: None,
        }
    }

    /// How far a part of each service's migration is.
    #[must_use]
    pub fn migrations(&self, phase: MigrationPhase) -> &BTreeMap<ServiceName, MigrationState> {
        match phase {
            MigrationPhase::Expand => &self.migrations,
            MigrationPhase::Contract => &self.contractions,
        }
    }

    /// The same, to be changed.
    pub(crate) fn migrations_mut(
        &mut self,
        phase: MigrationPhase,
    ) -> &mut BTreeMap<ServiceName, MigrationState> {
        match phase {
            MigrationPhase::Expand => &mut self.migrations,
            MigrationPhase::Contract => &mut self.contractions,
        }
    }

    /// What the records know of a part of each service's migration from earlier rollouts.
    #[must_use]
    pub fn former_migrations(&self, phase: MigrationPhase) -> &BTreeMap<ServiceName, FormerMigration> {
        match phase {
            MigrationPhase::Expand => &self.migrated_before,
            MigrationPhase::Contract => &self.contracted_before,
        }
    }

    /// What this rollout took away from the database and earlier code may need: from then on going back with the code alone
    /// is no way back. A migration that ended with an error took nothing away, as far as is known; one whose end is not known
    /// may have.
    #[must_use]
    pub fn lost(&self) -> Option<&Loss> {
        self.plan.losses.iter().find(|loss| self.has_lost(loss))
    }

    /// The same of one service.
    #[must_use]
    pub fn lost_of(&self, service: &ServiceName) -> Option<&Loss> {
        self.plan.losses.iter().find(|loss| loss.service == *service && self.has_lost(loss))
    }

    fn has_lost(&self, loss: &Loss) -> bool {
        let ran_here = matches!(
            self.migrations(loss.phase).get(&loss.service),
            Some(MigrationState::Begun | MigrationState::Done)
        );
        self.restored.is_none()
            && (ran_here || self.former_migrations(loss.phase).contains_key(&loss.service))
    }

    /// What the instance is to run now and under which generation: its target, or its baseline when it was left out or
    /// the rollout turns back.
    #[must_use]
    pub fn desired(&self, instance: &Instance) -> (Option<ReleaseId>, Generation) {
        if self.goes_back(instance) {
            (self.plan.baseline.get(instance).copied().flatten(), self.plan.generation.next())
        } else {
            (self.plan.targets.get(&instance.service).copied(), self.plan.generation)
        }
    }

    /// Whether the instance is on its way back to its baseline.
    #[must_use]
    pub fn goes_back(&self, instance: &Instance) -> bool {
        self.is_turning_back() || self.left_out.contains_key(instance)
    }

    /// Whether the whole rollout turns back.
    #[must_use]
    pub fn is_turning_back(&self) -> bool {
        matches!(self.course, Course::TurningBack { .. })
    }

    /// The canary that is judged now, by the index of its wave: the first wave that is not proven, when it has shares of the
    /// traffic to take and the rollout goes forward.
    #[must_use]
    pub fn open_canary(&self) -> Option<usize> {
        let proven = &self.waves_proven;
        let wave = (0..self.plan.waves.len()).find(|wave| !proven.contains_key(wave))?;
        let is_canary = !self.plan.waves.get(wave)?.steps.is_empty();
        (is_canary && !self.is_turning_back()).then_some(wave)
    }

    /// The step that a canary is at, and its index; none when all are over.
    #[must_use]
    pub fn canary_step(&self, wave: usize) -> Option<(usize, CanaryStep)> {
        let passed = self.canaries.get(&wave).map_or(0, |canary| canary.passed);
        Some((passed, *self.plan.waves.get(wave)?.steps.get(passed)?))
    }

    /// Whether every member of a wave that is behind a balancer, left-out ones aside, was let in with its target, or had it
    /// before and was left as it was.
    #[must_use]
    pub fn is_let_in(&self, wave: usize, is_balanced: impl Fn(&ServiceName) -> bool) -> bool {
        let members = self.plan.waves.get(wave).into_iter().flat_map(|wave| &wave.instances);
        let mut balanced =
            members.filter(|one| is_balanced(&one.service) && !self.left_out.contains_key(*one));
        balanced.all(|one| {
            let had_it = self.plan.baseline.get(one).copied().flatten()
                == self.plan.targets.get(&one.service).copied();
            let was_let_in = self.admitted_at.contains_key(one) || had_it && !self.touched.contains(one);
            was_let_in && !self.drained_at.contains_key(one)
        })
    }

    /// How often this kind of action failed on this instance in its present direction.
    #[must_use]
    pub fn failures_of(&self, instance: &Instance, verb: Verb) -> usize {
        self.failures.iter().filter(|f| f.action.instance() == instance && f.action.verb() == verb).count()
    }

    /// The hosts of a wave, in name order.
    #[must_use]
    pub fn hosts(&self) -> BTreeSet<&HostName> {
        self.plan.baseline.keys().map(|instance| &instance.host).collect()
    }
}
