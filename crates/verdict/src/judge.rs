//! The judge: takes intervals in, keeps what they said, and answers at any time.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::burst::{Burst, ShareBurst};
use crate::interval::{Arm, Interval, IntervalError, Tally, check};
use crate::judgement::{Abort, Judgement, Verdict};
use crate::negligible::Negligible;
use crate::process::{Process, Stratum, ln_add};
use crate::settings::{Comparison, Metric, Settings, SettingsError};
use crate::threshold::Times;

/// Routes that are told apart. What further ones count is compared as one route, [`OTHER_ROUTES`].
pub const ROUTES_MAX: usize = 256;
/// The name of all routes beyond [`ROUTES_MAX`] together.
pub const OTHER_ROUTES: &str = "(other routes)";
/// Canary hosts whose counts are told apart in the explanation.
const HOSTS_MAX: usize = 1024;

/// Judges one canary rollout. Plain data: it may be stored after any interval and go on from there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judge {
    pub(crate) settings: Settings,
    pub(crate) tests: Vec<Test>,
    /// When the canary's first interval began, and when the last interval ended.
    pub(crate) began_ms: Option<u64>,
    pub(crate) ended_ms: Option<u64>,
    /// When each canary host was first seen.
    first_seen_ms: BTreeMap<String, u64>,
    routes: BTreeSet<String>,
    times: BTreeMap<String, Times>,
    /// Per route: what was under way when the last interval ended, by age, of the canary and of stable.
    in_flight: BTreeMap<String, (Vec<u64>, Vec<u64>)>,
    pub(crate) abort: Option<Abort>,
}

/// One comparison and what it has seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Test {
    pub(crate) comparison: Comparison,
    pub(crate) process: Process,
    pub(crate) negligible: Option<Negligible>,
    pub(crate) burst: Burst,
    pub(crate) share_burst: ShareBurst,
    pub(crate) has_passed: bool,
    pub(crate) total: Tally,
    pub(crate) routes: BTreeMap<String, Tally>,
    /// Requests and bad ones of each canary host.
    pub(crate) hosts: BTreeMap<String, (u64, u64)>,
    /// The threshold of each route, as the bound in microseconds.
    pub(crate) thresholds_us: BTreeMap<String, u64>,
    /// The share that the canary was configured to have last.
    pub(crate) share: Option<f64>,
}

