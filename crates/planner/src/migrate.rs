//! The two parts of a migration: what is there before the first switch, and what is taken away when nothing runs older code.
//!
//! Each part runs once for a release, from one host, one after another over all services, and never on the way back. One whose
//! end is not known is never run again: a person is asked. What is taken away last is not begun while an instance of the
//! service was left out or left aside: it may run older code.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::action::Action;
use greenlight_model::decision::Decision;
use greenlight_model::host::MigrationTrace;
use greenlight_model::id::{HostName, ReleaseId, ServiceName};
use greenlight_model::migration::MigrationPhase;
use greenlight_model::rollout::{Direction, MigrationState, Note};

use crate::decide::Phase;
use crate::failure::guilty;
use crate::instance::{Stand, agent_step};
use crate::moves::Moves;
use crate::prepare::take;
use crate::view::{Facts, View};

/// Before the first instance changes.
pub(crate) fn expand(view: &View<'_>) -> Phase {
    run(view, MigrationPhase::Expand)
}

/// When every instance is proven.
pub(crate) fn contract(view: &View<'_>) -> Phase {
    run(view, MigrationPhase::Contract)
}

fn run(view: &View<'_>, phase: MigrationPhase) -> Phase {
    // One that is under way is waited for, also where its service is due no more since it was begun.
    let in_flight = view.facts.iter().find(|facts| {
        facts.in_flight.is_some_and(|in_flight| in_flight.action.migration_phase() == Some(phase))
    });
    if let Some(wait) = in_flight.and_then(Facts::in_flight_wait) {
        return Phase::Decided(Decision::Proceed { steps: Vec::new(), waits: vec![wait] });
    }
    for (service, release) in &view.rollout().plan.targets {
        if is_due(view, service, *release, phase)
            && let Some(decision) = migration(view, service, *release, phase)
        {
            return Phase::Decided(decision);
        }
    }
    Phase::Over
}

/// A migration that an earlier rollout may have begun is asked about before anything is written to a ledger that was lost:
/// from then on it would look like one that knows.
pub(crate) fn former(view: &View<'_>) -> Phase {
    for phase in MigrationPhase::ALL {
        let unknown = view.rollout().plan.targets.iter().find(|(service, release)| {
            has_command(view, service, phase)
                && (phase == MigrationPhase::Contract || is_due(view, service, **release, phase))
                && !view.rollout().migrations(phase).contains_key(*service)
                && may_have_migrated(view, service, phase)
                && !has_migrated(view, service, **release, phase, MigrationTrace::Done)
        });
        if let Some((service, release)) = unknown {
            return Phase::Decided(unknown_end(view, service, &view.title(*release), phase));
        }
    }
    Phase::Over
}

fn migration(
    view: &View<'_>,
    service: &ServiceName,
    release: ReleaseId,
    phase: MigrationPhase,
) -> Option<Decision> {
    let title = view.title(release);
    match view.rollout().migrations(phase).get(service) {
        Some(MigrationState::Done) => None,
        Some(MigrationState::Failed) => Some(failed(view, service, &title, phase)),
        _ if has_migrated(view, service, release, phase, MigrationTrace::Done) => None,
        Some(MigrationState::Begun) => Some(unknown_end(view, service, &title, phase)),
        None if has_migrated(view, service, release, phase, MigrationTrace::Begun)
            || may_have_migrated(view, service, phase) =>
        {
            Some(unknown_end(view, service, &title, phase))
        }
        None => Some(begin(view, service, release, &title, phase)),
    }
}

fn failed(view: &View<'_>, service: &ServiceName, title: &str, phase: MigrationPhase) -> Decision {
    let noun = phase.noun();
    let failures = &view.rollout().failures;
    let failure = failures.iter().rev().find(|failure| {
        failure.action.migration_phase() == Some(phase) && failure.action.instance().service == *service
    });
    let why = match failure {
        Some(failure) => {
            format!("the {noun} of {title} failed on {}: {}", failure.action.instance(), failure.why)
        }
        None => format!("the {noun} of {title} failed"),
    };
    match phase {
        MigrationPhase::Expand => Decision::Note(Note::TurnBack { why, bad: guilty(view) }),
        // Everything runs the release and works: going back would mend nothing.
        MigrationPhase::Contract => {
            let environment = &view.world.environment.name;
            Decision::Note(Note::Hold {
                why: format!(
                    "{why}. Everything runs {title}. Look at the database; when what was wrong is mended, `greenlight resume \
                     {environment}` runs it again, and if it is done, say so with `--migration-done {service}`"
                ),
            })
        }
    }
}

