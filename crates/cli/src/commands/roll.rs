//! Driving one rollout from this terminal until it ends, holds or is let go, and saying how it came out.

use std::collections::BTreeSet;
use std::sync::Arc;

use greenlight_controller::{Artifacts, Controller, ControllerLease, Ended, Interrupt, clock};
use greenlight_model::decision::{Outcome, Running};
use greenlight_model::fleet::Environment;
use greenlight_model::id::{HostName, Instance, ReleaseId, RolloutId};
use greenlight_model::manifest::Release;
use greenlight_model::rollout::{Direction, Rollout};
use greenlight_store::Log;
use owo_colors::OwoColorize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::commands::preflight;
use crate::describe;
use crate::failure::{Exit, Failure};
use crate::live::Live;
use crate::printer::Printer;
use crate::project::{Connected, Project};

/// What may wait for the loop: a hold and a detach. Whatever comes after those waits outside.
const INTERRUPTS_QUEUED_MAX: usize = 2;

/// Drives an open rollout. The lease says that no other controller of this machine does.
pub(crate) fn run(
    connected: Connected<'_>,
    log: Log,
    rollout: &RolloutId,
    artifacts: Artifacts,
    lease: ControllerLease,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let Connected { project, environment, .. } = connected;
    let releases = artifacts.depot.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let instances: Vec<Instance> = environment.instances().collect();
    let live = Live::new(printer, &releases, &instances);
    let mut silent = BTreeSet::new();
    let ended = connected.block_on(async {
        let (sender, mut interrupts) = interrupts(&live)?;
        let mut is_held = false;
        let (gatherer, gathered) = tokio::select! {
            gathered = connected.gather(&log) => gathered,
            () = let_go(&mut interrupts, &mut is_held) => return Ok(Ended::Detached(Vec::new())),
        };
        if is_held {
            // It has room: what was in it was taken out.
            let _ = sender.send(Interrupt::Hold).await;
        }
        let unheard = gathered.inventory.iter().filter(|(_, seen)| seen.report.is_none());
        silent.extend(unheard.map(|(host, _)| host.clone()));
        let controller = Controller::new(
            project.fleet.clone(),
            rollout.clone(),
            log,
            project.by.clone(),
            Arc::clone(gatherer.hosts()),
            artifacts,
            gathered,
            live.sink(),
        )
        .map_err(|error| Failure::from_error(Exit::Failed, &error))?;
        controller.run(interrupts).await.map_err(|error| Failure::from_error(Exit::Held, &error))
    });
    live.finish();
    // What is still under way on a connection ends with it; the hosts finish what they were told.
    connected.end();
    drop(lease);
    let ended = ended?;
    let mut log = project.log()?;
    log.refresh().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let history = log.history();
    let folded = history.rollouts.get(rollout);
    let running = history.running.get(rollout).cloned().unwrap_or_default();
    // Of a host that never answered and was never touched nobody knows what it runs.
    silent.retain(|host| {
        let touched = folded.iter().flat_map(|rollout| &rollout.touched);
        !touched.into_iter().any(|instance| instance.host == *host)
    });
    if let Some(rollout) = folded.filter(|rollout| is_to_be_tagged(rollout)) {
        tag(project, environment, rollout, &releases, printer);
    }
    preflight::show_recorded(project, rollout, printer)?;
    let known = Known { running: &running, silent: &silent };
    Ok(report(environment, rollout, folded, &known, &ended, &releases, printer))
}

/// What went forward, to every host of the environment.
fn is_to_be_tagged(rollout: &Rollout) -> bool {
    rollout.is_whole() && rollout.plan.direction == Direction::Forward
}

/// Tags the commits that have gone out, where the environment asks for it. The rollout is over, whatever git says.
fn tag(
    project: &Project,
    environment: &Environment,
    rollout: &Rollout,
    releases: &[Release],
    printer: &Printer,
) {
    let (Some(tagging), Some(at)) = (&environment.tag, rollout.ended_at) else { return };
    let mut done = BTreeSet::new();
    for (service, target) in &rollout.plan.targets {
        let source = project.fleet.services.get(service).map(|service| &service.source);
        let release = releases.iter().find(|release| release.id == *target);
        let (Some(source), Some(release)) = (source, release) else { continue };
        // Several services of one repository go out as one commit, mostly.
        if !done.insert((&source.git, &release.commit)) {
            continue;
        }
        let tagged = project.depot().map_err(|failure| failure.message).and_then(|depot| {
            let tagged = depot.tag(source, &project.directory, &release.commit, at, tagging);
            tagged.map_err(|error| error.to_string())
        });
        match tagged {
            Ok(tagged) => {
                let moving = tagging.moving.iter().map(|moving| format!(" and {moving}")).collect::<String>();
                let to = tagged.pushed_to.map(|to| format!(", pushed to {to}")).unwrap_or_default();
                printer.result(format!("{service}: tagged {}{moving}{to}", tagged.name));
            }
            Err(why) => printer.warning(format!(
                "{service} is out, but its commit {} could not be tagged: {why}",
                release.commit
            )),
        }
    }
}

