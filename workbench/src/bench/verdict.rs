//! `cargo xtask bench verdict`: how often a healthy canary is aborted, and how long a faulty one lives, by our judge and by what
//! others do.
//!
//! Every world is simulated so many times, from fixed seeds, and all rules judge the same runs. Not in here: real traffic, whose
//! requests may depend on each other in ways that no simulation has; `greenlight verdict replay --a-a` is for that.

mod rules;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};

use clap::Args;
use greenlight_verdict::{Metric, Verdict};
use serde::Serialize;

use crate::Error;
use crate::chance::Chance;
use rules::{Ours, Rule};
use world::World;

/// Runs of each world.
const RUNS: u64 = 5000;
/// At most this share of healthy canaries may be aborted.
const FALSE_ABORTS_MAX: f64 = 0.01;
/// The seed of every first run; others follow from their numbers.
const SEED: u64 = 0x6772_6565_6e6c_6974;

/// All metrics at once, each with a fifth of the budget.
const ALL: &[Metric] =
    &[Metric::Errors, Metric::LatencyP50, Metric::LatencyP90, Metric::LatencyP99, Metric::Traffic];
const PAST: Ours = Ours { has_past: true, ..Ours::ERRORS };
const WARM: Ours = Ours { warmup_minutes: 3, ..Ours::ERRORS };
const P99: Ours = Ours { metrics: &[Metric::LatencyP99], ..PAST };
const EVERYTHING: Ours = Ours { metrics: ALL, ..PAST };
const NO_LATE_STAKE: Ours = Ours { late_stake: 0.0, ..Ours::ERRORS };

const OTHERS: [Rule; 7] = [
    Rule::Threshold { success: 0.99, looks: 1 },
    Rule::Threshold { success: 0.99, looks: 5 },
    Rule::Threshold { success: 0.98, looks: 1 },
    Rule::Threshold { success: 0.98, looks: 5 },
    Rule::RepeatedZ,
    Rule::MannWhitney { confidence: 95 },
    Rule::MannWhitney { confidence: 98 },
];
const MANN_WHITNEY: [Rule; 2] = [Rule::MannWhitney { confidence: 95 }, Rule::MannWhitney { confidence: 98 }];

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// Fewer runs of each world than the limits are stated for: for a first look.
    #[arg(long, value_name = "COUNT", default_value_t = RUNS, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
}

/// The figures.
#[derive(Debug, Serialize)]
struct Report {
    runs: u64,
    worlds: Vec<WorldFigures>,
    verdicts: Vec<VerdictFigures>,
    misses: Vec<String>,
    is_within_limits: bool,
}

/// One world: a healthy one, or one with a fault.
#[derive(Debug, Serialize)]
struct WorldFigures {
    world: &'static str,
    is_healthy: bool,
    rules: Vec<RuleFigures>,
}

/// What one rule made of it.
#[derive(Debug, Serialize)]
struct RuleFigures {
    rule: String,
    is_ours: bool,
    /// The share of runs that were aborted: false alarms in a healthy world, finds in the others.
    aborted: f64,
    /// The median of the canary's requests until the abort, those after the fault began; none when fewer than half were.
    median_requests: Option<f64>,
    /// What `median_requests` may be at most.
    limit_requests: Option<f64>,
}

/// What our judge says of a canary with a true ratio.
#[derive(Debug, Serialize)]
struct VerdictFigures {
    true_ratio: f64,
    passed: f64,
    aborted: f64,
    inconclusive: f64,
    median_minutes: Option<u64>,
}

/// A world to be judged.
struct Case {
    name: &'static str,
    world: World,
    is_healthy: bool,
    /// The minute in which the fault begins.
    onset: u64,
    rules: Vec<Judged>,
}

/// A rule, and how long it may take.
#[derive(Clone, Copy)]
struct Judged {
    rule: Rule,
    limit: Option<f64>,
    /// Whether the limits on false aborts hold for it.
    is_bound: bool,
}

