//! One core's share of the router: a thread with a single-threaded runtime, a listener of its own, and everything a
//! request needs without a lock.

use std::cell::{Cell, RefCell};
use std::net::TcpListener as BoundListener;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use hyper::http::request::Parts;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::access_log::{LogSender, WorkerLog};
use crate::affinity::Wish;
use crate::balance::{Entry, Reason, Table, TableSpec};
use crate::canary::Lease;
use crate::config::{Limits, RouterConfig};
use crate::connection::serve;
use crate::counts::CountRow;
use crate::random::Random;
use crate::standing::MaintenancePage;
use crate::watch::{Clock, TICK, Watch, Watches};

/// How long accepting pauses when the process is out of descriptors: nothing signals that one is free again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What a worker is told.
#[derive(Debug)]
pub(crate) enum WorkerCommand {
    /// Use this table from now on; then answer.
    Apply { table: Arc<TableSpec>, applied: oneshot::Sender<()> },
    /// Tell what was counted.
    Count { counted: oneshot::Sender<Vec<CountRow>> },
    /// Let clients in.
    Accept,
    /// Accept no more, finish what is in flight within the time; then end, and say how many connections were cut.
    /// `gently`: idle connections are ended behind one more answer, and only after half of the time without.
    Stop { within: Duration, gently: bool, stopped: oneshot::Sender<u64> },
}

/// Counters of one worker that belong to no backend.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct WorkerCounts {
    pub(crate) connections: AtomicU64,
    pub(crate) unrouted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
}

/// What a worker is made of.
#[derive(Debug)]
pub(crate) struct WorkerSetup {
    pub(crate) index: usize,
    pub(crate) workers: usize,
    pub(crate) listener: BoundListener,
    pub(crate) config: Arc<RouterConfig>,
    pub(crate) log: Option<LogSender>,
    pub(crate) counts: Arc<WorkerCounts>,
    pub(crate) commands: mpsc::Receiver<WorkerCommand>,
    pub(crate) lease: Arc<Lease>,
    /// When the router began.
    pub(crate) started: Instant,
}

/// What the requests of one core share.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) index: usize,
    pub(crate) limits: Rc<Limits>,
    pub(crate) fall: u32,
    pub(crate) trust_forwarded: bool,
    pub(crate) is_counting: bool,
    pub(crate) clock: Rc<Clock>,
    pub(crate) random: Random,
    pub(crate) log: WorkerLog,
    pub(crate) counts: Arc<WorkerCounts>,
    /// See [`crate::exchange`]: all answers are read into this and split off.
    pub(crate) read_buffer: RefCell<BytesMut>,
    /// Request heads are written here one at a time.
    pub(crate) head_buffer: RefCell<Vec<u8>>,
    lease: Arc<Lease>,
    table: RefCell<Table>,
    spec: RefCell<Option<Arc<TableSpec>>>,
    /// Another state was applied.
    applied: Notify,
    /// Requests that wait in a pause.
    paused: Cell<usize>,
    workers: usize,
    watches: Watches,
    open: Cell<usize>,
    max_open: usize,
    /// A connection was closed.
    closed_one: Notify,
    leaving: Cell<Leaving>,
}

/// Whether a worker ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    No,
    /// Each connection behind its next answer.
    Gently,
    /// Each connection as soon as nothing is in flight on it.
    Now,
}

impl Worker {
    /// What decides about a request, as of now: what it wishes, and the route by which it is counted.
    pub(crate) fn place(&self, parts: &Parts) -> (Wish, usize) {
        let spec = self.spec.borrow();
        let Some(spec) = &*spec else { return (Wish::default(), 0) };
        let mut wish = spec.affinity.wish(&parts.headers);
        // An alert holds testers as well: all requests go to stable.
        wish.is_tester &= spec.is_trial && !self.lease.is_held();
        (wish, spec.routes.index_of(parts.uri.path()))
    }

    /// A backend for the next attempt, and what decided it.
    pub(crate) fn choose(&self, wish: Wish, tried: &[Rc<Entry>]) -> Option<(Rc<Entry>, Reason)> {
        let share = self.lease.share_per_mille(self.clock.now());
        let table = self.table.borrow();
        let (entry, reason) = table.choose(&self.random, self.clock.now(), share, wish, tried)?;
        Some((Rc::clone(entry), reason))
    }

    /// The page that answers every request now, if one does.
    pub(crate) fn maintenance(&self) -> Option<MaintenancePage> {
        self.spec.borrow().as_ref().and_then(|spec| spec.maintenance.clone())
    }

    /// How a backend's answer to a request was.
    pub(crate) fn judged(&self, entry: &Entry, is_good: bool) {
        let passive = self.spec.borrow().as_ref().and_then(|spec| spec.passive);
        entry.backend.judged(is_good, passive);
    }

    /// Waits while requests are to wait. Whether this one may go on; if not, it waited too long or was one too many.
    pub(crate) async fn pass_pause(&self) -> bool {
        let is_paused = || self.spec.borrow().as_ref().is_some_and(|spec| spec.pause.is_some());
        let Some(pause) = self.spec.borrow().as_ref().and_then(|spec| spec.pause.clone()) else {
            return true;
        };
        let waiting = Waiting::new(&self.paused);
        if self.paused.get() > pause.max_requests.div_ceil(self.workers) {
            return false;
        }
        let over = async {
            loop {
                // Asked for before the look, or a change between both would be missed.
                let applied = self.applied.notified();
                if !is_paused() || self.is_leaving() {
                    return;
                }
                applied.await;
            }
        };
        let ended = timeout(Duration::from_millis(pause.max_wait_ms), over).await.is_ok();
        drop(waiting);
        ended
    }

