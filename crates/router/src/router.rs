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
use crate::authority::{Authority, AuthoritySetup, Command, Ended, QUEUED_COMMANDS, WorkerLink};
use crate::canary::Lease;
use crate::config::{LISTEN_BACKLOG, MAX_WORKERS, RouterConfig};
use crate::control::{BoundControl, ControlSocket};
use crate::handover::{HandoverError, Inherited, Predecessor};
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
    /// The router that was to be replaced.
    #[error("cannot take over from the router at {control}, which goes on: {source}")]
    TakeOver {
        /// Its control socket.
        control: PathBuf,
        /// Why not.
        source: HandoverError,
    },
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
    handed_over: oneshot::Receiver<u64>,
    /// Its end tells the control thread that the handle is gone.
    _alive: oneshot::Sender<()>,
}

/// How a router ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Client connections that were cut because they did not end in time.
    pub connections_cut: u64,
    /// Another router goes on with its sockets.
    pub is_handed_over: bool,
}

impl Router {
    /// Starts a router with threads and runtimes of its own; it may be called from anywhere. When it returns the
    /// address is bound, and clients are served as soon as the first state is in force on each core.
    ///
    /// # Errors
    /// When an address, a socket, a file or a thread cannot be had, the state is not legal, or a router that was to be replaced
    /// goes on. Nothing is left behind.
    pub fn start(config: RouterConfig, state: RouterState) -> Result<RouterHandle, RouterError> {
        state.validate()?;
        let take_over = |source| RouterError::TakeOver { control: config.control.clone(), source };
        let inherited = match config.take_over {
            true => Inherited::ask(&config.control, config.listen).map_err(take_over)?,
            false => None,
        };
        let workers = match config.workers {
            _ if inherited.is_some() => inherited.as_ref().map_or(0, |inherited| inherited.listeners.len()),
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        if workers > MAX_WORKERS {
            return Err(RouterError::TooManyWorkers { workers });
        }
        let kept = match (&config.keep, &inherited) {
            (_, Some(inherited)) => Some(inherited.predecessor.kept()),
            (Some(path), None) => {
                Kept::read(path).map_err(|source| RouterError::Keep { path: path.clone(), source })?
            }
            (None, None) => None,
        };
        let state = inherited.as_ref().map_or(state, |inherited| inherited.predecessor.state().clone());
        let certificate = config.tls.clone().map(Certificate::read).transpose()?;
        let config = Arc::new(config);
        let (lease, started) = (Arc::new(Lease::default()), Instant::now());
        let thread = |source| RouterError::Thread { source };
        let control = match inherited {
            Some(_) => ControlSocket::stand_by(&config.control),
            None => ControlSocket::bind(&config.control),
        };
        let (control, serving) =
            control.map_err(|source| RouterError::Control { path: config.control.clone(), source })?;
        let (predecessor, listeners, metrics) = match inherited {
            Some(inherited) => (Some(inherited.predecessor), inherited.listeners, inherited.metrics),
            None => {
                let failed = |source| RouterError::Listen { address: config.listen, source };
                (None, bind_all(config.listen, workers).map_err(failed)?, None)
            }
        };
        let failed = |source| RouterError::Listen { address: config.listen, source };
        let local_addr =
            listeners.first().map_or(Ok(config.listen), TcpListener::local_addr).map_err(failed)?;
        let copies =
            listeners.iter().map(TcpListener::try_clone).collect::<Result<_, _>>().map_err(failed)?;
        let metrics = config.metrics.map(|address| listen_for_metrics(address, metrics)).transpose()?;
        let (metrics, metrics_addr) = metrics.unzip();
        let metrics_copy = metrics.as_ref().map(TcpListener::try_clone).transpose().map_err(failed)?;
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
        let (tell, handed_over) = oneshot::channel();
        let setup = AuthoritySetup {
            config,
            listen: local_addr,
            certificate,
            lease,
            started,
            log_lines_dropped: dropped,
            listeners: copies,
            metrics: metrics_copy,
            is_standing_by: predecessor.is_some(),
            control: Arc::new(control),
        };
        let dispatcher = Dispatcher {
            state,
            kept,
            metrics,
            links,
            threads,
            setup,
            serving,
            predecessor,
            commands: commands.clone(),
            received,
            gone,
            tell,
        };
        let (ready, begun) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("router-control".to_owned())
            .spawn(move || dispatcher.run(&ready))
            .map_err(thread)?;
        let ended = || thread(io::ErrorKind::BrokenPipe.into());
        begun.recv().unwrap_or_else(|_| Err(ended()))?;
        Ok(RouterHandle { local_addr, metrics_addr, commands, handed_over, _alive: alive })
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
    pub async fn shutdown(mut self, within: Duration) -> ShutdownReport {
        let (stopped, wait) = oneshot::channel();
        let sent = self.commands.send(Command::Stop(within, stopped)).await;
        if sent.is_err() {
            // It was replaced and lets its requests end, or has ended already: then there is nothing left to stop or to cut.
            let connections_cut = (&mut self.handed_over).await;
            let is_handed_over = connections_cut.is_ok();
            return ShutdownReport { connections_cut: connections_cut.unwrap_or(0), is_handed_over };
        }
        let connections_cut = wait.await.unwrap_or(0);
        ShutdownReport { connections_cut, is_handed_over: false }
    }

    /// Waits until another router has taken over and everything that this one had in flight has ended.
    pub async fn handed_over(&mut self) -> ShutdownReport {
        match (&mut self.handed_over).await {
            Ok(connections_cut) => ShutdownReport { connections_cut, is_handed_over: true },
            // It ended otherwise.
            Err(_) => std::future::pending().await,
        }
    }

    async fn command(&self, request: ControlRequest) -> Result<RouterSnapshot, ControlError> {
        match Command::ask(&self.commands, request).await {
            ControlAnswer::Ok(snapshot) => Ok(*snapshot),
            ControlAnswer::Error(error) => Err(error),
            // No request of this handle is answered with anything else.
            ControlAnswer::Counts(_) | ControlAnswer::Handover(_) => {
                Err(ControlError::unavailable("an answer to another request"))
            }
        }
    }
}

/// Runs a router on the calling thread's time: starts it, calls `started` with where it listens, waits for `shutdown`,
/// and stops it within [`crate::Limits::shutdown_timeout`]. `shutdown` is polled inside a tokio runtime, so it may wait
/// for signals. It also ends when another router has taken over. Must not be called from within a runtime.
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
    let mut handle = Router::start(config, state)?;
    started(handle.local_addr());
    Ok(runtime.block_on(async {
        let handed_over = tokio::select! {
            () = shutdown => None,
            report = handle.handed_over() => Some(report),
        };
        match handed_over {
            Some(report) => report,
            None => handle.shutdown(within).await,
        }
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
    serving: BoundControl,
    predecessor: Option<Predecessor>,
    commands: mpsc::Sender<Command>,
    received: mpsc::Receiver<Command>,
    gone: oneshot::Receiver<()>,
    tell: oneshot::Sender<u64>,
}

impl Dispatcher {
    fn run(self, ready: &std::sync::mpsc::Sender<Result<(), RouterError>>) {
        let Self { state, kept, metrics, links, threads, setup, serving, predecessor, .. } = self;
        let (commands, received, gone, tell) = (self.commands, self.received, self.gone, self.tell);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build_local(tokio::runtime::LocalOptions::default());
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(source) => return drop(ready.send(Err(RouterError::Thread { source }))),
        };
        let control = Arc::clone(&setup.control);
        let path = setup.config.control.clone();
        let begun: Result<Authority, RouterError> = runtime.block_on(async {
            let thread = |source| RouterError::Thread { source };
            let refused = |error: ControlError| thread(io::Error::other(error));
            let serving = serving.serve(commands.clone()).map_err(thread)?;
            let metrics = metrics.map(|listener| metrics::serve(listener, commands)).transpose();
            let metrics = metrics.map_err(thread)?;
            let mut authority = Authority::begin(state, kept, links, setup).await.map_err(refused)?;
            if let Some(predecessor) = predecessor {
                authority.inherit_lease(predecessor.lease());
                // All that could fail is done.
                let failed = |source| RouterError::TakeOver { control: path.clone(), source };
                predecessor.take_over().map_err(failed)?;
                control.publish().map_err(|source| RouterError::Control { path: path.clone(), source })?;
            }
            tokio::task::spawn_local(serving);
            let metrics = metrics.map(|serving| tokio::task::spawn_local(serving).abort_handle());
            authority.open(metrics).await.map_err(refused)?;
            Ok(authority)
        });
        let authority = match begun {
            Ok(authority) => authority,
            Err(error) => return drop(ready.send(Err(error))),
        };
        drop(ready.send(Ok(())));
        let ended = runtime.block_on(async {
            tokio::select! {
                ended = authority.run(received) => ended,
                // The handle was dropped: the workers end when their commands do.
                _ = gone => Ended::Orphaned,
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
        // Whoever asked, or holds the handle, may have stopped waiting.
        let _ = match ended {
            Ended::Stopped(cut, stopped) => stopped.send(cut),
            Ended::HandedOver(cut) => tell.send(cut),
            Ended::Orphaned => Ok(()),
        };
    }
}

/// The socket that was handed over, when it is the one that is wanted; otherwise a new one.
fn listen_for_metrics(
    address: SocketAddr,
    inherited: Option<TcpListener>,
) -> Result<(TcpListener, SocketAddr), RouterError> {
    let failed = |source| RouterError::Listen { address, source };
    let same = inherited.filter(|listener| listener.local_addr().is_ok_and(|present| present == address));
    let listener = same.map_or_else(|| TcpListener::bind(address), Ok).map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
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
