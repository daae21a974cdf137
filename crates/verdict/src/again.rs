//! A against A: what the same settings would have said of the stable release, had one of its hosts been a canary.
//!
//! Every stable host in turn plays the canary against the others, in each stretch of the past. All of them are healthy in the
//! sense that matters: nobody would have wanted a rollout to be turned back for them. So every abort here is a false alarm that
//! would have happened, and how many there are says whether the settings suit this traffic.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::interval::{Arm, Interval, IntervalError};
use crate::judge::Judge;
use crate::judgement::Verdict;
use crate::settings::{Metric, Settings};

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgainstItself {
    /// Each pretended canary.
    pub runs: Vec<Run>,
    /// How many were aborted: false alarms.
    pub aborted: usize,
    /// How many passed.
    pub passed: usize,
    /// The false-abort budget of the settings, to compare with.
    pub false_abort_budget: f64,
}

/// One pretended canary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The host that played it.
    pub host: String,
    /// When its stretch began, in milliseconds since 1970.
    pub start_ms: u64,
    /// The verdict.
    pub verdict: Verdict,
    /// What it was aborted for.
    pub culprits: Vec<String>,
}

/// Why the past cannot be judged against itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgainstItselfError {
    /// There is nobody to compare with.
    #[error(
        "the past has {hosts} stable hosts; at least 2 are needed, so that one can play the canary of the others"
    )]
    TooFewHosts {
        /// How many there are.
        hosts: usize,
    },
    /// Too short.
    #[error(
        "the past is shorter than two stretches of {stretch_ms} ms: one to learn from, and one to judge; choose shorter ones"
    )]
    TooShort {
        /// How long one is.
        stretch_ms: u64,
    },
    /// An interval cannot be.
    #[error(transparent)]
    Interval(#[from] IntervalError),
}

/// Cuts the past into stretches, and judges each against what the one before it taught. Missing traffic is left out: nobody
/// gave these hosts a share to hold. `on_run` hears how many pretended canaries of how many have been judged.
///
/// # Errors
/// When there are fewer than two stable hosts or stretches.
pub fn against_itself(
    settings: &Settings,
    past: &[Interval],
    stretch_ms: u64,
    mut on_run: impl FnMut(usize, usize),
) -> Result<AgainstItself, AgainstItselfError> {
    let mut settings = settings.clone();
    settings.comparisons.retain(|comparison| comparison.metric != Metric::Traffic);
    let stable = |interval: &Interval| {
        let mut stable = interval.clone();
        stable.cells.retain(|cell| cell.arm == Arm::Stable);
        stable.canary_share = None;
        stable
    };
    let past: Vec<Interval> = past.iter().map(stable).filter(|interval| !interval.cells.is_empty()).collect();
    let hosts: BTreeSet<&str> =
        past.iter().flat_map(|interval| &interval.cells).map(|cell| cell.host.as_str()).collect();
    if hosts.len() < 2 {
        return Err(AgainstItselfError::TooFewHosts { hosts: hosts.len() });
    }
    let begin_ms = past.first().map_or(0, |interval| interval.start_ms);
    let number = |interval: &Interval| interval.start_ms.saturating_sub(begin_ms) / stretch_ms.max(1);
    let stretches: Vec<&[Interval]> = past.chunk_by(|one, other| number(one) == number(other)).collect();
    if stretches.len() < 2 {
        return Err(AgainstItselfError::TooShort { stretch_ms });
    }
    let mut runs = Vec::new();
    let mut judged = 0;
    for pair in stretches.windows(2) {
        let [before, stretch] = pair else { continue };
        for host in &hosts {
            let run = run(&settings, host, before, stretch)?;
            runs.extend(run);
            judged += 1;
            on_run(judged, (stretches.len() - 1) * hosts.len());
        }
    }
    let count = |verdict: Verdict| runs.iter().filter(|run| run.verdict == verdict).count();
    Ok(AgainstItself {
        aborted: count(Verdict::Abort),
        passed: count(Verdict::Pass),
        false_abort_budget: settings.false_abort_budget,
        runs,
    })
}

/// Judges one host; none when it was not there.
fn run(
    settings: &Settings,
    host: &str,
    before: &[Interval],
    stretch: &[Interval],
) -> Result<Option<Run>, AgainstItselfError> {
    let is_there = stretch.iter().flat_map(|interval| &interval.cells).any(|cell| cell.host == host);
    // Without a comparison that is left there is nothing to judge by.
    let (true, Ok(mut judge)) = (is_there, Judge::new(settings.clone())) else { return Ok(None) };
    for interval in before {
        judge.learn(interval)?;
    }
    for interval in stretch {
        let mut pretended = interval.clone();
        for cell in pretended.cells.iter_mut().filter(|cell| cell.host == host) {
            cell.arm = Arm::Canary;
        }
        judge.observe(&pretended)?;
        if judge.judgement().verdict == Verdict::Abort {
            break;
        }
    }
    let judgement = judge.judgement();
    Ok(Some(Run {
        host: host.to_owned(),
        start_ms: stretch.first().map_or(0, |interval| interval.start_ms),
        verdict: judgement.verdict,
        culprits: judgement.culprits().map(|finding| finding.comparison.title()).collect(),
    }))
}
