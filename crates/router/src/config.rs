//! How a router is set up: addresses, workers, and the limit on everything that a peer could otherwise make grow.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::access_log::AccessLogForm;
use crate::tls::TlsFiles;

/// Longest request head, in bytes; larger ones are answered with 431. Cookies of several services fit.
pub const MAX_REQUEST_HEAD_BYTES: usize = 64 * 1024;
/// Longest answer head, in bytes; a larger one is an error of the backend (502).
pub const MAX_ANSWER_HEAD_BYTES: usize = 64 * 1024;
/// Most header lines in a request or an answer.
pub const MAX_HEADERS: usize = 100;
/// Informational answers (1xx) that are skipped before the answer proper; more is an error of the backend.
pub const MAX_INFORMATIONAL_ANSWERS: u32 = 16;
/// Bytes that are read from a backend at once. One such buffer exists per core, not per connection.
pub const READ_BUFFER_BYTES: usize = 64 * 1024;
/// Attempts for one request, however many backends there are: a bound on the time a client waits.
pub const MAX_ATTEMPTS: u32 = 8;
/// Connections that wait to be accepted, per core.
pub const LISTEN_BACKLOG: i32 = 1024;
/// Most workers: beyond this the machine is not what the setting was made for.
pub const MAX_WORKERS: usize = 256;

/// Requests of one HTTP/2 connection at once; a browser's page asks for fewer.
pub const MAX_HTTP_2_STREAMS: u32 = 128;
/// Bytes of one request's body that a client may send over HTTP/2 before its backend has taken them.
pub const HTTP_2_STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// The same over all requests of a connection.
pub const HTTP_2_CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Bytes of one answer that wait here for an HTTP/2 client to take them.
pub const HTTP_2_SEND_BUFFER_BYTES: usize = 64 * 1024;

/// Where a router listens and how it is run.
#[derive(Debug, Clone)]
pub struct RouterConfig {
    /// Where clients connect. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// The certificate that is shown to clients, which then speak TLS; in the clear without it. The state may name another one.
    pub tls: Option<TlsFiles>,
    /// Threads, each with a listener of its own (`SO_REUSEPORT`). 0 means one per core.
    pub workers: usize,
    /// The control socket; its directory must exist. A stale file there is replaced, a live router is an error.
    pub control: PathBuf,
    /// Where access log lines are appended, if anywhere.
    pub access_log: Option<PathBuf>,
    /// How they are written.
    pub access_log_form: AccessLogForm,
    /// Of so many requests one is logged, by chance; 1 logs each.
    pub access_log_one_in: u32,
    /// Where Prometheus may read the counts (`GET /metrics`), if anywhere. Whoever reaches it may read.
    pub metrics: Option<SocketAddr>,
    /// Whether requests are counted by release and route.
    pub counts: bool,
    /// Where the state is kept over a restart, if anywhere. What is there when the router starts is used instead of the
    /// state it is given, unless it is older.
    pub keep: Option<PathBuf>,
    /// Take over from the router that answers on the control socket, if one does: its listening sockets, and with them the
    /// number of its workers, its state in place of the one given here, and its lease. It ends when its requests have ended.
    pub take_over: bool,
    /// Keep the `X-Forwarded-*` lines of the client and append to them. Only behind another trusted proxy: otherwise
    /// any client could claim any address.
    pub trust_forwarded: bool,
    /// How backends are checked.
    pub health: HealthSettings,
    /// Limits and timeouts.
    pub limits: Limits,
}

impl RouterConfig {
    /// A router with the default settings.
    #[must_use]
    pub fn new(listen: SocketAddr, control: PathBuf) -> Self {
        Self {
            listen,
            tls: None,
            workers: 0,
            control,
            access_log: None,
            access_log_form: AccessLogForm::default(),
            access_log_one_in: 1,
            metrics: None,
            counts: true,
            keep: None,
            take_over: false,
            trust_forwarded: false,
            health: HealthSettings::default(),
            limits: Limits::default(),
        }
    }
}

/// How backends are checked.
#[derive(Debug, Clone)]
pub struct HealthSettings {
    /// Time between two checks of a backend.
    pub interval: Duration,
    /// A check that takes longer has failed.
    pub timeout: Duration,
    /// Passed checks in a row after which a backend that was down is up.
    pub rise: u32,
    /// Failed checks, or failed connections of requests, in a row after which a backend that was up is down.
    pub fall: u32,
}

impl Default for HealthSettings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), timeout: Duration::from_secs(1), rise: 2, fall: 3 }
    }
}

/// Limits and timeouts. Timeouts are kept to within a quarter of a second.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Client connections open at once, over all workers; more wait in the listen queue.
    pub max_connections: usize,
    /// Longest request body, in bytes; longer ones are answered with 413.
    pub max_body_bytes: u64,
    /// Idle connections that are kept to one backend, per worker.
    pub max_idle_per_backend: usize,
    /// A request head must be whole within this time from its first byte.
    pub head_timeout: Duration,
    /// How long a client connection may stay idle between requests.
    pub keep_alive_timeout: Duration,
    /// Opening a connection to a backend.
    pub connect_timeout: Duration,
    /// From the last byte of the request that was passed on to the head of the answer.
    pub answer_timeout: Duration,
    /// How long an answer may stand still, in either direction.
    pub stall_timeout: Duration,
    /// How long an idle connection to a backend is kept. Shorter than the shortest keep-alive time usual among
    /// application servers (2 s), so that the backend rarely closes it under a request.
    pub idle_timeout: Duration,
    /// How long [`crate::run_until`] lets requests in flight finish when it is told to end.
    pub shutdown_timeout: Duration,
    /// How long an upgraded connection may be silent in both directions.
    pub tunnel_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 20_000,
            max_body_bytes: 16 * 1024 * 1024 * 1024,
            max_idle_per_backend: 256,
            head_timeout: Duration::from_secs(15),
            keep_alive_timeout: Duration::from_secs(75),
            connect_timeout: Duration::from_secs(2),
            answer_timeout: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_millis(1500),
            shutdown_timeout: Duration::from_secs(30),
            tunnel_timeout: Duration::from_secs(3600),
        }
    }
}
