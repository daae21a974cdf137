//! A rollout whose controller and records are lost after any turn is gone on with from what hosts and balancers show: it
//! ends as it would have, or goes back.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use greenlight_model::charter::{Charter, Found};
use greenlight_model::decision::Outcome;
use greenlight_model::fleet::{Floor, Strategy};
use greenlight_model::history::History;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{OperatorRequest, Rollout};
use greenlight_model::traffic::{Admission, BalancerReport, ServerHealth};
use greenlight_model::world::World;
use greenlight_simulator::{Faults, Turn};
use support::*;

/// What another controller folds: nothing but the charter and what it finds.
fn adopted(world: &World) -> Rollout {
    let plan = world.rollout.plan.clone();
    let found = Found::of(&plan, &world.environment, &world.inventory, &world.traffic);
    let id = plan.id.clone();
    let charter =
        Charter { plan, started_at: start(), releases: BTreeMap::new(), definitions: BTreeMap::new() };
    let body = RecordBody::RolloutAdopted { charter, found };
    let mut history = History::default();
    history.apply(&Record { seq: 1, at: world.now, by: "other@laptop".to_owned(), body }).unwrap();
    history.rollouts.remove(&id).unwrap()
}

fn is_claimed(world: &World) -> bool {
    let reports = world.rollout.plan.baseline.keys().filter_map(|instance| world.report(instance));
    reports.into_iter().any(|report| report.ledger.claim.is_some())
}

/// By the time that somebody else goes on, balancers have noticed what runs, and what was drained has no sessions left.
fn balancers_look(world: &mut World) {
    let proven: Vec<_> = world
        .rollout
        .plan
        .baseline
        .keys()
        .filter(|instance| world.report(instance).unwrap().proven().is_some())
        .cloned()
        .collect();
    for (balancer, report) in world.environment.balancers.iter().zip(&mut world.traffic) {
        let BalancerReport::Servers(servers) = report else { continue };
        for (host, server) in servers {
            let runs = proven.iter().any(|one| one.host == *host && one.service == balancer.service);
            if server.admission != Admission::Ready {
                server.sessions = 0;
            }
            server.health = if runs { ServerHealth::Up } else { ServerHealth::Down };
        }
    }
}

#[test]
fn adopted_after_any_turn_it_ends() {
    let hour = Duration::from_secs(3600);
    for fleet in [
        fleet("web: a b c"),
        Fleet { strategy: Strategy::BlueGreen, floor: Floor::Count(2), ..fleet("web: a b c d") },
        Fleet { strategy: Strategy::Halves { keep_for: hour }, standby: "s", ..fleet("web: a b s") },
        Fleet { migrating: "web", has_smoke: true, sessions: 2, ..fleet("web: a b; worker: b c") },
        Fleet { is_first: true, ..fleet("web: a b") },
    ] {
        for request in [OperatorRequest::Resume, OperatorRequest::Abort] {
            // Aborted already when its controller is lost, or not.
            for aborts_at in [None, Some(9)] {
                let mut adoptions = 0;
                for lost_at in 1.. {
                    let mut driver = Driver::new(fleet.world(), Faults::default());
                    let mut is_over = false;
                    for turn in 0..lost_at {
                        if Some(turn) == aborts_at {
                            driver.simulation.ask(OperatorRequest::Abort, "").unwrap();
                        }
                        is_over = is_over || matches!(driver.turn(), Turn::Ended(_));
                    }
                    if is_over {
                        break;
                    }
                    let mut world = driver.simulation.world().clone();
                    if !is_claimed(&world) {
                        continue;
                    }
                    adoptions += 1;
                    let was_migrating = !world.rollout.migrations.is_empty();
                    // What was under way ends with its controller; a switch that was begun is done or not, and the host
                    // says which.
                    world.in_flight.clear();
                    balancers_look(&mut world);
                    world.rollout = adopted(&world);
                    let was_told_to_go_back = world.rollout.is_turning_back();
                    let mut driver = Driver::new(world, Faults::default());
                    driver.simulation.ask(request, "").unwrap();
                    let run = driver.finish();
                    let trace = || format!("lost after turn {lost_at}\n{}", run.trace.join("\n"));
                    match (&run.outcome, request) {
                        (Some(Outcome::Done { left_out }), OperatorRequest::Resume) => {
                            assert!(left_out.is_empty() && !was_told_to_go_back, "{}", trace());
                        }
                        (Some(Outcome::TurnedBack { .. }), _) => {
                            assert!(request == OperatorRequest::Abort || was_told_to_go_back, "{}", trace());
                        }
                        // How a migration ended that was under way is not known, so a person must look.
                        (None, OperatorRequest::Resume) => {
                            assert!(was_migrating && run.waits.len() == 1, "{:?}\n{}", run.waits, trace());
                        }
                        other => panic!("{other:?}\n{}", trace()),
                    }
                }
                assert!(adoptions > 5, "{adoptions}");
            }
        }
    }
}
