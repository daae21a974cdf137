//! The canary: a few hosts that take a stated share of the traffic, step by step, while it is judged how they do.
//!
//! Settings, and what has come of the judging so far. The statistics are `verdict`'s; when to go on is the planner's.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::fleet::BatchSize;
use crate::id::ServiceName;
use crate::quantity::{Percent, duration_ms};

/// Long enough for the samples that a comparison with before needs, at one a second; short beside any canary.
const LEARNING_TIME: Duration = Duration::from_secs(30);

/// How a canary is cut, led on and judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// How many hosts take the new release first.
    pub hosts: BatchSize,
    /// Sizes of the batches in which the rest follows; never empty.
    pub batch: Vec<BatchSize>,
    /// The shares of the traffic, rising; never empty.
    pub steps: Vec<CanaryStep>,
    /// How it is judged.
    pub judging: Judging,
}

/// A share of the traffic, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryStep {
    /// The share of all requests of the service that the canary's hosts get together: 1 to 99.
    pub share: Percent,
    /// What ends it.
    pub until: Until,
}

/// What ends a step of a canary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Until {
    /// The verdict is that it is good enough.
    Pass,
    /// So much time, in which the verdict was not that it is worse.
    Elapsed(#[serde(with = "duration_ms")] Duration),
}

/// How a canary is judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judging {
    /// How long after its admission a canary host's requests do not count: caches are cold.
    #[serde(with = "duration_ms")]
    pub warmup: Duration,
    /// How long a step may be without a verdict.
    #[serde(with = "duration_ms")]
    pub max_time: Duration,
    /// What happens then.
    pub on_inconclusive: OnInconclusive,
    /// How often a canary that is as good as the rest may be turned back, over the whole rollout and all metrics, in
    /// 1,000 rollouts: 1 to 200.
    pub false_aborts_per_mille: u32,
    /// What is compared with the hosts that run the old release; empty means errors.
    pub compare: Vec<Comparison>,
    /// Hard limits on the canary's hosts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<Guard>,
}

/// A hard limit on the canary's hosts: one that is above it for long enough is worse, whatever the requests say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guard {
    /// Of what.
    pub metric: GuardMetric,
    /// What is too much begins above this, in hundredths of the metric's unit.
    pub above_hundredths: u32,
    /// How long every sample must be above it.
    #[serde(with = "duration_ms")]
    pub hold: Duration,
}

/// What a guard watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardMetric {
    /// How busy the host's processors are, in percent of all of them.
    HostCpu,
    /// The host's memory that is not available, in percent.
    Memory,
    /// Processor time of the service for a request, as a factor of what it was on this host before the rollout.
    CpuPerRequest,
    /// How often the service's processes were started anew since the canary was admitted.
    Restarts,
}

impl GuardMetric {
    /// Whether its limit is a percentage.
    #[must_use]
    pub fn is_percentage(self) -> bool {
        matches!(self, Self::HostCpu | Self::Memory)
    }
}

impl Judging {
    /// For how long the canary's hosts are watched before the first of them is touched, so that what is usual is known.
    #[must_use]
    pub fn learning_time(&self) -> Duration {
        let is_needed = self.guards.iter().any(|guard| guard.metric == GuardMetric::CpuPerRequest);
        if is_needed { LEARNING_TIME } else { Duration::ZERO }
    }
}

/// What happens when a step has had its time and there is no verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnInconclusive {
    /// It stays at its share and goes on being judged.
    Hold,
    /// The rollout turns back.
    TurnBack,
    /// The rollout is held until a person resumes it, which goes on to the next step, or aborts it.
    Ask,
}

/// One thing that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// What.
    pub metric: Metric,
    /// How many times worse than the rest is still tolerated, in percent: 100 tolerates nothing worse.
    pub tolerate_percent: u32,
    /// It is good enough when it is surely less than so many times worse than the rest, in percent.
    pub pass_if_below_percent: u32,
}

/// What can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Answers of class 5xx and connections without an answer.
    Errors,
    /// Requests slower than half of the rest's were before.
    LatencyP50,
    /// Requests slower than nine tenths of the rest's were before.
    LatencyP90,
    /// Requests slower than 99 of a hundred of the rest's were before.
    LatencyP99,
    /// Requests that should have come by its share and did not.
    Missing,
}

/// What judging the present step has come to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// Which wave it is about, from 0.
    pub wave: usize,
    /// Which step of it, from 0.
    pub step: usize,
    /// The services that the answer speaks of: those that were judged, or found to be worse.
    pub services: BTreeSet<ServiceName>,
    /// The answer.
    pub answer: Answer,
    /// What it rests on, for the operator, on one line.
    pub why: String,
}

/// The three answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Answer {
    /// Good enough.
    Pass,
    /// Worse than is tolerated.
    Abort,
    /// Neither is shown yet.
    Inconclusive {
        /// About how many more of the canary's requests that would take, where it can be said.
        requests_needed: Option<u64>,
    },
}

/// How far a canary wave is, as folded from records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryProgress {
    /// Steps that are over.
    pub passed: usize,
    /// When the last of them ended.
    pub passed_at: Option<Timestamp>,
    /// The step for which a person was asked, because its time was up without a verdict.
    pub asked: Option<usize>,
}
