//! A backend as all workers know it: identity, health, and what is counted about it.
//!
//! There is one slot of counters per worker, so that counting never makes two cores write to the same cache line.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::canary::millis;
use crate::state::{BackendSpec, BackendStatus, Health, MAX_HEALTH_DETAIL_BYTES, PassiveHealth};

/// A backend as all workers know it. It lives for as long as its name and address stay in the state.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) name: Arc<str>,
    pub(crate) address: SocketAddr,
    pub(crate) health: AtomicU8,
    pub(crate) health_detail: Mutex<Option<String>>,
    /// Failed connections of requests in a row, over all workers.
    connect_failures_in_a_row: AtomicU32,
    /// Bad answers to requests in a row, over all workers.
    errors_in_a_row: AtomicU32,
    /// Left out until then, in milliseconds since the router began; 0 when it never was.
    out_until_ms: AtomicU64,
    /// When it last came up, in milliseconds since the router began.
    pub(crate) up_since_ms: AtomicU64,
    /// When the router began.
    started: Instant,
    /// Wakes the checker before its interval is over.
    pub(crate) check_now: Notify,
    slots: Box<[Slot]>,
}

/// The counters of one worker, on a cache line of their own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Slot {
    pub(crate) sessions: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) answers_5xx: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) connect_failures: AtomicU64,
}

const CHECKING: u8 = 0;
pub(crate) const UP: u8 = 1;
pub(crate) const DOWN: u8 = 2;

impl Backend {
    pub(crate) fn new(spec: &BackendSpec, workers: usize, started: Instant) -> Self {
        Self {
            name: spec.name.as_str().into(),
            address: spec.address,
            health: AtomicU8::new(CHECKING),
            health_detail: Mutex::new(None),
            connect_failures_in_a_row: AtomicU32::new(0),
            errors_in_a_row: AtomicU32::new(0),
            out_until_ms: AtomicU64::new(0),
            up_since_ms: AtomicU64::new(0),
            started,
            check_now: Notify::new(),
            slots: (0..workers).map(|_| Slot::default()).collect(),
        }
    }

    pub(crate) fn slot(&self, worker: usize) -> &Slot {
        &self.slots[worker]
    }

    pub(crate) fn health(&self) -> Health {
        match self.health.load(Relaxed) {
            UP => Health::Up,
            DOWN => Health::Down,
            _ => Health::Checking,
        }
    }

    pub(crate) fn set_health(&self, health: Health, detail: Option<String>) {
        let code = match health {
            Health::Checking => CHECKING,
            Health::Up => UP,
            Health::Down => DOWN,
        };
        if health == Health::Up {
            self.connect_failures_in_a_row.store(0, Relaxed);
            if self.health.load(Relaxed) != UP {
                self.up_since_ms.store(millis(self.started.elapsed()), Relaxed);
            }
        }
        let detail = detail.map(|mut text| {
            text.truncate(text.floor_char_boundary(MAX_HEALTH_DETAIL_BYTES));
            text
        });
        *self.health_detail.lock().unwrap_or_else(PoisonError::into_inner) = detail;
        self.health.store(code, Relaxed);
    }

    /// A request could not connect. After `fall` in a row the backend is down until its checks pass again.
    pub(crate) fn connect_failed(&self, fall: u32, why: &str) {
        let failures = self.connect_failures_in_a_row.fetch_add(1, Relaxed).saturating_add(1);
        if failures >= fall && self.health.load(Relaxed) != DOWN {
            self.set_health(Health::Down, Some(format!("{failures} connections in a row failed: {why}")));
            self.check_now.notify_one();
        }
    }

    /// A request could connect.
    pub(crate) fn connected(&self) {
        if self.connect_failures_in_a_row.load(Relaxed) != 0 {
            self.connect_failures_in_a_row.store(0, Relaxed);
        }
    }

    /// How a request ended: whether its answer was good.
    pub(crate) fn judged(&self, is_good: bool, passive: Option<PassiveHealth>) {
        let Some(passive) = passive else { return };
        if is_good {
            if self.errors_in_a_row.load(Relaxed) != 0 {
                self.errors_in_a_row.store(0, Relaxed);
            }
        } else if self.errors_in_a_row.fetch_add(1, Relaxed).saturating_add(1) >= passive.errors_in_a_row {
            self.errors_in_a_row.store(0, Relaxed);
            self.out_until_ms.store(millis(self.started.elapsed()).saturating_add(passive.out_ms), Relaxed);
        }
    }

    /// Whether it is left out because of what it answered.
    pub(crate) fn is_left_out(&self, now: Duration) -> bool {
        let until = self.out_until_ms.load(Relaxed);
        until != 0 && millis(now) < until
    }

    /// How gladly it is given a request at `now`; not at all when it is down.
    pub(crate) fn preference(&self, now: Duration) -> Option<Preference> {
        match self.health() {
            Health::Up if self.is_left_out(now) => Some(Preference::LeftOut),
            Health::Up => Some(Preference::Good),
            Health::Checking => Some(Preference::Unknown),
            Health::Down => None,
        }
    }

    pub(crate) fn status(&self, spec: &BackendSpec) -> BackendStatus {
        let sum = |of: fn(&Slot) -> &AtomicU64| self.slots.iter().map(|slot| of(slot).load(Relaxed)).sum();
        let health = self.health();
        BackendStatus {
            spec: spec.clone(),
            health,
            is_left_out: self.is_left_out(self.started.elapsed()),
            health_detail: match health {
                Health::Down => self.health_detail.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                Health::Checking | Health::Up => None,
            },
            sessions: sum(|slot| &slot.sessions),
            requests: sum(|slot| &slot.requests),
            errors: sum(|slot| &slot.errors),
            answers_5xx: sum(|slot| &slot.answers_5xx),
            retries: sum(|slot| &slot.retries),
            connect_failures: sum(|slot| &slot.connect_failures),
        }
    }
}

/// A backend is given requests only when no other has a better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Preference {
    Good,
    LeftOut,
    Unknown,
}
