//! Evidence: recorded facts that gates read, each bound to the releases, the environment and the plan it is about.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::id::{CheckName, EnvironmentName, PlanDigest, ReleaseId, RoleName, ServiceName};

/// Most failed tests that are kept by name; the count is always whole.
pub const FAILED_TESTS_MAX: usize = 1_000;
/// Most different findings that an analysis may have: beyond that nobody compares.
pub const FINDINGS_MAX: usize = 20_000;
/// Most characters of a note, a reason, an item.
pub const TEXT_CHARACTERS_MAX: usize = 20_000;

/// A fact and what it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// The releases it is about.
    pub releases: BTreeMap<ServiceName, ReleaseId>,
    /// The environment it is about; none for what holds everywhere, such as a test run.
    pub environment: Option<EnvironmentName>,
    /// The plan that was shown, for an approval.
    pub digest: Option<PlanDigest>,
    /// What.
    pub fact: Fact,
}

/// What is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "fact")]
pub enum Fact {
    /// A suite of tests ran to its end.
    Tests {
        /// Its name.
        suite: CheckName,
        /// How many passed.
        passed: u32,
        /// How many were not run.
        skipped: u32,
        /// How many failed.
        failed: u32,
        /// Those that failed, at most [`FAILED_TESTS_MAX`].
        failures: Vec<String>,
    },
    /// A program that is a check by itself ended.
    Exit {
        /// The suite or tool that it stands for.
        name: CheckName,
        /// Its exit code; 0 is a pass.
        code: i32,
    },
    /// How many lines of code the tests reach.
    Coverage {
        /// Lines that were reached.
        covered: u64,
        /// All lines.
        lines: u64,
    },
    /// What an analysis found.
    Lint {
        /// The tool.
        tool: CheckName,
        /// How often each finding occurs, by its text without line numbers, at most [`FINDINGS_MAX`].
        findings: BTreeMap<String, u32>,
    },
    /// What people are told of the release.
    Note {
        /// The text.
        text: String,
    },
    /// Somebody agreed to a plan.
    Approval {
        /// In which role.
        role: RoleName,
        /// What the plan was, line by line: to say what moved when it no longer is.
        plan: String,
    },
    /// Somebody saw to an item of the checklist.
    Tick {
        /// Which.
        item: String,
        /// What they saw.
        note: String,
    },
    /// Somebody let a gate be green although it is not.
    Override {
        /// The gate, as it is named where lights are shown.
        gate: String,
        /// Why.
        why: String,
    },
    /// Somebody agreed that a migration takes this away.
    Losses {
        /// What, as it was shown.
        losses: Vec<String>,
        /// Why that may be.
        why: String,
    },
    /// A gate's command ran.
    Command {
        /// The gate's.
        name: CheckName,
        /// Its exit code; none when it did not end by itself.
        code: Option<i32>,
        /// What it printed last.
        output: Vec<String>,
    },
    /// A gate's probe was made.
    Probe {
        /// The gate's.
        name: CheckName,
        /// Whether it answered as it should.
        is_up: bool,
        /// What was found.
        found: String,
    },
}

/// Evidence as it stands in the records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The record's number.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// Who: `user@machine`.
    pub by: String,
    /// What.
    pub evidence: Evidence,
}

impl Recorded {
    /// What was recorded.
    #[must_use]
    pub fn fact(&self) -> &Fact {
        &self.evidence.fact
    }
}

impl Fact {
    /// What kind of fact it is, in one word.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Tests { .. } => "tests",
            Self::Exit { .. } => "exit",
            Self::Coverage { .. } => "coverage",
            Self::Lint { .. } => "lint",
            Self::Note { .. } => "note",
            Self::Approval { .. } => "approval",
            Self::Tick { .. } => "tick",
            Self::Override { .. } => "override",
            Self::Losses { .. } => "losses",
            Self::Command { .. } => "command",
            Self::Probe { .. } => "probe",
        }
    }

    /// It in one line.
    #[must_use]
    pub fn summary(&self) -> String {
        match self {
            Self::Tests { suite, passed, skipped, failed, .. } => {
                format!("{suite}: {passed} passed, {failed} failed, {skipped} skipped")
            }
            Self::Exit { name, code } => format!("{name}: exit code {code}"),
            Self::Coverage { covered, lines } => {
                format!("{} of lines ({covered} of {lines})", share(*covered, *lines))
            }
            Self::Lint { tool, findings } => {
                let count: u64 = findings.values().copied().map(u64::from).sum();
                format!("{tool}: {count} findings")
            }
            Self::Note { text } => text.lines().next().unwrap_or_default().to_owned(),
            Self::Approval { role, .. } => format!("as {role}"),
            Self::Tick { item, note } if note.is_empty() => item.clone(),
            Self::Tick { item, note } => format!("{item}: {note}"),
            Self::Override { gate, why } => format!("{gate}: {why}"),
            Self::Losses { losses, why } => format!("{} statements: {why}", losses.len()),
            Self::Command { name, code: Some(code), .. } => format!("{name}: exit code {code}"),
            Self::Command { name, code: None, output } => {
                format!("{name}: {}", output.last().map_or("it did not end by itself", String::as_str))
            }
            Self::Probe { name, found, .. } => format!("{name}: {found}"),
        }
    }
}

/// A share as people read it, rounded down to a tenth of a percent: `79.9%` is never shown as 80.
#[must_use]
pub fn share(part: u64, whole: u64) -> String {
    let per_mille = if whole == 0 { 0 } else { u128::from(part) * 1_000 / u128::from(whole) };
    format!("{}.{}%", per_mille / 10, per_mille % 10)
}
