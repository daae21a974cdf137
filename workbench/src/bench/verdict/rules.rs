//! The rules that judge a run: ours, and what others do, as their documentation and sources say. Each says at which look it
//! would have aborted.

use greenlight_verdict::{Arm, Comparison, Interval, Judge, Metric, Settings, Verdict};

use super::world::{Look, MINUTE_MS, World, p99_us};
use crate::Error;

/// A one-sided z of 1 %.
const Z_ONE_PERCENT: f64 = 2.326_347_874;
/// Kayenta's test is two-sided: z of 2.5 % and of 1 %.
const Z_OF_95_PERCENT: f64 = 1.959_963_985;
const Z_OF_98_PERCENT: f64 = Z_ONE_PERCENT;
/// Kayenta's tolerance: the interval must lie above so much of the estimated difference.
const KAYENTA_TOLERANCE: f64 = 0.25;

/// What decides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Rule {
    /// The share of good requests falls below `success` in so many looks (Flagger: `threshold` failed checks).
    Threshold { success: f64, looks: usize },
    /// A z-test of all counts so far, at 1 %, repeated at each look.
    RepeatedZ,
    /// Mann-Whitney over one value per minute, as Kayenta's classifier applies it: the interval's lower end above a quarter of the
    /// estimate. 95 is its class's default, 98 what its judge uses.
    MannWhitney { confidence: u8 },
    /// Ours.
    Ours(Ours),
}

/// How our judge is set up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ours {
    pub(crate) metrics: &'static [Metric],
    /// Whether it saw an hour before the rollout.
    pub(crate) has_past: bool,
    pub(crate) warmup_minutes: u64,
    pub(crate) late_stake: f64,
}

impl Ours {
    pub(crate) const ERRORS: Self =
        Self { metrics: &[Metric::Errors], has_past: false, warmup_minutes: 0, late_stake: 0.1 };
}

impl Rule {
    pub(crate) fn title(self) -> String {
        match self {
            Self::Threshold { success, looks: 1 } => format!("success < {:.0} %, any look", success * 100.0),
            Self::Threshold { success, looks } => {
                format!("success < {:.0} %, {looks} looks", success * 100.0)
            }
            Self::RepeatedZ => "z-test, every look".to_owned(),
            Self::MannWhitney { confidence } => format!("Mann-Whitney at {confidence} %"),
            Self::Ours(ours) => {
                let mut title = "ours".to_owned();
                if ours.metrics.len() > 1 {
                    title.push_str(&format!(", {} metrics", ours.metrics.len()));
                }
                if ours.has_past {
                    title.push_str(", an hour before");
                }
                if ours.warmup_minutes > 0 {
                    title.push_str(&format!(", {} min warm-up", ours.warmup_minutes));
                }
                if ours.late_stake == 0.0 {
                    title.push_str(", no late stake");
                }
                title
            }
        }
    }

    /// At which look it would have aborted, counted from 1.
    pub(crate) fn aborts_at(self, past: &[Interval], looks: &[Look]) -> Result<Option<usize>, Error> {
        Ok(match self {
            Self::Threshold { success, looks: needed } => {
                let mut failed = 0;
                looks.iter().position(|look| {
                    let good = look.canary.saturating_sub(look.canary_bad) as f64;
                    failed += usize::from(good < success * look.canary as f64);
                    failed >= needed
                })
            }
            Self::RepeatedZ => {
                let mut sums = [0u64; 4];
                looks.iter().position(|look| {
                    for (sum, count) in
                        sums.iter_mut().zip([look.canary, look.canary_bad, look.stable, look.stable_bad])
                    {
                        *sum += count;
                    }
                    z_of_proportions(sums) > Z_ONE_PERCENT
                })
            }
            Self::MannWhitney { confidence } => {
                let quantile = if confidence >= 98 { Z_OF_98_PERCENT } else { Z_OF_95_PERCENT };
                let (mut canary, mut stable) = (Vec::new(), Vec::new());
                looks.iter().position(|look| {
                    let values = values(look);
                    canary.push(values.0);
                    stable.push(values.1);
                    is_higher(&canary, &stable, quantile)
                })
            }
            Self::Ours(ours) => ours.aborts_at(past, looks)?,
        }
        .map(|index| index + 1))
    }
}

impl Ours {
    pub(crate) fn judge(self) -> Result<Judge, Error> {
        let comparisons = self.metrics.iter().map(|metric| Comparison::new(*metric)).collect();
        let settings = Settings {
            late_stake: self.late_stake,
            warmup_ms: self.warmup_minutes * MINUTE_MS,
            ..Settings::new(World::bounds_us(), comparisons)
        };
        Judge::new(settings).map_err(|error| Error::Refused(error.to_string()))
    }

    /// A judge that has seen what it may see before the rollout.
    pub(crate) fn prepared(self, past: &[Interval]) -> Result<Judge, Error> {
        let mut judge = self.judge()?;
        if self.has_past {
            for interval in past {
                judge.learn(interval).map_err(|error| Error::Refused(error.to_string()))?;
            }
        }
        Ok(judge)
    }

