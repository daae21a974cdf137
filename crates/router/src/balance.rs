//! Which backend takes a request, and what is counted about it.
//!
//! A [`Backend`] is shared by all workers: identity, health, and one slot of counters per worker, so that counting
//! never makes two cores write to the same cache line. A [`Table`] belongs to one worker and is replaced whole.

use std::cell::Cell;
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::pool::Pool;
use crate::state::{BackendSpec, BackendState, BackendStatus, Health, MAX_HEALTH_DETAIL_BYTES};

/// A backend as all workers know it. It lives for as long as its name and address stay in the state.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) name: Arc<str>,
    pub(crate) address: SocketAddr,
    health: AtomicU8,
    health_detail: Mutex<Option<String>>,
    /// Failed connections of requests in a row, over all workers.
    connect_failures_in_a_row: AtomicU32,
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
const UP: u8 = 1;
const DOWN: u8 = 2;

impl Backend {
    pub(crate) fn new(spec: &BackendSpec, workers: usize) -> Self {
        Self {
            name: spec.name.as_str().into(),
            address: spec.address,
            health: AtomicU8::new(CHECKING),
            health_detail: Mutex::new(None),
            connect_failures_in_a_row: AtomicU32::new(0),
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

    pub(crate) fn status(&self, spec: &BackendSpec) -> BackendStatus {
        let sum = |of: fn(&Slot) -> &AtomicU64| self.slots.iter().map(|slot| of(slot).load(Relaxed)).sum();
        let health = self.health();
        BackendStatus {
            spec: spec.clone(),
            health,
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

/// What is sent to the workers when the state changes.
#[derive(Debug)]
pub(crate) struct TableSpec {
    pub(crate) entries: Vec<EntrySpec>,
}

/// One backend of a [`TableSpec`].
#[derive(Debug)]
pub(crate) struct EntrySpec {
    pub(crate) backend: Arc<Backend>,
    pub(crate) state: BackendState,
    pub(crate) weight: u32,
    pub(crate) release: Option<Arc<str>>,
}

/// A backend as one worker sees it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) backend: Arc<Backend>,
    pub(crate) pool: Pool,
    weight: Cell<u32>,
    release: std::cell::RefCell<Option<Arc<str>>>,
}

impl Entry {
    pub(crate) fn release(&self) -> Option<Arc<str>> {
        self.release.borrow().clone()
    }
}

/// The backends of one worker. `ready` are those that take requests.
#[derive(Debug, Default)]
pub(crate) struct Table {
    all: Vec<Rc<Entry>>,
    ready: Vec<Rc<Entry>>,
}

impl Table {
    /// The table for `spec`, which keeps the connections of the backends that stay. Idle connections to those that
    /// take no requests any more are closed: a server that stops gracefully would wait for them.
    pub(crate) fn next(&self, spec: &TableSpec, max_idle: usize) -> Self {
        let mut next = Self::default();
        for given in &spec.entries {
            let known = self.all.iter().find(|entry| Arc::ptr_eq(&entry.backend, &given.backend));
            let entry = known.cloned().unwrap_or_else(|| {
                Rc::new(Entry {
                    backend: Arc::clone(&given.backend),
                    pool: Pool::new(max_idle),
                    weight: Cell::new(0),
                    release: None.into(),
                })
            });
            entry.weight.set(given.weight);
            entry.release.replace(given.release.clone());
            let ready = given.state == BackendState::Ready;
            entry.pool.set_open(ready);
            if ready && given.weight > 0 {
                next.ready.push(Rc::clone(&entry));
            }
            next.all.push(entry);
        }
        for gone in self.all.iter().filter(|old| !next.all.iter().any(|new| Rc::ptr_eq(old, new))) {
            gone.pool.set_open(false);
        }
        next
    }

    /// Chooses by weight among the ready backends that are up and not in `tried`; when none is up, among those whose
    /// first check has not ended.
    pub(crate) fn choose(&self, random: &Random, tried: &[Rc<Entry>]) -> Option<&Rc<Entry>> {
        [Health::Up, Health::Checking].into_iter().find_map(|health| {
            let candidates = || {
                self.ready.iter().filter(move |entry| {
                    entry.backend.health() == health && !tried.iter().any(|other| Rc::ptr_eq(other, entry))
                })
            };
            let total: u64 = candidates().map(|entry| u64::from(entry.weight.get())).sum();
            if total == 0 {
                return None;
            }
            let mut point = random.below(total);
            candidates().find(|entry| {
                let weight = u64::from(entry.weight.get());
                let found = point < weight;
                point = point.saturating_sub(weight);
                found
            })
        })
    }

    /// Closes connections to backends that have been idle for too long.
    pub(crate) fn close_idle(&self, before: std::time::Duration) {
        for entry in &self.all {
            entry.pool.close_idle(before);
        }
    }
}

/// A small generator of one worker. Not for secrets: it splits traffic and makes request ids.
#[derive(Debug)]
pub(crate) struct Random(Cell<u64>);

impl Random {
    /// Seeded from the process's hash keys, which the system's generator made.
    pub(crate) fn seeded() -> Self {
        Self::from_seed(std::collections::hash_map::RandomState::new().build_hasher().finish())
    }

    pub(crate) fn from_seed(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    /// splitmix64: every state is good, and one addition and three mixes make a value.
    pub(crate) fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A value below `limit`, by multiplication: the bias is under 2⁻³² for every sum of weights.
    fn below(&self, limit: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(limit);
        // The high half of the product is below `limit`.
        (wide >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(backends: &[(&str, u32, BackendState, Health)]) -> Table {
        let entries = backends
            .iter()
            .map(|&(name, weight, state, health)| {
                let spec = BackendSpec {
                    name: name.to_owned(),
                    address: "127.0.0.1:1".parse().unwrap(),
                    weight,
                    state,
                    release: None,
                    health: None,
                };
                let backend = Arc::new(Backend::new(&spec, 1));
                backend.set_health(health, None);
                EntrySpec { backend, state, weight, release: None }
            })
            .collect();
        Table::default().next(&TableSpec { entries }, 8)
    }

    /// How many of 10,000 choices fall on each backend.
    fn split(table: &Table, tried: &[Rc<Entry>]) -> Vec<u32> {
        let random = Random::from_seed(1);
        let mut counts = vec![0; table.all.len()];
        for _ in 0..10_000 {
            if let Some(chosen) = table.choose(&random, tried) {
                counts[table.all.iter().position(|entry| Rc::ptr_eq(entry, chosen)).unwrap()] += 1;
            }
        }
        counts
    }

    use BackendState::{Drain, Maintenance, Ready};
    use Health::{Checking, Down, Up};

    #[test]
    fn requests_follow_the_weights() {
        let counts = split(&table(&[("a", 70, Ready, Up), ("b", 30, Ready, Up), ("c", 0, Ready, Up)]), &[]);
        assert!((2800..=3200).contains(&counts[1]), "{counts:?}");
        assert_eq!(counts[0] + counts[1], 10_000);
    }

    #[test]
    fn only_healthy_ready_untried_backends_are_chosen() {
        let cases = [
            ([("a", 1, Ready, Down), ("b", 1, Ready, Up)], [0, 10_000]),
            ([("a", 1, Drain, Up), ("b", 1, Ready, Up)], [0, 10_000]),
            ([("a", 1, Maintenance, Up), ("b", 1, Ready, Checking)], [0, 10_000]),
            ([("a", 1, Ready, Checking), ("b", 1, Ready, Up)], [0, 10_000]),
            ([("a", 1, Ready, Down), ("b", 1, Drain, Up)], [0, 0]),
        ];
        for (backends, expected) in cases {
            assert_eq!(split(&table(&backends), &[]), expected, "{backends:?}");
        }
        let table = table(&[("a", 1, Ready, Up), ("b", 1, Ready, Up)]);
        assert_eq!(split(&table, &table.all[..1]), [0, 10_000]);
        assert_eq!(split(&table, &table.all), [0, 0]);
    }

    #[test]
    fn failed_connections_take_a_backend_down_only_in_a_row() {
        let table = table(&[("a", 1, Ready, Up)]);
        let backend = &table.all[0].backend;
        backend.connect_failed(2, "refused");
        backend.connected();
        backend.connect_failed(2, "refused");
        assert_eq!(backend.health(), Up);
        backend.connect_failed(2, "refused");
        assert_eq!(backend.health(), Down);
        assert!(backend.health_detail.lock().unwrap().as_ref().unwrap().contains("refused"));
    }
}
