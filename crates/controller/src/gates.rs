//! The lights on the way into an environment, judged from the records.

use std::collections::BTreeMap;

use greenlight_model::Timestamp;
use greenlight_model::decision::Outcome;
use greenlight_model::fleet::{After, Environment, Fleet};
use greenlight_model::id::{ReleaseId, ServiceName};
use greenlight_model::quantity::human_duration;
use greenlight_model::record::History;
use greenlight_model::rollout::Direction;
use greenlight_model::world::{Gate, Light};

/// Every gate of the environment for these releases. Going back passes no gate: nothing may stand in the way of it.
#[must_use]
pub fn gates(
    fleet: &Fleet,
    environment: &Environment,
    history: &History,
    targets: &BTreeMap<ServiceName, ReleaseId>,
    direction: Direction,
    now: Timestamp,
) -> Vec<Gate> {
    let (Some(after), Direction::Forward) = (&environment.after, direction) else { return Vec::new() };
    targets
        .iter()
        .filter(|(service, _)| {
            let earlier = fleet.environments.get(&after.environment);
            earlier.is_some_and(|earlier| earlier.hosts.contains_key(*service))
        })
        .map(|(service, release)| Gate {
            name: format!("after {} ({service})", after.environment),
            light: after_light(after, history, service, *release, now),
        })
        .collect()
}

fn after_light(
    after: &After,
    history: &History,
    service: &ServiceName,
    release: ReleaseId,
    now: Timestamp,
) -> Light {
    let earlier = &after.environment;
    let latest = history
        .of_environment(earlier)
        .find(|rollout| !rollout.plan.is_partial && rollout.plan.targets.get(service) == Some(&release))
        .map(|rollout| (&rollout.outcome, rollout.ended_at));
    let deploy_there = || format!("deploy it there first: greenlight deploy {earlier}");
    match latest {
        None => {
            Light::Red { why: format!("{} never went to {earlier}; {}", release.short(), deploy_there()) }
        }
        Some((None, _)) => Light::Amber { why: format!("the rollout to {earlier} has not ended") },
        Some((Some(Outcome::Done { left_out }), Some(ended_at))) if left_out.is_empty() => {
            let ran = now.duration_since(ended_at).unsigned_abs();
            if ran >= after.soak {
                return Light::Green { why: format!("it has run in {earlier} for {}", human_duration(ran)) };
            }
            let (has, needs) = (human_duration(ran), human_duration(after.soak));
            Light::Amber { why: format!("it has run in {earlier} for {has} of {needs}") }
        }
        Some((Some(Outcome::Done { left_out }), _)) => {
            let hosts: Vec<String> = left_out.keys().map(ToString::to_string).collect();
            Light::Red { why: format!("in {earlier} it is missing on {}", hosts.join(", ")) }
        }
        Some((Some(Outcome::TurnedBack { why }), _)) => {
            Light::Red { why: format!("it was turned back in {earlier}: {why}") }
        }
        Some((Some(Outcome::Refused { why }), _)) => {
            Light::Red { why: format!("it was refused in {earlier}: {why}") }
        }
        Some((Some(Outcome::Stuck { why, .. }), _)) => {
            Light::Red { why: format!("{earlier} is stuck halfway: {why}") }
        }
    }
}
