//! What a judge says of a whole rollout.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use greenlight_verdict::{
    Arm, Cell, Comparison, Expectation, FindingState, Histogram, Interval, IntervalError, Judge, Metric,
    Settings, Verdict, until_abort, until_pass,
};

const BOUNDS_US: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
const MINUTE_MS: u64 = 60_000;

fn settings(metrics: &[Metric]) -> Settings {
    Settings::new(BOUNDS_US.to_vec(), metrics.iter().map(|metric| Comparison::new(*metric)).collect())
}

fn cell(arm: Arm, host: &str, route: &str, requests: u64, errors: u64) -> Cell {
    Cell {
        arm,
        host: host.to_owned(),
        route: route.to_owned(),
        requests,
        errors,
        latency: Histogram::default(),
        in_flight: Histogram::default(),
    }
}

fn minute(number: u64, cells: Vec<Cell>) -> Interval {
    Interval { start_ms: number * MINUTE_MS, length_ms: MINUTE_MS, canary_share: Some(0.1), cells }
}

/// A tenth of 5,000 requests with the canary; 1 % of stable's fail.
fn counted(number: u64, canary_errors: u64) -> Interval {
    let canary = cell(Arm::Canary, "c1", "/", 500, canary_errors);
    minute(number, vec![canary, cell(Arm::Stable, "s1", "/", 4500, 45)])
}

fn judged(settings: Settings, intervals: impl IntoIterator<Item = Interval>) -> Judge {
    let mut judge = Judge::new(settings).unwrap();
    for interval in intervals {
        judge.observe(&interval).unwrap();
    }
    judge
}

#[test]
fn the_three_answers() {
    let run = |errors| judged(settings(&[Metric::Errors]), (0..30).map(|n| counted(n, errors))).judgement();
    assert_eq!(run(5).verdict, Verdict::Pass);
    assert_eq!(run(5).requests_needed, Some(0));
    let worse = run(15);
    assert_eq!(worse.verdict, Verdict::Abort);
    assert!(worse.elapsed_ms <= 4 * MINUTE_MS, "found after {} ms", worse.elapsed_ms);
    let early = judged(settings(&[Metric::Errors]), [counted(0, 5)]).judgement();
    assert_eq!(early.verdict, Verdict::Inconclusive);
    assert!(early.requests_needed.is_some_and(|needed| (1000..10_000).contains(&needed)), "{early:?}");
}

#[test]
fn the_explanation_names_counts_route_hosts_and_onset() {
    let interval = |number: u64| {
        let bad = if number < 10 { 0 } else { 6 };
        let mut cells = Vec::new();
        for host in ["c1", "c2"] {
            cells.push(cell(Arm::Canary, host, "/checkout", 100, 1 + bad));
            cells.push(cell(Arm::Canary, host, "/", 150, 1));
        }
        cells.push(cell(Arm::Stable, "s1", "/checkout", 1800, 18));
        cells.push(cell(Arm::Stable, "s1", "/", 2700, 18));
        minute(number, cells)
    };
    let judgement = judged(settings(&[Metric::Errors, Metric::Traffic]), (0..60).map(interval)).judgement();
    let text = judgement.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("abort: the canary is worse, found after 1"), "{text}");
    assert!(lines[1].starts_with("errors: canary ") && lines[1].contains("   stable "), "{text}");
    assert!(
        lines[2].starts_with("  worse since its onset, at most ") && lines[2].ends_with("needed 100:1"),
        "{text}"
    );
    assert!(lines[3].contains("where: /checkout ") && lines[3].contains("hosts c1, c2 alike"), "{text}");
    assert!(lines[3].ends_with("onset: after 10m00s"), "{text}");
    assert!(text.contains("ok: missing traffic"), "{text}");
    let culprit = judgement.culprits().next().unwrap();
    assert_eq!((culprit.comparison.metric, culprit.onset_ms), (Metric::Errors, Some(10 * MINUTE_MS)));
}

