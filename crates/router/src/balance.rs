//! Which backend takes a request. A [`Table`] belongs to one worker and is replaced whole.
//!
//! With a release on trial a request is first given to the canary or to stable, by chance or by its sticky key, and then
//! to one of that arm's backends by weight. A stable backend takes what the canary cannot, never the other way round.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rustls::ServerConfig;
use serde::Serialize;

use crate::affinity::{Affinity, Wish, hash, mix};
use crate::backend::{Backend, Preference};
use crate::canary::{WHOLE_PER_MILLE, millis};
use crate::pool::Pool;
use crate::random::{Random, attraction, below};
use crate::routes::Routes;
use crate::standing::{MaintenancePage, Pause};
use crate::state::{BackendState, PassiveHealth};
use crate::tally::Tally;

/// What is sent to the workers when the state changes.
#[derive(Debug)]
pub(crate) struct TableSpec {
    pub(crate) entries: Vec<EntrySpec>,
    /// Whether a release is on trial.
    pub(crate) is_trial: bool,
    pub(crate) affinity: Affinity,
    pub(crate) routes: Arc<Routes>,
    pub(crate) slow_start: Duration,
    pub(crate) passive: Option<PassiveHealth>,
    pub(crate) maintenance: Option<MaintenancePage>,
    pub(crate) pause: Option<Pause>,
    /// For connections that begin now; in the clear without it.
    pub(crate) tls: Option<Arc<ServerConfig>>,
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

    /// Its weight, a tenth of it when it has just come up, in thousandths so that small weights rise too.
    fn weight_at(&self, now: Duration, slow_start: Duration) -> u64 {
        let whole = u64::from(self.weight.get()) * WHOLE_WEIGHT;
        if slow_start.is_zero() {
            return whole;
        }
        let since = millis(now).saturating_sub(self.backend.up_since_ms.load(Relaxed));
        let part = since.saturating_mul(WHOLE_WEIGHT) / millis(slow_start).max(1);
        u64::from(self.weight.get()) * part.clamp(WHOLE_WEIGHT / 10, WHOLE_WEIGHT)
    }
}

/// What a weight is multiplied by, for the steps of a slow start.
const WHOLE_WEIGHT: u64 = 1000;

/// The backends of one worker. `ready` are those that take requests.
#[derive(Debug, Default)]
pub(crate) struct Table {
    all: Vec<Rc<Entry>>,
    ready: Vec<Rc<Entry>>,
    is_trial: bool,
    slow_start: Duration,
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
        let mut next = Self { is_trial: spec.is_trial, slow_start: spec.slow_start, ..Self::default() };
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

    /// Chooses among the ready backends that are not in `tried`: the arm first, then by weight among those that are up and
    /// not left out; when there is none, among those that are left out, and then those whose first check has not ended.
    pub(crate) fn choose(
        &self,
        random: &Random,
        now: Duration,
        share_per_mille: u32,
        wish: Wish,
        tried: &[Rc<Entry>],
    ) -> Option<(&Rc<Entry>, Reason)> {
        let by = if wish.key.is_some() { Reason::Sticky } else { Reason::Weight };
        let from = |arm| self.choose_from(arm, random, now, wish.key, tried);
        if !self.is_trial {
            return from(Arm::All).map(|entry| (entry, by));
        }
        if wish.is_tester {
            // Whoever looks at the candidate shall not be shown something else.
            return from(Arm::Canary).map(|entry| (entry, Reason::Tester));
        }
        let of_canary = match (share_per_mille, wish.key) {
            (0, _) => false,
            (share, Some(key)) => below(mix(key), u64::from(WHOLE_PER_MILLE)) < u64::from(share),
            (share, None) => random.below(u64::from(WHOLE_PER_MILLE)) < u64::from(share),
        };
        let canary = if of_canary { from(Arm::Canary) } else { None };
        canary.or_else(|| from(Arm::Stable)).map(|entry| (entry, by))
    }

