//! What was counted, as it is read through the control socket: rows that only grow, by backend (or release) and route.
//!
//! A judgement of a canary reads this twice and takes the differences: requests of canary and stable, the bad ones
//! ([`CountRow::bad`]), and how long they took, bucket by bucket. What is in flight, with its age, is as of the reading.
//! Reading takes nothing away, so any number of readers may, and a reading that is lost costs nothing.

use serde::{Deserialize, Serialize};

/// Latency is counted in this many buckets: eight to each doubling, so that a bound is met to within an eighth, from
/// 64 µs to 67 s and beyond.
pub const LATENCY_BUCKETS: usize = FIRST_BUCKETS + OCTAVES * 8 + 1;

/// Buckets of the lowest range, each of [`FIRST_STEP_US`].
const FIRST_BUCKETS: usize = 8;
/// Width of a bucket in the lowest range, in microseconds.
const FIRST_STEP_US: u64 = 8;
/// Doublings above the lowest range.
const OCTAVES: usize = 20;

/// Which rows are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountsRequest {
    /// One row for what.
    #[serde(default)]
    pub by: CountsBy,
}

/// What a row stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CountsBy {
    /// A backend, its release, and a route.
    #[default]
    Backend,
    /// A release and a route.
    Release,
}

/// Everything that was counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterCounts {
    /// Another number after a restart of the router: all rows then begin anew.
    pub instance: u64,
    /// Time since the router began, in milliseconds: the difference of two readings is their interval.
    pub elapsed_ms: u64,
    /// The generation in force.
    pub generation: u64,
    /// Upper ends of the latency buckets, in microseconds, which belong to them; the last bucket has none.
    pub latency_bounds_us: Vec<u64>,
    /// Rows in which anything was counted, sorted by backend, release and route.
    pub rows: Vec<CountRow>,
}

/// What was counted for one backend (or release) and route. Requests of testers are not among them: they are no sample.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CountRow {
    /// The backend; empty when counted by release.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub backend: String,
    /// The release that it ran, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// Whether that is the release on trial now.
    pub is_canary: bool,
    /// The route's template, or `other`.
    pub route: String,
    /// The generation with which this row began. With another one it is another row: its counts begin anew.
    pub since_generation: u64,
    /// Requests with an answer, or without one and given up: what can be judged.
    pub requests: u64,
    /// Answers by the hundreds of their status: 1xx (switched protocols), 2xx, 3xx, 4xx, 5xx.
    pub answers: [u64; 5],
    /// Requests without an answer: the connection broke, nothing came in time, or what came was not HTTP.
    pub failed: u64,
    /// Answers below 500 that broke off.
    pub broken: u64,
    /// Requests whose client went away, or failed, before there was an answer. Not among `requests`.
    pub cancelled: u64,
    /// Requests that were to go there and were moved, because they could not be delivered. Not among `requests`.
    pub moved: u64,
    /// Body bytes of the answers that were passed on.
    pub bytes: u64,
    /// Requests in flight that have no answer yet.
    pub in_flight: u64,
    /// How long they have waited by now, as `[bucket, requests]`.
    pub in_flight_ages: Vec<(usize, u64)>,
    /// Time from the request's way to the backend to the head of its answer, or to its failure: `[bucket, requests]`
    /// for every bucket that holds any.
    pub latency: Vec<(usize, u64)>,
}

impl CountRow {
    /// Requests that went wrong on the server's side.
    #[must_use]
    pub fn bad(&self) -> u64 {
        self.answers[4] + self.failed + self.broken
    }

    /// Requests that took, or in flight have taken by now, longer than `bound_us` microseconds, to within a bucket: those in
    /// the bucket that holds the bound count as fast.
    #[must_use]
    pub fn slow(&self, bound_us: u64) -> u64 {
        let last_fast = latency_bucket(bound_us);
        let both = self.latency.iter().chain(&self.in_flight_ages);
        both.filter(|(bucket, _)| *bucket > last_fast).map(|(_, count)| count).sum()
    }

