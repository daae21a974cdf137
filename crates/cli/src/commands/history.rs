//! `history`: the rollouts of an environment, or the steps of one.

use std::collections::BTreeMap;

use greenlight_controller::clock;
use greenlight_model::action::ActionResult;
use greenlight_model::id::{ReleaseId, RolloutId};
use greenlight_model::manifest::Release;
use greenlight_model::quantity::human_duration;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{Direction, OperatorRequest, Rollout};
use greenlight_store::Log;
use serde_json::json;

use crate::args::{Global, History};
use crate::describe::{self, ago, table};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

pub(crate) fn run(global: &Global, history: &History, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let log = project.log()?;
    let releases = project.depot()?.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let titles: BTreeMap<ReleaseId, String> =
        releases.iter().map(|release| (release.id, Release::title(release))).collect();
    if let Some(id) = &history.rollout {
        return steps(&log, id, &titles, printer);
    }
    if let Some(name) = &history.environment {
        project.environment(name)?;
    }
    let folded = log.history();
    let rollouts: Vec<&Rollout> = folded
        .order
        .iter()
        .rev()
        .filter_map(|id| folded.rollouts.get(id))
        .filter(|rollout| history.environment.as_ref().is_none_or(|name| rollout.plan.environment == *name))
        .take(history.limit)
        .collect();
    let now = clock::now();
    let title = |release: &ReleaseId| titles.get(release).cloned().unwrap_or_else(|| release.short());
    let mut rows = vec![["ROLLOUT", "WHEN", "BY", "WHAT", "ENDED"].map(str::to_owned).to_vec()];
    for rollout in &rollouts {
        let back = if rollout.plan.direction == Direction::Back { "back to " } else { "" };
        let what: Vec<String> = rollout
            .plan
            .targets
            .iter()
            .map(|(service, release)| format!("{service} {back}{}", title(release)))
            .collect();
        rows.push(vec![
            rollout.plan.id.to_string(),
            ago(rollout.started_at, now),
            rollout.plan.started_by.clone(),
            what.join(", "),
            rollout.outcome.as_ref().map_or_else(|| "open".to_owned(), describe::outcome),
        ]);
    }
    if rollouts.is_empty() {
        printer.progress("no rollouts yet");
    } else {
        table(&rows).iter().for_each(|row| printer.result(row));
    }
    printer.json("history", json!({ "rollouts": rollouts }));
    Ok(Exit::Done)
}

fn steps(
    log: &Log,
    id: &RolloutId,
    titles: &BTreeMap<ReleaseId, String>,
    printer: &Printer,
) -> Result<Exit, Failure> {
    if !log.history().rollouts.contains_key(id) {
        return Err(
            Failure::usage(format!("there is no rollout {id}")).help("`greenlight history` lists them")
        );
    }
    let records: Vec<Record> = log
        .read_from(1)
        .map_err(|error| Failure::from_error(Exit::Failed, &error))?
        .into_iter()
        .filter(|record| of(&record.body) == Some(id))
        .collect();
    let title = |release: ReleaseId| titles.get(&release).cloned().unwrap_or_else(|| release.short());
    for record in &records {
        if let Some(line) = line(&record.body, title) {
            printer.result(format!("{}  {line}", record.at.strftime("%Y-%m-%d %H:%M:%S%.3fZ")));
        }
        if let RecordBody::ActionFinished { detail, result: ActionResult::Failed { .. }, .. } = &record.body {
            detail.output.iter().for_each(|line| printer.result(format!("    | {line}")));
        }
    }
    printer.json("history", json!({ "rollout": id, "records": records }));
    Ok(Exit::Done)
}

fn of(body: &RecordBody) -> Option<&RolloutId> {
    match body {
        RecordBody::ReleaseMarked { .. }
        | RecordBody::DatabaseRestored { .. }
        | RecordBody::EvidenceAdded { .. }
        | RecordBody::Journal { .. } => None,
        RecordBody::RolloutStarted { plan, .. } => Some(&plan.id),
        RecordBody::RolloutAdopted { charter, .. } => Some(&charter.plan.id),
        RecordBody::ActionStarted { rollout, .. }
        | RecordBody::ActionFinished { rollout, .. }
        | RecordBody::Noted { rollout, .. }
        | RecordBody::OperatorAsked { rollout, .. }
        | RecordBody::MigrationDone { rollout, .. }
        | RecordBody::RolloutEnded { rollout, .. } => Some(rollout),
    }
}

fn line(body: &RecordBody, title: impl Fn(ReleaseId) -> String) -> Option<String> {
    Some(match body {
        RecordBody::RolloutStarted { plan, .. } => format!("started by {}", plan.started_by),
        RecordBody::RolloutAdopted { charter, found } => format!(
            "taken over from where {} had started it: {} instances switched or being switched{}",
            charter.plan.started_by,
            found.touched.len(),
            if found.turning_back.is_some() { ", on the way back" } else { "" }
        ),
        RecordBody::ActionFinished { action, result: ActionResult::Succeeded, detail, .. } => {
            let took = human_duration(std::time::Duration::from_millis(detail.took_ms));
            format!("{}  {} ({took})", action.instance(), describe::action(action, title))
        }
        RecordBody::ActionFinished { action, result: ActionResult::Failed { why, .. }, .. } => {
            format!("{}  {} FAILED: {why}", action.instance(), action.verb())
        }
        RecordBody::Noted { note, .. } => describe::note(note),
        RecordBody::OperatorAsked { request, why, .. } => {
            let word = match request {
                OperatorRequest::Hold => "hold",
                OperatorRequest::Resume => "resume",
                OperatorRequest::Abort => "abort",
            };
            format!(
                "an operator asked to {word}{}",
                if why.is_empty() { String::new() } else { format!(": {why}") }
            )
        }
        RecordBody::MigrationDone { service, phase, why, .. } => format!(
            "a person saw that the {} of {service} is done{}",
            phase.noun(),
            if why.is_empty() { String::new() } else { format!(": {why}") }
        ),
        RecordBody::RolloutEnded { outcome, .. } => describe::outcome(outcome),
        RecordBody::ActionStarted { .. }
        | RecordBody::DatabaseRestored { .. }
        | RecordBody::ReleaseMarked { .. }
        | RecordBody::EvidenceAdded { .. }
        | RecordBody::Journal { .. } => return None,
    })
}
