//! From the file that holds together to the fleet: defaults filled in, ranges expanded.
//!
//! Guarantees nothing about a file in which an error was noted; [`crate::check`] comes first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_migration::files_of;
use greenlight_model::fleet::{
    After, Balancer, BalancerKind, BatchSize, BecomeRoot, Environment, Fleet, Floor, Health, HostIdentity,
    HostSettings, LinkKind, ManagerKind, Migration, OnFailure, Process, Profile, SecretSource, Service,
    Smoke, Source, Strategy, Tagging, Timeouts,
};
use greenlight_model::gate::Gates;
use greenlight_model::id::{EnvironmentName, HostName, ProcessName, ServiceName, VariableName};

use crate::canary;
use crate::check::{Sites, balancers, floor, service_behind, sites};
use crate::gates;
use crate::language::{self, Amount, FleetFile};
use crate::read::{Key, List, Map};
use crate::requires;
use crate::text::{Command, Glob, HaproxyPlace, Limit, Link, LogPath, StrategyKind};

const KEEP_RELEASES: u32 = 5;
const RETRIES: u32 = 2;
const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(600);
const KEEP_HALF_FOR: Duration = Duration::from_secs(600);
const ROOT: &str = "/srv";
const IDENTITY: &str = "~/.config/greenlight/identity.txt";

/// The fleet; none when a required key is missing, which the reader has noted.
pub(crate) fn fleet(file: &FleetFile) -> Option<Fleet> {
    let mut fleet = Fleet::default();
    for (name, service) in file.service.value()?.good() {
        fleet.services.insert(name.value.clone(), build_service(name, service)?);
    }
    for (name, environment) in file.environment.good() {
        fleet.environments.insert(name.value.clone(), build_environment(file, name, environment)?);
    }
    for (name, secret) in file.secret.good() {
        let source = match (secret.age.value(), secret.command.value()) {
            (Some(file), _) => SecretSource::Age {
                file: file.0.clone(),
                identity: secret
                    .identity
                    .value()
                    .map_or_else(|| IDENTITY.to_owned(), |identity| identity.0.clone()),
            },
            (None, command) => SecretSource::Command { argv: command?.0.clone() },
        };
        fleet.secrets.insert(name.value.clone(), source);
    }
    for (name, members) in file.role.good() {
        let members = members.items.iter().map(|member| member.0.clone()).collect();
        fleet.roles.insert(name.value.clone(), members);
    }
    Some(fleet)
}

fn build_service(name: &ServiceName, service: &language::Service) -> Option<Service> {
    let source = service.source.value();
    let mut processes = BTreeMap::new();
    for (name, process) in service.process.good() {
        processes.insert(name.value.clone(), build_process(name, process)?);
    }
    Some(Service {
        name: name.clone(),
        source: Source {
            git: source
                .and_then(|source| source.git.value())
                .map_or_else(|| ".".to_owned(), |git| git.0.clone()),
            branch: source.and_then(|source| source.branch.value()).map(|branch| branch.0.clone()),
            directory: source
                .and_then(|source| source.directory.value())
                .map(|directory| directory.0.trim_end_matches('/').to_owned()),
        },
        build: list(&service.build, |step| step.0.clone()),
        include: list(&service.include, |glob| glob.0.clone()),
        exclude: list(&service.exclude, |glob| glob.0.clone()),
        shared: list(&service.shared, |path| path.0.clone()),
        prepare: list(&service.prepare, |step| step.0.clone()),
        requires: service.requires.value().map(requires::build).unwrap_or_default(),
        migrate: match service.migrate.value() {
            Some(migrate) => Some(build_migration(&migrate.0)?),
            None => None,
        },
        processes,
        secrets: list(&service.secrets, VariableName::clone).into_iter().collect(),
        keep_releases: service.keep_releases.value().map_or(KEEP_RELEASES, |count| count.0),
    })
}

fn build_migration(migrate: &language::Migrate) -> Option<Migration> {
    let argv = migrate.run.value()?.0.clone();
    let command = |key: &Key<Command>| key.value().map(|command| command.0.clone());
    let contract = command(&migrate.contract);
    let stated = |files: &Key<List<Glob>>, argv: Option<&Vec<String>>| {
        if files.is_absent() {
            argv.map(|argv| files_of(argv)).unwrap_or_default()
        } else {
            list(files, |glob| glob.0.clone())
        }
    };
    Some(Migration {
        files: stated(&migrate.files, Some(&argv)),
        contract_files: stated(&migrate.contract_files, contract.as_ref()),
        contract,
        dry_run: command(&migrate.dry_run),
        backup: command(&migrate.backup),
        lock: migrate.lock.value().cloned(),
        lock_timeout: limit(&migrate.lock_timeout, Migration::LOCK_TIMEOUT),
        statement_timeout: limit(&migrate.statement_timeout, Migration::STATEMENT_TIMEOUT),
        ..Migration::new(argv, limit(&migrate.timeout, MIGRATE_TIMEOUT))
    })
}