#[test]
fn a_host_that_differs_is_named() {
    let interval = |number| {
        let cells = vec![
            cell(Arm::Canary, "c1", "/", 250, 2),
            cell(Arm::Canary, "c2", "/", 250, 20),
            cell(Arm::Stable, "s1", "/", 4500, 45),
        ];
        minute(number, cells)
    };
    let text = judged(settings(&[Metric::Errors]), (0..10).map(interval)).judgement().to_string();
    assert!(text.contains("above all host c2: "), "{text}");
}

#[test]
fn no_traffic_is_never_a_pass_or_an_abort() {
    let empty = |number| minute(number, Vec::new());
    let judge = judged(settings(&[Metric::Errors, Metric::Traffic]), (0..600).map(empty));
    assert_eq!(judge.judgement().verdict, Verdict::Inconclusive);
    let only_stable = |number| minute(number, vec![cell(Arm::Stable, "s1", "/", 4500, 45)]);
    let judge = judged(settings(&[Metric::Errors]), (0..600).map(only_stable));
    let judgement = judge.judgement();
    assert_eq!((judgement.verdict, judgement.requests_needed), (Verdict::Inconclusive, None));
}

#[test]
fn a_service_without_errors_passes_only_by_a_negligible_share() {
    let clean = |number| {
        let canary = cell(Arm::Canary, "c1", "/", 500, 0);
        minute(number, vec![canary, cell(Arm::Stable, "s1", "/", 4500, 0)])
    };
    let never = judged(settings(&[Metric::Errors]), (0..60).map(clean)).judgement();
    assert_eq!(never.verdict, Verdict::Inconclusive);
    assert!(never.to_string().contains("not one of them bad in either release"), "{never}");
    let mut with = settings(&[Metric::Errors]);
    with.comparisons[0].negligible = Some(0.002);
    let first = judged(with.clone(), [clean(0)]).judgement().requests_needed.unwrap();
    let minutes = first.div_ceil(500);
    assert_eq!(judged(with.clone(), (0..minutes).map(clean)).judgement().verdict, Verdict::Inconclusive);
    assert_eq!(judged(with, (0..=minutes).map(clean)).judgement().verdict, Verdict::Pass, "{first}");
}

#[test]
fn each_step_earns_its_own_pass_and_keeps_what_speaks_against_it() {
    let mut judge = judged(settings(&[Metric::Errors]), (0..30).map(|n| counted(n, 5)));
    let evidence = judge.judgement().ln_evidence;
    judge.begin_step();
    let judgement = judge.judgement();
    assert_eq!(judgement.verdict, Verdict::Inconclusive);
    assert!((judgement.ln_evidence - evidence).abs() < 1e-12);
}

#[test]
fn an_abort_is_final() {
    let mut judge = judged(settings(&[Metric::Errors]), (0..10).map(|n| counted(n, 20)));
    let then = judge.judgement();
    assert_eq!(then.verdict, Verdict::Abort);
    judge.begin_step();
    for number in 10..100 {
        judge.observe(&counted(number, 0)).unwrap();
    }
    assert_eq!(judge.judgement(), then);
}

#[test]
fn cold_hosts_are_left_out_one_by_one() {
    let mut warm = settings(&[Metric::Errors]);
    warm.warmup_ms = 3 * MINUTE_MS;
    let interval = |number: u64| {
        let mut cells = vec![cell(Arm::Stable, "s1", "/", 4500, 45)];
        for (host, joined) in [("c1", 0), ("c2", 20)] {
            if number >= joined {
                let errors = if number < joined + 3 { 100 } else { 2 };
                cells.push(cell(Arm::Canary, host, "/", 250, errors));
            }
        }
        minute(number, cells)
    };
    let judgement = judged(warm.clone(), (0..40).map(interval)).judgement();
    assert_eq!(judgement.verdict, Verdict::Pass, "{judgement}");
    assert_eq!(judgement.findings[0].counts.canary, (40 - 3 + 20 - 3) * 250);
    warm.warmup_ms = 2 * MINUTE_MS;
    assert_eq!(judged(warm, (0..40).map(interval)).judgement().verdict, Verdict::Abort);
}

