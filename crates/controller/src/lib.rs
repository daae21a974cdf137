//! The loop: world in, decision out, actions performed and recorded.
//!
//! The controller holds no plan of its own and no cursor. It gathers the world, asks the planner, lets the interlock
//! judge each step, performs what is permitted and records what came of it; then it asks again. Whoever starts it
//! with the same records goes on where the last one stopped.
//!
//! Not in here: what to do next (`planner`), what is unsafe (`interlock`), how a balancer or a host is spoken to
//! (`drivers`, `link`), printing (`cli`).

pub mod adopt;
mod age;
mod append;
mod boundary;
mod claims;
pub mod clock;
mod drift;
mod foresight;
mod gather;
mod hosts;
mod judging;
mod lease;
mod looks;
mod losses;
mod objects;
mod perform;
mod preflight;
mod prepare;
mod progress;
mod releases;
mod run;
mod secrets;
mod spec;
mod takeover;

pub use append::append;
pub use drift::compare;
pub use foresight::{FaultForeseen, Foreseen, PresentTraffic, StepForeseen, foresee};
pub use gather::{Gathered, Gatherer};
pub use hosts::{HostError, Hosts};
pub use judging::{evidence_file, kept_judgement};
pub use lease::{ControllerLease, LeaseError};
pub use looks::look;
pub use losses::losses;
pub use perform::Artifacts;
pub use preflight::{Looked, preflight};
pub use prepare::{PrepareError, Prepared, Wanted, prepare, rollout_gates};
pub use progress::{Progress, ProgressSink};
pub use releases::known_releases;
pub use run::{Controller, Ended, Interrupt, RunError};
pub use secrets::{SecretError, resolve as resolve_secrets};
pub use spec::{instance_spec, mark};
