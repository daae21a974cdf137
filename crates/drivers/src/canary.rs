//! A canary behind a balancer: the share it is lent, and what was counted about it and about stable.
//!
//! | | built-in router | HAProxy |
//! | --- | --- | --- |
//! | share | exact in chance, whatever the weights | by weights of whole numbers: it may be a little less than asked for |
//! | lease | returns to stable by itself | the agent on its host takes the share back; over TCP none: the weights stay when the controller goes |
//! | alert | held at 0 until a person enables it | weight 0; the hold is the controller's to keep |
//! | counts | per host, release and route, with latencies and what is in flight | requests and errors per host |

use std::collections::BTreeSet;
use std::time::Duration;

use greenlight_model::id::HostName;
use greenlight_model::quantity::Percent;

/// A share of the traffic for the hosts that run a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share<'a> {
    /// The release on trial. The built-in router knows its backends by it.
    pub release: &'a str,
    /// The hosts that run it.
    pub hosts: &'a BTreeSet<HostName>,
    /// Of all requests; 1 to 99.
    pub share: Percent,
    /// How long it is lent, if it is not renewed.
    pub lease: Duration,
}

/// What a balancer counted since it was started. The difference of two readings is what happened between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Another value after a restart or a reload: everything begins anew.
    pub instance: u64,
    /// Time since then.
    pub elapsed: Duration,
    /// Upper ends of the buckets of latencies and ages, in microseconds; the last bucket has none. Empty when the balancer
    /// counts no latencies.
    pub bounds_us: Vec<u64>,
    /// What was counted, in no particular order.
    pub rows: Vec<CountRow>,
}

/// What was counted for one host and route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountRow {
    /// The host.
    pub host: HostName,
    /// The release it ran then, where the balancer knows.
    pub release: Option<String>,
    /// The route's template. HAProxy knows none: everything is `other`.
    pub route: String,
    /// With another value it is another row, whose counts begin anew.
    pub since: u64,
    /// Requests that can be judged: answered, or failed by the server.
    pub requests: u64,
    /// Those that went wrong on the server's side: status 500 and above, no answer, an answer that broke off.
    pub errors: u64,
    /// Requests that could not be delivered.
    pub undelivered: u64,
    /// How long they took, as `(bucket, requests)`.
    pub latency: Vec<(usize, u64)>,
    /// How long the requests in flight have waited by now, as `(bucket, requests)`.
    pub in_flight: Vec<(usize, u64)>,
}
