//! `gates`, `approve`, `tick`, `override`: the lights on the way into an environment, and what people do about them.

use std::collections::BTreeMap;

use greenlight_controller::{Prepared, clock, rollout_gates};
use greenlight_model::evidence::{Evidence, Fact, TEXT_CHARACTERS_MAX};
use greenlight_model::fleet::Environment;
use greenlight_model::gate::{holds, user};
use greenlight_model::id::{PlanDigest, ReleaseId, RoleName, ServiceName};
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::Direction;
use greenlight_model::world::{Gate, Light};
use greenlight_store::Log;
use owo_colors::OwoColorize;
use serde_json::json;

use crate::args::{Approve, Confirm, Gates, Global, Override, Overrides, Targets, Tick};
use crate::commands::deploy;
use crate::commands::operate::append;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{Connected, Project};

pub(crate) fn gates(global: &Global, arguments: &Gates, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&arguments.targets.environment)?;
    let connected = Connected::new(&project, environment)?;
    let mut log = project.log()?;
    let (targets, digest, gates) = match log.history().open_rollout(&environment.name).cloned() {
        Some(open) => {
            look(&connected, &mut log, &open.plan.targets)?;
            printer.progress(format!("{} is open; these are its lights", open.plan.id));
            (open.plan.targets.clone(), open.plan.digest, of_open(&connected, &log)?)
        }
        None => {
            let targets =
                deploy::targets(&project, environment, &arguments.targets, Direction::Forward, printer)?;
            look(&connected, &mut log, &targets)?;
            let prepared = deploy::preview(
                &connected,
                &log,
                targets.clone(),
                &arguments.targets,
                Direction::Forward,
                false,
            )?;
            (targets, prepared.plan.digest, prepared.world.gates)
        }
    };
    for gate in &gates {
        printer.result(line(gate));
    }
    if gates.is_empty() {
        printer.progress(format!("{} has no gates; [environment.{0}.gate] states them", environment.name));
    }
    let body =
        json!({ "environment": environment.name, "targets": targets, "digest": digest, "gates": gates });
    printer.json("gates", body);
    Ok(if gates.iter().all(is_green) { Exit::Done } else { Exit::Held })
}

pub(crate) fn approve(global: &Global, arguments: &Approve, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&arguments.targets.environment)?;
    let connected = Connected::new(&project, environment)?;
    let mut log = project.log()?;
    let role = approving_role(&project, environment, arguments.role.as_ref())?;
    let prepared = prepare(&connected, &log, &arguments.targets, printer)?;
    refuse_own_doing(&project, environment, &role, &prepared)?;
    deploy::show(&prepared, Direction::Forward, printer, true);
    let Some(digest) = prepared.plan.digest else {
        return Err(Failure::new(Exit::Failed, "the plan has no digest, so nothing can be approved"));
    };
    if let Some(expected) = &arguments.digest
        && !digest.to_string().starts_with(expected.as_str())
    {
        return Err(Failure::new(
            Exit::Held,
            format!("the plan is {} now; nothing was approved", digest.short()),
        )
        .help("look at it again, and approve that one"));
    }
    if !deploy::is_agreed(arguments.yes, "approve this plan?", printer)? {
        return Err(Failure::new(Exit::Held, "nothing was approved"));
    }
    let fact = Fact::Approval { role: role.clone(), plan: prepared.preview.digest_text() };
    record(&project, environment, &mut log, &prepared.plan.targets, Some(digest), fact)?;
    let again = prepare(&connected, &log, &arguments.targets, printer)?;
    let name = format!("approval {role}");
    let light = again.world.gates.iter().find(|gate| gate.name == name);
    printer.result(format!("{} approved plan {} as {role}", project.by, digest.short()));
    light.into_iter().for_each(|gate| printer.result(line(gate)));
    printer.json(
        "approve",
        json!({ "environment": environment.name, "targets": prepared.plan.targets, "digest": digest, "role": role, "gate": light }),
    );
    Ok(Exit::Done)
}

pub(crate) fn tick(global: &Global, arguments: &Tick, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&arguments.environment)?;
    check_text("a note", &arguments.note, 0)?;
    let Some(list) = &environment.gates.checklist else {
        return Err(Failure::usage(format!("{} has no checklist", environment.name)).help(format!(
            "state it: [environment.{}.gate] checklist = {{ required = [\"…\"] }}",
            environment.name
        )));
    };
    let items: Vec<&String> = list.required.iter().chain(&list.optional).collect();
    if !items.contains(&&arguments.item) {
        let known: Vec<String> = items.iter().map(|item| format!("\"{item}\"")).collect();
        return Err(Failure::usage(format!("the checklist has no item \"{}\"", arguments.item))
            .help(format!("it has {}", known.join(", "))));
    }
    let mut log = project.log()?;
    let targets = targets(&project, environment, &log, &arguments.releases, printer)?;
    let fact = Fact::Tick { item: arguments.item.clone(), note: arguments.note.clone() };
    record(&project, environment, &mut log, &targets, None, fact)?;
    printer.result(format!("ticked: {}", arguments.item));
    printer
        .json("tick", json!({ "environment": environment.name, "targets": targets, "item": arguments.item }));
    Ok(Exit::Done)
}

