//! From the records to the report as data.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::{Action as Step, ActionResult, Verb};
use greenlight_model::check::{Check, CheckOutcome};
use greenlight_model::decision::Outcome;
use greenlight_model::evidence::{Fact, Recorded};
use greenlight_model::history::History;
use greenlight_model::id::{Instance, ReleaseId, RolloutId};
use greenlight_model::journal::{Impact, Section};
use greenlight_model::manifest::Release;
use greenlight_model::quantity::human_duration;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{Direction, Note, OperatorRequest, Rollout};

use super::{Action, Bar, Evidence, Issue, Lane, Moment, Report};
use crate::commands::journal::state;
use crate::describe;

/// Lines of a failed step's output that a report quotes; the rest is in `history`.
const OUTPUT_LINES_MAX: usize = 10;
/// Words by which a line of a migration's output is a warning, in small letters.
const WARNING_WORDS: [&str; 5] = ["warning", "already exists", "deprecated", "notice:", "skipping"];

pub(super) fn compose(
    rollout: &Rollout,
    history: &History,
    records: &[Record],
    releases: &[Release],
) -> Report {
    let plan = &rollout.plan;
    let title = |id: ReleaseId| {
        releases.iter().find(|release| release.id == id).map_or_else(|| id.short(), Release::title)
    };
    let what: Vec<String> =
        plan.targets.iter().map(|(service, release)| format!("{service} {}", title(*release))).collect();
    let back = if plan.direction == Direction::Back { " (back)" } else { "" };
    let of_rollout: Vec<&Record> =
        records.iter().filter(|record| of(&record.body) == Some(&plan.id)).collect();
    let took = rollout.ended_at.map(|ended_at| since(rollout.started_at, ended_at));
    let (detect, repair) = times(rollout, &of_rollout);
    let mut deployment_issues = failures(rollout, &of_rollout);
    deployment_issues.extend(of_rollout.iter().flat_map(|record| warnings(record)));
    deployment_issues.extend(noted(history, &plan.id, Section::Deployment));
    let mut testing_issues: Vec<Issue> =
        of_rollout.iter().flat_map(|record| failed_checks(rollout, record)).collect();
    testing_issues.extend(noted(history, &plan.id, Section::Testing));
    let evidence: Vec<&Recorded> = evidence(rollout, history).collect();
    Report {
        rollout: plan.id.clone(),
        title: format!("{} to {}{back}", what.join(", "), plan.environment),
        started_by: plan.started_by.clone(),
        started_at: clock(rollout.started_at),
        outcome: rollout.outcome.as_ref().map_or_else(|| "not ended yet".to_owned(), describe::outcome),
        took: took.map(human_duration),
        time_to_detect: detect.map(human_duration),
        time_to_repair: repair.map(human_duration),
        deployment_issues,
        patches: BTreeMap::new(),
        testing_issues,
        miscellaneous: of_rollout.iter().filter_map(|record| what_operators_did(record)).collect(),
        miscellaneous_issues: noted(history, &plan.id, Section::Miscellaneous).collect(),
        actions: actions(rollout, history),
        debt: overridden(rollout, &of_rollout)
            .chain(evidence.iter().filter_map(|recorded| debt(recorded)))
            .collect(),
        evidence: evidence
            .iter()
            .map(|recorded| Evidence {
                kind: recorded.fact().kind(),
                what: recorded.fact().summary(),
                by: recorded.by.clone(),
                at: clock(recorded.at),
            })
            .collect(),
        timeline: of_rollout.iter().filter_map(|record| moment(rollout, record)).collect(),
        lanes: lanes(rollout, &of_rollout),
        took_ms: milliseconds(took.unwrap_or_else(|| {
            of_rollout.last().map(|last| since(rollout.started_at, last.at)).unwrap_or_default()
        })),
        runs_now: history
            .running
            .get(&plan.id)
            .into_iter()
            .flatten()
            .map(|(instance, release)| {
                (instance.clone(), release.map_or_else(|| "nothing".to_owned(), title))
            })
            .collect(),
    }
}

fn of(body: &RecordBody) -> Option<&RolloutId> {
    match body {
        RecordBody::ActionStarted { rollout, .. }
        | RecordBody::ActionFinished { rollout, .. }
        | RecordBody::Noted { rollout, .. }
        | RecordBody::OperatorAsked { rollout, .. }
        | RecordBody::MigrationDone { rollout, .. }
        | RecordBody::RolloutEnded { rollout, .. } => Some(rollout),
        _ => None,
    }
}

