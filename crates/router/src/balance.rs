//! Which backend takes a request, and what is counted about it.
//!
//! A [`Backend`] is shared by all workers: identity, health, and one slot of counters per worker, so that counting
//! never makes two cores write to the same cache line. A [`Table`] belongs to one worker and is replaced whole.
//!
//! With a release on trial a request is first given to the canary or to stable, by chance or by its sticky key, and then
//! to one of that arm's backends by weight. A stable backend takes what the canary cannot, never the other way round.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::Notify;

use crate::affinity::{Affinity, Wish, hash, mix};
use crate::canary::WHOLE_PER_MILLE;
use crate::pool::Pool;
use crate::routes::Routes;
use crate::state::{BackendSpec, BackendState, BackendStatus, Health, MAX_HEALTH_DETAIL_BYTES};
use crate::tally::Tally;

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
    /// Whether a release is on trial.
    pub(crate) is_trial: bool,
    pub(crate) affinity: Affinity,
    pub(crate) routes: Arc<Routes>,
}

/// One backend of a [`TableSpec`].
#[derive(Debug)]
pub(crate) struct EntrySpec {
    pub(crate) backend: Arc<Backend>,
    pub(crate) state: BackendState,
    pub(crate) weight: u32,
    pub(crate) release: Option<Arc<str>>,
    /// It runs the release on trial.
    pub(crate) is_canary: bool,
    /// The generation with which its present release, or the present routes, began to be counted.
    pub(crate) counted_since: u64,
}

/// A backend as one worker sees it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) backend: Arc<Backend>,
    pub(crate) pool: Pool,
    /// For the place of a sticky key.
    name_hash: u64,
    weight: Cell<u32>,
    is_canary: Cell<bool>,
    tally: RefCell<Rc<Tally>>,
}

impl Entry {
    /// Where requests to it are counted now.
    pub(crate) fn tally(&self) -> Rc<Tally> {
        Rc::clone(&self.tally.borrow())
    }

    /// Whether it runs the release on trial.
    pub(crate) fn is_canary(&self) -> bool {
        self.is_canary.get()
    }
}

/// The backends of one worker. `ready` are those that take requests.
#[derive(Debug, Default)]
pub(crate) struct Table {
    all: Vec<Rc<Entry>>,
    ready: Vec<Rc<Entry>>,
    is_trial: bool,
}

/// What decided where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Reason {
    /// Chance, by share and weight.
    Weight,
    /// Its sticky key.
    Sticky,
    /// The mark of a tester.
    Tester,
}

/// Which backends are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arm {
    All,
    Stable,
    Canary,
}

