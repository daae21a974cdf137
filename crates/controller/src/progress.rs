//! What the loop tells whoever watches. Progress may be lost; what must not be lost is a record.

use std::sync::Arc;

use greenlight_link::message::Event;
use greenlight_model::action::{Action, ActionResult};
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::id::{HostName, Instance};
use greenlight_model::rollout::Note;
use greenlight_model::world::InFlight;

/// One thing that happened.
#[derive(Debug, Clone)]
pub enum Progress {
    /// A host's agent answers, or does not.
    Host {
        /// Which.
        host: HostName,
        /// Why it does not, when it does not.
        unreachable: Option<String>,
    },
    /// A claim could not be renewed; it holds until it runs out, and is tried again before.
    NotRenewed {
        /// Whose.
        instance: Instance,
        /// Why.
        why: String,
    },
    /// An action began.
    Started {
        /// Which.
        action: Action,
        /// Why now.
        why: String,
    },
    /// An action ended.
    Finished {
        /// Which.
        action: Action,
        /// How.
        result: ActionResult,
        /// How long it took, in milliseconds.
        took_ms: u64,
        /// Lines that belong to a failure.
        output: Vec<String>,
    },
    /// Something happened inside an action.
    Inside {
        /// Where.
        instance: Instance,
        /// What.
        event: Event,
    },
    /// Bytes of a release went to a host.
    Sent {
        /// Where.
        instance: Instance,
        /// Objects sent.
        objects: u64,
        /// Objects that the host lacked.
        objects_total: u64,
        /// Bytes sent.
        bytes: u64,
        /// How many there will have been in the end: an estimate.
        bytes_total: u64,
    },
    /// What is waited for now; sent when it changes.
    Waits(Vec<Wait>),
    /// The rollout is held from now on; this ends first.
    Holding(Vec<InFlight>),
    /// The rollout took a turn of its own.
    Note(Note),
    /// The interlock refused a step of the planner.
    Interlock {
        /// The step.
        action: Action,
        /// The rule and what it says.
        sentence: String,
    },
    /// The rollout ended.
    Ended(Outcome),
}

/// Where progress goes.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;
