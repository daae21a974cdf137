//! `evidence`: facts about a release that gates read, out of the reports of tests and analyses.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use greenlight_controller::clock;
use greenlight_gates::read::{self, ReadError, Report};
use greenlight_model::evidence::{Evidence, FAILED_TESTS_MAX, Fact, TEXT_CHARACTERS_MAX};
use greenlight_model::id::{CheckName, ServiceName};
use greenlight_model::manifest::Release;
use greenlight_model::record::RecordBody;
use serde_json::json;

use crate::args::{Evidence as Arguments, EvidenceAction, EvidenceAdd, Global};
use crate::commands::operate::append;
use crate::commands::releases;
use crate::describe::{ago, table};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

/// A longer report is a mistake.
const REPORT_BYTES_MAX: u64 = 64 << 20;

pub(crate) fn run(global: &Global, arguments: &Arguments, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    match &arguments.action {
        EvidenceAction::Add(add) => self::add(&project, add, printer),
        EvidenceAction::List { release } => list(&project, release.as_deref(), printer),
    }
}

fn add(project: &Project, arguments: &EvidenceAdd, printer: &Printer) -> Result<Exit, Failure> {
    let services: Vec<&ServiceName> = project.fleet.services.keys().collect();
    let release = releases::find(&*project.depot()?, &services, &arguments.release)?;
    let reports = read_all(arguments)?;
    if reports.iter().any(|(_, report)| is_of_a_commit(report)) {
        check_commit(project, arguments, &release, &reports)?;
    }
    let facts = merged(reports.into_iter().flat_map(|(_, report)| report.facts));
    if facts.is_empty() {
        return Err(Failure::usage("there is nothing to add").help(
            "name what there is: --junit FILE, --cobertura FILE, --sarif FILE, --pylint FILE, --exit-code NAME=CODE or --note FILE",
        ));
    }
    // All or nothing was read; what is written is one record for each fact.
    let mut log = project.log()?;
    for fact in &facts {
        let releases = BTreeMap::from([(release.service.clone(), release.id)]);
        let evidence = Evidence { releases, environment: None, digest: None, fact: fact.clone() };
        append(project, &mut log, &RecordBody::EvidenceAdded { evidence })?;
        printer.result(format!(
            "{} {}: {} {}",
            release.service,
            release.title(),
            fact.kind(),
            fact.summary()
        ));
    }
    printer.json("evidence add", json!({ "release": release.id, "facts": facts }));
    Ok(Exit::Done)
}

/// Every report with the name of its file.
fn read_all(arguments: &EvidenceAdd) -> Result<Vec<(String, Report)>, Failure> {
    let mut reports = Vec::new();
    let suite = &arguments.suite;
    let mut take = |path: &Path, read: &dyn Fn(&str) -> Result<Report, ReadError>| {
        let name = path.display().to_string();
        let report = read(&text(path)?)
            .map_err(|error| Failure::usage(format!("{name}: {error}; nothing was recorded")))?;
        reports.push((name, report));
        Ok::<(), Failure>(())
    };
    for path in &arguments.junit {
        take(path, &|text| read::junit(text, suite))?;
    }
    for path in &arguments.cobertura {
        take(path, &read::cobertura)?;
    }
    for path in &arguments.sarif {
        take(path, &read::sarif)?;
    }
    for path in &arguments.pylint {
        take(path, &read::pylint)?;
    }
    if let Some(path) = &arguments.note {
        take(path, &note)?;
    }
    for (name, code) in &arguments.exit_code {
        let fact = Fact::Exit { name: name.clone(), code: *code };
        reports.push((format!("--exit-code {name}"), Report { facts: vec![fact], commit: None }));
    }
    Ok(reports)
}

fn note(text: &str) -> Result<Report, ReadError> {
    let text = text.trim();
    let count = text.chars().count();
    if count == 0 || count > TEXT_CHARACTERS_MAX {
        let why = format!("a note has 1 to {TEXT_CHARACTERS_MAX} characters, and this one {count}");
        return Err(ReadError { why });
    }
    Ok(Report { facts: vec![Fact::Note { text: text.to_owned() }], commit: None })
}

/// A file as text; `-` is standard input.
fn text(path: &Path) -> Result<String, Failure> {
    let cannot =
        |why: String| Failure::usage(format!("cannot read {}: {why}; nothing was recorded", path.display()));
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().take(REPORT_BYTES_MAX + 1).read_to_end(&mut bytes)
    } else {
        let file = std::fs::File::open(path).map_err(|error| cannot(error.to_string()))?;
        file.take(REPORT_BYTES_MAX + 1).read_to_end(&mut bytes)
    };
    read.map_err(|error| cannot(error.to_string()))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > REPORT_BYTES_MAX {
        return Err(cannot(format!("it has more than {} MiB", REPORT_BYTES_MAX >> 20)));
    }
    String::from_utf8(bytes).map_err(|error| cannot(format!("it is no text: {error}")))
}

/// A note is of the release that it is given to; everything else was found out about a commit.
fn is_of_a_commit(report: &Report) -> bool {
    !report.facts.iter().all(|fact| matches!(fact, Fact::Note { .. }))
}

