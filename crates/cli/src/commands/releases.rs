//! `releases`: what was built and where it runs; marking one bad or good.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_controller::clock;
use greenlight_depot::Depot;
use greenlight_model::history::History;
use greenlight_model::id::{EnvironmentName, ReleaseId, ServiceName};
use greenlight_model::manifest::Release;
use greenlight_model::record::RecordBody;
use serde_json::json;

use crate::args::{Global, Releases, ReleasesAction};
use crate::commands::operate::append;
use crate::describe::{ago, table};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

pub(crate) fn run(global: &Global, releases: &Releases, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    match &releases.action {
        None => list(&project, releases.service.as_ref(), printer),
        Some(ReleasesAction::Mark { release, bad, .. }) => mark(&project, release, bad.as_deref(), printer),
        Some(ReleasesAction::Prune { keep }) => prune(&project, *keep, printer),
    }
}

fn list(project: &Project, only: Option<&ServiceName>, printer: &Printer) -> Result<Exit, Failure> {
    let depot = project.depot()?;
    let log = project.log()?;
    let history = log.history();
    let releases: Vec<Release> = depot
        .releases()
        .map_err(|error| Failure::from_error(Exit::Failed, &error))?
        .into_iter()
        .filter(|release| only.is_none_or(|only| release.service == *only))
        .collect();
    let runs = runs(project, history);
    let now = clock::now();
    let mut rows =
        vec![["SERVICE", "LABEL", "ID", "COMMIT", "BUILT", "RUNS IN", ""].map(str::to_owned).to_vec()];
    for release in &releases {
        let bad = history.bad.get(&release.id).map(|why| format!("bad: {why}")).unwrap_or_default();
        rows.push(vec![
            release.service.to_string(),
            release.label.clone(),
            release.id.short(),
            release.commit.chars().take(10).collect(),
            ago(release.built_at, now),
            runs_in(&runs, release.id).join(", "),
            bad,
        ]);
    }
    if releases.is_empty() {
        printer.progress("no releases yet; `greenlight build SERVICE` makes one");
    } else {
        table(&rows).iter().for_each(|row| printer.result(row));
    }
    let body: Vec<_> = releases
        .iter()
        .map(|release| {
            json!({
                "release": release,
                "runs_in": runs_in(&runs, release.id),
                "bad": history.bad.get(&release.id),
            })
        })
        .collect();
    printer.json("releases", json!({ "releases": body }));
    Ok(Exit::Done)
}

/// What each environment runs by the records; `status` asks the hosts.
fn runs(project: &Project, history: &History) -> BTreeMap<(EnvironmentName, ServiceName), ReleaseId> {
    let mut runs = BTreeMap::new();
    for (name, environment) in &project.fleet.environments {
        for service in environment.hosts.keys() {
            if let Some(release) = history.current(name, service) {
                runs.insert((name.clone(), service.clone()), release);
            }
        }
    }
    runs
}

fn runs_in(runs: &BTreeMap<(EnvironmentName, ServiceName), ReleaseId>, release: ReleaseId) -> Vec<String> {
    runs.iter()
        .filter(|(_, id)| **id == release)
        .map(|((environment, _), _)| environment.to_string())
        .collect()
}

fn mark(project: &Project, text: &str, bad: Option<&str>, printer: &Printer) -> Result<Exit, Failure> {
    let depot = project.depot()?;
    let mut log = project.log()?;
    let services: Vec<&ServiceName> = project.fleet.services.keys().collect();
    let release = find(&depot, &services, text)?;
    let body = RecordBody::ReleaseMarked { release: release.id, bad: bad.map(str::to_owned) };
    append(project, &mut log, &body)?;
    let word = if bad.is_some() { "bad; it is refused from now on" } else { "good" };
    printer.result(format!("{} {} is marked {word}", release.service, release.title()));
    printer.json("releases mark", json!({ "release": release.id, "bad": bad }));
    Ok(Exit::Done)
}

fn prune(project: &Project, newest: usize, printer: &Printer) -> Result<Exit, Failure> {
    let depot = project.depot()?;
    let log = project.log()?;
    let releases = depot.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let keep = kept(log.history(), &releases, newest);
    let removed = depot.prune(&keep).map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    for release in releases.iter().filter(|release| removed.contains(&release.id)) {
        printer.result(format!("removed {} {}", release.service, release.title()));
    }
    printer.result(format!("{} removed, {} stay", removed.len(), releases.len() - removed.len()));
    printer.json("releases prune", json!({ "removed": removed }));
    Ok(Exit::Done)
}

/// The newest of each service, and whatever any environment runs, was healthy with, or is on its way to or from.
fn kept(history: &History, releases: &[Release], newest: usize) -> BTreeSet<ReleaseId> {
    let mut seen: BTreeMap<&ServiceName, usize> = BTreeMap::new();
    let mut keep: BTreeSet<ReleaseId> = releases
        .iter()
        .filter(|release| {
            let count = seen.entry(&release.service).or_default();
            *count += 1;
            *count <= newest
        })
        .map(|release| release.id)
        .collect();
    for rollout in history.rollouts.values().filter(|rollout| rollout.outcome.is_none()) {
        keep.extend(rollout.plan.targets.values().copied());
        keep.extend(rollout.plan.baseline.values().flatten().copied());
    }
    let places: BTreeSet<(&EnvironmentName, &ServiceName)> = history
        .rollouts
        .values()
        .flat_map(|rollout| rollout.plan.targets.keys().map(|service| (&rollout.plan.environment, service)))
        .collect();
    for (environment, service) in places {
        let present = history.current(environment, service);
        keep.extend(present);
        keep.extend(history.way_back(environment, service, present));
    }
    let environments: BTreeSet<&EnvironmentName> =
        history.rollouts.values().map(|rollout| &rollout.plan.environment).collect();
    for environment in environments {
        let last =
            history.of_environment(environment).find_map(|rollout| history.running.get(&rollout.plan.id));
        keep.extend(last.into_iter().flat_map(|running| running.values().flatten().copied()));
    }
    keep
}

/// The release that `RELEASE` or `SERVICE=RELEASE` names, among these services.
pub(crate) fn find(depot: &Depot, services: &[&ServiceName], text: &str) -> Result<Release, Failure> {
    let (service, name) = match (text.split_once('='), services) {
        (Some((service, name)), _) => {
            let known = services.iter().find(|known| known.as_str() == service).ok_or_else(|| {
                let known: Vec<&str> = services.iter().map(|service| service.as_str()).collect();
                Failure::usage(format!("`{service}` is not a service that can be meant here"))
                    .help(format!("there is {}", known.join(", ")))
            })?;
            (*known, name)
        }
        // With one service there is nothing to choose.
        (None, [only]) => (*only, text),
        (None, several) => {
            let known: Vec<String> = several.iter().map(|service| format!("{service}={text}")).collect();
            return Err(Failure::usage(format!("whose release is `{text}`?"))
                .help(format!("say {}", known.join(" or "))));
        }
    };
    depot.find(service, name).map_err(|error| {
        Failure::from_error(Exit::Usage, &error).help(format!(
            "`greenlight releases {service}` lists what was built; `greenlight build {service} --commit REVISION` makes one"
        ))
    })
}
