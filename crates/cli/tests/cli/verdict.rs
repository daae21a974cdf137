//! `verdict replay`.

use greenlight_verdict::evidence::{Conclusion, Line, conclude};
use greenlight_verdict::{Arm, Cell, Comparison, Histogram, Interval, Judge, Metric, Settings, Verdict};

use crate::site::Site;

/// Forty minutes, the first twenty before the canary; with so many errors of its 500 requests a minute. One stable host of three
/// is as bad in every other stretch of ten minutes.
pub(crate) fn evidence(canary_errors: u64, is_uneven: bool, conclusion: Option<Conclusion>) -> String {
    let settings = Settings::new(vec![1000], vec![Comparison::new(Metric::Errors)]);
    let mut judge = Judge::new(settings.clone()).unwrap();
    let mut lines = vec![Line::first("web v42 to production", &settings)];
    for minute in 0..40u64 {
        let cell = |arm, host: &str, requests, errors| Cell {
            arm,
            host: host.to_owned(),
            route: "/checkout".to_owned(),
            requests,
            errors,
            latency: Histogram::default(),
            in_flight: Histogram::default(),
        };
        let is_bad = is_uneven && minute % 20 >= 10;
        let mut cells = vec![
            cell(Arm::Stable, "s0", 1500, if is_bad { 90 } else { 15 }),
            cell(Arm::Stable, "s1", 1500, 15),
            cell(Arm::Stable, "s2", 1500, 15),
        ];
        if minute >= 20 {
            cells.push(cell(Arm::Canary, "c0", 500, canary_errors));
        }
        let interval = Interval { start_ms: minute * 60_000, length_ms: 60_000, canary_share: None, cells };
        if minute < 20 {
            judge.learn(&interval).unwrap();
            lines.push(Line::Baseline(interval));
        } else {
            judge.observe(&interval).unwrap();
            lines.push(Line::Interval(interval));
        }
    }
    lines.push(Line::Conclusion(conclusion.unwrap_or_else(|| conclude(&judge.judgement(), &[]))));
    lines.iter().map(|line| line.to_json().unwrap() + "\n").collect()
}

#[test]
fn a_file_gives_the_same_answer_again() {
    let site = Site::empty();
    site.write("bad.jsonl", &evidence(15, false, None));
    site.run(&["verdict", "replay", "bad.jsonl"]).exits(0).says(&[
        "web v42 to production, 20 intervals",
        "abort: the canary is worse, found after ",
        "where: /checkout ",
        "the same answer as was recorded",
    ]);
    site.write("good.jsonl", &evidence(5, false, None));
    let data = site.run(&["verdict", "replay", "good.jsonl", "--json"]).exits(0).json();
    assert_eq!(data["conclusion"]["verdict"], "pass");
    assert_eq!(data["agrees"], true);
    assert_eq!(data["judgement"]["findings"][0]["counts"]["canary"], 20 * 500);
}

#[test]
fn another_answer_than_the_recorded_one_is_told() {
    let site = Site::empty();
    let conclusion = Conclusion {
        verdict: Verdict::Pass,
        elapsed_ms: 1_200_000,
        culprits: Vec::new(),
        alerts: Vec::new(),
    };
    site.write("changed.jsonl", &evidence(15, false, Some(conclusion)));
    site.run(&["verdict", "replay", "changed.jsonl"])
        .exits(1)
        .says(&["NOT the recorded answer, which was: pass after 1200 s"]);
}

#[test]
fn a_file_that_cannot_be_is_refused_with_its_line() {
    let site = Site::empty();
    site.run(&["verdict", "replay", "none.jsonl"]).exits(2).says(&["cannot read none.jsonl"]);
    site.write("empty.jsonl", "");
    site.run(&["verdict", "replay", "empty.jsonl"]).exits(2).says(&["empty.jsonl: line 1: "]);
    let good = evidence(5, false, None);
    let cut = &good[..good.len() - 30];
    site.write("cut.jsonl", cut);
    for more in [&[][..], &["--a-a"][..]] {
        let arguments = [&["verdict", "replay", "cut.jsonl"], more].concat();
        site.run(&arguments)
            .exits(2)
            .says(&["cut.jsonl: line 42: not a line of evidence", "without its last line"]);
    }
    site.write("good.jsonl", &good);
    for (stretch, why) in
        [("0s", "is not how long"), ("soon", "is not how long"), ("50m", "shorter than two stretches")]
    {
        site.run(&["verdict", "replay", "good.jsonl", "--a-a", "--stretch", stretch]).exits(2).says(&[why]);
    }
    site.run(&["verdict", "replay", "good.jsonl", "--stretch", "10m"]).exits(2).says(&["--a-a"]);
}

#[test]
fn the_past_is_judged_against_itself() {
    let site = Site::empty();
    site.write("calm.jsonl", &evidence(5, false, None));
    site.run(&["verdict", "replay", "calm.jsonl", "--a-a", "--stretch", "10m"])
        .exits(0)
        .says(&["0 of 9 pretended canaries would have been aborted (0.0 %)", "the budget is 1.0 %"]);
    site.write("uneven.jsonl", &evidence(5, true, None));
    site.run(&["verdict", "replay", "uneven.jsonl", "--a-a", "--stretch", "10m"]).exits(0).says(&[
        "2 of 9 pretended canaries would have been aborted",
        "s0",
        "1970-01-01T00:10:00Z",
        "errors",
    ]);
    let data = site
        .run(&["verdict", "replay", "uneven.jsonl", "--a-a", "--stretch", "10m", "--json"])
        .exits(0)
        .json();
    assert_eq!(data["against_itself"]["aborted"], 2);
}
