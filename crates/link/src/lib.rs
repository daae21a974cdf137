//! What controller and agent say to each other, and over what.
//!
//! [`message`] is the protocol, [`frame`] its form on the wire (both sides use it), [`connection`] the controller's end: a local
//! child or the system's ssh.

pub mod connection;
mod diagnosis;
pub mod frame;
pub mod message;
mod open;
mod process;
mod ssh;
mod stage;