impl Judge {
    /// A judge that has seen nothing.
    ///
    /// # Errors
    /// When it could not work with these settings.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        settings.check()?;
        let tests = settings.comparisons.iter().map(|comparison| Test::new(comparison, &settings)).collect();
        Ok(Self {
            settings,
            tests,
            began_ms: None,
            ended_ms: None,
            first_seen_ms: BTreeMap::new(),
            routes: BTreeSet::new(),
            times: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            abort: None,
        })
    }

    /// What it was told.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Learns from an interval before the rollout: where slow begins, and how errors scatter. The canary's cells are passed
    /// over.
    ///
    /// # Errors
    /// As [`Judge::observe`].
    pub fn learn(&mut self, interval: &Interval) -> Result<(), IntervalError> {
        self.check(interval)?;
        let routes = self.by_route(interval, &BTreeSet::new());
        for test in &mut self.tests {
            let mut hosts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
            for cell in interval.cells.iter().filter(|cell| cell.arm == Arm::Stable) {
                if !cell.is_of(test.comparison.metric, test.comparison.route.as_deref()) {
                    continue;
                }
                let (requests, bad) = match test.comparison.metric.quantile() {
                    None => (cell.requests, cell.errors),
                    Some(quantile) => {
                        let route = route_name(&self.routes, &cell.route);
                        let Some(threshold) = self.times.get(route).and_then(|t| t.threshold(quantile))
                        else {
                            continue;
                        };
                        let slow = cell.latency.buckets().filter(|(bucket, _)| *bucket > threshold);
                        (cell.latency.total(), slow.map(|(_, count)| count).sum())
                    }
                };
                let sum = hosts.entry(&cell.host).or_default();
                *sum = (sum.0 + requests, sum.1 + bad);
            }
            for (host, (requests, bad)) in hosts {
                match test.comparison.metric {
                    Metric::Traffic => test.share_burst.observe(interval.start_ms, host, requests),
                    _ => test.burst.observe(interval.start_ms, host, requests, bad),
                }
            }
        }
        self.remember(interval, routes);
        Ok(())
    }

    /// From here on a pass must be earned anew: the canary gets another share of the traffic.
    pub fn begin_step(&mut self) {
        if self.abort.is_some() {
            return;
        }
        for test in &mut self.tests {
            test.process.begin_step();
            test.has_passed = false;
            if let Some(negligible) = &mut test.negligible {
                negligible.begin_step();
            }
        }
    }

    /// Takes an interval of the rollout in. After an abort it counts no more: the explanation stays what it was then.
    ///
    /// # Errors
    /// When the interval begins before the last one ended, or its counts cannot be; nothing was counted then.
    pub fn observe(&mut self, interval: &Interval) -> Result<(), IntervalError> {
        self.check(interval)?;
        if self.abort.is_some() {
            return Ok(());
        }
        let cold = self.cold_hosts(interval);
        let routes = self.by_route(interval, &cold);
        self.began_ms.get_or_insert(interval.start_ms);
        for test in &mut self.tests {
            match test.comparison.metric {
                // Who is warming up may leave requests to others.
                Metric::Traffic if cold.is_empty() => test.observe_traffic(interval),
                Metric::Traffic => {}
                Metric::Errors => test.observe_counts(interval, &routes, |route| route.errors),
                Metric::LatencyP50 | Metric::LatencyP90 | Metric::LatencyP99 => {
                    let quantile = test.comparison.metric.quantile().unwrap_or_default();
                    let mut thresholds = BTreeMap::new();
                    for name in routes.keys() {
                        if let Some(threshold) = self.times.get(name).and_then(|t| t.threshold(quantile)) {
                            thresholds.insert(name.clone(), threshold);
                        }
                    }
                    test.thresholds_us = thresholds
                        .iter()
                        .filter_map(|(name, bucket)| {
                            Some((name.clone(), *self.settings.bounds_us.get(*bucket)?))
                        })
                        .collect();
                    let in_flight = &self.in_flight;
                    test.observe_counts(interval, &routes, |route| {
                        let threshold = thresholds.get(route.name.as_str())?;
                        Some(route.slow(*threshold, in_flight.get(&route.name)))
                    });
                }
            }
            test.count_hosts(interval, &cold, &self.routes, &self.settings.bounds_us);
        }
        self.remember(interval, routes);
        self.decide(interval.end_ms());
        Ok(())
    }

    /// What the judge says now.
    #[must_use]
    pub fn judgement(&self) -> Judgement {
        Judgement::of(self)
    }

    /// The answer alone: the same as the judgement's, at next to no cost.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        if self.abort.is_some() {
            Verdict::Abort
        } else if self.began_ms.is_some() && self.tests.iter().all(|test| test.has_passed) {
            Verdict::Pass
        } else {
            Verdict::Inconclusive
        }
    }

    /// ln of the evidence for an abort: of the weighted mean over all comparisons.
    pub(crate) fn ln_evidence(&self) -> f64 {
        let weighed = self.settings.weights().into_iter().zip(&self.tests);
        weighed
            .fold(f64::NEG_INFINITY, |sum, (weight, test)| ln_add(sum, weight.ln() + test.process.ln_worse()))
    }

    fn decide(&mut self, now_ms: u64) {
        if self.ln_evidence() >= -self.settings.false_abort_budget.ln() {
            self.abort = Some(Abort { at_ms: now_ms });
        }
        let needed = -self.settings.false_pass_budget.ln();
        for test in &mut self.tests {
            test.has_passed |= test.ln_better() >= needed;
        }
    }

    fn check(&self, interval: &Interval) -> Result<(), IntervalError> {
        check(interval, self.settings.buckets())?;
        match self.ended_ms {
            Some(end_ms) if interval.start_ms < end_ms => {
                Err(IntervalError::Overlaps { start_ms: interval.start_ms, end_ms })
            }
            _ => Ok(()),
        }
    }

    /// Canary hosts that are not warm yet.
    fn cold_hosts(&mut self, interval: &Interval) -> BTreeSet<String> {
        let mut cold = BTreeSet::new();
        for cell in interval.cells.iter().filter(|cell| cell.arm == Arm::Canary) {
            let since = self.first_seen_ms.entry(cell.host.clone()).or_insert(interval.start_ms);
            if interval.start_ms.saturating_sub(*since) < self.settings.warmup_ms {
                cold.insert(cell.host.clone());
            }
        }
        cold
    }

    /// Sums over the hosts of each route, the cold ones left out.
    fn by_route(&mut self, interval: &Interval, cold: &BTreeSet<String>) -> BTreeMap<String, RouteCounts> {
        let buckets = self.settings.buckets();
        let mut routes: BTreeMap<String, RouteCounts> = BTreeMap::new();
        for cell in &interval.cells {
            if self.routes.len() < ROUTES_MAX && !self.routes.contains(&cell.route) {
                self.routes.insert(cell.route.clone());
            }
            if cell.arm == Arm::Canary && cold.contains(&cell.host) {
                continue;
            }
            let name = route_name(&self.routes, &cell.route);
            let route = routes.entry(name.to_owned()).or_insert_with(|| RouteCounts::new(name, buckets));
            route.errors.get_or_insert_default().count(cell.arm, cell.requests, cell.errors);
            let (ended, under_way) = match cell.arm {
                Arm::Canary => (&mut route.canary, &mut route.canary_in_flight),
                Arm::Stable => (&mut route.stable, &mut route.stable_in_flight),
            };
            cell.latency.add_to(ended);
            cell.in_flight.add_to(under_way);
        }
        routes
    }

    /// Keeps what the next interval is compared with.
    fn remember(&mut self, interval: &Interval, routes: BTreeMap<String, RouteCounts>) {
        self.in_flight.clear();
        for (name, route) in routes {
            self.times.entry(name.clone()).or_default().learn(&route.stable);
            self.in_flight.insert(name, (route.canary_in_flight, route.stable_in_flight));
        }
        self.ended_ms = Some(interval.end_ms());
    }
}

