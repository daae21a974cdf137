//! Starting a router, and holding one that runs.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{mpsc, oneshot};

use crate::access_log::{self, LogSender};
use crate::authority::{Authority, AuthoritySetup, Command, QUEUED_COMMANDS, WorkerLink};
use crate::canary::Lease;
use crate::config::{LISTEN_BACKLOG, MAX_WORKERS, RouterConfig};
use crate::control::ControlSocket;
use crate::keep::Kept;
use crate::metrics;
use crate::protocol::{ControlAnswer, ControlError, ControlRequest, Nothing};
use crate::state::{BackendChange, RouterSnapshot, RouterState, StateError};
use crate::tls::{Certificate, TlsError};
use crate::worker::{self, WorkerCounts, WorkerSetup};

/// Commands that wait for one worker. The authority sends one at a time.
const QUEUED_WORKER_COMMANDS: usize = 2;

/// Why a router did not start.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// The address to listen on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The control socket.
    #[error(
        "cannot open the control socket {path}: {source}{}",
        if source.kind() == io::ErrorKind::AddrInUse { "; a router already answers there" } else { "" }
    )]
    Control {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The access log.
    #[error("cannot append to the access log {path}: {source}")]
    AccessLog {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file in which the state is kept.
    #[error(
        "cannot use the kept state {path}: {source}; look what is in it, and move it away to start without (an alert that \
         holds the canary may be there)"
    )]
    Keep {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// The certificate for TLS.
    #[error("cannot speak TLS: {0}")]
    Tls(#[from] TlsError),
    /// A thread or its runtime.
    #[error("cannot start a thread of the router: {source}")]
    Thread {
        /// What the system said.
        source: io::Error,
    },
    /// The first state is not legal.
    #[error("the state is refused: {0}")]
    State(#[from] StateError),
    /// More workers than [`MAX_WORKERS`].
    #[error("{workers} workers are more than {MAX_WORKERS}")]
    TooManyWorkers {
        /// How many were asked for.
        workers: usize,
    },
}

/// The router itself: see [`Router::start`].
#[derive(Debug)]
pub struct Router;

/// A running router. Dropping it stops the router at once, without waiting for requests in flight; to stop it gently
/// use [`RouterHandle::shutdown`].
#[derive(Debug)]
pub struct RouterHandle {
    local_addr: SocketAddr,
    metrics_addr: Option<SocketAddr>,
    commands: mpsc::Sender<Command>,
    /// Its end tells the control thread that the handle is gone.
    _alive: oneshot::Sender<()>,
}

/// How a router ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Client connections that were cut because they did not end in time.
    pub connections_cut: u64,
}

impl Router {
    /// Starts a router with threads and runtimes of its own; it may be called from anywhere. When it returns the
    /// address is bound, and clients are served as soon as the first state is in force on each core.
    ///
    /// # Errors
    /// When an address, a socket, a file or a thread cannot be had, or the state is not legal. Nothing is left behind.
    pub fn start(config: RouterConfig, state: RouterState) -> Result<RouterHandle, RouterError> {
        state.validate()?;
        let workers = match config.workers {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        if workers > MAX_WORKERS {
            return Err(RouterError::TooManyWorkers { workers });
        }
        let kept = match &config.keep {
            Some(path) => {
                Kept::read(path).map_err(|source| RouterError::Keep { path: path.clone(), source })?
            }
            None => None,
        };
        let certificate = config.tls.clone().map(Certificate::read).transpose()?;
        let config = Arc::new(config);
        let (lease, started) = (Arc::new(Lease::default()), Instant::now());
        let thread = |source| RouterError::Thread { source };
        let listeners = bind_all(config.listen, workers)
            .map_err(|source| RouterError::Listen { address: config.listen, source })?;
        let local_addr = listeners
            .first()
            .map_or(Ok(config.listen), TcpListener::local_addr)
            .map_err(|source| RouterError::Listen { address: config.listen, source })?;
        let metrics = match config.metrics {
            Some(address) => {
                let failed = |source| RouterError::Listen { address, source };
                let listener = TcpListener::bind(address).map_err(failed)?;
                let local = listener.local_addr().map_err(failed)?;
                Some((listener, local))
            }
            None => None,
        };
        let (metrics, metrics_addr) = metrics.unzip();
        let control = ControlSocket::bind(&config.control)
            .map_err(|source| RouterError::Control { path: config.control.clone(), source })?;
        let dropped = Arc::new(AtomicU64::new(0));
        let (log, log_thread) = match &config.access_log {
            Some(path) => access_log::open(path, Arc::clone(&dropped))
                .map(|(log, thread)| (Some(log), Some(thread)))
                .map_err(|source| RouterError::AccessLog { path: path.clone(), source })?,
            None => (None, None),
        };
        let mut links = Vec::new();
        let mut threads = Vec::new();
        for (index, listener) in listeners.into_iter().enumerate() {
            let (link, joined) =
                start_worker(index, workers, listener, &config, log.clone(), (&lease, started))
                    .map_err(thread)?;
            links.push(link);
            threads.push(joined);
        }
        drop(log);
        threads.extend(log_thread);
        let (commands, received) = mpsc::channel(QUEUED_COMMANDS);
        let (alive, gone) = oneshot::channel();
        let setup = AuthoritySetup {
            config,
            listen: local_addr,
            certificate,
            lease,
            started,
            log_lines_dropped: dropped,
        };
        let dispatcher = Dispatcher {
            state,
            kept,
            metrics,
            links,
            threads,
            setup,
            control,
            commands: commands.clone(),
            received,
            gone,
        };
        let (ready, begun) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("router-control".to_owned())
            .spawn(move || dispatcher.run(&ready))
            .map_err(thread)?;
        begun.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())).map_err(thread)?;
        Ok(RouterHandle { local_addr, metrics_addr, commands, _alive: alive })
    }
}

