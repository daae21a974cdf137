//! The report, and what people write into it.

use clap::{Args, Subcommand, ValueEnum};
use greenlight_model::id::{EnvironmentName, RoleName, RolloutId};
use greenlight_model::journal::{Impact, Section};

#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Which rollout [default: the last one].
    pub(crate) rollout: Option<RolloutId>,
    /// As Markdown, or as one HTML file that prints. `--json` gives the same as data.
    #[arg(long, default_value = "markdown")]
    pub(crate) format: ReportFormat,
}

/// How a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReportFormat {
    Markdown,
    Html,
}

#[derive(Debug, Args)]
pub(crate) struct Issue {
    #[command(subcommand)]
    pub(crate) action: IssueAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum IssueAction {
    /// Note an issue; its number is printed.
    Add(IssueAdd),
    /// An issue is settled. A blocker is then a resolved one.
    Resolve {
        /// Its number.
        issue: u64,
        /// How.
        #[arg(long)]
        how: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct IssueAdd {
    /// Where.
    pub(crate) environment: EnvironmentName,
    /// What was seen.
    pub(crate) what: String,
    /// In which rollout [default: the open one, else the last].
    #[arg(long, value_name = "ID")]
    pub(crate) rollout: Option<RolloutId>,
    /// Which part of the report it belongs to.
    #[arg(long, default_value = "deployment")]
    pub(crate) section: IssueSection,
    /// What it did.
    #[arg(long, default_value = "nil")]
    pub(crate) impact: IssueImpact,
}

/// A part of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum IssueSection {
    Deployment,
    Testing,
    Miscellaneous,
}

impl From<IssueSection> for Section {
    fn from(section: IssueSection) -> Self {
        match section {
            IssueSection::Deployment => Self::Deployment,
            IssueSection::Testing => Self::Testing,
            IssueSection::Miscellaneous => Self::Miscellaneous,
        }
    }
}

/// What an issue did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum IssueImpact {
    Nil,
    Degraded,
    Blocker,
}

impl From<IssueImpact> for Impact {
    fn from(impact: IssueImpact) -> Self {
        match impact {
            IssueImpact::Nil => Self::Nil,
            IssueImpact::Degraded => Self::Degraded,
            IssueImpact::Blocker => Self::Blocker,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Tasks {
    #[command(subcommand)]
    pub(crate) action: TaskAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TaskAction {
    /// Add an action; its number is printed.
    Add(TaskAdd),
    /// Give an action its green light, as somebody of the role that it waits for.
    Light {
        /// Its number.
        action: u64,
    },
    /// You did an action that is yours. Before its light that is refused.
    Done {
        /// Its number.
        action: u64,
        /// What came of it.
        #[arg(long, default_value = "")]
        note: String,
    },
    /// List them.
    List,
}

#[derive(Debug, Args)]
pub(crate) struct TaskAdd {
    /// Where.
    pub(crate) environment: EnvironmentName,
    /// What is to be done.
    pub(crate) what: String,
    /// Who does it: a user, or a role.
    #[arg(long)]
    pub(crate) owner: String,
    /// The role whose green light it waits for.
    #[arg(long, value_name = "ROLE")]
    pub(crate) waits_for: Option<RoleName>,
    /// What must be so before the light is given.
    #[arg(long, default_value = "")]
    pub(crate) condition: String,
    /// The number of the issue that it is for.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) issue: Option<u64>,
}
