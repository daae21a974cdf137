//! SARIF 2.1, the format of ESLint, Semgrep, CodeQL, Bandit, clang-tidy and others.

use std::collections::BTreeMap;

use greenlight_model::evidence::Fact;
use serde_json::Value;

use super::{ReadError, Report, check_count, check_name};

/// Reads a report: one fact for each tool. A finding is known by its file, rule and message; not by its line, which moves
/// with every edit above it. What is suppressed, passed or absent is not counted.
///
/// # Errors
/// When it is not whole, is something else, or a run of it broke off.
pub fn sarif(text: &str) -> Result<Report, ReadError> {
    let document: Value = serde_json::from_str(text)
        .map_err(|error| ReadError::new(format!("it is not whole JSON: {error}")))?;
    let runs = document["runs"].as_array().filter(|runs| !runs.is_empty());
    let runs = runs.ok_or_else(|| ReadError::new("it is no SARIF report: it has no `runs`"))?;
    let mut tools: BTreeMap<_, BTreeMap<String, u32>> = BTreeMap::new();
    let mut commit = None;
    for run in runs {
        let name = run["tool"]["driver"]["name"].as_str();
        let name =
            name.ok_or_else(|| ReadError::new("it is no SARIF report: a run does not name its tool"))?;
        let Some(results) = run["results"].as_array() else {
            return Err(ReadError::new(format!("the run of {name} has no results: it broke off")));
        };
        let findings = tools.entry(check_name(name)?).or_default();
        for result in results.iter().filter(|result| is_open(result)) {
            let count = findings.entry(fingerprint(result)).or_default();
            *count = count.saturating_add(1);
        }
        check_count(findings.len())?;
        let provenance = &run["versionControlProvenance"][0]["revisionId"];
        commit = commit.or_else(|| provenance.as_str().map(str::to_owned));
    }
    let facts = tools.into_iter().map(|(tool, findings)| Fact::Lint { tool, findings });
    Ok(Report { facts: facts.collect(), commit })
}

fn is_open(result: &Value) -> bool {
    let is_failure = result["kind"].as_str().is_none_or(|kind| matches!(kind, "fail" | "open" | "review"));
    let is_there = result["baselineState"].as_str() != Some("absent");
    let holds =
        |suppression: &Value| !matches!(suppression["status"].as_str(), Some("rejected" | "underReview"));
    let is_suppressed = result["suppressions"].as_array().is_some_and(|list| list.iter().any(holds));
    is_failure && is_there && !is_suppressed
}

fn fingerprint(result: &Value) -> String {
    let file = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].as_str();
    let rule = result["ruleId"].as_str().or_else(|| result["rule"]["id"].as_str()).unwrap_or("(no rule)");
    let message = result["message"]["text"].as_str().or_else(|| result["message"]["id"].as_str());
    let message: Vec<&str> = message.unwrap_or_default().split_whitespace().collect();
    let file = file.map(|file| format!("{file}: ")).unwrap_or_default();
    format!("{file}{rule}: {}", message.join(" "))
}
