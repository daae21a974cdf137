//! What is fed with hostile inputs, and what must hold of each.

use crate::chance::Chance;

mod fleet_file;
mod frames;
mod haproxy;
mod http;
mod ledger;
mod manifest;
mod object;

/// A place where bytes of others come in.
pub(crate) struct Target {
    /// Its name, which is also that of its directory in the corpus.
    pub(crate) name: &'static str,
    /// What it reads, in a few words.
    pub(crate) about: &'static str,
    /// Words of its format.
    pub(crate) words: &'static [&'static str],
    /// Makes an input from scratch, where mutations alone would hardly ever be valid.
    pub(crate) make: Option<fn(&mut Chance) -> Vec<u8>>,
    /// Makes an input that was mutated valid where chance hardly would: lengths, checksums.
    pub(crate) mend: Option<fn(&mut [u8])>,
    /// Feeds it: whether it took the input for valid, or the complaint when something does not hold. A panic is one as well.
    pub(crate) feed: fn(&[u8]) -> Result<bool, String>,
    /// Bytes that it may hold at a time whatever the input…
    pub(crate) bytes_fixed: u64,
    /// …and for each byte of the input.
    pub(crate) bytes_per_byte: u64,
}

/// All of them.
pub(crate) const ALL: [Target; 7] = [
    fleet_file::TARGET,
    frames::TARGET,
    haproxy::TARGET,
    http::TARGET,
    ledger::TARGET,
    manifest::TARGET,
    object::TARGET,
];

/// A complaint unless something holds.
fn demand(holds: bool, complaint: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(complaint()) }
}
