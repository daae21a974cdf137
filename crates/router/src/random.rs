//! Chance, and what stands in for it when a key decides.

use std::cell::Cell;
use std::hash::{BuildHasher, Hasher};

use crate::affinity::mix;

/// A small generator of one worker. Not for secrets: it splits traffic and makes request ids.
#[derive(Debug)]
pub(crate) struct Random(Cell<u64>);

impl Random {
    /// Seeded from the process's hash keys, which the system's generator made.
    pub(crate) fn seeded() -> Self {
        Self::from_seed(std::collections::hash_map::RandomState::new().build_hasher().finish())
    }

    pub(crate) fn from_seed(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    /// splitmix64: every state is good, and one addition and three mixes make a value.
    pub(crate) fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        mix(state)
    }

    /// A value below `limit`.
    pub(crate) fn below(&self, limit: u64) -> u64 {
        below(self.next(), limit)
    }
}

/// A random word as a value below `limit`, by multiplication: the bias is under 2⁻³² for every sum of weights.
pub(crate) fn below(word: u64, limit: u64) -> u64 {
    // The high half of the product is below `limit`.
    ((u128::from(word) * u128::from(limit)) >> 64) as u64
}

/// How much a key is drawn to a backend: the largest wins (weighted rendezvous hashing; Schindelhauer and Schomaker,
/// "Weighted Distributed Hash Tables", 2005). Each backend gets keys by its weight, and when one goes only its own move.
pub(crate) fn attraction(key_and_name: u64, weight: u64) -> f64 {
    // 53 bits make a number between 0 and 1 that is neither.
    let unit = ((mix(key_and_name) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    weight as f64 / -unit.ln()
}
