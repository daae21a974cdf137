//! Where slow begins: thresholds of a route from what the stable release took in *past* intervals.
//!
//! The past alone decides, so that a threshold cannot lean towards what it is about to judge. It lies on a bound of the
//! histogram: on the one that leaves nearest to the wished share above it.

use serde::{Deserialize, Serialize};

/// Requests of the stable release before there is a threshold: below it a p99 is chance.
const REQUESTS_MIN: f64 = 200.0;
/// The past loses half of its weight with each so many requests that come after it, and each interval at most once: what is
/// usual changes over a day.
const HALVED_BY_REQUESTS: f64 = 200_000.0;

/// The times of one route so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Times {
    counts: Vec<f64>,
    total: f64,
}

impl Times {
    /// The bucket above which a request is slow; none while too little is known.
    pub(crate) fn threshold(&self, quantile: f64) -> Option<usize> {
        if self.total < REQUESTS_MIN {
            return None;
        }
        let wished = 1.0 - quantile;
        let mut above = self.total;
        let mut best: Option<(f64, usize)> = None;
        for (bucket, count) in self.counts.iter().enumerate() {
            above -= count;
            let share = above / self.total;
            // Above the last filled bucket nothing is left to compare.
            if share <= 0.0 {
                break;
            }
            let distance = (share / wished).ln().abs();
            if best.is_none_or(|(known, _)| distance < known) {
                best = Some((distance, bucket));
            }
        }
        best.map(|(_, bucket)| bucket)
    }

    /// Adds what an interval brought.
    pub(crate) fn learn(&mut self, counts: &[u64]) {
        let fresh: u64 = counts.iter().sum();
        let kept = 0.5_f64.powf((fresh as f64 / HALVED_BY_REQUESTS).min(1.0));
        self.counts.resize(counts.len(), 0.0);
        for (sum, count) in self.counts.iter_mut().zip(counts) {
            *sum = *sum * kept + *count as f64;
        }
        self.total = self.counts.iter().sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_is_the_bound_that_leaves_nearest_to_the_share() {
        let mut times = Times::default();
        // Above bucket 0: 60 %, 1: 12 %, 2: 1.5 %, 3: 0.
        times.learn(&[400, 480, 105, 15, 0]);
        assert_eq!(times.threshold(0.5), Some(0));
        assert_eq!(times.threshold(0.9), Some(1));
        assert_eq!(times.threshold(0.99), Some(2));
    }

    #[test]
    fn too_little_past_gives_none_and_an_old_past_fades() {
        let mut times = Times::default();
        times.learn(&[100, 99]);
        assert_eq!(times.threshold(0.5), None);
        times.learn(&[0, 0, 2]);
        assert_eq!(times.threshold(0.5), Some(0));
        for _ in 0..20 {
            times.learn(&[0, 120_000, 80_000]);
        }
        assert_eq!(times.threshold(0.5), Some(1), "what is usual has moved");
    }
}