pub(super) fn clock(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

fn since(start: Timestamp, at: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(start)).unwrap_or_default()
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// How long it took from the first switch to the turn back, and from there to the end.
fn times(rollout: &Rollout, records: &[&Record]) -> (Option<Duration>, Option<Duration>) {
    let is_switch = |record: &&&Record| matches!(&record.body, RecordBody::ActionStarted { action, .. } if action.verb() == Verb::Activate);
    let turns = |record: &&&Record| match &record.body {
        RecordBody::Noted { note: Note::TurnBack { .. }, .. } => true,
        RecordBody::OperatorAsked { request, .. } => *request == OperatorRequest::Abort,
        _ => false,
    };
    let switched = records.iter().find(is_switch).map(|record| record.at);
    let turned = records.iter().find(turns).map(|record| record.at);
    let detect = switched.zip(turned).map(|(switched, turned)| since(switched, turned));
    let repair = turned.zip(rollout.ended_at).map(|(turned, ended)| since(turned, ended));
    (detect, repair)
}

/// What failed, other than the checks, which have a section of their own.
fn failures(rollout: &Rollout, records: &[&Record]) -> Vec<Issue> {
    let passed_later = |action: &Step, seq: u64| {
        records.iter().any(|record| {
            record.seq > seq
                && matches!(&record.body, RecordBody::ActionFinished { action: done, result: ActionResult::Succeeded, .. }
                    if done == action)
        })
    };
    let issue = |record: &&Record| {
        let RecordBody::ActionFinished { action, result: ActionResult::Failed { why, .. }, detail, .. } =
            &record.body
        else {
            return None;
        };
        if matches!(action, Step::Preflight { .. }) {
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
            number: None,
            what: format!("{}: {} failed: {why}", action.instance(), action.verb()),
            impact,
            resolved: None,
            output: detail.output[excess..].to_vec(),
        })
    };
    records.iter().filter_map(issue).collect()
}

/// What a migration warned of while it went through: worth a look, and it stopped nothing.
fn warnings(record: &Record) -> Vec<Issue> {
    let RecordBody::ActionFinished { action, result: ActionResult::Succeeded, detail, .. } = &record.body
    else {
        return Vec::new();
    };
    if action.migration_phase().is_none() {
        return Vec::new();
    }
    let is_warning = |line: &&String| {
        let line = line.to_lowercase();
        WARNING_WORDS.iter().any(|word| line.contains(word))
    };
    let issue = |line: &String| Issue {
        number: None,
        what: format!("{}: the migration says: {line}", action.instance()),
        impact: Impact::Nil,
        resolved: None,
        output: Vec::new(),
    };
    detail.output.iter().filter(is_warning).map(issue).collect()
}

fn failed_checks(rollout: &Rollout, record: &Record) -> Vec<Issue> {
    let RecordBody::ActionFinished { action, detail, .. } = &record.body else { return Vec::new() };
    let passed = rollout.checked.contains(action.instance());
    let failed = detail.checks.iter().filter(|check| check.outcome == CheckOutcome::Failed);
    failed
        .map(|Check { name, expected, found, mend, .. }| Issue {
            number: None,
            what: format!("{}: {name}: expected {expected}, found {found}. {mend}", action.host()),
            impact: if passed { Impact::Nil } else { Impact::Blocker },
            resolved: None,
            output: Vec::new(),
        })
        .collect()
}

/// What people noted of this rollout.
fn noted<'a>(
    history: &'a History,
    rollout: &'a RolloutId,
    section: Section,
) -> impl Iterator<Item = Issue> + 'a {
    let issues = history.journal.issues.iter();
    issues.filter(move |(_, issue)| issue.rollout.as_ref() == Some(rollout) && issue.section == section).map(
        |(number, issue)| Issue {
            number: Some(*number),
            what: format!("{} (seen by {})", issue.what, issue.opened.by),
            impact: issue.impact,
            resolved: issue.resolved.as_ref().map(|(how, signature)| format!("{how} ({})", signature.by)),
            output: Vec::new(),
        },
    )
}

/// What is open in the environment, whichever rollout it came from, and what was done since this one began.
fn actions(rollout: &Rollout, history: &History) -> Vec<Action> {
    let tasks = history.journal.tasks.iter().filter(|(_, task)| {
        let is_recent = task.done.as_ref().is_none_or(|(_, signature)| signature.at >= rollout.started_at);
        task.environment == rollout.plan.environment && is_recent
    });
    let action = |(number, task): (&u64, &greenlight_model::journal::Task)| Action {
        number: *number,
        what: task.what.clone(),
        owner: task.owner.clone(),
        condition: task.condition.clone(),
        state: state(task),
        is_done: task.done.is_some(),
    };
    tasks.map(action).collect()
}

