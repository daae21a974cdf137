//! What a migration does to a database: in which part of a rollout, and what it takes away.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::ServiceName;

/// When a part of a migration runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// Before the first switch: old code must get along with what it makes.
    #[default]
    Expand,
    /// When every instance runs the release and none can run older code any more.
    Contract,
}

impl MigrationPhase {
    /// Both, in the order in which they run.
    pub const ALL: [Self; 2] = [Self::Expand, Self::Contract];

    /// Whether it is the first one.
    #[must_use]
    pub fn is_expand(&self) -> bool {
        *self == Self::Expand
    }

    /// What its step is called where people read it.
    #[must_use]
    pub fn noun(self) -> &'static str {
        match self {
            Self::Expand => "migration",
            Self::Contract => "contracting migration",
        }
    }
}

/// A statement of a migration that takes away what code of before may need.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Loss {
    /// Whose migration.
    pub service: ServiceName,
    /// In which part of it.
    pub phase: MigrationPhase,
    /// Where it stands: `FILE:LINE` in the release.
    pub place: String,
    /// The statement, in one line, shortened where it is long.
    pub statement: String,
    /// What it takes away.
    pub what: String,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.place, self.statement, self.what)
    }
}
