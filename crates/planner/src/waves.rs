//! Cutting waves: which hosts change together, in which order.
//!
//! A strategy cuts hosts, not instances: all instances of the rollout on one host go in one wave, so that a host is
//! disturbed once. Standby hosts come last, in a wave of their own.

use std::collections::BTreeSet;
use std::time::Duration;

use greenlight_model::canary::Canary;
use greenlight_model::fleet::{BatchSize, Environment, Strategy};
use greenlight_model::id::{HostName, Instance, ServiceName};
use greenlight_model::rollout::{Direction, Wave};

/// Cuts the waves of a rollout of `services` over the hosts of an environment, in the order of the fleet file.
///
/// Going back needs no caution about the release, so there is one wave (the floor still limits how many instances
/// are out at once) and the standby hosts after it. A share is of the hosts that the strategy cuts, standby hosts not
/// counted, rounded up and at least one host. No wave is empty.
#[must_use]
pub fn waves(environment: &Environment, services: &BTreeSet<ServiceName>, direction: Direction) -> Vec<Wave> {
    let hosts = hosts_in_order(environment, services);
    let (standby, hosts): (Vec<_>, Vec<_>) =
        hosts.into_iter().partition(|host| environment.standby.contains(*host));
    let cutter = Cutter { environment, services };
    let mut waves = match (direction, &environment.strategy) {
        (Direction::Back, _) => vec![cutter.wave(&hosts)],
        (Direction::Forward, Strategy::Rolling { batch }) => cutter.batches(&hosts, batch),
        (Direction::Forward, Strategy::BlueGreen) => cutter.blue_green(&hosts),
        (Direction::Forward, Strategy::Halves { keep_for }) => {
            let (first, second) = halves(&hosts);
            vec![cutter.wave(first), Wave { after: *keep_for, ..cutter.wave(second) }]
        }
        (Direction::Forward, Strategy::Canary(canary)) => cutter.canary(&hosts, canary),
    };
    waves.push(cutter.wave(&standby));
    waves.retain(|wave| !wave.instances.is_empty());
    waves
}

struct Cutter<'a> {
    environment: &'a Environment,
    services: &'a BTreeSet<ServiceName>,
}

impl Cutter<'_> {
    fn wave(&self, hosts: &[&HostName]) -> Wave {
        let hosts: BTreeSet<&HostName> = hosts.iter().copied().collect();
        let instances = self.services.iter().flat_map(|service| {
            let all = self.environment.hosts.get(service).into_iter().flatten();
            all.filter(|host| hosts.contains(host)).map(|host| Instance::new(host.clone(), service.clone()))
        });
        Wave { instances: instances.collect(), together: false, after: Duration::ZERO, steps: Vec::new() }
    }

    /// The canary's hosts first; the last host is never one of them, since there would be nothing to compare them with.
    fn canary(&self, hosts: &[&HostName], canary: &Canary) -> Vec<Wave> {
        let count = batch_hosts(canary.hosts, hosts.len()).min(hosts.len().saturating_sub(1));
        let (first, rest) = hosts.split_at(count);
        let first = self.wave(first);
        let has_traffic = first.instances.iter().any(|instance| {
            self.environment.balancers.iter().any(|balancer| balancer.service == instance.service)
        });
        // Without traffic there is nothing to share out: it is a small first wave.
        let steps = if has_traffic { canary.steps.clone() } else { Vec::new() };
        let mut waves = vec![Wave { steps, ..first }];
        waves.extend(self.batches(rest, &canary.batch));
        waves
    }

    fn batches(&self, hosts: &[&HostName], batch: &[BatchSize]) -> Vec<Wave> {
        let mut waves = Vec::new();
        let mut rest = hosts;
        let mut sizes = batch.iter();
        let mut size = 1;
        while !rest.is_empty() {
            // The last size repeats until all hosts are done.
            if let Some(next) = sizes.next() {
                size = batch_hosts(*next, hosts.len());
            }
            let (now, later) = rest.split_at(size.min(rest.len()));
            waves.push(self.wave(now));
            rest = later;
        }
        waves
    }

    fn blue_green(&self, hosts: &[&HostName]) -> Vec<Wave> {
        let (first, rest) = halves(hosts);
        let rest = self.wave(rest);
        // The rest changes together too where the floor lets all of it out of traffic at once. Where it does not,
        // holding it together would never end, and nothing is gained by it: traffic has already moved over.
        let together = self.floor_allows(&rest);
        vec![Wave { together: true, ..self.wave(first) }, Wave { together, ..rest }]
    }

    fn floor_allows(&self, wave: &Wave) -> bool {
        self.services.iter().all(|service| {
            let all = self.environment.hosts.get(service).map_or(0, Vec::len);
            let out = wave.instances.iter().filter(|instance| instance.service == *service).count();
            all <= 1 || out == 0 || all - out >= self.environment.floor.of(all)
        })
    }
}

fn hosts_in_order<'a>(environment: &'a Environment, services: &BTreeSet<ServiceName>) -> Vec<&'a HostName> {
    let mut seen = BTreeSet::new();
    environment
        .hosts
        .iter()
        .filter(|(service, _)| services.contains(*service))
        .flat_map(|(_, hosts)| hosts)
        .filter(|host| seen.insert(*host))
        .collect()
}