/// Agrees to what the migrations of these releases take away, as it is shown now.
pub(crate) fn confirm(global: &Global, arguments: &Confirm, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&arguments.environment)?;
    check_text("a reason", &arguments.reason, 1)?;
    let connected = Connected::new(&project, environment)?;
    let mut log = project.log()?;
    let open = log.history().open_rollout(&environment.name).map(|open| open.plan.clone());
    let plan = match open {
        Some(plan) => plan,
        None => {
            let wanted = Targets {
                environment: arguments.environment.clone(),
                releases: arguments.releases.clone(),
                services: Vec::new(),
                hosts: Vec::new(),
                overrides: Overrides::default(),
            };
            prepare(&connected, &log, &wanted, printer)?.plan
        }
    };
    let losses: Vec<String> = plan.losses.iter().map(ToString::to_string).collect();
    if losses.is_empty() {
        return Err(Failure::usage("the migrations of these releases take nothing away that is known of")
            .help(format!("see what a rollout would do: greenlight plan {}", environment.name)));
    }
    let fact = Fact::Losses { losses: losses.clone(), why: arguments.reason.clone() };
    record(&project, environment, &mut log, &plan.targets, None, fact)?;
    for loss in &losses {
        printer.result(format!("agreed: {loss}"));
    }
    let body = json!({ "environment": environment.name, "targets": plan.targets, "losses": plan.losses, "reason": arguments.reason });
    printer.json("confirm", body);
    Ok(Exit::Done)
}

pub(crate) fn override_gate(
    global: &Global,
    arguments: &Override,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&arguments.environment)?;
    check_text("a reason", &arguments.reason, 1)?;
    let connected = Connected::new(&project, environment)?;
    let mut log = project.log()?;
    let wanted = Targets {
        environment: arguments.environment.clone(),
        releases: arguments.releases.clone(),
        services: Vec::new(),
        hosts: Vec::new(),
        overrides: Overrides::default(),
    };
    let (targets, gates) = match log.history().open_rollout(&environment.name).cloned() {
        Some(open) => (open.plan.targets, of_open(&connected, &log)?),
        None => {
            let prepared = prepare(&connected, &log, &wanted, printer)?;
            (prepared.plan.targets, prepared.world.gates)
        }
    };
    let Some(gate) = gates.iter().find(|gate| gate.name == arguments.gate) else {
        let known: Vec<String> = gates.iter().map(|gate| format!("\"{}\"", gate.name)).collect();
        return Err(Failure::usage(format!("{} has no gate \"{}\"", environment.name, arguments.gate)).help(
            if known.is_empty() {
                "it has no gates at all".to_owned()
            } else {
                format!("it has {}", known.join(", "))
            },
        ));
    };
    if is_green(gate) {
        return Err(Failure::usage(format!("the gate {} is green already", gate.name)).help(line(gate)));
    }
    let fact = Fact::Override { gate: gate.name.clone(), why: arguments.reason.clone() };
    record(&project, environment, &mut log, &targets, None, fact)?;
    printer.result(format!("{} is overridden for these releases in {}", gate.name, environment.name));
    printer.progress("it stands in the report of the rollout as a debt");
    let body = json!({ "environment": environment.name, "targets": targets, "gate": gate.name, "reason": arguments.reason });
    printer.json("override", body);
    Ok(Exit::Done)
}

/// A gate with its light, for a line of its own.
pub(crate) fn line(gate: &Gate) -> String {
    let (light, why) = match &gate.light {
        Light::Green { why } => ("green".green().to_string(), why),
        Light::Amber { why } => ("amber".yellow().to_string(), why),
        Light::Red { why } => ("red".red().to_string(), why),
    };
    format!("gate {}: {light}, {why}", gate.name)
}

pub(crate) fn is_green(gate: &Gate) -> bool {
    matches!(gate.light, Light::Green { .. })
}

/// Runs the commands and makes the probes of the environment's gates, and records what came of them.
pub(crate) fn look(
    connected: &Connected<'_>,
    log: &mut Log,
    targets: &BTreeMap<ServiceName, ReleaseId>,
) -> Result<(), Failure> {
    let Connected { project, environment, .. } = connected;
    if !environment.gates.look() {
        return Ok(());
    }
    let looks = greenlight_controller::look(&environment.name, &environment.gates, &project.directory);
    for fact in connected.block_on(looks) {
        record(project, environment, log, targets, None, fact)?;
    }
    Ok(())
}