    /// What connections that begin now are shown, if they are to be encrypted.
    pub(crate) fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.spec.borrow().as_ref().and_then(|spec| spec.tls.clone())
    }

    /// Whether connections without a request in flight are to be closed.
    pub(crate) fn is_stopping(&self) -> bool {
        self.leaving.get() == Leaving::Now
    }

    /// Whether connections are to be closed behind an answer.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get() != Leaving::No
    }

    fn leave(&self, leaving: Leaving) {
        self.leaving.set(leaving);
        self.applied.notify_waiters();
        self.watches.wake_all();
    }

    /// A deadline that is looked at with every tick.
    pub(crate) fn watch(&self) -> Rc<Watch> {
        let watch = Rc::new(Watch::new(Rc::clone(&self.clock), Rc::clone(&self.limits)));
        self.watches.add(&watch);
        watch
    }

    fn apply(&self, spec: Arc<TableSpec>) {
        let next = self.table.borrow().next(&spec, self.limits.max_idle_per_backend);
        self.table.replace(next);
        self.spec.replace(Some(spec));
        self.applied.notify_waiters();
    }

    fn counts(&self) -> Vec<CountRow> {
        let now = Instant::now();
        self.table.borrow().tallies().flat_map(|tally| tally.rows(now)).collect()
    }
}

/// A request that waits in a pause, for as long as this lives.
struct Waiting<'a>(&'a Cell<usize>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Runs a worker until it is stopped, or its commands end. `ready` hears whether it could begin.
pub(crate) fn run(setup: WorkerSetup, ready: &std::sync::mpsc::Sender<std::io::Result<()>>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build_local(tokio::runtime::LocalOptions::default());
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return drop(ready.send(Err(error))),
    };
    runtime.block_on(async {
        let WorkerSetup { index, workers, listener, config, log, counts, mut commands, lease, started } =
            setup;
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let worker = Rc::new(Worker {
            index,
            limits: Rc::new(config.limits.clone()),
            fall: config.health.fall,
            trust_forwarded: config.trust_forwarded,
            is_counting: config.counts,
            clock: Rc::new(Clock::new(started)),
            random: Random::seeded(),
            log: WorkerLog::new(log, config.access_log_form, config.access_log_one_in),
            counts,
            read_buffer: RefCell::default(),
            head_buffer: RefCell::default(),
            lease,
            table: RefCell::default(),
            spec: RefCell::default(),
            applied: Notify::new(),
            paused: Cell::new(0),
            workers,
            watches: Watches::default(),
            open: Cell::new(0),
            max_open: config.limits.max_connections.div_ceil(workers).max(1),
            closed_one: Notify::new(),
            leaving: Cell::new(Leaving::No),
        });
        let ticking = tokio::task::spawn_local(tick(Rc::clone(&worker)));
        let mut listener = Some(listener);
        let mut accepting = None;
        drop(ready.send(Ok(())));
        let mut stop = None;
        while let Some(command) = commands.recv().await {
            match command {
                WorkerCommand::Apply { table, applied } => {
                    worker.apply(table);
                    let _ = applied.send(());
                }
                WorkerCommand::Accept => {
                    if let Some(listener) = listener.take() {
                        accepting = Some(tokio::task::spawn_local(accept(Rc::clone(&worker), listener)));
                    }
                }
                WorkerCommand::Count { counted } => {
                    let _ = counted.send(worker.counts());
                }
                WorkerCommand::Stop { within, gently, stopped } => {
                    stop = Some((within, gently, stopped));
                    break;
                }
            }
        }
        if let Some(accepting) = accepting {
            accepting.abort();
        }
        if let Some((within, gently, stopped)) = stop {
            let all_closed = async || {
                while worker.open.get() > 0 {
                    worker.closed_one.notified().await;
                }
            };
            let mut rest = within;
            if gently {
                rest = within / 2;
                worker.leave(Leaving::Gently);
                // Those that are still open then are closed below.
                drop(timeout(within - rest, all_closed()).await);
            }
            worker.leave(Leaving::Now);
            // What is left after the time is cut and reported.
            let left = timeout(rest, all_closed()).await.map_or(worker.open.get() as u64, |()| 0);
            let _ = stopped.send(left);
        }
        ticking.abort();
    });
}

async fn tick(worker: Rc<Worker>) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        worker.clock.tick();
        worker.watches.wake_overdue();
        worker.table.borrow().close_idle(worker.clock.now().saturating_sub(worker.limits.idle_timeout));
        worker.log.flush();
    }
}

async fn accept(worker: Rc<Worker>, listener: TcpListener) {
    loop {
        while worker.open.get() >= worker.max_open {
            worker.closed_one.notified().await;
        }
        match listener.accept().await {
            Ok((stream, peer)) => {
                let open = OpenConnection::new(&worker);
                let peer = peer.ip().to_canonical().to_string();
                tokio::task::spawn_local(async move {
                    serve(&open.worker, stream, peer).await;
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Counts a connection for as long as it lives.
struct OpenConnection {
    worker: Rc<Worker>,
}

impl OpenConnection {
    fn new(worker: &Rc<Worker>) -> Self {
        worker.open.set(worker.open.get() + 1);
        worker.counts.connections.fetch_add(1, Relaxed);
        Self { worker: Rc::clone(worker) }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.worker.open.set(self.worker.open.get() - 1);
        self.worker.counts.connections.fetch_sub(1, Relaxed);
        self.worker.closed_one.notify_one();
    }
}
