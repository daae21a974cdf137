//! Simulated traffic: what a canary and nine stable hosts count between two looks.

use greenlight_verdict::{Arm, Cell, Histogram, Interval};

use crate::chance::Chance;

/// Hosts of the stable release; the canary has one.
pub(crate) const STABLE_HOSTS: u64 = 9;
pub(crate) const MINUTE_MS: u64 = 60_000;
/// How long each run is at most.
pub(crate) const MINUTES: u64 = 60;
/// The spread of the times in a latency world: the logarithm's standard deviation; the median is 50 ms.
const TIMES_DEVIATION: f64 = 0.7;
const TIMES_MEDIAN_US: f64 = 50_000.0;
/// Errors per burst: geometric with this mean, so that a host's errors in a minute vary three times as much as independent ones:
/// E[S²]/E[S] = 2·mean − 1.
const BURST_MEAN: f64 = 2.0;

/// How a canary and the stable release behave. Rates and shares by the minute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct World {
    pub(crate) requests_per_minute: u64,
    pub(crate) looks_per_minute: u64,
    pub(crate) share: fn(u64) -> f64,
    pub(crate) stable_rate: fn(u64) -> f64,
    pub(crate) canary_rate: fn(u64) -> f64,
    pub(crate) comes_in_bursts: bool,
    /// The canary takes so many times as long for everything; none in worlds where nobody takes the time.
    pub(crate) canary_slowness: Option<f64>,
}

/// What was counted between two looks.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    pub(crate) interval: Interval,
    pub(crate) canary: u64,
    pub(crate) canary_bad: u64,
    pub(crate) stable: u64,
    pub(crate) stable_bad: u64,
}

impl World {
    /// 5,000 requests a minute of which a tenth goes to the canary, 1 % errors in both arms.
    pub(crate) const PLAIN: Self = Self {
        requests_per_minute: 5000,
        looks_per_minute: 1,
        share: |_| 0.1,
        stable_rate: |_| 0.01,
        canary_rate: |_| 0.01,
        comes_in_bursts: false,
        canary_slowness: None,
    };

    /// The looks of one run.
    pub(crate) fn looks(&self, chance: &mut Chance) -> Vec<Look> {
        (0..MINUTES * self.looks_per_minute).map(|number| self.look(chance, number, false)).collect()
    }

    /// As many minutes before the canary: its host is one of the stable ones.
    pub(crate) fn past(&self, chance: &mut Chance) -> Vec<Interval> {
        (0..MINUTES * self.looks_per_minute).map(|number| self.look(chance, number, true).interval).collect()
    }

    /// Each look brings about a request to the canary for so many requests in all.
    pub(crate) fn canary_requests_per_look(&self) -> f64 {
        self.requests_per_minute as f64 / self.looks_per_minute as f64 * (self.share)(0)
    }

    /// The bounds of the histograms: from the stable release's p90 upwards, since nothing below is looked at.
    pub(crate) fn bounds_us() -> Vec<u64> {
        greenlight_verdict::usual_bounds_us().into_iter().filter(|bound| *bound > 100_000).collect()
    }

    fn look(&self, chance: &mut Chance, number: u64, is_past: bool) -> Look {
        let minute = number / self.looks_per_minute;
        let length_ms = MINUTE_MS / self.looks_per_minute;
        let share = (self.share)(minute);
        // The remainder is spread evenly over the looks of a minute.
        let per_look = |index: u64| index * self.requests_per_minute / self.looks_per_minute;
        let requests = per_look(number + 1) - per_look(number);
        let canary = binomial(chance, requests, share);
        let mut left = requests - canary;
        let mut cells = Vec::new();
        let canary_arm = if is_past { Arm::Stable } else { Arm::Canary };
        let canary_rate = if is_past { self.stable_rate } else { self.canary_rate };
        let slowness = self.canary_slowness.map(|slowness| if is_past { 1.0 } else { slowness });
        cells.push(self.cell(chance, canary_arm, "canary", canary, canary_rate(minute), slowness));
        for host in 0..STABLE_HOSTS {
            // Chance decides between canary and stable; how the stable hosts share the rest changes nothing that is judged.
            let own = left / (STABLE_HOSTS - host);
            left -= own;
            let usual = self.canary_slowness.map(|_| 1.0);
            let name = format!("stable-{host}");
            cells.push(self.cell(chance, Arm::Stable, &name, own, (self.stable_rate)(minute), usual));
        }
        let (canary, stable) = cells.split_at(1);
        let sum = |of: fn(&Cell) -> u64| stable.iter().map(of).sum::<u64>();
        let look = Look {
            canary: canary[0].requests,
            canary_bad: canary[0].errors,
            stable: sum(|cell| cell.requests),
            stable_bad: sum(|cell| cell.errors),
            interval: Interval {
                // The past lies before 0 of the rollout.
                start_ms: number * length_ms + if is_past { 0 } else { MINUTES * MINUTE_MS },
                length_ms,
                canary_share: Some(share),
                cells: Vec::new(),
            },
        };
        Look { interval: Interval { cells, ..look.interval }, ..look }
    }