/// Refuses evidence that is about another commit: by what is said here, by what the reports say themselves, and where
/// nothing says it, by the commit that is checked out, since reports are made in a checkout.
fn check_commit(
    project: &Project,
    arguments: &EvidenceAdd,
    release: &Release,
    reports: &[(String, Report)],
) -> Result<(), Failure> {
    let stated = arguments.commit.iter().map(|commit| ("--commit", commit));
    let in_reports =
        reports.iter().filter_map(|(name, report)| Some((name.as_str(), report.commit.as_ref()?)));
    let refuse = |who: &str, commit: &str| {
        Failure::usage(format!(
            "{who} is about commit {}, and {} is of {}; nothing was recorded",
            short(commit),
            release.title(),
            short(&release.commit)
        ))
    };
    let mut is_said = false;
    for (who, commit) in stated.chain(in_reports) {
        is_said = true;
        let is_hash = commit.len() >= 7 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hash || !release.commit.starts_with(&commit.to_ascii_lowercase()) {
            return Err(refuse(who, commit)
                .help("add it to a release of that commit: `greenlight releases` lists them"));
        }
    }
    if is_said {
        return Ok(());
    }
    let source = &project.fleet.services.get(&release.service).map(|service| &service.source);
    let checked_out = match source {
        Some(source) => project
            .depot()?
            .repository(source, &project.directory)
            .and_then(|repository| greenlight_depot::head(&repository)),
        None => greenlight_depot::head(&project.directory),
    };
    let help = format!("say which commit the reports are of: --commit {}", short(&release.commit));
    match checked_out {
        Ok(commit) if commit == release.commit => Ok(()),
        Ok(commit) => Err(refuse("what is checked out here", &commit).help(help)),
        Err(error) => Err(Failure::from_error(Exit::Usage, &error).help(help)),
    }
}

fn short(commit: &str) -> String {
    commit.chars().take(10).collect()
}

/// Several files of one suite or tool are one run.
fn merged(facts: impl Iterator<Item = Fact>) -> Vec<Fact> {
    let mut merged: Vec<Fact> = Vec::new();
    for fact in facts {
        let is_added = merged.iter_mut().any(|before| add_to(before, &fact));
        if !is_added {
            merged.push(fact);
        }
    }
    merged
}

fn add_to(before: &mut Fact, more: &Fact) -> bool {
    match (before, more) {
        (
            Fact::Tests { suite, passed, skipped, failed, failures },
            Fact::Tests { suite: other, passed: p, skipped: s, failed: f, failures: names },
        ) if suite == other => {
            *passed = passed.saturating_add(*p);
            *skipped = skipped.saturating_add(*s);
            *failed = failed.saturating_add(*f);
            let room = FAILED_TESTS_MAX.saturating_sub(failures.len());
            failures.extend(names.iter().take(room).cloned());
            true
        }
        (Fact::Coverage { covered, lines }, Fact::Coverage { covered: c, lines: l }) => {
            *covered = covered.saturating_add(*c);
            *lines = lines.saturating_add(*l);
            true
        }
        (Fact::Lint { tool, findings }, Fact::Lint { tool: other, findings: found }) if tool == other => {
            for (text, count) in found {
                let sum = findings.entry(text.clone()).or_default();
                *sum = sum.saturating_add(*count);
            }
            true
        }
        _ => false,
    }
}

fn list(project: &Project, only: Option<&str>, printer: &Printer) -> Result<Exit, Failure> {
    let depot = project.depot()?;
    let services: Vec<&ServiceName> = project.fleet.services.keys().collect();
    let only = only.map(|text| releases::find(&depot, &services, text)).transpose()?;
    let log = project.log()?;
    let known = depot.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let title =
        |id| known.iter().find(|release| release.id == id).map_or_else(|| id.short(), |it| it.label.clone());
    let found: Vec<_> = log
        .history()
        .evidence
        .iter()
        .rev()
        .filter(|recorded| {
            only.as_ref().is_none_or(|only| recorded.evidence.releases.get(&only.service) == Some(&only.id))
        })
        .collect();
    let mut rows = vec![["RELEASE", "ENVIRONMENT", "KIND", "WHAT", "BY", "WHEN"].map(str::to_owned).to_vec()];
    for recorded in &found {
        let evidence = &recorded.evidence;
        let releases: Vec<String> = evidence
            .releases
            .iter()
            .map(|(service, release)| format!("{service}={}", title(*release)))
            .collect();
        rows.push(vec![
            releases.join(" "),
            evidence.environment.as_ref().map(ToString::to_string).unwrap_or_default(),
            evidence.fact.kind().to_owned(),
            evidence.fact.summary(),
            recorded.by.clone(),
            ago(recorded.at, clock::now()),
        ]);
    }
    if found.is_empty() {
        printer.progress("no evidence yet; `greenlight evidence add RELEASE --junit FILE` adds some");
    } else {
        table(&rows).iter().for_each(|row| printer.result(row));
    }
    printer.json("evidence list", json!({ "evidence": found }));
    Ok(Exit::Done)
}

/// `NAME=CODE`, for the arguments.
pub(crate) fn exit_code(text: &str) -> Result<(CheckName, i32), String> {
    let (name, code) = text.split_once('=').ok_or_else(|| "it is written NAME=CODE: unit=0".to_owned())?;
    let name = name.parse().map_err(|error: greenlight_model::id::InvalidId| error.to_string())?;
    let code = code.parse().map_err(|_| format!("`{code}` is no exit code"))?;
    Ok((name, code))
}
