//! `status`: what runs where, as the hosts themselves say, and why an open rollout is not moving.

use std::collections::BTreeMap;
use std::time::Duration;

use greenlight_controller::{ControllerLease, Gathered, clock, kept_judgement, rollout_gates};
use greenlight_model::Timestamp;
use greenlight_model::decision::{Decision, Wait};
use greenlight_model::fleet::Environment;
use greenlight_model::history::History;
use greenlight_model::host::{Answer, InstanceReport, LedgerEvent, ProcessState};
use greenlight_model::id::{Instance, ReleaseId};
use greenlight_model::manifest::Release;
use greenlight_model::quantity::human_duration;
use greenlight_model::world::{ReleaseFacts, Traffic, World};
use owo_colors::OwoColorize;
use serde_json::{Value, json};

use crate::args::{Global, Status};
use crate::describe::{self, table};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{Project, runtime};

pub(crate) fn run(global: &Global, status: &Status, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let log = project.log()?;
    let releases = project.depot()?.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let runtime = runtime()?;
    let mut documents = Vec::new();
    let mut exit = Exit::Done;
    for environment in project.environments(status.environment.as_ref())? {
        let (_, gathered) = runtime.block_on(project.gather(environment, &log))?;
        let controller = ControllerLease::holder(&project.state_directory()?, &environment.name)
            .map_err(|error| Failure::from_error(Exit::Failed, &error))?;
        let world = world(&project, environment, log.history(), &releases, &gathered, controller.is_some());
        let (document, is_well) =
            show(environment, log.history(), &world, &gathered, controller.as_deref(), printer);
        documents.push(document);
        if !is_well {
            exit = Exit::Failed;
        }
        if log.history().open_rollout(&environment.name).is_some() {
            exit = Exit::Held;
        }
    }
    printer.json("status", json!({ "environments": documents }));
    Ok(exit)
}

/// The world as a decision would see it now. Without an open rollout it holds the last one, which decides nothing.
fn world(
    project: &Project,
    environment: &Environment,
    history: &History,
    releases: &[Release],
    gathered: &Gathered,
    is_driven: bool,
) -> Option<World> {
    let rollout = history.of_environment(&environment.name).next()?;
    let facts = |release: &Release| ReleaseFacts {
        title: release.title(),
        service: release.service.clone(),
        bad: history.bad.get(&release.id).cloned(),
    };
    let now = clock::now();
    Some(World {
        now,
        environment: environment.clone(),
        services: project.fleet.services.clone(),
        releases: releases.iter().map(|release| (release.id, facts(release))).collect(),
        rollout: rollout.clone(),
        inventory: gathered.inventory.clone(),
        traffic: gathered.traffic.clone(),
        gates: rollout_gates(&project.fleet, environment, history, rollout, releases, &gathered.traffic, now),
        judgement: project
            .evidence_directory()
            .ok()
            .and_then(|directory| kept_judgement(rollout, environment, &directory)),
        // Without a controller nothing is under way: what was begun and has no end is decided anew.
        in_flight: rollout.under_way.values().filter(|_| is_driven).cloned().collect(),
    })
}

fn show(
    environment: &Environment,
    history: &History,
    world: &Option<World>,
    gathered: &Gathered,
    controller: Option<&str>,
    printer: &Printer,
) -> (Value, bool) {
    let titles: BTreeMap<ReleaseId, String> = world
        .iter()
        .flat_map(|world| &world.releases)
        .map(|(release, facts)| (*release, facts.title.clone()))
        .collect();
    let title = |release: ReleaseId| titles.get(&release).cloned().unwrap_or_else(|| release.short());
    printer.result(environment.name.to_string().bold().to_string());
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    let mut is_well = true;
    let mut below: BTreeMap<usize, String> = BTreeMap::new();
    for instance in environment.instances() {
        let report = gathered.report(&instance);
        let traffic = traffic(environment, gathered, &instance);
        let (runs, state, well) = match report {
            Some(report) => {
                below.extend(describe_guard(report, clock::now(), title).map(|line| (rows.len(), line)));
                describe_instance(report, title)
            }
            None => {
                let observation = gathered.inventory.get(&instance.host);
                let why = observation.and_then(|observation| observation.unreachable.as_ref());
                let why = why.map_or("no report", |unreachable| unreachable.why.as_str());
                below.insert(rows.len(), describe::silence(&instance.host, why).to_owned());
                ("?".to_owned(), "does not answer".red().to_string(), false)
            }
        };
        is_well &= well && !matches!(traffic, Traffic::Unknown { .. });
        let claim = report.and_then(|report| report.ledger.claim.as_ref());
        let claimed = claim.map(|claim| format!("claimed by {} for {}", claim.holder, claim.rollout));
        rows.push(vec![
            format!("  {instance}"),
            runs,
            state,
            describe_traffic(&traffic),
            claimed.unwrap_or_default(),
        ]);
        documents.push(json!({
            "instance": instance,
            "release": report.and_then(|report| report.linked),
            "proven": report.and_then(InstanceReport::proven),
            "report": report,
            "traffic": traffic_document(&traffic),
            "unreachable": gathered.inventory.get(&instance.host).and_then(|seen| seen.unreachable.as_ref()),
        }));
    }
    for (index, row) in table(&rows).iter().enumerate() {
        printer.result(row);
        // Below its row: a reason is a sentence, and would push every other column away.
        if let Some(why) = below.get(&index) {
            printer.result(format!("    {why}"));
        }
    }
    let mut open_document = Value::Null;
    for elsewhere in greenlight_controller::adopt::elsewhere(environment, history, gathered) {
        let (id, name) = (&elsewhere.rollout, &environment.name);
        printer.result(format!(
            "  claimed by {id}, begun elsewhere {}; claims end {} unless renewed. When its controller is gone, `greenlight resume {name}` \
             or `greenlight abort {name}` takes it over",
            elsewhere.title(),
            elsewhere.ends_at()
        ));
    }
    if let (Some(open), Some(world)) = (history.open_rollout(&environment.name), world) {
        let decision = greenlight_planner::decide(world);
        let waits: Vec<Wait> = match &decision {
            Decision::Proceed { waits, .. } => waits.clone(),
            Decision::Note(_) | Decision::End(_) => Vec::new(),
        };
        let course = if open.is_turning_back() { "turning back" } else { "going forward" };
        printer.result(format!("  open: {} by {}, {course}", open.plan.id, open.plan.started_by));
        let name = &environment.name;
        printer.result(match controller {
            Some(pid) => format!("    driven by process {pid} of this machine"),
            None => format!(
                "    no controller of this machine drives it: `greenlight resume {name}` goes on, `greenlight abort {name}` goes back"
            ),
        });
        for begun in open.under_way.values().filter(|_| controller.is_none()) {
            let (what, ago) = (describe::action(&begun.action, title), describe::ago(begun.since, world.now));
            printer.result(format!(
                "    begun {ago} and never recorded as ended: {} {what}",
                begun.action.instance()
            ));
        }
        for wait in &waits {
            printer.result(format!("    waits: {}", describe::wait(wait, world.now)));
        }
        match &decision {
            Decision::Proceed { steps, .. } => {
                for step in steps {
                    let what = describe::action(&step.action, title);
                    printer.result(format!("    next: {} {what}: {}", step.action.instance(), step.why));
                }
            }
            Decision::Note(note) => printer.result(format!("    next: {}", describe::note(note))),
            Decision::End(outcome) => {
                printer.result(format!("    next: ends {}", describe::outcome(outcome)));
            }
        }
        open_document = json!({
            "rollout": open.plan.id,
            "course": open.course,
            "held": open.held,
            "controller": controller,
            "under_way": open.under_way.values().collect::<Vec<_>>(),
            "next": decision,
        });
    } else if let Some(last) = history.of_environment(&environment.name).next()
        && let (Some(outcome), Some(ended_at)) = (&last.outcome, last.ended_at)
    {
        let ago = describe::ago(ended_at, clock::now());
        printer.result(format!("  last: {} {ago}: {}", last.plan.id, describe::outcome(outcome)));
    }
    (json!({ "environment": environment.name, "instances": documents, "open": open_document }), is_well)
}

