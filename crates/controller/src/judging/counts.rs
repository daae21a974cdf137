//! What balancers counted between two readings, by host and route, and as the judge wants it.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_drivers::canary::{CountRow, Counts};
use greenlight_model::id::HostName;
use greenlight_verdict::{Arm, Cell, Histogram};

pub(super) type Cells = BTreeMap<(HostName, String), Count>;

/// What was counted for one host and route in an interval.
#[derive(Default)]
pub(super) struct Count {
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) latency: Vec<(usize, u64)>,
    /// How old what is in flight is; a state, not a sum.
    pub(super) in_flight: Vec<(usize, u64)>,
}

pub(super) fn cell(canaries: &BTreeSet<HostName>, host: &HostName, route: String, count: &Count) -> Cell {
    Cell {
        arm: if canaries.contains(host) { Arm::Canary } else { Arm::Stable },
        host: host.to_string(),
        route,
        requests: count.requests,
        errors: count.errors.min(count.requests),
        latency: histogram(&count.latency),
        in_flight: histogram(&count.in_flight),
    }
}

fn histogram(buckets: &[(usize, u64)]) -> Histogram {
    let length = buckets.iter().map(|(bucket, _)| bucket + 1).max().unwrap_or(0);
    let mut counts = vec![0; length];
    for (bucket, count) in buckets {
        counts[*bucket] += count;
    }
    Histogram::from_counts(&counts)
}

/// What came in between two readings; none when the balancer began anew.
pub(super) fn difference(before: &Counts, now: &Counts) -> Option<Cells> {
    if before.instance != now.instance || before.bounds_us != now.bounds_us {
        return None;
    }
    let key = |row: &CountRow| (row.host.clone(), row.route.clone(), row.since);
    let earlier: BTreeMap<_, &CountRow> = before.rows.iter().map(|row| (key(row), row)).collect();
    let mut cells = Cells::new();
    for row in &now.rows {
        // A row that was not there began in between.
        let before = earlier.get(&key(row)).copied();
        let past = |of: fn(&CountRow) -> u64| before.map_or(0, of);
        let buckets: BTreeMap<usize, u64> =
            before.into_iter().flat_map(|row| row.latency.iter().copied()).collect();
        let latency = row.latency.iter().map(|(bucket, count)| {
            Some((*bucket, count.checked_sub(buckets.get(bucket).copied().unwrap_or(0))?))
        });
        // What could not be delivered there is the host's failure as much as an error is.
        let undelivered = row.undelivered.checked_sub(past(|row| row.undelivered))?;
        let grown = Count {
            requests: row.requests.checked_sub(past(|row| row.requests))? + undelivered,
            errors: row.errors.checked_sub(past(|row| row.errors))? + undelivered,
            latency: latency.collect::<Option<Vec<_>>>()?,
            in_flight: row.in_flight.clone(),
        };
        add(&mut cells, BTreeMap::from([((row.host.clone(), row.route.clone()), grown)]));
    }
    Some(cells)
}

pub(super) fn add(sum: &mut Cells, more: Cells) {
    for (key, count) in more {
        let cell = sum.entry(key).or_default();
        cell.requests += count.requests;
        cell.errors += count.errors;
        cell.latency.extend(count.latency);
        cell.in_flight.extend(count.in_flight);
    }
}
