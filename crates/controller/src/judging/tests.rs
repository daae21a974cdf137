//! Counts in, judgement out; and the same again from the file.

use std::time::Duration;

use greenlight_drivers::canary::CountRow;
use greenlight_model::canary::{Canary, Comparison as Stated, Guard, GuardMetric, OnInconclusive, Until};
use greenlight_model::fleet::{Balancer, BalancerKind, BatchSize, Floor, OnFailure, Timeouts};
use greenlight_model::id::{Generation, Instance, ReleaseId};
use greenlight_model::rollout::{Direction, Wave};
use greenlight_model::sample::{ProcessSample, ServiceSample};

use greenlight_verdict::evidence::Conclusion;

use super::*;

fn step() -> CanaryStep {
    CanaryStep { share: 50.try_into().unwrap(), until: Until::Pass }
}

fn web() -> ServiceName {
    "web".parse().unwrap()
}

fn instance(host: &str) -> Instance {
    Instance::new(host.parse().unwrap(), web())
}

pub(crate) fn environment() -> Environment {
    guarded(Vec::new())
}

fn guarded(guards: Vec<Guard>) -> Environment {
    Environment {
        name: "production".parse().unwrap(),
        branch: None,
        hosts: BTreeMap::from([(web(), vec!["a".parse().unwrap(), "b".parse().unwrap()])]),
        host_settings: BTreeMap::new(),
        strategy: Strategy::Canary(Canary {
            hosts: BatchSize::Count(1),
            batch: vec![BatchSize::Count(1)],
            steps: vec![step()],
            judging: Wanted {
                warmup: Duration::ZERO,
                max_time: Duration::from_secs(3600),
                on_inconclusive: OnInconclusive::Hold,
                false_aborts_per_mille: 10,
                compare: vec![Stated {
                    metric: Metric::Errors,
                    tolerate_percent: 100,
                    pass_if_below_percent: 150,
                }],
                guards,
            },
        }),
        floor: Floor::Count(1),
        failure_budget: 0,
        on_failure: OnFailure::TurnBack,
        after: None,
        gates: Default::default(),
        standby: BTreeSet::new(),
        balancers: vec![Balancer {
            service: web(),
            kind: BalancerKind::HaproxyTcp { address: "lb:9999".to_owned() },
            backend: "web".to_owned(),
            servers: BTreeMap::new(),
        }],
        timeouts: Timeouts::default(),
        tag: None,
        retries: 0,
        variables: BTreeMap::new(),
    }
}

/// A rollout whose canary, `a`, is admitted.
fn rollout() -> Rollout {
    let release = ReleaseId::from_bytes([2; 32]);
    let wave = |host: &str, steps| Wave {
        instances: BTreeSet::from([instance(host)]),
        together: false,
        after: Duration::ZERO,
        steps,
    };
    let plan = Plan {
        id: "production-1".parse().unwrap(),
        environment: "production".parse().unwrap(),
        direction: Direction::Forward,
        targets: BTreeMap::from([(web(), release)]),
        baseline: BTreeMap::from([(instance("a"), None), (instance("b"), None)]),
        waves: vec![wave("a", vec![step()]), wave("b", Vec::new())],
        generation: Generation(2),
        started_by: "op@desk".to_owned(),
        digest: None,
        is_partial: false,
        overrides: BTreeMap::new(),
        losses: Vec::new(),
    };
    let mut rollout = Rollout::new(plan, Timestamp::UNIX_EPOCH);
    rollout.admitted_at.insert(instance("a"), Timestamp::UNIX_EPOCH);
    rollout.touched.insert(instance("a"));
    rollout
}

/// A reading in which each host has had so many requests since the balancer began, of which so many failed.
pub(crate) fn reading(second: i64, instance: u64, a: (u64, u64), b: (u64, u64)) -> Counted {
    let row = |host: &str, (requests, errors)| CountRow {
        host: host.parse().unwrap(),
        release: None,
        route: "other".to_owned(),
        since: 0,
        requests,
        errors,
        undelivered: 0,
        latency: Vec::new(),
        in_flight: Vec::new(),
    };
    let counts = Counts {
        instance,
        elapsed: Duration::ZERO,
        bounds_us: Vec::new(),
        rows: vec![row("a", a), row("b", b)],
    };
    Counted { index: 0, at: Timestamp::from_second(1_800_000_000 + second).unwrap(), counts: Ok(counts) }
}

