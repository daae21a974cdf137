//! Which hosts an environment has: ranges expanded, settings of single hosts put together.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use greenlight_model::id::{HostName, ServiceName};

use crate::language::{Balancer, Environment, Host};
use crate::problem::{Problems, suggest};
use crate::range::HOSTS_MAX;
use crate::read::{At, Key};
use crate::text::HaproxyPlace;

/// The hosts of an environment.
#[derive(Debug)]
pub(crate) struct Sites<'a> {
    /// The hosts of each service, in order, each once, with the place where the host is named.
    pub(crate) services: BTreeMap<&'a ServiceName, Vec<(&'a HostName, &'a Range<usize>)>>,
    /// Hosts on which a balancer's socket is.
    pub(crate) balancer_hosts: BTreeSet<&'a HostName>,
    /// Settings that concern a host, in the order of the file.
    pub(crate) settings: BTreeMap<&'a HostName, Vec<&'a At<Host>>>,
    /// Whether every host could be read. When not, an unknown host may be one of those.
    pub(crate) complete: bool,
}

impl Sites<'_> {
    /// Hosts that run a service.
    pub(crate) fn service_hosts(&self) -> BTreeSet<&HostName> {
        self.services.values().flatten().map(|(host, _)| *host).collect()
    }

    /// What is stated for a host under one key, when anything is.
    pub(crate) fn stated<'s, T>(
        &'s self,
        host: &HostName,
        key: impl Fn(&'s Host) -> &'s Key<T>,
    ) -> Option<&'s T> {
        self.settings.get(host)?.iter().find_map(|settings| key(settings).value())
    }
}

/// Puts the hosts of an environment together, without noting anything.
pub(crate) fn sites(environment: &Environment) -> Sites<'_> {
    let mut sites = Sites {
        services: BTreeMap::new(),
        balancer_hosts: balancers(environment).filter_map(|balancer| balancer_host(balancer)).collect(),
        settings: BTreeMap::new(),
        complete: !environment.hosts.is_bad()
            && !environment.balancer.is_bad()
            && balancers(environment).all(|balancer| !balancer.haproxy.is_bad() && !balancer.router.is_bad()),
    };
    if let Some(hosts) = environment.hosts.value() {
        sites.complete &= hosts.complete;
        for (service, patterns) in &hosts.entries {
            let Some(patterns) = patterns.value() else {
                sites.complete = false;
                continue;
            };
            sites.complete &= patterns.complete;
            let mut seen = BTreeSet::new();
            let list = sites.services.entry(&service.value).or_default();
            for pattern in &patterns.items {
                list.extend(
                    pattern.0.iter().filter(|host| seen.insert(*host)).map(|host| (host, &pattern.span)),
                );
            }
        }
    }
    for (pattern, settings) in environment.host.good() {
        for host in &pattern.0 {
            sites.settings.entry(host).or_default().push(settings);
        }
    }
    sites
}

pub(crate) fn balancers(environment: &Environment) -> impl Iterator<Item = &At<Balancer>> {
    environment.balancer.value().into_iter().flat_map(|balancers| &balancers.0.items)
}

fn balancer_host(balancer: &Balancer) -> Option<&HostName> {
    match (balancer.haproxy.value(), balancer.router.value()) {
        (Some(HaproxyPlace::Socket(place)), _) | (_, Some(place)) => Some(&place.host),
        _ => None,
    }
}

