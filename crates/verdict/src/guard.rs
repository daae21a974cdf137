//! Guards: hard limits on hosts, with a hold time.
//!
//! CPU and memory are few numbers, and each is much like the one before: no test for requests fits them. So a guard has a limit
//! that a person chose, and alerts when a canary host was above it in every sample for as long as it must hold. CPU-seconds
//! per request are held against the same host before the rollout.
//!
//! Guarantees: no alert from a gap: samples further apart than [`SAMPLE_GAP_MAX_MS`] begin the hold time anew. Warm-up does not
//! silence a guard.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Two samples further apart do not show what was between them.
pub const SAMPLE_GAP_MAX_MS: u64 = 10_000;
/// Samples of a host before the rollout below which its CPU-seconds per request are not compared.
pub const BASELINE_SAMPLES_MIN: u32 = 10;
/// Hosts that are watched; a fleet's canary has fewer by far.
const HOSTS_MAX: usize = 10_000;

/// A hard limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Of what.
    pub metric: GuardMetric,
    /// Percent for CPU and memory, a factor against before the rollout for CPU per request, a count for restarts.
    pub above: f64,
    /// How long every sample must be above it.
    pub hold_ms: u64,
}

impl Guard {
    pub(crate) fn check(&self) -> Result<(), String> {
        let is_share = matches!(self.metric, GuardMetric::Cpu | GuardMetric::Memory);
        if is_share && !(self.above > 0.0 && self.above < 100.0) {
            return Err("`above` is a percentage between 0 and 100".to_owned());
        }
        if !(self.above >= 0.0 && self.above.is_finite()) {
            return Err("`above` is 0 or more".to_owned());
        }
        Ok(())
    }
}

/// What a guard watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardMetric {
    /// The host's processors, in percent of all of them.
    Cpu,
    /// The host's memory that is not available, in percent.
    Memory,
    /// CPU-seconds of the service per request, as a factor of what they were on this host before the rollout.
    CpuPerRequest,
    /// Restarts of the service's processes since the rollout began.
    Restarts,
}

impl fmt::Display for GuardMetric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "host CPU",
            Self::Memory => "host memory",
            Self::CpuPerRequest => "CPU per request",
            Self::Restarts => "restarts",
        })
    }
}

/// What a host was at one moment. What was not measured is absent, and no reason for an alert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// The host.
    pub host: String,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Its processors' load since the sample before, in percent of all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// Its memory that is not available, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_percent: Option<f64>,
    /// CPU-seconds of the service since the sample before, divided by the requests of that time. Absent without requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_seconds_per_request: Option<f64>,
    /// Restarts of the service's processes since the rollout began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u64>,
}

/// A guard was violated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alert {
    /// Which guard.
    pub guard: Guard,
    /// On which host.
    pub host: String,
    /// Since when every sample was above the limit.
    pub since_ms: u64,
    /// When that had lasted as long as it must.
    pub at_ms: u64,
    /// The last sample's value.
    pub value: f64,
}

impl fmt::Display for Alert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.at_ms.saturating_sub(self.since_ms) as f64 / 1000.0;
        let (value, above) = (self.value, self.guard.above);
        let (host, metric) = (&self.host, self.guard.metric);
        match metric {
            GuardMetric::Cpu | GuardMetric::Memory => {
                write!(f, "{host}: {metric} at {value:.1} %, above {above} % for {seconds:.0} s")
            }
            GuardMetric::CpuPerRequest => write!(
                f,
                "{host}: {metric} {value:.2} times what it was before the rollout, above {above} times for {seconds:.0} s"
            ),
            GuardMetric::Restarts => write!(f, "{host}: {value} restarts, at most {above} are allowed"),
        }
    }
}

/// Watches the guards of one rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    guards: Vec<Guard>,
    /// CPU-seconds per request before the rollout: their sum, and of how many samples.
    baseline: BTreeMap<String, (f64, u32)>,
    hosts: BTreeMap<String, Holds>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Holds {
    last_ms: u64,
    /// For each guard since when it is violated.
    since_ms: Vec<Option<u64>>,
}

impl Watch {
    /// Watches these.
    #[must_use]
    pub fn new(guards: Vec<Guard>) -> Self {
        Self { guards, baseline: BTreeMap::new(), hosts: BTreeMap::new() }
    }

    /// The limits.
    #[must_use]
    pub fn guards(&self) -> &[Guard] {
        &self.guards
    }

    /// How many samples of a host's CPU-seconds per request there were before the rollout.
    #[must_use]
    pub fn learnt(&self, host: &str) -> u32 {
        self.baseline.get(host).map_or(0, |known| known.1)
    }

    /// Takes in what a host was before the rollout.
    pub fn learn(&mut self, sample: &Sample) {
        let Some(value) = sample.cpu_seconds_per_request.filter(|value| value.is_finite()) else { return };
        if self.baseline.len() < HOSTS_MAX || self.baseline.contains_key(&sample.host) {
            let known = self.baseline.entry(sample.host.clone()).or_default();
            *known = (known.0 + value, known.1.saturating_add(1));
        }
    }

    /// Takes in what a canary host is, and says which guards it violates now. Samples of one host come in order; one that is not
    /// later than the last is passed over.
    pub fn observe(&mut self, sample: &Sample) -> Vec<Alert> {
        if self.hosts.len() >= HOSTS_MAX && !self.hosts.contains_key(&sample.host) {
            return Vec::new();
        }
        let usual = self.baseline.get(&sample.host).filter(|known| known.1 >= BASELINE_SAMPLES_MIN);
        let usual = usual.map(|known| known.0 / f64::from(known.1)).filter(|usual| *usual > 0.0);
        let is_new = !self.hosts.contains_key(&sample.host);
        let holds = self.hosts.entry(sample.host.clone()).or_default();
        holds.since_ms.resize(self.guards.len(), None);
        if !is_new && sample.at_ms <= holds.last_ms {
            return Vec::new();
        }
        if sample.at_ms - holds.last_ms > SAMPLE_GAP_MAX_MS {
            holds.since_ms.fill(None);
        }
        holds.last_ms = sample.at_ms;
        let mut alerts = Vec::new();
        for (guard, since) in self.guards.iter().zip(&mut holds.since_ms) {
            let value = match guard.metric {
                GuardMetric::Cpu => sample.cpu_percent,
                GuardMetric::Memory => sample.memory_percent,
                GuardMetric::CpuPerRequest => {
                    sample.cpu_seconds_per_request.zip(usual).map(|(now, usual)| now / usual)
                }
                GuardMetric::Restarts => sample.restarts.map(|count| count as f64),
            };
            let Some(value) = value.filter(|value| *value > guard.above) else {
                *since = None;
                continue;
            };
            let since_ms = *since.get_or_insert(sample.at_ms);
            if sample.at_ms - since_ms >= guard.hold_ms {
                alerts.push(Alert {
                    guard: guard.clone(),
                    host: sample.host.clone(),
                    since_ms,
                    at_ms: sample.at_ms,
                    value,
                });
            }
        }
        alerts
    }
}
