//! `report`: the deployment report of one rollout, written from the records.
//!
//! What it is about: a summary, the issues of the deployment with their impact, the patches, what testing (the checks
//! before anything changed) found, and what operators did. Nothing in it is kept apart from the records: the same
//! records give the same report.

use std::collections::BTreeMap;

use greenlight_depot::{Depot, commits_between};
use greenlight_model::action::{Action, ActionResult};
use greenlight_model::decision::{Outcome, Running};
use greenlight_model::host::{Check, CheckOutcome};
use greenlight_model::id::{Instance, ReleaseId, RolloutId, ServiceName};
use greenlight_model::manifest::Release;
use greenlight_model::quantity::human_duration;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{Direction, OperatorRequest, Rollout};
use serde::Serialize;
use serde_json::json;

use crate::args::{Global, Report as Arguments};
use crate::describe;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

/// Lines of a failed step's output that a report quotes; the rest is in `history`.
const OUTPUT_LINES_MAX: usize = 10;

/// A report as data.
#[derive(Debug, Serialize)]
struct Report {
    rollout: RolloutId,
    title: String,
    started_by: String,
    started_at: String,
    outcome: String,
    took: Option<String>,
    deployment_issues: Vec<Issue>,
    patches: BTreeMap<ServiceName, Vec<String>>,
    testing_issues: Vec<String>,
    miscellaneous: Vec<String>,
    runs_now: BTreeMap<Instance, String>,
}

/// Something that went wrong.
#[derive(Debug, Serialize)]
struct Issue {
    what: String,
    impact: Impact,
    output: Vec<String>,
}

/// What an issue did to the deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Impact {
    /// It passed when it was tried again.
    Nil,
    /// The deployment went on without an instance.
    Degraded,
    /// The deployment did not go on.
    Blocker,
}

impl Impact {
    fn word(self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Degraded => "degraded",
            Self::Blocker => "blocker",
        }
    }
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
    let running = history.running.get(id).cloned().unwrap_or_default();
    let mut report = compose(rollout, &records, &releases, &running);
    report.patches = patches(&project, &depot, rollout, &releases, printer);
    printer.result(markdown(&report).trim_end());
    printer.json("report", json!({ "report": report }));
    Ok(Exit::Done)
}

fn compose(rollout: &Rollout, records: &[Record], releases: &[Release], running: &Running) -> Report {
    let plan = &rollout.plan;
    let title = |id: ReleaseId| {
        releases.iter().find(|release| release.id == id).map_or_else(|| id.short(), Release::title)
    };
    let what: Vec<String> =
        plan.targets.iter().map(|(service, release)| format!("{service} {}", title(*release))).collect();
    let back = if plan.direction == Direction::Back { " (back)" } else { "" };
    let took = rollout
        .ended_at
        .and_then(|ended_at| std::time::Duration::try_from(ended_at.duration_since(rollout.started_at)).ok());
    let of_rollout = || records.iter().filter(|record| of(&record.body) == Some(&plan.id));
    Report {
        rollout: plan.id.clone(),
        title: format!("{} to {}{back}", what.join(", "), plan.environment),
        started_by: plan.started_by.clone(),
        started_at: rollout.started_at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
        outcome: rollout.outcome.as_ref().map_or_else(|| "not ended yet".to_owned(), describe::outcome),
        took: took.map(human_duration),
        deployment_issues: issues(rollout, &of_rollout()),
        patches: BTreeMap::new(),
        testing_issues: of_rollout().flat_map(failed_checks).collect(),
        miscellaneous: of_rollout().filter_map(what_operators_did).collect(),
        runs_now: running
            .iter()
            .map(|(instance, release)| {
                (instance.clone(), release.map_or_else(|| "nothing".to_owned(), title))
            })
            .collect(),
    }
}

fn of(body: &RecordBody) -> Option<&RolloutId> {
    match body {
        RecordBody::ActionFinished { rollout, .. } | RecordBody::OperatorAsked { rollout, .. } => {
            Some(rollout)
        }
        _ => None,
    }
}

/// What failed, other than the checks, which have a section of their own.
fn issues<'a>(rollout: &Rollout, records: &(impl Iterator<Item = &'a Record> + Clone)) -> Vec<Issue> {
    let passed_later = |action: &Action, seq: u64| {
        records.clone().any(|record| {
            record.seq > seq
                && matches!(&record.body, RecordBody::ActionFinished { action: done, result: ActionResult::Succeeded, .. }
                    if done == action)
        })
    };
    records
        .clone()
        .filter_map(|record| {
            let RecordBody::ActionFinished {
                action, result: ActionResult::Failed { why, .. }, detail, ..
            } = &record.body
            else {
                return None;
            };
            if matches!(action, Action::Preflight { .. }) {
                return None;
            }
            let impact = if passed_later(action, record.seq) {
                Impact::Nil
            } else if rollout.left_out.contains_key(action.instance())
                && matches!(rollout.outcome, Some(Outcome::Done { .. }) | None)
            {
                Impact::Degraded
            } else {
                Impact::Blocker
            };
            let excess = detail.output.len().saturating_sub(OUTPUT_LINES_MAX);
            Some(Issue {
                what: format!("{}: {} failed: {why}", action.instance(), action.verb()),
                impact,
                output: detail.output[excess..].to_vec(),
            })
        })
        .collect()
}