/// True when the limits are kept.
pub(super) fn run(options: &Options) -> Result<bool, Error> {
    let Options { json, runs } = *options;
    let (mut worlds, mut misses) = (Vec::new(), Vec::new());
    for (number, case) in (0u64..).zip(cases()) {
        eprintln!("{} ({runs} runs)", case.name);
        let figures = case.figures(number, runs)?;
        misses.extend(case.misses(&figures));
        worlds.push(figures);
    }
    let mut verdicts = Vec::new();
    for (true_ratio, canary_rate) in
        [(1.0, World::PLAIN.canary_rate), (1.2, |_| 0.012), (1.5, |_| 0.015), (2.0, |_| 0.02)]
    {
        verdicts.push(three_verdicts(true_ratio, World { canary_rate, ..World::PLAIN }, runs)?);
    }
    let is_within_limits = misses.is_empty();
    let report = Report { runs, worlds, verdicts, misses, is_within_limits };
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Json)?);
    } else {
        print(&report);
    }
    Ok(is_within_limits)
}

fn cases() -> Vec<Case> {
    let others = |rules: &[Rule]| -> Vec<Judged> {
        rules.iter().map(|rule| Judged { rule: *rule, limit: None, is_bound: false }).collect()
    };
    let with = |others: Vec<Judged>, ours: &[Ours]| {
        let ours = ours.iter().map(|ours| Judged { rule: Rule::Ours(*ours), limit: None, is_bound: true });
        others.into_iter().chain(ours).collect::<Vec<_>>()
    };
    let limited = |others: Vec<Judged>, ours: Ours, limit: f64| {
        let ours = Judged { rule: Rule::Ours(ours), limit: Some(limit), is_bound: true };
        others.into_iter().chain([ours]).collect::<Vec<_>>()
    };
    let often = World { looks_per_minute: 12, ..World::PLAIN };
    let looks = [Rule::RepeatedZ];
    let healthy = |name, world, rules| Case { name, world, is_healthy: true, onset: 0, rules };
    let faulty = |name, world, onset, rules| Case { name, world, is_healthy: false, onset, rules };
    let with_rate = |world: World, canary_rate: fn(u64) -> f64| World { canary_rate, ..world };
    let ramp = World {
        share: |minute| [0.05, 0.25, 0.5][usize::try_from(minute / 20).unwrap_or(2).min(2)],
        stable_rate: |minute| 0.005 + 0.01 * minute as f64 / 59.0,
        canary_rate: |minute| 0.005 + 0.01 * minute as f64 / 59.0,
        ..World::PLAIN
    };
    let incident = |minute| if (20..30).contains(&minute) { 0.1 } else { 0.01 };
    let incident = World { stable_rate: incident, canary_rate: incident, ..World::PLAIN };
    let bursts = World { comes_in_bursts: true, ..World::PLAIN };
    let cold = with_rate(World::PLAIN, |minute| if minute < 2 { 0.05 } else { 0.01 });
    let timed = World { canary_slowness: Some(1.0), ..World::PLAIN };
    let slow = World { canary_slowness: Some(1.3), ..World::PLAIN };
    let little = World { requests_per_minute: 50, ..World::PLAIN };
    let late = with_rate(World::PLAIN, |minute| if minute < 30 { 0.01 } else { 0.03 });
    let raw = Judged { rule: Rule::Ours(Ours::ERRORS), limit: None, is_bound: false };
    let raw_and = |ours: Ours| {
        let mut rules = others(&OTHERS);
        rules.push(raw);
        with(rules, &[ours])
    };
    vec![
        healthy("healthy", World::PLAIN, with(others(&OTHERS), &[Ours::ERRORS, NO_LATE_STAKE])),
        healthy("healthy, a look every 5 s", often, with(others(&looks), &[Ours::ERRORS])),
        healthy(
            "weight 5, 25, 50 % while both rates drift from 0.5 to 1.5 %",
            ramp,
            with(others(&OTHERS), &[Ours::ERRORS]),
        ),
        healthy("an incident in both arms", incident, with(others(&OTHERS), &[Ours::ERRORS])),
        healthy("errors in bursts, three times the variance", bursts, raw_and(PAST)),
        healthy("two cold minutes with 5 % errors", cold, raw_and(WARM)),
        healthy("50 requests a minute", little, with(others(&OTHERS), &[Ours::ERRORS])),
        healthy("times taken", timed, with(others(&MANN_WHITNEY), &[P99, EVERYTHING])),
        faulty(
            "2 % errors",
            with_rate(World::PLAIN, |_| 0.02),
            0,
            limited(others(&OTHERS), Ours::ERRORS, 2000.0),
        ),
        faulty(
            "3 % errors",
            with_rate(World::PLAIN, |_| 0.03),
            0,
            limited(others(&OTHERS), Ours::ERRORS, 1000.0),
        ),
        faulty(
            "5 % errors",
            with_rate(World::PLAIN, |_| 0.05),
            0,
            limited(others(&OTHERS), Ours::ERRORS, 500.0),
        ),
        faulty(
            "2 % errors, a look every 5 s",
            with_rate(often, |_| 0.02),
            0,
            limited(others(&looks), Ours::ERRORS, 1585.0),
        ),
        faulty(
            "3 % errors, a look every 5 s",
            with_rate(often, |_| 0.03),
            0,
            limited(others(&looks), Ours::ERRORS, 500.0),
        ),
        faulty(
            "5 % errors, a look every 5 s",
            with_rate(often, |_| 0.05),
            0,
            limited(others(&looks), Ours::ERRORS, 167.0),
        ),
        faulty(
            "2 % errors from minute 30 on",
            late_of(late, |minute| if minute < 30 { 0.01 } else { 0.02 }),
            30,
            with(Vec::new(), &[Ours::ERRORS, NO_LATE_STAKE]),
        ),
        faulty("3 % errors from minute 30 on", late, 30, with(Vec::new(), &[Ours::ERRORS, NO_LATE_STAKE])),
        faulty(
            "everything takes 1.3 times as long",
            slow,
            0,
            with(limited(others(&MANN_WHITNEY), P99, 1500.0), &[EVERYTHING]),
        ),
        faulty(
            "5 % errors at 50 requests a minute",
            with_rate(little, |_| 0.05),
            0,
            with(others(&OTHERS), &[Ours::ERRORS]),
        ),
    ]
}