fn build_process(name: &ProcessName, process: &language::Process) -> Option<Process> {
    let mut profiles = BTreeMap::new();
    for (name, profile) in process.profile.good() {
        let variables = variables(&profile.variables);
        let argv = profile.run.value().map(|run| run.0.clone());
        profiles.insert(name.value.clone(), Profile { variables, argv });
    }
    Some(Process {
        name: name.clone(),
        argv: process.run.value()?.0.clone(),
        port: process.port.value().map(|port| port.0),
        health: process.health.value().map(|health| Health {
            http: health.0.http.value().map(|path| path.0.clone()),
            release: health.0.release.value().map(|path| path.0.clone()),
        }),
        variables: variables(&process.variables),
        stdout: log_path(&process.stdout, name, "stdout"),
        stderr: log_path(&process.stderr, name, "stderr"),
        profiles,
        user: process.user.value().cloned(),
        smoke: match process.smoke.value() {
            Some(smoke) => Some(Smoke { port: smoke.port.value()?.0 }),
            None => None,
        },
        start_timeout: limit(&process.start_timeout, START_TIMEOUT),
        stop_timeout: process.stop_timeout.value().copied().unwrap_or(STOP_TIMEOUT),
        stop_argv: process.stop.value().map(|stop| stop.0.clone()),
    })
}

/// Where a process's output goes: what is stated, else the usual place.
pub(crate) fn log_path(stated: &Key<LogPath>, process: &ProcessName, stream: &str) -> String {
    stated.value().map_or_else(|| format!("logs/{process}.{stream}"), |path| path.0.clone())
}

fn build_environment(
    file: &FleetFile,
    name: &EnvironmentName,
    environment: &language::Environment,
) -> Option<Environment> {
    let sites = sites(environment);
    let mut balancers = Vec::new();
    for balancer in environment.balancer.value().into_iter().flat_map(|balancers| &balancers.0.items) {
        balancers.push(build_balancer(file, balancer, &sites)?);
    }
    let strategy = environment.strategy.value().map(|strategy| &strategy.0);
    Some(Environment {
        name: name.clone(),
        branch: environment.branch.value().map(|branch| branch.0.clone()),
        hosts: sites
            .services
            .iter()
            .map(|(service, hosts)| {
                ((*service).clone(), hosts.iter().map(|(host, _)| (*host).clone()).collect())
            })
            .collect(),
        host_settings: sites
            .service_hosts()
            .union(&sites.balancer_hosts)
            .map(|host| ((*host).clone(), host_settings(host, environment, &sites)))
            .collect(),
        strategy: build_strategy(strategy, environment)?,
        floor: strategy.and_then(|strategy| strategy.floor.value()).map_or(Floor::Count(1), floor),
        failure_budget: environment.failure_budget.value().map_or(0, |count| count.0),
        on_failure: environment.on_failure.value().copied().unwrap_or(OnFailure::TurnBack),
        after: match environment.after.value() {
            Some(after) => Some(After {
                environment: after.environment.value()?.clone(),
                soak: after.soak.value().copied().unwrap_or_default(),
            }),
            None => None,
        },
        gates: match environment.gate.value() {
            Some(table) => gates::build(table)?,
            None => Gates::default(),
        },
        standby: list(&environment.standby, |pattern| pattern.0.clone())
            .into_iter()
            .flatten()
            .collect::<BTreeSet<HostName>>(),
        balancers,
        timeouts: environment.timeouts.value().map(timeouts).unwrap_or_default(),
        tag: environment.tag.value().map(|tag| Tagging {
            moving: tag.moving.value().map(|moving| moving.0.clone()),
            push: tag.push.value().map(|push| push.0.clone()),
        }),
        retries: environment.retries.value().map_or(RETRIES, |count| count.0),
        variables: variables(&environment.variables),
    })
}

