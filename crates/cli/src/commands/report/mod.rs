//! `report`: the deployment report of one rollout, written from the records, as Markdown, HTML or JSON.
//!
//! Nothing in it is kept apart from the records: the same records give the same report. Patches come from git, and a canary's
//! counts, which are named and not shown, lie in a file of their own.

mod compose;
mod html;
mod markdown;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use greenlight_depot::{Depot, commits_between};
use greenlight_model::id::{Instance, ReleaseId, RolloutId, ServiceName};
use greenlight_model::journal::Impact;
use greenlight_model::manifest::Release;
use greenlight_model::rollout::Rollout;
use serde::Serialize;
use serde_json::json;

use crate::args::{Global, Report as Arguments, ReportFormat};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

/// A report as data.
#[derive(Debug, Serialize)]
struct Report {
    rollout: RolloutId,
    title: String,
    started_by: String,
    started_at: String,
    outcome: String,
    took: Option<String>,
    /// From the first switch to the turn back, when it turned back.
    time_to_detect: Option<String>,
    /// From the turn back to the end.
    time_to_repair: Option<String>,
    deployment_issues: Vec<Issue>,
    patches: BTreeMap<ServiceName, Vec<String>>,
    testing_issues: Vec<Issue>,
    miscellaneous: Vec<String>,
    miscellaneous_issues: Vec<Issue>,
    actions: Vec<Action>,
    evidence: Vec<Evidence>,
    /// Gates that were overridden: what is relaxed has to be made up for.
    debt: Vec<String>,
    timeline: Vec<Moment>,
    lanes: Vec<Lane>,
    took_ms: u64,
    runs_now: BTreeMap<Instance, String>,
}

/// Something that went wrong, or that somebody saw.
#[derive(Debug, Serialize)]
struct Issue {
    /// Its number, when a person noted it.
    number: Option<u64>,
    what: String,
    impact: Impact,
    /// How it was settled, when it was.
    resolved: Option<String>,
    output: Vec<String>,
}

/// Something that a person has or had to do.
#[derive(Debug, Serialize)]
struct Action {
    number: u64,
    what: String,
    owner: String,
    condition: String,
    state: String,
    is_done: bool,
}

/// A fact that gates read.
#[derive(Debug, Serialize)]
struct Evidence {
    kind: &'static str,
    what: String,
    by: String,
    at: String,
}

/// A turn of the rollout, or something that was asked of it.
#[derive(Debug, Serialize)]
struct Moment {
    at_ms: u64,
    what: String,
}

/// What was done on one instance, for the picture.
#[derive(Debug, Serialize)]
struct Lane {
    instance: Instance,
    bars: Vec<Bar>,
}

/// One step, from the start of the rollout.
#[derive(Debug, Serialize)]
struct Bar {
    from_ms: u64,
    until_ms: u64,
    what: String,
    failed: bool,
}

pub(crate) fn run(global: &Global, arguments: &Arguments, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let log = project.log()?;
    let depot = project.depot()?;
    let history = log.history();
    let id = match &arguments.rollout {
        Some(id) => id,
        None => history.order.last().ok_or_else(|| {
            Failure::usage("there was no rollout yet").help("`greenlight deploy` makes one")
        })?,
    };
    let rollout = history.rollouts.get(id).ok_or_else(|| {
        Failure::usage(format!("there is no rollout {id}")).help("`greenlight history` lists them")
    })?;
    let records = log.read_from(1).map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let releases = depot.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let mut report = compose::compose(rollout, history, &records, &releases);
    report.evidence.extend(verdicts(&project.evidence_directory()?, rollout));
    report.patches = patches(&project, &depot, rollout, &releases, printer);
    match arguments.format {
        ReportFormat::Markdown => printer.result(markdown::render(&report).trim_end()),
        ReportFormat::Html => printer.result(html::render(&report).trim_end()),
    }
    printer.json("report", json!({ "report": report }));
    Ok(Exit::Done)
}

/// What the canaries of a rollout were judged by, as far as it is kept here.
fn verdicts(directory: &Path, rollout: &Rollout) -> Vec<Evidence> {
    let canaries = rollout.plan.waves.iter().filter(|wave| !wave.steps.is_empty());
    let services: BTreeSet<&ServiceName> =
        canaries.flat_map(|wave| &wave.instances).map(|instance| &instance.service).collect();
    let files = services
        .into_iter()
        .map(|service| (service, greenlight_controller::evidence_file(directory, &rollout.plan.id, service)));
    files
        .filter(|(_, file)| file.exists())
        .map(|(service, file)| Evidence {
            kind: "verdict",
            what: format!(
                "the canary of {service} was judged by {0}; `greenlight verdict replay {0}` judges it again",
                file.display()
            ),
            by: rollout.plan.started_by.clone(),
            at: compose::clock(rollout.ended_at.unwrap_or(rollout.started_at)),
        })
        .collect()
}

/// The commits between what ran before and what was brought, by service. What git cannot say is said instead.
fn patches(
    project: &Project,
    depot: &Depot,
    rollout: &Rollout,
    releases: &[Release],
    printer: &Printer,
) -> BTreeMap<ServiceName, Vec<String>> {
    let plan = &rollout.plan;
    let commit =
        |id: ReleaseId| releases.iter().find(|release| release.id == id).map(|release| &release.commit);
    let mut patches = BTreeMap::new();
    for (service, target) in &plan.targets {
        let before = plan
            .baseline
            .iter()
            .filter(|(instance, _)| instance.service == *service)
            .find_map(|(_, release)| release.filter(|release| release != target));
        let (Some(from), Some(to)) = (before.and_then(commit), commit(*target)) else { continue };
        let Some(definition) = project.fleet.services.get(service) else { continue };
        let found = depot
            .repository(&definition.source, &project.directory)
            .and_then(|repository| commits_between(&repository, from, to));
        match found {
            Ok(commits) => {
                let lines = commits.into_iter().map(|commit| {
                    let hash: String = commit.hash.chars().take(10).collect();
                    format!("{hash} {} ({})", commit.subject, commit.author)
                });
                patches.insert(service.clone(), lines.collect());
            }
            Err(error) => printer.warning(format!("{service}: its commits cannot be listed: {error}")),
        }
    }
    patches
}
