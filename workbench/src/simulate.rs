//! `cargo xtask simulate`: seeds of the simulated fleet, in parallel, with what they met and what they violated.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Args;
use greenlight_simulator::trial::{Report, Scenario, run as simulate, shrink};

use crate::Error;

/// Failing seeds that are shown whole; of the others the seeds are named.
const SHOWN_MAX: usize = 3;
/// Failing seeds that are kept: more of them say nothing new.
const FAILED_MAX: usize = 50;
/// Seeds that a thread takes at once.
const BATCH: u64 = 16;
/// Last lines of a trace that are shown unless it was asked for.
const TRACE_LINES_MAX: usize = 60;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many seeds.
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0, value_name = "S")]
    from: u64,
    /// Only this one.
    #[arg(long, value_name = "S", conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// Tell everything that happens.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// How many at a time; as many as there are processors when not given.
    #[arg(long, value_name = "J")]
    jobs: Option<usize>,
    /// Take no more seeds after so many seconds.
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Stop at the first violation.
    #[arg(long)]
    fail_fast: bool,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// What all seeds together came to.
#[derive(Debug, Default)]
struct Sum {
    seeds: u64,
    steps: u64,
    decisions: u64,
    records: u64,
    requests: u64,
    requests_lost: u64,
    faults: BTreeMap<&'static str, u64>,
    outcomes: BTreeMap<&'static str, u64>,
    violations: u64,
    /// By seed, with the checker and what it says.
    failed: BTreeMap<u64, (String, String)>,
}

/// True when nothing was violated.
#[expect(clippy::unnecessary_wraps, reason = "as every command")]
pub(crate) fn run(options: &Options) -> Result<bool, Error> {
    if let Some(seed) = options.seed {
        return Ok(one(seed, options.trace));
    }
    let began = Instant::now();
    let sum = all(options, began);
    let seconds = began.elapsed().as_secs_f64();
    if options.json {
        println!("{}", json(&sum, options.from, seconds));
    } else {
        print(&sum, options.from, seconds);
        for (seed, _) in sum.failed.iter().take(SHOWN_MAX) {
            println!();
            one(*seed, false);
        }
    }
    Ok(sum.violations == 0)
}

fn all(options: &Options, began: Instant) -> Sum {
    let (next, is_over, sum) = (AtomicU64::new(0), AtomicBool::new(false), Mutex::new(Sum::default()));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = options.jobs.unwrap_or(processors).max(1);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                let mut own = Sum::default();
                while !is_over.load(Ordering::Relaxed) {
                    let first = next.fetch_add(BATCH, Ordering::Relaxed);
                    let is_late = options.seconds.is_some_and(|seconds| began.elapsed().as_secs() >= seconds);
                    if first >= options.seeds || is_late {
                        break;
                    }
                    for offset in first..(first + BATCH).min(options.seeds) {
                        own.add(options.from.wrapping_add(offset));
                        if options.fail_fast && own.violations > 0 {
                            is_over.store(true, Ordering::Relaxed);
                        }
                        if is_over.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                }
                sum.lock().unwrap_or_else(PoisonError::into_inner).merge(own);
            });
        }
    });
    sum.into_inner().unwrap_or_else(PoisonError::into_inner)
}

impl Sum {
    fn add(&mut self, seed: u64) {
        self.seeds += 1;
        let scenario = Scenario::from_seed(seed);
        let Ok(report) = catch_unwind(AssertUnwindSafe(|| simulate(&scenario, false))) else {
            self.fail(seed, "panic", "the simulation panicked, see above");
            return;
        };
        self.steps += report.steps;
        self.decisions += report.decisions;
        self.records += report.records;
        self.requests += report.requests;
        self.requests_lost += report.requests_lost;
        for (kind, count) in report.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        for (outcome, count) in report.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        if let Some(violation) = report.violation {
            self.fail(seed, violation.checker, &violation.what);
        }
    }

    fn fail(&mut self, seed: u64, checker: &str, what: &str) {
        self.violations += 1;
        if self.failed.len() < FAILED_MAX {
            self.failed.insert(seed, (checker.to_owned(), what.to_owned()));
        }
    }

    fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.decisions += other.decisions;
        self.records += other.records;
        self.requests += other.requests;
        self.requests_lost += other.requests_lost;
        self.violations += other.violations;
        for (kind, count) in other.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        for (outcome, count) in other.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        self.failed.extend(other.failed);
    }
}

/// One seed: how it went, and when it fails the smallest scenario that still does, with its trace.
fn one(seed: u64, with_trace: bool) -> bool {
    let scenario = Scenario::from_seed(seed);
    let report = simulate(&scenario, with_trace);
    if with_trace {
        println!("{scenario:#?}");
        report.trace.iter().for_each(|line| println!("{line}"));
    }
    let Some(violation) = &report.violation else {
        println!("seed {seed}: {} steps, {:?}, no violation", report.steps, report.outcomes);
        return true;
    };
    println!("seed {seed}: {} at {} ms: {}", violation.checker, violation.at, violation.what);
    if !with_trace {
        let smaller = shrink(&scenario);
        let Report { violation, trace, .. } = simulate(&smaller, true);
        if let Some(violation) = violation {
            println!("shrunk to: {}: {}\n{smaller:?}", violation.checker, violation.what);
        }
        let skipped = trace.len().saturating_sub(TRACE_LINES_MAX);
        if skipped > 0 {
            println!("… {skipped} lines before");
        }
        trace.iter().skip(skipped).for_each(|line| println!("{line}"));
        println!("again: cargo xtask simulate --seed {seed} --trace");
    }
    false
}

fn print(sum: &Sum, from: u64, seconds: f64) {
    println!(
        "{} seeds from {from} in {seconds:.1} s ({:.0} a minute): {} steps, {} decisions, {} records",
        sum.seeds,
        sum.seeds as f64 * 60.0 / seconds,
        sum.steps,
        sum.decisions,
        sum.records
    );
    println!("{} requests, {} of them lost to faults", sum.requests, sum.requests_lost);
    println!("rollouts ended: {}", list(&sum.outcomes));
    println!("faults: {}", list(&sum.faults));
    println!("violations: {}", sum.violations);
    let mut checkers: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (seed, (checker, _)) in &sum.failed {
        checkers.entry(checker).or_default().push(*seed);
    }
    for (checker, seeds) in checkers {
        let first = sum.failed.get(&seeds[0]).map_or("", |(_, what)| what.as_str());
        let shown: Vec<String> = seeds.iter().take(8).map(u64::to_string).collect();
        println!("  {checker}: {} of those kept, seeds {} …: {first}", seeds.len(), shown.join(" "));
    }
}

fn list(counts: &BTreeMap<&'static str, u64>) -> String {
    counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

fn json(sum: &Sum, from: u64, seconds: f64) -> serde_json::Value {
    let failed: Vec<_> = sum
        .failed
        .iter()
        .map(|(seed, (checker, what))| serde_json::json!({ "seed": seed, "checker": checker, "what": what }))
        .collect();
    serde_json::json!({
        "from": from,
        "seeds": sum.seeds,
        "seconds": seconds,
        "steps": sum.steps,
        "decisions": sum.decisions,
        "records": sum.records,
        "requests": sum.requests,
        "requests_lost": sum.requests_lost,
        "faults": sum.faults,
        "outcomes": sum.outcomes,
        "violations": sum.violations,
        "failed": failed,
    })
}
