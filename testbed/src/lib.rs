//! Real hosts on one machine, for the tests.
//!
//! A host is a network namespace on a bridge with an address of its own, private process, mount, host name,
//! IPC and control group namespaces, and an overlay over one Debian base root, booted with systemd, with
//! supervisord or with nothing but sshd. The controller's place is the [hub](Bed::hub_command): the
//! namespace of the bridge, from which every host is reached over ssh.
//!
//! ```no_run
//! # fn main() -> Result<(), greenlight_testbed::Error> {
//! use greenlight_testbed::{Bed, Init};
//! let bed = Bed::builder("rolling").hosts(["web1", "web2"], Init::Systemd).host("lb", Init::None).up()?;
//! assert_eq!(bed.ssh("web1", &["hostname"])?.trim(), "web1");
//! bed.host("web1").crash()?;
//! bed.down()?;
//! # Ok(())
//! # }
//! ```
//!
//! Guarantees: beds do not see each other or the network outside; a bed that is dropped leaves no process,
//! namespace, control group or disk behind, and what a killed test run left is cleared by the next one.
//!
//! Not here: delay and loss of packets, architectures other than the machine's, and any shortcut into
//! Greenlight itself. The tests drive its binary as an operator would.

mod base;
mod bed;
mod cgroup;
mod command;
mod error;
mod histogram;
mod host;
pub mod http;
mod load;
mod machine;
mod network;
mod process;
mod project;
mod registry;
mod role;
pub mod wait;

pub use base::Base;
pub use bed::{Bed, BedBuilder};
pub use cgroup::Group;
pub use command::{output_of, run};
pub use error::Error;
pub use host::{Host, Init, Sudo};
pub use load::{Load, LoadHandle, LoadReport, VersionSource};
pub use machine::{cache_directory, required_packages};
pub use project::{APPLICATION, Project, greenlight_binary};
pub use registry::{BedState, HostState, down_all, states};
pub use role::haproxy::HaProxy;
pub use role::postgres::Postgres;
