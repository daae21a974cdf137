//! A simulated fleet, for the preview and for the tests of the planner.
//!
//! The preview is the planner: [`preview`] runs the same `decide` and the same `permit`, unchanged, against a simulated
//! copy of the world, and folds the same records as the controller writes. [`Simulation`] does so step by step, with
//! failures and crashes where the caller wants them. `trial` is the fleet in which things die, where truth and view are
//! apart.
//!
//! Guarantees: no I/O, no clock, no randomness; the same world and the same faults give the same steps.
//! Not in here: how long things really take (see `estimate` for what is assumed), and what goes wrong by itself.

mod effect;
pub mod estimate;
mod preview;
mod simulated;
mod simulation;
#[cfg(feature = "trial")]
pub mod trial;

pub use preview::{Preview, PreviewNote, PreviewStep, preview};
pub use simulated::{Crash, Fail, Fault, Faults};
pub use simulation::{Simulation, SimulationError, Turn};
