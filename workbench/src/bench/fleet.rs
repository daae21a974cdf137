//! A fleet of any size, as its file states it and its hosts would report it, with a rollout just begun.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::Timestamp;
use greenlight_model::fleet::{Environment, Fleet};
use greenlight_model::host::{
    Answer, HostFacts, HostReport, InstanceReport, Ledger, LedgerEntry, LedgerEvent, ProcessReport,
    ProcessState,
};
use greenlight_model::id::{Generation, HostName, ReleaseId, ServiceName};
use greenlight_model::rollout::{Direction, Plan, Rollout};
use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth};
use greenlight_model::world::{Observation, ReleaseFacts, World};

use crate::Error;

/// Two services, one of them behind a balancer, in ten waves.
const FILE: &str = r#"
[service.web]
source = { git = "." }
[service.web.process.web]
run = "bin/web {port}"
port = 8080
health = { http = "/health", release = "/version" }

[service.worker]
source = { git = "." }
[service.worker.process.worker]
run = "bin/worker"

[environment.production]
balancer = { haproxy = "tcp://127.0.0.1:9999", backend = "web", service = "web" }
strategy = { kind = "rolling", batch = "10%", floor = "50%" }
"#;

/// The share of hosts that run the worker: one in so many.
const WORKER_HOSTS: usize = 5;
/// What happened on each host before: a ledger is never empty.
const HISTORY: usize = 20;

const OLD: u8 = 1;
const NEW: u8 = 2;

/// A fleet of this many instances, web and worker taken together.
pub(crate) fn world(hosts: usize) -> Result<World, Error> {
    let workers = hosts / WORKER_HOSTS;
    let text = format!(
        "{FILE}hosts.web = [\"web[1-{}]\"]\nhosts.worker = [\"worker[1-{workers}]\"]\n",
        hosts - workers
    );
    let parsed = greenlight_config::parse(&text).map_err(|problems| {
        let all: Vec<String> = problems.iter().map(|problem| problem.message.clone()).collect();
        Error::Refused(format!("the fleet to measure with is not valid: {}", all.join("; ")))
    })?;
    let Fleet { services, environments, .. } = parsed.fleet;
    let Some(environment) = environments.into_values().next() else {
        return Err(Error::Refused("the fleet to measure with has no environment".to_owned()));
    };
    let names: BTreeSet<ServiceName> = services.keys().cloned().collect();
    let plan = Plan {
        id: named("production-1")?,
        environment: environment.name.clone(),
        direction: Direction::Forward,
        targets: names.iter().map(|name| (name.clone(), release(name, NEW))).collect(),
        baseline: environment
            .instances()
            .map(|instance| {
                let old = release(&instance.service, OLD);
                (instance, Some(old))
            })
            .collect(),
        waves: greenlight_planner::waves(&environment, &names, Direction::Forward),
        generation: Generation(2),
        started_by: "op@desk".to_owned(),
        digest: None,
        is_partial: false,
        overrides: BTreeMap::new(),
        losses: Vec::new(),
    };
    let releases = names.iter().flat_map(|name| {
        [(OLD, "v1"), (NEW, "v2")].map(|(number, title)| {
            let facts = ReleaseFacts { title: title.to_owned(), service: name.clone(), bad: None };
            (release(name, number), facts)
        })
    });
    Ok(World {
        now: Timestamp::UNIX_EPOCH,
        releases: releases.collect(),
        rollout: Rollout::new(plan, Timestamp::UNIX_EPOCH),
        inventory: inventory(&environment)?,
        traffic: traffic(&environment),
        gates: Vec::new(),
        judgement: None,
        in_flight: Vec::new(),
        services,
        environment,
    })
}

fn inventory(environment: &Environment) -> Result<BTreeMap<HostName, Observation>, Error> {
    let mut inventory: BTreeMap<HostName, Observation> = BTreeMap::new();
    for instance in environment.instances() {
        let report = instance_report(&instance.service)?;
        let observation = inventory.entry(instance.host.clone()).or_default();
        let (_, host) = observation.report.get_or_insert_with(|| {
            let report = HostReport { facts: facts(&instance.host), instances: BTreeMap::new() };
            (Timestamp::UNIX_EPOCH, report)
        });
        host.instances.insert(instance.service, report);
    }
    Ok(inventory)
}

fn instance_report(service: &ServiceName) -> Result<InstanceReport, Error> {
    let old = release(service, OLD);
    let generation = Generation(1);
    let entry = LedgerEntry {
        at: Timestamp::UNIX_EPOCH,
        event: LedgerEvent::Proven,
        release: Some(old),
        generation,
        rollout: None,
        detail: "version endpoint".to_owned(),
    };
    let process = ProcessReport {
        state: ProcessState::Running { pid: 1, started_at: Timestamp::UNIX_EPOCH },
        answer: Answer::Release { release: old, proof: "version endpoint".to_owned() },
        profile: None,
    };
    Ok(InstanceReport {
        ledger: Ledger {
            generation,
            active: Some(old),
            last_good: Some(old),
            confirmed: Some(generation),
            history: vec![entry; HISTORY],
            ..Ledger::default()
        },
        linked: Some(old),
        staged: BTreeSet::from([old]),
        processes: BTreeMap::from([(named(service.as_str())?, process)]),
        disk_free_bytes: 1 << 34,
    })
}

fn facts(host: &HostName) -> HostFacts {
    HostFacts {
        hostname: host.to_string(),
        os: "Debian GNU/Linux 12 (bookworm)".to_owned(),
        architecture: "x86_64".to_owned(),
        machine_id: None,
        user: "root".to_owned(),
        is_root: true,
        managers: Vec::new(),
        agent_version: "0.1.0".to_owned(),
    }
}

fn traffic(environment: &Environment) -> Vec<BalancerReport> {
    let server = Server {
        admission: Admission::Ready,
        health: ServerHealth::Up,
        sessions: 3,
        weight: 100,
        normal_weight: 100,
    };
    let reports = environment.balancers.iter().map(|balancer| {
        let instances = environment.instances_of(&balancer.service);
        BalancerReport::Servers(instances.map(|instance| (instance.host, server)).collect())
    });
    reports.collect()
}

fn release(service: &ServiceName, number: u8) -> ReleaseId {
    let mut bytes = [number; 32];
    bytes.iter_mut().zip(service.as_str().bytes()).for_each(|(to, from)| *to = from);
    ReleaseId::from_bytes(bytes)
}

fn named<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, Error> {
    text.parse().map_err(|error| Error::Refused(format!("`{text}`: {error}")))
}
