//! Before a canary: how long a fault of which size would stay unseen at the traffic that there is.
//!
//! Traffic is what the balancers count over a few seconds; the share of errors is what they have counted since they began. What
//! is not known is said, never assumed, but for one thing: where nothing has failed yet, one request of a hundred is assumed to.
//! Not in here: the statistics (`verdict`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use greenlight_drivers::canary::Counts;
use greenlight_model::canary::Metric;
use greenlight_model::fleet::{Environment, Strategy};
use greenlight_model::id::ServiceName;
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::Plan;
use greenlight_verdict::{Expectation, Foresight, until_abort, until_pass};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::gather::Gatherer;
use crate::judging::settings;

/// For how long traffic is counted: a moment, for whoever waits for the plan.
const COUNTED_FOR: Duration = Duration::from_secs(3);
/// The sizes of faults that are shown: times as many bad requests as now.
const SIZES: [f64; 2] = [2.0, 5.0];
/// With fewer requests, what share of them fails is not known.
const REQUESTS_MIN: u64 = 1_000;
/// The share of errors that is assumed where it is not known, or none has been seen.
const ERRORS_ASSUMED: f64 = 0.01;

/// The traffic of a service.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PresentTraffic {
    /// Requests a minute, as counted just now.
    pub requests_per_minute: f64,
    /// Requests since its balancers began to count.
    pub requests: u64,
    /// How many of those failed.
    pub errors: u64,
    /// Whether its balancers count latencies.
    pub has_latencies: bool,
}

/// What can be seen of a service's canary.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Foreseen {
    /// The service.
    pub service: ServiceName,
    /// Its traffic, where that is known.
    pub traffic: Option<PresentTraffic>,
    /// Why it is not.
    pub unknown: Option<String>,
    /// The share of requests that fails now, as it is reckoned with.
    pub error_rate: f64,
    /// Whether that was assumed.
    pub is_assumed: bool,
    /// What each step would find.
    pub steps: Vec<StepForeseen>,
}

/// What a step of a canary would find.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepForeseen {
    /// The canary's share of the traffic.
    pub share: Percent,
    /// What is compared.
    pub metric: Metric,
    /// Faults, by their size.
    pub faults: Vec<FaultForeseen>,
    /// When a canary that is as good as the others passes, on the average.
    pub pass: Option<Foresight>,
}

/// When a fault would be found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FaultForeseen {
    /// How many times as many bad requests it makes.
    pub times: f64,
    /// When it is found, on the average; none when it would never be.
    pub found: Option<Foresight>,
}

/// What the canary of a plan could see at the present traffic; nothing where the plan has none.
pub async fn foresee(gatherer: &Arc<Gatherer>, environment: &Environment, plan: &Plan) -> Vec<Foreseen> {
    let on_trial: BTreeSet<&ServiceName> = plan
        .waves
        .iter()
        .filter(|wave| !wave.steps.is_empty())
        .flat_map(|wave| wave.instances.iter().map(|instance| &instance.service))
        .collect();
    let judged: BTreeSet<&ServiceName> = environment
        .balancers
        .iter()
        .map(|balancer| &balancer.service)
        .filter(|service| on_trial.contains(service))
        .collect();
    if judged.is_empty() {
        return Vec::new();
    }
    let before = counts(gatherer).await;
    tokio::time::sleep(COUNTED_FOR).await;
    let now = counts(gatherer).await;
    let services = judged.len();
    judged
        .into_iter()
        .map(|service| {
            let traffic = traffic(environment, service, &before, &now);
            foreseen(environment, service, traffic, services)
        })
        .collect()
}

type Readings = BTreeMap<usize, (Instant, Result<Counts, String>)>;

async fn counts(gatherer: &Arc<Gatherer>) -> Readings {
    let mut reads = JoinSet::new();
    for index in 0..gatherer.balancers().len() {
        let gatherer = Arc::clone(gatherer);
        reads.spawn(async move {
            let counts = gatherer.balancers()[index].counts().await.map_err(|error| error.to_string());
            (index, (Instant::now(), counts))
        });
    }
    reads.join_all().await.into_iter().collect()
}

fn traffic(
    environment: &Environment,
    service: &ServiceName,
    before: &Readings,
    now: &Readings,
) -> Result<PresentTraffic, String> {
    let mut sum = PresentTraffic { requests_per_minute: 0.0, requests: 0, errors: 0, has_latencies: true };
    let balancers = environment.balancers.iter().enumerate();
    for (index, balancer) in balancers.filter(|(_, balancer)| balancer.service == *service) {
        let (Some((earlier_at, earlier)), Some((at, later))) = (before.get(&index), now.get(&index)) else {
            return Err(format!("{} was not asked", balancer.title()));
        };
        let (earlier, later) =
            (earlier.as_ref().map_err(Clone::clone)?, later.as_ref().map_err(Clone::clone)?);
        let all = |counts: &Counts| {
            counts.rows.iter().fold((0_u64, 0_u64), |(requests, errors), row| {
                (requests + row.requests + row.undelivered, errors + row.errors + row.undelivered)
            })
        };
        let ((past, _), (requests, errors)) = (all(earlier), all(later));
        let grown = (earlier.instance == later.instance).then(|| requests.checked_sub(past)).flatten();
        let Some(grown) = grown else {
            return Err(format!("{} began to count anew just now", balancer.title()));
        };
        sum.requests_per_minute += grown as f64 * 60.0 / at.duration_since(*earlier_at).as_secs_f64();
        sum.requests += requests;
        sum.errors += errors;
        sum.has_latencies &= !later.bounds_us.is_empty();
    }
    Ok(sum)
}