/// Notes hosts that are named twice, lists without hosts and settings of hosts that are not there.
pub(super) fn check(environment: &At<Environment>, sites: &Sites<'_>, problems: &mut Problems) {
    let Some(hosts) = environment.hosts.get() else { return };
    if hosts.entries.is_empty() && hosts.complete {
        let help = "name the hosts of a service: `hosts.web = [\"web1\"]`".to_owned();
        problems.error("no-hosts", &hosts.span, "this environment has no hosts", help);
    }
    for (service, patterns) in hosts.good() {
        if patterns.items.is_empty() && patterns.complete {
            problems.error(
                "no-hosts",
                &patterns.span,
                format!("`{}` has no hosts here", **service),
                "name one, or leave the line out".to_owned(),
            );
        }
        let mut seen = BTreeSet::new();
        for pattern in &patterns.items {
            if let Some(twice) = pattern.0.iter().filter(|host| !seen.insert(*host)).min() {
                problems.error(
                    "host-twice",
                    &pattern.span,
                    format!("`{twice}` is named twice among the hosts of `{}`", **service),
                    "let the ranges not overlap".to_owned(),
                );
            }
        }
    }
    let service_hosts = sites.service_hosts();
    if service_hosts.len() > HOSTS_MAX {
        let message = format!("this environment has {} hosts; {HOSTS_MAX} is the most", service_hosts.len());
        problems.error("too-many-hosts", &hosts.span, message, None);
    }
    check_settings(environment, sites, &service_hosts, problems);
    for pattern in environment.standby.items() {
        unknown(&pattern.0, &pattern.span, "runs no service here", sites, &service_hosts, problems);
    }
}

fn check_settings(
    environment: &Environment,
    sites: &Sites<'_>,
    service_hosts: &BTreeSet<&HostName>,
    problems: &mut Problems,
) {
    let all: BTreeSet<&HostName> = service_hosts.union(&sites.balancer_hosts).copied().collect();
    for (pattern, settings) in environment.host.good() {
        unknown(&pattern.0, &pattern.span, "runs no service and no balancer here", sites, &all, problems);
        if settings.link.value() == Some(&crate::text::Link::Local) {
            let user = settings.user.get().map(|user| ("user", &user.span));
            let destination =
                settings.destination.get().map(|destination| ("destination", &destination.span));
            for (key, span) in user.into_iter().chain(destination) {
                problems.error(
                    "local-and-ssh",
                    span,
                    format!("`{key}` is for ssh, and this host is reached as `local`"),
                    format!("leave `{key}` out"),
                );
            }
        }
    }
    for settings in sites.settings.values().filter(|settings| settings.len() > 1) {
        for (at, later) in settings.iter().enumerate() {
            for earlier in &settings[..at] {
                stated_twice(earlier, later, problems);
            }
        }
    }
}

/// Notes keys that two entries for one host both state: which of them holds would be a guess.
fn stated_twice(earlier: &Host, later: &Host, problems: &mut Problems) {
    fn both<'a, T>(
        name: &'static str,
        one: &Key<T>,
        other: &'a Key<T>,
    ) -> Option<(&'static str, &'a Range<usize>)> {
        one.get().and(other.get()).map(|at| (name, &at.span))
    }
    let twice = [
        both("address", &earlier.address, &later.address),
        both("user", &earlier.user, &later.user),
        both("destination", &earlier.destination, &later.destination),
        both("link", &earlier.link, &later.link),
        both("root", &earlier.root, &later.root),
        both("ports", &earlier.ports, &later.ports),
        both("manager", &earlier.manager, &later.manager),
        both("become_root", &earlier.become_root, &later.become_root),
        both("hostname", &earlier.hostname, &later.hostname),
        both("os", &earlier.os, &later.os),
    ];
    for (key, span) in twice.into_iter().flatten() {
        problems.error(
            "host-set-twice",
            span,
            format!("`{key}` is already stated for a host of this range"),
            "state it once per host: let the ranges not overlap".to_owned(),
        );
    }
}

fn unknown(
    named: &[HostName],
    span: &Range<usize>,
    lack: &str,
    sites: &Sites<'_>,
    known: &BTreeSet<&HostName>,
    problems: &mut Problems,
) {
    if !sites.complete {
        return;
    }
    if let Some(host) = named.iter().find(|host| !known.contains(host)) {
        let names = known.iter().map(|host| host.as_str());
        let help = suggest(host.as_str(), "the hosts are", names);
        problems.error("unknown-host", span, format!("`{host}` {lack}"), help);
    }
}
