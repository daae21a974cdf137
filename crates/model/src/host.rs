//! What a host is told and what it reports: the instance's full desired state, its ledger, its processes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::fleet::{ManagerKind, Process};
use crate::id::{
    ContentHash, EnvironmentName, Generation, HostName, ProcessName, ReleaseId, RolloutId, ServiceName,
};
use crate::id::{ProfileName, VariableName};
use crate::migration::MigrationPhase;
use crate::quantity::duration_ms;

/// Everything a host must know of one service: how it is laid out and run there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// The service.
    pub service: ServiceName,
    /// The environment the host belongs to.
    pub environment: EnvironmentName,
    /// The host's name in the fleet file.
    pub host: HostName,
    /// The service's directory on the host (`/srv/web`).
    pub root: String,
    /// What runs the processes.
    pub manager: ManagerKind,
    /// Files and directories that outlive releases.
    pub shared: Vec<String>,
    /// Steps after placing and before switching.
    pub prepare: Vec<String>,
    /// What runs; ports and variables already those of this host.
    pub processes: BTreeMap<ProcessName, Process>,
    /// The profile each process runs under, where it is not the normal one.
    pub profiles: BTreeMap<ProcessName, ProfileName>,
    /// The names of the secrets that the processes read. Values travel apart.
    pub secrets: BTreeSet<VariableName>,
}

/// A release as a host needs to recognise it in a process's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseMark {
    /// Its id.
    pub id: ReleaseId,
    /// Its label.
    pub label: String,
    /// Its commit.
    pub commit: String,
}

/// What a host is told to be: sent whole, never as a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// The number that fences.
    pub generation: Generation,
    /// The rollout that wants it.
    pub rollout: RolloutId,
    /// The release to run; none takes the service off the host.
    pub release: Option<ReleaseMark>,
    /// How to run it.
    pub spec: InstanceSpec,
}

/// The version of the ledger's form that this build writes.
pub const LEDGER_VERSION: u32 = 2;
/// Most history entries a ledger keeps; the oldest go first.
pub const LEDGER_HISTORY_MAX: usize = 100;

/// What a host remembers of one service, written by write, fsync and rename.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The form's version.
    pub version: u32,
    /// The highest generation seen.
    pub generation: Generation,
    /// The hash of what was desired in that generation: the same generation with other content is refused.
    pub content: Option<ContentHash>,
    /// The rollout of that generation.
    pub rollout: Option<RolloutId>,
    /// The release that was switched to last.
    pub active: Option<ReleaseId>,
    /// The release before it.
    pub previous: Option<ReleaseId>,
    /// The release that was last confirmed as healthy.
    pub last_good: Option<ReleaseId>,
    /// The generation whose activation was confirmed.
    pub confirmed: Option<Generation>,
    /// Who may change this instance now.
    pub claim: Option<Claim>,
    /// What goes back by itself, while an activation is not confirmed.
    #[serde(default)]
    pub guard: Option<Guard>,
    /// What happened here, oldest first.
    pub history: Vec<LedgerEntry>,
}

/// An instance's lease to one rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The rollout.
    pub rollout: RolloutId,
    /// Who started it: `user@machine`.
    pub holder: String,
    /// Why, for the second comer: "deploy web v42 to production".
    pub reason: String,
    /// When it ends unless renewed: in a ledger by the host's clock, in a world by the controller's.
    pub expires_at: Timestamp,
}

impl Ledger {
    /// That the host went back by itself from what this generation brought, when nothing was switched since.
    #[must_use]
    pub fn went_back(&self) -> Option<&LedgerEntry> {
        let mut switches = self.history.iter().rev().filter(|entry| {
            matches!(entry.event, LedgerEvent::Switched | LedgerEvent::Deactivated | LedgerEvent::TurnedBack)
        });
        switches
            .next()
            .filter(|last| last.event == LedgerEvent::TurnedBack && last.generation == self.generation)
    }

    /// How often the host went back by itself under a generation.
    #[must_use]
    pub fn times_gone_back(&self, generation: Generation) -> usize {
        let of_generation = self.history.iter().filter(|entry| entry.generation == generation);
        of_generation.filter(|entry| entry.event == LedgerEvent::TurnedBack).count()
    }

