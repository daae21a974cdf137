//! The one place that holds the desired state and changes it.
//!
//! Commands come one after another from the handle and from the control socket; each is carried out on every worker
//! before the next is looked at, and before it is answered. So whoever was told that a backend drains knows that no
//! core gives it another request.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::affinity::Affinity;
use crate::backend::Backend;
use crate::balance::{EntrySpec, TableSpec};
use crate::canary::{
    Alert, AlertRaised, CanaryChange, CanaryStatus, Enabling, Lease, Renewal, millis, validate_lease,
};
use crate::config::RouterConfig;
use crate::control::ControlSocket;
use crate::counts::{CountRow, CountsBy, CountsRequest, RouterCounts, latency_bounds_us};
use crate::handover::{Handover, MAX_SOCKETS};
use crate::health::keep_checking;
use crate::keep::Kept;
use crate::protocol::{ControlAnswer, ControlError, ControlRequest, EXCHANGE_TIMEOUT};
use crate::random::Random;
use crate::routes::Routes;
use crate::state::{
    BackendSpec, BackendState, Health, RouterSnapshot, RouterState, StateError, raised, validate_words,
};
use crate::tls::Certificate;
use crate::worker::{WorkerCommand, WorkerCounts};

/// Commands that wait; senders wait beyond that.
pub(crate) const QUEUED_COMMANDS: usize = 16;
/// How often is looked whether the files of the certificate are others.
const CERTIFICATE_LOOKS: Duration = Duration::from_secs(1);

/// What can be asked of a running router.
#[derive(Debug)]
pub(crate) enum Command {
    Ask(Box<ControlRequest>, oneshot::Sender<ControlAnswer>),
    /// Tell a successor everything.
    HandOver(oneshot::Sender<Result<(Handover, Vec<OwnedFd>), ControlError>>),
    /// Leave everything to it. `told` hears when the answer was written to it, or ends when that cannot be.
    TakeOver {
        token: u64,
        reply: oneshot::Sender<ControlAnswer>,
        told: oneshot::Receiver<()>,
    },
    /// Stop within the time; the answer is the number of connections that were cut.
    Stop(Duration, oneshot::Sender<u64>),
}

impl Command {
    /// Asks and waits for the answer.
    pub(crate) async fn ask(commands: &mpsc::Sender<Self>, request: ControlRequest) -> ControlAnswer {
        let (reply, replied) = oneshot::channel();
        let sent = commands.send(Self::Ask(Box::new(request), reply)).await;
        let answer = if sent.is_ok() { replied.await.ok() } else { None };
        answer
            .unwrap_or_else(|| ControlAnswer::Error(ControlError::unavailable("the router is shutting down")))
    }

    /// Asks for all that a successor needs.
    pub(crate) async fn hand_over(
        commands: &mpsc::Sender<Self>,
    ) -> Result<(Handover, Vec<OwnedFd>), ControlError> {
        let (reply, replied) = oneshot::channel();
        let sent = commands.send(Self::HandOver(reply)).await;
        let answer = if sent.is_ok() { replied.await.ok() } else { None };
        answer.unwrap_or_else(|| Err(ControlError::unavailable("the router is shutting down")))
    }
}

/// How an authority ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It was told to: so many connections were cut, and who waits to hear of it.
    Stopped(u64, oneshot::Sender<u64>),
    /// Another router has taken over: so many connections were cut.
    HandedOver(u64),
    /// Nobody is left to give commands.
    Orphaned,
}

/// A worker as the authority sees it.
#[derive(Debug)]
pub(crate) struct WorkerLink {
    pub(crate) commands: mpsc::Sender<WorkerCommand>,
    pub(crate) counts: Arc<WorkerCounts>,
}

