//! A canary behind a balancer: the share it is lent, and what was counted about it and about stable.
//!
//! | | built-in router | HAProxy |
//! | --- | --- | --- |
//! | share | exact in chance, whatever the weights | by weights of whole numbers: it may be less than asked for, see [`Lent`] |
//! | lease | returns to stable by itself | none: the weights stay when the controller goes |
//! | alert | held at 0 until a person enables it | weight 0; the hold is the controller's to keep |
//! | counts | per host, release and route, with latencies and what is in flight | requests and errors per host |
//!
//! [`cannot`] has the same as sentences, for `check`.

use std::collections::BTreeMap;
use std::time::Duration;

use greenlight_model::fleet::BalancerKind;
use greenlight_model::id::HostName;

/// A share of the traffic for the hosts that run a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share<'a> {
    /// The release on trial. The built-in router knows its backends by it; [`crate::balancer::BalancerDriver::admit`] told
    /// them.
    pub release: &'a str,
    /// The hosts that run it. HAProxy knows them by name.
    pub hosts: &'a [HostName],
    /// In thousandths of all requests.
    pub per_mille: u32,
    /// How long it is lent, if it is not renewed.
    pub lease: Duration,
}

/// What was lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// The share in force, in thousandths. Never more than was asked for, except where the least weight, 1, already is
    /// more.
    pub per_mille: u32,
}

/// What a balancer counted since it was started. The difference of two readings is what happened between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Another value after a restart or a reload: everything begins anew.
    pub instance: u64,
    /// Time since then.
    pub elapsed: Duration,
    /// Upper ends of the buckets of latencies and ages, in microseconds; the last bucket has none. Empty when the balancer
    /// counts no latencies.
    pub bounds_us: Vec<u64>,
    /// What was counted, in no particular order.
    pub rows: Vec<CountRow>,
}

/// What was counted for one host and route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountRow {
    /// The host.
    pub host: HostName,
    /// The release it ran then, where the balancer knows.
    pub release: Option<String>,
    /// The route's template. HAProxy knows none: everything is `other`.
    pub route: String,
    /// With another value it is another row, whose counts begin anew.
    pub since: u64,
    /// Requests that can be judged: answered, or failed by the server.
    pub requests: u64,
    /// Those that went wrong on the server's side: status 500 and above, no answer, an answer that broke off.
    pub errors: u64,
    /// Requests that could not be delivered.
    pub undelivered: u64,
    /// How long they took, as `(bucket, requests)`.
    pub latency: Vec<(usize, u64)>,
    /// How long the requests in flight have waited by now, as `(bucket, requests)`.
    pub in_flight: Vec<(usize, u64)>,
}

/// What a canary cannot have behind this kind of balancer, as sentences.
#[must_use]
pub fn cannot(kind: &BalancerKind) -> &'static [&'static str] {
    match kind {
        BalancerKind::Router { .. } => &[],
        BalancerKind::HaproxySocket { .. } | BalancerKind::HaproxyTcp { .. } => &[
            "HAProxy keeps the canary's weight when the controller goes away: there is no lease that ends by itself",
            "HAProxy tells no latencies by request: slow answers cannot be judged",
            "HAProxy does not count by route: a fault is found, but not where",
            "HAProxy's weights are whole numbers up to 256: a small share may come out smaller",
        ],
    }
}

/// Largest weight that HAProxy takes.
const WEIGHT_MAX: u32 = 256;
/// All of the traffic.
const WHOLE_PER_MILLE: u32 = 1000;

/// A server before its weight is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Weighted {
    /// The weight of its configuration: how it compares to others of its arm.
    pub(crate) configured: u32,
    pub(crate) is_canary: bool,
    /// Only these share the traffic.
    pub(crate) is_ready: bool,
}

