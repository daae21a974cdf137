//! `plan`, `deploy` and `rollback`: one way from what was asked for to a plan, shown; then, if wanted, carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};

use greenlight_controller::{ControllerLease, PrepareError, Prepared, Wanted, clock, prepare};
use greenlight_depot::Depot;
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::fleet::Environment;
use greenlight_model::id::{HostName, Instance, ReleaseId, RolloutId, ServiceName};
use greenlight_model::quantity::human_duration;
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::Direction;
use greenlight_model::world::{Light, World};
use greenlight_store::Log;
use owo_colors::OwoColorize;
use serde_json::json;

use crate::args::{Consent, Deploy, Global, Plan, Rollback, Targets};
use crate::commands::operate::append;
use crate::commands::{build, releases, roll};
use crate::describe;
use crate::failure::{Exit, Failure};
use crate::printer::{Printer, Verbosity};
use crate::project::{Connected, Project};

pub(crate) fn plan(global: &Global, plan: &Plan, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let consent = Consent { yes: false, dry_run: true };
    start(&project, &plan.targets, Direction::Forward, consent, printer)
}

pub(crate) fn deploy(global: &Global, deploy: &Deploy, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    start(&project, &deploy.targets, Direction::Forward, deploy.consent, printer)
}

pub(crate) fn rollback(global: &Global, rollback: &Rollback, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    start(&project, &rollback.targets, Direction::Back, rollback.consent, printer)
}

fn start(
    project: &Project,
    wanted: &Targets,
    direction: Direction,
    consent: Consent,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let environment = project.environment(&wanted.environment)?;
    let depot = project.depot()?;
    let mut log = project.log()?;
    let lease = if consent.dry_run { None } else { Some(lease(project, environment)?) };
    let targets = match direction {
        Direction::Forward => forward_targets(project, environment, wanted, &depot, printer)?,
        Direction::Back => back_targets(environment, wanted, &depot, &log)?,
    };
    let hosts = wanted_hosts(environment, wanted)?;
    let connected = Connected::new(project, environment)?;
    let prepared = preview(&connected, &log, &depot, targets, hosts, direction)?;
    show(&prepared, direction, printer, consent);
    let shut: Vec<&greenlight_model::world::Gate> =
        prepared.world.gates.iter().filter(|gate| !matches!(gate.light, Light::Green { .. })).collect();
    if consent.dry_run {
        printer.json("plan", plan_json(&prepared));
        return Ok(if shut.is_empty() { would_end(&prepared) } else { Exit::Held });
    }
    if let Some(gate) = shut.first() {
        let (Light::Green { why } | Light::Amber { why } | Light::Red { why }) = &gate.light;
        return Err(Failure::new(
            Exit::Held,
            format!("gate `{}` is not green: {why}; nothing was changed", gate.name),
        ));
    }
    if !is_agreed(consent, printer)? {
        return Err(Failure::new(Exit::Held, "not begun; nothing was changed"));
    }
    let Some(lease) = lease else { return Ok(Exit::Done) };
    // What cannot be had (a secret, say) is found before anything is begun.
    let artifacts = match direction {
        Direction::Forward => project.artifacts(environment)?,
        Direction::Back => project.artifacts_for_the_way_back(environment, printer)?,
    };
    let id = prepared.plan.id.clone();
    append(
        project,
        &mut log,
        &RecordBody::RolloutStarted { plan: prepared.plan, services: prepared.services },
    )?;
    roll::run(connected, log, &id, artifacts, lease, printer)
}

fn lease(project: &Project, environment: &Environment) -> Result<ControllerLease, Failure> {
    ControllerLease::take(&project.state_directory()?, &environment.name).map_err(|error| {
        Failure::from_error(Exit::Held, &error)
            .help(format!("see what it does: greenlight status {}", environment.name))
    })
}

/// The releases to go forward to: those named, else the heads of the services' branches.
fn forward_targets(
    project: &Project,
    environment: &Environment,
    wanted: &Targets,
    depot: &Depot,
    printer: &Printer,
) -> Result<BTreeMap<ServiceName, ReleaseId>, Failure> {
    if !wanted.releases.is_empty() {
        return named(environment, wanted, depot);
    }
    let mut targets = BTreeMap::new();
    for name in services(environment, wanted)? {
        let service = build::service(project, name)?;
        let revision = environment.branch.as_deref();
        let built = greenlight_depot::build::built_before(depot, service, &project.directory, revision)
            .map_err(|error| Failure::from_error(build::exit(&error), &error))?;
        let release = match built {
            Some(release) => release,
            None => build::build_one(project, service, depot, revision, None, printer)?,
        };
        targets.insert(name.clone(), release.id);
    }
    Ok(targets)
}

