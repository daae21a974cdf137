//! Ports: what listens on a host, listens on a port of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use greenlight_model::id::{HostName, ProcessName, ServiceName};

use super::hosts::Sites;
use crate::language::{FleetFile, Host, Process, Service};
use crate::problem::{Problems, suggest};
use crate::read::At;

/// Pairs of places that have been noted: the same two lines clash on every host that runs both.
type Noted = BTreeSet<(usize, usize)>;

/// Something that listens.
#[derive(Clone)]
struct Listener<'a> {
    port: u16,
    span: &'a Range<usize>,
    title: String,
}

/// Processes of one service against each other.
pub(super) fn check_service(name: &ServiceName, service: &Service, problems: &mut Problems) {
    let listeners: Vec<_> = listeners(name, service, |_| None);
    clashes(&listeners, None, &mut Noted::new(), problems);
}

/// Everything that runs on each host of an environment.
pub(super) fn check_environment(file: &FleetFile, sites: &Sites<'_>, problems: &mut Problems) {
    let services: BTreeMap<&ServiceName, &At<Service>> =
        file.service.good().map(|(name, service)| (&name.value, service)).collect();
    let mut on_host: BTreeMap<&HostName, Vec<(&ServiceName, &Service)>> = BTreeMap::new();
    for (name, hosts) in &sites.services {
        let Some(service) = services.get(*name) else { continue };
        for (host, _) in hosts {
            on_host.entry(host).or_default().push((name, &service.value));
        }
    }
    let mut noted = Noted::new();
    // Clashes inside one service are noted with the service, once and not per environment.
    for (name, service) in &services {
        clashes(&listeners(name, service, |_| None), None, &mut noted, &mut Problems::default());
    }
    for (host, services) in &on_host {
        let settings = sites.settings.get(*host).map_or(&[][..], Vec::as_slice);
        let listeners: Vec<_> = services
            .iter()
            .flat_map(|(name, service)| listeners(name, service, |process| override_of(settings, process)))
            .collect();
        clashes(&listeners, Some(host), &mut noted, problems);
        check_overrides(host, settings, services, &mut noted, problems);
    }
}

fn listeners<'a>(
    name: &ServiceName,
    service: &'a Service,
    override_of: impl Fn(&ProcessName) -> Option<(u16, &'a Range<usize>)>,
) -> Vec<Listener<'a>> {
    let mut found = Vec::new();
    for (process_name, process) in service.process.good() {
        if let Some(port) = process.port.get() {
            let (port, span) = override_of(process_name).unwrap_or((port.0, &port.span));
            found.push(Listener { port, span, title: format!("`{name}/{}`", **process_name) });
        }
        if let Some(port) = smoke_port(process) {
            let title = format!("the smoke start of `{name}/{}`", **process_name);
            found.push(Listener { port: port.0, span: &port.span, title });
        }
    }
    found
}

fn smoke_port(process: &Process) -> Option<&At<crate::language::Port>> {
    process.smoke.value()?.port.get()
}

fn override_of<'a>(settings: &[&'a At<Host>], process: &ProcessName) -> Option<(u16, &'a Range<usize>)> {
    settings.iter().find_map(|settings| {
        let (_, port) = settings.ports.value()?.good().find(|(name, _)| name.value == *process)?;
        Some((port.0, &port.span))
    })
}

fn clashes(listeners: &[Listener<'_>], host: Option<&HostName>, noted: &mut Noted, problems: &mut Problems) {
    let mut by_port: BTreeMap<u16, &Listener<'_>> = BTreeMap::new();
    for listener in listeners {
        let Some(first) = by_port.get(&listener.port) else {
            by_port.insert(listener.port, listener);
            continue;
        };
        let (one, other) =
            if first.span.start <= listener.span.start { (*first, listener) } else { (listener, *first) };
        if noted.insert((one.span.start, other.span.start)) {
            let place = host.map_or_else(String::new, |host| format!(" on host `{host}`"));
            problems.error(
                "port-used-twice",
                other.span,
                format!("port {} is used twice{place}: by {} and {}", other.port, one.title, other.title),
                "give each a port of its own".to_owned(),
            );
        }
    }
}

/// Notes ports stated for a process that does not listen on the host.
fn check_overrides(
    host: &HostName,
    settings: &[&At<Host>],
    services: &[(&ServiceName, &Service)],
    noted: &mut Noted,
    problems: &mut Problems,
) {
    let processes: Vec<(&ProcessName, &Process)> = services
        .iter()
        .flat_map(|(_, service)| service.process.value())
        .flat_map(|processes| processes.good())
        .map(|(name, process)| (&name.value, &process.value))
        .collect();
    let is_complete = services.iter().all(|(_, service)| {
        let is_readable = |process: &crate::read::Key<Process>| !process.is_bad();
        !service.process.is_bad()
            && service
                .process
                .value()
                .is_none_or(|all| all.complete && all.entries.iter().all(|(_, process)| is_readable(process)))
    });
    for ports in settings.iter().filter_map(|settings| settings.ports.value()) {
        for (name, _) in &ports.entries {
            let mut own = processes.iter().filter(|(own, _)| **own == name.value).peekable();
            let message = if own.peek().is_none() {
                format!("no process `{}` runs on `{host}`", **name)
            } else if own.all(|(_, process)| process.port.is_absent()) {
                format!("the process `{}` has no port that could differ on `{host}`", **name)
            } else {
                continue;
            };
            if is_complete && noted.insert((name.span.start, name.span.start)) {
                let names = processes.iter().filter(|(_, process)| !process.port.is_absent());
                let help =
                    suggest(name.as_str(), "processes with a port", names.map(|(name, _)| name.as_str()));
                problems.error("unknown-process", &name.span, message, help);
            }
        }
    }
}