/// Weights that give the canary its share and keep the proportions within each arm, and the share that results. Servers that
/// are not ready get a weight too, as they may come back, but do not count for the share.
pub(crate) fn weights(servers: &BTreeMap<String, Weighted>, per_mille: u32) -> (BTreeMap<String, u32>, u32) {
    let sum = |is_canary| {
        let of_arm = servers.values().filter(|server| server.is_canary == is_canary && server.is_ready);
        of_arm.map(|server| f64::from(server.configured)).sum::<f64>()
    };
    let largest = |is_canary| {
        let of_arm = servers.values().filter(|server| server.is_canary == is_canary);
        of_arm.map(|server| server.configured).max().map_or(0.0, f64::from)
    };
    let share = f64::from(per_mille.min(WHOLE_PER_MILLE)) / f64::from(WHOLE_PER_MILLE);
    // Per unit of configured weight. An arm without ready servers gives the other no measure: then each keeps its own.
    let (canary, stable) = (sum(true), sum(false));
    let ratio = if canary > 0.0 { share * stable / canary } else { share };
    let (canary_factor, stable_factor) = if share >= 1.0 { (1.0, 0.0) } else { (ratio, 1.0 - share) };
    let top = (largest(true) * canary_factor).max(largest(false) * stable_factor);
    let scale = if top > 0.0 { f64::from(WEIGHT_MAX) / top } else { 0.0 };
    let weights: BTreeMap<String, u32> = servers
        .iter()
        .map(|(name, server)| {
            let factor = if server.is_canary { canary_factor } else { stable_factor };
            let exact = f64::from(server.configured) * factor * scale;
            // The canary's are cut and stable's rounded up, so that the share is a ceiling.
            let whole = if server.is_canary { exact.floor() } else { exact.ceil() };
            let least = u32::from(exact > 0.0);
            (name.clone(), (whole as u32).clamp(least, WEIGHT_MAX))
        })
        .collect();
    (weights.clone(), share_in_force(servers, &weights))
}

/// The canary's share by these weights, in thousandths, rounded.
fn share_in_force(servers: &BTreeMap<String, Weighted>, weights: &BTreeMap<String, u32>) -> u32 {
    let sum = |wanted: fn(&Weighted) -> bool| {
        let ready = servers.iter().filter(|(_, server)| server.is_ready && wanted(server));
        ready.filter_map(|(name, _)| weights.get(name)).map(|weight| f64::from(*weight)).sum::<f64>()
    };
    let all = sum(|_| true);
    if all > 0.0 {
        (f64::from(WHOLE_PER_MILLE) * sum(|server| server.is_canary) / all).round() as u32
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(list: &[(&str, u32, bool)]) -> BTreeMap<String, Weighted> {
        let server = |&(name, configured, is_canary): &(&str, u32, bool)| {
            (name.to_owned(), Weighted { configured, is_canary, is_ready: true })
        };
        list.iter().map(server).collect()
    }

    #[test]
    fn weights_give_the_share_or_a_little_less() {
        let fleets = [
            servers(&[("a", 1, false), ("b", 1, true)]),
            servers(&[("a", 100, false), ("b", 100, false), ("c", 100, false), ("d", 100, true)]),
            servers(&[("a", 200, false), ("b", 50, false), ("c", 10, true), ("d", 20, true)]),
        ];
        for fleet in &fleets {
            for per_mille in [0, 50, 100, 250, 300, 500, 900, 1000] {
                let (weights, in_force) = weights(fleet, per_mille);
                assert!(in_force <= per_mille, "{per_mille}: {weights:?} give {in_force}");
                assert!(in_force * 10 >= per_mille * 9, "{per_mille}: {weights:?} give {in_force}");
                assert!(weights.values().all(|weight| *weight <= WEIGHT_MAX));
            }
        }
        // Proportions within an arm stay.
        let (weights, _) = weights(&fleets[2], 500);
        assert_eq!((weights["a"], weights["b"]), (256, 64));
        assert!(weights["d"].abs_diff(2 * weights["c"]) <= 1, "{weights:?}");
    }

    #[test]
    fn servers_that_take_nothing_do_not_count() {
        let mut fleet = servers(&[("a", 1, false), ("b", 1, false), ("c", 1, true)]);
        let spread = weights(&fleet, 500).0;
        assert_eq!((spread["a"], spread["c"]), (128, 256));
        fleet.get_mut("b").unwrap().is_ready = false;
        let spread = weights(&fleet, 500);
        assert_eq!((spread.0["a"], spread.0["c"], spread.1), (256, 256, 500));
        // Only the least weight may be more than was asked for, and it is told.
        let fleet = servers(&[("a", 1, false), ("b", 1, true)]);
        assert_eq!(weights(&fleet, 1), (BTreeMap::from([("a".to_owned(), 256), ("b".to_owned(), 1)]), 4));
        assert_eq!(weights(&servers(&[("a", 1, false)]), 500).0["a"], 256);
    }
}