/// The releases to go back to: those named, else the last that was healthy on the whole environment.
fn back_targets(
    environment: &Environment,
    wanted: &Targets,
    depot: &Depot,
    log: &Log,
) -> Result<BTreeMap<ServiceName, ReleaseId>, Failure> {
    if !wanted.releases.is_empty() {
        return named(environment, wanted, depot);
    }
    let history = log.history();
    let name = &environment.name;
    let mut targets = BTreeMap::new();
    for service in services(environment, wanted)? {
        let present = history.current(name, service);
        // A service that has no older release stays as it is; when none has one, there is no way back.
        if let Some(release) = history.way_back(name, service, present) {
            targets.insert(service.clone(), release);
        }
    }
    if targets.is_empty() {
        return Err(Failure::usage(format!(
            "no earlier release was healthy on the whole of {name}, so there is no way back by itself"
        ))
        .help(format!("name a release: greenlight rollback {name} RELEASE (see `greenlight releases`)")));
    }
    Ok(targets)
}

fn named(
    environment: &Environment,
    wanted: &Targets,
    depot: &Depot,
) -> Result<BTreeMap<ServiceName, ReleaseId>, Failure> {
    let asked = services(environment, wanted)?;
    let mut targets = BTreeMap::new();
    for text in &wanted.releases {
        let release = releases::find(depot, &asked, text)?;
        if let Some(other) = targets.insert(release.service.clone(), release.id)
            && other != release.id
        {
            return Err(Failure::usage(format!("two releases of {} are named", release.service)));
        }
    }
    Ok(targets)
}

/// The services that are meant: those named, else all of the environment.
fn services<'a>(environment: &'a Environment, wanted: &'a Targets) -> Result<Vec<&'a ServiceName>, Failure> {
    for name in &wanted.services {
        if !environment.hosts.contains_key(name) {
            let known: Vec<&str> = environment.hosts.keys().map(ServiceName::as_str).collect();
            return Err(Failure::usage(format!("{} has no hosts for `{name}`", environment.name))
                .help(format!("it has hosts for {}", known.join(", "))));
        }
    }
    let is_meant = |name: &&ServiceName| wanted.services.is_empty() || wanted.services.contains(name);
    Ok(environment.hosts.keys().filter(is_meant).collect())
}

/// The hosts that are meant; empty for all.
fn wanted_hosts(environment: &Environment, wanted: &Targets) -> Result<BTreeSet<HostName>, Failure> {
    let known = environment.service_hosts();
    match wanted.hosts.iter().find(|host| !known.contains(*host)) {
        None => Ok(wanted.hosts.iter().cloned().collect()),
        Some(host) => {
            let known: Vec<&str> = known.iter().map(HostName::as_str).collect();
            Err(Failure::usage(format!("no service of {} runs on `{host}`", environment.name))
                .help(format!("its hosts are {}", known.join(", "))))
        }
    }
}

fn preview(
    connected: &Connected<'_>,
    log: &Log,
    depot: &Depot,
    targets: BTreeMap<ServiceName, ReleaseId>,
    hosts: BTreeSet<HostName>,
    direction: Direction,
) -> Result<Prepared, Failure> {
    let releases = depot.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let Connected { project, environment, .. } = connected;
    let (_, gathered) = connected.block_on(connected.gather(log));
    let wanted =
        Wanted { environment: environment.name.clone(), direction, targets, hosts, by: project.by.clone() };
    let now = clock::now();
    let id: RolloutId = clock::rollout_id(&environment.name, now, &project.by);
    prepare(&project.fleet, log.history(), &releases, &gathered, &wanted, id, now).map_err(|error| {
        let exit = if matches!(error, PrepareError::Busy { .. }) { Exit::Held } else { Exit::Usage };
        Failure::from_error(exit, &error)
    })
}