fn late_of(world: World, canary_rate: fn(u64) -> f64) -> World {
    World { canary_rate, ..world }
}

impl Case {
    fn figures(&self, number: u64, runs: u64) -> Result<WorldFigures, Error> {
        let needs_past =
            self.rules.iter().any(|judged| matches!(judged.rule, Rule::Ours(ours) if ours.has_past));
        let outcomes = in_parallel(runs, |run| {
            let mut chance = Chance::new(SEED ^ (number << 40) ^ run);
            let past = if needs_past { self.world.past(&mut chance) } else { Vec::new() };
            let looks = self.world.looks(&mut chance);
            self.rules
                .iter()
                .map(|judged| judged.rule.aborts_at(&past, &looks))
                .collect::<Result<Vec<_>, _>>()
        })?;
        let rules = self.rules.iter().enumerate().map(|(index, judged)| {
            let all = outcomes.iter().map(|run| run.get(index).copied().flatten());
            let onset = usize::try_from(self.onset * self.world.looks_per_minute).unwrap_or(usize::MAX);
            // An abort before the fault is a false one: it has found nothing.
            let found: Vec<Option<usize>> =
                all.map(|look| look.filter(|look| *look > onset).map(|look| look - onset)).collect();
            let aborted = found.iter().flatten().count() as f64 / runs as f64;
            let looks = median(found).map(|looks| looks as f64 * self.world.canary_requests_per_look());
            RuleFigures {
                rule: judged.rule.title(),
                is_ours: matches!(judged.rule, Rule::Ours(_)),
                aborted,
                median_requests: if self.is_healthy { None } else { looks },
                limit_requests: judged.limit,
            }
        });
        Ok(WorldFigures { world: self.name, is_healthy: self.is_healthy, rules: rules.collect() })
    }

    /// Which limits were missed.
    fn misses(&self, figures: &WorldFigures) -> Vec<String> {
        let mut misses = Vec::new();
        for (judged, found) in self.rules.iter().zip(&figures.rules) {
            if self.is_healthy && judged.is_bound && found.aborted > FALSE_ABORTS_MAX {
                misses.push(format!("{}: {} aborts {:.2} %", self.name, found.rule, found.aborted * 100.0));
            }
            let is_late = |limit: f64| found.median_requests.is_none_or(|requests| requests > limit + 0.5);
            if let Some(limit) = judged.limit.filter(|limit| is_late(*limit)) {
                let requests =
                    found.median_requests.map_or("none".to_owned(), |requests| format!("{requests:.0}"));
                misses.push(format!("{}: {} took {requests} requests, limit {limit}", self.name, found.rule));
            }
        }
        misses
    }
}