/// The counts of one route in one interval.
struct RouteCounts {
    name: String,
    errors: Option<Tally>,
    canary: Vec<u64>,
    stable: Vec<u64>,
    canary_in_flight: Vec<u64>,
    stable_in_flight: Vec<u64>,
}

impl RouteCounts {
    fn new(name: &str, buckets: usize) -> Self {
        let none = || vec![0; buckets];
        Self {
            name: name.to_owned(),
            errors: None,
            canary: none(),
            stable: none(),
            canary_in_flight: none(),
            stable_in_flight: none(),
        }
    }

    /// Requests above the threshold. One that is under way beyond it is slow now, and not counted once more when it ends: those
    /// of the last interval are taken off.
    fn slow(&self, threshold: usize, before: Option<&(Vec<u64>, Vec<u64>)>) -> Tally {
        let above = |counts: &[u64]| counts.iter().skip(threshold + 1).sum::<u64>();
        let all = |counts: &[u64]| counts.iter().sum::<u64>();
        let mut tally = Tally::default();
        for (arm, ended, under_way, counted) in [
            (Arm::Canary, &self.canary, &self.canary_in_flight, before.map(|before| &before.0)),
            (Arm::Stable, &self.stable, &self.stable_in_flight, before.map(|before| &before.1)),
        ] {
            let counted = counted.map_or(0, |counts| above(counts));
            let under_way = above(under_way);
            let requests = (all(ended) + under_way).saturating_sub(counted);
            let slow = (above(ended) + under_way).saturating_sub(counted);
            tally.count(arm, requests.max(slow), slow);
        }
        tally
    }
}

fn route_name<'a>(known: &BTreeSet<String>, route: &'a str) -> &'a str {
    if known.contains(route) { route } else { OTHER_ROUTES }
}

impl Test {
    fn new(comparison: &Comparison, settings: &Settings) -> Self {
        Self {
            comparison: comparison.clone(),
            process: Process::new(
                comparison.tolerate,
                comparison.pass_if_below,
                settings.late_stake,
                settings.max_time_ms,
            ),
            negligible: comparison.negligible.map(Negligible::new),
            burst: Burst::default(),
            share_burst: ShareBurst::default(),
            has_passed: false,
            total: Tally::default(),
            routes: BTreeMap::new(),
            hosts: BTreeMap::new(),
            thresholds_us: BTreeMap::new(),
            share: None,
        }
    }