/// What the gates of this rollout had to read, in the order in which it came.
fn evidence<'a>(rollout: &'a Rollout, history: &'a History) -> impl Iterator<Item = &'a Recorded> {
    let plan = &rollout.plan;
    history.evidence.iter().filter(move |recorded| {
        let evidence = &recorded.evidence;
        let is_ours = match &evidence.environment {
            Some(environment) => *environment == plan.environment && evidence.releases == plan.targets,
            None => {
                evidence.releases.iter().any(|(service, release)| plan.targets.get(service) == Some(release))
            }
        };
        is_ours && rollout.ended_at.is_none_or(|ended_at| recorded.at <= ended_at)
    })
}

fn debt(recorded: &Recorded) -> Option<String> {
    let Fact::Override { gate, why } = recorded.fact() else { return None };
    Some(format!("gate {gate} was overridden by {}: {why}", recorded.by))
}

/// The checks that did not stop it though they failed, with what was found; those that were not needed as well.
fn overridden<'a>(rollout: &'a Rollout, records: &'a [&Record]) -> impl Iterator<Item = String> + 'a {
    rollout.plan.overrides.iter().map(|(pattern, reason)| {
        let found: BTreeSet<String> = records
            .iter()
            .filter_map(|record| match &record.body {
                RecordBody::ActionFinished { action, detail, .. } => Some((action.host(), &detail.checks)),
                _ => None,
            })
            .flat_map(|(host, checks)| checks.iter().map(move |check| (host, check)))
            .filter(|(host, check)| {
                check.outcome == CheckOutcome::Overridden && pattern.covers(host, &check.name)
            })
            .map(|(host, check)| {
                format!("{host}: expected {}, found {}. {}", check.expected, check.found, check.mend)
            })
            .collect();
        let found = if found.is_empty() {
            "it would have passed".to_owned()
        } else {
            found.into_iter().collect::<Vec<_>>().join("; ")
        };
        format!("check {pattern} was overridden by {}: {reason} ({found})", rollout.plan.started_by)
    })
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

fn moment(rollout: &Rollout, record: &Record) -> Option<Moment> {
    let what = match &record.body {
        RecordBody::Noted { note, .. } => describe::note(note),
        RecordBody::OperatorAsked { request, .. } => {
            let word = match request {
                OperatorRequest::Hold => "held",
                OperatorRequest::Resume => "resumed",
                OperatorRequest::Abort => "aborted",
            };
            format!("{word} by {}", record.by)
        }
        RecordBody::MigrationDone { service, .. } => {
            format!("the migration of {service} is done, says {}", record.by)
        }
        RecordBody::ActionFinished { action, result: ActionResult::Failed { why, .. }, .. } => {
            format!("{}: {} failed: {why}", action.instance(), action.verb())
        }
        RecordBody::RolloutEnded { .. } => "ended".to_owned(),
        _ => return None,
    };
    Some(Moment { at_ms: milliseconds(since(rollout.started_at, record.at)), what })
}

/// What was done where and when: every step that changes something, by the records of its begin and end.
fn lanes(rollout: &Rollout, records: &[&Record]) -> Vec<Lane> {
    let mut lanes: BTreeMap<&Instance, Vec<Bar>> =
        rollout.plan.baseline.keys().map(|instance| (instance, Vec::new())).collect();
    let mut begun: BTreeMap<&Instance, (&Step, Timestamp)> = BTreeMap::new();
    for record in records {
        match &record.body {
            RecordBody::ActionStarted { action, .. } => {
                begun.insert(action.instance(), (action, record.at));
            }
            RecordBody::ActionFinished { action, result, .. } => {
                let started = begun.remove(action.instance()).filter(|(started, _)| *started == action);
                let from = started.map_or(record.at, |(_, at)| at);
                let bar = Bar {
                    from_ms: milliseconds(since(rollout.started_at, from)),
                    until_ms: milliseconds(since(rollout.started_at, record.at)),
                    what: action.verb().to_string(),
                    failed: matches!(result, ActionResult::Failed { .. }),
                };
                lanes.entry(action.instance()).or_default().push(bar);
            }
            _ => {}
        }
    }
    lanes.into_iter().map(|(instance, bars)| Lane { instance: instance.clone(), bars }).collect()
}
