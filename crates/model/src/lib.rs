//! The vocabulary of Greenlight.
//!
//! Everything that two crates say to each other about a fleet is a type in here: what should be (fleet, release,
//! rollout), what is (host reports, traffic), what is to be done (actions, decisions) and what was done (records).
//!
//! Guarantees: no I/O, no clock, no randomness; every name, id and quantity has one way in, which validates.
//! Not in here: how anything is decided (`planner`, `interlock`) or done (the crates above).

pub mod action;
pub mod calendar;
pub mod canary;
pub mod charter;
pub mod check;
pub mod decision;
pub mod evidence;
pub mod fleet;
pub mod gate;
pub mod history;
pub mod host;
pub mod id;
pub mod journal;
pub mod manifest;
pub mod migration;
pub mod quantity;
pub mod record;
pub mod requirements;
pub mod rollout;
pub mod sample;
pub mod traffic;
pub mod world;

pub use jiff::Timestamp;
