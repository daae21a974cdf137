//! Whether every instance of an environment still is what was released: hosts, and the balancers in front of them.

use std::sync::Arc;

use greenlight_link::message::{Reply, Request};
use greenlight_model::check::{Check, CheckOutcome};
use greenlight_model::fleet::Environment;
use greenlight_model::history::History;
use greenlight_model::host::ReleaseMark;
use greenlight_model::id::{Instance, ReleaseId};
use greenlight_model::manifest::Release;
use greenlight_model::traffic::{Admission, BalancerReport, ServerHealth};
use tokio::task::JoinSet;

use crate::gather::Gatherer;
use crate::hosts::HostError;
use crate::perform::{host_failed, unexpected};
use crate::preflight::{Looked, answers};
use crate::spec::mark;

/// Compares every instance of the environment with what the records say it runs, all at once, and every balancer with its own
/// configuration. Changes nothing.
pub async fn compare(
    gatherer: &Arc<Gatherer>,
    environment: &Environment,
    history: &History,
    releases: &[Release],
    traffic: &[BalancerReport],
) -> Vec<Looked> {
    let mut looks = JoinSet::new();
    for instance in environment.instances() {
        let expected = expected(environment, history, &instance);
        let known: Option<&Release> =
            expected.and_then(|id| releases.iter().find(|release| release.id == id));
        let marked = known.map(mark);
        let gatherer = Arc::clone(gatherer);
        let timeout = environment.timeouts.activate;
        looks.spawn(async move {
            let looked = look(&gatherer, &instance, expected, marked, timeout).await;
            let answers = answers(looked.as_ref().map(|_| ()).map_err(|error| error.why.as_str()));
            let checks: Vec<Check> = std::iter::once(answers).chain(looked.unwrap_or_default()).collect();
            Looked { instance, checks }
        });
    }
    let mut all = looks.join_all().await;
    for Looked { instance, checks } in &mut all {
        let runs = expected(environment, history, instance).is_some();
        let balancers = environment.balancers.iter().zip(traffic);
        let own = balancers.filter(|(balancer, _)| runs && balancer.service == instance.service);
        checks.extend(own.map(|(balancer, report)| in_traffic(&balancer.title(), instance, report)));
    }
    let order: Vec<Instance> = environment.instances().collect();
    all.sort_by_key(|looked| order.iter().position(|instance| *instance == looked.instance));
    all
}

async fn look(
    gatherer: &Gatherer,
    instance: &Instance,
    expected: Option<ReleaseId>,
    release: Option<ReleaseMark>,
    timeout: std::time::Duration,
) -> Result<Vec<Check>, HostError> {
    if let (Some(id), None) = (expected, &release) {
        return Err(host_failed(format!("release {} is not in this project's depot", id.short())));
    }
    let gone = || host_failed(format!("{instance} is not in the fleet file any more"));
    let spec = gatherer.spec(instance, expected).ok_or_else(gone)?;
    let requires = gatherer.service(&instance.service, expected).ok_or_else(gone)?.requires.clone();
    let request = Request::Compare { spec, release, requires: Box::new(requires) };
    match gatherer.hosts().call(&instance.host, request, timeout, |_| {}).await? {
        Reply::Checked { checks, .. } => Ok(checks),
        other => Err(unexpected(&instance.host, &other)),
    }
}

/// What the last rollout that knew the instance left there.
fn expected(environment: &Environment, history: &History, instance: &Instance) -> Option<ReleaseId> {
    let mut rollouts = history.of_environment(&environment.name);
    rollouts.find_map(|rollout| history.running.get(&rollout.plan.id)?.get(instance).copied()).flatten()
}

/// Whether a balancer gives the instance what its configuration says.
fn in_traffic(title: &str, instance: &Instance, report: &BalancerReport) -> Check {
    let server = match report {
        BalancerReport::Unreachable { why } => Err(why.clone()),
        BalancerReport::Servers(servers) => {
            servers.get(&instance.host).copied().ok_or_else(|| "it has no such server".to_owned())
        }
    };
    let (expected, found) = match server {
        Err(why) => ("in traffic".to_owned(), Err(why)),
        Ok(server) => {
            let expected = format!("in traffic, weight {}", server.normal_weight);
            let state = match (server.admission, server.health) {
                (Admission::Drain, _) => "drained".to_owned(),
                (Admission::Maintenance, _) => "in maintenance".to_owned(),
                (Admission::Ready, ServerHealth::Up) => "in traffic".to_owned(),
                (Admission::Ready, _) => "not up".to_owned(),
            };
            let is_well = state == "in traffic" && server.weight == server.normal_weight;
            let found = format!("{state}, weight {}", server.weight);
            (expected, if is_well { Ok(found) } else { Err(found) })
        }
    };
    let outcome = if found.is_ok() { CheckOutcome::Passed } else { CheckOutcome::Failed };
    let mend = match &found {
        Ok(_) => String::new(),
        Err(_) => "set the server's state and weight back there, or find out who changed them".to_owned(),
    };
    let (Ok(found) | Err(found)) = found;
    Check { name: format!("balancer {title}"), outcome, expected, found, mend, version: None }
}