/// Records a fact about these releases in this environment.
fn record(
    project: &Project,
    environment: &Environment,
    log: &mut Log,
    targets: &BTreeMap<ServiceName, ReleaseId>,
    digest: Option<PlanDigest>,
    fact: Fact,
) -> Result<(), Failure> {
    let evidence =
        Evidence { releases: targets.clone(), environment: Some(environment.name.clone()), digest, fact };
    append(project, log, &RecordBody::EvidenceAdded { evidence })
}

fn prepare(
    connected: &Connected<'_>,
    log: &Log,
    wanted: &Targets,
    printer: &Printer,
) -> Result<Prepared, Failure> {
    let targets =
        deploy::targets(connected.project, connected.environment, wanted, Direction::Forward, printer)?;
    deploy::preview(connected, log, targets, wanted, Direction::Forward, false)
}

/// The lights of the open rollout.
fn of_open(connected: &Connected<'_>, log: &Log) -> Result<Vec<Gate>, Failure> {
    let Connected { project, environment, .. } = connected;
    let Some(open) = log.history().open_rollout(&environment.name) else { return Ok(Vec::new()) };
    let releases = project.depot()?.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let (_, gathered) = connected.block_on(connected.gather(log));
    let now = clock::now();
    Ok(rollout_gates(&project.fleet, environment, log.history(), open, &releases, &gathered.traffic, now))
}

/// The releases that are meant: those of the open rollout, else those named, else what `deploy` would bring.
fn targets(
    project: &Project,
    environment: &Environment,
    log: &Log,
    releases: &[String],
    printer: &Printer,
) -> Result<BTreeMap<ServiceName, ReleaseId>, Failure> {
    if let (Some(open), []) = (log.history().open_rollout(&environment.name), releases) {
        return Ok(open.plan.targets.clone());
    }
    let wanted = Targets {
        environment: environment.name.clone(),
        releases: releases.to_vec(),
        services: Vec::new(),
        hosts: Vec::new(),
        overrides: Overrides::default(),
    };
    deploy::targets(project, environment, &wanted, Direction::Forward, printer)
}

/// The role that an approval is given in: the one named, else the only one that is asked for and that they hold.
fn approving_role(
    project: &Project,
    environment: &Environment,
    named: Option<&RoleName>,
) -> Result<RoleName, Failure> {
    let asked: Vec<&RoleName> = environment.gates.approvals.iter().map(|gate| &gate.role).collect();
    let listed = || asked.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ");
    if asked.is_empty() {
        return Err(Failure::usage(format!("{} asks for no approval", environment.name)));
    }
    if let Some(role) = named
        && !asked.contains(&role)
    {
        return Err(Failure::usage(format!("{} asks for no approval by role {role}", environment.name))
            .help(format!("it asks for {}", listed())));
    }
    let is_meant = |role: &&&RoleName| named.is_none_or(|named| named == **role);
    let held: Vec<&&RoleName> =
        asked.iter().filter(is_meant).filter(|role| holds(&project.fleet.roles, role, &project.by)).collect();
    match held[..] {
        [role] => Ok((*role).clone()),
        [] => {
            let wanted = named.map_or_else(listed, ToString::to_string);
            Err(Failure::new(
                Exit::Held,
                format!("{} does not hold the role {wanted}; nothing was approved", project.by),
            )
            .help(format!("who holds it stands in `[role]` of the fleet file: {}", members(project, &asked))))
        }
        _ => Err(Failure::usage("you hold several of the roles that are asked for")
            .help(format!("say which: --role {}", listed()))),
    }
}

fn members(project: &Project, roles: &[&RoleName]) -> String {
    let all: Vec<String> = roles
        .iter()
        .map(|role| {
            let members = project.fleet.roles.get(*role);
            let members: Vec<&str> = members.into_iter().flatten().map(String::as_str).collect();
            format!("{role}: {}", members.join(", "))
        })
        .collect();
    all.join("; ")
}

/// Who built a release cannot be the second pair of eyes on it.
fn refuse_own_doing(
    project: &Project,
    environment: &Environment,
    role: &RoleName,
    prepared: &Prepared,
) -> Result<(), Failure> {
    let four_eyes = environment.gates.approvals.iter().any(|gate| gate.role == *role && gate.four_eyes);
    if !four_eyes {
        return Ok(());
    }
    let releases = project.depot()?.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let own = releases.iter().find(|release| {
        prepared.plan.targets.get(&release.service) == Some(&release.id)
            && user(&release.built_by) == user(&project.by)
    });
    match own {
        None => Ok(()),
        Some(release) => Err(Failure::new(
            Exit::Held,
            format!(
                "{} built {}, and four eyes are asked for; nothing was approved",
                project.by,
                release.title()
            ),
        )
        .help(format!("another {role} approves it"))),
    }
}

pub(crate) fn check_text(what: &str, text: &str, least: usize) -> Result<(), Failure> {
    let count = text.trim().chars().count();
    if count < least || count > TEXT_CHARACTERS_MAX {
        return Err(Failure::usage(format!(
            "{what} has {least} to {TEXT_CHARACTERS_MAX} characters, and this one {count}"
        )));
    }
    Ok(())
}
