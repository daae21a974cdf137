//! `hold`, `resume`, `abort`: what an operator asks of an open rollout. What is asked is a record; whichever controller
//! drives the rollout reads it. Where none does, `resume` and `abort` become the controller themselves.

use greenlight_controller::{ControllerLease, LeaseError};
use greenlight_model::id::{EnvironmentName, RolloutId, ServiceName};
use greenlight_model::migration::MigrationPhase;
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::{MigrationState, OperatorRequest, Rollout};
use greenlight_store::Log;
use serde_json::json;

use crate::args::{Abort, Global, Operator, Resume};
use crate::commands::{adopt, roll};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{Connected, Project};

pub(crate) fn hold(global: &Global, operator: &Operator, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let mut log = project.log()?;
    let rollout = open_rollout(&project, &log, &operator.environment)?;
    ask(&project, &mut log, &rollout, OperatorRequest::Hold, &operator.reason)?;
    printer.result(format!("{rollout} is held: what is under way ends, nothing new begins"));
    printer.progress(format!(
        "go on with `greenlight resume {0}`, go back with `greenlight abort {0}`",
        operator.environment
    ));
    printer.json("hold", json!({ "rollout": rollout }));
    Ok(Exit::Done)
}

pub(crate) fn resume(global: &Global, resume: &Resume, printer: &Printer) -> Result<Exit, Failure> {
    take_over(global, &resume.operator, OperatorRequest::Resume, &resume.migration_done, printer)
}

pub(crate) fn abort(global: &Global, abort: &Abort, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let mut log = project.log()?;
    let name = &abort.operator.environment;
    if let Some(why) = &abort.database_restored {
        project.environment(name)?;
        restored(&project, &mut log, name, why)?;
    }
    let open = log.history().open_rollout(name);
    if let Some((id, loss)) = open.and_then(|open| Some((&open.plan.id, open.lost()?))) {
        return Err(Failure::new(
            Exit::Held,
            format!(
                "{id} cannot go back with the code alone: its migration took away from the database what older code may need: {loss}; \
                 nothing was changed"
            ),
        )
        .help(format!(
            "mend it and go on with `greenlight resume {name}`; or put the database back from its backup, and then `greenlight abort \
             {name} --database-restored REASON`"
        )));
    }
    take_over(global, &abort.operator, OperatorRequest::Abort, &[], printer)
}

fn take_over(
    global: &Global,
    operator: &Operator,
    request: OperatorRequest,
    migrations_done: &[ServiceName],
    printer: &Printer,
) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&operator.environment)?;
    let connected = Connected::new(&project, environment)?;
    let mut log = project.log()?;
    let rollout = match log.history().open_rollout(&operator.environment) {
        Some(open) => open.plan.id.clone(),
        None => adopt::take_over(&connected, &mut log, request, printer)?
            .ok_or_else(|| none_is_open(&operator.environment))?,
    };
    for service in migrations_done {
        settle(&project, &mut log, &rollout, service, &operator.reason)?;
    }
    ask(&project, &mut log, &rollout, request, &operator.reason)?;
    match ControllerLease::take(&project.state_directory()?, &operator.environment) {
        Ok(lease) => {
            let is_way_back = request == OperatorRequest::Abort
                || log.history().rollouts.get(&rollout).is_some_and(Rollout::is_turning_back);
            let artifacts = match is_way_back {
                true => project.artifacts_for_the_way_back(environment, printer)?,
                false => project.artifacts(environment)?,
            };
            roll::run(connected, log, &rollout, artifacts, lease, printer)
        }
        Err(LeaseError::Taken { pid, .. }) => {
            let does = if request == OperatorRequest::Abort { "turns back" } else { "goes on" };
            printer.result(format!("{rollout}: the controller that drives it (process {pid}) {does}"));
            printer.progress(format!("follow it with `greenlight status {}`", operator.environment));
            printer.json("operate", json!({ "rollout": rollout, "controller": pid }));
            Ok(Exit::Done)
        }
        Err(error) => Err(Failure::from_error(Exit::Failed, &error)),
    }
}

/// Records that a database is as it was before its migrations.
pub(crate) fn restored(
    project: &Project,
    log: &mut Log,
    environment: &EnvironmentName,
    why: &str,
) -> Result<(), Failure> {
    if why.trim().is_empty() {
        return Err(Failure::usage("say from what the database was put back"));
    }
    let body = RecordBody::DatabaseRestored { environment: environment.clone(), why: why.to_owned() };
    append(project, log, &body)
}

/// Records that a migration is done, which only makes sense where that is not known.
fn settle(
    project: &Project,
    log: &mut Log,
    rollout: &RolloutId,
    service: &ServiceName,
    why: &str,
) -> Result<(), Failure> {
    let folded = log.history().rollouts.get(rollout);
    // What comes last is what it is held for, where both parts were begun.
    let phase = match folded.is_some_and(|folded| folded.contractions.contains_key(service)) {
        true => MigrationPhase::Contract,
        false => MigrationPhase::Expand,
    };
    match folded.and_then(|folded| folded.migrations(phase).get(service)) {
        Some(MigrationState::Begun) => {}
        // Everything runs the release: a person may have finished by hand what is left.
        Some(MigrationState::Failed) if phase == MigrationPhase::Contract => {}
        Some(MigrationState::Done) => return Ok(()),
        Some(MigrationState::Failed) => {
            return Err(Failure::usage(format!(
                "the migration of {service} failed in {rollout}, so it is not done"
            ))
            .help("go back, mend it, and deploy again"));
        }
        // Another rollout of the same release began it: this one holds for that.
        None if folded
            .is_some_and(|folded| folded.held.is_some() && folded.plan.targets.contains_key(service)) => {}
        None => {
            return Err(Failure::usage(format!("no migration of {service} was begun in {rollout}"))
                .help("see what it waits for: greenlight status"));
        }
    }
    let (rollout, service, why) = (rollout.clone(), service.clone(), why.to_owned());
    append(project, log, &RecordBody::MigrationDone { rollout, service, phase, why })
}

/// The rollout of the environment that has not ended.
pub(crate) fn open_rollout(
    project: &Project,
    log: &Log,
    name: &EnvironmentName,
) -> Result<RolloutId, Failure> {
    project.environment(name)?;
    let open = log.history().open_rollout(name).map(|rollout| rollout.plan.id.clone());
    open.ok_or_else(|| none_is_open(name))
}

fn none_is_open(name: &EnvironmentName) -> Failure {
    Failure::usage(format!("no rollout of {name} is open"))
        .help(format!("`greenlight history {name}` lists those that ended"))
}

fn ask(
    project: &Project,
    log: &mut Log,
    rollout: &RolloutId,
    request: OperatorRequest,
    why: &str,
) -> Result<(), Failure> {
    let body = RecordBody::OperatorAsked { rollout: rollout.clone(), request, why: why.to_owned() };
    append(project, log, &body)
}

/// Writes one record, after whatever others wrote meanwhile.
pub(crate) fn append(project: &Project, log: &mut Log, body: &RecordBody) -> Result<(), Failure> {
    greenlight_controller::append(log, &project.by, body)
        .map_err(|error| Failure::from_error(Exit::Failed, &error))
}