fn at(second: u64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + i64::try_from(second).unwrap()).unwrap()
}

fn guard(metric: GuardMetric, above_hundredths: u32, hold_seconds: u64) -> Vec<Guard> {
    vec![Guard { metric, above_hundredths, hold: Duration::from_secs(hold_seconds) }]
}

/// What the evidence file comes to, and what it says that it came to.
fn again(text: &str) -> (Conclusion, Option<Conclusion>) {
    let mut lines = text.lines();
    let mut replay = Replay::begin(lines.next().unwrap()).unwrap();
    for (index, line) in lines.enumerate() {
        replay.line(index + 2, line).unwrap();
    }
    (replay.conclusion(), replay.recorded().cloned())
}

struct Bench {
    judging: Judging,
    rollout: Rollout,
    environment: Environment,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::of(environment())
    }

    fn of(environment: Environment) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let rollout = rollout();
        let judging = Judging::new(&rollout.plan, &environment, directory.path()).unwrap();
        Self { judging, rollout, environment, directory }
    }

    /// The canary is not admitted yet.
    fn before(&mut self) {
        self.rollout = Rollout::new(self.rollout.plan.clone(), Timestamp::UNIX_EPOCH);
    }

    /// The same judgement by another controller.
    fn taken_over(self) -> Self {
        let judging = Judging::new(&self.rollout.plan, &self.environment, self.directory.path()).unwrap();
        Self { judging, ..self }
    }

    /// A sample of the canary's host: processor time of its service so far, and the process that it is of.
    fn sample(&mut self, second: u64, cpu_ms: u64, pid: u32) -> Option<Judgement> {
        let process = ProcessSample { pid, start_ticks: 1, cpu_ms, memory_bytes: 1, members: 1 };
        let service = ServiceSample {
            disk_total_bytes: 1,
            disk_free_bytes: 1,
            processes: BTreeMap::from([("web".parse().unwrap(), process)]),
        };
        let sample = HostSample {
            at: Timestamp::UNIX_EPOCH,
            since_boot_ms: second * 1000,
            cpu_busy_ms: second * 500,
            cpu_all_ms: second * 2000,
            memory_total_bytes: 100,
            memory_available_bytes: 60,
            load_hundredths: 0,
            disk_read_bytes: 0,
            disk_written_bytes: 0,
            services: BTreeMap::from([(web(), service)]),
        };
        self.sampled(second, &Ok(sample))
    }

    fn sampled(&mut self, second: u64, sample: &Result<HostSample, String>) -> Option<Judgement> {
        let phase = self.judging.phase(&self.rollout, false);
        self.judging.sampled(&"a".parse().unwrap(), at(second), sample, &phase).unwrap();
        self.judging.judgement(&phase)
    }

    fn take(&mut self, counted: Counted) -> Option<Judgement> {
        let phase = self.judging.phase(&self.rollout, false);
        self.judging.take(&web(), &[0], counted, &phase).unwrap();
        self.judging.judgement(&phase)
    }

    fn kept(&self) -> Option<Judgement> {
        kept_judgement(&self.rollout, &self.environment, self.directory.path())
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("production-1-web.jsonl")).unwrap()
    }
}

#[test]
fn a_bad_canary_is_found_and_its_file_says_the_same() {
    let mut bench = Bench::new();
    assert_eq!(bench.kept(), None, "nothing is kept yet");
    let mut told = None;
    for second in 0..30_u64 {
        let (all, bad) = (second * 100, second * 5);
        told = bench.take(reading(i64::try_from(second).unwrap(), 1, (all, bad), (all, 0)));
    }
    let told = told.unwrap();
    assert_eq!((told.wave, told.step, told.answer), (0, 0, Answer::Abort), "{told:?}");
    assert!(told.why.contains("errors: canary") && told.why.contains("host a"), "{}", told.why);
    assert_eq!(bench.kept(), Some(told));
    assert!(bench.text().trim_end().ends_with("\"alerts\":[]}}"), "the conclusion is the last line");
}

