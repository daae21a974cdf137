//! How long things are taken to last. They order the steps of a preview and give it a rough time scale; nothing else
//! depends on them.

use std::time::Duration;

use greenlight_model::action::Verb;

/// How long the balancer takes to see that a server came up.
pub const HEALTH: Duration = Duration::from_secs(2);
/// How long the last sessions of a drained server last.
pub const SESSIONS: Duration = Duration::from_secs(2);
/// How long a canary takes to pass a step; how long it really takes depends on the traffic.
pub const VERDICT: Duration = Duration::from_secs(300);

/// How long an action takes.
#[must_use]
pub const fn of(verb: Verb) -> Duration {
    Duration::from_millis(match verb {
        Verb::Preflight => 1_000,
        Verb::Claim | Verb::Unclaim | Verb::Drain | Verb::Admit | Verb::Share => 200,
        Verb::Stage => 20_000,
        Verb::Smoke | Verb::Activate => 5_000,
        Verb::Migrate | Verb::Contract => 10_000,
        Verb::Deactivate => 2_000,
        Verb::Confirm => 500,
        Verb::Prune => 1_000,
    })
}
