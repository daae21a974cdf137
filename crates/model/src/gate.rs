//! The gates of an environment, as the fleet file states them. What makes a gate green is judged by `gates`, from
//! evidence ([`crate::evidence`]), time and traffic.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::civil::Date;
use serde::{Deserialize, Serialize};

use crate::calendar::{Period, Window};
use crate::id::{CheckName, RoleName};
use crate::quantity::{Percent, duration_ms};

/// Conditions on the way into an environment; what is absent is not asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gates {
    /// Test suites that must have passed.
    pub tests: Option<TestsGate>,
    /// How much of the code the tests must reach.
    pub coverage: Option<CoverageGate>,
    /// No new finding of an analysis.
    pub lint: Option<LintGate>,
    /// Who must agree.
    pub approvals: Vec<ApprovalGate>,
    /// What people must have seen to.
    pub checklist: Option<Checklist>,
    /// Deployments begin in one of these; at any time when there is none.
    pub windows: Vec<Window>,
    /// Deployments do not begin in any of these.
    pub freezes: Vec<Freeze>,
    /// Deployments do not begin while traffic is high.
    pub traffic: Option<TrafficGate>,
    /// Commands that must succeed, by name.
    pub commands: BTreeMap<CheckName, CommandGate>,
    /// Places that must answer, by name.
    pub probes: BTreeMap<CheckName, ProbeGate>,
    /// Whether the release must have a note.
    pub release_note: bool,
}

/// Test suites that must have passed for exactly the release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestsGate {
    /// Their names, as evidence gives them; never empty.
    pub suites: BTreeSet<CheckName>,
    /// Tests that are known to fail. Any other failure is red, and so is one of these when its date has passed.
    pub known_failures: Vec<KnownFailure>,
}

/// A test that is known to fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownFailure {
    /// Its name, as the report gives it: `CLASS.NAME`.
    pub test: String,
    /// Who mends it.
    pub owner: String,
    /// The last day on which it may fail (UTC).
    pub until: Date,
}

/// How many of the lines of code the tests must reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoverageGate {
    /// At least this share of all lines.
    pub floor: Percent,
    /// Whether it may be less than that of what the environment runs.
    pub may_fall: bool,
}

/// No finding that the release which the environment runs did not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LintGate {
    /// The tools whose reports must be there; never empty.
    pub tools: BTreeSet<CheckName>,
}

/// People of a role who must agree to the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalGate {
    /// Which role.
    pub role: RoleName,
    /// How many different people, at least 1.
    pub count: u32,
    /// Whether whoever built the release or asks for the rollout does not count.
    pub four_eyes: bool,
}

/// What people must have seen to, ticked one by one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checklist {
    /// Without these it does not go on.
    pub required: Vec<String>,
    /// These are shown.
    pub optional: Vec<String>,
}

/// A time in which nothing begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// When.
    pub when: Period,
    /// Why.
    pub reason: String,
}

/// Traffic below which a deployment may begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficGate {
    /// Fewer sessions than this, over all balancers of the environment.
    pub sessions_below: u64,
}

/// A command that must succeed, run where the controller is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandGate {
    /// Program and arguments; no shell.
    pub argv: Vec<String>,
    /// How long it may take.
    #[serde(with = "duration_ms")]
    pub timeout: Duration,
}

/// A place that must answer, seen from the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeGate {
    /// `http://…`, which must answer 2xx, or `tcp://ADDRESS:PORT`, which must take a connection.
    pub address: String,
    /// How long it may take.
    #[serde(with = "duration_ms")]
    pub timeout: Duration,
}

/// Who holds which role: `user` for that user wherever they work, or `user@machine`.
pub type Roles = BTreeMap<RoleName, BTreeSet<String>>;

/// Whether somebody holds a role.
#[must_use]
pub fn holds(roles: &Roles, role: &RoleName, who: &str) -> bool {
    let user = user(who);
    roles.get(role).is_some_and(|members| members.contains(who) || members.contains(user))
}

/// The user of `user@machine`.
#[must_use]
pub fn user(who: &str) -> &str {
    who.split_once('@').map_or(who, |(user, _)| user)
}

impl Gates {
    /// Whether a gate is judged by what is looked at now, with a command or a probe.
    #[must_use]
    pub fn look(&self) -> bool {
        !self.commands.is_empty() || !self.probes.is_empty()
    }
}