    fn aborts_at(self, past: &[Interval], looks: &[Look]) -> Result<Option<usize>, Error> {
        let mut judge = self.prepared(past)?;
        for (index, look) in looks.iter().enumerate() {
            judge.observe(&look.interval).map_err(|error| Error::Refused(error.to_string()))?;
            if judge.verdict() == Verdict::Abort {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }
}

/// What a metrics store would hold of the look, one value per arm: the p99 where times are taken, the share of errors else.
fn values(look: &Look) -> (f64, f64) {
    let (canary, stable): (Vec<_>, Vec<_>) =
        look.interval.cells.iter().partition(|cell| cell.arm == Arm::Canary);
    if canary.iter().any(|cell| !cell.latency.is_empty()) {
        let bounds = World::bounds_us();
        return (p99_us(&canary, &bounds), p99_us(&stable, &bounds));
    }
    let rate = |bad: u64, all: u64| bad as f64 / all.max(1) as f64;
    (rate(look.canary_bad, look.canary), rate(look.stable_bad, look.stable))
}

/// The pooled two-proportion z of canary requests, bad ones, stable requests, bad ones.
fn z_of_proportions([canary, canary_bad, stable, stable_bad]: [u64; 4]) -> f64 {
    let (canary, stable) = (canary as f64, stable as f64);
    let pooled = (canary_bad + stable_bad) as f64 / (canary + stable);
    let deviation = (pooled * (1.0 - pooled) * (1.0 / canary + 1.0 / stable)).sqrt();
    if deviation > 0.0 { (canary_bad as f64 / canary - stable_bad as f64 / stable) / deviation } else { 0.0 }
}

/// Whether Kayenta would classify the canary's values as high.
fn is_higher(canary: &[f64], stable: &[f64], quantile: f64) -> bool {
    if canary.iter().eq(stable.iter()) || rank_z(canary, stable, 0.0) <= quantile {
        return false;
    }
    // The estimate is where the statistic crosses zero: the shift that makes both alike.
    let largest = |values: &[f64]| values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let smallest = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
    let (mut low, mut high) = (0.0, (largest(canary) - smallest(stable)).max(0.0));
    for _ in 0..40 {
        let middle = f64::midpoint(low, high);
        if rank_z(canary, stable, middle) > 0.0 { low = middle } else { high = middle }
    }
    let estimate = f64::midpoint(low, high);
    // The interval's lower end lies above a shift when that shift is still rejected.
    rank_z(canary, stable, KAYENTA_TOLERANCE * estimate) > quantile
}

/// The Wilcoxon statistic of `canary − shift` against `stable` with continuity and tie corrections, as R's `wilcox.test` has it.
fn rank_z(canary: &[f64], stable: &[f64], shift: f64) -> f64 {
    let mut all: Vec<(f64, bool)> = canary.iter().map(|value| (value - shift, true)).collect();
    all.extend(stable.iter().map(|value| (*value, false)));
    all.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (n, m) = (canary.len() as f64, stable.len() as f64);
    let (mut rank_sum, mut ties, mut before) = (0.0, 0.0, 0.0);
    for group in all.chunk_by(|one, other| one.0.total_cmp(&other.0).is_eq()) {
        let size = group.len() as f64;
        let rank = before + f64::midpoint(size, 1.0);
        rank_sum += rank * group.iter().filter(|(_, is_canary)| *is_canary).count() as f64;
        ties += size.powi(3) - size;
        before += size;
    }
    let statistic = rank_sum - n * (n + 1.0) / 2.0 - n * m / 2.0;
    let variance = n * m / 12.0 * (n + m + 1.0 - ties / ((n + m) * (n + m - 1.0)));
    if variance > 0.0 && statistic != 0.0 {
        (statistic - statistic.signum() * 0.5) / variance.sqrt()
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statistics_of_others_are_theirs() {
        // By hand: pooled 25/1100, deviation 0.01563, difference 0.05 − 0.02.
        let z = z_of_proportions([100, 5, 1000, 20]);
        assert!((z - 0.03 / 0.015_630_4).abs() < 1e-3, "{z}");
        // By hand: five against five without overlap, W = 25, (25 − 12.5 − 0.5) / sqrt(25/12·11).
        let low = [1.0, 2.0, 3.0, 4.0, 5.0];
        let high = low.map(|value| value + 10.0);
        let expected = 12.0 / (25.0f64 * 11.0 / 12.0).sqrt();
        assert!((rank_z(&high, &low, 0.0) - expected).abs() < 1e-12);
        assert!(is_higher(&high, &low, Z_OF_95_PERCENT) && !is_higher(&low, &high, Z_OF_95_PERCENT));
        assert!(!is_higher(&low, &low, Z_OF_95_PERCENT));
        // With ties, by hand: 1 1 2 | 1 2 2: ranks 2 2 5 | 2 5 5, statistic 9 − 6 − 4.5, variance 0.75·(7 − 48/30).
        let z = rank_z(&[1.0, 1.0, 2.0], &[1.0, 2.0, 2.0], 0.0);
        assert!((z - -1.0 / (0.75f64 * 5.4).sqrt()).abs() < 1e-12, "{z}");
    }
}