fn host_settings(host: &HostName, environment: &language::Environment, sites: &Sites<'_>) -> HostSettings {
    let link = match sites.stated(host, |settings| &settings.link) {
        Some(Link::Local) => LinkKind::Local,
        Some(Link::Ssh) | None => LinkKind::Ssh {
            destination: sites
                .stated(host, |settings| &settings.destination)
                .map(|destination| destination.0.clone()),
            user: sites.stated(host, |settings| &settings.user).or(environment.user.value()).cloned(),
        },
    };
    let root = sites.stated(host, |settings| &settings.root).or(environment.root.value());
    HostSettings {
        link,
        address: sites.stated(host, |settings| &settings.address).map(|address| address.0.clone()),
        root: root.map_or_else(|| ROOT.to_owned(), |root| root.0.clone()),
        ports: sites
            .stated(host, |settings| &settings.ports)
            .into_iter()
            .flat_map(|ports| ports.good())
            .map(|(process, port)| (process.value.clone(), port.0))
            .collect(),
        manager: sites
            .stated(host, |settings| &settings.manager)
            .or(environment.manager.value())
            .copied()
            .unwrap_or(ManagerKind::Auto),
        become_root: sites
            .stated(host, |settings| &settings.become_root)
            .or(environment.become_root.value())
            .copied()
            .unwrap_or(BecomeRoot::Auto),
        identity: HostIdentity {
            hostname: sites.stated(host, |settings| &settings.hostname).map(|name| name.0.clone()),
            os: sites.stated(host, |settings| &settings.os).map(|os| os.0.clone()),
        },
    }
}

fn build_balancer(file: &FleetFile, balancer: &language::Balancer, sites: &Sites<'_>) -> Option<Balancer> {
    let service = service_behind(file, balancer, sites)?.clone();
    let kind = match (balancer.haproxy.value(), balancer.router.value()) {
        (Some(HaproxyPlace::Socket(place)), _) => {
            BalancerKind::HaproxySocket { host: place.host.clone(), path: place.path.clone() }
        }
        (Some(HaproxyPlace::Tcp(address)), _) => BalancerKind::HaproxyTcp { address: address.clone() },
        (None, place) => {
            let place = place?;
            BalancerKind::Router { host: place.host.clone(), path: place.path.clone() }
        }
    };
    Some(Balancer {
        kind,
        backend: balancer.backend.value().map_or_else(|| service.to_string(), |backend| backend.0.clone()),
        servers: balancer
            .servers
            .good()
            .map(|(host, server)| (host.value.clone(), server.0.clone()))
            .collect(),
        service,
    })
}

fn build_strategy(
    strategy: Option<&language::Strategy>,
    environment: &language::Environment,
) -> Option<Strategy> {
    let one_by_one = || vec![BatchSize::Count(1)];
    let Some(strategy) = strategy else { return Some(Strategy::Rolling { batch: one_by_one() }) };
    let batch = || match strategy.batch.value() {
        Some(batch) => batch.0.items.iter().map(|size| batch_size(size)).collect(),
        None => one_by_one(),
    };
    Some(match strategy.kind.value()? {
        StrategyKind::BlueGreen => Strategy::BlueGreen,
        StrategyKind::Halves => {
            Strategy::Halves { keep_for: strategy.keep_for.value().copied().unwrap_or(KEEP_HALF_FOR) }
        }
        StrategyKind::Rolling => Strategy::Rolling { batch: batch() },
        StrategyKind::Canary => {
            let has_latencies = balancers(environment).all(|balancer| balancer.haproxy.is_absent());
            Strategy::Canary(canary::build(environment.canary.value(), batch(), has_latencies)?)
        }
    })
}

fn batch_size(amount: &Amount) -> BatchSize {
    match *amount {
        Amount::Count(count) => BatchSize::Count(count),
        Amount::Share(share) => BatchSize::Share(share),
    }
}

fn timeouts(stated: &language::Timeouts) -> Timeouts {
    let usual = Timeouts::default();
    Timeouts {
        connect: limit(&stated.connect, usual.connect),
        claim: stated.claim.value().map_or(usual.claim, |lease| lease.0),
        stage: limit(&stated.stage, usual.stage),
        activate: limit(&stated.activate, usual.activate),
        confirm: limit(&stated.confirm, usual.confirm),
        drain: stated.drain.value().copied().unwrap_or(usual.drain),
        admit: limit(&stated.admit, usual.admit),
    }
}

fn limit(stated: &Key<Limit>, usual: Duration) -> Duration {
    stated.value().map_or(usual, |limit| limit.0)
}

pub(crate) fn list<T, U>(stated: &Key<List<T>>, convert: impl Fn(&T) -> U) -> Vec<U> {
    stated.items().map(|item| convert(&item.value)).collect()
}

fn variables(stated: &Key<Map<VariableName, String>>) -> BTreeMap<VariableName, String> {
    let entries = stated.good();
    entries.map(|(name, value)| (name.value.clone(), value.value.clone())).collect()
}
