//! The evidence file.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use greenlight_verdict::evidence::{Line, Problem, Replay, against_itself, conclude};
use greenlight_verdict::{
    Arm, Cell, Comparison, Guard, GuardMetric, Histogram, Interval, Judge, Metric, Sample, Settings, Verdict,
};

fn settings() -> Settings {
    let comparisons = vec![Comparison::new(Metric::Errors), Comparison::new(Metric::Traffic)];
    let guards = vec![Guard { metric: GuardMetric::Memory, above: 90.0, hold_ms: 2000 }];
    Settings { guards, ..Settings::new(vec![1000, 10_000], comparisons) }
}

fn interval(second: u64, canary_errors: u64, is_bursty: bool) -> Interval {
    let cell = |arm, host: &str, requests, errors| Cell {
        arm,
        host: host.to_owned(),
        route: "/".to_owned(),
        requests,
        errors,
        latency: Histogram::from_counts(&[requests, 0, 0]),
        in_flight: Histogram::default(),
    };
    let burst = |host: u64| {
        if !is_bursty {
            3
        } else if (second / 60 + host).is_multiple_of(3) {
            7
        } else {
            1
        }
    };
    let mut cells = vec![cell(Arm::Canary, "c1", 100, canary_errors)];
    cells.extend((0..3).map(|host| cell(Arm::Stable, &format!("s{host}"), 300, burst(host))));
    Interval { start_ms: second * 1000, length_ms: 1000, canary_share: Some(0.1), cells }
}

/// A whole file, and the judgement that it was written with.
fn file(canary_errors: u64) -> (String, String) {
    let mut judge = Judge::new(settings()).unwrap();
    let mut lines = vec![Line::first("web v42 to production", &settings())];
    for second in 0..120 {
        let past = interval(second, 0, false);
        judge.learn(&past).unwrap();
        lines.push(Line::Baseline(past));
    }
    judge.begin_step();
    lines.push(Line::Step { at_ms: 120_000, canary_share: 0.1 });
    for second in 120..300 {
        let interval = interval(second, canary_errors, false);
        judge.observe(&interval).unwrap();
        lines.push(Line::Interval(interval));
    }
    lines.push(Line::Conclusion(conclude(&judge.judgement(), &[])));
    let text: Vec<String> = lines.iter().map(|line| line.to_json().unwrap()).collect();
    (text.join("\n"), judge.judgement().to_string())
}

fn replay(text: &str) -> Replay {
    let mut lines = text.lines();
    let mut replay = Replay::begin(lines.next().unwrap()).unwrap();
    for (number, line) in (2..).zip(lines) {
        replay.line(number, line).unwrap();
    }
    replay
}

#[test]
fn a_file_gives_the_same_answer_again() {
    for (errors, verdict) in [(1, Verdict::Pass), (4, Verdict::Abort)] {
        let (text, explained) = file(errors);
        let replay = replay(&text);
        assert_eq!(replay.judgement().to_string(), explained);
        assert_eq!(replay.conclusion().verdict, verdict, "{explained}");
        assert_eq!(replay.recorded(), Some(&replay.conclusion()));
    }
}

#[test]
fn version_1_is_read_for_ever() {
    // Written by hand: what a file of version 1 may hold, with everything left out that may be.
    let text = r#"{"evidence":{"version":1,"settings":{"bounds_us":[1000],"comparisons":[{"metric":"errors"}]}}}
{"baseline":{"start_ms":0,"length_ms":1000,"cells":[{"arm":"stable","host":"s","route":"/","requests":10}]}}
{"baseline_sample":{"host":"c","at_ms":1,"cpu_seconds_per_request":0.5}}
{"step":{"at_ms":1000,"canary_share":0.5}}
{"interval":{"start_ms":1000,"length_ms":1000,"canary_share":0.5,"cells":[{"arm":"canary","host":"c","route":"/","requests":10,"errors":1,"latency":[[1,10]],"in_flight":[[0,3]]}]}}
{"sample":{"host":"c","at_ms":2000,"memory_percent":50.0}}
{"conclusion":{"verdict":"inconclusive","elapsed_ms":1000}}"#;
    let replay = replay(text);
    assert_eq!(replay.recorded().unwrap(), &replay.conclusion());
    assert_eq!(replay.intervals(), 1);
}

#[test]
fn an_alert_is_an_abort() {
    let (text, _) = file(1);
    let mut replay = Replay::begin(text.lines().next().unwrap()).unwrap();
    for second in 1..=4 {
        let sample = Sample {
            host: "c1".to_owned(),
            at_ms: second * 1000,
            cpu_percent: None,
            memory_percent: Some(95.0),
            cpu_seconds_per_request: None,
            restarts: None,
        };
        replay.line(2, &Line::Sample(sample).to_json().unwrap()).unwrap();
    }
    let conclusion = replay.conclusion();
    assert_eq!(
        (conclusion.verdict, conclusion.alerts),
        (Verdict::Abort, vec!["host memory on c1".to_owned()])
    );
}

#[test]
fn a_line_that_cannot_be_is_named() {
    let (text, _) = file(1);
    let first = text.lines().next().unwrap();
    let interval = text.lines().nth(1).unwrap();
    let newer = first.replacen("\"version\":1", "\"version\":2", 1);
    assert!(matches!(Replay::begin(&newer).unwrap_err().problem, Problem::Newer(2)));
    assert!(matches!(Replay::begin(interval).unwrap_err().problem, Problem::Order));
    assert!(matches!(Replay::begin("{}").unwrap_err().problem, Problem::Malformed(_)));
    let wrong = first.replacen("\"false_abort_budget\":0.01", "\"false_abort_budget\":7.0", 1);
    assert!(matches!(Replay::begin(&wrong).unwrap_err().problem, Problem::Settings(_)));
    for (line, expected) in [
        ("not json", "line 7: not a line of evidence: "),
        ("{\"interval\":{\"start_ms\":0,\"length_ms\":0,\"cells\":[]}}", "line 7: an interval lasts 0 ms"),
        ("{\"surprise\":1}", "line 7: not a line of evidence: unknown variant"),
        (first, "line 7: the settings are the first line"),
    ] {
        let error = Replay::begin(first).unwrap().line(7, line).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let mut ended = replay(&text);
    let error = ended.line(900, interval).unwrap_err().to_string();
    assert_eq!(error, "line 900: nothing follows the conclusion");
}

#[test]
fn the_past_is_judged_against_itself() {
    let past = |is_bursty| (0..1200).map(|second| interval(second, 0, is_bursty)).collect::<Vec<_>>();
    let calm = against_itself(&settings(), &past(false), 300_000, |_, _| ()).unwrap();
    assert_eq!((calm.runs.len(), calm.aborted, calm.passed), (9, 0, 9));
    // A settings file that learns nothing of the bursts, because its stretches are shorter than they are.
    let bursty = against_itself(&settings(), &past(true), 20_000, |_, _| ()).unwrap();
    assert!(bursty.aborted > 0, "{bursty:?}");
    assert!(against_itself(&settings(), &past(false)[..100], 300_000, |_, _| ()).is_err());
    let mut lonely = past(false);
    for interval in &mut lonely {
        interval.cells.retain(|cell| cell.host == "s1");
    }
    assert!(against_itself(&settings(), &lonely, 300_000, |_, _| ()).is_err());
}
