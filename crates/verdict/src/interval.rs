//! What is judged: counts of an interval, per arm, host and route.

use serde::{Deserialize, Serialize};

use crate::settings::Metric;

/// Most cells of one interval: a thousand hosts with a hundred routes each.
pub const CELLS_MAX: usize = 100_000;
/// Longest name of a host or route, in bytes.
pub const NAME_BYTES_MAX: usize = 512;

/// Which release answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// The new one.
    Canary,
    /// The one that serves everybody else meanwhile.
    Stable,
}

/// What was counted between two looks. Intervals follow each other and never overlap; gaps are allowed. One in which the
/// canary's weight changes is to be cut there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// When it began, in milliseconds since 1970.
    pub start_ms: u64,
    /// How long it was.
    pub length_ms: u64,
    /// The share of all requests that the canary was configured to get, between 0 and 1; absent when it is not known,
    /// and then missing traffic is not judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary_share: Option<f64>,
    /// The counts. A host may appear with many routes, each once.
    pub cells: Vec<Cell>,
}

impl Interval {
    /// When it ended.
    #[must_use]
    pub fn end_ms(&self) -> u64 {
        self.start_ms.saturating_add(self.length_ms)
    }
}

/// The counts of one host and route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// Which release answered.
    pub arm: Arm,
    /// The host.
    pub host: String,
    /// The route's template; any other name that divides requests into like ones will do.
    pub route: String,
    /// Requests that ended in the interval, well or not.
    pub requests: u64,
    /// Those of them that ended in an error.
    #[serde(default)]
    pub errors: u64,
    /// How long they took. May count fewer than `requests`: what broke off has no time.
    #[serde(default, skip_serializing_if = "Histogram::is_empty")]
    pub latency: Histogram,
    /// How old the requests are that were under way when the interval ended.
    #[serde(default, skip_serializing_if = "Histogram::is_empty")]
    pub in_flight: Histogram,
}

/// Counts by bucket. Bucket `i` holds what took at most the `i`th of [`crate::Settings::bounds_us`] and more than the one
/// before; the bucket after the last bound holds the rest. Written sparsely: `[[bucket, count], …]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram(Vec<(u16, u64)>);

impl Histogram {
    /// From one count for each bucket.
    #[must_use]
    pub fn from_counts(counts: &[u64]) -> Self {
        let filled = counts.iter().enumerate().filter(|(_, count)| **count > 0);
        Self(filled.filter_map(|(bucket, count)| Some((u16::try_from(bucket).ok()?, *count))).collect())
    }

    /// From buckets with their counts, each bucket once. A bucket beyond the settings' is refused with its interval.
    #[must_use]
    pub fn from_buckets(buckets: impl IntoIterator<Item = (usize, u64)>) -> Self {
        let filled = buckets.into_iter().filter(|(_, count)| *count > 0);
        Self(filled.map(|(bucket, count)| (u16::try_from(bucket).unwrap_or(u16::MAX), count)).collect())
    }

    /// What came since an earlier reading of the same counters, which only grow.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |bucket: usize| {
            earlier.buckets().find(|(known, _)| *known == bucket).map_or(0, |(_, count)| count)
        };
        Self::from_buckets(
            self.buckets().map(|(bucket, count)| (bucket, count.saturating_sub(before(bucket)))),
        )
    }

    /// Whether nothing was counted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|(_, count)| *count == 0)
    }

    /// How many were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// The buckets that were given, each with its count.
    pub fn buckets(&self) -> impl Iterator<Item = (usize, u64)> {
        self.0.iter().map(|(bucket, count)| (usize::from(*bucket), *count))
    }

    pub(crate) fn add_to(&self, counts: &mut [u64]) {
        for (bucket, count) in self.buckets() {
            if let Some(sum) = counts.get_mut(bucket) {
                *sum = sum.saturating_add(count);
            }
        }
    }
}

