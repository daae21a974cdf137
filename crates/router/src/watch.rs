//! Deadlines of client connections, kept without a timer per request.
//!
//! Every connection has one [`Watch`]: a phase and the moment at which that phase has lasted too long. A worker's clock
//! ticks every [`TICK`]; the tick looks at all watches and wakes those that are over. Setting a deadline is therefore
//! one store, and deadlines are exact to a tick.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use crate::config::Limits;

/// How often deadlines are looked at: exact enough for timeouts of seconds, and idle routers stay idle.
pub(crate) const TICK: Duration = Duration::from_millis(250);

/// A worker's coarse clock.
#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
    now: Cell<Duration>,
}

impl Clock {
    /// A clock that counts from `started`, which all workers of a router share.
    pub(crate) fn new(started: Instant) -> Self {
        Self { started, now: Cell::new(started.elapsed()) }
    }

    /// Time since the router began, as of the last tick.
    pub(crate) fn now(&self) -> Duration {
        self.now.get()
    }

    pub(crate) fn tick(&self) {
        self.now.set(self.started.elapsed());
    }
}

/// What a connection is doing, which decides how long it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Between requests.
    Idle,
    /// Some bytes of a head have come.
    Head,
    /// A request is with the service; no answer yet.
    Handling,
    /// An answer is being sent.
    Answering,
    /// The connection was upgraded.
    Tunnel,
}

/// The deadline of one client connection.
#[derive(Debug)]
pub(crate) struct Watch {
    clock: Rc<Clock>,
    limits: Rc<Limits>,
    phase: Cell<Phase>,
    deadline: Cell<Duration>,
    waker: RefCell<Option<Waker>>,
}

impl Watch {
    pub(crate) fn new(clock: Rc<Clock>, limits: Rc<Limits>) -> Self {
        let watch = Self {
            clock,
            limits,
            phase: Cell::new(Phase::Idle),
            deadline: Cell::new(Duration::MAX),
            waker: RefCell::new(None),
        };
        watch.enter(Phase::Idle);
        watch
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// Begins a phase and its time.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        let allowed = match phase {
            Phase::Idle => self.limits.keep_alive_timeout,
            Phase::Head => self.limits.head_timeout,
            Phase::Handling => self.limits.answer_timeout,
            Phase::Answering => self.limits.stall_timeout,
            Phase::Tunnel => self.limits.tunnel_timeout,
        };
        // Up to a tick has passed since the clock was set; nobody loses it.
        self.deadline.set(self.clock.now() + allowed + TICK);
    }

    /// Something moved: the phase may last as long again.
    pub(crate) fn touch(&self) {
        self.enter(self.phase.get());
    }

    /// Bytes came from the client.
    pub(crate) fn client_sent(&self) {
        match self.phase.get() {
            Phase::Idle => self.enter(Phase::Head),
            // A head that drips in does not gain time with each drop.
            Phase::Head => {}
            Phase::Handling | Phase::Answering | Phase::Tunnel => self.touch(),
        }
    }

    /// Bytes went to the client.
    pub(crate) fn client_took(&self) {
        if matches!(self.phase.get(), Phase::Answering | Phase::Tunnel) {
            self.touch();
        }
    }

    /// Whether the phase has lasted too long.
    pub(crate) fn is_over(&self) -> bool {
        self.clock.now() >= self.deadline.get()
    }

    /// Whether the connection must be closed from outside: a phase is over that nothing inside will end. While a
    /// request is handled the service answers 504; only if that stands still as well is the connection cut.
    pub(crate) fn must_be_cut(&self) -> bool {
        match self.phase.get() {
            Phase::Handling => {
                self.clock.now() >= self.deadline.get().saturating_add(self.limits.stall_timeout)
            }
            Phase::Idle | Phase::Head | Phase::Answering | Phase::Tunnel => self.is_over(),
        }
    }

    /// The task to wake when it is over, or when the worker stops.
    pub(crate) fn register(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    pub(crate) fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}

/// All watches of a worker.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    all: RefCell<Vec<Weak<Watch>>>,
}

impl Watches {
    pub(crate) fn add(&self, watch: &Rc<Watch>) {
        self.all.borrow_mut().push(Rc::downgrade(watch));
    }

    /// Wakes every connection whose phase has lasted too long, and forgets closed ones.
    pub(crate) fn wake_overdue(&self) {
        self.all.borrow_mut().retain(|watch| {
            let Some(watch) = watch.upgrade() else { return false };
            if watch.is_over() {
                watch.wake();
            }
            true
        });
    }

    pub(crate) fn wake_all(&self) {
        for watch in self.all.borrow().iter().filter_map(Weak::upgrade) {
            watch.wake();
        }
    }
}
