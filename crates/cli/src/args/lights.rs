//! What turns lights green: evidence, approvals, checklists, overrides.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use greenlight_model::id::{CheckName, EnvironmentName, RoleName};

use super::Targets;

#[derive(Debug, Args)]
pub(crate) struct Evidence {
    #[command(subcommand)]
    pub(crate) action: EvidenceAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvidenceAction {
    /// Add reports about a release. One that is about another commit is refused; `-` reads standard input.
    Add(EvidenceAdd),
    /// List what is recorded, latest first.
    List {
        /// Only about this release: label, id or commit; SERVICE=RELEASE where that is not unique.
        release: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct EvidenceAdd {
    /// Label, id or commit of the release; SERVICE=RELEASE where that is not unique.
    pub(crate) release: String,
    /// The suite that the JUnit reports are of.
    #[arg(long, value_name = "NAME", default_value = "tests")]
    pub(crate) suite: CheckName,
    /// A JUnit report; may be repeated, all of them are one run of the suite.
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Vec<PathBuf>,
    /// A Cobertura report; may be repeated, for parts of the code.
    #[arg(long, value_name = "FILE")]
    pub(crate) cobertura: Vec<PathBuf>,
    /// A SARIF report; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub(crate) sarif: Vec<PathBuf>,
    /// pylint's output, as text or JSON; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub(crate) pylint: Vec<PathBuf>,
    /// The exit code of a suite or tool that writes no report: unit=0. May be repeated.
    #[arg(long, value_name = "NAME=CODE", value_parser = crate::commands::evidence::exit_code)]
    pub(crate) exit_code: Vec<(CheckName, i32)>,
    /// The release's note, for people.
    #[arg(long, value_name = "FILE")]
    pub(crate) note: Option<PathBuf>,
    /// The commit that the reports are of [default: what they say, else what is checked out here].
    #[arg(long, value_name = "HASH")]
    pub(crate) commit: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Gates {
    #[command(flatten)]
    pub(crate) targets: Targets,
}

#[derive(Debug, Args)]
pub(crate) struct Approve {
    #[command(flatten)]
    pub(crate) targets: Targets,
    /// In which role [default: the only one that is asked for and that you hold].
    #[arg(long)]
    pub(crate) role: Option<RoleName>,
    /// Only if the plan still has this digest, which `plan --json` and `gates --json` show; its first digits do.
    #[arg(long, value_name = "DIGEST")]
    pub(crate) digest: Option<String>,
    /// Do not ask. Without a terminal nothing is asked.
    #[arg(long, short = 'y')]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Tick {
    /// Which environment's checklist.
    pub(crate) environment: EnvironmentName,
    /// The item, as it stands there.
    pub(crate) item: String,
    /// For which releases [default: those of the open rollout, else what `deploy` would bring].
    #[arg(value_name = "RELEASE")]
    pub(crate) releases: Vec<String>,
    /// What was seen.
    #[arg(long, default_value = "")]
    pub(crate) note: String,
}

#[derive(Debug, Args)]
pub(crate) struct Confirm {
    /// Which environment.
    pub(crate) environment: EnvironmentName,
    /// For which releases [default: those of the open rollout, else what `deploy` would bring].
    #[arg(value_name = "RELEASE")]
    pub(crate) releases: Vec<String>,
    /// Why what they take away is needed no more. It is kept.
    #[arg(long, value_name = "WHY")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct Override {
    /// Which environment.
    pub(crate) environment: EnvironmentName,
    /// The gate, as `greenlight gates` names it: "tests (web)".
    pub(crate) gate: String,
    /// For which releases [default: those of the open rollout, else what `deploy` would bring].
    #[arg(value_name = "RELEASE")]
    pub(crate) releases: Vec<String>,
    /// Why. It is kept, and stands in the report.
    #[arg(long, value_name = "WHY")]
    pub(crate) reason: String,
}