/// Why an interval is refused. Nothing was counted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IntervalError {
    /// It begins before the last one ended.
    #[error(
        "an interval begins at {start_ms} ms, before the last one ended at {end_ms} ms: intervals follow each other"
    )]
    Overlaps {
        /// Its beginning.
        start_ms: u64,
        /// The end of the one before.
        end_ms: u64,
    },
    /// A count cannot be.
    #[error("host {host}, route {route}: {why}")]
    Cell {
        /// The host.
        host: String,
        /// The route.
        route: String,
        /// What is wrong.
        why: String,
    },
    /// Something else cannot be.
    #[error("an interval {0}")]
    Invalid(String),
}

/// Whether an interval can be counted.
pub(crate) fn check(interval: &Interval, buckets: usize) -> Result<(), IntervalError> {
    if interval.length_ms == 0 {
        return Err(IntervalError::Invalid("lasts 0 ms".to_owned()));
    }
    if interval.cells.len() > CELLS_MAX {
        return Err(IntervalError::Invalid(format!(
            "has {} cells; at most {CELLS_MAX}",
            interval.cells.len()
        )));
    }
    if let Some(share) = interval.canary_share
        && !(share > 0.0 && share < 1.0)
    {
        return Err(IntervalError::Invalid(format!(
            "gives the canary a share of {share}; it lies between 0 and 1, or is left out"
        )));
    }
    for cell in &interval.cells {
        let wrong = |why: String| {
            Err(IntervalError::Cell { host: cell.host.clone(), route: cell.route.clone(), why })
        };
        if cell.host.len() > NAME_BYTES_MAX || cell.route.len() > NAME_BYTES_MAX {
            return wrong(format!("a name is longer than {NAME_BYTES_MAX} bytes"));
        }
        if cell.errors > cell.requests {
            return wrong(format!("{} errors in {} requests", cell.errors, cell.requests));
        }
        if cell.latency.total() > cell.requests {
            return wrong(format!("{} times of {} requests", cell.latency.total(), cell.requests));
        }
        for (bucket, _) in cell.latency.buckets().chain(cell.in_flight.buckets()) {
            if bucket >= buckets {
                return wrong(format!("bucket {bucket}; the settings have {buckets}, counted from 0"));
            }
        }
    }
    Ok(())
}

/// Counts of both arms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// The canary's requests.
    pub canary: u64,
    /// Those of them that count against it.
    pub canary_bad: u64,
    /// The stable release's requests.
    pub stable: u64,
    /// Those of them that count against it.
    pub stable_bad: u64,
}

impl Tally {
    pub(crate) fn count(&mut self, arm: Arm, requests: u64, bad: u64) {
        let (all, counted) = match arm {
            Arm::Canary => (&mut self.canary, &mut self.canary_bad),
            Arm::Stable => (&mut self.stable, &mut self.stable_bad),
        };
        *all = all.saturating_add(requests);
        *counted = counted.saturating_add(bad);
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.count(Arm::Canary, other.canary, other.canary_bad);
        self.count(Arm::Stable, other.stable, other.stable_bad);
    }

    /// The canary's share of all requests; none when an arm has none.
    pub(crate) fn share(&self) -> Option<f64> {
        (self.canary > 0 && self.stable > 0)
            .then(|| self.canary as f64 / self.canary.saturating_add(self.stable) as f64)
    }

    /// The share of bad requests in both arms together; 0 without requests.
    pub(crate) fn pooled_rate(&self) -> f64 {
        let all = self.canary.saturating_add(self.stable);
        if all == 0 { 0.0 } else { self.canary_bad.saturating_add(self.stable_bad) as f64 / all as f64 }
    }

    /// How many more bad requests the canary has than the stable release would have had in its place.
    pub(crate) fn excess(&self) -> f64 {
        let expected = if self.stable == 0 {
            0.0
        } else {
            self.canary as f64 * self.stable_bad as f64 / self.stable as f64
        };
        self.canary_bad as f64 - expected
    }
}

impl Cell {
    /// Whether a comparison that is limited to a route looks at this cell.
    pub(crate) fn is_of(&self, metric: Metric, route: Option<&str>) -> bool {
        metric == Metric::Traffic || route.is_none_or(|route| route == self.route)
    }
}