impl RouterHandle {
    /// Where clients connect.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where Prometheus reads, if anywhere.
    #[must_use]
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics_addr
    }

    /// Reads the router back.
    ///
    /// # Errors
    /// When it is shutting down.
    pub async fn snapshot(&self) -> Result<RouterSnapshot, ControlError> {
        self.command(ControlRequest::Get(Nothing {})).await
    }

    /// Sets the whole state. When this returns, every core follows it.
    ///
    /// # Errors
    /// When the generation is stale or in force with other content, or the state is not legal. Nothing was changed.
    pub async fn set(&self, state: RouterState) -> Result<RouterSnapshot, ControlError> {
        self.command(ControlRequest::Set(Box::new(state))).await
    }

    /// Changes one backend and raises the generation by one. When this returns, every core follows it.
    ///
    /// # Errors
    /// As [`Self::set`], and when no backend has this name.
    pub async fn change(&self, change: BackendChange) -> Result<RouterSnapshot, ControlError> {
        self.command(ControlRequest::Backend(change)).await
    }

    /// Accepts no more connections, lets requests in flight finish within the time, writes the log out, removes the
    /// control socket and ends all threads.
    pub async fn shutdown(self, within: Duration) -> ShutdownReport {
        let (stopped, wait) = oneshot::channel();
        // If the control thread is gone already there is nothing left to stop or to cut.
        let sent = self.commands.send(Command::Stop(within, stopped)).await;
        let connections_cut = if sent.is_ok() { wait.await.unwrap_or(0) } else { 0 };
        ShutdownReport { connections_cut }
    }

    async fn command(&self, request: ControlRequest) -> Result<RouterSnapshot, ControlError> {
        match Command::ask(&self.commands, request).await {
            ControlAnswer::Ok(snapshot) => Ok(*snapshot),
            ControlAnswer::Error(error) => Err(error),
            // No request of this handle is answered with counts.
            ControlAnswer::Counts(_) => Err(ControlError::unavailable("an answer to another request")),
        }
    }
}

