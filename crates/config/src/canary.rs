//! A canary in the fleet file: its table, what does not fit together in it, and what it becomes.

use std::time::Duration;

use greenlight_model::canary::{
    Canary, CanaryStep, Comparison, Guard, GuardMetric, Judging, Metric, OnInconclusive, Until,
};
use greenlight_model::fleet::BatchSize;
use greenlight_model::quantity::Percent;
use serde_json::{Value, json};
use toml::de::DeValue;

use crate::check::{Sites, balancers};
use crate::language::{Amount, Environment};
use crate::problem::Problems;
use crate::read::{Key, List, Node, OneOrMany, Read, Refusal, Text, table};
use crate::text::{HaproxyPlace, Limit, StrategyKind};

/// Steps where none are stated: small enough that few see a bad release, large enough to be sure before everybody does.
const USUAL_SHARES: [u8; 3] = [5, 25, 50];

/// How long a guard is violated before it counts, where nothing is stated: longer than a garbage collection, shorter than a person
/// needs to look.
const USUAL_HOLD: Duration = Duration::from_secs(30);
/// A larger limit of a guard would be none.
const ABOVE_MAX: f64 = 1000.0;

table! {
    /// A canary: the first hosts take a share of the traffic, step by step, while they are judged against the others.
    CanaryTable, "a canary", {
        /// How many hosts are the canary, the first in order, as a number or a share. Default: 1.
        hosts: Amount = "\"10%\"",
        /// The shares of the traffic, rising, each with what ends it: `until pass`, or `for` a time. Default: 5%, 25% and 50%,
        /// each until pass.
        steps: OneOrMany<StepText> = "[\"5% until pass\", \"25% until pass\", \"50% for 10m\"]",
        /// How long a host's first requests do not count: its caches are cold. Default: 1m.
        warmup: Duration = "\"3m\"",
        /// How long a step may be without a verdict. Default: 1h.
        max_time: Limit = "\"60m\"",
        /// What happens then: `hold` (it goes on being judged), `turn-back` or `ask` (a person resumes or aborts). Default: hold.
        on_inconclusive: OnInconclusive = "\"ask\"",
        /// How often a canary that is as good as the rest may be turned back, over all metrics of a rollout. Default: 0.01.
        false_abort_budget: Budget = "0.01",
        /// What is compared with the hosts that run the old release. Default: errors, and with the built-in router `latency_p99`.
        compare: List<ComparisonTable> = "[{ metric = \"errors\", tolerate = 1.0, pass_if_below = 1.5 }]",
        /// Hard limits on the canary's hosts: beyond one the rollout turns back, whatever the requests say. Default: none.
        guard: List<GuardTable> = "[{ metric = \"memory\", above = 90, hold = \"30s\" }]",
    }
}

table! {
    /// One thing that is compared.
    ComparisonTable, "a comparison", {
        /// What: `errors`, `latency_p50`, `latency_p90`, `latency_p99` or `missing` (requests that should have come and did not).
        metric [required]: Metric = "\"errors\"",
        /// How many times worse than the others is tolerated. Default: 1.0, nothing worse.
        tolerate: Ratio = "1.0",
        /// It passes when it is surely less than so many times worse. Default: 1.5, or half as much again as is tolerated.
        pass_if_below: Ratio = "1.5",
    }
}

table! {
    /// A hard limit on the canary's hosts.
    GuardTable, "a guard", {
        /// What: `host_cpu` and `memory` (of the host, in percent), `cpu_per_request` (processor time of the service for a
        /// request, as a factor of what it was on the same host before the rollout) or `restarts` (of the service's processes,
        /// since the canary was admitted).
        metric [required]: GuardMetric = "\"host_cpu\"",
        /// What is more than this is too much.
        above [required]: Above = "90",
        /// For how long every sample must be; one is taken each second. Default: 30s, and of restarts no time.
        hold: Duration = "\"30s\"",
    }
}

choice!(GuardMetric, "something that a guard watches", {
    "cpu_per_request" => Self::CpuPerRequest,
    "host_cpu" => Self::HostCpu,
    "memory" => Self::Memory,
    "restarts" => Self::Restarts,
});
choice!(OnInconclusive, "what happens without a verdict", {
    "hold" => Self::Hold,
    "turn-back" => Self::TurnBack,
    "ask" => Self::Ask,
});
choice!(Metric, "something that is compared", {
    "errors" => Self::Errors,
    "latency_p50" => Self::LatencyP50,
    "latency_p90" => Self::LatencyP90,
    "latency_p99" => Self::LatencyP99,
    "missing" => Self::Missing,
});
/// A step: `5% until pass` or `25% for 10m`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepText(pub(crate) CanaryStep);