impl Table {
    /// The table for `spec`, which keeps the connections of the backends that stay. Idle connections to those that
    /// take no requests any more are closed: a server that stops gracefully would wait for them.
    pub(crate) fn next(&self, spec: &TableSpec, max_idle: usize) -> Self {
        let mut next = Self { is_trial: spec.is_trial, ..Self::default() };
        for given in &spec.entries {
            let tally = || {
                let (name, release) = (&given.backend.name, given.release.clone());
                Rc::new(Tally::new(name, release, given.counted_since, &spec.routes))
            };
            let known = self.all.iter().find(|entry| Arc::ptr_eq(&entry.backend, &given.backend));
            let entry = known.cloned().unwrap_or_else(|| {
                Rc::new(Entry {
                    backend: Arc::clone(&given.backend),
                    pool: Pool::new(max_idle),
                    name_hash: hash(given.backend.name.as_bytes()),
                    weight: Cell::new(0),
                    is_canary: Cell::new(false),
                    tally: RefCell::new(tally()),
                })
            });
            entry.weight.set(given.weight);
            entry.is_canary.set(given.is_canary);
            if entry.tally.borrow().since_generation != given.counted_since {
                entry.tally.replace(tally());
            }
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

    /// The tallies of all backends, in the order of the state.
    pub(crate) fn tallies(&self) -> impl Iterator<Item = Rc<Tally>> {
        self.all.iter().map(|entry| entry.tally())
    }

    /// Chooses among the ready backends that are not in `tried`: the arm first, then by weight among those that are up;
    /// when none is up, among those whose first check has not ended. `share_per_mille` is the canary's, in force now.
    pub(crate) fn choose(
        &self,
        random: &Random,
        share_per_mille: u32,
        wish: Wish,
        tried: &[Rc<Entry>],
    ) -> Option<(&Rc<Entry>, Reason)> {
        let by = if wish.key.is_some() { Reason::Sticky } else { Reason::Weight };
        if !self.is_trial {
            return self.choose_from(Arm::All, random, wish.key, tried).map(|entry| (entry, by));
        }
        if wish.is_tester {
            // Whoever looks at the candidate shall not be shown something else.
            return self
                .choose_from(Arm::Canary, random, wish.key, tried)
                .map(|entry| (entry, Reason::Tester));
        }
        let of_canary = match (share_per_mille, wish.key) {
            (0, _) => false,
            (share, Some(key)) => below(mix(key), u64::from(WHOLE_PER_MILLE)) < u64::from(share),
            (share, None) => random.below(u64::from(WHOLE_PER_MILLE)) < u64::from(share),
        };
        let canary = if of_canary { self.choose_from(Arm::Canary, random, wish.key, tried) } else { None };
        canary.or_else(|| self.choose_from(Arm::Stable, random, wish.key, tried)).map(|entry| (entry, by))
    }

    fn choose_from(
        &self,
        arm: Arm,
        random: &Random,
        key: Option<u64>,
        tried: &[Rc<Entry>],
    ) -> Option<&Rc<Entry>> {
        [Health::Up, Health::Checking].into_iter().find_map(|health| {
            let candidates = || {
                self.ready.iter().filter(move |entry| {
                    let is_of_arm = match arm {
                        Arm::All => true,
                        Arm::Stable => !entry.is_canary.get(),
                        Arm::Canary => entry.is_canary.get(),
                    };
                    is_of_arm
                        && entry.backend.health() == health
                        && !tried.iter().any(|other| Rc::ptr_eq(other, entry))
                })
            };
            if let Some(key) = key {
                let place = |entry: &Rc<Entry>| attraction(key ^ entry.name_hash, entry.weight.get());
                return candidates().max_by(|one, other| place(one).total_cmp(&place(other)));
            }
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
        mix(state)
    }

    fn below(&self, limit: u64) -> u64 {
        below(self.next(), limit)
    }
}

/// A random word as a value below `limit`, by multiplication: the bias is under 2⁻³² for every sum of weights.
fn below(word: u64, limit: u64) -> u64 {
    // The high half of the product is below `limit`.
    ((u128::from(word) * u128::from(limit)) >> 64) as u64
}

/// How much a key is drawn to a backend: the largest wins (weighted rendezvous hashing; Schindelhauer and Schomaker,
/// "Weighted Distributed Hash Tables", 2005). Each backend gets keys by its weight, and when one goes only its own move.
fn attraction(key_and_name: u64, weight: u32) -> f64 {
    // 53 bits make a number between 0 and 1 that is neither.
    let unit = ((mix(key_and_name) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    f64::from(weight) / -unit.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(backends: &[(&str, u32, BackendState, Health)], canary: &str) -> TableSpec {
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
                EntrySpec {
                    backend,
                    state,
                    weight,
                    release: None,
                    is_canary: name == canary,
                    counted_since: 1,
                }
            })
            .collect();
        TableSpec {
            entries,
            is_trial: !canary.is_empty(),
            affinity: Affinity::default(),
            routes: Arc::default(),
        }
    }

    fn table(backends: &[(&str, u32, BackendState, Health)]) -> Table {
        Table::default().next(&spec(backends, ""), 8)
    }

    const NO_WISH: Wish = Wish { key: None, is_tester: false };

    /// How many of 10,000 choices fall on each backend.
    fn split(table: &Table, tried: &[Rc<Entry>]) -> Vec<u32> {
        split_with(table, 0, |_| NO_WISH, tried)
    }

    fn split_with(table: &Table, share: u32, wish: impl Fn(u64) -> Wish, tried: &[Rc<Entry>]) -> Vec<u32> {
        let random = Random::from_seed(1);
        let mut counts = vec![0; table.all.len()];
        for number in 0..10_000 {
            if let Some((chosen, _)) = table.choose(&random, share, wish(number), tried) {
                counts[table.all.iter().position(|entry| Rc::ptr_eq(entry, chosen)).unwrap()] += 1;
            }
        }
        counts
    }

    fn keyed(number: u64) -> Wish {
        Wish { key: Some(hash(&number.to_le_bytes())), is_tester: false }
    }

    use BackendState::{Drain, Maintenance, Ready};
    use Health::{Checking, Down, Up};

    #[test]
    fn requests_follow_the_weights() {
        let table = table(&[("a", 70, Ready, Up), ("b", 30, Ready, Up), ("c", 0, Ready, Up)]);
        for counts in [split(&table, &[]), split_with(&table, 0, keyed, &[])] {
            assert!((2800..=3200).contains(&counts[1]), "{counts:?}");
            assert_eq!(counts[0] + counts[1], 10_000);
        }
    }

    /// Two stable backends and a canary whose weight is not its share.
    fn trial(stable: Health, canary: Health) -> Table {
        let backends = [("a", 100, Ready, stable), ("b", 100, Ready, stable), ("c", 900, Ready, canary)];
        Table::default().next(&spec(&backends, "c"), 8)
    }

    #[test]
    fn the_share_of_the_canary_is_a_ceiling() {
        let table = trial(Up, Up);
        for wish in [|_| NO_WISH, keyed] {
            for (share, expected) in
                [(0, 0..=0), (50, 430..=570), (300, 2850..=3150), (1000, 10_000..=10_000)]
            {
                let counts = split_with(&table, share, wish, &[]);
                assert!(expected.contains(&counts[2]), "{share}: {counts:?}");
                assert_eq!(counts.iter().sum::<u32>(), 10_000);
            }
        }
        // Stable takes what the canary cannot, and not the other way round.
        assert_eq!(split_with(&trial(Up, Down), 1000, |_| NO_WISH, &[])[2], 0);
        let counts = split_with(&trial(Down, Up), 300, |_| NO_WISH, &[]);
        assert!((2850..=3150).contains(&counts.iter().sum::<u32>()), "{counts:?}");
    }

    #[test]
    fn testers_see_the_canary_or_nothing() {
        let tester = |_| Wish { key: None, is_tester: true };
        assert_eq!(split_with(&trial(Up, Up), 0, tester, &[]), [0, 0, 10_000]);
        assert_eq!(split_with(&trial(Up, Down), 0, tester, &[]), [0, 0, 0]);
        // Without a release on trial there is nothing else to see.
        let counts = split_with(&table(&[("a", 1, Ready, Up)]), 0, tester, &[]);
        assert_eq!(counts, [10_000]);
    }

    #[test]
    fn a_key_stays_where_it_is() {
        let place = |table: &Table, share, number| {
            let random = Random::from_seed(number);
            let (entry, reason) = table.choose(&random, share, keyed(number), &[]).unwrap();
            assert_eq!(reason, Reason::Sticky);
            entry.backend.name.to_string()
        };
        let (all, without_b) = (trial(Up, Up), {
            let backends = [("a", 100, Ready, Up), ("b", 100, Ready, Down), ("c", 900, Ready, Up)];
            Table::default().next(&spec(&backends, "c"), 8)
        });
        for number in 0..1000 {
            let before = place(&all, 50, number);
            assert_eq!(before, place(&all, 50, number));
            // A larger share takes users from stable only.
            if before == "c" {
                assert_eq!(place(&all, 300, number), "c");
            }
            // When a backend goes, only its own users move.
            if before != "b" {
                assert_eq!(place(&without_b, 50, number), before);
            }
        }
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
        assert_eq!(split_with(&table, 0, keyed, &table.all[..1]), [0, 10_000]);
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