#[test]
fn missing_requests_are_found_and_a_right_share_is_not() {
    let run = |canary: u64| {
        let interval = |number| {
            let canary = cell(Arm::Canary, "c1", "/", canary, 0);
            minute(number, vec![canary, cell(Arm::Stable, "s1", "/", 4500, 0)])
        };
        judged(settings(&[Metric::Traffic]), (0..30).map(interval)).judgement()
    };
    assert_eq!(run(500).verdict, Verdict::Pass);
    assert_eq!(run(600).verdict, Verdict::Pass, "more than its share is not missing");
    let missing = run(300);
    assert_eq!(missing.verdict, Verdict::Abort);
    assert!(missing.to_string().contains("its weight gives 10.00%"), "{missing}");
    assert_eq!(run(0).verdict, Verdict::Abort, "a canary that answers nothing at all");
}

fn times(counts: [u64; 5]) -> Histogram {
    Histogram::from_counts(&counts)
}

/// 1 % of stable's requests take over 100 ms.
fn timed(number: u64, canary: [u64; 5], canary_in_flight: [u64; 5]) -> Interval {
    let of = |arm, host: &str, latency: [u64; 5], in_flight: [u64; 5]| Cell {
        latency: times(latency),
        in_flight: times(in_flight),
        ..cell(arm, host, "/", latency.iter().sum(), 0)
    };
    let stable = of(Arm::Stable, "s1", [0, 2250, 2205, 45, 0], [0; 5]);
    minute(number, vec![of(Arm::Canary, "c1", canary, canary_in_flight), stable])
}

#[test]
fn slow_requests_are_found_by_thresholds_of_the_past() {
    let healthy = [0, 250, 245, 5, 0];
    let run = |canary| {
        let mut judge = Judge::new(settings(&[Metric::LatencyP99])).unwrap();
        judge.learn(&timed(0, healthy, [0; 5])).unwrap();
        for number in 1..40 {
            judge.observe(&timed(number, canary, [0; 5])).unwrap();
        }
        judge.judgement()
    };
    assert_eq!(run(healthy).verdict, Verdict::Pass);
    let slow = run([0, 250, 235, 15, 0]);
    assert_eq!(slow.verdict, Verdict::Abort);
    assert!(slow.to_string().contains("(over 100 ms)"), "{slow}");
}

#[test]
fn a_request_under_way_is_slow_at_once_and_counted_once() {
    let healthy = [0, 250, 245, 5, 0];
    let mut judge = Judge::new(settings(&[Metric::LatencyP99])).unwrap();
    judge.learn(&timed(0, healthy, [0; 5])).unwrap();
    // Four hang in the first minute, still in the second, and end in the third.
    judge.observe(&timed(1, healthy, [0, 0, 0, 4, 0])).unwrap();
    let counts = judge.judgement().findings[0].counts;
    assert_eq!((counts.canary, counts.canary_bad), (504, 9));
    judge.observe(&timed(2, healthy, [0, 0, 0, 0, 4])).unwrap();
    judge.observe(&timed(3, [0, 250, 245, 5, 4], [0; 5])).unwrap();
    let counts = judge.judgement().findings[0].counts;
    assert_eq!((counts.canary, counts.canary_bad), (1504, 19));
}

