//! `issue` and `action`: what people saw around a deployment, and what they have to do, with or without a green light.

use greenlight_model::evidence::TEXT_CHARACTERS_MAX;
use greenlight_model::gate::{holds, user};
use greenlight_model::id::RoleName;
use greenlight_model::journal::{Entry, Journal, Task};
use greenlight_model::record::RecordBody;
use greenlight_store::Log;
use serde_json::json;

use crate::args::{Global, Issue, IssueAction, IssueAdd, TaskAction, TaskAdd, Tasks};
use crate::commands::operate::append;
use crate::describe::table;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

pub(crate) fn issue(global: &Global, arguments: &Issue, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    match &arguments.action {
        IssueAction::Add(add) => add_issue(&project, add, printer),
        IssueAction::Resolve { issue, how } => {
            check_text(how)?;
            write(&project, Entry::IssueResolved { issue: *issue, how: how.clone() })?;
            printer.result(format!("issue {issue} is resolved: {how}"));
            printer.json("issue", json!({ "issue": issue }));
            Ok(Exit::Done)
        }
    }
}

fn add_issue(project: &Project, add: &IssueAdd, printer: &Printer) -> Result<Exit, Failure> {
    project.environment(&add.environment)?;
    check_text(&add.what)?;
    let rollout = {
        let log = project.log()?;
        let history = log.history();
        match &add.rollout {
            Some(id) if !history.rollouts.contains_key(id) => {
                return Err(Failure::usage(format!("there is no rollout {id}"))
                    .help("`greenlight history` lists them"));
            }
            Some(id) => Some(id.clone()),
            // What is seen now belongs to the rollout that is open, or was the last.
            None => history.of_environment(&add.environment).next().map(|rollout| rollout.plan.id.clone()),
        }
    };
    let entry = Entry::IssueOpened {
        environment: add.environment.clone(),
        rollout,
        section: add.section.into(),
        what: add.what.clone(),
        impact: add.impact.into(),
    };
    let number = write(project, entry)?;
    printer.result(format!("issue {number} is noted"));
    printer.json("issue", json!({ "issue": number }));
    Ok(Exit::Done)
}

pub(crate) fn action(global: &Global, arguments: &Tasks, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    match &arguments.action {
        TaskAction::Add(add) => add_task(&project, add, printer),
        TaskAction::Light { action } => light(&project, *action, printer),
        TaskAction::Done { action, note } => done(&project, *action, note, printer),
        TaskAction::List => list(&project, printer),
    }
}

fn add_task(project: &Project, add: &TaskAdd, printer: &Printer) -> Result<Exit, Failure> {
    project.environment(&add.environment)?;
    check_text(&add.what)?;
    check_text(&add.owner)?;
    if let Some(role) = &add.waits_for
        && !project.fleet.roles.contains_key(role)
    {
        return Err(Failure::usage(format!(
            "nobody holds the role {role}, so its light could never turn green"
        ))
        .help(format!("`[role]` of the fleet file has {}", roles(project))));
    }
    let entry = Entry::ActionAdded {
        environment: add.environment.clone(),
        what: add.what.clone(),
        owner: add.owner.clone(),
        waits_for: add.waits_for.clone(),
        condition: add.condition.clone(),
        issue: add.issue,
    };
    let number = write(project, entry)?;
    let waits = match &add.waits_for {
        Some(role) => format!("; it waits for the green light of {role}: greenlight action light {number}"),
        None => String::new(),
    };
    printer.result(format!("action {number} is for {}{waits}", add.owner));
    printer.json("action", json!({ "action": number }));
    Ok(Exit::Done)
}

fn light(project: &Project, number: u64, printer: &Printer) -> Result<Exit, Failure> {
    let log = project.log()?;
    let task = task(&log.history().journal, number)?;
    if let Some(role) = &task.waits_for
        && !holds(&project.fleet.roles, role, &project.by)
    {
        return Err(Failure::new(
            Exit::Held,
            format!(
                "the light of action {number} is for {role} to give, and {} is none; nothing was changed",
                project.by
            ),
        )
        .help(format!("`[role]` says who is: {}", members(project, role))));
    }
    write(project, Entry::ActionLit { action: number })?;
    printer.result(format!("action {number} has its green light; {} may do it", task.owner));
    printer.json("action", json!({ "action": number }));
    Ok(Exit::Done)
}

