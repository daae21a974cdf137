//! The judgement of canary against stable: counts in; pass, abort or inconclusive out.
//!
//! It may be looked at every second: the probability that a healthy canary is ever aborted stays within the budget, if requests
//! are independent, after the correction for bursts. [`process`] has the mathematics and its sources.
//!
//! # How to use it
//! ```
//! use greenlight_verdict::{
//!     Arm, Cell, Comparison, Histogram, Interval, Judge, Metric, Settings, Verdict, usual_bounds_us,
//! };
//!
//! // Once per rollout, before it begins. `Comparison::negligible` lets a service without errors pass.
//! let errors = Comparison { negligible: Some(0.002), ..Comparison::new(Metric::Errors) };
//! let comparisons = vec![errors, Comparison::new(Metric::LatencyP99), Comparison::new(Metric::Traffic)];
//! let settings = Settings { warmup_ms: 180_000, ..Settings::new(usual_bounds_us(), comparisons) };
//! let mut judge = Judge::new(settings)?;
//!
//! let interval = |start_ms, canary_errors| {
//!     let cell = |arm, host: &str, requests, errors| Cell {
//!         arm,
//!         host: host.to_owned(),
//!         route: "/checkout".to_owned(),
//!         requests,
//!         errors,
//!         latency: Histogram::default(),   // in buckets by `bounds_us`
//!         in_flight: Histogram::default(), // the ages of what is under way when the interval ends
//!     };
//!     Interval {
//!         start_ms,
//!         length_ms: 1000,
//!         canary_share: Some(0.1),
//!         cells: vec![
//!             cell(Arm::Canary, "web-07", 100, canary_errors),
//!             cell(Arm::Stable, "web-01", 900, 9),
//!         ],
//!     }
//! };
//! // Before the canary gets requests: what is usual. Where slow begins and how errors scatter is learnt here.
//! judge.learn(&interval(0, 0))?;
//! // Each time the canary's share of the traffic changes, a pass must be earned anew; evidence for an abort is kept.
//! judge.begin_step();
//! // Each second, or as often as counts are read: the differences of the counters since the last time.
//! for second in 1..240 {
//!     judge.observe(&interval(second * 1000, 5))?;
//!     match judge.verdict() {
//!         Verdict::Pass => {}         // the next step may begin
//!         Verdict::Inconclusive => {} // go on: `requests_needed` says how long
//!         Verdict::Abort => break,    // all traffic to stable, at once
//!     }
//! }
//! let judgement = judge.judgement();
//! assert_eq!(judgement.verdict, Verdict::Abort);
//! assert!(judgement.to_string().starts_with("abort: the canary is worse"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! From the built-in router: `bounds_us` is its `latency_bounds_us`; a cell is the difference of two readings of a row with the
//! same backend, route and `since_generation` (`requests`, `bad()` as errors, `latency` by [`Histogram::since`]), and the later reading's
//! `in_flight_ages` by [`Histogram::from_buckets`].
//!
//! [`Watch`] does the same for hard limits on hosts, [`until_abort`] says before the rollout how long a fault would stay unseen, and
//! [`evidence`] is the file from which the whole judgement can be made again. A [`Judge`] is plain data and can be stored.
//!
//! # What it guarantees
//! - Three answers. Too little traffic is inconclusive, with the requests that are still needed; never a pass, never an abort.
//! - At most α of all healthy canaries are aborted, over all comparisons and the whole rollout, however often one looks, whatever
//!   the error rate does to both arms alike, and however weights are moved by what was seen. At most β of all canaries that are as
//!   bad as `pass_if_below` pass a step, for each comparison that is that bad.
//! - State of constant size in the number of intervals and requests; the same intervals give the same answer.
//! - No I/O, no clock, no randomness.
//!
//! # What it does not
//! - Correct for requests that depend on each other beyond a minute, or in ways that were not seen before the rollout.
//! - Find what the counts do not show: a wrong answer with status 200 is a good request here.
//!
//! # Where to start reading
//! `process` (the test), `judge` (what is put to it), `judgement` (what comes out), `explain` (in words).

mod again;
mod burst;
pub mod evidence;
mod explain;
mod foresight;
pub mod guard;
mod interval;
mod judge;
mod judgement;
mod negligible;
pub mod process;
mod settings;
mod threshold;

pub use foresight::{Expectation, Foresight, until_abort, until_pass};
pub use guard::{Alert, Guard, GuardMetric, Sample, Watch};
pub use interval::{Arm, CELLS_MAX, Cell, Histogram, Interval, IntervalError, NAME_BYTES_MAX, Tally};
pub use judge::{Judge, OTHER_ROUTES, ROUTES_MAX};
pub use judgement::{Finding, FindingState, HostCount, Judgement, RouteCount, Verdict};
pub use settings::{
    BOUNDS_MAX, COMPARISONS_MAX, Comparison, Metric, Settings, SettingsError, usual_bounds_us,
};
