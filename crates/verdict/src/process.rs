//! The stratified count e-process: how strongly counts speak against "the canary is at most ψ₀ times as bad".
//!
//! A stratum is one route in one interval, with `n_c` and `n_s` requests and `x_c` and `x_s` bad ones. Given how many requests
//! each arm had and how many were bad in all, each bad one is the canary's with probability
//!
//! ```text
//! π = n_c / (n_c + n_s)        q(ψ) = ψπ / (ψπ + 1 − π)
//! ```
//!
//! when a request of the canary is bad ψ times as often as one of the stable release, whatever that rate is and however it
//! moves. So for each alternative ψ
//!
//! ```text
//! ln E(ψ; ψ₀) += [ x_c·ln(q(ψ)/q(ψ₀)) + x_s·ln((1−q(ψ))/(1−q(ψ₀))) ] / φ
//! ```
//!
//! is a test martingale while the ratio is ψ₀, and a supermartingale while it is on the other side of ψ₀ than ψ. A mean over
//! [`ALTERNATIVES`] of them with weights chosen beforehand is one again, and by Ville's inequality exceeds 1/α at any time with probability at most α: it may
//! be looked at as often as one likes. Counts: Lindon and Malek 2022 (arXiv 2011.03567). Requests that are good or bad
//! instead of Poisson counts make it conservative at ψ₀ = 1 (Hoeffding 1963), approximate at other ψ₀. φ ≥ 1 tempers it for
//! errors in bursts ([`crate::burst`]): a heuristic, exact only for bursts of equal size.
//!
//! A part of the stake may be kept for later: each minute one share of it begins anew at 1 and runs from there. The sum of all
//! shares, and of what is not staked yet, is an e-process still, and finds a fault that begins after an hour of health.
//!
//! Guarantees: constant state; cost independent of the number of requests.
//! Not in here: which requests count as bad (`judge`), and what is done about it.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

/// Ratios between one tenth and ten times the one that is tested, or so many on one side of it.
pub const ALTERNATIVES: usize = 24;
/// How often a part of the stake begins anew.
pub const STAKE_INTERVAL_MS: u64 = 60_000;
/// Most parts of the stake: a day's. A longer rollout stakes nothing anew after that.
const STAKES_MAX: u64 = 24 * 60;

/// The lattice of ratios: 10^(m/24) for m from −48 to 48, a hundredth to a hundred. All alternatives lie on it, so that one
/// sum of likelihoods for each point serves every null hypothesis.
const STEPS_PER_DECADE: i32 = 24;
const LATTICE_END: i32 = 48;
const LATTICE_POINTS: usize = 97;
/// The smallest difference that an alternative looks for.
const NEAREST_ALTERNATIVE: f64 = 1.1;
/// The weights of the alternatives: a normal curve of their distance from the null hypothesis in ln ψ, around a factor of 3
/// and wide enough to leave none out. Faults of that size are the ones whose delay matters: larger ones are found at once
/// whatever their weight, smaller ones take their time. It makes up for what the late stake costs.
const LIKELY_FACTOR: f64 = 3.0;
const LIKELY_SPREAD: f64 = 0.8;
/// Absorbs the rounding of a lattice point that is exactly at its limit.
const ROUNDING: f64 = 1e-9;

/// The logarithms of the lattice's ratios.
static LN_RATIOS: LazyLock<[f64; LATTICE_POINTS]> = LazyLock::new(|| {
    std::array::from_fn(|index| {
        let steps = f64::from(i32::try_from(index).unwrap_or(0) - LATTICE_END);
        steps / f64::from(STEPS_PER_DECADE) * std::f64::consts::LN_10
    })
});
static RATIOS: LazyLock<[f64; LATTICE_POINTS]> = LazyLock::new(|| LN_RATIOS.map(f64::exp));

