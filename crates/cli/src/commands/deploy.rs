//! `plan`, `deploy` and `rollback`: one way from what was asked for to a plan, shown; then, if wanted, carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::time::Duration;

use greenlight_controller::{
    ControllerLease, Foreseen, Gathered, PrepareError, Prepared, Wanted, clock, foresee, prepare,
};
use greenlight_depot::Depot;
use greenlight_model::check::CheckPattern;
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::fleet::Environment;
use greenlight_model::history::History;
use greenlight_model::id::{HostName, Instance, ReleaseId, RolloutId, ServiceName};
use greenlight_model::migration::Loss;
use greenlight_model::quantity::human_duration;
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::Direction;
use greenlight_model::world::{Light, World};
use greenlight_store::Log;
use owo_colors::OwoColorize;
use serde_json::json;

use crate::args::{Consent, Deploy, Global, Overrides, Plan, Rollback, Targets};
use crate::commands::operate::{self, append};
use crate::commands::preflight::Rows;
use crate::commands::{build, foresight, gates, preflight, releases, roll};
use crate::describe;
use crate::failure::{Exit, Failure};
use crate::printer::{Printer, Verbosity};
use crate::project::{Connected, Project};

/// How often gates are judged anew while a deployment waits for them.
const GATES_LOOK_INTERVAL: Duration = Duration::from_secs(5);

pub(crate) fn plan(global: &Global, plan: &Plan, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let consent = Consent { yes: false, dry_run: true };
    start(&project, &plan.targets, Direction::Forward, consent, false, printer)
}

pub(crate) fn deploy(global: &Global, deploy: &Deploy, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    start(&project, &deploy.targets, Direction::Forward, deploy.consent, deploy.wait, printer)
}

pub(crate) fn rollback(global: &Global, rollback: &Rollback, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    if let Some(why) = &rollback.database_restored {
        let environment = project.environment(&rollback.targets.environment)?;
        operate::restored(&project, &mut project.log()?, &environment.name, why)?;
    }
    start(&project, &rollback.targets, Direction::Back, rollback.consent, false, printer)
}

