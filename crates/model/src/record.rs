//! Records: the append-only log of what was asked, done and decided. [`crate::history`] folds it.
//!
//! Progress (bytes, percent) is never a record. Stored records carry [`RECORD_VERSION`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::action::{Action, ActionDetail, ActionResult};
use crate::charter::{Charter, Found};
use crate::decision::{Outcome, Running};
use crate::evidence::Evidence;
use crate::fleet::Service;
use crate::id::{EnvironmentName, ReleaseId, RolloutId, ServiceName};
use crate::journal::{Entry, IllegalEntry};
use crate::migration::MigrationPhase;
use crate::rollout::{Note, OperatorRequest, Plan};

/// The version of the records that this build writes. It reads every version before. Version 2 brought
/// [`RecordBody::RolloutAdopted`] and [`RecordBody::MigrationDone`], version 3 [`RecordBody::EvidenceAdded`]
/// and [`RecordBody::Journal`], version 4 [`RecordBody::DatabaseRestored`] and [`Action::Contract`].
pub const RECORD_VERSION: u32 = 4;

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, from 1, without gaps.
    pub seq: u64,
    /// When it was written, by the writer's clock.
    pub at: Timestamp,
    /// Who wrote it: `user@machine`.
    pub by: String,
    /// What it says.
    pub body: RecordBody,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "record")]
pub enum RecordBody {
    /// A release is good or bad from now on.
    ReleaseMarked {
        /// Which.
        release: ReleaseId,
        /// Why it is bad; none means good again.
        bad: Option<String>,
    },
    /// A rollout began.
    RolloutStarted {
        /// What was asked for.
        plan: Plan,
        /// The services as they were defined then: going back to a release later runs it as it was run.
        services: BTreeMap<ServiceName, Service>,
    },
    /// A rollout that another controller began, whose records are not here, is gone on with from what its hosts know.
    RolloutAdopted {
        /// What it is.
        charter: Charter,
        /// How far it is.
        found: Found,
    },
    /// An action was begun.
    ActionStarted {
        /// Whose.
        rollout: RolloutId,
        /// Which.
        action: Action,
        /// Why.
        why: String,
    },
    /// An action ended.
    ActionFinished {
        /// Whose.
        rollout: RolloutId,
        /// Which.
        action: Action,
        /// How.
        result: ActionResult,
        /// What it left.
        detail: ActionDetail,
    },
    /// The rollout took a turn of its own.
    Noted {
        /// Which rollout.
        rollout: RolloutId,
        /// Which turn.
        note: Note,
    },
    /// An operator asked something of it.
    OperatorAsked {
        /// Of which rollout.
        rollout: RolloutId,
        /// What.
        request: OperatorRequest,
        /// Why, in the operator's words.
        why: String,
    },
    /// A person has looked at the database: a migration whose end was not known is done.
    MigrationDone {
        /// In which rollout.
        rollout: RolloutId,
        /// Of which service.
        service: ServiceName,
        /// Which part of it.
        #[serde(default, skip_serializing_if = "MigrationPhase::is_expand")]
        phase: MigrationPhase,
        /// How that is known, in the person's words.
        why: String,
    },
    /// A person has put the database of an environment back as it was before its migrations: earlier releases may be gone
    /// back to again. A release that was migrated is not migrated a second time: what goes forward then is built anew.
    DatabaseRestored {
        /// Where.
        environment: EnvironmentName,
        /// From what, in the person's words.
        why: String,
    },
    /// What people saw or have to do.
    Journal {
        /// What is written.
        entry: Entry,
    },
    /// A fact that gates read.
    EvidenceAdded {
        /// It, and what it is about.
        evidence: Evidence,
    },
    /// A rollout ended.
    RolloutEnded {
        /// Which.
        rollout: RolloutId,
        /// How.
        outcome: Outcome,
        /// What ran where then.
        running: Running,
    },
}

/// Why a record cannot follow the ones before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IllegalRecord {
    /// The number is not the next one.
    #[error("record {found} cannot follow record {last}")]
    Sequence {
        /// The last good number.
        last: u64,
        /// The number found.
        found: u64,
    },
    /// A rollout of this id exists.
    #[error("rollout {0} was started before")]
    StartedTwice(RolloutId),
    /// Another rollout of the environment has not ended.
    #[error("rollout {open} of {environment} has not ended; resume or abort it")]
    EnvironmentBusy {
        /// The open rollout.
        open: RolloutId,
        /// The environment.
        environment: EnvironmentName,
    },
    /// No such rollout.
    #[error("rollout {0} was never started")]
    Unknown(RolloutId),
    /// The rollout is over.
    #[error("rollout {0} has ended")]
    Ended(RolloutId),
    /// An entry of the journal cannot follow.
    #[error(transparent)]
    Journal(#[from] IllegalEntry),
}