    /// What is known of a part of the migration of a release here; none when it was never begun.
    #[must_use]
    pub fn migration(&self, release: ReleaseId, phase: MigrationPhase) -> Option<MigrationTrace> {
        self.migrations(release, phase).next().map(|(trace, _)| trace)
    }

    /// How the migration of a release failed here before the first switch when it ran last, if that was for this rollout.
    #[must_use]
    pub fn failed_migration(&self, release: ReleaseId, rollout: &RolloutId) -> Option<&LedgerEntry> {
        let mut latest_first = self.migrations(release, MigrationPhase::Expand);
        let (_, failed) = latest_first.next().filter(|(trace, _)| *trace == MigrationTrace::Failed)?;
        let (_, begun) = latest_first.next()?;
        (begun.rollout.as_ref() == Some(rollout)).then_some(failed)
    }

    /// What is known of a part of the migration of a release, latest first.
    fn migrations(
        &self,
        release: ReleaseId,
        phase: MigrationPhase,
    ) -> impl Iterator<Item = (MigrationTrace, &LedgerEntry)> {
        let of_release = self.history.iter().rev().filter(move |entry| entry.release == Some(release));
        of_release.filter_map(move |entry| {
            let trace = match (phase, entry.event) {
                (MigrationPhase::Expand, LedgerEvent::Migrated)
                | (MigrationPhase::Contract, LedgerEvent::Contracted) => MigrationTrace::Done,
                (MigrationPhase::Expand, LedgerEvent::MigrationFailed)
                | (MigrationPhase::Contract, LedgerEvent::ContractionFailed) => MigrationTrace::Failed,
                (MigrationPhase::Expand, LedgerEvent::MigrationBegun)
                | (MigrationPhase::Contract, LedgerEvent::ContractionBegun) => MigrationTrace::Begun,
                _ => return None,
            };
            Some((trace, entry))
        })
    }
}

/// What a ledger knows of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationTrace {
    /// It was begun, and how it ended is not known.
    Begun,
    /// It ran.
    Done,
    /// It ended with an error.
    Failed,
}

/// The host's own timer that goes back unless the activation is confirmed in time. It runs on the monotonic clock, and not
/// beyond the machine's boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guard {
    /// The activation that it guards.
    pub generation: Generation,
    /// What it goes back to; none takes the service off the host.
    pub back_to: Option<ReleaseId>,
    /// How long after it was armed it goes back.
    #[serde(with = "duration_ms")]
    pub limit: Duration,
    /// When that is, by the host's clock as it was then. For people.
    pub fires_at: Timestamp,
    /// The boot of the machine in which it was armed.
    pub boot: String,
    /// When it was armed, in milliseconds since that boot. Tells its timer from any other of the same activation.
    pub armed_at_ms: u64,
    /// Why its time began anew, when its timer was gone and was started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rearmed: Option<String>,
    /// Why it will not go back any more, when its timer is gone. Found by whoever looks, never stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

/// One thing that happened on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// When, by the host's clock.
    pub at: Timestamp,
    /// What.
    pub event: LedgerEvent,
    /// The release it was about.
    pub release: Option<ReleaseId>,
    /// The generation it belonged to.
    pub generation: Generation,
    /// The rollout that held the claim then, when one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutId>,
    /// More about it, in words.
    pub detail: String,
}

/// Kinds of things that happen on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LedgerEvent {
    /// The bytes of a release are complete and prepared.
    Staged,
    /// The link was switched.
    Switched,
    /// All processes answered as the release.
    Proven,
    /// The activation failed.
    Failed,
    /// The controller confirmed the release.
    Confirmed,
    /// The host went back by itself.
    TurnedBack,
    /// The service was taken off the host.
    Deactivated,
    /// The migration is about to run. Without one of the two below after it, how it ended is not known.
    MigrationBegun,
    /// The migration ran.
    Migrated,
    /// The migration ended with an error.
    MigrationFailed,
    /// What the migration does last is about to run.
    ContractionBegun,
    /// What the migration does last ran.
    Contracted,
    /// What the migration does last ended with an error.
    ContractionFailed,
    /// Releases were removed.
    Pruned,
}

/// What a host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Facts about the machine.
    pub facts: HostFacts,
    /// Each service asked for.
    pub instances: BTreeMap<ServiceName, InstanceReport>,
}

