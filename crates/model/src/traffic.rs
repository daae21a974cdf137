//! Traffic as the balancers report it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::id::HostName;
use crate::quantity::Percent;

/// What one balancer said of its backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalancerReport {
    /// It answered.
    Servers(BTreeMap<HostName, Server>),
    /// It could not be read.
    Unreachable {
        /// Why.
        why: String,
    },
}

/// One server of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// What it was told to be.
    pub admission: Admission,
    /// What the balancer's own check found.
    pub health: ServerHealth,
    /// Requests or connections it handles right now.
    pub sessions: u64,
    /// Its weight now. A balancer that shares out by release shows the weights that come to the same.
    pub weight: u32,
    /// Its weight by its configuration.
    pub normal_weight: u32,
}

/// The highest weight that every kind of balancer takes; HAProxy sets it.
pub const WEIGHT_MAX: u32 = 256;

/// The weights by which a canary's servers together get `share` of the requests, and each side shares its part out by its
/// servers' normal weights. The canary's servers count whether they are admitted yet or not; of the others those that
/// are, or all when none is.
///
/// Whole numbers of 1 to [`WEIGHT_MAX`]. The canary's are cut and the others' rounded up, so that the share is a ceiling,
/// except where the least weight, 1, is more.
#[must_use]
pub fn weights(
    servers: &BTreeMap<HostName, Server>,
    canaries: &BTreeSet<HostName>,
    share: Percent,
) -> BTreeMap<HostName, u32> {
    let normal = |server: &Server| u64::from(server.normal_weight.max(1));
    let is_canary = |host: &HostName| canaries.contains(host);
    let others = || servers.iter().filter(|(host, _)| !is_canary(host)).map(|(_, server)| server);
    let canary: u64 = servers.iter().filter(|(host, _)| is_canary(host)).map(|(_, it)| normal(it)).sum();
    let admitted: u64 = others().filter(|server| server.admission == Admission::Ready).map(normal).sum();
    let other = if admitted > 0 { admitted } else { others().map(normal).sum() };
    // What one unit of normal weight becomes, on either side: integers in the proportion that makes the share.
    let share = u64::from(share.get()).clamp(1, 99);
    let (canary_factor, other_factor) = (share * other.max(1), (100 - share) * canary.max(1));
    let factor = |host: &HostName| if is_canary(host) { canary_factor } else { other_factor };
    let top = servers.iter().map(|(host, server)| normal(server) * factor(host)).max().unwrap_or(1).max(1);
    let weight = |host: &HostName, server: &Server| {
        let scaled = normal(server) * factor(host) * u64::from(WEIGHT_MAX);
        let whole = if is_canary(host) { scaled / top } else { scaled.div_ceil(top) };
        u32::try_from(whole).unwrap_or(WEIGHT_MAX).clamp(1, WEIGHT_MAX)
    };
    servers.iter().map(|(host, server)| (host.clone(), weight(host, server))).collect()
}

/// Whether a server is to take requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Admission {
    /// It takes new requests.
    Ready,
    /// It finishes what it has and takes nothing new.
    Drain,
    /// It takes nothing at all; set by a person, or by its configuration.
    Maintenance,
}

/// What the balancer's check of a server found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerHealth {
    /// It answers, or is not checked.
    Up,
    /// It does not.
    Down,
    /// Not known yet.
    Checking,
}

impl Server {
    /// Whether requests are sent to it now.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.admission == Admission::Ready && self.health == ServerHealth::Up && self.weight > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(list: &[(&str, u32)]) -> BTreeMap<HostName, Server> {
        let server = |normal_weight| Server {
            admission: Admission::Ready,
            health: ServerHealth::Up,
            sessions: 0,
            weight: normal_weight,
            normal_weight,
        };
        list.iter().map(|(host, weight)| (host.parse().unwrap(), server(*weight))).collect()
    }

    fn hosts(names: &[&str]) -> BTreeSet<HostName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn percent(value: u8) -> Percent {
        Percent::try_from(value).unwrap()
    }

    #[test]
    fn weights_give_the_share_or_a_little_less() {
        let fleets = [
            (servers(&[("a", 1), ("b", 1)]), hosts(&["b"])),
            (servers(&[("a", 100), ("b", 100), ("c", 100), ("d", 100)]), hosts(&["d"])),
            (servers(&[("a", 200), ("b", 50), ("c", 10), ("d", 20)]), hosts(&["c", "d"])),
        ];
        for (fleet, canaries) in &fleets {
            for share in [5, 10, 25, 30, 50, 90, 99] {
                let weights = weights(fleet, canaries, percent(share));
                let sum = |of: &dyn Fn(&HostName) -> bool| -> f64 {
                    weights.iter().filter(|(host, _)| of(host)).map(|(_, weight)| f64::from(*weight)).sum()
                };
                let got = 100.0 * sum(&|host| canaries.contains(host)) / sum(&|_| true);
                assert!(
                    got <= f64::from(share) && got >= 0.9 * f64::from(share),
                    "{share}%: {weights:?} give {got}"
                );
            }
        }
        // Proportions within a side stay.
        let spread = weights(&fleets[2].0, &fleets[2].1, percent(50));
        assert_eq!((spread[&"a".parse().unwrap()], spread[&"b".parse().unwrap()]), (256, 64));
    }

    #[test]
    fn those_that_are_out_do_not_count() {
        let mut fleet = servers(&[("a", 1), ("b", 1), ("c", 1)]);
        let half = |fleet: &BTreeMap<HostName, Server>| {
            weights(fleet, &hosts(&["c"]), percent(50)).into_values().collect::<Vec<_>>()
        };
        assert_eq!(half(&fleet), [128, 128, 256]);
        fleet.get_mut(&"b".parse().unwrap()).unwrap().admission = Admission::Maintenance;
        assert_eq!(half(&fleet), [256, 256, 256]);
        // The canary counts before it is admitted: its share is set then.
        fleet.get_mut(&"c".parse().unwrap()).unwrap().admission = Admission::Drain;
        assert_eq!(half(&fleet), [256, 256, 256]);
    }
}