impl Text for StepText {
    const EXPECTED: &'static str = "a step such as \"5% until pass\" or \"25% for 10m\"";
    const PATTERN: Option<&'static str> = Some("^[0-9]{1,2}% (until pass|for [0-9]+(ms|s|m|h|d))$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let refused = || {
            Refusal::help(format!("`{text}` is not {}", <Self as Text>::EXPECTED), "write `5% until pass`")
        };
        let (share, rest) = text.split_once(' ').ok_or_else(refused)?;
        let share: Percent = share.parse().map_err(|_| refused())?;
        if !(1..=99).contains(&share.get()) {
            return Err(Refusal::help(
                format!("a canary gets 1% to 99% of the traffic, not {share}"),
                "the others have to get some, to be compared with; after the last step all hosts follow",
            ));
        }
        let until = match rest.trim().split_once(' ') {
            Some(("until", "pass")) => Until::Pass,
            Some(("for", time)) => Until::Elapsed(Duration::from_text(time)?),
            _ => return Err(refused()),
        };
        Ok(Self(CanaryStep { share, until }))
    }
}

/// A ratio from 1 to 10, kept in hundredths.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ratio(pub(crate) u32);

impl Read for Ratio {
    const EXPECTED: &'static str = "a number such as 1.5";
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        read_number(node, Self::EXPECTED, 1.0..=10.0, 100.0, problems).map(Self)
    }
    fn schema() -> Value {
        json!({ "type": "number", "minimum": 1, "maximum": 10 })
    }
}

/// A probability from 0.001 to 0.2, kept in thousandths.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget(pub(crate) u32);

impl Read for Budget {
    const EXPECTED: &'static str = "a probability such as 0.01";
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        read_number(node, Self::EXPECTED, 0.001..=0.2, 1000.0, problems).map(Self)
    }
    fn schema() -> Value {
        json!({ "type": "number", "minimum": 0.001, "maximum": 0.2 })
    }
}

/// The limit of a guard, kept in hundredths.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Above(pub(crate) u32);

impl Read for Above {
    const EXPECTED: &'static str = "a number such as 90 or 1.5";
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        read_number(node, Self::EXPECTED, 0.0..=ABOVE_MAX, 100.0, problems).map(Self)
    }
    fn schema() -> Value {
        json!({ "type": "number", "minimum": 0, "maximum": ABOVE_MAX })
    }
}

fn read_number(
    node: Node<'_>,
    expected: &str,
    bounds: std::ops::RangeInclusive<f64>,
    unit: f64,
    problems: &mut Problems,
) -> Option<u32> {
    let number: Option<f64> = match node.value.get_ref() {
        DeValue::Float(float) => float.as_str().parse().ok(),
        DeValue::Integer(integer) => integer.as_str().parse().ok(),
        _ => {
            node.wrong_type(expected, problems);
            return None;
        }
    };
    let Some(number) = number.filter(|number| bounds.contains(number)) else {
        let message = format!("`{}` must be from {} to {}", node.name, bounds.start(), bounds.end());
        node.bad_value(Refusal::new(message), problems);
        return None;
    };
    // Within the bounds it is far from the ends of the type.
    Some((number * unit).round() as u32)
}

/// What does not fit together.
pub(crate) fn check(environment: &Environment, sites: &Sites<'_>, problems: &mut Problems) {
    let strategy = environment.strategy.value().map(|strategy| &strategy.0);
    let is_canary = strategy.and_then(|strategy| strategy.kind.value()) == Some(&StrategyKind::Canary);
    if let Some(table) = environment.canary.get()
        && !is_canary
        && !environment.strategy.is_bad()
    {
        problems.error(
            "not-of-this-strategy",
            &table.span,
            "`canary` goes with the strategy of that name",
            "write `strategy = \"canary\"`, or leave `canary` out".to_owned(),
        );
    }
    if !is_canary {
        return;
    }
    let Some(strategy) = environment.strategy.get() else { return };
    if environment.balancer.is_absent() {
        problems.error(
            "canary-without-balancer",
            &strategy.span,
            "a canary takes a share of the traffic, and this environment has no `balancer` to share it out",
            "state the balancer: `balancer = { haproxy = \"HOST:/run/haproxy/admin.sock\" }`".to_owned(),
        );
    }
    if sites.complete
        && let Some((service, _)) = sites.services.iter().find(|(_, hosts)| hosts.len() < 2)
    {
        problems.error(
            "canary-without-others",
            &strategy.span,
            format!("`{service}` has one host: there are no others to compare it with"),
            "a canary needs two hosts or more".to_owned(),
        );
    }
    for balancer in balancers(environment) {
        if let Some(place) = balancer.haproxy.get()
            && matches!(place.value, HaproxyPlace::Tcp(_))
        {
            problems.warning(
                "canary-without-lease",
                &place.span,
                "when the controller dies, a canary keeps its share here until somebody goes on: HAProxy has no leases, and over TCP \
                 no agent of ours ends it",
                "name the socket on its host: `haproxy = \"HOST:/run/haproxy/admin.sock\"`".to_owned(),
            );
        }
    }
    let Some(table) = environment.canary.value() else { return };
    check_guards(table, problems);
    let steps: Vec<_> = table.steps.value().into_iter().flat_map(|steps| &steps.0.items).collect();
    if let Some(stated) = table.steps.get()
        && stated.0.items.is_empty()
        && stated.0.complete
    {
        let help = "write `steps = [\"5% until pass\"]`".to_owned();
        problems.error("empty-steps", &stated.span, "no step of the canary is stated", help);
    }
    for pair in steps.windows(2) {
        if pair[1].0.share <= pair[0].0.share {
            problems.error(
                "falling-steps",
                &pair[1].span,
                format!("the step to {} comes after the one to {}", pair[1].0.share, pair[0].0.share),
                "let the shares rise".to_owned(),
            );
        }
    }
    let haproxy = balancers(environment).find(|balancer| !balancer.haproxy.is_absent());
    for comparison in table.compare.items() {
        let is_latency = matches!(
            comparison.metric.value(),
            Some(Metric::LatencyP50 | Metric::LatencyP90 | Metric::LatencyP99)
        );
        if let (true, Some(metric), Some(_)) = (is_latency, comparison.metric.get(), haproxy) {
            problems.error(
                "not-counted",
                &metric.span,
                "HAProxy keeps only averages of how long requests took, and those hide the slow ones",
                "compare errors and missing requests, or let the built-in router stand in front".to_owned(),
            );
        }
        let (tolerate, pass) = ratios(comparison);
        if let (Some(stated), true) = (comparison.pass_if_below.get(), pass <= tolerate) {
            problems.error(
                "never-passes",
                &stated.span,
                "a canary that is as bad as is tolerated would never pass",
                format!("let `pass_if_below` be more than {:.2}", f64::from(tolerate) / 100.0),
            );
        }
    }
}