fn failed_checks(record: &Record) -> Vec<String> {
    let RecordBody::ActionFinished { action, detail, .. } = &record.body else { return Vec::new() };
    detail
        .checks
        .iter()
        .filter(|check| check.outcome == CheckOutcome::Failed)
        .map(|Check { name, expected, found, mend, .. }| {
            format!("{}: {name}: expected {expected}, found {found}. {mend}", action.host())
        })
        .collect()
}

fn what_operators_did(record: &Record) -> Option<String> {
    let RecordBody::OperatorAsked { request, why, .. } = &record.body else { return None };
    let word = match request {
        OperatorRequest::Hold => "held",
        OperatorRequest::Resume => "resumed",
        OperatorRequest::Abort => "aborted",
    };
    let why = if why.is_empty() { String::new() } else { format!(": {why}") };
    Some(format!("{} {} {word} it{why}", record.at.strftime("%H:%M:%S"), record.by))
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

fn markdown(report: &Report) -> String {
    let mut text = format!("# {}\n\n", report.title);
    let took = report.took.as_ref().map(|took| format!(", in {took}")).unwrap_or_default();
    text.push_str(&format!(
        "{}{took}. Rollout `{}`, started {} by {}.\n",
        report.outcome, report.rollout, report.started_at, report.started_by
    ));
    let issues: Vec<String> = report
        .deployment_issues
        .iter()
        .map(|issue| {
            let quoted: String = issue.output.iter().map(|line| format!("\n      {line}")).collect();
            format!("impact {}: {}{quoted}", issue.impact.word(), issue.what)
        })
        .collect();
    section(&mut text, "Deployment issues", &issues);
    let patches: Vec<String> = report
        .patches
        .iter()
        .flat_map(|(service, commits)| commits.iter().map(move |commit| format!("{service}: {commit}")))
        .collect();
    section(&mut text, "Patches", &patches);
    section(&mut text, "Testing issues", &report.testing_issues);
    section(&mut text, "Miscellaneous", &report.miscellaneous);
    let runs: Vec<String> =
        report.runs_now.iter().map(|(instance, release)| format!("{instance}: {release}")).collect();
    section(&mut text, "What ran where at its end", &runs);
    text
}

fn section(text: &mut String, title: &str, lines: &[String]) {
    text.push_str(&format!("\n## {title}\n\n"));
    if lines.is_empty() {
        text.push_str("None.\n");
    }
    for line in lines {
        text.push_str(&format!("- {}\n", line.replace("\n- ", "\n  - ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use greenlight_model::Timestamp;
    use greenlight_model::action::{ActionDetail, Blame};
    use greenlight_model::id::Generation;
    use greenlight_model::rollout::Plan;

    fn finished(seq: u64, instance: &str, failed: bool) -> Record {
        let instance: Instance = instance.to_owned().try_into().unwrap();
        let result = if failed {
            ActionResult::Failed { why: "it does not answer".to_owned(), blame: Blame::Passing }
        } else {
            ActionResult::Succeeded
        };
        let detail = ActionDetail { took_ms: 5, checks: Vec::new(), output: vec!["boom".to_owned()] };
        let body = RecordBody::ActionFinished {
            rollout: "r".parse().unwrap(),
            action: Action::Drain { instance },
            result,
            detail,
        };
        Record { seq, at: Timestamp::UNIX_EPOCH, by: "op@desk".to_owned(), body }
    }

    #[test]
    fn the_impact_follows_from_what_came_of_it() {
        let plan = Plan {
            id: "r".parse().unwrap(),
            environment: "production".parse().unwrap(),
            direction: Direction::Forward,
            targets: BTreeMap::new(),
            baseline: BTreeMap::new(),
            waves: Vec::new(),
            generation: Generation(2),
            started_by: "op@desk".to_owned(),
            digest: None,
            is_partial: false,
        };
        let mut rollout = Rollout::new(plan, Timestamp::UNIX_EPOCH);
        let left_out: Instance = "b/web".to_owned().try_into().unwrap();
        rollout.left_out.insert(left_out, "it does not answer".to_owned());
        let records = [
            finished(1, "a/web", true),
            finished(2, "a/web", false),
            finished(3, "b/web", true),
            finished(4, "c/web", true),
        ];
        let impacts: Vec<Impact> =
            issues(&rollout, &records.iter()).iter().map(|issue| issue.impact).collect();
        assert_eq!(impacts, [Impact::Nil, Impact::Degraded, Impact::Blocker]);
        let text = markdown(&compose(&rollout, &records, &[], &Running::new()));
        assert!(
            text.contains("- impact nil: a/web: drain failed: it does not answer\n      boom\n"),
            "{text}"
        );
        assert!(text.contains("## Testing issues\n\nNone.\n"), "{text}");
    }
}