/// Facts about a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The name it calls itself.
    pub hostname: String,
    /// Its operating system, as `/etc/os-release` names it.
    pub os: String,
    /// Its architecture, as `uname -m` prints it.
    pub architecture: String,
    /// Its machine id, when it has one.
    pub machine_id: Option<String>,
    /// The account the agent works under.
    pub user: String,
    /// Whether that is root.
    pub is_root: bool,
    /// What runs processes there, best first.
    pub managers: Vec<ManagerKind>,
    /// The agent's version.
    pub agent_version: String,
}

/// What one service is on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceReport {
    /// What the host remembers.
    pub ledger: Ledger,
    /// Where the `current` link points now.
    pub linked: Option<ReleaseId>,
    /// Releases whose bytes are complete and prepared.
    pub staged: BTreeSet<ReleaseId>,
    /// Each process.
    pub processes: BTreeMap<ProcessName, ProcessReport>,
    /// Free bytes on the file system of the service's root.
    pub disk_free_bytes: u64,
}

impl InstanceReport {
    /// The release that every process proves to run, when they agree, live and are healthy. A service without
    /// processes (configuration) proves by its link alone.
    #[must_use]
    pub fn proven(&self) -> Option<ReleaseId> {
        let linked = self.linked?;
        self.processes.values().all(|process| process.proves(linked)).then_some(linked)
    }

    /// Whether any process runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.processes.values().any(|process| matches!(process.state, ProcessState::Running { .. }))
    }

    /// The first reason why the instance does not prove `release`, in words.
    #[must_use]
    pub fn why_not_proven(&self, release: ReleaseId) -> Option<String> {
        match self.linked {
            None => return Some("no release is switched to".to_owned()),
            Some(linked) if linked != release => {
                return Some(format!("it is switched to {}", linked.short()));
            }
            Some(_) => {}
        }
        self.processes.iter().find(|(_, process)| !process.proves(release)).map(|(name, process)| {
            let why = match (&process.state, &process.answer) {
                (ProcessState::Stopped, _) => "it does not run".to_owned(),
                (ProcessState::Failed { why }, _) => why.clone(),
                (ProcessState::Running { .. }, Answer::Release { release, .. }) => {
                    format!("it answers as {}", release.short())
                }
                (ProcessState::Running { .. }, Answer::Other { said }) => format!("it answers as `{said}`"),
                (ProcessState::Running { .. }, Answer::None { why }) => why.clone(),
            };
            format!("process {name}: {why}")
        })
    }
}

/// What one process is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessReport {
    /// Whether it lives.
    pub state: ProcessState,
    /// Which release it answers as.
    pub answer: Answer,
    /// The profile it runs under, where it is not the normal one.
    pub profile: Option<ProfileName>,
}

impl ProcessReport {
    fn proves(&self, expected: ReleaseId) -> bool {
        matches!(self.state, ProcessState::Running { .. })
            && matches!(self.answer, Answer::Release { release, .. } if release == expected)
    }
}

/// Whether a process lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum ProcessState {
    /// It lives.
    Running {
        /// Its process id.
        pid: u32,
        /// When it was started.
        started_at: Timestamp,
    },
    /// It does not, as was asked.
    Stopped,
    /// It should and does not.
    Failed {
        /// How it ended, with the last lines of its standard error where there are some.
        why: String,
    },
}

/// Which release a process answers as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "as")]
pub enum Answer {
    /// It proves to be this release, and is healthy.
    Release {
        /// Which.
        release: ReleaseId,
        /// By what: "version endpoint" or "working directory".
        proof: String,
    },
    /// Its version endpoint named something else.
    Other {
        /// What it said, cut at 200 characters.
        said: String,
    },
    /// Nothing usable: not running, not healthy, no answer.
    None {
        /// Why.
        why: String,
    },
}

/// A wish to claim an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRequest {
    /// The rollout.
    pub rollout: RolloutId,
    /// Who: `user@machine`.
    pub holder: String,
    /// Why.
    pub reason: String,
    /// For how long from now, by the host's clock.
    #[serde(with = "duration_ms")]
    pub duration: Duration,
    /// The generation the rollout will use: the host refuses one that is not above its own, or not the rollout's.
    pub generation: Generation,
}
