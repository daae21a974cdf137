//! Balancers: HAProxy and the built-in router behind one driver.
//!
//! Guarantees: what a driver reports was read from the balancer just then; a change is believed when it was read back.
//! Not in here: when to drain and admit, and how long to wait for sessions; the planner decides that from what is
//! reported.

pub mod balancer;
pub mod canary;
mod haproxy;
mod router;
pub mod transport;