    fn cell(
        &self,
        chance: &mut Chance,
        arm: Arm,
        host: &str,
        requests: u64,
        rate: f64,
        slowness: Option<f64>,
    ) -> Cell {
        let errors = if self.comes_in_bursts {
            bursts(chance, requests, rate)
        } else {
            binomial(chance, requests, rate)
        };
        Cell {
            arm,
            host: host.to_owned(),
            route: "/".to_owned(),
            requests,
            errors,
            latency: slowness.map_or_else(Histogram::default, |slowness| times(chance, requests, slowness)),
            in_flight: Histogram::default(),
        }
    }
}

/// How many of `trials` succeed, exactly: the gaps between successes are geometric.
pub(crate) fn binomial(chance: &mut Chance, trials: u64, probability: f64) -> u64 {
    if probability <= 0.0 || trials == 0 {
        return 0;
    }
    if probability > 0.5 {
        return trials - binomial(chance, trials, 1.0 - probability);
    }
    let ln_failure = (-probability).ln_1p();
    let (mut successes, mut at) = (0, 0.0);
    loop {
        at += (unit(chance).ln() / ln_failure).floor() + 1.0;
        if at > trials as f64 {
            return successes;
        }
        successes += 1;
    }
}

/// Errors that come in bursts: as many on the average, three times their variance.
fn bursts(chance: &mut Chance, requests: u64, rate: f64) -> u64 {
    let mean = requests as f64 * rate / BURST_MEAN;
    let (mut errors, mut at) = (0, 0.0);
    loop {
        at -= unit(chance).ln();
        if at > mean {
            return errors.min(requests);
        }
        let more = unit(chance).ln() / (1.0 - 1.0 / BURST_MEAN).ln();
        errors += 1 + more.floor() as u64;
    }
}

/// Times of requests, from the slowest bucket down.
fn times(chance: &mut Chance, requests: u64, slowness: f64) -> Histogram {
    let bounds = World::bounds_us();
    let above = |bound: u64| {
        let deviations = (bound as f64 / (TIMES_MEDIAN_US * slowness)).ln() / TIMES_DEVIATION;
        normal_above(deviations)
    };
    let mut counts = vec![0; bounds.len() + 1];
    // Of those that are not slower than the bucket above, each is in this one with its conditional probability.
    let (mut left, mut slower) = (requests, 0.0);
    for bucket in (1..counts.len()).rev() {
        let in_or_above = above(bounds[bucket - 1]);
        counts[bucket] = binomial(chance, left, (in_or_above - slower) / (1.0 - slower));
        left -= counts[bucket];
        slower = in_or_above;
    }
    counts[0] = left;
    Histogram::from_counts(&counts)
}

/// A number above 0 and at most 1.
fn unit(chance: &mut Chance) -> f64 {
    ((chance.number() >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// The probability of a standard normal number above `x`, for x ≥ 0: Abramowitz and Stegun 26.2.17, within 7.5e-8.
fn normal_above(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x);
    let series = t
        * (0.319_381_530
            + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * series
}

/// The time that one of `count` requests of a thousand exceeds: an interval's p99, from its histogram, in microseconds.
pub(crate) fn p99_us(cells: &[&Cell], bounds: &[u64]) -> f64 {
    let mut counts = vec![0u64; bounds.len() + 1];
    for cell in cells {
        for (bucket, count) in cell.latency.buckets() {
            counts[bucket] += count;
        }
    }
    let total: u64 = counts.iter().sum();
    let mut above = total as f64 * 0.01;
    for bucket in (0..counts.len()).rev() {
        let count = counts[bucket] as f64;
        if above < count {
            // Within the bucket times are taken to be spread evenly.
            let low = if bucket == 0 { 0.0 } else { bounds[bucket - 1] as f64 };
            let high = bounds.get(bucket).map_or(low * 1.2, |bound| *bound as f64);
            return high - (high - low) * above / count;
        }
        above -= count;
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_samplers_have_the_mean_and_variance_that_they_should() {
        let mut chance = Chance::new(1);
        let mut moments = |sample: &mut dyn FnMut(&mut Chance) -> u64| {
            let values: Vec<f64> = (0..40_000).map(|_| sample(&mut chance) as f64).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let variance =
                values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
            (mean, variance)
        };
        let (mean, variance) = moments(&mut |chance| binomial(chance, 500, 0.01));
        assert!((mean - 5.0).abs() < 0.06 && (variance - 4.95).abs() < 0.2, "{mean} {variance}");
        let (mean, variance) = moments(&mut |chance| binomial(chance, 100, 0.9));
        assert!((mean - 90.0).abs() < 0.1 && (variance - 9.0).abs() < 0.4, "{mean} {variance}");
        let (mean, variance) = moments(&mut |chance| bursts(chance, 500, 0.01));
        assert!((mean - 5.0).abs() < 0.1 && (variance / mean - 3.0).abs() < 0.15, "{mean} {variance}");
        // A tenth of a lognormal's times lie above its median times exp(1.2816 σ).
        let p90 = TIMES_MEDIAN_US * (1.281_551_6 * TIMES_DEVIATION).exp();
        let bounds = World::bounds_us();
        let (mean, _) = moments(&mut |chance| {
            let slow = times(chance, 1000, bounds[3] as f64 / p90);
            slow.buckets().filter(|(bucket, _)| *bucket > 3).map(|(_, count)| count).sum()
        });
        assert!((mean - 100.0).abs() < 0.3, "{mean}");
    }
}
