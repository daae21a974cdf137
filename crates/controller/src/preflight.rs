//! Looking at every host before anything changes: for `greenlight preflight`, which only shows it, and for each instance of a
//! rollout, which does not begin without it.
//!
//! What cannot be read has failed; what somebody overrode stays in what is shown, as overridden.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use greenlight_link::message::{Event, Reply, Request, SecretValue};
use greenlight_model::Timestamp;
use greenlight_model::check::{Check, CheckOutcome};
use greenlight_model::fleet::{Environment, Service};
use greenlight_model::id::{HostName, Instance, VariableName};
use greenlight_model::manifest::Release;
use greenlight_model::quantity::human_duration;
use greenlight_model::requirements::Requirements;
use greenlight_model::rollout::{Direction, Plan};
use tokio::task::JoinSet;

use crate::clock;
use crate::hosts::{HostError, Hosts};
use crate::perform::{host_failed, unexpected};
use crate::spec::instance_spec;

/// How far a host's clock may be from this machine's: certificates and tokens are often good for a few seconds before their
/// time, and logs of several hosts are read beside each other.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(5);

/// What an instance is looked at for.
pub(crate) struct Question<'a> {
    pub(crate) environment: &'a Environment,
    pub(crate) instance: &'a Instance,
    pub(crate) service: &'a Service,
    pub(crate) release: &'a Release,
    pub(crate) plan: &'a Plan,
    pub(crate) secrets: &'a BTreeMap<VariableName, SecretValue>,
}

/// Looks at one instance. `watch` sees what the host says meanwhile.
pub(crate) async fn look(
    hosts: &Hosts,
    question: &Question<'_>,
    watch: impl FnMut(Event) + Send,
) -> Result<Vec<Check>, HostError> {
    let Question { environment, instance, service, release, plan, secrets } = *question;
    let host = &instance.host;
    let gone = || host_failed(format!("{instance} is not in the fleet file any more"));
    let requires = required(&service.requires, plan.direction);
    let value = |name: VariableName| Some((name.clone(), secrets.get(&name)?.clone()));
    let request = Request::Preflight {
        spec: instance_spec(service, environment, instance).ok_or_else(gone)?,
        secrets: requires.secrets().into_iter().filter_map(value).collect(),
        requires: Box::new(requires),
        release_bytes: release.bytes,
        release: release.id,
        identity: environment.host_settings.get(host).ok_or_else(gone)?.identity.clone(),
    };
    let before = clock::now();
    match hosts.call(host, request, environment.timeouts.activate, watch).await? {
        Reply::Checked { at, mut checks } => {
            checks.push(clock_check(before, at, clock::now()));
            overridden(plan, host, &mut checks);
            Ok(checks)
        }
        other => Err(unexpected(host, &other)),
    }
}

/// Going back must not be stopped by what ails the environment beside the release: that may be why somebody goes back.
fn required(stated: &Requirements, direction: Direction) -> Requirements {
    match direction {
        Direction::Forward => stated.clone(),
        Direction::Back => {
            Requirements { memory: None, reach: BTreeMap::new(), not_running: Vec::new(), ..stated.clone() }
        }
    }
}

/// A host that read its clock between two readings of ours is off by at least what it is outside of them.
fn clock_check(before: Timestamp, at: Timestamp, after: Timestamp) -> Check {
    let (off, word) = if at < before {
        (before.duration_since(at), "behind")
    } else if at > after {
        (at.duration_since(after), "ahead")
    } else {
        (jiff::SignedDuration::ZERO, "")
    };
    let off = off.unsigned_abs();
    let is_well = off <= CLOCK_SKEW_MAX;
    let found = if off < Duration::from_secs(1) {
        "in step".to_owned()
    } else {
        format!("{} {word}", human_duration(Duration::from_secs(off.as_secs())))
    };
    Check {
        name: "clock".to_owned(),
        outcome: if is_well { CheckOutcome::Passed } else { CheckOutcome::Failed },
        expected: format!("within {} of this machine's clock", human_duration(CLOCK_SKEW_MAX)),
        found,
        mend: if is_well {
            String::new()
        } else {
            "let a service such as chrony or systemd-timesyncd keep both clocks".to_owned()
        },
        version: None,
    }
}

