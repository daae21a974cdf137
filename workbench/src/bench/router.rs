//! `cargo xtask bench router`: the built-in router beside HAProxy and nginx.
//!
//! Every round measures each of them once, in turn and beginning with another one each time, so that what else the machine does meets all alike.
//! Ratios are taken within a round; medians of the rounds are shown. On a shared machine the processor time per request is
//! the figure that lasts; requests per second and latencies are those of proxy, clients and backends on the same cores.

mod load;
mod proxy;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::Error;
use load::{Backends, load};
use proxy::{Kind, Programs, Proxy};

/// Processor time per request, in multiples of each peer's.
const PROCESSOR_RATIO_MAX: f64 = 0.95;
/// The latency that one in a hundred requests exceeds, in multiples of each peer's.
const P99_RATIO_MAX: f64 = 1.0;
/// What counting may add to the processor time of a request.
const COUNTING_RATIO_MAX: f64 = 1.03;
/// Resident memory before the first request.
const IDLE_BYTES_MAX: u64 = 20 << 20;
/// Connections that are kept open.
const CONNECTIONS: [usize; 2] = [64, 512];
/// Lengths of the answers, in bytes, with the share of the requests that are made: large ones take longer.
const ANSWERS: [(usize, usize); 2] = [(1 << 10, 1), (64 << 10, 4)];

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// Rounds of each case.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Requests of each proxy in a round, with answers of 1 KiB; a quarter of it with 64 KiB.
    #[arg(long, default_value_t = 40_000)]
    requests: usize,
    /// The program to measure, built for release.
    #[arg(long, value_name = "PATH")]
    greenlight: PathBuf,
    /// HAProxy.
    #[arg(long, value_name = "PATH", default_value = "haproxy")]
    haproxy: PathBuf,
    /// nginx.
    #[arg(long, value_name = "PATH", default_value = "nginx")]
    nginx: PathBuf,
}

/// The figures.
#[derive(Debug, Serialize)]
struct Report {
    versions: Vec<(Kind, String)>,
    /// Peers that are not on this machine.
    missing: Vec<Kind>,
    cases: Vec<Case>,
    /// What was missed, as sentences.
    missed: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Case {
    connections: usize,
    answer_bytes: usize,
    proxies: Vec<Figures>,
}

/// Medians over the rounds.
#[derive(Debug, Serialize)]
struct Figures {
    kind: Kind,
    requests_per_second: f64,
    processor_seconds_per_100k: f64,
    p50_ms: f64,
    p99_ms: f64,
    idle_bytes: u64,
    /// After the rounds.
    busy_bytes: u64,
    /// The router's processor time in multiples of this one's, within rounds.
    router_processor_ratio: f64,
    /// The same of the latency that one in a hundred exceeds.
    router_p99_ratio: f64,
}

/// One proxy in one round.
struct Round {
    requests_per_second: f64,
    processor_seconds_per_100k: f64,
    p50: Duration,
    p99: Duration,
}

/// True when the limits are kept.
pub(super) fn run(options: &Options) -> Result<bool, Error> {
    let programs = Programs {
        greenlight: options.greenlight.clone(),
        haproxy: options.haproxy.clone(),
        nginx: options.nginx.clone(),
    };
    let all = [Kind::Router, Kind::RouterUncounted, Kind::Haproxy, Kind::Nginx];
    let mut report =
        Report { versions: Vec::new(), missing: Vec::new(), cases: Vec::new(), missed: Vec::new() };
    for kind in all {
        match programs.version(kind) {
            Some(version) => report.versions.push((kind, version)),
            None if kind.is_peer() => {
                report.missing.push(kind);
                report
                    .missed
                    .push(format!("{} is not on this machine, so nothing is said of it", kind.name()));
            }
            None => return Err(Error::Refused(format!("{} cannot be run", options.greenlight.display()))),
        }
    }
    let present: Vec<Kind> = report.versions.iter().map(|(kind, _)| *kind).collect();
    for (bytes, part) in ANSWERS {
        for connections in CONNECTIONS {
            eprintln!("{connections} connections, answers of {} KiB", bytes / 1024);
            report.cases.push(case(
                options,
                &programs,
                &present,
                connections,
                bytes,
                options.requests / part,
            )?);
        }
    }
    report.missed.extend(report.cases.iter().flat_map(missed));
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Json)?);
    } else {
        print(&report);
    }
    Ok(report.missed.is_empty())
}

