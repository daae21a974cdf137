//! Hard limits on hosts.

use greenlight_verdict::{Guard, GuardMetric, Sample, Watch};

fn sample(second: u64) -> Sample {
    Sample {
        host: "c1".to_owned(),
        at_ms: second * 1000,
        cpu_percent: None,
        memory_percent: None,
        cpu_seconds_per_request: None,
        restarts: None,
    }
}

fn memory(second: u64, percent: f64) -> Sample {
    Sample { memory_percent: Some(percent), ..sample(second) }
}

fn guard(metric: GuardMetric, above: f64, hold_ms: u64) -> Guard {
    Guard { metric, above, hold_ms }
}

/// The second of the first alert.
fn first(watch: &mut Watch, samples: impl IntoIterator<Item = Sample>) -> Option<u64> {
    samples.into_iter().find(|sample| !watch.observe(sample).is_empty()).map(|sample| sample.at_ms / 1000)
}

#[test]
fn an_alert_comes_when_it_held() {
    let watch = || Watch::new(vec![guard(GuardMetric::Memory, 90.0, 30_000)]);
    assert_eq!(first(&mut watch(), (0..100).map(|s| memory(s, 95.0))), Some(30));
    assert_eq!(first(&mut watch(), (0..100).map(|s| memory(s, 90.0))), None, "at the limit is not above it");
    let dips = (0..100).map(|s| memory(s, if s % 20 == 19 { 80.0 } else { 95.0 }));
    assert_eq!(first(&mut watch(), dips), None);
    let after_a_gap = (0..20).chain(50..100).map(|s| memory(s, 95.0));
    assert_eq!(first(&mut watch(), after_a_gap), Some(80), "what was not seen did not hold");
    let mut watch = watch();
    first(&mut watch, (0..30).map(|s| memory(s, 95.0)));
    let alert = watch.observe(&memory(30, 96.0)).remove(0);
    assert_eq!(alert.to_string(), "c1: host memory at 96.0 %, above 90 % for 30 s");
    assert!(watch.observe(&memory(30, 96.0)).is_empty(), "the same sample twice");
}

#[test]
fn hosts_hold_each_for_itself() {
    let mut watch = Watch::new(vec![guard(GuardMetric::Cpu, 80.0, 5_000)]);
    let of = |host: &str, second| Sample { host: host.to_owned(), cpu_percent: Some(99.0), ..sample(second) };
    let turns = (0..10).map(|second| of(if second % 2 == 0 { "c1" } else { "c2" }, second));
    assert_eq!(first(&mut watch, turns), Some(6));
}

#[test]
fn cpu_per_request_is_held_against_the_same_host_before() {
    let mut watch = Watch::new(vec![guard(GuardMetric::CpuPerRequest, 1.5, 10_000)]);
    let used = |second, seconds| Sample { cpu_seconds_per_request: Some(seconds), ..sample(second) };
    assert_eq!(
        first(&mut watch.clone(), (100..200).map(|s| used(s, 1.0))),
        None,
        "nothing to hold it against"
    );
    for second in 0..60 {
        watch.learn(&used(second, 0.010));
    }
    assert_eq!(first(&mut watch.clone(), (100..200).map(|s| used(s, 0.014))), None);
    assert_eq!(first(&mut watch, (100..200).map(|s| used(s, 0.016))), Some(110));
}

#[test]
fn restarts_are_counted() {
    let mut watch = Watch::new(vec![guard(GuardMetric::Restarts, 1.0, 0)]);
    let restarted = |second, count| Sample { restarts: Some(count), ..sample(second) };
    assert_eq!(first(&mut watch, [restarted(1, 0), restarted(2, 1), restarted(3, 2)]), Some(3));
}