#[test]
fn one_in_front_of_which_nothing_fails_passes() {
    let mut bench = Bench::new();
    assert_eq!(bench.take(reading(0, 1, (0, 0), (0, 0))), None, "one reading is no interval");
    let early = bench.take(reading(1, 1, (100, 0), (100, 0))).unwrap();
    assert!(matches!(early.answer, Answer::Inconclusive { requests_needed: Some(_) }), "{early:?}");
    assert_eq!(early.why, "errors: canary 0 of 100, the others 0 of 100");
    let late = bench.take(reading(60, 1, (6_000, 0), (6_000, 0))).unwrap();
    assert_eq!(late.answer, Answer::Pass, "{late:?}");
    assert!(!bench.text().contains("conclusion"), "not before its step is over");
    bench.rollout.waves_proven.insert(0, Timestamp::UNIX_EPOCH);
    for second in [61, 62] {
        assert_eq!(bench.take(reading(second, 1, (6_100, 0), (6_100, 0))), None);
    }
    let text = bench.text();
    assert_eq!(text.matches("\"conclusion\"").count(), 1, "{text}");
    assert!(text.lines().last().unwrap().contains("\"verdict\":\"pass\""), "{text}");
}

#[test]
fn what_was_not_counted_is_left_out() {
    let mut bench = Bench::new();
    bench.take(reading(0, 1, (0, 0), (0, 0)));
    bench.take(reading(1, 1, (100, 0), (100, 0)));
    // The balancer began anew and has counted more by now, did not answer, and its clock went back.
    bench.take(reading(2, 2, (300, 200), (300, 0)));
    bench.take(Counted { counts: Err("gone".to_owned()), ..reading(3, 2, (0, 0), (0, 0)) });
    bench.take(reading(4, 2, (900, 900), (900, 0)));
    bench.take(reading(3, 2, (901, 901), (901, 0)));
    let told = bench.take(reading(5, 2, (951, 901), (951, 0))).unwrap();
    assert_eq!(told.why, "errors: canary 0 of 150, the others 0 of 150");
}

#[test]
fn a_controller_that_takes_over_judges_on() {
    let mut first = Bench::new();
    for second in 0..5_u64 {
        first.take(reading(i64::try_from(second).unwrap(), 1, (second * 100, 0), (second * 100, 0)));
    }
    // It was killed while it wrote.
    let path = first.directory.path().join("production-1-web.jsonl");
    let mut text = first.text();
    text.push_str("{\"interval\":{\"start_ms\":18");
    std::fs::write(&path, &text).unwrap();
    let mut second = first.taken_over();
    second.take(reading(60, 1, (5_000, 0), (5_000, 0)));
    let told = second.take(reading(61, 1, (5_100, 0), (5_100, 0))).unwrap();
    assert_eq!(told.why, "errors: canary 0 of 500, the others 0 of 500");
    assert_eq!(second.kept(), Some(told), "what was cut off is gone, and what came after it is whole");
}

#[test]
fn nothing_counts_while_the_canary_is_changed_or_goes_back() {
    let mut rollout = rollout();
    let directory = tempfile::tempdir().unwrap();
    let judging = Judging::new(&rollout.plan, &environment(), directory.path()).unwrap();
    assert!(matches!(judging.phase(&rollout, false), Phase::Judged { wave: 0, step: 0, .. }));
    assert!(matches!(judging.phase(&rollout, true), Phase::Between), "while traffic is shared out");
    rollout.drained_at.insert(instance("a"), Timestamp::UNIX_EPOCH);
    assert!(matches!(judging.phase(&rollout, false), Phase::Between));
    let before = Rollout::new(rollout.plan.clone(), Timestamp::UNIX_EPOCH);
    assert!(matches!(judging.phase(&before, false), Phase::Before));
    rollout.drained_at.clear();
    rollout.waves_proven.insert(0, Timestamp::UNIX_EPOCH);
    assert!(matches!(judging.phase(&rollout, false), Phase::Between));
}

