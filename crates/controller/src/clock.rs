//! The one place that reads the time, and the one that makes an id from it.

use greenlight_model::Timestamp;
use greenlight_model::id::{EnvironmentName, RolloutId};

/// The time now.
#[must_use]
pub fn now() -> Timestamp {
    Timestamp::now()
}

/// A new rollout's id: sortable by time, and different for two controllers that begin in the same second, by a
/// hash over who they are.
#[must_use]
pub fn rollout_id(environment: &EnvironmentName, now: Timestamp, by: &str) -> RolloutId {
    let seed = format!("{environment} {} {} {by}", now.as_nanosecond(), std::process::id());
    let hash = blake3::hash(seed.as_bytes()).to_hex();
    let text = format!("{environment}-{}-{}", now.strftime("%Y%m%dT%H%M%S"), &hash[..4]);
    #[expect(clippy::expect_used, reason = "a name of at most 63 bytes, digits and dashes are a valid id")]
    text.parse().expect("an environment's name with a time is a rollout id")
}
