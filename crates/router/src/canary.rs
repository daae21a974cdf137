//! The canary: a share of the traffic, lent to one release for a time.
//!
//! - The share is a ceiling, exact in chance: each request is drawn by itself (or by its sticky key). When no canary
//!   backend can take a request, a stable one does; never the other way round.
//! - It is a lease. Whoever set it renews it; when nobody does, every core gives the canary nothing from then on, within
//!   a tick of [`crate::watch::TICK`] (a quarter of a second). An ended lease is not renewed: it is set anew.
//! - After an alert the share is 0 on every core before the alert is acknowledged, testers included, and setting it is
//!   refused until somebody enables it again, by name.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// All of the traffic.
pub const WHOLE_PER_MILLE: u32 = 1000;
/// Longest lease, in milliseconds: after this a controller that went away is noticed, whatever it asked for.
pub const MAX_LEASE_MS: u64 = 60 * 60 * 1000;
/// Shortest lease, in milliseconds: it must outlast the tick by which it is kept.
pub const MIN_LEASE_MS: u64 = 500;
/// Longest reason of an alert, and longest name of who enabled the canary again, in bytes.
pub const MAX_REASON_BYTES: usize = 1024;

/// A canary as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanarySpec {
    /// The release on trial: every backend that runs it is the canary's, all others are stable.
    pub release: String,
    /// Its share of the requests, in thousandths, whatever the weights of its backends are among themselves. At 0 only
    /// testers reach it.
    pub share_per_mille: u32,
    /// How long the share is lent, in milliseconds from the moment it is set or renewed.
    pub lease_ms: u64,
}

/// Sets the canary, or changes its share; either begins its lease anew. The generation rises by one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanaryChange {
    /// What it should be from now on.
    pub spec: CanarySpec,
    /// When given, the change is made only if this is the present generation: compare and set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
}

/// Lends the present share for longer. The generation stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renewal {
    /// The release that is thought to be on trial.
    pub release: String,
    /// The lease from now on, in milliseconds.
    pub lease_ms: u64,
}

/// Ends the trial: from then on all backends share the traffic by their weights. The generation rises by one. Refused
/// while an alert holds the canary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conclusion {
    /// The release that is thought to be on trial.
    pub release: String,
}

/// Sends all following requests to stable and holds the canary there. The generation rises by one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlertRaised {
    /// Why, as a sentence.
    pub reason: String,
    /// Who says so.
    pub by: String,
}

/// Lets a canary be set again. Its share stays 0 until then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enabling {
    /// The person who decided it.
    pub by: String,
}

/// An alert that holds the canary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alert {
    /// Why.
    pub reason: String,
    /// Who said so.
    pub by: String,
    /// When.
    pub at: jiff::Timestamp,
    /// The release that was on trial, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
}

/// The canary as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryStatus {
    /// What was asked for.
    pub spec: CanarySpec,
    /// The share in force on every core, in thousandths.
    pub share_in_force_per_mille: u32,
    /// What is left of the lease, in milliseconds; 0 when it has ended.
    pub lease_left_ms: u64,
}

impl CanarySpec {
    /// Whether share and lease are possible. The text says what is wrong; the release is checked with those of backends.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.share_per_mille > WHOLE_PER_MILLE {
            return Err(format!("a share of {} thousandths is more than all", self.share_per_mille));
        }
        validate_lease(self.lease_ms)
    }
}

/// Whether a lease is possible. The text says what is wrong.
pub(crate) fn validate_lease(lease_ms: u64) -> Result<(), String> {
    if !(MIN_LEASE_MS..=MAX_LEASE_MS).contains(&lease_ms) {
        return Err(format!("a lease of {lease_ms} ms is not within {MIN_LEASE_MS} to {MAX_LEASE_MS} ms"));
    }
    Ok(())
}

/// The share that is lent, as all cores read it with each request. One thread writes it.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    /// The share above, the end in milliseconds since the router began below: in one word, so that no core ever joins the
    /// share of one lease to the end of another.
    share_and_end: AtomicU64,
    is_held: AtomicBool,
}

/// Bits of the end: 8,900 years.
const END_BITS: u32 = 48;

impl Lease {
    /// Lends a share until `ends`, counted from the router's beginning.
    pub(crate) fn grant(&self, share_per_mille: u32, ends: Duration) {
        let ends = millis(ends).min((1 << END_BITS) - 1);
        self.share_and_end.store(u64::from(share_per_mille) << END_BITS | ends, Relaxed);
    }

    /// Takes the share back at once.
    pub(crate) fn revoke(&self) {
        self.share_and_end.store(0, Relaxed);
    }

    /// Whether an alert holds the canary, testers too.
    pub(crate) fn set_held(&self, is_held: bool) {
        self.is_held.store(is_held, Relaxed);
    }

    pub(crate) fn is_held(&self) -> bool {
        self.is_held.load(Relaxed)
    }

    /// What is in force at `now`, counted from the router's beginning.
    pub(crate) fn share_per_mille(&self, now: Duration) -> u32 {
        let both = self.share_and_end.load(Relaxed);
        let share = u32::try_from(both >> END_BITS).unwrap_or(0);
        if left_of(both, now).is_zero() { 0 } else { share }
    }

    /// What is left of the lease.
    pub(crate) fn left(&self, now: Duration) -> Duration {
        left_of(self.share_and_end.load(Relaxed), now)
    }
}

fn left_of(share_and_end: u64, now: Duration) -> Duration {
    Duration::from_millis(share_and_end & ((1 << END_BITS) - 1)).saturating_sub(now)
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_by_itself_and_can_be_taken_back() {
        let at = Duration::from_millis;
        let lease = Lease::default();
        assert_eq!(lease.share_per_mille(at(0)), 0);
        lease.grant(50, at(1000));
        assert_eq!((lease.share_per_mille(at(999)), lease.share_per_mille(at(1000))), (50, 0));
        assert_eq!((lease.left(at(400)), lease.left(at(1400))), (at(600), at(0)));
        lease.grant(1000, at(u64::MAX));
        assert_eq!(lease.share_per_mille(at(9000)), 1000);
        lease.revoke();
        assert_eq!((lease.share_per_mille(at(0)), lease.left(at(0))), (0, at(0)));
    }

    #[test]
    fn shares_and_leases_have_bounds() {
        let spec =
            |share_per_mille, lease_ms| CanarySpec { release: "v2".to_owned(), share_per_mille, lease_ms };
        assert!(spec(1000, MIN_LEASE_MS).validate().is_ok() && spec(0, MAX_LEASE_MS).validate().is_ok());
        for bad in [spec(1001, 1000), spec(1, MIN_LEASE_MS - 1), spec(1, MAX_LEASE_MS + 1)] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}
