//! What a judge says: one of three answers, and everything that a person needs to check it.

use serde::{Deserialize, Serialize};

use crate::burst::dispersion;
use crate::interval::Tally;
use crate::judge::{Judge, Test};
use crate::settings::{Comparison, Metric};

/// The three answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every comparison is surely better than its limit in this step.
    Pass,
    /// The canary is worse than tolerated. Final.
    Abort,
    /// Neither, yet.
    Inconclusive,
}

/// That and when a canary was aborted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Abort {
    pub(crate) at_ms: u64,
}

/// A verdict with its reasons, as of the end of the last interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The answer.
    pub verdict: Verdict,
    /// The end of the last interval that counts, in milliseconds since 1970; none before the first.
    pub at_ms: Option<u64>,
    /// How long the canary had been observed then.
    pub elapsed_ms: u64,
    /// ln of the evidence for an abort, over all comparisons.
    pub ln_evidence: f64,
    /// ln of the evidence that an abort needs: ln 1/α.
    pub ln_needed: f64,
    /// Requests of the canary that are still needed for a pass, if it is as good as the stable release; the most that any
    /// comparison needs. None when that cannot be told: then a comparison says so.
    pub requests_needed: Option<u64>,
    /// Each comparison, in the order of the settings.
    pub findings: Vec<Finding>,
}

/// What one comparison found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What was compared.
    pub comparison: Comparison,
    /// What came of it.
    pub state: FindingState,
    /// The counts. Of missing traffic nothing is bad: the requests themselves are compared.
    pub counts: Tally,
    /// The share of the requests that the canary is configured to get, for missing traffic; that it had, else.
    pub share: Option<f64>,
    /// How many times as bad it is: bad share against bad share, or for missing traffic expected against ended requests. None
    /// while that cannot be divided.
    pub ratio: Option<f64>,
    /// The ratio is surely not below; none while that is open.
    pub at_least: Option<f64>,
    /// The ratio is surely not above; none while that is open.
    pub at_most: Option<f64>,
    /// ln of its own evidence for an abort, weighed by its part of the budget.
    pub ln_evidence: f64,
    /// φ, and how many minutes before the rollout it was learnt from.
    pub burst: f64,
    /// Minutes with something to learn from.
    pub burst_minutes: u32,
    /// Requests of the canary that it still needs to pass; none when that cannot be told. 0 when it has passed.
    pub requests_needed: Option<u64>,
    /// Routes by how many more bad requests they have than the stable release would have had, most first, at most five.
    pub routes: Vec<RouteCount>,
    /// Canary hosts with their requests and bad ones.
    pub hosts: Vec<HostCount>,
    /// Whether these hosts differ more than chance explains.
    pub do_hosts_differ: bool,
    /// When it most likely began, in milliseconds since the canary's beginning; none when nothing speaks for a fault.
    pub onset_ms: Option<u64>,
}

/// What one comparison says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingState {
    /// It is why the canary was aborted, by the closed test over all comparisons (e-Holm).
    Worse,
    /// The canary is surely better than the limit.
    Healthy,
    /// Neither is sure.
    Undecided,
}

/// One route's counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteCount {
    /// The route.
    pub route: String,
    /// Its counts.
    pub counts: Tally,
    /// Where slow begins there, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold_us: Option<u64>,
}

/// One canary host's counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCount {
    /// The host.
    pub host: String,
    /// Its requests.
    pub requests: u64,
    /// Those of them that count against it.
    pub bad: u64,
}

/// Routes that an explanation lists.
const ROUTES_SHOWN_MAX: usize = 5;
/// Hosts differ when their dispersion is above its mean by so many standard deviations.
const HOSTS_DIFFER_DEVIATIONS: f64 = 3.0;

impl Judgement {
    pub(crate) fn of(judge: &Judge) -> Self {
        let settings = &judge.settings;
        let ln_needed = -settings.false_abort_budget.ln();
        let began_ms = judge.began_ms.unwrap_or_default();
        let at_ms = judge.abort.as_ref().map(|abort| abort.at_ms).or(judge.began_ms.and(judge.ended_ms));
        let weights = settings.weights();
        let culprits = culprits(judge, &weights, ln_needed);
        let findings: Vec<Finding> = judge
            .tests
            .iter()
            .zip(weights)
            .enumerate()
            .map(|(index, (test, weight))| {
                let state = match (culprits.contains(&index), test.has_passed) {
                    (true, _) => FindingState::Worse,
                    (_, true) => FindingState::Healthy,
                    _ => FindingState::Undecided,
                };
                finding(
                    test,
                    state,
                    weight,
                    began_ms,
                    settings.false_abort_budget,
                    settings.false_pass_budget,
                )
            })
            .collect();
        let needed: Option<Vec<u64>> = findings.iter().map(|finding| finding.requests_needed).collect();
        Self {
            verdict: judge.verdict(),
            at_ms,
            elapsed_ms: at_ms.unwrap_or(began_ms).saturating_sub(began_ms),
            ln_evidence: judge.ln_evidence(),
            ln_needed,
            requests_needed: needed.and_then(|needed| needed.into_iter().max()),
            findings,
        }
    }

    /// The comparisons that the canary was aborted for.
    pub fn culprits(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.state == FindingState::Worse)
    }
}

