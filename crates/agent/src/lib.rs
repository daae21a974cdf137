//! What runs on a host: places, activates, supervises, observes.
//!
//! [`serve`] speaks with one controller over a pair of streams: that is the whole agent, and nothing of it needs to run in between.
//! [`guard`] is the process that goes back when nobody confirms.
//! [`supervise`] is the process that keeps another one running, on hosts that have neither systemd nor supervisord.
//!
//! ```text
//! serve ─ handle ─┬─ observe, preflight, logs, socket, sample look
//!                 ├─ stage, smoke, migrate                   beside what runs
//!                 ├─ activate ─ manager (systemd, supervisord, own) ─ probe
//!                 └─ guard                                 the way back, when nobody confirms
//!                    ledger · run · plan · environment       what is remembered, and how a process is run
//! ```
//!
//! Guarantees: the ledger is always whole; every request that changes an instance holds the instance's claim, and one that switches
//! a generation above all before; a process is believed to run a release, or to be gone, only when that was seen.
//! Not in here: which host is changed when (`planner`), and whether it may be (`interlock`).

mod account;
mod activate;
mod charter;
mod command;
mod context;
mod drift;
mod environment;
mod facts;
mod failure;
mod files;
#[cfg(test)]
mod fixture;
mod guard;
mod handle;

mod layout;
mod lease;
mod ledger;
mod logs;
mod manager;
mod migrate;
mod observe;
mod plan;
mod poll;
mod ports;
mod preflight;
mod probe;
mod process;
mod room;
mod run;
mod sample;
mod serve;
mod smoke;
mod socket;
mod stage;
mod strays;
mod supervise;
mod version;

pub use guard::fire::{guard, rearm};
pub use ledger::parse as parse_ledger;
pub use serve::{Agent, AgentFailure, serve};
pub use supervise::supervise;