/// The desired state, and what hangs on it.
#[derive(Debug)]
pub(crate) struct Authority {
    state: RouterState,
    alert: Option<Alert>,
    /// In the order of `state.backends`.
    members: Vec<Member>,
    routes: Arc<Routes>,
    workers: Vec<WorkerLink>,
    setup: AuthoritySetup,
    certificate: Option<Certificate>,
    /// Answers Prometheus.
    metrics_serving: Option<AbortHandle>,
    /// What a successor was told to say, until something changes.
    successor: Option<u64>,
    /// Tells readers of counts that these are not those of the router before.
    instance: u64,
}

/// What an authority is made of.
#[derive(Debug)]
pub(crate) struct AuthoritySetup {
    pub(crate) config: Arc<RouterConfig>,
    pub(crate) listen: SocketAddr,
    /// Of the settings.
    pub(crate) certificate: Option<Certificate>,
    pub(crate) lease: Arc<Lease>,
    pub(crate) started: Instant,
    pub(crate) log_lines_dropped: Arc<AtomicU64>,
    /// Copies of the listening sockets of the workers, for a successor.
    pub(crate) listeners: Vec<TcpListener>,
    /// The same of that of the metrics.
    pub(crate) metrics: Option<TcpListener>,
    /// Another router is still in charge: what is kept is for it to write.
    pub(crate) is_standing_by: bool,
    pub(crate) control: Arc<ControlSocket>,
}

/// A backend with its checker. The checker ends with it.
#[derive(Debug)]
struct Member {
    backend: Arc<Backend>,
    checker: Option<Checker>,
    /// The generation with which its present row of counts began.
    counted_since: u64,
}

#[derive(Debug)]
struct Checker(JoinHandle<()>);

impl Drop for Checker {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Authority {
    /// Begins with an empty state, which `first` replaces on all workers. What was `kept` from before a restart is used
    /// instead unless it is older; its canary has no share until it is set again.
    ///
    /// # Errors
    /// When a worker has ended.
    pub(crate) async fn begin(
        first: RouterState,
        kept: Option<Kept>,
        workers: Vec<WorkerLink>,
        mut setup: AuthoritySetup,
    ) -> Result<Self, ControlError> {
        let mut authority = Self {
            state: RouterState::new(first.generation, Vec::new()),
            alert: None,
            members: Vec::new(),
            routes: Arc::default(),
            workers,
            certificate: setup.certificate.take(),
            setup,
            metrics_serving: None,
            successor: None,
            instance: Random::seeded().next(),
        };
        let (state, is_kept) = match kept {
            Some(kept) => {
                authority.alert = kept.alert;
                authority.setup.lease.set_held(authority.alert.is_some());
                if kept.state.generation >= first.generation { (kept.state, true) } else { (first, false) }
            }
            None => (first, false),
        };
        state.permitted_by(authority.alert.as_ref())?;
        authority.apply(state).await?;
        if !is_kept {
            authority.lend();
        }
        Ok(authority)
    }

