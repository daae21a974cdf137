//! `after`: an earlier environment has finished the release, and it has run there for a while.

use std::time::Duration;

use greenlight_model::decision::Outcome;
use greenlight_model::fleet::After;
use greenlight_model::id::{ReleaseId, ServiceName};
use greenlight_model::quantity::human_duration;
use greenlight_model::world::{Gate, Light};

use crate::Asked;

pub(crate) fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    let Some(after) = &asked.environment.after else { return Vec::new() };
    let runs_there = |service: &ServiceName| {
        let earlier = asked.fleet.environments.get(&after.environment);
        earlier.is_some_and(|earlier| earlier.hosts.contains_key(service))
    };
    let services = asked.targets.iter().filter(|(service, _)| runs_there(service));
    services
        .map(|(service, release)| Gate {
            name: format!("after {} ({service})", after.environment),
            light: light(asked, after, service, *release),
        })
        .collect()
}

fn light(asked: &Asked<'_>, after: &After, service: &ServiceName, release: ReleaseId) -> Light {
    let earlier = &after.environment;
    let latest = asked
        .history
        .of_environment(earlier)
        .find(|rollout| !rollout.plan.is_partial && rollout.plan.targets.get(service) == Some(&release))
        .map(|rollout| (&rollout.outcome, rollout.ended_at));
    let deploy_there = || format!("deploy it there first: greenlight deploy {earlier}");
    match latest {
        None => Light::Red {
            why: format!("{} never went to {earlier}; {}", asked.label(release), deploy_there()),
        },
        Some((None, _)) => Light::Amber { why: format!("the rollout to {earlier} has not ended") },
        Some((Some(Outcome::Done { left_out }), Some(ended_at))) if left_out.is_empty() => {
            // By a clock that was set back since, it has run for no time.
            let ran = Duration::try_from(asked.now.duration_since(ended_at)).unwrap_or_default();
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
