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

#[cfg(test)]
mod tests {
    use super::*;
    use greenlight_model::fleet::{Floor, OnFailure, Strategy, Timeouts};
    use greenlight_model::id::{EnvironmentName, Generation};
    use greenlight_model::record::{Record, RecordBody};
    use greenlight_model::rollout::Plan;
    use std::collections::BTreeSet;
    use std::time::Duration;

    fn environment(name: &str, after: Option<After>) -> Environment {
        Environment {
            name: name.parse().unwrap(),
            branch: None,
            hosts: BTreeMap::from([("web".parse().unwrap(), vec!["a".parse().unwrap()])]),
            host_settings: BTreeMap::new(),
            strategy: Strategy::BlueGreen,
            floor: Floor::Count(0),
            failure_budget: 0,
            on_failure: OnFailure::TurnBack,
            after,
            standby: BTreeSet::new(),
            balancers: Vec::new(),
            timeouts: Timeouts::default(),
            retries: 0,
            variables: BTreeMap::new(),
        }
    }

    /// The light of production, which comes a minute after staging, when staging's rollout ended like this.
    fn light(ended: Option<Outcome>, is_partial: bool, seconds_later: u64) -> Light {
        let staging: EnvironmentName = "staging".parse().unwrap();
        let soak = Duration::from_secs(60);
        let production = environment("production", Some(After { environment: staging.clone(), soak }));
        let fleet = Fleet {
            environments: BTreeMap::from([
                (staging.clone(), environment("staging", None)),
                (production.name.clone(), production.clone()),
            ]),
            ..Fleet::default()
        };
        let targets = BTreeMap::from([("web".parse().unwrap(), ReleaseId::from_bytes([1; 32]))]);
        let plan = Plan {
            id: "r".parse().unwrap(),
            environment: staging,
            direction: Direction::Forward,
            targets: targets.clone(),
            baseline: BTreeMap::new(),
            waves: Vec::new(),
            generation: Generation(2),
            started_by: "op@desk".to_owned(),
            digest: None,
            is_partial,
        };
        let mut bodies = vec![RecordBody::RolloutStarted { plan, services: BTreeMap::new() }];
        bodies.extend(ended.map(|outcome| RecordBody::RolloutEnded {
            rollout: "r".parse().unwrap(),
            outcome,
            running: BTreeMap::new(),
        }));
        let mut history = History::default();
        for (seq, body) in (1..).zip(bodies) {
            let record = Record { seq, at: Timestamp::UNIX_EPOCH, by: String::new(), body };
            history.apply(&record).unwrap();
        }
        let now = Timestamp::UNIX_EPOCH + Duration::from_secs(seconds_later);
        let mut lights = gates(&fleet, &production, &history, &targets, Direction::Forward, now);
        assert!(gates(&fleet, &production, &history, &targets, Direction::Back, now).is_empty());
        lights.remove(0).light
    }

    #[test]
    fn a_later_environment_waits_for_the_earlier_one() {
        let done = || Some(Outcome::Done { left_out: BTreeMap::new() });
        assert!(matches!(light(done(), false, 60), Light::Green { .. }));
        assert!(matches!(light(done(), false, 59), Light::Amber { why } if why.contains("59.0s of 1m 0s")));
        assert!(matches!(light(None, false, 60), Light::Amber { .. }));
        let turned_back = Some(Outcome::TurnedBack { why: "it crashed".to_owned() });
        assert!(matches!(light(turned_back, false, 60), Light::Red { why } if why.contains("it crashed")));
        let left_out = BTreeMap::from([("a/web".to_owned().try_into().unwrap(), "gone".to_owned())]);
        assert!(matches!(light(Some(Outcome::Done { left_out }), false, 60), Light::Red { .. }));
        // Some of its hosts are not the environment.
        assert!(matches!(light(done(), true, 60), Light::Red { why } if why.contains("never went")));
    }
}
