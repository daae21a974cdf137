//! `tests`: every suite that is asked for ran for exactly this release, and nothing failed but what is known to.

use greenlight_model::evidence::{Fact, Recorded};
use greenlight_model::gate::{KnownFailure, TestsGate};
use greenlight_model::id::{CheckName, ReleaseId, ServiceName};
use greenlight_model::world::Gate;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use crate::{Asked, green_or_red, some};

pub(crate) fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    let Some(tests) = &asked.environment.gates.tests else { return Vec::new() };
    let of_service = |(service, release): (&ServiceName, &ReleaseId)| {
        let mut good = Vec::new();
        let mut wrong = Vec::new();
        for suite in &tests.suites {
            match judge(asked, tests, suite, service, *release) {
                Ok(sentence) => good.push(sentence),
                Err(sentence) => wrong.push(sentence),
            }
        }
        Gate { name: format!("tests ({service})"), light: green_or_red(&good, &wrong) }
    };
    asked.targets.iter().map(of_service).collect()
}

fn judge(
    asked: &Asked<'_>,
    gate: &TestsGate,
    suite: &CheckName,
    service: &ServiceName,
    release: ReleaseId,
) -> Result<String, String> {
    let is_of_suite = |fact: &Fact| match fact {
        Fact::Tests { suite: name, .. } | Fact::Exit { name, .. } => name == suite,
        _ => false,
    };
    let (name, argument) = (asked.label(release), asked.argument(service, release));
    let add = format!("greenlight evidence add {argument} --suite {suite} --junit FILE");
    match asked.latest_of(service, release, is_of_suite).map(Recorded::fact) {
        None => Err(format!("there is no result of the suite {suite} for {name}; add it: {add}")),
        Some(Fact::Exit { code: 0, .. }) => Ok(format!("{suite} passed")),
        Some(Fact::Exit { code, .. }) => {
            Err(format!("{suite} ended with exit code {code}; mend it, and add the next run: {add}"))
        }
        Some(Fact::Tests { passed: 0, failed: 0, .. }) => {
            Err(format!("{suite} ran no test at all; add a run that does: {add}"))
        }
        Some(Fact::Tests { passed, failed, failures, .. }) => {
            let today = asked.now.to_zoned(TimeZone::UTC).date();
            let known = judge_failures(gate, failures, *failed, today).map_err(|what| {
                format!("{suite}: {what}; mend it, or name it in `known_failures` with an owner")
            })?;
            let known = if known == 0 { String::new() } else { format!(", {known} known to fail") };
            Ok(format!("{suite}: {passed} passed{known}"))
        }
        Some(_) => Err(format!("what is recorded for {suite} is no test run; add one: {add}")),
    }
}

/// How many are known to fail, or what is wrong.
fn judge_failures(gate: &TestsGate, failures: &[String], failed: u32, today: Date) -> Result<usize, String> {
    let known = |test: &String| gate.known_failures.iter().find(|known| known.test == *test);
    let unknown: Vec<String> = failures.iter().filter(|test| known(test).is_none()).cloned().collect();
    let unnamed = usize::try_from(failed).unwrap_or(usize::MAX).saturating_sub(failures.len());
    if !unknown.is_empty() || unnamed > 0 {
        let count = unknown.len() + unnamed;
        let tests = if count == 1 { "test" } else { "tests" };
        let names = if unknown.is_empty() { "their names were not kept".to_owned() } else { some(&unknown) };
        return Err(format!("{count} {tests} failed that are not known to: {names}"));
    }
    let expired: Vec<String> = failures
        .iter()
        .filter_map(known)
        .filter(|known| known.until < today)
        .map(|KnownFailure { test, owner, until }| format!("{test} (of {owner}, until {until})"))
        .collect();
    if expired.is_empty() {
        Ok(failures.len())
    } else {
        Err(format!("these were known to fail, and their date has passed: {}", some(&expired)))
    }
}
