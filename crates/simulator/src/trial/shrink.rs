//! Making a scenario that fails smaller: fewer faults, hosts and services, as long as the same promise is broken.

use super::scenario::Scenario;
use super::trial::run;

/// Runs that shrinking may take: enough for the faults and hosts of any scenario several times over.
const RUNS_MAX: usize = 600;

/// The smallest scenario found that still breaks the same promise; the same one when it breaks none.
#[must_use]
pub fn shrink(scenario: &Scenario) -> Scenario {
    let Some(violation) = run(scenario, false).violation else { return scenario.clone() };
    let mut runs = 0;
    let mut best = scenario.clone();
    let mut is_worse = |smaller: &Scenario| {
        runs += 1;
        runs <= RUNS_MAX
            && run(smaller, false).violation.is_some_and(|found| found.checker == violation.checker)
    };
    loop {
        let mut has_shrunk = false;
        // Whole halves of the faults first, then one by one.
        let mut chunk = best.faults.len();
        while chunk > 0 {
            let mut from = 0;
            while from < best.faults.len() {
                let mut smaller = best.clone();
                smaller.faults.drain(from..(from + chunk).min(smaller.faults.len()));
                if smaller.faults.len() < best.faults.len() && is_worse(&smaller) {
                    best = smaller;
                    has_shrunk = true;
                } else {
                    from += chunk;
                }
            }
            chunk /= 2;
        }
        for smaller in simpler(&best) {
            if is_worse(&smaller) {
                best = smaller;
                has_shrunk = true;
                break;
            }
        }
        if !has_shrunk {
            return best;
        }
    }
}

/// Scenarios with one thing less.
fn simpler(scenario: &Scenario) -> Vec<Scenario> {
    let mut all = Vec::new();
    let mut try_one = |change: &dyn Fn(&mut Scenario)| {
        let mut smaller = scenario.clone();
        change(&mut smaller);
        if smaller != *scenario && smaller.services.iter().all(|service| !service.hosts.is_empty()) {
            all.push(smaller);
        }
    };
    if scenario.hosts > 8 {
        try_one(&|smaller| keep_hosts(smaller, scenario.hosts / 2));
    }
    if scenario.hosts > 1 {
        try_one(&|smaller| keep_hosts(smaller, scenario.hosts - 1));
    }
    if scenario.services.len() > 1 {
        try_one(&|smaller| {
            smaller.services.pop();
            let (services, balancers) = (smaller.services.len(), smaller.balancers());
            smaller.faults.retain(|fault| fault.kind.fits(usize::MAX, services, balancers));
        });
    }
    try_one(&|smaller| smaller.services.iter_mut().for_each(|service| service.migrates = false));
    try_one(&|smaller| smaller.services.iter_mut().for_each(|service| service.has_smoke = false));
    try_one(&|smaller| {
        smaller.services.iter_mut().for_each(|service| service.balancers = service.balancers.min(1));
        let balancers = smaller.balancers();
        smaller.faults.retain(|fault| fault.kind.fits(usize::MAX, usize::MAX, balancers));
    });
    try_one(&|smaller| smaller.standby.clear());
    try_one(&|smaller| smaller.only.clear());
    try_one(&|smaller| smaller.has_guard = false);
    try_one(&|smaller| smaller.retries = 0);
    try_one(&|smaller| smaller.failure_budget = 0);
    all
}

fn keep_hosts(scenario: &mut Scenario, hosts: usize) {
    scenario.hosts = hosts;
    for service in &mut scenario.services {
        service.hosts.retain(|host| *host < hosts);
    }
    scenario.standby.retain(|host| *host < hosts);
    scenario.only.retain(|host| *host < hosts);
    scenario.faults.retain(|fault| fault.kind.fits(hosts, usize::MAX, usize::MAX));
}
