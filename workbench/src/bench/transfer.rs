//! `cargo xtask bench transfer`: a release onto real hosts, beside what else people use for it.
//!
//! Every contender brings the same trees to the same hosts of one bed, switches a link, restarts the same application
//! under systemd, and is done when every host answers with the version that was asked for. Rounds are interleaved, so that
//! whatever else the machine does meets all of them; the median counts. What is measured: wall time, processor time of the
//! controller and of the hosts (by control group, so nothing that detaches itself escapes), bytes at the controller's end of
//! the network, and the most memory that the controller's processes had at once.
//!
//! Not in here: delay of the network, which a bed does not have; all hosts are on this machine and share its processors
//! and its disk.

mod contender;
mod limit;
mod meter;
mod payload;
mod table;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use greenlight_testbed::{Bed, Init, wait};
use serde::Serialize;

use crate::Error;
use contender::{Contender, PORT_GREENLIGHT, PORT_PEER};
use meter::{Cost, Meter};

/// What the bed is called.
const BED: &str = "transfer";
/// How long hosts may take to answer as the version after a command has ended.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// Bare connections of each round: one is short, so its median needs more.
const BARE_RUNS: usize = 3;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// On how many hosts.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=200))]
    hosts: u8,
    /// How often each is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
    rounds: u8,
    /// Only these contenders, by the beginning of their names: greenlight, tar, rsync.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// What is measured of each contender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Row {
    /// A connection to every host, and nothing else.
    Bare,
    /// The application restarted on every host, and answering.
    Restart,
    /// To hosts that have nothing of it.
    Cold,
    /// A second release, of which most is there.
    Warm,
    /// The same release again.
    Unchanged,
    /// Back to the first.
    Rollback,
}

impl Row {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Bare => "bare `ssh true`",
            Self::Restart => "restart of the application",
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Unchanged => "nothing changed",
            Self::Rollback => "rollback",
        }
    }
}

/// The costs of every run, by row and contender, in the order in which they were measured.
pub(crate) type Costs = BTreeMap<(Row, &'static str), Vec<Cost>>;

/// True when the limits are kept.
pub(crate) fn run(options: &Options) -> Result<bool, Error> {
    let payload = payload::build()?;
    let names: Vec<String> = (1..=options.hosts).map(|number| format!("host{number}")).collect();
    eprintln!("booting {} hosts", names.len());
    let bed = Bed::builder(BED).hosts(names.iter().map(String::as_str), Init::Systemd).up().map_err(bed)?;
    let mut contenders = contender::all(&bed, &payload)?;
    let is_wanted =
        |name: &str| options.only.is_empty() || options.only.iter().any(|only| name.starts_with(only));
    contenders.retain(|contender| is_wanted(contender.name()));
    let mut costs = Costs::new();
    for contender in &contenders {
        eprintln!("preparing {}", contender.name());
        contender.prepare(&bed)?;
    }
    for round in 1..=options.rounds {
        for contender in &contenders {
            eprintln!("round {round} of {}: {}", options.rounds, contender.name());
            measure(&bed, contender.as_ref(), &mut costs)?;
        }
        for _ in 0..BARE_RUNS {
            measure_bare(&bed, &mut costs)?;
        }
        measure_restart(&bed, contenders.last().map_or(PORT_PEER, |last| last.port()), &mut costs)?;
    }
    let medians = costs.into_iter().map(|(key, costs)| (key, meter::median(&costs))).collect();
    let limits = limit::judge(&medians);
    let report = table::Report::new(options.hosts, options.rounds, &payload, &medians, limits);
    match options.json {
        true => println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Json)?),
        false => report.print(),
    }
    bed.down().map_err(self::bed)?;
    Ok(report.is_within_limits())
}

/// One round of one contender: cold, warm, nothing changed, back.
fn measure(bed: &Bed, contender: &dyn Contender, costs: &mut Costs) -> Result<(), Error> {
    contender.clear(bed)?;
    for (row, version) in
        [(Row::Cold, "v1"), (Row::Warm, "v2"), (Row::Unchanged, "v2"), (Row::Rollback, "v1")]
    {
        let Some(script) = contender.script(row) else { continue };
        settle()?;
        let meter = Meter::start(bed)?;
        let command = bed.hub_command("bash");
        meter.run(command, &script, contender.directory())?;
        answers(bed, contender.port(), version)?;
        let cost = meter.end()?;
        eprintln!("  {:<16} {cost}", row.title());
        costs.entry((row, contender.name())).or_default().push(cost);
    }
    Ok(())
}

fn measure_bare(bed: &Bed, costs: &mut Costs) -> Result<(), Error> {
    let meter = Meter::start(bed)?;
    meter.run(bed.hub_command("bash"), &contender::on_all(bed, "true"), &bed.home())?;
    let cost = meter.end()?;
    costs.entry((Row::Bare, contender::SSH)).or_default().push(cost);
    Ok(())
}

/// What the application's own start takes on all hosts at once, without a connection to any.
fn measure_restart(bed: &Bed, port: u16, costs: &mut Costs) -> Result<(), Error> {
    let unit = if port == PORT_GREENLIGHT { contender::UNIT_GREENLIGHT } else { contender::UNIT_PEER };
    let meter = Meter::start(bed)?;
    std::thread::scope(|scope| {
        let restarts: Vec<_> = bed
            .hosts()
            .iter()
            .map(|host| scope.spawn(move || host.run("systemctl", &["restart", unit])))
            .collect();
        let mut ended = restarts
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        ended.try_for_each(|ended| ended.map(drop).map_err(self::bed))
    })?;
    answers(bed, port, "v1")?;
    let cost = meter.end()?;
    costs.entry((Row::Restart, contender::SYSTEMD)).or_default().push(cost);
    Ok(())
}

/// Returns when every host answers as the version.
fn answers(bed: &Bed, port: u16, version: &str) -> Result<(), Error> {
    for host in bed.hosts() {
        let address = SocketAddr::from((host.address(), port));
        let look = || {
            let response = bed.get(address, "/version").map_err(|error| error.to_string())?;
            let text = String::from_utf8_lossy(&response.body).into_owned();
            let value: serde_json::Value = serde_json::from_str(&text).map_err(|_| text.clone())?;
            if value["version"] == version { Ok(()) } else { Err(text) }
        };
        wait::until(&format!("{} to answer as {version}", host.name()), ANSWER_DEADLINE, look)
            .map_err(self::bed)?;
    }
    Ok(())
}

/// Lets the disk come to rest, so that no contender pays for what another left to be written.
fn settle() -> Result<(), Error> {
    rustix::fs::sync();
    Ok(())
}

#[expect(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
pub(crate) fn bed(error: greenlight_testbed::Error) -> Error {
    Error::Refused(error.to_string())
}