/// What is seen at this traffic. Pure.
fn foreseen(
    environment: &Environment,
    service: &ServiceName,
    traffic: Result<PresentTraffic, String>,
    services: usize,
) -> Foreseen {
    let (traffic, unknown) = match traffic {
        Ok(seen) => (Some(seen), None),
        Err(why) => (None, Some(why)),
    };
    let known = traffic.as_ref().filter(|seen| seen.requests >= REQUESTS_MIN && seen.errors > 0);
    let error_rate = known.map_or(ERRORS_ASSUMED, |seen| seen.errors as f64 / seen.requests as f64);
    let mut foreseen = Foreseen {
        service: service.clone(),
        is_assumed: known.is_none(),
        error_rate,
        steps: Vec::new(),
        traffic,
        unknown,
    };
    let (Strategy::Canary(canary), Some(seen)) = (&environment.strategy, &foreseen.traffic) else {
        return foreseen;
    };
    // A judge checks that there are bounds; how many does not matter before anything is counted.
    let bounds_us: &[u64] = if seen.has_latencies { &[1] } else { &[] };
    let settings = settings(&canary.judging, canary.steps.len(), services, bounds_us);
    for step in &canary.steps {
        for (stated, comparison) in canary.judging.compare.iter().zip(&settings.comparisons) {
            let bad_rate = match stated.metric {
                Metric::Errors => error_rate,
                Metric::LatencyP50 => 0.5,
                Metric::LatencyP90 => 0.1,
                Metric::LatencyP99 => 0.01,
                // Of what did not come nothing is bad.
                Metric::Missing => continue,
            };
            let expectation = Expectation {
                requests_per_minute: seen.requests_per_minute,
                canary_share: f64::from(step.share.get()) / 100.0,
                bad_rate,
                burst: 1.0,
            };
            let faults = SIZES
                .iter()
                .filter(|size| **size * bad_rate <= 1.0)
                .map(|size| FaultForeseen {
                    times: *size,
                    found: until_abort(&settings, comparison, &expectation, *size),
                })
                .collect();
            let pass = until_pass(&settings, comparison, &expectation);
            foreseen.steps.push(StepForeseen { share: step.share, metric: stated.metric, faults, pass });
        }
    }
    foreseen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judging::tests::{environment, reading};

    fn readings(at: Instant, requests: u64, errors: u64) -> Readings {
        BTreeMap::from([(0, (at, reading(0, 1, (requests, errors), (0, 0)).counts))])
    }

    /// Counts of now, and of three seconds later.
    fn after(before: (u64, u64), now: (u64, u64)) -> Foreseen {
        let at = Instant::now();
        seen(&readings(at, before.0, before.1), &readings(at + Duration::from_secs(3), now.0, now.1))
    }

    fn seen(before: &Readings, now: &Readings) -> Foreseen {
        let mut environment = environment();
        let Strategy::Canary(canary) = &mut environment.strategy else {
            panic!("{:?}", environment.strategy)
        };
        canary.steps[0].share = 10.try_into().unwrap();
        let service = "web".parse().unwrap();
        foreseen(&environment, &service, traffic(&environment, &service, before, now), 1)
    }

    #[test]
    fn more_traffic_and_larger_faults_are_seen_sooner() {
        let minutes = |foreseen: &Foreseen, fault: usize| {
            foreseen.steps[0].faults[fault].found.as_ref().unwrap().minutes
        };
        let busy = after((9_000, 90), (12_000, 120));
        let traffic = busy.traffic.as_ref().unwrap();
        assert!((traffic.requests_per_minute - 60_000.0).abs() < 1.0, "{traffic:?}");
        assert!(!busy.is_assumed && (busy.error_rate - 0.01).abs() < 1e-9, "{busy:?}");
        let quiet = after((9_000, 90), (9_030, 90));
        assert!(minutes(&busy, 1) < minutes(&busy, 0));
        assert!(minutes(&quiet, 0) > 50.0 * minutes(&busy, 0));
        // At 10 % of the traffic a fault of twice 1 % takes the canary some 1,500 to 2,000 requests (docs/performance.md).
        let requests = busy.steps[0].faults[0].found.as_ref().unwrap().canary_requests;
        assert!((700..3_000).contains(&requests), "{requests}");
    }

    #[test]
    fn what_is_not_known_is_said() {
        let none = after((100, 0), (100, 0));
        assert!(
            none.is_assumed && none.steps[0].faults.iter().all(|fault| fault.found.is_none()),
            "{none:?}"
        );
        let anew = after((100, 0), (50, 0));
        assert!(anew.traffic.is_none() && anew.unknown.unwrap().contains("began to count anew"));
        let silent = BTreeMap::from([(0, (Instant::now(), Err("no way there".to_owned())))]);
        assert_eq!(seen(&silent, &silent).unknown.as_deref(), Some("no way there"));
    }
}