/// Marks what somebody overrides.
fn overridden(plan: &Plan, host: &HostName, checks: &mut [Check]) {
    for check in checks {
        if check.outcome == CheckOutcome::Failed && plan.override_of(host, &check.name).is_some() {
            check.outcome = CheckOutcome::Overridden;
        }
    }
}

/// What was found on one instance: its checks, or why there are none.
#[derive(Debug, Clone)]
pub struct Looked {
    /// Which.
    pub instance: Instance,
    /// Every check; that it answers is one of them.
    pub checks: Vec<Check>,
}

/// Looks at every instance of a plan, all at once. Changes nothing.
pub async fn preflight(
    hosts: &Arc<Hosts>,
    environment: &Environment,
    plan: &Plan,
    services: &BTreeMap<greenlight_model::id::ServiceName, Service>,
    releases: &[Release],
    secrets: &BTreeMap<VariableName, SecretValue>,
) -> Vec<Looked> {
    let shared = Arc::new((environment.clone(), plan.clone(), secrets.clone()));
    let mut looks = JoinSet::new();
    for instance in plan.baseline.keys() {
        let target = plan.targets.get(&instance.service);
        let release = releases.iter().find(|release| Some(&release.id) == target).cloned();
        let service = services.get(&instance.service).cloned();
        let (Some(release), Some(service)) = (release, service) else { continue };
        let (hosts, shared, instance) = (Arc::clone(hosts), Arc::clone(&shared), instance.clone());
        looks.spawn(async move {
            let (environment, plan, secrets) = &*shared;
            let question = Question {
                environment,
                instance: &instance,
                service: &service,
                release: &release,
                plan,
                secrets,
            };
            let looked = look(&hosts, &question, |_| {}).await;
            let answers = answers(looked.as_ref().map(|_| ()).map_err(|error| error.why.as_str()));
            let checks = std::iter::once(answers).chain(looked.unwrap_or_default()).collect();
            Looked { instance, checks }
        });
    }
    let mut all = looks.join_all().await;
    // As the fleet file lists them, which is how they are changed.
    let order: Vec<Instance> = environment.instances().collect();
    all.sort_by_key(|looked| order.iter().position(|instance| *instance == looked.instance));
    all
}

pub(crate) fn answers(outcome: Result<(), &str>) -> Check {
    let (outcome, found, mend) = match outcome {
        Ok(()) => (CheckOutcome::Passed, "it does".to_owned(), String::new()),
        Err(why) => {
            let mend =
                "see to the host or to the way there; a host that cannot be read is never left out by itself";
            (CheckOutcome::Failed, why.to_owned(), mend.to_owned())
        }
    };
    Check {
        name: "answers".to_owned(),
        outcome,
        expected: "it answers".to_owned(),
        found,
        mend,
        version: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_by_what_it_is_outside_of_the_question_and_its_answer() {
        let at = |ms: i64| Timestamp::from_millisecond(1_700_000_000_000 + ms).unwrap();
        let of = |host: i64| {
            let check = clock_check(at(0), at(host), at(90_000));
            (check.outcome == CheckOutcome::Passed, check.found)
        };
        assert_eq!(of(45_000), (true, "in step".to_owned()));
        assert_eq!(of(-4_000), (true, format!("{} behind", human_duration(Duration::from_secs(4)))));
        assert_eq!(of(-6_000), (false, format!("{} behind", human_duration(Duration::from_secs(6)))));
        assert_eq!(
            of(90_000 + 7_200_000),
            (false, format!("{} ahead", human_duration(Duration::from_secs(7200))))
        );
    }
}