fn done(project: &Project, number: u64, note: &str, printer: &Printer) -> Result<Exit, Failure> {
    let log = project.log()?;
    let task = task(&log.history().journal, number)?;
    let is_owner = user(&project.by) == task.owner
        || project.by == task.owner
        || task.owner.parse().is_ok_and(|role: RoleName| holds(&project.fleet.roles, &role, &project.by));
    if !is_owner {
        return Err(Failure::new(
            Exit::Held,
            format!(
                "action {number} is for {} to do, not for {}; nothing was changed",
                task.owner, project.by
            ),
        ));
    }
    write(project, Entry::ActionDone { action: number, note: note.to_owned() })?;
    printer.result(format!("action {number} is done: {}", task.what));
    printer.json("action", json!({ "action": number }));
    Ok(Exit::Done)
}

fn list(project: &Project, printer: &Printer) -> Result<Exit, Failure> {
    let log = project.log()?;
    let journal = &log.history().journal;
    let mut rows = vec![["ACTION", "ENVIRONMENT", "OWNER", "STATE", "WHAT"].map(str::to_owned).to_vec()];
    for (number, task) in &journal.tasks {
        rows.push(vec![
            number.to_string(),
            task.environment.to_string(),
            task.owner.clone(),
            state(task),
            task.what.clone(),
        ]);
    }
    if journal.tasks.is_empty() {
        printer.progress("no actions");
    } else {
        table(&rows).iter().for_each(|row| printer.result(row));
    }
    printer.json("action list", json!({ "actions": journal.tasks }));
    Ok(Exit::Done)
}

/// How far an action is, in a few words.
pub(crate) fn state(task: &Task) -> String {
    match (&task.done, &task.waits_for, &task.lit) {
        (Some((_, signature)), _, _) => format!("done by {}", signature.by),
        (None, Some(role), None) => format!("waits for the light of {role}"),
        (None, Some(_), Some(signature)) => format!("green light by {}", signature.by),
        (None, None, _) => "to be done".to_owned(),
    }
}

/// Writes an entry and returns its record's number. What cannot follow is refused with its own sentence.
fn write(project: &Project, entry: Entry) -> Result<u64, Failure> {
    let mut log = project.log()?;
    judge(&log, &entry)?;
    append(project, &mut log, &RecordBody::Journal { entry })?;
    Ok(log.history().last_seq)
}

/// What the log would refuse, said as what it is: an early step, not a failure of the log.
fn judge(log: &Log, entry: &Entry) -> Result<(), Failure> {
    let signature =
        greenlight_model::journal::Signature { by: String::new(), at: greenlight_controller::clock::now() };
    let mut journal = log.history().journal.clone();
    journal.apply(log.history().last_seq + 1, entry, signature).map_err(|error| {
        let exit = match error {
            greenlight_model::journal::IllegalEntry::NoLight { .. } => Exit::Held,
            _ => Exit::Usage,
        };
        Failure::from_error(exit, &error)
    })
}

fn task(journal: &Journal, number: u64) -> Result<Task, Failure> {
    journal.tasks.get(&number).cloned().ok_or_else(|| {
        Failure::usage(format!("there is no action {number}")).help("`greenlight action list` lists them")
    })
}

fn roles(project: &Project) -> String {
    project.fleet.roles.keys().map(RoleName::as_str).collect::<Vec<_>>().join(", ")
}

fn members(project: &Project, role: &RoleName) -> String {
    let members = project.fleet.roles.get(role);
    members.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn check_text(text: &str) -> Result<(), Failure> {
    let count = text.trim().chars().count();
    if count == 0 || count > TEXT_CHARACTERS_MAX {
        return Err(Failure::usage(format!(
            "a text has 1 to {TEXT_CHARACTERS_MAX} characters, and this one {count}"
        )));
    }
    Ok(())
}
