//! The report as Markdown.

use std::time::Duration;

use greenlight_model::quantity::human_duration;

use super::{Issue, Report};

pub(super) fn render(report: &Report) -> String {
    let mut text = format!("# {}\n\n", report.title);
    text.push_str(&format!("{}\n", summary(report)));
    section(&mut text, "Deployment issues", &issues(&report.deployment_issues));
    let patches: Vec<String> = report
        .patches
        .iter()
        .flat_map(|(service, commits)| commits.iter().map(move |commit| format!("{service}: {commit}")))
        .collect();
    section(&mut text, "Patches", &patches);
    section(&mut text, "Testing issues", &issues(&report.testing_issues));
    let mut miscellaneous = report.miscellaneous.clone();
    miscellaneous.extend(issues(&report.miscellaneous_issues));
    section(&mut text, "Miscellaneous", &miscellaneous);
    section(&mut text, "Actions", &actions(report));
    section(&mut text, "Debt", &report.debt);
    let evidence: Vec<String> = report
        .evidence
        .iter()
        .map(|evidence| format!("{}: {} ({}, {})", evidence.kind, evidence.what, evidence.by, evidence.at))
        .collect();
    section(&mut text, "Evidence", &evidence);
    section(&mut text, "Timeline", &timeline(report));
    let runs: Vec<String> =
        report.runs_now.iter().map(|(instance, release)| format!("{instance}: {release}")).collect();
    section(&mut text, "What ran where at its end", &runs);
    text
}

/// How it came out, in a few sentences.
pub(super) fn summary(report: &Report) -> String {
    let took = report.took.as_ref().map(|took| format!(", in {took}")).unwrap_or_default();
    let mut text = format!(
        "{}{took}. Rollout `{}`, started {} by {}.",
        report.outcome, report.rollout, report.started_at, report.started_by
    );
    if let Some(detect) = &report.time_to_detect {
        text.push_str(&format!(" Time to detect: {detect}."));
    }
    if let Some(repair) = &report.time_to_repair {
        text.push_str(&format!(" Time to repair: {repair}."));
    }
    text
}

fn issues(issues: &[Issue]) -> Vec<String> {
    issues
        .iter()
        .map(|issue| {
            let number = issue.number.map(|number| format!("issue {number}, ")).unwrap_or_default();
            let resolved =
                issue.resolved.as_ref().map(|how| format!("; resolved: {how}")).unwrap_or_default();
            let quoted: String = issue.output.iter().map(|line| format!("\n      {line}")).collect();
            format!("{number}impact {}: {}{resolved}{quoted}", issue.impact.word(), issue.what)
        })
        .collect()
}

fn actions(report: &Report) -> Vec<String> {
    let line = |action: &super::Action| {
        let mark = if action.is_done { "x" } else { " " };
        let condition = match action.condition.as_str() {
            "" => String::new(),
            condition => format!(", when {condition}"),
        };
        format!(
            "[{mark}] action {}, {}: {}{condition} ({})",
            action.number, action.owner, action.what, action.state
        )
    };
    report.actions.iter().map(line).collect()
}

pub(super) fn timeline(report: &Report) -> Vec<String> {
    let line = |moment: &super::Moment| {
        format!("after {}: {}", human_duration(Duration::from_millis(moment.at_ms)), moment.what)
    };
    report.timeline.iter().map(line).collect()
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