    /// Adds what another row counted. Its names are of no interest.
    pub(crate) fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.requests, other.requests),
            (&mut self.failed, other.failed),
            (&mut self.broken, other.broken),
            (&mut self.cancelled, other.cancelled),
            (&mut self.moved, other.moved),
            (&mut self.bytes, other.bytes),
            (&mut self.in_flight, other.in_flight),
        ];
        for (sum, count) in pairs {
            *sum += count;
        }
        self.answers.iter_mut().zip(other.answers).for_each(|(sum, count)| *sum += count);
        add_buckets(&mut self.latency, &other.latency);
        add_buckets(&mut self.in_flight_ages, &other.in_flight_ages);
    }

    /// Whether anything was ever counted.
    pub(crate) fn is_empty(&self) -> bool {
        self.requests + self.cancelled + self.moved + self.in_flight == 0
    }
}

fn add_buckets(sum: &mut Vec<(usize, u64)>, more: &[(usize, u64)]) {
    for &(bucket, count) in more {
        match sum.binary_search_by_key(&bucket, |(bucket, _)| *bucket) {
            Ok(place) => sum[place].1 += count,
            Err(place) => sum.insert(place, (bucket, count)),
        }
    }
}

/// The bucket of a time in microseconds.
#[must_use]
pub fn latency_bucket(micros: u64) -> usize {
    // A bound belongs to the bucket that it ends.
    let steps = micros.saturating_sub(1) / FIRST_STEP_US;
    if steps < FIRST_BUCKETS as u64 {
        return usize::try_from(steps).unwrap_or(0);
    }
    // The highest bit tells the doubling, the three below it the eighth.
    let octave = steps.ilog2() - FIRST_BUCKETS.ilog2();
    let eighth = (steps >> octave) & 7;
    let bucket = FIRST_BUCKETS + octave as usize * 8 + usize::try_from(eighth).unwrap_or(0);
    bucket.min(LATENCY_BUCKETS - 1)
}

/// Upper ends of all buckets but the last, in microseconds. A time equal to one is in the bucket that it ends.
#[must_use]
pub fn latency_bounds_us() -> Vec<u64> {
    let first = (1..=FIRST_BUCKETS as u64).map(|step| step * FIRST_STEP_US);
    let above =
        (0..OCTAVES as u32).flat_map(|octave| (9..=16u64).map(move |step| (step * FIRST_STEP_US) << octave));
    first.chain(above).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_and_their_bounds_agree() {
        let bounds = latency_bounds_us();
        assert_eq!(bounds.len() + 1, LATENCY_BUCKETS);
        assert!(bounds.is_sorted() && bounds.windows(2).all(|pair| pair[0] < pair[1]));
        for (bucket, &bound) in bounds.iter().enumerate() {
            assert_eq!((latency_bucket(bound), latency_bucket(bound + 1)), (bucket, bucket + 1), "{bound}");
        }
        assert_eq!((latency_bucket(0), latency_bucket(u64::MAX)), (0, LATENCY_BUCKETS - 1));
        assert!(bounds.last().is_some_and(|&last| last > 60_000_000), "{:?}", bounds.last());
        // From the second range on no bucket is wider than an eighth of its beginning.
        for pair in bounds[7..].windows(2) {
            assert!((pair[1] - pair[0]) * 8 <= pair[0], "{pair:?}");
        }
    }

    #[test]
    fn rows_are_added_and_judged() {
        let row = |latency: &[(usize, u64)], status_5xx| CountRow {
            requests: 10,
            answers: [0, 8, 0, 0, status_5xx],
            failed: 1,
            broken: 1,
            in_flight_ages: vec![(9, 1)],
            latency: latency.to_vec(),
            ..CountRow::default()
        };
        let mut sum = CountRow::default();
        sum.add(&row(&[(3, 1), (9, 2)], 1));
        sum.add(&row(&[(5, 4), (9, 1)], 0));
        assert_eq!((sum.requests, sum.bad(), sum.in_flight_ages.as_slice()), (20, 5, &[(9, 2)][..]));
        assert_eq!(sum.latency, [(3, 1), (5, 4), (9, 3)]);
        let bounds = latency_bounds_us();
        assert_eq!((sum.slow(bounds[4]), sum.slow(bounds[8]), sum.slow(bounds[9])), (9, 5, 0));
        assert!(CountRow::default().is_empty() && !sum.is_empty());
    }
}