fn start(
    project: &Project,
    wanted: &Targets,
    direction: Direction,
    consent: Consent,
    waits: bool,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let environment = project.environment(&wanted.environment)?;
    let mut log = project.log()?;
    let lease = if consent.dry_run { None } else { Some(lease(project, environment)?) };
    let targets = targets(project, environment, wanted, direction, printer)?;
    let connected = Connected::new(project, environment)?;
    if lease.is_some() && direction == Direction::Forward {
        gates::look(&connected, &mut log, &targets)?;
    }
    let mut prepared = preview(&connected, &log, targets, wanted, direction, true)?;
    show(&prepared, direction, printer, consent.dry_run);
    let foreseen = connected.block_on(foresee(&connected.gatherer(&log), environment, &prepared.plan));
    for line in foreseen.iter().flat_map(foresight::lines) {
        if consent.dry_run {
            printer.result(format!("  {line}"));
        } else {
            printer.progress(format!("  {line}"));
        }
    }
    if consent.dry_run {
        let looked = preflight::look(&connected, &prepared, printer)?;
        preflight::show("preflight", &looked, Rows::Failing, printer);
        let checks = preflight::document(&looked);
        printer.json("plan", plan_json(&prepared, &checks, &foreseen));
        let is_open = prepared.world.gates.iter().all(gates::is_green);
        return Ok(match (is_open, looked.is_well()) {
            (true, true) => would_end(&prepared),
            (true, false) => Exit::Failed,
            (false, _) => Exit::Held,
        });
    }
    if waits {
        prepared = wait_for_gates(&connected, &mut log, wanted, prepared, printer)?;
    }
    refuse_shut_gates(&prepared)?;
    if !is_agreed(consent.yes, "begin?", printer)? {
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

/// The releases that are meant.
pub(crate) fn targets(
    project: &Project,
    environment: &Environment,
    wanted: &Targets,
    direction: Direction,
    printer: &Printer,
) -> Result<BTreeMap<ServiceName, ReleaseId>, Failure> {
    let depot = project.depot()?;
    match direction {
        Direction::Forward => forward_targets(project, environment, wanted, &depot, printer),
        Direction::Back => back_targets(environment, wanted, &depot, &project.log()?),
    }
}

fn refuse_shut_gates(prepared: &Prepared) -> Result<(), Failure> {
    let shut: Vec<String> = prepared
        .world
        .gates
        .iter()
        .filter_map(|gate| match &gate.light {
            Light::Green { .. } => None,
            Light::Amber { why } | Light::Red { why } => Some(format!("`{}` is not green: {why}", gate.name)),
        })
        .collect();
    match &shut[..] {
        [] => Ok(()),
        [only] => Err(Failure::new(Exit::Held, format!("gate {only}; nothing was changed"))),
        several => Err(Failure::new(
            Exit::Held,
            format!("{} gates are shut; nothing was changed:\n  {}", several.len(), several.join("\n  ")),
        )),
    }
}

/// Waits while every gate that is shut is one that time opens; comes back when all are green, or one is red.
fn wait_for_gates(
    connected: &Connected<'_>,
    log: &mut Log,
    wanted: &Targets,
    mut prepared: Prepared,
    printer: &Printer,
) -> Result<Prepared, Failure> {
    let mut said = String::new();
    let mut looked_at = prepared.world.now;
    loop {
        let gates = &prepared.world.gates;
        let is_red = gates.iter().any(|gate| matches!(gate.light, Light::Red { .. }));
        let shut: Vec<&str> =
            gates.iter().filter(|gate| !gates::is_green(gate)).map(|gate| gate.name.as_str()).collect();
        if is_red || shut.is_empty() {
            return Ok(prepared);
        }
        // Their reasons hold the time that is left, which changes with every look.
        let names = shut.join(", ");
        if names != said {
            printer.progress(format!("waiting for {names}; ^C ends this, and nothing was changed"));
            said = names;
        }
        // Nothing tells when a window opens or traffic falls.
        connected.block_on(async { tokio::time::sleep(GATES_LOOK_INTERVAL).await });
        log.refresh().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
        let targets = prepared.plan.targets.clone();
        if clock::now().duration_since(looked_at).unsigned_abs() > greenlight_gates::FRESH_FOR / 2 {
            gates::look(connected, log, &targets)?;
            looked_at = clock::now();
        }
        prepared = preview(connected, log, targets, wanted, Direction::Forward, true)?;
    }
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
            continue;
        }
        // Where there is one that a migration has cut off, that is the reason, and not that there is none.
        let before = history.healthy(name, service).find(|release| Some(*release) != present);
        if let Some(release) = before
            && let Some((rollout, loss)) = history.lost_since(name, service, release)
        {
            return Err(Failure::usage(format!(
                "{service} cannot go back with the code alone: a migration in {rollout} took away from the database what earlier \
                 releases may need: {loss}"
            ))
            .help(format!(
                "go forward with a release that mends it; or put the database back from its backup, and then `greenlight rollback \
                 {name} --database-restored REASON`"
            )));
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

/// The checks that are not to stop it, each with the reason.
fn overrides(environment: &Environment, wanted: &Targets) -> Result<BTreeMap<CheckPattern, String>, Failure> {
    let Overrides { checks, reason } = &wanted.overrides;
    let Some(reason) = reason else { return Ok(BTreeMap::new()) };
    gates::check_text("a reason", reason, 1)?;
    let known = environment.service_hosts();
    if let Some(host) =
        checks.iter().filter_map(|pattern| pattern.host.as_ref()).find(|host| !known.contains(*host))
    {
        return Err(Failure::usage(format!(
            "--override: no service of {} runs on `{host}`",
            environment.name
        )));
    }
    Ok(checks.iter().map(|pattern| (pattern.clone(), reason.trim().to_owned())).collect())
}

/// The plan as it is now; `asks` when it is to be carried out by who looks.
pub(crate) fn preview(
    connected: &Connected<'_>,
    log: &Log,
    targets: BTreeMap<ServiceName, ReleaseId>,
    wanted: &Targets,
    direction: Direction,
    asks: bool,
) -> Result<Prepared, Failure> {
    let Connected { project, environment, .. } = connected;
    let hosts = wanted_hosts(environment, wanted)?;
    let overrides = overrides(environment, wanted)?;
    let releases = project.depot()?.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let (_, gathered) = connected.block_on(connected.gather(log));
    let losses = losses(connected, log.history(), &gathered, &targets, direction)?;
    let wanted = Wanted {
        environment: environment.name.clone(),
        direction,
        targets,
        hosts,
        overrides,
        losses,
        by: project.by.clone(),
        asks,
    };
    let now = clock::now();
    let id: RolloutId = clock::rollout_id(&environment.name, now, &project.by);
    prepare(&project.fleet, log.history(), &releases, &gathered, &wanted, id, now).map_err(|error| {
        let exit = if matches!(error, PrepareError::Busy { .. }) { Exit::Held } else { Exit::Usage };
        Failure::from_error(exit, &error)
    })
}

/// What the migrations of these releases take away, judged by what hosts run and the records say they run.
fn losses(
    connected: &Connected<'_>,
    history: &History,
    gathered: &Gathered,
    targets: &BTreeMap<ServiceName, ReleaseId>,
    direction: Direction,
) -> Result<Vec<Loss>, Failure> {
    let Connected { project, environment, .. } = connected;
    let mut found = Vec::new();
    if direction == Direction::Back {
        return Ok(found);
    }
    let depot = project.depot()?;
    for (service, release) in targets {
        let known = project.fleet.services.get(service);
        let Some(migration) = known.and_then(|service| service.migrate.as_ref()) else { continue };
        let linked = environment
            .instances_of(service)
            .filter_map(|instance| gathered.report(&instance).and_then(|report| report.linked));
        let before: BTreeSet<ReleaseId> = linked.chain(history.current(&environment.name, service)).collect();
        let losses = greenlight_controller::losses(&depot, service, migration, *release, &before)
            .map_err(|error| Failure::from_error(Exit::Failed, &error))?;
        found.extend(losses);
    }
    Ok(found)
}

/// The plan for people; as the result when it is what was asked for.
pub(crate) fn show(prepared: &Prepared, direction: Direction, printer: &Printer, is_result: bool) {
    let world = &prepared.world;
    let say = |line: String| if is_result { printer.result(line) } else { printer.progress(line) };
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
            let is_one_way = |loss: &Loss| loss.service == service.name && loss.phase.is_expand();
            if prepared.plan.losses.iter().any(is_one_way) {
                say(format!(
                    "  guard: none for {}, whose hosts do not go back by themselves then",
                    service.name
                ));
                continue;
            }
            say(format!("  guard: {} goes back by itself after {limit} unless confirmed", service.name));
        }
    }
    for service in &prepared.unapplied {
        say(format!(
            "  {}: the settings of {service} in greenlight.toml have changed since this release went out. Hosts that \
             run it keep those they have; the next release brings the new ones",
            "not applied".yellow()
        ));
    }
    for loss in &prepared.plan.losses {
        say(format!("  {} of {} {}: {loss}", loss.phase.noun(), loss.service, "takes away".red()));
    }
    for gate in &world.gates {
        say(format!("  {}", gates::line(gate)));
    }
    for (host, observation) in &world.inventory {
        if let Some(unreachable) = &observation.unreachable {
            let why = describe::silence(host, &unreachable.why);
            say(format!("  {host} {}: {why}", "does not answer".red()));
        }
    }
    show_steps(prepared, !is_result && printer.verbosity < Verbosity::Verbose, &say);
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

fn plan_json(prepared: &Prepared, checks: &serde_json::Value, foreseen: &[Foreseen]) -> serde_json::Value {
    json!({
        "plan": prepared.plan,
        "steps": prepared.preview.steps,
        "gates": prepared.world.gates,
        "checks": checks,
        "outcome": prepared.preview.outcome,
        "waits": prepared.preview.waits,
        "unapplied_settings": prepared.unapplied,
        "canaries": foreseen,
    })
}

/// Asks on a terminal. Without one, or when nothing is to be asked, it is agreed.
pub(crate) fn is_agreed(yes: bool, question: &str, printer: &Printer) -> Result<bool, Failure> {
    let asks = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if yes || !asks || printer.json {
        return Ok(true);
    }
    let cannot = |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot ask: {error}"));
    let mut stderr = anstream::stderr();
    write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush()).map_err(cannot)?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(cannot)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