/// ln of each alternative's weight by its place from the null hypothesis, the nearest first; scaled so that the mean of the
/// weights is 1.
static LN_WEIGHTS: LazyLock<[f64; ALTERNATIVES]> = LazyLock::new(|| {
    let distance = |place: usize| (place + 1) as f64 / f64::from(STEPS_PER_DECADE) * std::f64::consts::LN_10;
    let curve = |place| -0.5 * ((distance(place) - LIKELY_FACTOR.ln()) / LIKELY_SPREAD).powi(2);
    let curves: [f64; ALTERNATIVES] = std::array::from_fn(curve);
    curves.map(|curve| curve - ln_mean(&curves))
});

/// One route in one interval: what the process takes in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stratum {
    /// π: the canary's share of the requests, between 0 and 1.
    pub share: f64,
    /// x_c.
    pub canary_bad: u64,
    /// x_s.
    pub stable_bad: u64,
}

/// ln of the likelihood of a stratum at ratio ψ, less that at 1.
fn gain(stratum: &Stratum, ratio: f64, ln_ratio: f64) -> f64 {
    let all = (stratum.canary_bad + stratum.stable_bad) as f64;
    stratum.canary_bad as f64 * ln_ratio - all * (stratum.share * (ratio - 1.0)).ln_1p()
}

/// What counts have said so far about one metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    tolerate: f64,
    limit: f64,
    /// Sums of [`gain`]/φ on the lattice, at `tolerate` and at `limit`.
    gains: Vec<f64>,
    at_tolerate: f64,
    at_limit: f64,
    /// ln of what each alternative's stakes have grown to.
    stakes: Vec<f64>,
    /// What of the stake is not staked yet, in shares of `per_stake`.
    stakes_left: u64,
    per_stake: f64,
    next_stake_ms: Option<u64>,
    /// ln E of each alternative against `limit`, since the step began.
    passes: Vec<f64>,
    /// Where each alternative's evidence was lowest, and when: where a fault of that size most likely began.
    lows: Vec<(f64, Option<u64>)>,
    began_ms: Option<u64>,
}

impl Process {
    /// Tests "at most `tolerate` times as bad" against worse, and "at least `limit` times as bad" against better.
    /// `late_stake` of the stake is kept for later minutes, up to `max_time_ms`.
    #[must_use]
    pub fn new(tolerate: f64, limit: f64, late_stake: f64, max_time_ms: u64) -> Self {
        let later = (max_time_ms / STAKE_INTERVAL_MS).min(STAKES_MAX).saturating_sub(1);
        let late_stake = if later == 0 { 0.0 } else { late_stake };
        Self {
            tolerate,
            limit,
            gains: vec![0.0; LATTICE_POINTS],
            at_tolerate: 0.0,
            at_limit: 0.0,
            stakes: LN_WEIGHTS.iter().map(|weight| weight + (1.0 - late_stake).ln()).collect(),
            stakes_left: if late_stake > 0.0 { later } else { 0 },
            per_stake: if later == 0 { 0.0 } else { late_stake / later as f64 },
            next_stake_ms: None,
            passes: fresh_passes(),
            lows: vec![(0.0, None); ALTERNATIVES],
            began_ms: None,
        }
    }

    /// Takes an interval in, all its strata at once.
    pub fn observe(&mut self, start_ms: u64, end_ms: u64, strata: &[Stratum], burst: f64) {
        if strata.is_empty() {
            return;
        }
        self.stake(start_ms);
        let worse = self.worse_from();
        let better = self.better_from();
        let mut gains = [0.0; LATTICE_POINTS];
        let (mut at_tolerate, mut at_limit) = (0.0, 0.0);
        for stratum in strata.iter().filter(|stratum| stratum.canary_bad + stratum.stable_bad > 0) {
            for ((sum, ratio), ln_ratio) in gains.iter_mut().zip(RATIOS.iter()).zip(LN_RATIOS.iter()) {
                *sum += gain(stratum, *ratio, *ln_ratio);
            }
            at_tolerate += gain(stratum, self.tolerate, self.tolerate.ln());
            at_limit += gain(stratum, self.limit, self.limit.ln());
        }
        for (sum, gain) in self.gains.iter_mut().zip(gains) {
            *sum += gain / burst;
        }
        self.at_tolerate += at_tolerate / burst;
        self.at_limit += at_limit / burst;
        for (stake, gain) in self.stakes.iter_mut().zip(&gains[worse..]) {
            *stake += (gain - at_tolerate) / burst;
        }
        for (pass, gain) in self.passes.iter_mut().zip(&gains[better..]) {
            *pass += (gain - at_limit) / burst;
        }
        for (low, gain) in self.lows.iter_mut().zip(&self.gains[worse..]) {
            let evidence = gain - self.at_tolerate;
            if evidence < low.0 {
                *low = (evidence, Some(end_ms));
            }
        }
    }