/// What is known of what runs where.
struct Known<'a> {
    running: &'a Running,
    /// Hosts that never answered.
    silent: &'a BTreeSet<HostName>,
}

/// The last lines: how it came out and exactly which host runs what.
fn report(
    environment: &Environment,
    id: &RolloutId,
    rollout: Option<&Rollout>,
    known: &Known<'_>,
    ended: &Ended,
    releases: &[Release],
    printer: &Printer,
) -> Exit {
    let title = |id: ReleaseId| {
        releases.iter().find(|release| release.id == id).map_or_else(|| id.short(), Release::title)
    };
    let name = &environment.name;
    let exit = match ended {
        Ended::Outcome(outcome) => {
            let line = describe::outcome(outcome);
            let took = rollout.and_then(|rollout| {
                let took = rollout.ended_at?.duration_since(rollout.started_at);
                std::time::Duration::try_from(took).ok()
            });
            let took = took.map(|took| format!(" in {}", greenlight_model::quantity::human_duration(took)));
            let line = format!(
                "{line}{}",
                took.filter(|_| matches!(outcome, Outcome::Done { .. })).unwrap_or_default()
            );
            match outcome {
                Outcome::Done { .. } => printer.result(line.green().bold().to_string()),
                _ => printer.result(line.red().bold().to_string()),
            }
            describe::exit(outcome)
        }
        Ended::Held(waits) => {
            for wait in waits {
                printer.result(format!("HELD: {}", describe::wait(wait, clock::now())));
            }
            printer.progress(format!(
                "go on with `greenlight resume {name}`, go back with `greenlight abort {name}`"
            ));
            Exit::Held
        }
        Ended::Detached(under_way) => {
            printer.result(format!("DETACHED from {id}; the hosts are as they were left"));
            if let Some(under_way) = describe::all_under_way(under_way) {
                printer.result(format!(
                    "left under way: {under_way}. A host finishes a switch that it began, and gives up everything else"
                ));
            }
            printer
                .progress(format!("see `greenlight status {name}`; go on with `greenlight resume {name}`"));
            Exit::Held
        }
    };
    let mut rows = Vec::new();
    for (instance, release) in known.running {
        let runs = match release {
            Some(release) => title(*release),
            None if known.silent.contains(&instance.host) => "unknown: it does not answer".to_owned(),
            None => "nothing".to_owned(),
        };
        rows.push(vec![format!("  {instance}"), runs]);
    }
    describe::table(&rows).iter().for_each(|row| printer.result(row));
    printer.json(
        "rollout",
        json!({
            "rollout": id,
            "environment": name,
            "exit": exit.code(),
            "ended": match ended {
                Ended::Outcome(outcome) => json!({ "outcome": outcome }),
                Ended::Held(waits) => json!({ "held": waits }),
                Ended::Detached(_) => json!("detached"),
            },
            "under_way": match ended {
                Ended::Detached(under_way) => under_way.as_slice(),
                Ended::Outcome(_) | Ended::Held(_) => &[],
            },
            "running": known.running,
            "unknown": known.silent,
            "started_at": rollout.map(|rollout| rollout.started_at),
            "ended_at": rollout.and_then(|rollout| rollout.ended_at),
            "left_out": rollout.map(|rollout| &rollout.left_out),
            "failures": rollout.map(|rollout| &rollout.failures),
        }),
    );
    exit
}

/// Waits until it is to let go, and notes when it is to hold.
async fn let_go(interrupts: &mut mpsc::Receiver<Interrupt>, is_held: &mut bool) {
    while let Some(interrupt) = interrupts.recv().await {
        match interrupt {
            Interrupt::Hold => *is_held = true,
            Interrupt::Detach => return,
        }
    }
    std::future::pending::<()>().await;
}

/// What signals mean here: once holds at the next safe point, twice lets go. SIGTERM holds. When what it says cannot be
/// read by anybody any more (the job that ran it is gone), it lets go, as if it had been killed with its terminal.
fn interrupts(live: &Live) -> Result<(mpsc::Sender<Interrupt>, mpsc::Receiver<Interrupt>), Failure> {
    let cannot =
        |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot listen for signals: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let (sender, receiver) = mpsc::channel(INTERRUPTS_QUEUED_MAX);
    let unheard = sender.clone();
    // When it is full, two were asked for already, and the second lets go.
    live.when_unheard(move || {
        let _ = unheard.try_send(Interrupt::Detach);
    });
    let (live, to_loop) = (live.clone(), sender.clone());
    tokio::spawn(async move {
        let mut was_interrupted = false;
        loop {
            let means = tokio::select! {
                Some(()) = interrupt.recv() => if was_interrupted { Interrupt::Detach } else { Interrupt::Hold },
                Some(()) = terminate.recv() => Interrupt::Hold,
                else => return,
            };
            was_interrupted = true;
            live.say(match means {
                Interrupt::Hold => {
                    "holding: what is under way ends, nothing new begins; ^C again lets go at once"
                }
                Interrupt::Detach => "letting go",
            });
            if to_loop.send(means).await.is_err() {
                return;
            }
        }
    });
    Ok((sender, receiver))
}