fn show(prepared: &Prepared, direction: Direction, printer: &Printer, consent: Consent) {
    let world = &prepared.world;
    let say = |line: String| if consent.dry_run { printer.result(line) } else { printer.progress(line) };
    for (service, release) in &prepared.plan.targets {
        let now: BTreeSet<String> = prepared
            .plan
            .baseline
            .iter()
            .filter(|(instance, _)| instance.service == *service)
            .map(|(instance, release)| match release {
                Some(release) => world.title(*release),
                None if is_silent(world, instance) => "unknown".to_owned(),
                None => "nothing".to_owned(),
            })
            .collect();
        let now = now.into_iter().collect::<Vec<_>>().join(", ");
        let line = format!("{service} in {}: {now} -> {}", prepared.plan.environment, world.title(*release));
        say(format!("{} {}", line.bold(), if direction == Direction::Back { "(back)" } else { "" })
            .trim_end()
            .to_owned());
    }
    if direction == Direction::Forward {
        for service in prepared.plan.targets.keys().filter_map(|name| world.services.get(name)) {
            let limit = human_duration(world.environment.timeouts.guard(service.processes.values()));
            say(format!("  guard: {} goes back by itself after {limit} unless confirmed", service.name));
        }
    }
    for gate in &world.gates {
        let (light, why) = match &gate.light {
            Light::Green { why } => ("green".green().to_string(), why),
            Light::Amber { why } => ("amber".yellow().to_string(), why),
            Light::Red { why } => ("red".red().to_string(), why),
        };
        say(format!("  gate {}: {light}, {why}", gate.name));
    }
    for (host, observation) in &world.inventory {
        if let Some(unreachable) = &observation.unreachable {
            let why = describe::silence(host, &unreachable.why);
            say(format!("  {host} {}: {why}", "does not answer".red()));
        }
    }
    show_steps(prepared, !consent.dry_run && printer.verbosity < Verbosity::Verbose, &say);
    if let Some(outcome) = &prepared.preview.outcome
        && !matches!(outcome, Outcome::Done { .. })
    {
        say(format!("  would end: {}", describe::outcome(outcome)));
    }
    // What a gate waits for stands beside its light.
    for wait in prepared.preview.waits.iter().filter(|wait| !matches!(wait, Wait::Gate { .. })) {
        say(format!("  would wait: {}", describe::wait(wait, world.now)));
    }
}

fn is_silent(world: &World, instance: &Instance) -> bool {
    world.inventory.get(&instance.host).is_some_and(|seen| seen.report.is_none())
}

/// The waves, and unless it is to be short every step with its reason.
fn show_steps(prepared: &Prepared, is_short: bool, say: &impl Fn(String)) {
    let plan = &prepared.plan;
    let runs_already = |(instance, release): (&Instance, &Option<ReleaseId>)| {
        plan.targets.get(&instance.service).is_none_or(|target| *release == Some(*target))
    };
    if plan.baseline.iter().all(runs_already) {
        say("  each host runs that already".to_owned());
    }
    let described: Vec<(String, String)> = prepared
        .preview
        .steps
        .iter()
        .map(|step| {
            let what = describe::action(&step.action, |release| prepared.world.title(release));
            (step.action.instance().to_string(), what)
        })
        .collect();
    let instance_width = described.iter().map(|(instance, _)| instance.len()).max().unwrap_or_default();
    let what_width = described.iter().map(|(_, what)| what.chars().count()).max().unwrap_or_default();
    let mut last = None;
    for (step, (instance, what)) in prepared.preview.steps.iter().zip(&described) {
        if last != Some(step.wave) {
            match step.wave {
                Some(number) => {
                    let hosts: Vec<String> =
                        plan.waves[number].instances.iter().map(ToString::to_string).collect();
                    say(format!("  wave {} of {}: {}", number + 1, plan.waves.len(), hosts.join(", ")));
                }
                None if is_short => {}
                None if last.is_none() => say("  before the first wave".to_owned()),
                None => say("  afterwards".to_owned()),
            }
            last = Some(step.wave);
        }
        if !is_short {
            let why = step.why.dimmed();
            say(format!("    {instance:<instance_width$}  {what:<what_width$}  {why}"));
        }
    }
}

fn would_end(prepared: &Prepared) -> Exit {
    prepared.preview.outcome.as_ref().map_or(Exit::Held, describe::exit)
}

fn plan_json(prepared: &Prepared) -> serde_json::Value {
    json!({
        "plan": prepared.plan,
        "steps": prepared.preview.steps,
        "gates": prepared.world.gates,
        "outcome": prepared.preview.outcome,
        "waits": prepared.preview.waits,
    })
}

fn is_agreed(consent: Consent, printer: &Printer) -> Result<bool, Failure> {
    let asks = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if consent.yes || !asks || printer.json {
        return Ok(true);
    }
    let cannot = |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot ask: {error}"));
    let mut stderr = anstream::stderr();
    write!(stderr, "begin? [y/N] ").and_then(|()| stderr.flush()).map_err(cannot)?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(cannot)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
