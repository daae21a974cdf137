//! The fleet of a scenario as the planner knows it: names, environment, services.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::fleet::{
    Balancer, BalancerKind, BecomeRoot, Environment, HostIdentity, HostSettings, LinkKind, ManagerKind,
    Migration, Process, Service, Smoke, Source, Timeouts,
};
use greenlight_model::id::{HostName, Instance, ReleaseId, ServiceName};
use greenlight_model::world::ReleaseFacts;

use super::scenario::{Ms, Scenario};

/// How long things may take, as the scenario's fleet file says.
pub(super) const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_millis(3_000),
    claim: Duration::from_millis(CLAIM_MS),
    stage: Duration::from_millis(8_000),
    activate: Duration::from_millis(3_000),
    drain: Duration::from_millis(4_000),
    admit: Duration::from_millis(4_000),
    confirm: Duration::from_millis(CONFIRM_TIMEOUT_MS),
};
/// How long a claim holds without being renewed.
pub(super) const CLAIM_MS: u64 = 20_000;
/// How long a process may take to answer.
pub(super) const START_TIMEOUT_MS: Ms = 3_000;
/// How long a process may take to stop.
pub(super) const STOP_TIMEOUT_MS: Ms = 1_000;
/// How long the controller has to confirm beyond that.
pub(super) const CONFIRM_TIMEOUT_MS: Ms = 5_000;
/// When every simulation begins: 2026-11-20.
const START_MS: i64 = 1_795_132_800_000;
/// Releases of each service.
pub(super) const RELEASES: usize = 4;

pub(super) struct Site {
    pub(super) environment: Environment,
    pub(super) services: BTreeMap<ServiceName, Service>,
    pub(super) releases: BTreeMap<ReleaseId, ReleaseFacts>,
    pub(super) hosts: Vec<HostName>,
    pub(super) names: Vec<ServiceName>,
    /// By host and service, where the service runs there.
    pub(super) instances: Vec<Vec<Option<Instance>>>,
    pub(super) places: BTreeMap<Instance, (usize, usize)>,
    pub(super) host_places: BTreeMap<HostName, usize>,
    /// The service of each balancer.
    pub(super) balancers: Vec<usize>,
}