/// Runs a router on the calling thread's time: starts it, calls `started` with where it listens, waits for `shutdown`,
/// and stops it within [`crate::Limits::shutdown_timeout`]. `shutdown` is polled inside a tokio runtime, so it may wait
/// for signals. Must not be called from within a runtime.
///
/// # Errors
/// When the router cannot be started.
pub fn run_until(
    config: RouterConfig,
    state: RouterState,
    started: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()>,
) -> Result<ShutdownReport, RouterError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| RouterError::Thread { source })?;
    let within = config.limits.shutdown_timeout;
    let handle = Router::start(config, state)?;
    started(handle.local_addr());
    Ok(runtime.block_on(async {
        shutdown.await;
        handle.shutdown(within).await
    }))
}

/// What the control thread runs.
struct Dispatcher {
    state: RouterState,
    kept: Option<Kept>,
    metrics: Option<TcpListener>,
    links: Vec<WorkerLink>,
    threads: Vec<JoinHandle<()>>,
    setup: AuthoritySetup,
    control: ControlSocket,
    commands: mpsc::Sender<Command>,
    received: mpsc::Receiver<Command>,
    gone: oneshot::Receiver<()>,
}

impl Dispatcher {
    fn run(self, ready: &std::sync::mpsc::Sender<io::Result<()>>) {
        let Self { state, kept, metrics, links, threads, setup, mut control, commands, received, gone } =
            self;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build_local(tokio::runtime::LocalOptions::default());
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let begun: io::Result<Authority> = runtime.block_on(async {
            let serving = control.serve(commands.clone())?;
            let metrics = metrics.map(|listener| metrics::serve(listener, commands)).transpose()?;
            let authority = Authority::begin(state, kept, links, setup).await;
            let authority = authority.map_err(io::Error::other)?;
            tokio::task::spawn_local(serving);
            if let Some(metrics) = metrics {
                tokio::task::spawn_local(metrics);
            }
            Ok(authority)
        });
        let authority = match begun {
            Ok(authority) => authority,
            Err(error) => return drop(ready.send(Err(error))),
        };
        drop(ready.send(Ok(())));
        let stopped = runtime.block_on(async {
            tokio::select! {
                stopped = authority.run(received) => stopped,
                // The handle was dropped: the workers end when their commands do.
                _ = gone => None,
            }
        });
        // While the socket still answers nobody else takes its place, so the file that goes is ours.
        drop(control);
        // Checkers and control connections end with the runtime, the workers with the authority, the log with them.
        drop(runtime);
        for thread in threads {
            // A worker that panicked has said so on stderr.
            drop(thread.join());
        }
        if let Some((cut, stopped)) = stopped {
            // Whoever asked may have stopped waiting.
            let _ = stopped.send(cut);
        }
    }
}

fn start_worker(
    index: usize,
    workers: usize,
    listener: TcpListener,
    config: &Arc<RouterConfig>,
    log: Option<LogSender>,
    (lease, began): (&Arc<Lease>, Instant),
) -> io::Result<(WorkerLink, JoinHandle<()>)> {
    let counts = Arc::new(WorkerCounts::default());
    let (commands, received) = mpsc::channel(QUEUED_WORKER_COMMANDS);
    let setup = WorkerSetup {
        index,
        workers,
        listener,
        config: Arc::clone(config),
        log,
        counts: Arc::clone(&counts),
        commands: received,
        lease: Arc::clone(lease),
        started: began,
    };
    let (ready, started) = std::sync::mpsc::channel();
    let joined = std::thread::Builder::new()
        .name(format!("router-{index}"))
        .spawn(move || worker::run(setup, &ready))?;
    started.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
    Ok((WorkerLink { commands, counts }, joined))
}

/// One listener per worker on one address.
fn bind_all(address: SocketAddr, workers: usize) -> io::Result<Vec<TcpListener>> {
    // SO_REUSEPORT would also let a second router of the same user bind here and take half of the clients unnoticed.
    drop(bind(address, false)?);
    let mut listeners = Vec::with_capacity(workers);
    let mut address = address;
    for _ in 0..workers {
        let listener = bind(address, true)?;
        // With port 0 the first one chooses for all.
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

fn bind(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    if shared {
        socket.listen(LISTEN_BACKLOG)?;
        socket.set_nonblocking(true)?;
    }
    Ok(socket.into())
}
