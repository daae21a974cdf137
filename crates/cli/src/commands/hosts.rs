//! `hosts`: each host of an environment: whether it answers, what it is, how processes run there.

use std::collections::BTreeMap;

use greenlight_model::fleet::{Environment, LinkKind};
use greenlight_model::id::HostName;
use greenlight_model::world::Observation;
use owo_colors::OwoColorize;
use serde_json::{Value, json};

use crate::args::{Global, Hosts};
use crate::describe::{self, table};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{Project, runtime};

pub(crate) fn run(global: &Global, hosts: &Hosts, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let log = project.log()?;
    let runtime = runtime()?;
    let mut documents = Vec::new();
    let mut all_answer = true;
    for environment in project.environments(hosts.environment.as_ref())? {
        let (_, gathered) = runtime.block_on(project.gather(environment, &log))?;
        printer.result(environment.name.to_string().bold().to_string());
        let rows: Vec<Vec<String>> =
            gathered.inventory.iter().map(|(host, seen)| row(environment, host, seen)).collect();
        for (row, (host, seen)) in table(&rows).iter().zip(&gathered.inventory) {
            printer.result(row);
            // Below its row: a reason is a sentence, and would push every other column away.
            if let Some(unreachable) = &seen.unreachable {
                printer.result(format!("    {}", describe::silence(host, &unreachable.why)));
            }
        }
        all_answer &= gathered.inventory.values().all(|seen| seen.unreachable.is_none());
        documents.push(document(environment, &gathered.inventory));
    }
    printer.json("hosts", json!({ "environments": documents }));
    Ok(if all_answer { Exit::Done } else { Exit::Failed })
}

fn row(environment: &Environment, host: &HostName, seen: &Observation) -> Vec<String> {
    let services: Vec<&str> = environment
        .hosts
        .iter()
        .filter(|(_, hosts)| hosts.contains(host))
        .map(|(service, _)| service.as_str())
        .collect();
    let name = format!("  {host}");
    match (&seen.unreachable, &seen.report) {
        (Some(_), _) => vec![name, services.join(","), "does not answer".red().to_string()],
        (None, Some((_, report))) => {
            let facts = &report.facts;
            let managers: Vec<String> = facts.managers.iter().map(manager).collect();
            let user = match login(environment, host) {
                Some(login) if facts.is_root && login != "root" => format!("root by sudo from {login}"),
                _ => facts.user.clone(),
            };
            let machine = format!("{} {}", facts.os, facts.architecture);
            vec![name, services.join(","), machine, format!("as {user}"), managers.join(", ")]
        }
        (None, None) => vec![name, services.join(","), "no report".to_owned()],
    }
}

/// The account that ssh logs in to, where the fleet file states it.
fn login<'a>(environment: &'a Environment, host: &HostName) -> Option<&'a str> {
    match &environment.host_settings.get(host)?.link {
        LinkKind::Ssh { user: Some(user), .. } => Some(user.as_str()),
        LinkKind::Ssh { user: None, .. } | LinkKind::Local => None,
    }
}

fn manager(kind: &greenlight_model::fleet::ManagerKind) -> String {
    // The names are those of the fleet file, which serialisation knows.
    serde_json::to_value(kind).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

fn document(environment: &Environment, inventory: &BTreeMap<HostName, Observation>) -> Value {
    let hosts: BTreeMap<&HostName, Value> = inventory
        .iter()
        .map(|(host, seen)| {
            let facts = seen.report.as_ref().map(|(_, report)| &report.facts);
            (host, json!({ "facts": facts, "unreachable": seen.unreachable }))
        })
        .collect();
    json!({ "environment": environment.name, "hosts": hosts })
}
