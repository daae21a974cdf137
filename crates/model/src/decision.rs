//! What the planner answers: what to do now and why, what is waited for, or how it ended.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::action::{Action, Verb};
use crate::id::{HostName, Instance, ReleaseId, RolloutId, ServiceName};
use crate::quantity::Percent;
use crate::rollout::Note;

/// The planner's answer for one world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[must_use]
pub enum Decision {
    /// Do these now (all at once), and know what else is waited for.
    Proceed {
        /// To be performed; empty when there is nothing to do but wait.
        steps: Vec<Step>,
        /// What keeps the rest from moving.
        waits: Vec<Wait>,
    },
    /// Record this and ask again: a turn in the rollout's own course.
    Note(Note),
    /// The rollout is over.
    End(Outcome),
}

/// One action with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What to do.
    pub action: Action,
    /// Why now, for the operator: "web-1 has ended its last session".
    pub why: String,
}

/// A typed reason why something does not move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "for")]
pub enum Wait {
    /// An action is under way.
    Action {
        /// Where.
        instance: Instance,
        /// Which.
        verb: Verb,
        /// Since when.
        since: Timestamp,
    },
    /// Sessions of a drained instance have not ended.
    Sessions {
        /// Where.
        instance: Instance,
        /// How many.
        left: u64,
        /// When they will be cut.
        until: Timestamp,
    },
    /// The balancer does not see an admitted instance as up yet.
    BalancerHealth {
        /// Which.
        instance: Instance,
        /// When that counts as a failure.
        until: Timestamp,
    },
    /// Taking one more out would break the floor.
    Floor {
        /// Which service.
        service: ServiceName,
        /// Instances serving.
        serving: usize,
        /// Instances that must.
        floor: usize,
    },
    /// The old half is kept as the way back.
    Fallback {
        /// Until when.
        until: Timestamp,
    },
    /// The canary's hosts are watched before the first of them is touched, to know what is usual there.
    Learning {
        /// Until when.
        until: Timestamp,
    },
    /// A canary has its share of the traffic and is being judged.
    Verdict {
        /// Its share of the traffic.
        share: Percent,
        /// What judging it has come to so far.
        why: String,
        /// About how many more of its requests a verdict would take, where that can be said.
        requests_needed: Option<u64>,
        /// When the step is over, or its time without a verdict is up.
        until: Timestamp,
    },
    /// An earlier wave is not proven.
    Wave {
        /// Its number, from 1.
        number: usize,
        /// Who in it is not.
        instances: Vec<Instance>,
    },
    /// A person holds the rollout, or it holds itself after a failure.
    Held {
        /// Who.
        by: String,
        /// Why.
        why: String,
    },
    /// A gate is not green.
    Gate {
        /// Which.
        name: String,
        /// Why not.
        why: String,
    },
    /// A host cannot be reached.
    Unreachable {
        /// Which.
        host: HostName,
        /// Since when.
        since: Timestamp,
        /// Why.
        why: String,
    },
    /// A balancer cannot be read.
    Balancer {
        /// Which.
        title: String,
        /// Why.
        why: String,
    },
    /// Somebody else's rollout has the instance.
    Claim {
        /// Which.
        instance: Instance,
        /// Whose.
        holder: String,
        /// Which rollout.
        rollout: RolloutId,
        /// When it ends unless renewed.
        expires_at: Timestamp,
    },
}

/// How a rollout ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Outcome {
    /// Every instance runs its target, but for those left out.
    Done {
        /// Left out, within the budget, with the reason.
        left_out: BTreeMap<Instance, String>,
    },
    /// Nothing was changed.
    Refused {
        /// Why.
        why: String,
    },
    /// Everything that was changed is back as it was.
    TurnedBack {
        /// Why.
        why: String,
    },
    /// Not everything could be turned back; a person must look at these.
    Stuck {
        /// Why the rollout was turned back.
        why: String,
        /// What is wrong where.
        instances: BTreeMap<Instance, String>,
    },
}

/// What runs where, as last seen; given with an outcome.
pub type Running = BTreeMap<Instance, Option<ReleaseId>>;
