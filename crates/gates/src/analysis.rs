//! `coverage` and `lint`: a floor, and nothing worse than what the environment runs now.

use std::collections::BTreeMap;

use greenlight_model::evidence::{Fact, Recorded, share};
use greenlight_model::gate::CoverageGate;
use greenlight_model::id::{CheckName, ReleaseId, ServiceName};
use greenlight_model::world::{Gate, Light};

use crate::{Asked, green_or_red, some};

pub(crate) fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    let gates = &asked.environment.gates;
    let mut lights = Vec::new();
    for (service, release) in asked.targets {
        if let Some(gate) = &gates.coverage {
            let judged = coverage(asked, gate, service, *release);
            let light = match judged {
                Ok(why) => Light::Green { why },
                Err(why) => Light::Red { why },
            };
            lights.push(Gate { name: format!("coverage ({service})"), light });
        }
        if let Some(gate) = &gates.lint {
            let mut good = Vec::new();
            let mut wrong = Vec::new();
            for tool in &gate.tools {
                match lint(asked, tool, service, *release) {
                    Ok(sentence) => good.push(sentence),
                    Err(sentence) => wrong.push(sentence),
                }
            }
            lights.push(Gate { name: format!("lint ({service})"), light: green_or_red(&good, &wrong) });
        }
    }
    lights
}

fn coverage(
    asked: &Asked<'_>,
    gate: &CoverageGate,
    service: &ServiceName,
    release: ReleaseId,
) -> Result<String, String> {
    let measured = |release: ReleaseId| {
        let recorded = asked.latest_of(service, release, |fact| matches!(fact, Fact::Coverage { .. }))?;
        match recorded.fact() {
            Fact::Coverage { covered, lines } => Some((*covered, *lines)),
            _ => None,
        }
    };
    let environment = &asked.environment.name;
    let add =
        |release| format!("greenlight evidence add {} --cobertura FILE", asked.argument(service, release));
    let name = asked.label(release);
    let Some((covered, lines)) = measured(release) else {
        return Err(format!("no coverage is recorded for {name}; add it: {}", add(release)));
    };
    let shown = share(covered, lines);
    if u128::from(covered) * 100 < u128::from(gate.floor.get()) * u128::from(lines) || lines == 0 {
        return Err(format!("tests reach {shown} of the lines, and {} are asked for; test more", gate.floor));
    }
    let before = asked.present(service).filter(|before| *before != release && !gate.may_fall);
    let Some(before) = before else { return Ok(format!("{shown} of the lines")) };
    let Some((was_covered, was_lines)) = measured(before) else {
        return Err(format!(
            "no coverage is recorded for {}, which {environment} runs, so nobody can say that it did not fall; add it: {}",
            asked.label(before),
            add(before)
        ));
    };
    if u128::from(covered) * u128::from(was_lines) < u128::from(was_covered) * u128::from(lines) {
        return Err(format!(
            "tests reach {shown} of the lines, and {} in {}, which {environment} runs; test what is new",
            share(was_covered, was_lines),
            asked.label(before)
        ));
    }
    Ok(format!("{shown} of the lines, {} before", share(was_covered, was_lines)))
}

fn lint(
    asked: &Asked<'_>,
    tool: &CheckName,
    service: &ServiceName,
    release: ReleaseId,
) -> Result<String, String> {
    let latest = |release: ReleaseId| {
        let is_of_tool = |fact: &Fact| match fact {
            Fact::Lint { tool: name, .. } | Fact::Exit { name, .. } => name == tool,
            _ => false,
        };
        asked.latest_of(service, release, is_of_tool).map(Recorded::fact)
    };
    let environment = &asked.environment.name;
    let option = if tool.as_str() == "pylint" { "--pylint" } else { "--sarif" };
    let add = |release| format!("greenlight evidence add {} {option} FILE", asked.argument(service, release));
    let name = asked.label(release);
    let findings = match latest(release) {
        None => return Err(format!("there is no report of {tool} for {name}; add it: {}", add(release))),
        Some(Fact::Exit { code: 0, .. }) => return Ok(format!("{tool} passed")),
        Some(Fact::Exit { code, .. }) => return Err(format!("{tool} ended with exit code {code}; mend it")),
        Some(Fact::Lint { findings, .. }) => findings,
        Some(_) => {
            return Err(format!("what is recorded for {tool} is no report; add one: {}", add(release)));
        }
    };
    let count: u64 = findings.values().copied().map(u64::from).sum();
    if count == 0 {
        return Ok(format!("{tool} found nothing"));
    }
    let nothing = BTreeMap::new();
    let (known, of) = match asked.present(service) {
        Some(before) if before == release => return Ok(format!("{tool}: {count} findings, as it runs now")),
        None => (&nothing, format!("{environment} runs nothing to compare with")),
        Some(before) => match latest(before) {
            Some(Fact::Lint { findings, .. }) => (findings, format!("not in {}", asked.label(before))),
            _ => {
                return Err(format!(
                    "{tool} has {count} findings, and no report is recorded for {}, which {environment} runs, to tell the new ones; add it: {}",
                    asked.label(before),
                    add(before)
                ));
            }
        },
    };
    let new: Vec<String> = findings
        .iter()
        .filter(|(text, count)| *count > known.get(*text).unwrap_or(&0))
        .map(|(text, _)| text.clone())
        .collect();
    match new.len() {
        0 => Ok(format!("{tool}: {count} findings, none of them new")),
        1 => Err(format!("{tool} has a new finding ({of}): {}; mend it", some(&new))),
        many => Err(format!("{tool} has {many} new findings ({of}): {}; mend them", some(&new))),
    }
}
