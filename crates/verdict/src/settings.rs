//! What is compared, and how sure a verdict must be.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guard::Guard;

/// Most comparisons of one judge. Each takes its part of the false-abort budget, so more than a handful find little.
pub const COMPARISONS_MAX: usize = 32;
/// Most bounds of a histogram.
pub const BOUNDS_MAX: usize = 512;

/// What a judge is told before it sees anything. It never changes within a rollout: a changed setting is a new judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Upper bounds of the histograms' buckets, in microseconds, rising.
    pub bounds_us: Vec<u64>,
    /// What is compared.
    pub comparisons: Vec<Comparison>,
    /// At most this share of healthy canaries is aborted, over all comparisons and the whole rollout: α.
    #[serde(default = "default_false_abort_budget")]
    pub false_abort_budget: f64,
    /// At most this share of canaries that are as bad as `pass_if_below` passes a step: β.
    #[serde(default = "default_false_pass_budget")]
    pub false_pass_budget: f64,
    /// What a canary host did in so much time after its first requests is not compared: caches are cold. Guards watch on.
    #[serde(default)]
    pub warmup_ms: u64,
    /// How long the rollout may take at most: the part of the stake that is kept for late faults is spread over it.
    #[serde(default = "default_max_time_ms")]
    pub max_time_ms: u64,
    /// The part of the stake that is kept for faults that begin late, from 0 (none) to below 1. See [`crate::process`].
    #[serde(default = "default_late_stake")]
    pub late_stake: f64,
    /// Hard limits on hosts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<Guard>,
}

fn default_false_abort_budget() -> f64 {
    0.01
}

fn default_false_pass_budget() -> f64 {
    0.05
}

fn default_max_time_ms() -> u64 {
    60 * 60_000
}

/// A tenth delays what is there from the beginning by about a fiftieth, and finds what begins after half an hour in about half
/// of the time (`docs/performance.md`).
fn default_late_stake() -> f64 {
    0.1
}

impl Settings {
    /// The defaults for these comparisons: 1 % false aborts, 5 % false passes, no warm-up, an hour.
    #[must_use]
    pub fn new(bounds_us: Vec<u64>, comparisons: Vec<Comparison>) -> Self {
        Self {
            bounds_us,
            comparisons,
            false_abort_budget: default_false_abort_budget(),
            false_pass_budget: default_false_pass_budget(),
            warmup_ms: 0,
            max_time_ms: default_max_time_ms(),
            late_stake: default_late_stake(),
            guards: Vec::new(),
        }
    }

    /// Buckets of a histogram.
    #[must_use]
    pub fn buckets(&self) -> usize {
        self.bounds_us.len() + 1
    }

    /// Each comparison's part of the false-abort budget; they sum to one.
    #[must_use]
    pub fn weights(&self) -> Vec<f64> {
        let sum: f64 = self.comparisons.iter().map(|comparison| comparison.weight).sum();
        self.comparisons.iter().map(|comparison| comparison.weight / sum).collect()
    }

    /// Whether a judge can work with them.
    ///
    /// # Errors
    /// When it cannot, with the setting and what it may be.
    pub fn check(&self) -> Result<(), SettingsError> {
        let wrong = |what: &str, why: &str| Err(SettingsError { what: what.to_owned(), why: why.to_owned() });
        if self.comparisons.is_empty() || self.comparisons.len() > COMPARISONS_MAX {
            return wrong("comparisons", &format!("there must be 1 to {COMPARISONS_MAX}"));
        }
        let rises = self.bounds_us.windows(2).all(|pair| pair[0] < pair[1]);
        if !rises || self.bounds_us.len() > BOUNDS_MAX {
            return wrong(
                "bounds_us",
                &format!("at most {BOUNDS_MAX} bounds, each larger than the one before"),
            );
        }
        if !(self.false_abort_budget > 0.0 && self.false_abort_budget <= 0.5) {
            return wrong("false_abort_budget", "a share above 0 and at most 0.5, such as 0.01");
        }
        if !(self.false_pass_budget > 0.0 && self.false_pass_budget <= 0.5) {
            return wrong("false_pass_budget", "a share above 0 and at most 0.5, such as 0.05");
        }
        if !(0.0..1.0).contains(&self.late_stake) {
            return wrong("late_stake", "a share from 0 to below 1, such as 0.1");
        }
        for (index, comparison) in self.comparisons.iter().enumerate() {
            let Err(why) = comparison.check(self.bounds_us.is_empty()) else { continue };
            return wrong(&format!("comparisons[{index}] ({})", comparison.title()), &why);
        }
        for guard in &self.guards {
            if let Err(why) = guard.check() {
                return wrong(&format!("guard on {}", guard.metric), &why);
            }
        }
        Ok(())
    }
}

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct SettingsError {
    /// Which.
    pub what: String,
    /// What it may be.
    pub why: String,
}

