//! `cargo xtask bench`: what is measured, each by a command of its own; a release onto hosts in [`transfer`], the
//! judgement of canaries in [`verdict`].
//!
//! `cargo xtask bench planner`: what a decision costs, and whether it grows faster than the fleet.
//!
//! Each fleet's rollout is simulated. Every decision before its first wave, of a wave in the middle and of the way back from
//! there is measured, and the dearest of each counts. The time is the processor's, so that other work on the machine hardly changes it, and
//! every run begins with cold caches.

mod cost;
mod fleet;
mod router;
mod transfer;
mod verdict;

use std::time::Duration;

use clap::{Args, Subcommand};
use greenlight_interlock::Interlock;
use greenlight_model::action::Verb;
use greenlight_model::decision::{Decision, Step};
use greenlight_model::rollout::{Note, OperatorRequest};
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
    /// Single decisions of a rollout, and whole rollouts. Exits with 1 when a decision for 10,000 hosts takes
    /// 50 ms or more, or grows faster than the fleet.
    Planner {
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
    /// A release of some 200 MB onto real hosts, beside what else people use for it. Exits with 1 when a limit is missed.
    Transfer(transfer::Options),
    /// How often healthy canaries are aborted and how long faulty ones live, by our judge and by what others do. Exits with 1
    /// when ours aborts more than 1 % of the healthy ones in any world, or takes longer than it may.
    Verdict(verdict::Options),
    /// The built-in router beside HAProxy and nginx: processor time per request, latency, memory. Exits with 1 when a limit
    /// is missed, or one of them is not on this machine.
    Router(router::Options),
}

/// The figures.
#[derive(Debug, Serialize)]
struct Report {
    decisions: Vec<DecisionCost>,
    rollouts: Vec<RolloutCost>,
    /// What a host of the largest fleet costs, in multiples of one of a hundred; the worst of the moments.
    growth: f64,
    is_within_limits: bool,
}

#[derive(Debug, Serialize)]
struct DecisionCost {
    hosts: usize,
    /// Where in the rollout.
    moment: &'static str,
    /// What it begins.
    steps: usize,
    decide: Cost,
    /// The interlock's judgement of all these steps.
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
    match &options.what {
        What::Planner { json } => planner(*json),
        What::Transfer(options) => transfer::run(options),
        What::Verdict(options) => verdict::run(options),
        What::Router(options) => router::run(options),
    }
}

fn planner(json: bool) -> Result<bool, Error> {
    let mut cold = Cold::new();
    let mut all = Vec::new();
    for hosts in DECISIONS {
        all.extend(decisions(hosts, &mut cold)?);
    }
    let mut rollouts = Vec::new();
    for hosts in ROLLOUTS {
        rollouts.push(whole_rollout(hosts, &mut cold)?);
    }
    let growth = growth(&all);
    let slowest = all.iter().map(|decision| decision.decide.time).max().unwrap_or_default();
    let is_within_limits = slowest < DECISION_TIME_MAX && growth <= GROWTH_MAX;
    let report = Report { decisions: all, rollouts, growth, is_within_limits };
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Json)?);
    } else {
        print(&report);
    }
    Ok(is_within_limits)
}

/// The dearest decisions of one rollout: before its first wave, in a wave in the middle, and of the way back from there.
fn decisions(hosts: usize, cold: &mut Cold) -> Result<Vec<DecisionCost>, Error> {
    let world = fleet::world(hosts)?;
    let middle = world.rollout.plan.waves.len() / 2;
    let mut rollout = Measured { hosts, cold, simulation: Simulation::new(world, Faults::default()) };
    let is_change = |turn: &Turn| match turn {
        Turn::Began(steps) => steps.iter().any(|step| step.action.verb() == Verb::Drain),
        _ => false,
    };
    let is_proven = |turn: &Turn, expected: usize| matches!(turn, Turn::Noted(Note::WaveProven { wave }) if *wave == expected);
    let beginning = rollout.dearest("beginning", is_change)?;
    rollout.pass(|turn| is_proven(turn, middle - 1))?;
    let forward = rollout.dearest("middle", |turn| is_proven(turn, middle))?;
    let asked = rollout.simulation.ask(OperatorRequest::Abort, "");
    asked.map_err(|error| Error::Refused(format!("the rollout cannot be aborted: {error}")))?;
    let back = rollout.dearest("way back", |turn| matches!(turn, Turn::Ended(_)))?;
    Ok(vec![beginning, forward, back])
}

/// A rollout under way.
struct Measured<'a> {
    hosts: usize,
    cold: &'a mut Cold,
    simulation: Simulation<'a>,
}

impl Measured<'_> {
    /// Lets it go on up to a turn.
    fn pass(&mut self, is_last: impl Fn(&Turn) -> bool) -> Result<(), Error> {
        for _ in 0..TURNS_MAX {
            if is_last(&self.turn()?) {
                return Ok(());
            }
        }
        Err(Error::Refused(format!("the rollout of {} hosts does not go on", self.hosts)))
    }

    /// The same, and measures every decision on the way.
    fn dearest(
        &mut self,
        moment: &'static str,
        is_last: impl Fn(&Turn) -> bool,
    ) -> Result<DecisionCost, Error> {
        let mut dearest: Option<DecisionCost> = None;
        for _ in 0..TURNS_MAX {
            let decision = self.decision(moment);
            if dearest.as_ref().is_none_or(|known| known.decide.time < decision.decide.time) {
                dearest = Some(decision);
            }
            if is_last(&self.turn()?) {
                break;
            }
        }
        dearest.ok_or_else(|| Error::Refused("no decision was measured".to_owned()))
    }

    fn turn(&mut self) -> Result<Turn, Error> {
        let turn = self.simulation.turn();
        turn.map_err(|error| Error::Refused(format!("the rollout of {} hosts: {error}", self.hosts)))
    }

    fn decision(&mut self, moment: &'static str) -> DecisionCost {
        let world = self.simulation.world();
        let steps = match decide(world) {
            Decision::Proceed { steps, .. } => steps,
            Decision::Note(_) | Decision::End(_) => Vec::new(),
        };
        DecisionCost {
            hosts: self.hosts,
            moment,
            steps: steps.len(),
            decide: cost(RUNS, self.cold, || decide(world)),
            permit: cost(RUNS, self.cold, || permit(world, &steps)),
        }
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

/// The worst growth of all moments.
fn growth(decisions: &[DecisionCost]) -> f64 {
    let [.., largest] = DECISIONS;
    let per_host = |hosts: usize, moment: &str| {
        let found = decisions.iter().find(|decision| decision.hosts == hosts && decision.moment == moment);
        let count = u32::try_from(hosts).unwrap_or(u32::MAX);
        found.map_or(f64::NAN, |decision| decision.decide.time.as_secs_f64() / f64::from(count))
    };
    let moments =
        decisions.iter().filter(|decision| decision.hosts == largest).map(|decision| decision.moment);
    moments.map(|moment| per_host(largest, moment) / per_host(GROWTH_FROM, moment)).fold(0.0, f64::max)
}

fn print(report: &Report) {
    println!(
        "One decision: the dearest before the first wave, of a wave in the middle, and of the way back from there.\n"
    );
    println!(
        "| hosts | moment | steps | decide | allocations | memory | permit of all steps | allocations |"
    );
    println!("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for DecisionCost { hosts, moment, steps, decide, permit } in &report.decisions {
        println!(
            "| {hosts} | {moment} | {steps} | {:.3} ms | {} | {} | {:.3} ms | {} |",
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
