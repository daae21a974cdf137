//! Balancers: each stands before one service of the environment that has a port.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::id::{HostName, ServiceName};

use super::hosts::{Sites, balancers};
use crate::language::{Balancer, Environment, FleetFile, Service};
use crate::problem::{Problems, suggest};
use crate::read::{At, Key};

/// The service behind a balancer: the one it names, or the only one of the environment that has a port.
pub(crate) fn service_behind<'a>(
    file: &'a FleetFile,
    balancer: &'a Balancer,
    sites: &Sites<'a>,
) -> Option<&'a ServiceName> {
    match &balancer.service {
        Key::Is(service) => Some(&service.value),
        Key::Bad => None,
        Key::Absent => match with_port(file, sites)[..] {
            [service] => Some(service),
            _ => None,
        },
    }
}

/// Services of the environment in which a process has a port. One that could not be read wholly counts.
fn with_port<'a>(file: &'a FleetFile, sites: &Sites<'a>) -> Vec<&'a ServiceName> {
    sites.services.keys().copied().filter(|name| service(file, name).is_none_or(has_port)).collect()
}

fn service<'a>(file: &'a FleetFile, name: &ServiceName) -> Option<&'a Service> {
    let (_, service) = file.service.value()?.good().find(|(own, _)| own.value == *name)?;
    Some(&service.value)
}

fn has_port(service: &Service) -> bool {
    match &service.process {
        Key::Absent => false,
        Key::Bad => true,
        Key::Is(processes) => processes.entries.iter().any(|(_, process)| {
            process.is_bad() || process.value().is_some_and(|process| !process.port.is_absent())
        }),
    }
}

pub(super) fn check(file: &FleetFile, environment: &Environment, sites: &Sites<'_>, problems: &mut Problems) {
    let mut seen = BTreeMap::new();
    for balancer in balancers(environment) {
        check_place(balancer, problems);
        let Some(behind) = check_service(file, balancer, sites, problems) else { continue };
        check_servers(balancer, behind, sites, problems);
        let place = format!("{:?} {:?}", balancer.haproxy.value(), balancer.router.value());
        let backend = balancer.backend.value().map_or(behind.as_str(), |backend| &backend.0);
        if seen.insert((place, backend.to_owned()), ()).is_some() {
            problems.error(
                "balancer-twice",
                &balancer.span,
                format!("the backend `{backend}` of this balancer is stated twice"),
                "leave one of the two out".to_owned(),
            );
        }
    }
}

fn check_place(balancer: &At<Balancer>, problems: &mut Problems) {
    match (balancer.haproxy.is_absent(), balancer.router.is_absent()) {
        (true, true) => problems.error(
            "balancer-without-place",
            &balancer.span,
            "this balancer is neither `haproxy` nor `router`",
            "state one: `haproxy = \"HOST:/run/haproxy/admin.sock\"` or `router = \"HOST:/path/router.sock\"`".to_owned(),
        ),
        (false, false) => problems.error(
            "balancer-with-two-places",
            &balancer.span,
            "this balancer is both `haproxy` and `router`",
            "write two: `balancer = [{ haproxy = … }, { router = … }]`".to_owned(),
        ),
        _ => {}
    }
}

fn check_service<'a>(
    file: &'a FleetFile,
    balancer: &'a At<Balancer>,
    sites: &Sites<'a>,
    problems: &mut Problems,
) -> Option<&'a ServiceName> {
    let names = || sites.services.keys().map(|name| name.as_str());
    let Some(stated) = balancer.service.get() else {
        let behind = service_behind(file, balancer, sites);
        // Which service is meant is guesswork while a list of hosts or a service is unreadable.
        let is_known = sites.complete && file.service.value().is_some_and(|services| services.complete);
        if behind.is_none() && balancer.service.is_absent() && is_known {
            let candidates: Vec<_> = with_port(file, sites).iter().map(|name| format!("`{name}`")).collect();
            let (message, help) = if candidates.is_empty() {
                (
                    "no service of this environment has a port to send requests to",
                    "state the `port` of a process".into(),
                )
            } else {
                (
                    "it is not clear which service is behind this balancer",
                    format!("state `service`: {}", candidates.join(" or ")),
                )
            };
            problems.error("balancer-without-service", &balancer.span, message, help);
        }
        return behind;
    };
    if !sites.services.contains_key(&stated.value) {
        if sites.complete {
            problems.error(
                "unknown-service",
                &stated.span,
                format!("the service `{}` has no hosts in this environment", **stated),
                suggest(stated.as_str(), "its services are", names()),
            );
        }
        return None;
    }
    if service(file, stated).is_some_and(|service| !has_port(service)) {
        problems.error(
            "balancer-without-port",
            &stated.span,
            format!("no process of `{}` has a port to send requests to", **stated),
            "state the `port` of a process".to_owned(),
        );
    }
    Some(&stated.value)
}

/// Each host is a server of its own, under the name that is stated or its own.
fn check_servers(balancer: &Balancer, behind: &ServiceName, sites: &Sites<'_>, problems: &mut Problems) {
    let (Some(hosts), Some(servers)) = (sites.services.get(behind), balancer.servers.value()) else { return };
    let hosts: BTreeSet<&HostName> = hosts.iter().map(|(host, _)| *host).collect();
    let renamed: BTreeSet<&HostName> = servers.entries.iter().map(|(host, _)| &host.value).collect();
    let mut taken: BTreeMap<&str, &HostName> =
        hosts.difference(&renamed).map(|host| (host.as_str(), *host)).collect();
    for (host, server) in &servers.entries {
        if sites.complete && !hosts.contains(&host.value) {
            problems.error(
                "unknown-host",
                &host.span,
                format!("`{}` does not run `{behind}` here", **host),
                suggest(host.as_str(), "its hosts are", hosts.iter().map(|host| host.as_str())),
            );
        }
        let Some(server) = server.get() else { continue };
        if let Some(other) = taken.insert(&server.0, host) {
            problems.error(
                "server-twice",
                &server.span,
                format!("`{other}` and `{}` have the same server, `{}`", **host, server.0),
                "each host is a server of its own".to_owned(),
            );
        }
    }
}
