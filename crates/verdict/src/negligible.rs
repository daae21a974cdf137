//! That a canary has surely fewer bad requests than a stated share, whatever the stable release has.
//!
//! A service that answers a million requests without an error gives nothing to compare, and its canary would wait for ever.
//! With `n` requests of which `x` are bad, and a share `r` that is still too many,
//!
//! ```text
//! ln E(p) += [ x·ln(p/r) + (n−x)·ln((1−p)/(1−r)) ] / φ
//! ```
//!
//! for shares `p` below `r` is a supermartingale while the canary's share is `r` or more (Bernoulli; Ville as in
//! [`crate::process`]). Nothing bad at all passes `r` with β after about `ln(1/β)/r` requests.

use serde::{Deserialize, Serialize};

use crate::process::{ln_mean, requests_to};

/// Shares that are looked for, evenly in their logarithm: from a hundredth of the share that is tested to two thirds of it.
const ALTERNATIVES: u32 = 12;
const SMALLEST: f64 = 0.01;
const LARGEST: f64 = 0.67;

/// What counts have said about one metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Negligible {
    share: f64,
    gains: Vec<f64>,
}

impl Negligible {
    pub(crate) fn new(share: f64) -> Self {
        Self { share, gains: alternatives(share).map(|_| 0.0).collect() }
    }

    pub(crate) fn begin_step(&mut self) {
        self.gains.fill(0.0);
    }

    pub(crate) fn observe(&mut self, requests: u64, bad: u64, burst: f64) {
        let (bad, good) = (bad as f64, requests.saturating_sub(bad) as f64);
        for (sum, at) in self.gains.iter_mut().zip(alternatives(self.share)) {
            *sum += (bad * (at / self.share).ln() + good * ((1.0 - at) / (1.0 - self.share)).ln()) / burst;
        }
    }

    pub(crate) fn ln_better(&self) -> f64 {
        ln_mean(&self.gains)
    }

    /// After how many more requests it is complete when `rate` of them are bad.
    pub(crate) fn requests_to_pass(&self, rate: f64, burst: f64, ln_needed: f64) -> Option<f64> {
        let growth: Vec<f64> = alternatives(self.share)
            .map(|at| {
                (rate * (at / self.share).ln() + (1.0 - rate) * ((1.0 - at) / (1.0 - self.share)).ln())
                    / burst
            })
            .collect();
        requests_to(&self.gains, &growth, ln_needed)
    }
}

fn alternatives(share: f64) -> impl Iterator<Item = f64> {
    let range = (LARGEST / SMALLEST).ln();
    (0..ALTERNATIVES)
        .map(move |index| share * SMALLEST * (range * f64::from(index) / f64::from(ALTERNATIVES - 1)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_evidence_is_as_computed_apart() {
        // ln of the mean over the twelve shares, written down in Python from the formula above: 3 bad of 2,000 against 0.5 %.
        let mut negligible = Negligible::new(0.005);
        negligible.observe(2000, 3, 1.0);
        assert!((negligible.ln_better() - 2.263_544_088_911_136).abs() < 1e-9, "{}", negligible.ln_better());
    }

    #[test]
    fn nothing_bad_passes_after_a_few_times_the_reciprocal() {
        let foretold = Negligible::new(0.002).requests_to_pass(0.0, 1.0, 20f64.ln()).unwrap();
        assert!((1500.0..2500.0).contains(&foretold), "{foretold}");
        let mut negligible = Negligible::new(0.002);
        negligible.observe(foretold as u64, 0, 1.0);
        assert!(negligible.ln_better() >= 20f64.ln());
        assert_eq!(Negligible::new(0.002).requests_to_pass(0.002, 1.0, 20f64.ln()), None);
    }

    #[test]
    fn the_share_itself_gathers_no_evidence_on_the_average() {
        for rate in [0.002, 0.01, 0.5] {
            let one = |bad| {
                let mut negligible = Negligible::new(0.002);
                negligible.observe(1, bad, 1.0);
                negligible.ln_better().exp()
            };
            assert!(rate * one(1) + (1.0 - rate) * one(0) <= 1.0 + 1e-12, "{rate}");
        }
    }
}
