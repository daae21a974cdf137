//! The hosts of one environment and the one connection to each, opened when first needed and again when it was lost.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use greenlight_drivers::transport::{BoxFuture, Transport, TransportError};
use greenlight_link::connection::{CallError, Connection, OpenOptions, ReleaseSource, StageProgress};
use greenlight_link::message::{Event, Lease, Reply, Request};
use greenlight_model::Timestamp;
use greenlight_model::action::Blame;
use greenlight_model::fleet::{BecomeRoot, Environment, HostSettings, LinkKind, ManagerKind};
use greenlight_model::id::HostName;
use tokio::sync::{Mutex, Semaphore};

use crate::{boundary, clock};

/// Handshakes under way at once. sshd's own default begins to drop connections at ten unauthenticated ones, and a
/// jump host sees all of them.
const HANDSHAKES_MAX: usize = 8;
/// How long a failed attempt speaks for the host before the next one is made.
const REOPEN_AFTER: Duration = Duration::from_secs(2);

/// The hosts of one environment.
pub struct Hosts {
    entries: BTreeMap<HostName, Entry>,
    agent_program: PathBuf,
    ssh_config: Option<PathBuf>,
    handshakes: Semaphore,
}

struct Entry {
    settings: HostSettings,
    connect_timeout: Duration,
    slot: Mutex<Slot>,
}

#[derive(Default)]
struct Slot {
    connection: Option<Connection>,
    failed: Option<(Timestamp, HostError)>,
}

/// Why a host did not do what was asked, in one message for the operator.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{why}")]
pub struct HostError {
    /// What happened, why, and what to do.
    pub why: String,
    /// Whose fault it looks like.
    pub blame: Blame,
    /// Whether the host could not be reached at all.
    pub is_unreachable: bool,
    /// The last lines that a failing process or step printed.
    pub output: Vec<String>,
}

impl HostError {
    fn unreachable(why: String) -> Self {
        Self { why, blame: Blame::Passing, is_unreachable: true, output: Vec::new() }
    }
}

impl From<CallError> for HostError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Agent(error) => {
                Self { why: error.message, blame: error.blame, is_unreachable: false, output: error.output }
            }
            CallError::Lost { .. } => Self::unreachable(error.to_string()),
            other => Self {
                why: other.to_string(),
                blame: Blame::Passing,
                is_unreachable: false,
                output: Vec::new(),
            },
        }
    }
}

impl Hosts {
    /// The hosts of an environment; nothing is connected yet.
    #[must_use]
    pub fn new(environment: &Environment, agent_program: PathBuf, ssh_config: Option<PathBuf>) -> Arc<Self> {
        let entries = environment
            .host_settings
            .iter()
            .map(|(host, settings)| {
                let entry = Entry {
                    settings: settings.clone(),
                    connect_timeout: environment.timeouts.connect,
                    slot: Mutex::default(),
                };
                (host.clone(), entry)
            })
            .collect();
        Arc::new(Self { entries, agent_program, ssh_config, handshakes: Semaphore::new(HANDSHAKES_MAX) })
    }

    /// The connection to a host, opened if there is none.
    ///
    /// # Errors
    /// When the host cannot be reached or its agent cannot be started.
    pub async fn connection(&self, host: &HostName) -> Result<Connection, HostError> {
        let entry = self.entry(host)?;
        let mut slot = entry.slot.lock().await;
        if let Some(connection) = slot.connection.as_ref().filter(|connection| connection.is_alive()) {
            return Ok(connection.clone());
        }
        slot.connection = None;
        if let Some((at, error)) = &slot.failed
            && clock::now().duration_since(*at).unsigned_abs() < REOPEN_AFTER
        {
            return Err(error.clone());
        }
        match self.open(host, entry).await {
            Ok(connection) => {
                *slot = Slot { connection: Some(connection.clone()), failed: None };
                Ok(connection)
            }
            Err(error) => {
                slot.failed = Some((clock::now(), error.clone()));
                Err(error)
            }
        }
    }

    /// Replaces the connection by a new one: what was proven over it was proven from outside, with nothing left of the
    /// session that made the change.
    ///
    /// # Errors
    /// When the host cannot be reached any more.
    pub async fn fresh(&self, host: &HostName) -> Result<Connection, HostError> {
        let entry = self.entry(host)?;
        let connection = self.open(host, entry).await?;
        *entry.slot.lock().await = Slot { connection: Some(connection.clone()), failed: None };
        Ok(connection)
    }

