//! World and action in, permit or violated rule out. Knows nothing of the planner.
//!
//! The interlock is the second pair of eyes: it is written apart from the planner, from the rules alone, and shares
//! no code with it beyond the model. It does not know why an action is proposed, only whether it would be unsafe in the world
//! as it is. Each rule has a number that never changes, a test that breaks it, and a sentence for the operator.
//!
//! | rule | what it refuses |
//! | --- | --- |
//! | 1 capacity | taking an instance out below the floor, changing one that still gets requests or has sessions |
//! | 2 claim | changing what another rollout holds, a generation or release that is not this rollout's, two actions at once |
//! | 3 proof | admitting what does not answer as its release |
//! | 4 gates | a first change while a gate is not green |
//! | 5 order | touching a later wave while an earlier one is not proven |
//! | 6 migration | a migration a second time, beside another, or on the way back; one that contracts while older code may run, and older code after it |
//! | 7 fallback | changing a kept half or a standby before its time |
//! | 8 retention | removing what could still be gone back to; activating a bad or unstaged release |
//! | 9 share | a share of the traffic for what is not a canary under judgement, or none at all by weight |
//! | 10 ownership | acting on what is not part of the rollout |
//!
//! Not in here: whether a step is useful, or which one comes first. In a decision of several steps each is to be judged
//! with those begun before it: in `World::in_flight`, or by [`Interlock::begin`]. A moment costs at most linear time in the
//! instances of the rollout, each further action in it next to none.

mod permit;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::fmt;

pub use permit::{Interlock, permit};

/// A rule of the interlock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Serving instances never fall under the floor by our own action, and no request is cut by it.
    Capacity = 1,
    /// One rollout at a time holds an instance; generations only rise.
    Claim = 2,
    /// Nothing is admitted that has not answered as its release since it was activated.
    Proof = 3,
    /// Nothing is changed forward while a gate is not green.
    Gates = 4,
    /// A later wave is not touched while an earlier one is not proven.
    Order = 5,
    /// A migration runs at most once, never concurrently, never on the way back.
    Migration = 6,
    /// A standby or fallback keeps its release until the wave that names it.
    Fallback = 7,
    /// What could still be gone back to is never removed; a bad release is never activated.
    Retention = 8,
    /// Traffic is shared out by weight only for the sake of a canary that is being judged.
    Share = 9,
    /// What is not part of the rollout is never touched.
    Ownership = 10,
}

impl Rule {
    /// Every rule, by number.
    pub const ALL: [Self; 10] = [
        Self::Capacity,
        Self::Claim,
        Self::Proof,
        Self::Gates,
        Self::Order,
        Self::Migration,
        Self::Fallback,
        Self::Retention,
        Self::Share,
        Self::Ownership,
    ];

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Capacity => "capacity",
            Self::Claim => "claim",
            Self::Proof => "proof",
            Self::Gates => "gates",
            Self::Order => "order",
            Self::Migration => "migration",
            Self::Fallback => "fallback",
            Self::Retention => "retention",
            Self::Share => "share",
            Self::Ownership => "ownership",
        };
        write!(f, "rule {} ({name})", self.number())
    }
}

/// A refusal: which rule the action would break, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {sentence}")]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// What would be wrong, for the operator.
    pub sentence: String,
}