/// A moment as a clock that is off by so much shows it.
pub(super) fn stamp(now: Ms, off_ms: i64) -> Timestamp {
    let moment = START_MS.saturating_add(i64::try_from(now).unwrap_or(i64::MAX)).saturating_add(off_ms);
    Timestamp::from_millisecond(moment).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A release by its service and its number there.
pub(super) fn release(service: usize, number: usize) -> ReleaseId {
    let byte = u8::try_from(service * RELEASES + number + 1).unwrap_or(u8::MAX);
    ReleaseId::from_bytes([byte; 32])
}

/// The service and number of a release.
pub(super) fn of_release(release: ReleaseId) -> (usize, usize) {
    let index = usize::from(release.as_bytes()[0]) - 1;
    (index / RELEASES, index % RELEASES)
}

impl Site {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let hosts: Vec<HostName> = (0..scenario.hosts).map(|index| name(&format!("h{index:03}"))).collect();
        let names: Vec<ServiceName> =
            (0..scenario.services.len()).map(|index| name(["web", "worker", "zeta"][index])).collect();
        let settings = HostSettings {
            link: LinkKind::Local,
            address: None,
            root: String::new(),
            ports: BTreeMap::new(),
            manager: ManagerKind::Auto,
            become_root: BecomeRoot::Auto,
            identity: HostIdentity::default(),
        };
        let mut balancers = Vec::new();
        for (index, shape) in scenario.services.iter().enumerate() {
            balancers.extend(std::iter::repeat_n(index, shape.balancers));
        }
        let environment = Environment {
            name: name("production"),
            branch: None,
            hosts: scenario
                .services
                .iter()
                .zip(&names)
                .map(|(shape, name)| {
                    (name.clone(), shape.hosts.iter().map(|host| hosts[*host].clone()).collect())
                })
                .collect(),
            host_settings: hosts.iter().map(|host| (host.clone(), settings.clone())).collect(),
            strategy: scenario.strategy.clone(),
            floor: scenario.floor,
            failure_budget: scenario.failure_budget,
            on_failure: scenario.on_failure,
            after: None,
            gates: Default::default(),
            standby: scenario.standby.iter().map(|host| hosts[*host].clone()).collect(),
            balancers: balancers
                .iter()
                .enumerate()
                .map(|(index, service)| Balancer {
                    service: names[*service].clone(),
                    kind: BalancerKind::HaproxyTcp { address: format!("lb{index}") },
                    backend: String::new(),
                    servers: BTreeMap::new(),
                })
                .collect(),
            timeouts: TIMEOUTS,
            tag: None,
            retries: scenario.retries,
            variables: BTreeMap::new(),
        };
        let services = scenario.services.iter().zip(&names).map(|(shape, name)| {
            let mut service = service(name, shape.migrates, shape.has_smoke, shape.has_process);
            if let Some(migration) = &mut service.migrate {
                migration.contract = scenario.contracts().then(Vec::new);
            }
            (name.clone(), service)
        });
        let releases = (0..names.len()).flat_map(|service| {
            let name = names[service].clone();
            (0..RELEASES).map(move |number| {
                let facts = ReleaseFacts { title: format!("v{number}"), service: name.clone(), bad: None };
                (release(service, number), facts)
            })
        });
        let instances: Vec<Vec<Option<Instance>>> = hosts
            .iter()
            .enumerate()
            .map(|(host, host_name)| {
                let of_service = |service: usize| {
                    let is_there = scenario.services[service].hosts.contains(&host);
                    is_there.then(|| Instance::new(host_name.clone(), names[service].clone()))
                };
                (0..names.len()).map(of_service).collect()
            })
            .collect();
        let mut places = BTreeMap::new();
        for (host, of_host) in instances.iter().enumerate() {
            for (service, instance) in of_host.iter().enumerate() {
                places.extend(instance.clone().map(|instance| (instance, (host, service))));
            }
        }
        Self {
            services: services.collect(),
            releases: releases.collect(),
            host_places: hosts.iter().enumerate().map(|(index, host)| (host.clone(), index)).collect(),
            environment,
            hosts,
            names,
            instances,
            places,
            balancers,
        }
    }

    /// The host and the service of an instance.
    pub(super) fn place(&self, instance: &Instance) -> (usize, usize) {
        self.places[instance]
    }
}

fn name<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    #[expect(clippy::expect_used, reason = "only names of letters and digits are given")]
    text.parse().expect("a name")
}

fn service(service: &ServiceName, migrates: bool, has_smoke: bool, has_process: bool) -> Service {
    let process = Process {
        name: name("main"),
        argv: Vec::new(),
        port: None,
        health: None,
        variables: BTreeMap::new(),
        stdout: String::new(),
        stderr: String::new(),
        profiles: BTreeMap::new(),
        user: None,
        smoke: has_smoke.then_some(Smoke { port: 9_000 }),
        start_timeout: Duration::from_millis(START_TIMEOUT_MS),
        stop_timeout: Duration::from_millis(STOP_TIMEOUT_MS),
        stop_argv: None,
    };
    Service {
        name: service.clone(),
        source: Source { git: String::new(), branch: None, directory: None },
        build: Vec::new(),
        include: Vec::new(),
        exclude: Vec::new(),
        shared: Vec::new(),
        prepare: Vec::new(),
        requires: greenlight_model::requirements::Requirements::default(),
        migrate: migrates.then(|| Migration::new(Vec::new(), Duration::from_millis(4_000))),
        processes: if has_process {
            BTreeMap::from([(process.name.clone(), process)])
        } else {
            BTreeMap::new()
        },
        secrets: BTreeSet::new(),
        keep_releases: 0,
    }
}