    /// φ.
    pub(crate) fn burst_factor(&self) -> f64 {
        match self.comparison.metric {
            Metric::Traffic => self.share_burst.factor(),
            _ => self.burst.factor(),
        }
    }

    /// ln of the evidence for a pass: that the canary is better than its limit, or that hardly anything is bad. Each has half
    /// of the stake where both are looked at.
    pub(crate) fn ln_better(&self) -> f64 {
        let better = self.process.ln_better();
        match &self.negligible {
            None => better,
            Some(negligible) => ln_add(better, negligible.ln_better()) - std::f64::consts::LN_2,
        }
    }

    /// Compares the bad requests of each route.
    fn observe_counts(
        &mut self,
        interval: &Interval,
        routes: &BTreeMap<String, RouteCounts>,
        bad: impl Fn(&RouteCounts) -> Option<Tally>,
    ) {
        let burst = self.burst_factor();
        let mut strata = Vec::new();
        for (name, route) in routes {
            if self.comparison.route.as_ref().is_some_and(|only| only != name) {
                continue;
            }
            let Some(tally) = bad(route) else { continue };
            self.total.add(&tally);
            self.routes.entry(name.clone()).or_default().add(&tally);
            if let Some(share) = tally.share() {
                strata.push(Stratum { share, canary_bad: tally.canary_bad, stable_bad: tally.stable_bad });
                if let Some(negligible) = &mut self.negligible {
                    negligible.observe(tally.canary, tally.canary_bad, burst);
                }
            }
        }
        self.share = self.total.share();
        self.process.observe(interval.start_ms, interval.end_ms(), &strata, burst);
    }

    /// Compares the requests that ended with the configured share. Seen from the other side: the stable release has "bad"
    /// requests, those that it got, more often than its share when the canary lacks some.
    fn observe_traffic(&mut self, interval: &Interval) {
        let Some(share) = interval.canary_share else { return };
        let of = |arm: Arm| {
            let own = interval.cells.iter().filter(|cell| cell.arm == arm);
            own.fold(0u64, |sum, cell| sum.saturating_add(cell.requests))
        };
        let (canary, stable) = (of(Arm::Canary), of(Arm::Stable));
        if canary + stable == 0 {
            return;
        }
        self.share = Some(share);
        self.total.add(&Tally { canary, canary_bad: 0, stable, stable_bad: 0 });
        let stratum = Stratum { share: 1.0 - share, canary_bad: stable, stable_bad: canary };
        self.process.observe(interval.start_ms, interval.end_ms(), &[stratum], self.burst_factor());
    }

    /// What each canary host did, for the explanation.
    fn count_hosts(
        &mut self,
        interval: &Interval,
        cold: &BTreeSet<String>,
        routes: &BTreeSet<String>,
        bounds_us: &[u64],
    ) {
        for cell in interval.cells.iter().filter(|cell| cell.arm == Arm::Canary) {
            let is_of = cell.is_of(self.comparison.metric, self.comparison.route.as_deref());
            if !is_of || cold.contains(&cell.host) {
                continue;
            }
            let (requests, bad) = match self.comparison.metric.quantile() {
                None => (cell.requests, cell.errors),
                Some(_) => {
                    let Some(threshold) = self.thresholds_us.get(route_name(routes, &cell.route)) else {
                        continue;
                    };
                    let above =
                        |(bucket, _): &(usize, u64)| bounds_us.get(*bucket).is_none_or(|us| us > threshold);
                    let slow = cell.latency.buckets().filter(above).map(|(_, count)| count).sum();
                    (cell.latency.total(), slow)
                }
            };
            if self.hosts.len() < HOSTS_MAX || self.hosts.contains_key(&cell.host) {
                let counts = self.hosts.entry(cell.host.clone()).or_default();
                *counts = (counts.0.saturating_add(requests), counts.1.saturating_add(bad));
            }
        }
    }
}
