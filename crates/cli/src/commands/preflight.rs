//! `preflight`: every check on every host, as one table, before anything changes; the same for `plan`, and for what stopped a
//! rollout.

use greenlight_controller::{Looked, Prepared};
use greenlight_model::action::ActionResult;
use greenlight_model::check::{Check, CheckOutcome, Uneven, uneven};
use greenlight_model::id::{Instance, RolloutId};
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::Direction;
use owo_colors::OwoColorize;
use serde_json::{Value, json};

use crate::args::{Global, Preflight};
use crate::commands::deploy;
use crate::describe::{self, table};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{Connected, Project};

pub(crate) fn run(global: &Global, arguments: &Preflight, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&arguments.targets.environment)?;
    let connected = Connected::new(&project, environment)?;
    let log = project.log()?;
    let targets = deploy::targets(&project, environment, &arguments.targets, Direction::Forward, printer)?;
    let prepared = deploy::preview(&connected, &log, targets, &arguments.targets, Direction::Forward, false)?;
    let looked = look(&connected, &prepared, printer)?;
    show("preflight", &looked, Rows::All, printer);
    let body = json!({
        "environment": environment.name,
        "targets": prepared.plan.targets,
        "checks": document(&looked),
    });
    printer.json("preflight", body);
    Ok(if looked.is_well() { Exit::Done } else { Exit::Failed })
}

/// What stands in the way of a plan: on its hosts, between them, and at its balancers.
pub(crate) struct Findings {
    pub(crate) instances: Vec<Looked>,
    pub(crate) uneven: Vec<Uneven>,
    pub(crate) objections: Vec<String>,
}

impl Findings {
    pub(crate) fn is_well(&self) -> bool {
        let failed = |check: &Check| check.outcome == CheckOutcome::Failed;
        self.uneven.is_empty()
            && self.objections.is_empty()
            && !self.instances.iter().flat_map(|looked| &looked.checks).any(failed)
    }
}

/// Which checks are shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    All,
    /// Only those that failed, overridden ones among them.
    Failing,
}

/// Looks at every instance of a plan, all at once.
pub(crate) fn look(
    connected: &Connected<'_>,
    prepared: &Prepared,
    printer: &Printer,
) -> Result<Findings, Failure> {
    let Connected { project, environment, .. } = connected;
    let releases = project.depot()?.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let secrets = match prepared.plan.direction {
        Direction::Forward => project.secrets_to_reach(environment, printer),
        Direction::Back => Default::default(),
    };
    let instances = connected.block_on(greenlight_controller::preflight(
        connected.hosts(),
        environment,
        &prepared.plan,
        &prepared.services,
        &releases,
        &secrets,
    ));
    let is_compared =
        |instance: &Instance, check: &Check| prepared.plan.override_of(&instance.host, &check.name).is_none();
    Ok(Findings {
        uneven: uneven_among(&instances, is_compared),
        instances,
        objections: greenlight_planner::objections(&prepared.world),
    })
}

/// What the hosts of a service have at different versions, of the checks that are compared.
pub(crate) fn uneven_among(
    instances: &[Looked],
    is_compared: impl Fn(&Instance, &Check) -> bool,
) -> Vec<Uneven> {
    let versions = instances
        .iter()
        .map(|Looked { instance, checks }| {
            let compared = checks.iter().filter(|check| is_compared(instance, check));
            let found = compared.filter_map(|check| Some((check.name.clone(), check.version.clone()?)));
            (instance.clone(), found.collect())
        })
        .collect();
    uneven(&versions)
}

