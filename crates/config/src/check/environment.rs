//! Environments: services, strategy, floor, and the order among environments.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::fleet::Floor;
use greenlight_model::id::{EnvironmentName, ServiceName};

use super::hosts::{self, Sites, sites};
use super::{balancer, ports};
use crate::canary;
use crate::language::{Amount, Environment, FleetFile, Strategy};
use crate::problem::{Problems, suggest};
use crate::read::At;
use crate::text::StrategyKind;

pub(super) fn check(file: &FleetFile, problems: &mut Problems) {
    let mut used: BTreeSet<&ServiceName> = BTreeSet::new();
    for (_, environment) in file.environment.good() {
        let sites = sites(environment);
        used.extend(sites.services.keys());
        check_services(file, environment, problems);
        hosts::check(environment, &sites, problems);
        balancer::check(file, environment, &sites, problems);
        ports::check_environment(file, &sites, problems);
        if let Some(strategy) = environment.strategy.get() {
            check_strategy(&strategy.0, &sites, problems);
        }
        canary::check(environment, &sites, problems);
    }
    check_order(file, problems);
    if file.environment.is_absent() {
        problems.warning(
            "no-environment",
            &(0..0),
            "there is no environment to release to",
            "describe one in a table `[environment.NAME]`".to_owned(),
        );
        return;
    }
    let is_known = file.environment.value().is_some_and(|environments| {
        environments.complete
            && environments
                .entries
                .iter()
                .all(|(_, environment)| environment.value().is_some_and(|it| sites(it).complete))
    });
    for (name, _) in file.service.entries() {
        if is_known && !used.contains(&name.value) {
            problems.warning(
                "unused-service",
                &name.span,
                format!("the service `{}` has no hosts in any environment", **name),
                format!("name them in an environment: `hosts.{} = [\"…\"]`", **name),
            );
        }
    }
}

fn check_services(file: &FleetFile, environment: &Environment, problems: &mut Problems) {
    let Some(services) = file.service.value().filter(|services| services.complete) else { return };
    let names = || services.entries.iter().map(|(name, _)| name.as_str());
    for (name, _) in environment.hosts.entries() {
        if !names().any(|own| own == name.as_str()) {
            problems.error(
                "unknown-service",
                &name.span,
                format!("there is no service `{}`", **name),
                suggest(name.as_str(), "the services are", names()),
            );
        }
    }
}

fn check_strategy(strategy: &Strategy, sites: &Sites<'_>, problems: &mut Problems) {
    let kind = strategy.kind.value();
    if let (Some(batch), Some(StrategyKind::BlueGreen | StrategyKind::Halves)) = (strategy.batch.get(), kind)
    {
        problems.error(
            "not-of-this-strategy",
            &batch.span,
            "`batch` goes with `kind = \"rolling\"`; this strategy has two waves",
            "leave `batch` out, or choose rolling".to_owned(),
        );
    }
    if let (Some(keep_for), Some(StrategyKind::BlueGreen | StrategyKind::Rolling | StrategyKind::Canary)) =
        (strategy.keep_for.get(), kind)
    {
        problems.error(
            "not-of-this-strategy",
            &keep_for.span,
            "`keep_for` goes with `kind = \"halves\"`, which keeps the old half for a while",
            "leave `keep_for` out, or choose halves".to_owned(),
        );
    }
    if let Some(batch) = strategy.batch.get() {
        if batch.0.items.is_empty() && batch.0.complete {
            problems.error(
                "empty-batch",
                &batch.span,
                "no size of a batch is stated",
                "write `batch = 1`".to_owned(),
            );
        }
        for size in &batch.0.items {
            let is_zero = match size.value {
                Amount::Count(count) => count == 0,
                Amount::Share(share) => share.get() == 0,
            };
            if is_zero {
                problems.error(
                    "empty-batch",
                    &size.span,
                    "a batch of no hosts would never end",
                    "a batch has 1 host or more".to_owned(),
                );
            }
        }
    }
    check_floor(strategy, sites, problems);
}

/// A floor at the number of hosts forbids every change.
fn check_floor(strategy: &Strategy, sites: &Sites<'_>, problems: &mut Problems) {
    let Some(stated) = strategy.floor.get() else { return };
    if !sites.complete {
        return;
    }
    let floor = floor(stated);
    // A service on a single host has no floor to keep: changing it always takes it out of traffic.
    let stuck =
        sites.services.iter().find(|(_, hosts)| hosts.len() > 1 && floor.of(hosts.len()) >= hosts.len());
    if let Some((service, hosts)) = stuck {
        let count = hosts.len();
        problems.error(
            "floor-too-high",
            &stated.span,
            format!(
                "`{service}` has {count} hosts and {} must keep serving: none could ever be changed",
                floor.of(count)
            ),
            format!("let the floor be {} or less", count - 1),
        );
    }
}

pub(crate) fn floor(amount: &Amount) -> Floor {
    match *amount {
        Amount::Count(count) => Floor::Count(count),
        Amount::Share(share) => Floor::Share(share),
    }
}

/// Each `after` names another environment, and none waits for itself round a circle.
fn check_order(file: &FleetFile, problems: &mut Problems) {
    let Some(environments) = file.environment.value() else { return };
    let names = || environments.entries.iter().map(|(name, _)| name.as_str());
    let mut after: BTreeMap<&EnvironmentName, &At<EnvironmentName>> = BTreeMap::new();
    for (name, environment) in environments.good() {
        let Some(earlier) = environment.after.value().and_then(|after| after.environment.get()) else {
            continue;
        };
        if earlier.value == name.value {
            let message = format!("`{}` waits for itself", **name);
            let help = "name an environment that comes before it".to_owned();
            problems.error("after-itself", &earlier.span, message, help);
        } else if environments.complete && !names().any(|own| own == earlier.as_str()) {
            problems.error(
                "unknown-environment",
                &earlier.span,
                format!("there is no environment `{}`", **earlier),
                suggest(earlier.as_str(), "the environments are", names()),
            );
        } else {
            after.insert(name, earlier);
        }
    }
    let mut done: BTreeSet<&EnvironmentName> = BTreeSet::new();
    for start in after.keys() {
        let mut path: Vec<&EnvironmentName> = vec![start];
        while let Some(&last) = path.last() {
            if done.contains(last) {
                break;
            }
            let Some(earlier) = after.get(last) else { break };
            if let Some(at) = path.iter().position(|name| **name == earlier.value) {
                let circle: Vec<_> = path[at..].iter().map(|name| format!("`{name}`")).collect();
                problems.error(
                    "after-circle",
                    &earlier.span,
                    format!("these wait for each other: {}", circle.join(", ")),
                    "leave one `after` out".to_owned(),
                );
                break;
            }
            path.push(&earlier.value);
        }
        done.extend(path);
    }
}