#[test]
fn several_comparisons_share_one_budget_and_the_culprit_is_named() {
    let metrics =
        [Metric::Errors, Metric::LatencyP50, Metric::LatencyP90, Metric::LatencyP99, Metric::Traffic];
    let mut judge = Judge::new(settings(&metrics)).unwrap();
    judge.learn(&timed(0, [0, 250, 245, 5, 0], [0; 5])).unwrap();
    for number in 1..20 {
        let mut interval = timed(number, [0, 250, 245, 5, 0], [0; 5]);
        interval.cells[0].errors = 15;
        interval.cells[1].errors = 45;
        judge.observe(&interval).unwrap();
    }
    let judgement = judge.judgement();
    let named: Vec<Metric> = judgement.culprits().map(|finding| finding.comparison.metric).collect();
    assert_eq!((judgement.verdict, named), (Verdict::Abort, vec![Metric::Errors]));
    assert!((judge.settings().weights().iter().sum::<f64>() - 1.0).abs() < 1e-12);
}

#[test]
fn bursts_before_the_rollout_temper_the_evidence() {
    let calm = |number: u64| {
        let hosts = (0..4).map(|host| cell(Arm::Stable, &format!("s{host}"), "/", 1000, 10));
        minute(number, hosts.collect())
    };
    let bursty = |number: u64| {
        let mut interval = calm(number);
        for (host, cell) in (0u64..).zip(&mut interval.cells) {
            cell.errors = if (number + host).is_multiple_of(4) { 40 } else { 0 };
        }
        interval
    };
    let evidence = |past: &dyn Fn(u64) -> Interval| {
        let mut judge = Judge::new(settings(&[Metric::Errors])).unwrap();
        for number in 0..30 {
            judge.learn(&past(number)).unwrap();
        }
        judge.observe(&counted(30, 12)).unwrap();
        let finding = judge.judgement().findings.remove(0);
        (finding.burst, finding.ln_evidence)
    };
    let (calm, bursty) = (evidence(&calm), evidence(&bursty));
    assert!((calm.0 - 1.0).abs() < 1e-9, "{calm:?}");
    // One host of four has all 40: Σ (x − 10)²/10 = 120, over three degrees of freedom.
    assert!((bursty.0 - 40.0).abs() < 1e-9, "{bursty:?}");
    assert!(bursty.1 < calm.1 / 10.0);
}

#[test]
fn the_order_of_cells_does_not_matter() {
    let interval = |number: u64, is_reversed: bool| {
        let mut cells = Vec::new();
        for host in 0..3 {
            cells.push(cell(Arm::Canary, &format!("c{host}"), "/a", 100, host));
            cells.push(cell(Arm::Canary, &format!("c{host}"), "/b", 70, 1));
            cells.push(cell(Arm::Stable, &format!("s{host}"), "/a", 900, 9));
            cells.push(cell(Arm::Stable, &format!("s{host}"), "/b", 700, 5));
        }
        if is_reversed {
            cells.reverse();
        }
        minute(number, cells)
    };
    let run = |is_reversed| {
        judged(settings(&[Metric::Errors, Metric::Traffic]), (0..9).map(|n| interval(n, is_reversed)))
    };
    assert_eq!(run(false), run(true));
}