/// The table, with how to mend it below each row that failed.
pub(crate) fn show(title: &str, findings: &Findings, rows: Rows, printer: &Printer) {
    let all = findings
        .instances
        .iter()
        .flat_map(|looked| looked.checks.iter().map(move |check| (&looked.instance, check)));
    let is_shown = |check: &Check| rows == Rows::All || check.outcome != CheckOutcome::Passed;
    print(all.clone().filter(|(_, check)| is_shown(check)), printer);
    for uneven in &findings.uneven {
        printer.result(format!(
            "  {} {}: not the same version everywhere: {uneven}",
            "failed".red(),
            uneven.service
        ));
    }
    for objection in &findings.objections {
        printer.result(format!("  {} {objection}", "failed".red()));
    }
    let count = |outcome: CheckOutcome| all.clone().filter(|(_, check)| check.outcome == outcome).count();
    let failed = count(CheckOutcome::Failed) + findings.uneven.len() + findings.objections.len();
    let hosts = findings.instances.len();
    let ending = match (failed, count(CheckOutcome::Overridden)) {
        (0, 0) => "all passed".green().to_string(),
        (0, overridden) => format!("{overridden} overridden, the others passed"),
        (failed, 0) => format!("{failed} failed").red().to_string(),
        (failed, overridden) => format!("{}, {overridden} overridden", format!("{failed} failed").red()),
    };
    let instances = if hosts == 1 { "instance" } else { "instances" };
    printer.result(format!("  {title}: {} checks on {hosts} {instances}, {ending}", all.count()));
}

fn print<'a>(rows: impl Iterator<Item = (&'a Instance, &'a Check)> + Clone, printer: &Printer) {
    let cells: Vec<Vec<String>> = rows
        .clone()
        .map(|(instance, check)| {
            vec![
                format!("  {}", word(check.outcome)),
                instance.to_string(),
                check.name.clone(),
                format!("expected {}", check.expected),
                // Below its row when it is a sentence of its own.
                if is_long(check) { String::new() } else { format!("found {}", check.found) },
            ]
        })
        .collect();
    for (line, (instance, check)) in table(&cells).iter().zip(rows) {
        printer.result(line);
        if is_long(check) {
            printer.result(format!("      found {}", describe::silence(&instance.host, &check.found)));
        }
        if !check.mend.is_empty() {
            printer.result(format!("      {} {}", "to mend:".bold(), check.mend));
        }
    }
}

/// A cell that would push the others off the screen.
fn is_long(check: &Check) -> bool {
    check.found.chars().count() > 60 || check.found.contains('\n')
}

fn word(outcome: CheckOutcome) -> String {
    match outcome {
        CheckOutcome::Passed => "passed".green().to_string(),
        CheckOutcome::Failed => "failed".red().to_string(),
        CheckOutcome::Overridden => "overridden".yellow().to_string(),
    }
}

/// The same as data.
pub(crate) fn document(findings: &Findings) -> Value {
    let instances: Vec<Value> = findings
        .instances
        .iter()
        .map(|Looked { instance, checks }| json!({ "instance": instance, "checks": checks }))
        .collect();
    let uneven: Vec<Value> = findings
        .uneven
        .iter()
        .map(|uneven| {
            let versions: Vec<Value> = uneven
                .versions
                .iter()
                .map(|(version, hosts)| json!({ "version": version, "hosts": hosts }))
                .collect();
            json!({ "service": uneven.service, "check": uneven.check, "versions": versions })
        })
        .collect();
    json!({ "instances": instances, "uneven": uneven, "objections": findings.objections, "passed": findings.is_well() })
}

/// What stopped a rollout before it changed anything, as the table of its records; nothing when nothing did.
pub(crate) fn show_recorded(
    project: &Project,
    rollout: &RolloutId,
    printer: &Printer,
) -> Result<(), Failure> {
    let log = project.log()?;
    let failed = |error| Failure::from_error(Exit::Failed, &error);
    let Some(folded) = log.history().rollouts.get(rollout) else { return Ok(()) };
    if !matches!(folded.outcome, Some(greenlight_model::decision::Outcome::Refused { .. })) {
        return Ok(());
    }
    let records = log.read_from(1).map_err(failed)?;
    let mut rows: Vec<(Instance, Check)> = Vec::new();
    for record in records {
        let RecordBody::ActionFinished { rollout: of, action, result, detail } = record.body else {
            continue;
        };
        if of != *rollout || !matches!(result, ActionResult::Failed { .. }) {
            continue;
        }
        // The last look at an instance counts.
        rows.retain(|(instance, _)| instance != action.instance());
        let checks = detail.checks.into_iter().filter(|check| check.outcome != CheckOutcome::Passed);
        rows.extend(checks.map(|check| (action.instance().clone(), check)));
    }
    rows.sort_by(|(one, _), (other, _)| one.cmp(other));
    print(rows.iter().map(|(instance, check)| (instance, check)), printer);
    Ok(())
}