    /// One pass that looks at each backend once: its health may change meanwhile, on another core, and a second look at
    /// it would be at another table.
    fn choose_from(
        &self,
        arm: Arm,
        random: &Random,
        now: Duration,
        key: Option<u64>,
        tried: &[Rc<Entry>],
    ) -> Option<&Rc<Entry>> {
        let mut best: Option<(Preference, &Rc<Entry>)> = None;
        let (mut total, mut strongest) = (0, 0.0);
        for entry in &self.ready {
            let is_of_arm = match arm {
                Arm::All => true,
                Arm::Stable => !entry.is_canary.get(),
                Arm::Canary => entry.is_canary.get(),
            };
            if !is_of_arm || tried.iter().any(|other| Rc::ptr_eq(other, entry)) {
                continue;
            }
            let Some(preference) = entry.backend.preference(now) else { continue };
            match best {
                Some((known, _)) if preference > known => continue,
                Some((known, _)) if preference == known => {}
                _ => (total, strongest) = (0, 0.0),
            }
            let weight = entry.weight_at(now, self.slow_start);
            let is_chosen = match key {
                Some(key) => {
                    let strength = attraction(key ^ entry.name_hash, weight);
                    let is_stronger = strength > strongest;
                    strongest = strength.max(strongest);
                    is_stronger
                }
                // Each is taken with its share of the weights so far, which gives every one its share in the end.
                None => {
                    total += weight;
                    random.below(total) < weight
                }
            };
            if is_chosen {
                best = Some((preference, entry));
            }
        }
        best.map(|(_, entry)| entry)
    }

    /// Closes connections to backends that have been idle for too long.
    pub(crate) fn close_idle(&self, before: Duration) {
        for entry in &self.all {
            entry.pool.close_idle(before);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::backend::{DOWN, UP};
    use crate::state::{BackendSpec, Health};

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
                let backend = Arc::new(Backend::new(&spec, 1, Instant::now()));
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
            slow_start: Duration::ZERO,
            passive: None,
            maintenance: None,
            pause: None,
            tls: None,
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
            if let Some((chosen, _)) = table.choose(&random, Duration::ZERO, share, wish(number), tried) {
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
            let (entry, reason) = table.choose(&random, Duration::ZERO, share, keyed(number), &[]).unwrap();
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

    /// How many of 10,000 choices at `now` fall on each backend.
    fn split_at(table: &Table, now: Duration) -> Vec<u32> {
        let random = Random::from_seed(1);
        let mut counts = vec![0; table.all.len()];
        for _ in 0..10_000 {
            let (chosen, _) = table.choose(&random, now, 0, NO_WISH, &[]).unwrap();
            counts[table.all.iter().position(|entry| Rc::ptr_eq(entry, chosen)).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn a_backend_that_comes_up_starts_slowly() {
        let slow = TableSpec {
            slow_start: Duration::from_secs(10),
            ..spec(&[("a", 1, Ready, Up), ("b", 1, Ready, Up)], "")
        };
        let table = Table::default().next(&slow, 8);
        table.all[1].backend.up_since_ms.store(100_000, Relaxed);
        for (second, share) in [(100, 0.1 / 1.1), (105, 0.5 / 1.5), (110, 0.5), (500, 0.5)] {
            let counts = split_at(&table, Duration::from_secs(second));
            let expected = 10_000.0 * share;
            assert!((f64::from(counts[1]) - expected).abs() < 200.0, "{second}: {counts:?}");
        }
    }

    #[test]
    fn a_backend_with_bad_answers_in_a_row_is_left_out_for_a_while_unless_all_are() {
        let table = table(&[("a", 1, Ready, Up), ("b", 1, Ready, Up)]);
        let (a, b) = (&table.all[0].backend, &table.all[1].backend);
        let passive = Some(PassiveHealth { errors_in_a_row: 3, out_ms: 60_000 });
        let now = Duration::from_secs(1);
        let judge = |backend: &Backend, good: &[bool]| {
            good.iter().for_each(|is_good| backend.judged(*is_good, passive));
        };
        judge(a, &[false, false, true, false, false]);
        assert!(!a.is_left_out(now));
        judge(a, &[false]);
        assert!(a.is_left_out(now));
        assert_eq!(split_at(&table, now)[0], 0);
        assert!(split_at(&table, Duration::from_secs(100))[0] > 4000, "it is back");
        judge(b, &[false, false, false]);
        assert!(split_at(&table, now)[0] > 4000, "the last ones are not left out");
        b.judged(false, None);
    }

    #[test]
    fn a_backend_that_goes_down_meanwhile_takes_no_request_with_it() {
        let table = table(&[("a", 1, Ready, Up), ("b", 1000, Ready, Up)]);
        let flipping = Arc::clone(&table.all[1].backend);
        let is_done = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let done = Arc::clone(&is_done);
        let flipper = std::thread::spawn(move || {
            while !done.load(Relaxed) {
                flipping.health.store(DOWN, Relaxed);
                flipping.health.store(UP, Relaxed);
            }
        });
        let random = Random::from_seed(1);
        for number in 0..1_000_000 {
            let wish = if number % 2 == 0 { NO_WISH } else { keyed(number) };
            assert!(table.choose(&random, Duration::ZERO, 0, wish, &[]).is_some(), "{number}");
        }
        is_done.store(true, Relaxed);
        flipper.join().unwrap();
    }
}
