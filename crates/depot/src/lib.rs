//! Builds releases, and places their bytes on a host.
//!
//! - [`build`]: from a commit to a release. [`Depot`]: the releases that were built.
//! - [`manifest`]: reads a tree into a manifest, and derives ids from it.
//! - [`Shipment`]: a release on its way to its hosts.
//! - [`host`]: the objects and releases of one service on a host.
//!
//! Guarantees: a name that is a hash always names those bytes; what is half-done is never visible; memory is bounded
//! whatever a tree holds or a wire brings. Not in here: how objects travel (`link`), and when (`controller`, `agent`).

pub mod build;
mod check;
mod depot;
mod disk;
mod error;
mod git;
pub mod host;
mod index;
pub mod manifest;
mod object;
mod pack;
mod scan;
mod shipment;
mod step;
mod tag;
#[cfg(test)]
mod testing;
mod texts;

pub use depot::{Depot, FindError};
pub use error::DepotError;
pub use git::{COMMITS_MAX, Commit, GitError, commits_between, head};
pub use object::{EncodedObject, Encoding, OBJECT_BYTES_MAX, content_hash, decode, decode_with};
pub use shipment::{Lacking, Parcel, Parcels, Shipment};
pub use tag::Tagged;
pub use texts::Text;