    /// The pass is judged anew from here on.
    pub fn begin_step(&mut self) {
        self.passes = fresh_passes();
    }

    /// ln of the evidence that the canary is worse than tolerated.
    #[must_use]
    pub fn ln_worse(&self) -> f64 {
        let unstaked = (self.stakes_left as f64 * self.per_stake).ln();
        ln_add(ln_mean(&self.stakes), unstaked)
    }

    /// ln of the evidence, since the step began, that it is better than the limit.
    #[must_use]
    pub fn ln_better(&self) -> f64 {
        ln_mean(&self.passes)
    }

    /// The confidence sequence: below the first the ratio surely is not, above the second neither, each at any time with an
    /// error of at most `alpha`. None where that side is open within a tenth and ten.
    #[must_use]
    pub fn bounds(&self, alpha: f64) -> (Option<f64>, Option<f64>) {
        let needed = -alpha.ln();
        let inner = usize::try_from(STEPS_PER_DECADE).unwrap_or(0);
        let outer = LATTICE_POINTS - 1 - inner;
        let mean = |null: usize, alternatives: &mut dyn Iterator<Item = &f64>| {
            let weighed = alternatives.zip(LN_WEIGHTS.iter()).map(|(gain, weight)| gain + weight);
            ln_mean(&weighed.collect::<Vec<f64>>()) - self.gains[null]
        };
        let above = |null: usize| mean(null, &mut self.gains[null + 1..=null + ALTERNATIVES].iter());
        let below = |null: usize| mean(null, &mut self.gains[null - ALTERNATIVES..null].iter().rev());
        let at_least = (inner..=outer).rev().find(|null| above(*null) >= needed).map(|null| {
            crossing(
                null,
                above(null),
                null + 1,
                if null == outer { f64::NAN } else { above(null + 1) },
                needed,
            )
        });
        let at_most = (inner..=outer).find(|null| below(*null) >= needed).map(|null| {
            crossing(
                null,
                below(null),
                null - 1,
                if null == inner { f64::NAN } else { below(null - 1) },
                needed,
            )
        });
        (at_least, at_most)
    }

    /// When the fault most likely began, by the alternative that explains the counts best; none before the first bad request.
    #[must_use]
    pub fn onset_ms(&self) -> Option<u64> {
        let worse = self.worse_from();
        let rises = self.lows.iter().zip(&self.gains[worse..]);
        let best = rises
            .map(|((low, at), gain)| (gain - self.at_tolerate - low, *at))
            .max_by(|one, other| one.0.total_cmp(&other.0))?;
        best.1.or(self.began_ms)
    }

    /// After how many more requests of the canary the evidence for a pass is complete, if `rate` of the requests of both arms
    /// are bad and the canary has `share` of them. None when that says nothing, or when it takes over a thousand million.
    #[must_use]
    pub fn requests_to_pass(&self, rate: f64, share: f64, burst: f64, ln_needed: f64) -> Option<f64> {
        let from = self.better_from();
        let growth = growth(rate, 1.0, share, self.limit, &RATIOS[from..from + ALTERNATIVES], burst);
        requests_to(&self.passes, &growth, ln_needed)
    }

    /// The same for the evidence against a canary that is `ratio` times as bad.
    #[must_use]
    pub fn requests_to_abort(
        &self,
        rate: f64,
        ratio: f64,
        share: f64,
        burst: f64,
        ln_needed: f64,
    ) -> Option<f64> {
        let from = self.worse_from();
        let growth = growth(rate, ratio, share, self.tolerate, &RATIOS[from..from + ALTERNATIVES], burst);
        requests_to(&self.stakes, &growth, ln_needed)
    }

