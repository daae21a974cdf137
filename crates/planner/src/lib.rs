//! World in, decision out: which step may come next, and why not.
//!
//! Guarantees: [`decide`] is pure and keeps no cursor. Each decision follows from the world as it is, so a controller that
//! was killed, a host that came back or a second controller needs no code of its own. It is linear in the instances
//! of the rollout. Everything that does not move has a typed reason.
//!
//! Not in here: whether a step is safe (`interlock` judges that apart), and how it is done (`controller`).
//!
//! Where to start reading: `decide` for the course of a rollout, `instance` for what happens on one host.

mod back;
mod canary;
mod decide;
mod failure;
mod finish;
mod instance;
mod migrate;
mod moves;
mod prepare;
mod room;
mod view;
mod wave;
mod waves;

pub use decide::decide;
pub use prepare::objections;
pub use waves::waves;