#[test]
fn what_gets_no_requests_at_the_canary_is_not_waited_for() {
    let (worker, api): (ServiceName, ServiceName) = ("worker".parse().unwrap(), "api".parse().unwrap());
    let mut rollout = rollout();
    // On the canary's host also a service without a balancer, and on another host one with a balancer of its own.
    let target = rollout.plan.targets[&web()];
    rollout.plan.targets.extend([(worker.clone(), target), (api.clone(), target)]);
    let host = |name: &str| name.parse::<HostName>().unwrap();
    rollout.plan.waves[0].instances.insert(Instance::new(host("a"), worker));
    rollout.plan.waves[1].instances.insert(Instance::new(host("b"), api.clone()));
    let mut environment = environment();
    let web_balancer = environment.balancers[0].clone();
    environment.balancers.push(Balancer { service: api, ..web_balancer });
    let directory = tempfile::tempdir().unwrap();
    let judging = Judging::new(&rollout.plan, &environment, directory.path()).unwrap();
    assert_eq!(judging.services().collect::<Vec<_>>(), [&web()]);
    assert!(matches!(judging.phase(&rollout, false), Phase::Judged { wave: 0, step: 0, .. }));

    // One that had the release before, and was left as it was, is judged as it is.
    rollout.admitted_at.clear();
    rollout.touched.clear();
    assert!(matches!(judging.phase(&rollout, false), Phase::Before));
    rollout.plan.baseline.insert(instance("a"), Some(target));
    assert!(matches!(judging.phase(&rollout, false), Phase::Judged { wave: 0, step: 0, .. }));
    rollout.touched.insert(instance("a"));
    assert!(matches!(judging.phase(&rollout, false), Phase::Between), "it was started anew");
}

/// Ten requests a second, each with so many milliseconds of processor time.
fn used(bench: &mut Bench, seconds: std::ops::Range<u64>, ms_each: u64, base_ms: u64) -> Option<Judgement> {
    let first = seconds.start;
    let mut told = None;
    for second in seconds {
        bench.take(reading(i64::try_from(second).unwrap(), 1, (second * 10, 0), (second * 10, 0)));
        told = bench.sample(second, base_ms + (second - first) * 10 * ms_each, 7);
    }
    told
}

#[test]
fn a_canary_that_burns_more_for_a_request_is_found_by_its_guard() {
    for (ms_each, is_found) in [(35, true), (18, false)] {
        let mut bench = Bench::of(guarded(guard(GuardMetric::CpuPerRequest, 200, 10)));
        bench.before();
        assert_eq!(used(&mut bench, 0..20, 10, 0), None);
        bench.rollout = rollout();
        let told = used(&mut bench, 30..60, ms_each, 50_000).unwrap();
        assert_eq!(told.answer == Answer::Abort, is_found, "{told:?}");
        if is_found {
            let expected = "by a guard: a: CPU per request 3.50 times what it was before the rollout";
            assert!(told.why.starts_with(expected), "{}", told.why);
            assert_eq!(told.services, BTreeSet::from([web()]));
            assert_eq!(bench.kept(), Some(told));
            let (conclusion, recorded) = again(&bench.text());
            assert_eq!(conclusion.alerts, ["CPU per request on a"]);
            assert_eq!(Some(conclusion), recorded);
            assert!(bench.text().lines().last().unwrap().contains("conclusion"));
        }
    }
}

#[test]
fn what_was_too_short_to_learn_from_is_said() {
    let mut bench = Bench::of(guarded(guard(GuardMetric::CpuPerRequest, 200, 10)));
    let told = used(&mut bench, 0..5, 10, 0).unwrap();
    assert!(
        told.why.ends_with("before the rollout it had 0 samples with requests, 10 are needed"),
        "{}",
        told.why
    );
}

