//! The one place that holds the desired state and changes it.
//!
//! Commands come one after another from the handle and from the control socket; each is carried out on every worker
//! before the next is looked at, and before it is answered. So whoever was told that a backend drains knows that no
//! core gives it another request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::balance::{Backend, EntrySpec, TableSpec};
use crate::config::RouterConfig;
use crate::health::keep_checking;
use crate::protocol::ControlError;
use crate::state::{BackendChange, BackendSpec, BackendState, Health, RouterSnapshot, RouterState};
use crate::worker::{WorkerCommand, WorkerCounts};

/// Commands that wait; senders wait beyond that.
pub(crate) const QUEUED_COMMANDS: usize = 16;

pub(crate) type Reply = oneshot::Sender<Result<RouterSnapshot, ControlError>>;

/// What can be asked of a running router.
#[derive(Debug)]
pub(crate) enum Command {
    Get(Reply),
    Set(RouterState, Reply),
    Change(BackendChange, Reply),
    /// Stop within the time; the answer is the number of connections that were cut.
    Stop(Duration, oneshot::Sender<u64>),
}

impl Command {
    /// Sends `command` and waits for its reply.
    pub(crate) async fn send(
        commands: &mpsc::Sender<Self>,
        command: Self,
        replied: oneshot::Receiver<Result<RouterSnapshot, ControlError>>,
    ) -> Result<RouterSnapshot, ControlError> {
        let gone = || ControlError::unavailable("the router is shutting down");
        commands.send(command).await.map_err(|_| gone())?;
        replied.await.map_err(|_| gone())?
    }
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
    /// In the order of `state.backends`.
    members: Vec<Member>,
    workers: Vec<WorkerLink>,
    config: Arc<RouterConfig>,
    listen: SocketAddr,
    log_lines_dropped: Arc<AtomicU64>,
}

/// A backend with its checker. The checker ends with it.
#[derive(Debug)]
struct Member {
    backend: Arc<Backend>,
    checker: Option<Checker>,
}

#[derive(Debug)]
struct Checker(JoinHandle<()>);

impl Drop for Checker {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Authority {
    /// Begins with an empty state, which `first` replaces on all workers.
    ///
    /// # Errors
    /// When a worker has ended.
    pub(crate) async fn begin(
        first: RouterState,
        workers: Vec<WorkerLink>,
        config: Arc<RouterConfig>,
        listen: SocketAddr,
        log_lines_dropped: Arc<AtomicU64>,
    ) -> Result<Self, ControlError> {
        let empty = RouterState { generation: first.generation, backends: Vec::new() };
        let mut authority =
            Self { state: empty, members: Vec::new(), workers, config, listen, log_lines_dropped };
        authority.apply(first).await?;
        Ok(authority)
    }

    /// Carries out commands until one says stop, or nobody is left to give one. The answer to the stop is given by the
    /// caller, when everything is gone.
    pub(crate) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
    ) -> Option<(u64, oneshot::Sender<u64>)> {
        while let Some(command) = commands.recv().await {
            // Whoever asked may have gone away; the command is carried out all the same.
            match command {
                Command::Get(reply) => drop(reply.send(Ok(self.snapshot()))),
                Command::Set(next, reply) => drop(reply.send(self.set(next).await)),
                Command::Change(change, reply) => drop(reply.send(self.change(change).await)),
                Command::Stop(within, stopped) => return Some((self.stop(within).await, stopped)),
            }
        }
        None
    }

    async fn set(&mut self, next: RouterState) -> Result<RouterSnapshot, ControlError> {
        if self.state.admits(&next)? {
            self.apply(next).await?;
        }
        Ok(self.snapshot())
    }

    async fn change(&mut self, change: BackendChange) -> Result<RouterSnapshot, ControlError> {
        let next = self.state.changed(change)?;
        self.apply(next).await?;
        Ok(self.snapshot())
    }

    /// Brings every worker to `next`, which is legal.
    async fn apply(&mut self, next: RouterState) -> Result<(), ControlError> {
        let mut present: Vec<(BackendSpec, Member)> =
            self.state.backends.drain(..).zip(self.members.drain(..)).collect();
        for spec in &next.backends {
            let known = present
                .iter()
                .position(|(old, _)| old.name == spec.name && old.address == spec.address)
                .map(|index| present.swap_remove(index));
            let member = self.member(spec, known);
            self.members.push(member);
        }
        self.state = next;
        let entries = self.state.backends.iter().zip(&self.members).map(|(spec, member)| EntrySpec {
            backend: Arc::clone(&member.backend),
            state: spec.state,
            weight: spec.weight,
            release: spec.release.as_deref().map(Arc::from),
        });
        let table = Arc::new(TableSpec { entries: entries.collect() });
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
            None => (Arc::new(Backend::new(spec, self.workers.len())), None),
        };
        let checker = checker.or_else(|| {
            backend.set_health(Health::Checking, None);
            let checking =
                keep_checking(Arc::clone(&backend), spec.health.clone(), self.config.health.clone());
            checked.then(|| Checker(tokio::spawn(checking)))
        });
        Member { backend, checker }
    }

    fn snapshot(&self) -> RouterSnapshot {
        let sum = |of: fn(&WorkerCounts) -> &AtomicU64| {
            self.workers.iter().map(|worker| of(&worker.counts).load(Relaxed)).sum()
        };
        let members = self.state.backends.iter().zip(&self.members);
        RouterSnapshot {
            generation: self.state.generation,
            listen: self.listen,
            connections: sum(|counts| &counts.connections),
            unrouted: sum(|counts| &counts.unrouted),
            refused: sum(|counts| &counts.refused),
            log_lines_dropped: self.log_lines_dropped.load(Relaxed),
            backends: members.map(|(spec, member)| member.backend.status(spec)).collect(),
        }
    }

    /// Stops all workers at once and waits for them.
    async fn stop(&self, within: Duration) -> u64 {
        let mut waiting = Vec::new();
        for worker in &self.workers {
            let (stopped, wait) = oneshot::channel();
            drop(worker.commands.send(WorkerCommand::Stop { within, stopped }).await);
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