fn unknown_end(view: &View<'_>, service: &ServiceName, title: &str, phase: MigrationPhase) -> Decision {
    let environment = &view.world.environment.name;
    let noun = phase.noun();
    Decision::Note(Note::Hold {
        why: format!(
            "the {noun} of {title} was begun and how it ended is not known; it is never run twice. Look at the database; if it is done, go on with `greenlight resume {environment} --migration-done {service}`, else mend it and go back with `greenlight abort {environment}`"
        ),
    })
}

/// From the first host, in the order of the fleet file, that can be reached.
fn begin(
    view: &View<'_>,
    service: &ServiceName,
    release: ReleaseId,
    title: &str,
    phase: MigrationPhase,
) -> Decision {
    let by_host: BTreeMap<&HostName, &Facts<'_>> = view
        .facts
        .iter()
        .filter(|facts| facts.instance.service == *service && !facts.is_left_out)
        .map(|facts| (&facts.instance.host, facts))
        .collect();
    let hosts = view.world.environment.hosts.get(service).into_iter().flatten();
    let mut moves = Moves::default();
    for facts in hosts.filter_map(|host| by_host.get(host)) {
        let stand = match facts.in_flight_wait() {
            Some(wait) => Stand::Wait(wait),
            None => {
                let instance = facts.instance.clone();
                let (action, when) = match phase {
                    MigrationPhase::Expand => {
                        (Action::Migrate { instance, release }, "before the first switch")
                    }
                    MigrationPhase::Contract => {
                        (Action::Contract { instance, release }, "when nothing runs older code any more")
                    }
                };
                agent_step(view, facts, action, format!("the {} of {title} runs once, {when}", phase.noun()))
            }
        };
        let is_reachable = facts.unreachable.is_none();
        match stand {
            Stand::Failed(why) if is_reachable => return gives_up(view, why, phase),
            Stand::Failed(_) => {}
            stand => take(&mut moves, stand),
        }
        if is_reachable {
            return moves.proceed();
        }
    }
    if moves.is_empty() {
        let why = format!("no host can be reached to run the {} of {title}", phase.noun());
        return Decision::Note(match phase {
            MigrationPhase::Expand => Note::TurnBack { why, bad: BTreeSet::new() },
            MigrationPhase::Contract => Note::Hold { why },
        });
    }
    moves.proceed()
}

fn gives_up(view: &View<'_>, why: String, phase: MigrationPhase) -> Decision {
    Decision::Note(match phase {
        MigrationPhase::Expand => Note::TurnBack { why, bad: guilty(view) },
        MigrationPhase::Contract => Note::Hold { why },
    })
}

/// Whether this is known of a part of the release's migration, by the ledger of any host of the environment or by the records:
/// one that ran is never run again, whichever rollout began it, and nor is one that was begun by a rollout whose records are
/// lost.
fn has_migrated(
    view: &View<'_>,
    service: &ServiceName,
    release: ReleaseId,
    phase: MigrationPhase,
    trace: MigrationTrace,
) -> bool {
    let former = view.rollout().former_migrations(phase).get(service);
    let is_recorded = trace == MigrationTrace::Done && former.is_some_and(|former| former.is_done);
    let reports = view.world.inventory.values().filter_map(|observation| observation.report.as_ref());
    let mut instances = reports.filter_map(|(_, report)| report.instances.get(service));
    is_recorded || instances.any(|report| report.ledger.migration(release, phase) == Some(trace))
}

/// Whether an earlier rollout began it on a host that does not say how it ended: the host has not reported, or has lost its
/// disk, and its ledger with it. What is not in a ledger that is there never began.
fn may_have_migrated(view: &View<'_>, service: &ServiceName, phase: MigrationPhase) -> bool {
    let former = view.rollout().former_migrations(phase).get(service);
    former.is_some_and(|former| {
        let ledger = view.world.report(&former.on).map(|report| &report.ledger);
        !former.is_done && ledger.is_none_or(|ledger| ledger.history.is_empty())
    })
}

/// Whether the part is asked for, and its time has come as far as instances are concerned.
fn is_due(view: &View<'_>, service: &ServiceName, release: ReleaseId, phase: MigrationPhase) -> bool {
    let rollout = view.rollout();
    let is_time = || match phase {
        MigrationPhase::Expand => {
            let mut of_service =
                rollout.plan.baseline.iter().filter(|(instance, _)| instance.service == *service);
            !of_service.all(|(_, before)| *before == Some(release))
        }
        MigrationPhase::Contract => {
            !rollout.plan.is_partial && !rollout.left_out.keys().any(|instance| instance.service == *service)
        }
    };
    has_command(view, service, phase) && is_time()
}

fn has_command(view: &View<'_>, service: &ServiceName, phase: MigrationPhase) -> bool {
    let migration = view.world.services.get(service).and_then(|known| known.migrate.as_ref());
    view.rollout().plan.direction == Direction::Forward
        && migration.is_some_and(|migration| migration.command(phase).is_some())
}
