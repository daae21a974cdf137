//! Bursts: how much more the counts of stable hosts scatter than independent requests would, from before the rollout.
//!
//! φ is the mean Pearson dispersion between the stable hosts within the same minute, at least 1. Whatever moves all hosts
//! together (an incident, the time of day) is not in it, as it is not in the comparison either. It is a heuristic: exact when
//! errors come in bursts of equal size, good when their sizes scatter, blind to bursts longer than a minute.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a minute is, here.
const MINUTE_MS: u64 = 60_000;
/// Hosts that are told apart; what others count is left out. More hosts do not make φ better.
const HOSTS_MAX: usize = 1024;

/// The dispersion of a metric between hosts, as it is learnt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Burst {
    minute: Option<u64>,
    /// Requests and bad ones of the present minute.
    hosts: BTreeMap<String, (u64, u64)>,
    dispersion_sum: f64,
    minutes: u32,
}

impl Burst {
    /// Counts a host's requests. A minute is complete when one of a later minute comes.
    pub(crate) fn observe(&mut self, start_ms: u64, host: &str, requests: u64, bad: u64) {
        let minute = start_ms / MINUTE_MS;
        if self.minute != Some(minute) {
            self.close();
            self.minute = Some(minute);
        }
        if self.hosts.len() < HOSTS_MAX || self.hosts.contains_key(host) {
            let counts = self.hosts.entry(host.to_owned()).or_default();
            counts.0 = counts.0.saturating_add(requests);
            counts.1 = counts.1.saturating_add(bad);
        }
    }

    /// φ by what was learnt; 1 when nothing was.
    pub(crate) fn factor(&self) -> f64 {
        if self.minutes == 0 { 1.0 } else { (self.dispersion_sum / f64::from(self.minutes)).max(1.0) }
    }

    /// How many minutes it was learnt from.
    pub(crate) fn minutes(&self) -> u32 {
        self.minutes
    }

    fn close(&mut self) {
        let hosts = std::mem::take(&mut self.hosts);
        if let Some(dispersion) = dispersion(hosts.into_values()) {
            self.dispersion_sum += dispersion;
            self.minutes += 1;
        }
    }
}

/// Pearson's Σ (x − e)²/e over its degrees of freedom: 1 on the average when bad requests are independent. None when it says
/// nothing: fewer than two hosts, or nothing bad.
pub(crate) fn dispersion(hosts: impl Iterator<Item = (u64, u64)>) -> Option<f64> {
    let hosts: Vec<(f64, f64)> =
        hosts.filter(|host| host.0 > 0).map(|(requests, bad)| (requests as f64, bad as f64)).collect();
    let requests: f64 = hosts.iter().map(|host| host.0).sum();
    let bad: f64 = hosts.iter().map(|host| host.1).sum();
    if hosts.len() < 2 || bad == 0.0 {
        return None;
    }
    let squares = hosts.iter().map(|(own, own_bad)| {
        let expected = own * bad / requests;
        (own_bad - expected).powi(2) / expected
    });
    Some(squares.sum::<f64>() / (hosts.len() - 1) as f64)
}

/// The dispersion of the requests themselves against each host's usual share of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShareBurst {
    minute: Option<u64>,
    hosts: BTreeMap<String, u64>,
    /// Each host's requests in all minutes before this one.
    past: BTreeMap<String, u64>,
    dispersion_sum: f64,
    minutes: u32,
}

impl ShareBurst {
    pub(crate) fn observe(&mut self, start_ms: u64, host: &str, requests: u64) {
        let minute = start_ms / MINUTE_MS;
        if self.minute != Some(minute) {
            self.close();
            self.minute = Some(minute);
        }
        if self.past.len() + self.hosts.len() < HOSTS_MAX || self.past.contains_key(host) {
            let count = self.hosts.entry(host.to_owned()).or_default();
            *count = count.saturating_add(requests);
        }
    }

    pub(crate) fn factor(&self) -> f64 {
        if self.minutes == 0 { 1.0 } else { (self.dispersion_sum / f64::from(self.minutes)).max(1.0) }
    }

    fn close(&mut self) {
        let hosts = std::mem::take(&mut self.hosts);
        // A host that was not there before has no usual share yet.
        let known: Vec<(f64, f64)> = hosts
            .iter()
            .filter_map(|(host, count)| Some((*count as f64, *self.past.get(host)? as f64)))
            .filter(|(_, past)| *past > 0.0)
            .collect();
        let (count, past) = known.iter().fold((0.0, 0.0), |sum, host| (sum.0 + host.0, sum.1 + host.1));
        if known.len() > 1 && count > 0.0 {
            let squares = known.iter().map(|(own, own_past)| {
                // The usual share is itself counted, and scatters as the present one does.
                let expected = count * own_past / past;
                (own - expected).powi(2) / (expected * (1.0 + count / past))
            });
            self.dispersion_sum += squares.sum::<f64>() / (known.len() - 1) as f64;
            self.minutes += 1;
        }
        for (host, count) in hosts {
            let past = self.past.entry(host).or_default();
            *past = past.saturating_add(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dispersion_is_as_computed_apart() {
        // Σ (x − e)²/e over two degrees of freedom, by hand: e = 2, 4, 6 of 3, 1, 8.
        let expected = (1.0 / 2.0 + 9.0 / 4.0 + 4.0 / 6.0) / 2.0;
        let found = dispersion([(100, 3), (200, 1), (300, 8)].into_iter()).unwrap();
        assert!((found - expected).abs() < 1e-12, "{found}");
        assert_eq!(dispersion([(100, 3)].into_iter()), None, "one host scatters from nobody");
        assert_eq!(dispersion([(100, 0), (100, 0)].into_iter()), None);
    }

    #[test]
    fn the_factor_is_the_mean_of_whole_minutes_and_never_below_one() {
        let mut burst = Burst::default();
        for (start_ms, host, bad) in [
            (0, "a", 8),
            (0, "b", 0),
            (30_000, "b", 0),
            (60_000, "a", 2),
            (61_000, "b", 2),
            (120_000, "a", 9),
        ] {
            burst.observe(start_ms, host, 100, bad);
        }
        // First minute: 8 of 100 and 0 of 200, so e = 8/3 and 16/3; second: alike.
        let first = (16.0f64 / 3.0).powi(2) / (8.0 / 3.0) + (16.0f64 / 3.0).powi(2) / (16.0 / 3.0);
        assert_eq!(burst.minutes(), 2);
        assert!((burst.factor() - first / 2.0).abs() < 1e-12, "{}", burst.factor());
        assert!((Burst::default().factor() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn sticky_requests_are_seen_in_the_shares() {
        let factor = |scatter: u64| {
            let mut burst = ShareBurst::default();
            for minute in 0..60u64 {
                let moved = if minute % 2 == 0 { scatter } else { 0 };
                burst.observe(minute * 60_000, "a", 1000 + moved);
                burst.observe(minute * 60_000, "b", 1000 + scatter - moved);
            }
            burst.factor()
        };
        assert!((factor(0) - 1.0).abs() < 1e-12);
        // 400 requests more on the one or the other: ±200 where independent requests scatter by about 24.
        assert!(factor(400) > 10.0, "{}", factor(400));
    }
}
