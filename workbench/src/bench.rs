//! `cargo xtask bench planner`: what a decision costs, and whether it grows faster than the fleet.
//!
//! Each fleet is brought to the middle of its rollout by the simulator; then every decision up to the end of the next wave
//! is measured, and the dearest counts. The time is the processor's, so that other work on the machine hardly changes it, and
//! every run begins with cold caches.

mod cost;
mod fleet;

use std::time::Duration;

use clap::{Args, Subcommand};
use greenlight_interlock::Interlock;
use greenlight_model::decision::{Decision, Step};
use greenlight_model::rollout::Note;
use greenlight_model::world::World;
use greenlight_planner::decide;
use greenlight_simulator::{Faults, Simulation, Turn, preview};
use serde::Serialize;

use crate::Error;
use cost::{Cold, Cost, cost};

/// Hosts of the fleets whose decisions are measured.
const DECISIONS: [usize; 4] = [10, 100, 1_000, 10_000];
/// Hosts of the fleets whose whole rollouts are measured.
const ROLLOUTS: [usize; 3] = [10, 100, 1_000];
/// A decision of the largest fleet takes no longer: an operator who looks on would notice more, and every answer of a host
/// asks for a decision.
const DECISION_TIME_MAX: Duration = Duration::from_millis(50);
/// Growth is measured from this size on: below it what a decision costs anyway outweighs the fleet.
const GROWTH_FROM: usize = 100;
/// A host of the largest fleet costs at most so many times what one of a hundred does. More than 1, because its memory is
/// spread wider.
const GROWTH_MAX: f64 = 1.3;
/// Runs of one decision, of which the median counts.
const RUNS: usize = 5;
/// Runs of a whole rollout.
const ROLLOUT_RUNS: usize = 3;
/// Turns after which a rollout without faults must have ended, whatever its size: its waves are ten.
const TURNS_MAX: usize = 2_000;

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// One decision in the middle of a rollout, and whole rollouts. Exits with 1 when a decision for 10,000 hosts takes
    /// 50 ms or more, or grows faster than the fleet.
    Planner {
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// The figures.
#[derive(Debug, Serialize)]
struct Report {
    decisions: Vec<DecisionCost>,
    rollouts: Vec<RolloutCost>,
    /// What a host of the largest fleet costs, in multiples of one of a hundred.
    growth: f64,
    is_within_limits: bool,
}

#[derive(Debug, Serialize)]
struct DecisionCost {
    hosts: usize,
    /// Decisions that were measured.
    decisions: usize,
    /// Of the dearest of them.
    steps: usize,
    decide: Cost,
    /// The interlock's judgement of all steps of the dearest moment.
    permit: Cost,
}

#[derive(Debug, Serialize)]
struct RolloutCost {
    hosts: usize,
    steps: usize,
    cost: Cost,
}

/// True when the limits are kept.
pub(crate) fn run(options: &Options) -> Result<bool, Error> {
    let What::Planner { json } = options.what;
    let mut cold = Cold::new();
    let mut decisions = Vec::new();
    for hosts in DECISIONS {
        decisions.push(middle_of_rollout(hosts, &mut cold)?);
    }
    let mut rollouts = Vec::new();
    for hosts in ROLLOUTS {
        rollouts.push(whole_rollout(hosts, &mut cold)?);
    }
    let growth = growth(&decisions);
    let slowest = decisions.iter().map(|decision| decision.decide.time).max().unwrap_or_default();
    let is_within_limits = slowest < DECISION_TIME_MAX && growth <= GROWTH_MAX;
    let report = Report { decisions, rollouts, growth, is_within_limits };
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Json)?);
    } else {
        print(&report);
    }
    Ok(is_within_limits)
}