fn three_verdicts(true_ratio: f64, world: World, runs: u64) -> Result<VerdictFigures, Error> {
    let outcomes = in_parallel(runs, |run| {
        let mut chance = Chance::new(SEED ^ ((100 + (true_ratio * 10.0) as u64) << 40) ^ run);
        let mut judge = Ours::ERRORS.judge()?;
        for (look, minute) in world.looks(&mut chance).iter().zip(1usize..) {
            judge.observe(&look.interval).map_err(|error| Error::Refused(error.to_string()))?;
            if judge.verdict() != Verdict::Inconclusive {
                return Ok((judge.verdict(), Some(minute)));
            }
        }
        Ok((Verdict::Inconclusive, None))
    })?;
    let share = |verdict: Verdict| {
        outcomes.iter().filter(|outcome| outcome.0 == verdict).count() as f64 / runs as f64
    };
    let minutes = median(outcomes.iter().map(|outcome| outcome.1).collect());
    Ok(VerdictFigures {
        true_ratio,
        passed: share(Verdict::Pass),
        aborted: share(Verdict::Abort),
        inconclusive: share(Verdict::Inconclusive),
        median_minutes: minutes.map(|minutes| minutes as u64),
    })
}

/// The median, those that never came counted as later than all others.
fn median(mut values: Vec<Option<usize>>) -> Option<usize> {
    values.sort_by_key(|value| value.unwrap_or(usize::MAX));
    values.get(values.len().saturating_sub(1) / 2).copied().flatten()
}

/// Does the runs on all cores; the results in their order.
fn in_parallel<T: Send>(runs: u64, work: impl Fn(u64) -> Result<T, Error> + Sync) -> Result<Vec<T>, Error> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(0);
    let take = || {
        let mut own = Vec::new();
        loop {
            let run = next.fetch_add(1, Ordering::Relaxed);
            if run >= runs {
                return Ok(own);
            }
            own.push((run, work(run)?));
        }
    };
    let parts: Vec<Result<Vec<(u64, T)>, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(take)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(Error::Refused("a run panicked".to_owned()))))
            .collect()
    });
    let mut all = Vec::new();
    for part in parts {
        all.extend(part?);
    }
    all.sort_by_key(|(run, _)| *run);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}

fn print(report: &Report) {
    let percent = |share: f64| format!("{:.2} %", share * 100.0);
    println!("Healthy canaries that are aborted within an hour, of {}.\n", report.runs);
    println!("| world | rule | false aborts |\n| --- | --- | ---: |");
    for world in report.worlds.iter().filter(|world| world.is_healthy) {
        for rule in &world.rules {
            println!("| {} | {} | {} |", world.world, rule.rule, percent(rule.aborted));
        }
    }
    println!(
        "\nFaulty canaries: found within an hour, of {}, and the median of the canary's requests until then.\n",
        report.runs
    );
    println!("| fault | rule | found | requests | limit |\n| --- | --- | ---: | ---: | ---: |");
    for world in report.worlds.iter().filter(|world| !world.is_healthy) {
        for rule in &world.rules {
            let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.0}"));
            let requests = number(rule.median_requests);
            let limit = number(rule.limit_requests);
            println!(
                "| {} | {} | {} | {requests} | {limit} |",
                world.world,
                rule.rule,
                percent(rule.aborted)
            );
        }
    }
    println!("\nThe three verdicts, passing below 1.5 times as many errors, 60 minutes.\n");
    println!(
        "| true ratio | pass | abort | inconclusive | median minutes |\n| ---: | ---: | ---: | ---: | ---: |"
    );
    for figures in &report.verdicts {
        println!(
            "| {} | {} | {} | {} | {} |",
            figures.true_ratio,
            percent(figures.passed),
            percent(figures.aborted),
            percent(figures.inconclusive),
            figures.median_minutes.map_or(String::new(), |minutes| minutes.to_string())
        );
    }
    println!("\nLimits: at most {} false aborts by ours, delays as stated.", percent(FALSE_ABORTS_MAX));
    for miss in &report.misses {
        println!("MISSED: {miss}");
    }
    if report.is_within_limits {
        println!("Kept.");
    }
}