/// One metric that is compared between canary and stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// What is counted.
    pub metric: Metric,
    /// Only this route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// Worse by this factor is still no reason to abort; 1 tolerates nothing.
    #[serde(default = "default_tolerate")]
    pub tolerate: f64,
    /// A canary passes when it is surely less than so many times as bad.
    #[serde(default = "default_pass_if_below")]
    pub pass_if_below: f64,
    /// It also passes when surely less than this share of its requests is bad, however good the stable release is.
    /// Without it a service without any bad request never passes: nothing can be compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negligible: Option<f64>,
    /// Its part of the false-abort budget, relative to the other comparisons.
    #[serde(default = "default_weight")]
    pub weight: f64,
}

fn default_tolerate() -> f64 {
    1.0
}

fn default_pass_if_below() -> f64 {
    1.5
}

fn default_weight() -> f64 {
    1.0
}

/// Largest `tolerate` and `pass_if_below`: the alternatives beyond it end at 100.
const FACTOR_MAX: f64 = 9.0;

impl Comparison {
    /// The comparison of a metric with its defaults: tolerates nothing (missing traffic: a tenth), passes below 1.5.
    #[must_use]
    pub fn new(metric: Metric) -> Self {
        // What is sent again elsewhere, or sticks to a host, moves some requests without anything being wrong.
        let tolerate = if metric == Metric::Traffic { 1.1 } else { default_tolerate() };
        Self {
            metric,
            route: None,
            tolerate,
            pass_if_below: default_pass_if_below(),
            negligible: None,
            weight: default_weight(),
        }
    }

    /// What people call it: `errors`, `latency p99 on /admin`.
    #[must_use]
    pub fn title(&self) -> String {
        match &self.route {
            Some(route) => format!("{} on {route}", self.metric),
            None => self.metric.to_string(),
        }
    }

    fn check(&self, lacks_bounds: bool) -> Result<(), String> {
        if self.metric.quantile().is_some() && lacks_bounds {
            return Err("bounds_us is empty, so that there are no times to compare".to_owned());
        }
        if self.metric == Metric::Traffic && (self.route.is_some() || self.negligible.is_some()) {
            return Err("missing traffic is judged over all routes, and has no `negligible`".to_owned());
        }
        if !(1.0..=FACTOR_MAX).contains(&self.tolerate) {
            return Err(format!("`tolerate` is a factor from 1 to {FACTOR_MAX}"));
        }
        if !(self.pass_if_below > self.tolerate && self.pass_if_below <= FACTOR_MAX) {
            return Err(format!("`pass_if_below` is a factor above `tolerate`, at most {FACTOR_MAX}"));
        }
        if self.negligible.is_some_and(|share| !(share > 0.0 && share < 1.0)) {
            return Err("`negligible` is a share of requests between 0 and 1".to_owned());
        }
        if !(self.weight > 0.0 && self.weight.is_finite()) {
            return Err("`weight` is above 0".to_owned());
        }
        Ok(())
    }
}

/// What is counted as bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Requests that ended in an error.
    Errors,
    /// Requests slower than half of the stable release's were.
    LatencyP50,
    /// Requests slower than nine of ten were.
    LatencyP90,
    /// Requests slower than 99 of 100 were.
    LatencyP99,
    /// Requests that the canary should have ended by its weight, and did not.
    Traffic,
}

impl Metric {
    /// The share of the stable release's requests below its threshold; none when it has no threshold.
    #[must_use]
    pub fn quantile(self) -> Option<f64> {
        match self {
            Self::LatencyP50 => Some(0.5),
            Self::LatencyP90 => Some(0.9),
            Self::LatencyP99 => Some(0.99),
            Self::Errors | Self::Traffic => None,
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Errors => "errors",
            Self::LatencyP50 => "latency p50",
            Self::LatencyP90 => "latency p90",
            Self::LatencyP99 => "latency p99",
            Self::Traffic => "missing traffic",
        })
    }
}

/// Bounds that suit most services: from 1 ms to a minute, four to each doubling: a threshold is then at most a fifth off.
#[must_use]
pub fn usual_bounds_us() -> Vec<u64> {
    (0..=64).map(|step| (1000.0 * (f64::from(step) / 4.0).exp2()).round() as u64).collect()
}