/// Which comparisons an abort is due to: those that the closed test with weighted means rejects by themselves (e-Holm, Vovk
/// and Wang 2021). When none is, several did it together, and the one that added most is named.
fn culprits(judge: &Judge, weights: &[f64], ln_needed: f64) -> Vec<usize> {
    if judge.abort.is_none() {
        return Vec::new();
    }
    let ln_evidence: Vec<f64> = judge.tests.iter().map(|test| test.process.ln_worse()).collect();
    // Relative to the largest, so that nothing overflows.
    let largest = ln_evidence.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let evidence: Vec<f64> = ln_evidence.iter().map(|ln| (ln - largest).exp()).collect();
    let mut rising: Vec<usize> = (0..evidence.len()).collect();
    rising.sort_by(|one, other| evidence[*one].total_cmp(&evidence[*other]));
    let found: Vec<usize> = (0..evidence.len())
        .filter(|index| {
            let (mut weight, mut sum) = (weights[*index], weights[*index] * evidence[*index]);
            for other in rising.iter().filter(|other| *other != index) {
                if evidence[*other] >= sum / weight {
                    break;
                }
                weight += weights[*other];
                sum += weights[*other] * evidence[*other];
            }
            (sum / weight).ln() + largest >= ln_needed
        })
        .collect();
    if !found.is_empty() {
        return found;
    }
    let share = |index: usize| weights[index] * evidence[index];
    (0..evidence.len()).max_by(|one, other| share(*one).total_cmp(&share(*other))).into_iter().collect()
}

fn finding(
    test: &Test,
    state: FindingState,
    weight: f64,
    began_ms: u64,
    false_abort: f64,
    false_pass: f64,
) -> Finding {
    let counts = test.total;
    let is_traffic = test.comparison.metric == Metric::Traffic;
    let (at_least, at_most) = test.process.bounds(false_abort);
    let ratio = if is_traffic { missing_ratio(&counts, test.share) } else { bad_ratio(&counts) };
    let mut routes: Vec<RouteCount> = test
        .routes
        .iter()
        .filter(|(_, counts)| counts.canary > 0)
        .map(|(route, counts)| RouteCount {
            route: route.clone(),
            counts: *counts,
            threshold_us: test.thresholds_us.get(route).copied(),
        })
        .collect();
    routes.sort_by(|one, other| other.counts.excess().total_cmp(&one.counts.excess()));
    routes.truncate(ROUTES_SHOWN_MAX);
    let hosts: Vec<HostCount> = test
        .hosts
        .iter()
        .map(|(host, (requests, bad))| HostCount { host: host.clone(), requests: *requests, bad: *bad })
        .collect();
    Finding {
        comparison: test.comparison.clone(),
        state,
        counts,
        share: test.share,
        ratio,
        at_least,
        at_most,
        ln_evidence: weight.ln() + test.process.ln_worse(),
        burst: test.burst_factor(),
        burst_minutes: test.burst.minutes(),
        requests_needed: requests_needed(test, false_pass),
        routes,
        do_hosts_differ: !is_traffic && do_differ(&hosts, test.burst_factor()),
        hosts,
        onset_ms: test
            .process
            .onset_ms()
            .filter(|_| test.process.ln_worse() > 0.0)
            .map(|onset| onset.saturating_sub(began_ms)),
    }
}

fn bad_ratio(counts: &Tally) -> Option<f64> {
    (counts.canary > 0 && counts.stable_bad > 0).then(|| {
        counts.canary_bad as f64 / counts.canary as f64 * counts.stable as f64 / counts.stable_bad as f64
    })
}

/// The odds that the weight gives, against the odds that came about.
fn missing_ratio(counts: &Tally, share: Option<f64>) -> Option<f64> {
    let share = share?;
    (counts.canary > 0).then(|| share / (1.0 - share) * counts.stable as f64 / counts.canary as f64)
}

/// Requests of the canary until a pass, if it is as good as the stable release.
fn requests_needed(test: &Test, false_pass: f64) -> Option<u64> {
    if test.has_passed {
        return Some(0);
    }
    let ln_needed = -false_pass.ln();
    let burst = test.burst_factor();
    let compared = match test.comparison.metric {
        Metric::Traffic => test.share.and_then(|share| {
            // For each request of the canary, counted as the "stable" side: see `observe_traffic`.
            let needed = test.process.requests_to_pass(1.0, 1.0 - share, burst, ln_needed)?;
            Some(needed * share / (1.0 - share))
        }),
        _ => test.total.share().and_then(|share| {
            let needed =
                if test.negligible.is_some() { ln_needed + std::f64::consts::LN_2 } else { ln_needed };
            test.process.requests_to_pass(test.total.pooled_rate(), share, burst, needed)
        }),
    };
    let absolute = test.negligible.as_ref().and_then(|negligible| {
        negligible.requests_to_pass(test.total.pooled_rate(), burst, ln_needed + std::f64::consts::LN_2)
    });
    let fewest = match (compared, absolute) {
        (Some(one), Some(other)) => one.min(other),
        (one, other) => one.or(other)?,
    };
    Some(fewest.ceil().max(1.0) as u64)
}

/// Whether Pearson's dispersion between hosts is larger than chance makes it.
fn do_differ(hosts: &[HostCount], burst: f64) -> bool {
    let counts = hosts.iter().map(|host| (host.requests, host.bad));
    let degrees = (hosts.len().max(2) - 1) as f64;
    dispersion(counts)
        .is_some_and(|found| found / burst > 1.0 + HOSTS_DIFFER_DEVIATIONS * (2.0 / degrees).sqrt())
}