/// A limit that nothing can be above, or that everything is.
fn check_guards(table: &CanaryTable, problems: &mut Problems) {
    for guard in table.guard.items() {
        let (Some(metric), Some(above)) = (guard.metric.value(), guard.above.get()) else { continue };
        let limit = above.value.0;
        let (is_good, help) = match metric {
            metric if metric.is_percentage() => {
                ((1..10_000).contains(&limit), "a percentage above 0 and below 100, such as `above = 90`")
            }
            GuardMetric::CpuPerRequest => {
                (limit > 100, "a factor of what it was before, more than 1, such as `above = 1.5`")
            }
            _ => (limit.is_multiple_of(100), "a whole number, such as `above = 0`"),
        };
        if !is_good {
            problems.error(
                "bad-guard",
                &above.span,
                "no canary is to be judged by this limit",
                help.to_owned(),
            );
        }
    }
}

fn ratios(comparison: &ComparisonTable) -> (u32, u32) {
    let tolerate = comparison.tolerate.value().map_or(100, |ratio| ratio.0);
    (tolerate, comparison.pass_if_below.value().map_or(tolerate + tolerate / 2, |ratio| ratio.0))
}

/// The canary of an environment, with every default filled in. `batch` is for the hosts after it.
pub(crate) fn build(
    table: Option<&CanaryTable>,
    batch: Vec<BatchSize>,
    has_latencies: bool,
) -> Option<Canary> {
    let absent = CanaryTable::default();
    let table = table.unwrap_or(&absent);
    let usual_steps = || {
        let shares = USUAL_SHARES.iter().filter_map(|share| Percent::try_from(*share).ok());
        shares.map(|share| CanaryStep { share, until: Until::Pass }).collect()
    };
    let compare = match &table.compare {
        Key::Is(stated) => stated.items.iter().map(|item| comparison(item)).collect::<Option<Vec<_>>>()?,
        _ => {
            let usual = |metric| Comparison { metric, tolerate_percent: 100, pass_if_below_percent: 150 };
            let latency = has_latencies.then_some(Metric::LatencyP99);
            [Some(Metric::Errors), latency].into_iter().flatten().map(usual).collect()
        }
    };
    Some(Canary {
        hosts: match table.hosts.value() {
            Some(Amount::Share(share)) => BatchSize::Share(*share),
            Some(Amount::Count(count)) => BatchSize::Count(*count),
            None => BatchSize::Count(1),
        },
        batch,
        steps: match table.steps.value() {
            Some(steps) => steps.0.items.iter().map(|step| step.0).collect(),
            None => usual_steps(),
        },
        judging: Judging {
            warmup: table.warmup.value().copied().unwrap_or(Duration::from_secs(60)),
            max_time: table.max_time.value().map_or(Duration::from_secs(3600), |limit| limit.0),
            on_inconclusive: table.on_inconclusive.value().copied().unwrap_or(OnInconclusive::Hold),
            false_aborts_per_mille: table.false_abort_budget.value().map_or(10, |budget| budget.0),
            compare,
            guards: table.guard.items().map(|item| guard(item)).collect::<Option<Vec<_>>>()?,
        },
    })
}

fn guard(stated: &GuardTable) -> Option<Guard> {
    let metric = *stated.metric.value()?;
    let usual = if metric == GuardMetric::Restarts { Duration::ZERO } else { USUAL_HOLD };
    let hold = stated.hold.value().copied().unwrap_or(usual);
    Some(Guard { metric, above_hundredths: stated.above.value()?.0, hold })
}

fn comparison(stated: &ComparisonTable) -> Option<Comparison> {
    let (tolerate_percent, pass_if_below_percent) = ratios(stated);
    Some(Comparison { metric: *stated.metric.value()?, tolerate_percent, pass_if_below_percent })
}
