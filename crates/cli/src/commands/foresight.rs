//! What a plan says of its canary: how long a fault would stay unseen at the present traffic.

use std::time::Duration;

use greenlight_controller::{Foreseen, StepForeseen};
use greenlight_model::canary::Metric;
use greenlight_model::quantity::human_duration;

/// The lines for one service.
pub(crate) fn lines(foreseen: &Foreseen) -> Vec<String> {
    let service = &foreseen.service;
    let Some(traffic) = &foreseen.traffic else {
        let why = foreseen.unknown.as_deref().unwrap_or("its traffic is not known");
        return vec![format!("canary of {service}: how long a fault would stay unseen is not known: {why}")];
    };
    if traffic.requests_per_minute < 1.0 {
        return vec![format!(
            "canary of {service}: no request comes now, so any fault would stay unseen until some do"
        )];
    }
    let percent = foreseen.error_rate * 100.0;
    let errors = if foreseen.is_assumed {
        format!("{percent:.0}% errors are assumed, for too few have been counted")
    } else {
        format!("{percent:.2}% of {} failed so far", traffic.requests)
    };
    let head = format!(
        "canary of {service}: {:.0} requests a minute now, {errors}; on the average a fault is found after",
        traffic.requests_per_minute
    );
    std::iter::once(head).chain(foreseen.steps.iter().map(|step| format!("  {}", line(step)))).collect()
}

fn line(step: &StepForeseen) -> String {
    let of = match step.metric {
        Metric::Errors => "errors",
        Metric::LatencyP50 => "requests slower than half were",
        Metric::LatencyP90 => "requests slower than p90",
        Metric::LatencyP99 => "requests slower than p99",
        Metric::Missing => "missing requests",
    };
    let time =
        |minutes: f64| human_duration(Duration::try_from_secs_f64(minutes * 60.0).unwrap_or(Duration::MAX));
    let faults = step.faults.iter().map(|fault| match &fault.found {
        Some(found) => {
            format!(
                "{} ({} requests) when {} times as many",
                time(found.minutes),
                found.canary_requests,
                fault.times
            )
        }
        None => format!("never when {} times as many", fault.times),
    });
    let faults: Vec<String> = faults.collect();
    let pass = step
        .pass
        .as_ref()
        .map(|pass| format!("; one as good as the others passes after {}", time(pass.minutes)));
    format!("at {}, {of}: {}{}", step.share, faults.join(", "), pass.unwrap_or_default())
}