    /// Carries out commands until one says stop, or nobody is left to give one. The answer to the stop is given by the
    /// caller, when everything is gone.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Ended {
        let mut looks = interval(CERTIFICATE_LOOKS);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let command = tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => command,
                    None => return Ended::Orphaned,
                },
                _ = looks.tick(), if self.certificate.is_some() => {
                    self.look_at_certificate().await;
                    continue;
                }
            };
            match command {
                Command::HandOver(reply) => {
                    let _ = reply.send(self.hand_over());
                }
                Command::TakeOver { token, reply, told } => {
                    if self.successor.take() != Some(token) {
                        let message = "this router goes on: its state was changed since it was asked to hand over; ask again";
                        let _ = reply.send(ControlAnswer::Error(ControlError::unavailable(message)));
                        continue;
                    }
                    let _ = reply.send(ControlAnswer::Ok(Box::new(self.snapshot())));
                    if !matches!(timeout(EXCHANGE_TIMEOUT, told).await, Ok(Ok(()))) {
                        // It is gone, and has not heard that it is in charge.
                        continue;
                    }
                    self.setup.control.give_away();
                    // Nobody else is listened to; they find the other router when they ask again.
                    drop(commands);
                    if let Some(serving) = self.metrics_serving.take() {
                        serving.abort();
                    }
                    // Until this is done two routers accept.
                    let within = self.setup.config.limits.shutdown_timeout;
                    return Ended::HandedOver(self.stop(within, true).await);
                }
                Command::Ask(request, reply) => {
                    let answer = self.answer(*request).await.unwrap_or_else(ControlAnswer::Error);
                    // Whoever asked may have gone away; the command is carried out all the same.
                    let _ = reply.send(answer);
                }
                Command::Stop(within, stopped) => {
                    return Ended::Stopped(self.stop(within, false).await, stopped);
                }
            }
        }
    }

    fn hand_over(&mut self) -> Result<(Handover, Vec<OwnedFd>), ControlError> {
        let sockets = self.setup.listeners.iter().chain(&self.setup.metrics);
        let sockets: Vec<OwnedFd> =
            sockets.map(|socket| socket.try_clone().map(OwnedFd::from)).collect::<Result<_, _>>().map_err(
                |error| ControlError::unavailable(&format!("a socket cannot be handed over: {error}")),
            )?;
        if sockets.len() > MAX_SOCKETS {
            let message =
                format!("{} sockets are more than the {MAX_SOCKETS} that can be handed over", sockets.len());
            return Err(ControlError::unavailable(&message));
        }
        let token = Random::seeded().next();
        self.successor = Some(token);
        let handover = Handover {
            token,
            state: self.state.clone(),
            alert: self.alert.clone(),
            share_in_force_per_mille: self.setup.lease.share_per_mille(self.now()),
            lease_left_ms: millis(self.setup.lease.left(self.now())),
            has_metrics: self.setup.metrics.is_some(),
        };
        Ok((handover, sockets))
    }

    /// Lends the canary what its predecessor still lent it.
    pub(crate) fn inherit_lease(&self, (share_per_mille, left_ms): (u32, u64)) {
        if self.alert.is_none() && self.state.canary.is_some() {
            self.setup.lease.grant(share_per_mille, self.now() + Duration::from_millis(left_ms));
        }
    }

    /// Lets clients in: from now on this router is in charge.
    pub(crate) async fn open(&mut self, metrics_serving: Option<AbortHandle>) -> Result<(), ControlError> {
        self.metrics_serving = metrics_serving;
        for worker in &self.workers {
            // A worker that has ended is told to whoever gives the next command.
            drop(worker.commands.send(WorkerCommand::Accept).await);
        }
        if std::mem::take(&mut self.setup.is_standing_by) { self.keep() } else { Ok(()) }
    }

    /// Shows a certificate that was renewed.
    async fn look_at_certificate(&mut self) {
        if self.certificate.as_mut().is_some_and(Certificate::look) {
            // A worker that has ended is told to whoever gives the next command.
            drop(self.bring_to_workers().await);
        }
    }

    /// Reads the certificate that `next` is to be served with, when it is another one than now.
    fn other_certificate(&self, next: &RouterState) -> Result<Option<Certificate>, StateError> {
        let Some(present) = &self.certificate else {
            return match &next.tls {
                None => Ok(None),
                Some(_) => Err(StateError::Wrong {
                    problem: "this router was started without a certificate and does not speak TLS; start it with one \
                              (--tls-certificate and --tls-key)"
                        .to_owned(),
                }),
            };
        };
        let files = next.tls.as_ref().or(self.setup.config.tls.as_ref()).unwrap_or(present.files());
        if files == present.files() {
            return Ok(None);
        }
        let read = Certificate::read(files.clone());
        read.map(Some).map_err(|error| StateError::Wrong { problem: error.to_string() })
    }

    async fn answer(&mut self, request: ControlRequest) -> Result<ControlAnswer, ControlError> {
        if !matches!(request, ControlRequest::Get(_) | ControlRequest::Counts(_) | ControlRequest::Renew(_)) {
            // A successor that was told something else must ask again.
            self.successor = None;
        }
        match request {
            ControlRequest::Get(_) => {}
            // The control socket makes commands of their own of these.
            ControlRequest::Handover(_) | ControlRequest::Takeover(_) => {
                return Err(ControlError::malformed("a successor speaks over the control socket".to_owned()));
            }
            ControlRequest::Set(next) => self.set(*next).await?,
            ControlRequest::Backend(change) => {
                let next = self.state.changed(change)?;
                next.permitted_by(self.alert.as_ref())?;
                self.apply(next).await?;
            }
            ControlRequest::Canary(change) => self.set_canary(change).await?,
            ControlRequest::Renew(renewal) => self.renew(&renewal)?,
            ControlRequest::Conclude(conclusion) => {
                let next = self.state.concluded(&conclusion, self.alert.as_ref())?;
                self.apply(next).await?;
                self.setup.lease.revoke();
            }
            ControlRequest::Alert(alert) => self.hold(alert).await?,
            ControlRequest::Enable(enabling) => self.enable(&enabling)?,
            ControlRequest::Counts(request) => return self.counts(&request).await.map(ControlAnswer::Counts),
        }
        Ok(ControlAnswer::Ok(Box::new(self.snapshot())))
    }

    async fn set(&mut self, next: RouterState) -> Result<(), ControlError> {
        if !self.state.admits(&next)? {
            return Ok(());
        }
        next.permitted_by(self.alert.as_ref())?;
        let is_other = next.canary != self.state.canary;
        if is_other {
            // The share of one release is not lent to another, not for a moment.
            self.setup.lease.revoke();
        }
        self.apply(next).await?;
        if is_other {
            self.lend();
        }
        Ok(())
    }

    async fn set_canary(&mut self, change: CanaryChange) -> Result<(), ControlError> {
        let next = self.state.with_canary(change, self.alert.as_ref())?;
        if self.state.on_trial(next.canary.as_ref().map_or("", |canary| &canary.release)).is_err() {
            self.setup.lease.revoke();
        }
        self.apply(next).await?;
        self.lend();
        Ok(())
    }

    fn renew(&self, renewal: &Renewal) -> Result<(), ControlError> {
        let canary = self.state.on_trial(&renewal.release)?;
        validate_lease(renewal.lease_ms).map_err(|problem| StateError::Wrong { problem })?;
        if canary.share_per_mille > 0 && self.setup.lease.left(self.now()).is_zero() {
            let problem = format!(
                "the lease of {:?} has ended and its share is 0; judge anew whether it shall have one, and set it",
                renewal.release
            );
            return Err(StateError::NotOnTrial { problem }.into());
        }
        let ends = self.now() + Duration::from_millis(renewal.lease_ms);
        self.setup.lease.grant(canary.share_per_mille, ends);
        Ok(())
    }

    async fn hold(&mut self, alert: AlertRaised) -> Result<(), ControlError> {
        let alert = raised(alert, &self.state, jiff::Timestamp::now())?;
        // Both are read by every core with its next request.
        self.setup.lease.set_held(true);
        self.setup.lease.revoke();
        // The first alert is the one that matters.
        self.alert.get_or_insert(alert);
        self.apply(self.state.alerted()).await
    }

    fn enable(&mut self, enabling: &Enabling) -> Result<(), ControlError> {
        validate_words(&enabling.by)?;
        self.alert = None;
        self.setup.lease.set_held(false);
        self.keep()
    }

    /// Begins the lease of the present canary.
    fn lend(&self) {
        match &self.state.canary {
            Some(canary) => {
                let ends = self.now() + Duration::from_millis(canary.lease_ms);
                self.setup.lease.grant(canary.share_per_mille, ends);
            }
            None => self.setup.lease.revoke(),
        }
    }

    fn now(&self) -> Duration {
        self.setup.started.elapsed()
    }

    /// Writes the state where it outlives a restart.
    fn keep(&self) -> Result<(), ControlError> {
        let Some(path) = self.setup.config.keep.as_ref().filter(|_| !self.setup.is_standing_by) else {
            return Ok(());
        };
        Kept::new(&self.state, self.alert.as_ref()).write(path).map_err(|error| {
            ControlError::unavailable(&format!(
                "the change is in force, but was not kept for a restart: {} cannot be written: {error}",
                path.display()
            ))
        })
    }

    /// Brings every worker to `next`, which is legal.
    async fn apply(&mut self, next: RouterState) -> Result<(), ControlError> {
        let other_certificate = self.other_certificate(&next)?;
        let same_routes = self.state.routes == next.routes;
        if !same_routes {
            let routes = Routes::new(&next.routes).map_err(|problem| StateError::Wrong { problem })?;
            self.routes = Arc::new(routes);
        }
        let mut present: Vec<(BackendSpec, Member)> =
            self.state.backends.drain(..).zip(self.members.drain(..)).collect();
        for spec in &next.backends {
            let known = present
                .iter()
                .position(|(old, _)| old.name == spec.name && old.address == spec.address)
                .map(|index| present.swap_remove(index));
            let counted_since = match &known {
                Some((old, member)) if same_routes && old.release == spec.release => member.counted_since,
                _ => next.generation,
            };
            let member = Member { counted_since, ..self.member(spec, known) };
            self.members.push(member);
        }
        self.state = next;
        if other_certificate.is_some() {
            self.certificate = other_certificate;
        }
        self.bring_to_workers().await?;
        self.keep()
    }

    /// Brings every worker to the present state.
    async fn bring_to_workers(&self) -> Result<(), ControlError> {
        let entries = self.state.backends.iter().zip(&self.members).map(|(spec, member)| EntrySpec {
            backend: Arc::clone(&member.backend),
            state: spec.state,
            weight: spec.weight,
            release: spec.release.as_deref().map(Arc::from),
            is_canary: self.is_canary(spec.release.as_deref()),
            counted_since: member.counted_since,
        });
        let table = Arc::new(TableSpec {
            entries: entries.collect(),
            is_trial: self.state.canary.is_some(),
            affinity: Affinity::new(self.state.sticky.as_ref(), self.state.tester.as_ref()),
            routes: Arc::clone(&self.routes),
            slow_start: Duration::from_millis(self.state.slow_start_ms),
            passive: self.state.passive,
            maintenance: self.state.maintenance.clone(),
            pause: self.state.pause.clone(),
            tls: self.certificate.as_ref().map(Certificate::config),
        });
        let mut waiting = Vec::new();
        for worker in &self.workers {
            let (applied, wait) = oneshot::channel();
            let command = WorkerCommand::Apply { table: Arc::clone(&table), applied };
            // A worker that has ended shows when its answer is waited for.
            drop(worker.commands.send(command).await);
            waiting.push(wait);
        }
        for wait in waiting {
            wait.await.map_err(|_| {
                ControlError::unavailable(
                    "a worker has ended; the state is not in force everywhere, restart the router",
                )
            })?;
        }
        Ok(())
    }

    /// Whether a release is the one on trial.
    fn is_canary(&self, release: Option<&str>) -> bool {
        release.is_some() && self.state.canary.as_ref().map(|canary| canary.release.as_str()) == release
    }

    /// The member for `spec`. A backend that becomes ready, or is checked in another way, is unknown until its first
    /// check: what was true of the process that ran there before need not be true now.
    fn member(&self, spec: &BackendSpec, known: Option<(BackendSpec, Member)>) -> Member {
        let checked = spec.state != BackendState::Maintenance;
        let (backend, checker) = match known {
            Some((old, member)) => {
                let begins = spec.state == BackendState::Ready && old.state != BackendState::Ready;
                let stays = checked && !begins && old.health == spec.health;
                (member.backend, member.checker.filter(|_| stays))
            }
            None => (Arc::new(Backend::new(spec, self.workers.len(), self.setup.started)), None),
        };
        let checker = checker.or_else(|| {
            backend.set_health(Health::Checking, None);
            let checking =
                keep_checking(Arc::clone(&backend), spec.health.clone(), self.setup.config.health.clone());
            checked.then(|| Checker(tokio::spawn(checking)))
        });
        Member { backend, checker, counted_since: 0 }
    }

    fn snapshot(&self) -> RouterSnapshot {
        let sum = |of: fn(&WorkerCounts) -> &AtomicU64| {
            self.workers.iter().map(|worker| of(&worker.counts).load(Relaxed)).sum()
        };
        let members = self.state.backends.iter().zip(&self.members);
        RouterSnapshot {
            generation: self.state.generation,
            listen: self.setup.listen,
            connections: sum(|counts| &counts.connections),
            unrouted: sum(|counts| &counts.unrouted),
            refused: sum(|counts| &counts.refused),
            handshakes_failed: sum(|counts| &counts.handshakes_failed),
            tls: self.certificate.as_ref().map(Certificate::status),
            log_lines_dropped: self.setup.log_lines_dropped.load(Relaxed),
            canary: self.state.canary.as_ref().map(|spec| CanaryStatus {
                spec: spec.clone(),
                share_in_force_per_mille: self.setup.lease.share_per_mille(self.now()),
                lease_left_ms: millis(self.setup.lease.left(self.now())),
            }),
            alert: self.alert.clone(),
            backends: members.map(|(spec, member)| member.backend.status(spec)).collect(),
        }
    }

    /// What all workers counted, added up.
    async fn counts(&self, request: &CountsRequest) -> Result<RouterCounts, ControlError> {
        let mut waiting = Vec::new();
        for worker in &self.workers {
            let (counted, wait) = oneshot::channel();
            drop(worker.commands.send(WorkerCommand::Count { counted }).await);
            waiting.push(wait);
        }
        let mut all = Vec::new();
        for wait in waiting {
            let rows = wait.await;
            all.extend(
                rows.map_err(|_| ControlError::unavailable("a worker has ended; restart the router"))?,
            );
        }
        let mut rows: BTreeMap<_, CountRow> = BTreeMap::new();
        for mut row in all {
            if request.by == CountsBy::Release {
                row.backend.clear();
                row.since_generation = 0;
            }
            row.is_canary = self.is_canary(row.release.as_deref());
            let key = (row.backend.clone(), row.release.clone(), row.route.clone(), row.since_generation);
            match rows.entry(key) {
                Entry::Occupied(mut known) => known.get_mut().add(&row),
                Entry::Vacant(place) => drop(place.insert(row)),
            }
        }
        Ok(RouterCounts {
            instance: self.instance,
            elapsed_ms: millis(self.now()),
            generation: self.state.generation,
            latency_bounds_us: latency_bounds_us(),
            rows: rows.into_values().collect(),
        })
    }

    /// Stops all workers at once and waits for them. `gently` leaves idle connections one more answer, for half of the time.
    async fn stop(&mut self, within: Duration, gently: bool) -> u64 {
        // Or clients would wait in a queue that nobody looks at.
        self.setup.listeners.clear();
        self.setup.metrics = None;
        let mut waiting = Vec::new();
        for worker in &self.workers {
            let (stopped, wait) = oneshot::channel();
            drop(worker.commands.send(WorkerCommand::Stop { within, gently, stopped }).await);
            waiting.push(wait);
        }
        let mut cut = 0;
        for wait in waiting {
            // A worker that had ended before has nothing left to cut.
            cut += wait.await.unwrap_or(0);
        }
        cut
    }
}
