//! `cargo xtask simulate`: seeds of the simulated fleet, in parallel, with what they met and what they violated.

use clap::Args;

use crate::Error;

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
    /// Stop at the first violation.
    #[arg(long)]
    fail_fast: bool,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// True when nothing was violated.
pub(crate) fn run(options: &Options) -> Result<bool, Error> {
    Err(Error::Refused(format!("there is no fleet with faults yet: {options:?}")))
}
