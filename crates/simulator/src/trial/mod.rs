//! A fleet in which things die.
//!
//! [`Scenario::from_seed`] draws a fleet, a rollout and faults; [`run`] plays it through with the real planner, interlock
//! and record folding, single-threaded and by its own clock; [`shrink`] makes a scenario that fails smaller.
//!
//! Truth and view are apart: hosts with disks that outlive them, processes, balancers, databases and clients are as they
//! are; each controller knows only what it has looked at over a network that loses, delays and repeats. Until
//! [`SAFETY_ENDS_MS`] faults happen and no promise may be broken by what Greenlight does. Then everything outside is
//! mended, and the rollout has to end.
//!
//! Guarantees: no I/O, no clock, no threads; the same scenario runs the same way every time.
//! Not in here: the bytes of releases, secrets, several record logs, and how an ssh connection breaks in detail.

mod agent;
mod canary;
mod care;
mod check;
mod controller;
mod faults;
mod host;
mod judging;
mod ledger;
mod log;
mod look;
mod numbers;
mod operator;
mod perform;
mod plot;
mod prepare;
mod scenario;
mod shrink;
mod site;
mod switch;
mod traffic;
#[expect(clippy::module_inception, reason = "the trial is what this module is about")]
mod trial;

pub use check::Violation;
pub use scenario::{Badness, Fault, FaultKind, Ms, Part, SAFETY_ENDS_MS, Scenario, ServiceShape, Strike};
pub use shrink::shrink;
pub use trial::{Report, run};