    /// Begins anew what is due of the late stake.
    fn stake(&mut self, start_ms: u64) {
        self.began_ms.get_or_insert(start_ms);
        let next = self.next_stake_ms.get_or_insert(start_ms.saturating_add(STAKE_INTERVAL_MS));
        if start_ms < *next || self.stakes_left == 0 {
            return;
        }
        let due = ((start_ms - *next) / STAKE_INTERVAL_MS + 1).min(self.stakes_left);
        *next = next.saturating_add(due * STAKE_INTERVAL_MS);
        self.stakes_left -= due;
        let added = (due as f64 * self.per_stake).ln();
        for (stake, weight) in self.stakes.iter_mut().zip(LN_WEIGHTS.iter()) {
            *stake = ln_add(*stake, added + weight);
        }
    }

    /// Where the alternatives above `tolerate` begin.
    fn worse_from(&self) -> usize {
        let nearest = self.tolerate * NEAREST_ALTERNATIVE * (1.0 - ROUNDING);
        let from = RATIOS.partition_point(|ratio| *ratio < nearest);
        from.min(LATTICE_POINTS - ALTERNATIVES)
    }

    /// Where the alternatives below `limit` begin.
    fn better_from(&self) -> usize {
        let nearest = self.limit / NEAREST_ALTERNATIVE * (1.0 + ROUNDING);
        let end = RATIOS.partition_point(|ratio| *ratio <= nearest);
        end.max(ALTERNATIVES) - ALTERNATIVES
    }
}

/// The evidence for a pass of a step that has seen nothing: the alternatives' weights, the nearest to the limit last.
fn fresh_passes() -> Vec<f64> {
    LN_WEIGHTS.iter().rev().copied().collect()
}

/// The ratio between two neighbours of the lattice at which the evidence is as needed.
fn crossing(inside: usize, evidence: f64, next: usize, next_evidence: f64, needed: f64) -> f64 {
    let part = (evidence - needed) / (evidence - next_evidence);
    let part = if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 };
    (LN_RATIOS[inside] + part * (LN_RATIOS[next] - LN_RATIOS[inside])).exp()
}

/// What each alternative's evidence grows by with each request of the canary, on the average.
fn growth(rate: f64, ratio: f64, share: f64, null: f64, alternatives: &[f64], burst: f64) -> Vec<f64> {
    let (canary, stable) = (rate * ratio, rate * (1.0 - share) / share);
    let value = |at: f64| canary * at.ln() - (canary + stable) * (share * (at - 1.0)).ln_1p();
    alternatives.iter().map(|at| (value(*at) - value(null)) / burst).collect()
}

/// More requests than this are not foretold.
const REQUESTS_MAX: f64 = 1e9;

/// When ln of the mean of growing numbers reaches what is needed.
pub(crate) fn requests_to(now: &[f64], growth: &[f64], ln_needed: f64) -> Option<f64> {
    let at = |requests: f64| {
        let then: Vec<f64> = now.iter().zip(growth).map(|(now, growth)| now + growth * requests).collect();
        ln_mean(&then)
    };
    if at(0.0) >= ln_needed {
        return Some(0.0);
    }
    let mut enough = 1.0;
    while at(enough) < ln_needed {
        enough *= 2.0;
        if enough > REQUESTS_MAX {
            return None;
        }
    }
    let mut short = enough / 2.0;
    while enough - short > 0.5 {
        let middle = f64::midpoint(short, enough);
        if at(middle) < ln_needed { short = middle } else { enough = middle }
    }
    Some(enough.ceil())
}

/// ln of the mean of what these are the logarithms of.
pub(crate) fn ln_mean(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    let sum: f64 = values.iter().map(|value| (value - largest).exp()).sum();
    largest + (sum / values.len() as f64).ln()
}

/// ln of the sum of what these are the logarithms of.
pub(crate) fn ln_add(one: f64, other: f64) -> f64 {
    let (large, small) = if one < other { (other, one) } else { (one, other) };
    if small == f64::NEG_INFINITY { large } else { large + (small - large).exp().ln_1p() }
}