fn describe_instance(report: &InstanceReport, title: impl Fn(ReleaseId) -> String) -> (String, String, bool) {
    let Some(linked) = report.linked else { return ("nothing".to_owned(), "-".to_owned(), true) };
    match report.why_not_proven(linked) {
        None => {
            let proofs: Vec<&str> = report
                .processes
                .values()
                .filter_map(|process| match (&process.answer, &process.state) {
                    (Answer::Release { proof, .. }, ProcessState::Running { .. }) => Some(proof.as_str()),
                    _ => None,
                })
                .collect();
            let by = proofs.first().map(|proof| format!(" (by {proof})")).unwrap_or_default();
            (title(linked), format!("{}{by}", "proven".green()), true)
        }
        Some(why) => (title(linked), why.red().to_string(), false),
    }
}

/// What an instance's guard is about to do, or did last.
fn describe_guard(
    report: &InstanceReport,
    now: Timestamp,
    title: impl Fn(ReleaseId) -> String,
) -> Option<String> {
    let ledger = &report.ledger;
    let back = |release: Option<ReleaseId>| release.map_or("nothing".to_owned(), &title);
    if let Some(guard) = &ledger.guard {
        let back = back(guard.back_to);
        let left = Duration::try_from(guard.fires_at.duration_since(now)).unwrap_or_default();
        return Some(match &guard.lost {
            Some(why) => format!("not confirmed, and does not go back to {back} by itself any more: {why}"),
            None if left.is_zero() => format!("not confirmed: going back to {back} by itself"),
            None => {
                let anew = guard.rearmed.as_ref().map(|why| format!(", its time having begun anew: {why}"));
                let (left, anew) = (human_duration(left), anew.unwrap_or_default());
                format!("goes back to {back} by itself in {left} unless confirmed{anew}")
            }
        });
    }
    if let Some(entry) = ledger.went_back() {
        let ago = describe::ago(entry.at, now);
        return Some(format!("went back to {} by itself {ago}: {}", back(entry.release), entry.detail));
    }
    let last = ledger.history.last().filter(|last| last.event == LedgerEvent::Failed)?;
    Some(format!("failed {}: {}", describe::ago(last.at, now), last.detail))
}

fn traffic(environment: &Environment, gathered: &Gathered, instance: &Instance) -> Traffic {
    greenlight_model::world::traffic(environment, &gathered.traffic, instance)
}

fn traffic_document(traffic: &Traffic) -> Value {
    match traffic {
        Traffic::None => Value::Null,
        Traffic::Unknown { why } => json!({ "unknown": why }),
        Traffic::Known { admitted, up, sessions } => {
            json!({ "admitted": admitted, "up": up, "sessions": sessions })
        }
    }
}

fn describe_traffic(traffic: &Traffic) -> String {
    match traffic {
        Traffic::None => String::new(),
        Traffic::Unknown { why } => format!("traffic unknown: {why}"),
        Traffic::Known { admitted: true, up: true, sessions } => format!("in traffic, {sessions} sessions"),
        Traffic::Known { admitted: true, up: false, .. } => "admitted, but down for the balancer".to_owned(),
        Traffic::Known { admitted: false, sessions, .. } => format!("out of traffic, {sessions} sessions"),
    }
}
