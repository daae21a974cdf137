//! What controller and agent say to each other, and over what.

pub mod frame;
pub mod message;