/// The dearest decision of a wave in the middle.
fn middle_of_rollout(hosts: usize, cold: &mut Cold) -> Result<DecisionCost, Error> {
    let world = fleet::world(hosts)?;
    let middle = world.rollout.plan.waves.len() / 2;
    let mut simulation = Simulation::new(world, Faults::default());
    let mut turns = 0;
    let mut is_proven = |simulation: &mut Simulation<'_>, wave: usize| {
        turns += 1;
        match simulation.turn() {
            Ok(Turn::Noted(Note::WaveProven { wave: proven })) => Ok(proven == wave),
            Ok(Turn::Began(_) | Turn::Passed(_) | Turn::Noted(_)) if turns < TURNS_MAX => Ok(false),
            other => Err(Error::Refused(format!("the rollout of {hosts} hosts does not go on: {other:?}"))),
        }
    };
    while !is_proven(&mut simulation, middle - 1)? {}
    let (mut decisions, mut dearest) = (0, None);
    loop {
        let decision = decision(simulation.world(), hosts, cold);
        decisions += 1;
        if dearest.as_ref().is_none_or(|known: &DecisionCost| known.decide.time < decision.decide.time) {
            dearest = Some(decision);
        }
        if is_proven(&mut simulation, middle)? {
            break;
        }
    }
    dearest
        .map(|dearest| DecisionCost { decisions, ..dearest })
        .ok_or_else(|| Error::Refused("no decision was measured".to_owned()))
}

fn decision(world: &World, hosts: usize, cold: &mut Cold) -> DecisionCost {
    let steps = match decide(world) {
        Decision::Proceed { steps, .. } => steps,
        Decision::Note(_) | Decision::End(_) => Vec::new(),
    };
    DecisionCost {
        hosts,
        decisions: 1,
        steps: steps.len(),
        decide: cost(RUNS, cold, || decide(world)),
        permit: cost(RUNS, cold, || permit(world, &steps)),
    }
}

/// As the controller asks: all steps of one moment, each beside those before it.
fn permit(world: &World, steps: &[Step]) -> bool {
    let mut interlock = Interlock::new(world);
    steps.iter().all(|step| {
        let is_permitted = interlock.permit(&step.action).is_ok();
        interlock.begin(&step.action);
        is_permitted
    })
}

fn whole_rollout(hosts: usize, cold: &mut Cold) -> Result<RolloutCost, Error> {
    let world = fleet::world(hosts)?;
    let seen = preview(&world);
    if seen.outcome.is_none() {
        return Err(Error::Refused(format!("the rollout of {hosts} hosts does not end: {:?}", seen.waits)));
    }
    Ok(RolloutCost { hosts, steps: seen.steps.len(), cost: cost(ROLLOUT_RUNS, cold, || preview(&world)) })
}

fn growth(decisions: &[DecisionCost]) -> f64 {
    let per_host = |decision: &DecisionCost| {
        let hosts = u32::try_from(decision.hosts).unwrap_or(u32::MAX);
        decision.decide.time.as_secs_f64() / f64::from(hosts)
    };
    let small = decisions.iter().find(|decision| decision.hosts == GROWTH_FROM).map(per_host);
    let large = decisions.last().map(per_host);
    small.zip(large).map_or(f64::INFINITY, |(small, large)| large / small)
}

fn print(report: &Report) {
    println!("One decision in the middle of a rollout; the dearest of a wave.\n");
    println!("| hosts | steps | decide | allocations | memory | permit of all steps | allocations |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for DecisionCost { hosts, steps, decide, permit, .. } in &report.decisions {
        println!(
            "| {hosts} | {steps} | {:.3} ms | {} | {} | {:.3} ms | {} |",
            milliseconds(decide),
            decide.allocations,
            kibibytes(decide),
            milliseconds(permit),
            permit.allocations
        );
    }
    println!("\nA whole rollout, simulated.\n");
    println!("| hosts | steps | time | allocations | memory |");
    println!("| ---: | ---: | ---: | ---: | ---: |");
    for RolloutCost { hosts, steps, cost } in &report.rollouts {
        println!(
            "| {hosts} | {steps} | {:.1} ms | {} | {} |",
            milliseconds(cost),
            cost.allocations,
            kibibytes(cost)
        );
    }
    let limit = DECISION_TIME_MAX.as_millis();
    println!(
        "\nLimits: a decision under {limit} ms, a host of the largest fleet at most {GROWTH_MAX} times one of {GROWTH_FROM}: {:.2}. {}",
        report.growth,
        if report.is_within_limits { "Kept." } else { "MISSED." }
    );
}

fn milliseconds(cost: &Cost) -> f64 {
    cost.time.as_secs_f64() * 1e3
}

fn kibibytes(cost: &Cost) -> String {
    format!("{} KiB", cost.bytes_peak.div_ceil(1024))
}
