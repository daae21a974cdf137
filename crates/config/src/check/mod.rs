//! What does not fit together: checks over the whole file, after each value has been read by itself.
//!
//! A value that could not be read has been noted already; no check says anything that follows from it.

mod balancer;
mod environment;
mod hosts;
mod ports;
mod secrets;
mod service;

use crate::language::FleetFile;
use crate::problem::Problems;

pub(crate) use balancer::service_behind;
pub(crate) use environment::floor;
pub(crate) use hosts::{Sites, balancers, sites};

/// Notes everything that does not fit together.
pub(crate) fn check(file: &FleetFile, problems: &mut Problems) {
    service::check(file, problems);
    secrets::check(file, problems);
    environment::check(file, problems);
    crate::gates::check(file, problems);
}