fn halves<'a, 'b>(hosts: &'b [&'a HostName]) -> (&'b [&'a HostName], &'b [&'a HostName]) {
    hosts.split_at((hosts.len() / 2).max(1).min(hosts.len()))
}

fn batch_hosts(size: BatchSize, all: usize) -> usize {
    match size {
        BatchSize::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
        BatchSize::Share(percent) => percent.of_rounded_up(all),
    }
    .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use greenlight_model::fleet::{Floor, OnFailure, Timeouts};
    use greenlight_model::quantity::Percent;
    use std::collections::BTreeMap;

    fn percent(value: u8) -> Percent {
        Percent::try_from(value).unwrap()
    }

    fn rolling(batch: &[BatchSize]) -> Strategy {
        Strategy::Rolling { batch: batch.to_vec() }
    }

    /// `hosts` is `service: host host; service: …`; a host with a star is a standby.
    fn environment(hosts: &str, strategy: Strategy, floor: u32) -> Environment {
        let mut standby = BTreeSet::new();
        let hosts: BTreeMap<ServiceName, Vec<HostName>> = hosts
            .split(';')
            .map(|part| {
                let (service, hosts) = part.split_once(':').unwrap();
                let hosts = hosts.split_whitespace().map(|text| {
                    let host: HostName = text.trim_end_matches('*').parse().unwrap();
                    if text.ends_with('*') {
                        standby.insert(host.clone());
                    }
                    host
                });
                (service.trim().parse().unwrap(), hosts.collect())
            })
            .collect();
        Environment {
            name: "production".parse().unwrap(),
            branch: None,
            hosts,
            host_settings: BTreeMap::new(),
            strategy,
            floor: Floor::Count(floor),
            failure_budget: 0,
            on_failure: OnFailure::TurnBack,
            after: None,
            gates: Default::default(),
            standby,
            balancers: Vec::new(),
            timeouts: Timeouts::default(),
            tag: None,
            retries: 0,
            variables: BTreeMap::new(),
        }
    }

    /// Waves as `a/web b/web +together | c/web +after 60s`.
    fn show(waves: &[Wave]) -> String {
        let waves = waves.iter().map(|wave| {
            let mut parts: Vec<String> = wave.instances.iter().map(Instance::to_string).collect();
            if wave.together {
                parts.push("+together".to_owned());
            }
            if !wave.after.is_zero() {
                parts.push(format!("+after {}s", wave.after.as_secs()));
            }
            parts.join(" ")
        });
        waves.collect::<Vec<_>>().join(" | ")
    }

    fn check(hosts: &str, strategy: Strategy, floor: u32, direction: Direction, expected: &str) {
        let environment = environment(hosts, strategy, floor);
        let services = environment.hosts.keys().cloned().collect();
        assert_eq!(show(&waves(&environment, &services, direction)), expected, "{hosts}");
    }

    #[test]
    fn rolling_cuts_batches_and_repeats_the_last() {
        use BatchSize::{Count, Share};
        let forward = Direction::Forward;
        check("w: c b a", rolling(&[Count(1)]), 1, forward, "c/w | b/w | a/w");
        check("w: a b c d e", rolling(&[Share(percent(25))]), 1, forward, "a/w b/w | c/w d/w | e/w");
        check(
            "w: a b c d e f g h i",
            rolling(&[Count(1), Count(5), Share(percent(20))]),
            1,
            forward,
            "a/w | b/w c/w d/w e/w f/w | g/w h/w | i/w",
        );
        check("w: a b", rolling(&[Count(0)]), 1, forward, "a/w | b/w");
        check("w: a b", rolling(&[Count(9)]), 1, forward, "a/w b/w");
    }

    #[test]
    fn blue_green_changes_halves_together_where_the_floor_allows() {
        let cut = |hosts, floor, expected| {
            check(hosts, Strategy::BlueGreen, floor, Direction::Forward, expected);
        };
        cut("w: a b", 1, "a/w +together | b/w +together");
        cut("w: a b c", 1, "a/w +together | b/w c/w +together");
        cut("w: a b c", 2, "a/w +together | b/w c/w");
        cut("w: a", 0, "a/w +together");
    }

    #[test]
    fn halves_keep_the_second_and_standby_comes_last() {
        let keep_for = Duration::from_secs(60);
        let strategy = || Strategy::Halves { keep_for };
        check("w: a b c d s*", strategy(), 1, Direction::Forward, "a/w b/w | c/w d/w +after 60s | s/w");
        check("w: a", strategy(), 0, Direction::Forward, "a/w");
        check("w: a b c d s*", strategy(), 1, Direction::Back, "a/w b/w c/w d/w | s/w");
    }

    #[test]
    fn all_instances_of_a_host_change_in_one_wave() {
        let one = || rolling(&[BatchSize::Count(1)]);
        check("api: a b; web: b c", one(), 1, Direction::Forward, "a/api | b/api b/web | c/web");
    }
}
