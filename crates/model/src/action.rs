//! What can be done: the verbs that the planner proposes, the interlock permits and the controller performs.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::check::Check;
use crate::id::{Generation, HostName, Instance, ReleaseId};
use crate::migration::MigrationPhase;
use crate::quantity::Percent;

/// One thing to do. Every action can be repeated: doing it again when it is done changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Action {
    /// Check that the instance could take the release; changes nothing.
    Preflight {
        /// Where.
        instance: Instance,
        /// For which release.
        release: ReleaseId,
    },
    /// Take the instance's lease for this rollout.
    Claim {
        /// Which.
        instance: Instance,
    },
    /// Bring the release's bytes there and prepare them.
    Stage {
        /// Where.
        instance: Instance,
        /// What.
        release: ReleaseId,
    },
    /// Start the staged release on its smoke port and stop it again; the live process is not touched.
    Smoke {
        /// Where.
        instance: Instance,
        /// What.
        release: ReleaseId,
    },
    /// Run the release's migration from this instance.
    Migrate {
        /// From where.
        instance: Instance,
        /// Which release's.
        release: ReleaseId,
    },
    /// Run what the release's migration does last, from this instance: when nothing runs older code any more.
    Contract {
        /// From where.
        instance: Instance,
        /// Which release's.
        release: ReleaseId,
    },
    /// Take the instance out of traffic: no new requests.
    Drain {
        /// Which.
        instance: Instance,
    },
    /// Switch to the release, restart, and wait until it answers as the release.
    Activate {
        /// Where.
        instance: Instance,
        /// What.
        release: ReleaseId,
        /// The number that fences.
        generation: Generation,
    },
    /// Take the service off the host: it had no release before.
    Deactivate {
        /// Where.
        instance: Instance,
        /// The number that fences.
        generation: Generation,
    },
    /// Confirm over a fresh connection that the release is proven there.
    Confirm {
        /// Where.
        instance: Instance,
        /// What.
        release: ReleaseId,
        /// The activation's number.
        generation: Generation,
    },
    /// Let the instance back into traffic.
    Admit {
        /// Which.
        instance: Instance,
    },
    /// Set what the canary of the instance's service gets of the traffic, in every balancer of the service at once. Nothing
    /// goes in or out of traffic by it.
    Share {
        /// On whose behalf: one of the canary's, or another one of its service.
        instance: Instance,
        /// The canary's hosts.
        canaries: BTreeSet<HostName>,
        /// The share of all of them together; none ends the canary: every server has its usual weight.
        share: Option<Percent>,
    },
    /// Remove releases that nothing needs any more.
    Prune {
        /// Where.
        instance: Instance,
        /// What stays, whatever else the host knows.
        keep: BTreeSet<ReleaseId>,
    },
    /// Give the lease back.
    Unclaim {
        /// Which.
        instance: Instance,
    },
}

impl Action {
    /// Which part of a migration it runs, when it runs one.
    #[must_use]
    pub fn migration_phase(&self) -> Option<MigrationPhase> {
        match self {
            Self::Migrate { .. } => Some(MigrationPhase::Expand),
            Self::Contract { .. } => Some(MigrationPhase::Contract),
            _ => None,
        }
    }

    /// The instance it is about.
    #[must_use]
    pub fn instance(&self) -> &Instance {
        match self {
            Self::Preflight { instance, .. }
            | Self::Claim { instance }
            | Self::Stage { instance, .. }
            | Self::Smoke { instance, .. }
            | Self::Migrate { instance, .. }
            | Self::Contract { instance, .. }
            | Self::Drain { instance }
            | Self::Activate { instance, .. }
            | Self::Deactivate { instance, .. }
            | Self::Confirm { instance, .. }
            | Self::Admit { instance }
            | Self::Share { instance, .. }
            | Self::Prune { instance, .. }
            | Self::Unclaim { instance } => instance,
        }
    }

    /// The host it is about.
    #[must_use]
    pub fn host(&self) -> &HostName {
        &self.instance().host
    }

    /// The release it is about, when it is about one.
    #[must_use]
    pub fn release(&self) -> Option<ReleaseId> {
        match self {
            Self::Preflight { release, .. }
            | Self::Stage { release, .. }
            | Self::Smoke { release, .. }
            | Self::Migrate { release, .. }
            | Self::Contract { release, .. }
            | Self::Activate { release, .. }
            | Self::Confirm { release, .. } => Some(*release),
            Self::Claim { .. }
            | Self::Drain { .. }
            | Self::Deactivate { .. }
            | Self::Admit { .. }
            | Self::Share { .. }
            | Self::Prune { .. }
            | Self::Unclaim { .. } => None,
        }
    }

    /// Its verb, as shown to people and stored in failures.
    #[must_use]
    pub fn verb(&self) -> Verb {
        match self {
            Self::Preflight { .. } => Verb::Preflight,
            Self::Claim { .. } => Verb::Claim,
            Self::Stage { .. } => Verb::Stage,
            Self::Smoke { .. } => Verb::Smoke,
            Self::Migrate { .. } => Verb::Migrate,
            Self::Contract { .. } => Verb::Contract,
            Self::Drain { .. } => Verb::Drain,
            Self::Activate { .. } => Verb::Activate,
            Self::Deactivate { .. } => Verb::Deactivate,
            Self::Confirm { .. } => Verb::Confirm,
            Self::Admit { .. } => Verb::Admit,
            Self::Share { .. } => Verb::Share,
            Self::Prune { .. } => Verb::Prune,
            Self::Unclaim { .. } => Verb::Unclaim,
        }
    }
}

/// The kind of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each is described at the action of the same name")]
pub enum Verb {
    Preflight,
    Claim,
    Stage,
    Smoke,
    Migrate,
    Contract,
    Drain,
    Activate,
    Deactivate,
    Confirm,
    Admit,
    Share,
    Prune,
    Unclaim,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Preflight => "preflight",
            Self::Claim => "claim",
            Self::Stage => "stage",
            Self::Smoke => "smoke",
            Self::Migrate => "migrate",
            Self::Contract => "contract",
            Self::Drain => "drain",
            Self::Activate => "activate",
            Self::Deactivate => "deactivate",
            Self::Confirm => "confirm",
            Self::Admit => "admit",
            Self::Share => "share",
            Self::Prune => "prune",
            Self::Unclaim => "unclaim",
        })
    }
}

/// How an action ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ended")]
pub enum ActionResult {
    /// It is done.
    Succeeded,
    /// It is not.
    Failed {
        /// Why, for the operator.
        why: String,
        /// Whose fault it looks like.
        blame: Blame,
    },
}

/// Whose fault a failure looks like: decides whether trying again makes sense and whether the release is marked bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// The release: it does not start, answers wrongly, its migration fails. Not tried again.
    Release,
    /// The host refused or lacks something (a check, a claim, a full disk). Not tried again.
    Host,
    /// The way there: connection, balancer, a time-out. Tried again within the limit.
    Passing,
}

/// What an action left for the report, beyond how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionDetail {
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// The checks that were made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
    /// Lines that were printed, at most [`OUTPUT_LINES_MAX`], the last ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output: Vec<String>,
}

/// Most lines of output that a record keeps.
pub const OUTPUT_LINES_MAX: usize = 200;
