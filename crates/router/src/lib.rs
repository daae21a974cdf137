//! The built-in data plane: an HTTP router in front of the releases, HTTP/1.1 and HTTP/2, with TLS or in the clear.
//!
//! hyper's server in front, a lean HTTP/1 client of our own towards the backends, one single-threaded runtime per core
//! with a listener of its own (`SO_REUSEPORT`) and connection pools without locks.
//!
//! # What it guarantees
//! - A change of the state is in force on every core before it is acknowledged, and no connection is dropped for it.
//!   Generations only rise: an older one is refused, and so is the same one with other content.
//! - A draining backend gets no new request; those in flight finish and are counted as its sessions.
//! - A request is sent a second time only when nothing of its body had been read, and it cannot have been processed (the
//!   connection could not be opened, or an idle one was closed under it before a byte of an answer) or is idempotent. A
//!   backend that fails with an idempotent request in its hands costs one more attempt at another, not two.
//! - With a certificate every connection is TLS (1.2, 1.3; rustls), and speaks HTTP/2 where the client can. A renewed certificate
//!   is shown without a restart; one that does not fit its key never is (see `tls`). Over HTTP/2 each stream is a request of its
//!   own: chosen, counted, drained, timed out and reset alone; GOAWAY goes out when the router stops.
//! - Requests whose framing two servers could read differently are refused with 400, and the connection is closed.
//! - Bodies stream both ways with backpressure. Every queue, size and wait has a limit.
//! - A canary's share is a ceiling and a lease; an alert takes it back on every core before it is acknowledged, until a
//!   person enables it again: see `canary`.
//! - A maintenance page or a bounded pause holds every request; none is lost when a pause ends in time.
//! - A backend starts slowly, and is left out for a while after bad answers in a row, where the state says so; never all.
//! - A router is replaced by another one without a connection refused or a request lost: see `handover`.
//! - The access log never holds a request back, and holds neither queries nor headers but the request id; addresses of
//!   clients only in the common log format.
//!
//! # What it does not do
//! - HTTP/2 only with TLS, and only in front: backends are spoken to in HTTP/1.1 and in the clear. Trailers and informational answers (1xx) end here. `Expect: 100-continue` is answered
//!   here. Upgrades are passed on for WebSocket only; any other `Upgrade` line is dropped and the request is an ordinary
//!   one.
//! - A client that closes its sending side is taken to have gone away.
//! - It keeps its state over a restart only where it is told to ([`RouterConfig::keep`]); leases end with it always.
//! - One router has one set of backends: it is for one service.
//!
//! # For a controller that runs a canary
//! [`RouterClient`], or the lines of `protocol` over any transport. In this order:
//! 1. [`RouterClient::canary`] with a share of 0, before a backend of the new release is admitted. Backends are the
//!    canary's by the release they are said to run ([`BackendChange::release`]).
//! 2. `canary` again with each step's share, and [`RouterClient::renew`] well within the lease for as long as it is judged
//!    healthy. When nobody renews, the traffic is stable's.
//! 3. Each interval [`RouterClient::counts`], by backend or by release, and the difference to the reading before
//!    ([`CountRow`]): requests, bad ones, how long they took, and what is in flight with its age. Rows whose
//!    `since_generation`, or readings whose `instance`, is another one began anew.
//! 4. [`RouterClient::alert`] to send all traffic to stable (it stays there until [`RouterClient::enable`]), or, when all
//!    backends run the release or are about to, [`RouterClient::conclude`].
//!
//! # Where to start reading
//! [`Router::start`] in `router`, then `authority` (the state), `worker` (a core), `connection` (a client), `proxy` (a
//! request), `exchange` (a request at a backend), `wire` (what is refused).

mod access_log;
mod affinity;
mod answer;
mod authority;
mod backend;
mod balance;
mod body;
mod canary;
mod client;
mod config;
mod connection;
mod control;
mod counts;
mod exchange;
mod handover;
mod headers;
mod health;
mod keep;
mod metrics;
mod pool;
mod protocol;
mod proxy;
mod random;
mod request;
mod router;
mod routes;
mod standing;
mod state;
mod tally;
mod tls;
mod watch;
mod wire;
mod worker;

pub use access_log::AccessLogForm;
pub use affinity::{MAX_KEY_NAME_BYTES, MAX_TESTER_VALUE_BYTES, RequestKey, TesterSpec};
pub use canary::{
    Alert, AlertRaised, CanaryChange, CanarySpec, CanaryStatus, Conclusion, Enabling, MAX_LEASE_MS,
    MAX_REASON_BYTES, MIN_LEASE_MS, Renewal, WHOLE_PER_MILLE,
};
pub use client::{RouterClient, RouterClientError};
pub use config::{
    HTTP_2_CONNECTION_WINDOW_BYTES, HTTP_2_SEND_BUFFER_BYTES, HTTP_2_STREAM_WINDOW_BYTES, HealthSettings,
    LISTEN_BACKLOG, Limits, MAX_ANSWER_HEAD_BYTES, MAX_ATTEMPTS, MAX_HEADERS, MAX_HTTP_2_STREAMS,
    MAX_INFORMATIONAL_ANSWERS, MAX_REQUEST_HEAD_BYTES, MAX_WORKERS, READ_BUFFER_BYTES, RouterConfig,
};
pub use counts::{
    CountRow, CountsBy, CountsRequest, LATENCY_BUCKETS, RouterCounts, latency_bounds_us, latency_bucket,
};
pub use handover::HandoverError;
pub use protocol::{ControlError, ControlErrorKind};
pub use router::{Router, RouterError, RouterHandle, ShutdownReport, run_until};
pub use routes::{MAX_ROUTE_BYTES, MAX_ROUTES, OTHER_ROUTE};
pub use standing::{MAX_PAGE_BYTES, MAX_PAUSE_MS, MAX_PAUSED, MaintenancePage, Pause};
pub use state::{
    BackendChange, BackendSpec, BackendState, BackendStatus, Health, MAX_BACKENDS, MAX_HEALTH_DETAIL_BYTES,
    MAX_HEALTH_PATH_BYTES, MAX_NAME_BYTES, MAX_OUT_MS, MAX_RELEASE_BYTES, MAX_SLOW_START_MS, MAX_WEIGHT,
    PassiveHealth, RouterSnapshot, RouterState, StateError,
};
pub use tls::{MAX_PEM_BYTES, TlsError, TlsFiles, TlsStatus};
pub use wire::findings as wire_findings;