fn case(
    options: &Options,
    programs: &Programs,
    kinds: &[Kind],
    connections: usize,
    bytes: usize,
    requests: usize,
) -> Result<Case, Error> {
    let directory = tempfile::tempdir().map_err(Error::system("make a directory"))?;
    let backends = Backends::start(bytes).map_err(Error::system("start backends"))?;
    let mut proxies = Vec::new();
    for &kind in kinds {
        let proxy = Proxy::start(kind, programs, directory.path(), backends.addresses)?;
        let idle_bytes = proxy.memory_bytes()?;
        proxies.push((proxy, idle_bytes, Vec::new()));
    }
    // The first round finds caches and connections cold, and is not counted.
    for round in 0..=options.rounds {
        for turn in 0..proxies.len() {
            let place = (turn + round) % proxies.len();
            let (proxy, _, rounds) = &mut proxies[place];
            let measured = measure(proxy, connections, requests, bytes)?;
            if round > 0 {
                rounds.push(measured);
            }
        }
    }
    let ours: Vec<(f64, Duration)> = proxies
        .iter()
        .filter(|(proxy, ..)| proxy.kind == Kind::Router)
        .flat_map(|(.., rounds)| rounds)
        .map(|round| (round.processor_seconds_per_100k, round.p99))
        .collect();
    let mut figures = Vec::new();
    for (proxy, idle_bytes, rounds) in &proxies {
        let median_of = |of: &dyn Fn(&Round) -> f64| median(rounds.iter().map(of).collect());
        let ratio = |of: &dyn Fn(&(f64, Duration), &Round) -> f64| {
            median(ours.iter().zip(rounds).map(|(ours, theirs)| of(ours, theirs)).collect())
        };
        figures.push(Figures {
            kind: proxy.kind,
            requests_per_second: median_of(&|round| round.requests_per_second),
            processor_seconds_per_100k: median_of(&|round| round.processor_seconds_per_100k),
            p50_ms: median_of(&|round| round.p50.as_secs_f64() * 1e3),
            p99_ms: median_of(&|round| round.p99.as_secs_f64() * 1e3),
            idle_bytes: *idle_bytes,
            busy_bytes: proxy.memory_bytes()?,
            router_processor_ratio: ratio(&|ours, theirs| ours.0 / theirs.processor_seconds_per_100k),
            router_p99_ratio: ratio(&|ours, theirs| ours.1.as_secs_f64() / theirs.p99.as_secs_f64()),
        });
    }
    Ok(Case { connections, answer_bytes: bytes, proxies: figures })
}

fn measure(proxy: &Proxy, connections: usize, requests: usize, bytes: usize) -> Result<Round, Error> {
    let before = proxy.processor_time()?;
    let seen = load(proxy.address, connections, requests, bytes)
        .map_err(Error::system(format!("ask {}", proxy.kind.name())))?;
    let spent = proxy.processor_time()?.saturating_sub(before);
    let count = requests as f64;
    Ok(Round {
        requests_per_second: count / seen.time.as_secs_f64(),
        processor_seconds_per_100k: spent.as_secs_f64() * 1e5 / count,
        p50: seen.quantile(0.5),
        p99: seen.quantile(0.99),
    })
}

/// What a case misses, as sentences.
fn missed(case: &Case) -> Vec<String> {
    let mut missed = Vec::new();
    let place = format!("{} connections, {} KiB", case.connections, case.answer_bytes / 1024);
    for figures in &case.proxies {
        let name = figures.kind.name();
        if figures.kind.is_peer() {
            if figures.router_processor_ratio > PROCESSOR_RATIO_MAX {
                let ratio = figures.router_processor_ratio;
                missed.push(format!(
                    "{place}: {ratio:.3} times the processor time of {name}, more than {PROCESSOR_RATIO_MAX}"
                ));
            }
            if figures.router_p99_ratio > P99_RATIO_MAX {
                missed.push(format!("{place}: {:.3} times the p99 of {name}", figures.router_p99_ratio));
            }
        }
        if figures.kind == Kind::RouterUncounted && figures.router_processor_ratio > COUNTING_RATIO_MAX {
            missed.push(format!(
                "{place}: counting costs {:.1} %",
                (figures.router_processor_ratio - 1.0) * 100.0
            ));
        }
        if figures.kind == Kind::Router && figures.idle_bytes >= IDLE_BYTES_MAX {
            missed.push(format!("{place}: {} idle", mebibytes(figures.idle_bytes)));
        }
    }
    missed
}

fn print(report: &Report) {
    for (kind, version) in &report.versions {
        println!("{}: {version}", kind.name());
    }
    println!(
        "\nKeep-alive, HTTP/1.1, split 70 to 30. Ratio: the router's figure in multiples of this one's.\n"
    );
    println!(
        "| connections | answer | | requests/s | CPU s per 100,000 | ratio | p50 ms | p99 ms | ratio | MiB idle | MiB after |"
    );
    println!("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for Case { connections, answer_bytes, proxies } in &report.cases {
        for figures in proxies {
            println!(
                "| {connections} | {} KiB | {} | {:.0} | {:.3} | {:.2} | {:.2} | {:.2} | {:.2} | {} | {} |",
                answer_bytes / 1024,
                figures.kind.name(),
                figures.requests_per_second,
                figures.processor_seconds_per_100k,
                figures.router_processor_ratio,
                figures.p50_ms,
                figures.p99_ms,
                figures.router_p99_ratio,
                mebibytes(figures.idle_bytes),
                mebibytes(figures.busy_bytes),
            );
        }
    }
    println!(
        "\nLimits: at most {PROCESSOR_RATIO_MAX} times each peer's processor time and {P99_RATIO_MAX} times its p99, counting \
         at most {:.0} %, idle under {}.",
        (COUNTING_RATIO_MAX - 1.0) * 100.0,
        mebibytes(IDLE_BYTES_MAX)
    );
    if report.missed.is_empty() {
        println!("Kept.");
    }
    for missed in &report.missed {
        println!("MISSED: {missed}");
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}
