//! Before a rollout: how long a fault would stay unseen at the traffic that there is.

use serde::{Deserialize, Serialize};

use crate::process::Process;
use crate::settings::{Comparison, Settings};

/// The traffic that a canary will see.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Expectation {
    /// Requests of both arms together, per minute.
    pub requests_per_minute: f64,
    /// The canary's share of them, between 0 and 1.
    pub canary_share: f64,
    /// The share of requests that is bad now: of errors what was counted; 0.5, 0.1 and 0.01 for latency p50, p90 and p99.
    pub bad_rate: f64,
    /// φ, 1 when unknown.
    pub burst: f64,
}

/// What can be expected of a comparison, on the average: half of all canaries take longer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Foresight {
    /// Requests of the canary until it is known.
    pub canary_requests: u64,
    /// The minutes in which it gets those.
    pub minutes: f64,
}

/// How long a canary that is `ratio` times as bad from its first request on stays unseen. None when it would not be found
/// within a thousand million requests: nothing is bad now, or `ratio` is hardly above what is tolerated.
#[must_use]
pub fn until_abort(
    settings: &Settings,
    comparison: &Comparison,
    expectation: &Expectation,
    ratio: f64,
) -> Option<Foresight> {
    let sum: f64 = settings.comparisons.iter().map(|comparison| comparison.weight).sum();
    let ln_needed = -(settings.false_abort_budget * comparison.weight / sum).ln();
    let Expectation { canary_share, bad_rate, burst, .. } = *expectation;
    let requests =
        process(settings, comparison).requests_to_abort(bad_rate, ratio, canary_share, burst, ln_needed)?;
    foresight(requests, expectation)
}

/// How long a canary as good as the stable release needs to pass.
#[must_use]
pub fn until_pass(
    settings: &Settings,
    comparison: &Comparison,
    expectation: &Expectation,
) -> Option<Foresight> {
    let ln_needed = -settings.false_pass_budget.ln();
    let Expectation { canary_share, bad_rate, burst, .. } = *expectation;
    let requests =
        process(settings, comparison).requests_to_pass(bad_rate, canary_share, burst, ln_needed)?;
    foresight(requests, expectation)
}

fn process(settings: &Settings, comparison: &Comparison) -> Process {
    Process::new(comparison.tolerate, comparison.pass_if_below, settings.late_stake, settings.max_time_ms)
}

fn foresight(requests: f64, expectation: &Expectation) -> Option<Foresight> {
    let minutes = requests / (expectation.requests_per_minute * expectation.canary_share);
    minutes.is_finite().then_some(Foresight { canary_requests: requests.ceil() as u64, minutes })
}