    /// One request to a host.
    ///
    /// # Errors
    /// When the host cannot be reached, refuses or fails.
    pub async fn call(
        &self,
        host: &HostName,
        request: Request,
        timeout: Duration,
        on_event: impl FnMut(Event) + Send,
    ) -> Result<Reply, HostError> {
        let connection = self.connection(host).await?;
        let title = request.title();
        Ok(bounded(&connection, title, Box::pin(connection.call(request, timeout, on_event))).await?)
    }

    /// A staging request with what of the release it turns out to need.
    ///
    /// # Errors
    /// As [`Hosts::call`].
    pub async fn stage(
        &self,
        host: &HostName,
        request: Request,
        release: Arc<dyn ReleaseSource>,
        timeout: Duration,
        on_progress: impl FnMut(StageProgress) + Send,
        on_event: impl FnMut(Event) + Send,
    ) -> Result<Reply, HostError> {
        let connection = self.connection(host).await?;
        let title = request.title();
        let call = Box::pin(connection.stage(request, release, timeout, on_progress, on_event));
        Ok(bounded(&connection, title, call).await?)
    }

    fn entry(&self, host: &HostName) -> Result<&Entry, HostError> {
        self.entries
            .get(host)
            .ok_or_else(|| HostError::unreachable(format!("{host} is not in the fleet file any more")))
    }

    async fn open(&self, host: &HostName, entry: &Entry) -> Result<Connection, HostError> {
        let options = OpenOptions {
            agent_program: self.agent_program.clone(),
            become_root: needs_root(&entry.settings),
            connect_timeout: entry.connect_timeout,
            ssh_config: self.ssh_config.clone(),
        };
        let _permit = self.handshakes.acquire().await;
        Connection::open(host, &entry.settings.link, &options)
            .await
            .map_err(|error| HostError::unreachable(error.to_string()))
    }
}

/// A call with its step boundaries: before it, when its request is on its way, and when its answer is there.
async fn bounded<T>(
    connection: &Connection,
    title: &str,
    mut call: BoxFuture<'_, Result<T, CallError>>,
) -> Result<T, CallError> {
    if !boundary::are_watched() {
        return call.await;
    }
    let host = connection.host();
    boundary::pass(format_args!("before {title} on {host}"));
    // The first look at the call puts its request into the queue.
    let done = match poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await {
        Poll::Ready(done) => done,
        Poll::Pending => {
            connection.written().await;
            boundary::pass(format_args!("after sending {title} to {host}"));
            call.await
        }
    };
    boundary::pass(format_args!("after the answer to {title} from {host}"));
    done
}

fn needs_root(settings: &HostSettings) -> bool {
    match settings.become_root {
        BecomeRoot::Sudo => true,
        BecomeRoot::Never => false,
        BecomeRoot::Auto => {
            settings.link != LinkKind::Local
                && matches!(
                    settings.manager,
                    ManagerKind::Auto | ManagerKind::Systemd | ManagerKind::Supervisord
                )
        }
    }
}

/// A socket on a host, reached through its agent.
pub(crate) struct AgentSocket {
    pub(crate) hosts: Arc<Hosts>,
    pub(crate) host: HostName,
    pub(crate) path: String,
    pub(crate) timeout: Duration,
}

impl Transport for AgentSocket {
    fn exchange<'a>(&'a self, input: &'a str) -> BoxFuture<'a, Result<String, TransportError>> {
        Box::pin(async move {
            let request =
                Request::Socket { path: self.path.clone(), input: input.to_owned(), timeout: self.timeout };
            match self.hosts.call(&self.host, request, self.timeout + self.timeout, |_| {}).await {
                Ok(Reply::Output(output)) => Ok(output),
                Ok(other) => Err(TransportError::new(format!("{}: unexpected answer {other:?}", self.host))),
                Err(error) => Err(TransportError::new(format!("{}: {error}", self.host))),
            }
        })
    }

    fn lease<'a>(&'a self, what: &'a str, lease: Lease) -> BoxFuture<'a, Result<bool, TransportError>> {
        Box::pin(async move {
            let request = Request::Lease { path: self.path.clone(), what: what.to_owned(), lease };
            let done = self.hosts.call(&self.host, request, self.timeout, |_| {}).await;
            done.map(|_| true).map_err(|error| TransportError::new(format!("{}: {error}", self.host)))
        })
    }
}