#[test]
fn restarts_are_counted_over_a_change_of_controllers_and_ours_are_none() {
    let mut bench = Bench::of(guarded(guard(GuardMetric::Restarts, 100, 0)));
    bench.before();
    bench.take(reading(0, 1, (0, 0), (0, 0)));
    bench.sample(0, 0, 1);
    bench.rollout = rollout();
    bench.rollout.drained_at.insert(instance("a"), Timestamp::UNIX_EPOCH);
    bench.sample(1, 0, 1);
    bench.rollout = rollout();
    // Another process by our own switch, then one restart, and the same process again.
    for (second, pid) in [(2_u32, 2), (3, 3), (4, 3)] {
        let requests = u64::from(second);
        bench.take(reading(i64::from(second), 1, (requests, 0), (requests, 0)));
        let told = bench.sample(requests, 0, pid);
        assert_ne!(told.map(|told| told.answer), Some(Answer::Abort));
    }
    let mut bench = bench.taken_over();
    bench.take(reading(10, 1, (10, 0), (10, 0)));
    bench.sample(10, 0, 3);
    let told = bench.sample(11, 0, 4).unwrap();
    assert_eq!(
        (told.answer, told.why.as_str()),
        (Answer::Abort, "by a guard: a: 2 restarts, at most 1 are allowed")
    );
}

#[test]
fn nothing_passes_while_a_guard_does_not_see_the_canary() {
    let mut bench = Bench::of(guarded(guard(GuardMetric::Memory, 9_000, 30)));
    bench.take(reading(0, 1, (0, 0), (0, 0)));
    bench.sampled(0, &Err("no way there".to_owned()));
    let told = bench.take(reading(60, 1, (6_000, 0), (6_000, 0))).unwrap();
    assert_eq!(told.answer, Answer::Inconclusive { requests_needed: None }, "{told:?}");
    assert!(told.why.ends_with("guards: no sample from a now (no way there)"), "{}", told.why);
    let told = bench.sample(60, 0, 7).unwrap();
    assert_eq!(told.answer, Answer::Pass, "{told:?}");
    let told = bench.take(reading(80, 1, (6_000, 0), (6_000, 0))).unwrap();
    assert_eq!(
        told.answer,
        Answer::Inconclusive { requests_needed: None },
        "an old sample shows nothing now"
    );
}

/// A number below `below`, by the next of a sequence that a seed decides.
fn next(seed: &mut u64, below: u64) -> u64 {
    // SplitMix64 (Steele, Lea and Flood 2014).
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *seed;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) % below
}

/// What became of a canary with 10 % of some 80 requests a second, of which so many of 1,000 fail; one of a hundred elsewhere.
fn judged(seed: u64, errors_per_mille: u64) -> Option<Answer> {
    let (mut seed, mut bench) = (seed, Bench::new());
    let (mut a, mut b) = ((0, 0), (0, 0));
    let mut told = None;
    let phase = bench.judging.phase(&bench.rollout, false);
    for second in 0..=300 {
        bench.judging.take(&web(), &[0], reading(second, 1, a, b), &phase).unwrap();
        // What is told each second is told as well every ten: an abort is final.
        if second % 10 == 0 {
            told = bench.judging.judgement(&phase).map(|told| told.answer);
        }
        if told == Some(Answer::Abort) {
            break;
        }
        for _ in 0..80 {
            let is_canary = next(&mut seed, 10) == 0;
            let (arm, of_1000) = if is_canary { (&mut a, errors_per_mille) } else { (&mut b, 10) };
            *arm = (arm.0 + 1, arm.1 + u64::from(next(&mut seed, 1000) < of_1000));
        }
    }
    told
}

/// Counts as a balancer would give them go through all that judges in a rollout, the evidence file included.
#[test]
fn of_two_hundred_healthy_canaries_at_most_two_are_turned_back_and_bad_ones_are() {
    let aborted = (0..200).filter(|seed| judged(*seed, 10) == Some(Answer::Abort)).count();
    let found = (0..20).filter(|seed| judged(1_000 + seed, 30) == Some(Answer::Abort)).count();
    println!("{aborted} of 200 healthy canaries were turned back, {found} of 20 with 3 % errors");
    assert!(aborted <= 2 && found >= 18, "{aborted} of 200, {found} of 20");
}