#[test]
fn a_judge_goes_on_from_where_it_was_stored_and_does_not_grow() {
    let all = settings(&[Metric::Errors, Metric::LatencyP99, Metric::Traffic]);
    let whole = judged(all.clone(), (0..40).map(|n| counted(n, 6)));
    let half = judged(all.clone(), (0..20).map(|n| counted(n, 6)));
    let stored = serde_json::to_string(&half).unwrap();
    let mut resumed: Judge = serde_json::from_str(&stored).unwrap();
    for number in 20..40 {
        resumed.observe(&counted(number, 6)).unwrap();
    }
    assert_eq!(resumed.judgement().to_string(), whole.judgement().to_string());
    let fields = |judge: &Judge| serde_json::to_string(judge).unwrap().matches(',').count();
    let (short, long) = (fields(&half), fields(&judged(all, (0..2000).map(|n| counted(n, 5)))));
    assert_eq!(short, long, "as many numbers after 2,000 intervals as after 20");
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let mut judge = judged(settings(&[Metric::Errors]), [counted(3, 5)]);
    let before = judge.clone();
    assert!(matches!(judge.observe(&counted(2, 5)), Err(IntervalError::Overlaps { .. })));
    let wrong = |spoil: fn(&mut Interval)| {
        let mut interval = counted(4, 5);
        spoil(&mut interval);
        interval
    };
    for interval in [
        wrong(|interval| interval.length_ms = 0),
        wrong(|interval| interval.canary_share = Some(1.0)),
        wrong(|interval| interval.canary_share = Some(f64::NAN)),
        wrong(|interval| interval.cells[0].errors = 501),
        wrong(|interval| interval.cells[0].latency = times([0, 0, 0, 0, 501])),
        wrong(|interval| interval.cells[0].latency = Histogram::from_counts(&[0, 0, 0, 0, 0, 1])),
        wrong(|interval| interval.cells[0].host = "x".repeat(1000)),
    ] {
        assert!(judge.observe(&interval).is_err(), "{interval:?}");
    }
    assert_eq!(judge, before);
    let spoiled = |spoil: fn(&mut Settings)| {
        let mut settings = settings(&[Metric::Errors]);
        spoil(&mut settings);
        settings
    };
    for settings in [
        spoiled(|settings| settings.comparisons.clear()),
        spoiled(|settings| settings.bounds_us = vec![2, 2]),
        spoiled(|settings| settings.false_abort_budget = 0.0),
        spoiled(|settings| settings.false_pass_budget = f64::NAN),
        spoiled(|settings| settings.late_stake = 1.0),
        spoiled(|settings| settings.comparisons[0].tolerate = 0.9),
        spoiled(|settings| settings.comparisons[0].pass_if_below = 1.0),
        spoiled(|settings| settings.comparisons[0].weight = 0.0),
        spoiled(|settings| settings.comparisons[0].negligible = Some(0.0)),
    ] {
        assert!(Judge::new(settings.clone()).is_err(), "{settings:?}");
    }
}

#[test]
fn what_is_foretold_before_the_rollout_is_what_happens() {
    let settings = settings(&[Metric::Errors]);
    let expectation =
        Expectation { requests_per_minute: 5000.0, canary_share: 0.1, bad_rate: 0.01, burst: 1.0 };
    let foretold = until_abort(&settings, &settings.comparisons[0], &expectation, 3.0).unwrap();
    let found = judged(settings.clone(), (0..60).map(|n| counted(n, 15))).judgement();
    assert_eq!(found.elapsed_ms, foretold.minutes.ceil() as u64 * MINUTE_MS, "{foretold:?}");
    let pass = until_pass(&settings, &settings.comparisons[0], &expectation).unwrap();
    let minutes = pass.minutes.ceil() as u64;
    assert_eq!(
        judged(settings.clone(), (0..minutes).map(|n| counted(n, 5))).judgement().verdict,
        Verdict::Pass
    );
    assert_eq!(
        judged(settings.clone(), (0..minutes - 1).map(|n| counted(n, 5))).judgement().verdict,
        Verdict::Inconclusive
    );
    let nothing = Expectation { requests_per_minute: 0.0, ..expectation };
    assert_eq!(until_pass(&settings, &settings.comparisons[0], &nothing), None);
}

#[test]
fn a_comparison_of_one_route_looks_at_no_other() {
    let mut only = settings(&[Metric::Errors]);
    only.comparisons[0].route = Some("/admin".to_owned());
    let interval = |number| {
        minute(
            number,
            vec![
                cell(Arm::Canary, "c1", "/", 500, 400),
                cell(Arm::Canary, "c1", "/admin", 2, 0),
                cell(Arm::Stable, "s1", "/", 4500, 45),
                cell(Arm::Stable, "s1", "/admin", 20, 1),
            ],
        )
    };
    let judgement = judged(only, (0..30).map(interval)).judgement();
    assert_eq!(judgement.verdict, Verdict::Inconclusive);
    assert_eq!(judgement.findings[0].state, FindingState::Undecided);
    assert!(judgement.to_string().contains("errors on /admin (60 requests, about "), "{judgement}");
}
