//! Counting on one core: what a request adds to the row of its backend, release and route.
//!
//! A tally belongs to one worker, so counting takes no lock and shares no cache line. It is read by asking the worker.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::access_log::micros;
use crate::counts::{CountRow, LATENCY_BUCKETS, latency_bucket};
use crate::routes::Routes;

/// The counts of one backend for as long as it runs one release and the routes stay.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) backend: Arc<str>,
    pub(crate) release: Option<Arc<str>>,
    /// With this generation it began; it tells tallies of the same names apart.
    pub(crate) since_generation: u64,
    routes: Arc<Routes>,
    rows: Box<[OnceCell<Box<RouteTally>>]>,
}

/// One row.
#[derive(Debug)]
struct RouteTally {
    answers: [Cell<u64>; 5],
    failed: Cell<u64>,
    broken: Cell<u64>,
    cancelled: Cell<u64>,
    moved: Cell<u64>,
    bytes: Cell<u64>,
    latency: [Cell<u64>; LATENCY_BUCKETS],
    waiting: RefCell<Waiting>,
}

/// When the requests that wait for an answer began to.
#[derive(Debug, Default)]
struct Waiting {
    since: Vec<Option<Instant>>,
    free: Vec<usize>,
}

impl Tally {
    pub(crate) fn new(
        backend: &Arc<str>,
        release: Option<Arc<str>>,
        since_generation: u64,
        routes: &Arc<Routes>,
    ) -> Self {
        Self {
            backend: Arc::clone(backend),
            release,
            since_generation,
            routes: Arc::clone(routes),
            rows: (0..routes.count()).map(|_| OnceCell::new()).collect(),
        }
    }

    /// The rows in which anything was counted.
    pub(crate) fn rows(&self, now: Instant) -> Vec<CountRow> {
        let rows = self.rows.iter().enumerate().filter_map(|(index, row)| Some((index, row.get()?)));
        rows.map(|(index, row)| CountRow {
            backend: self.backend.to_string(),
            release: self.release.as_deref().map(str::to_owned),
            route: self.routes.name(index).to_owned(),
            since_generation: self.since_generation,
            ..row.read(now)
        })
        .filter(|row| !row.is_empty())
        .collect()
    }

    fn row(&self, route: usize) -> &RouteTally {
        // A request that was routed by other templates is counted under the last row, which always is there.
        self.rows[route.min(self.rows.len() - 1)].get_or_init(Box::default)
    }
}

impl Default for RouteTally {
    fn default() -> Self {
        Self {
            answers: Default::default(),
            failed: Cell::default(),
            broken: Cell::default(),
            cancelled: Cell::default(),
            moved: Cell::default(),
            bytes: Cell::default(),
            latency: [const { Cell::new(0) }; LATENCY_BUCKETS],
            waiting: RefCell::default(),
        }
    }
}

impl RouteTally {
    fn read(&self, now: Instant) -> CountRow {
        let waiting = self.waiting.borrow();
        let mut ages = BTreeMap::new();
        for since in waiting.since.iter().flatten() {
            *ages.entry(latency_bucket(micros(now.saturating_duration_since(*since)))).or_default() += 1;
        }
        let answers = self.answers.each_ref().map(Cell::get);
        let latency = self.latency.iter().map(Cell::get).enumerate().filter(|(_, count)| *count > 0);
        CountRow {
            requests: answers.iter().sum::<u64>() + self.failed.get(),
            answers,
            failed: self.failed.get(),
            broken: self.broken.get(),
            cancelled: self.cancelled.get(),
            moved: self.moved.get(),
            bytes: self.bytes.get(),
            in_flight: (waiting.since.len() - waiting.free.len()) as u64,
            in_flight_ages: ages.into_iter().collect(),
            latency: latency.collect(),
            ..CountRow::default()
        }
    }
}

impl Waiting {
    fn begin(&mut self, now: Instant) -> usize {
        match self.free.pop() {
            Some(place) => {
                self.since[place] = Some(now);
                place
            }
            None => {
                self.since.push(Some(now));
                self.since.len() - 1
            }
        }
    }

    fn end(&mut self, place: usize) -> Option<Instant> {
        self.free.push(place);
        self.since[place].take()
    }
}

/// A request that is counted at a backend. Dropped before an answer, it was cancelled.
#[derive(Debug)]
pub(crate) struct Counted {
    tally: Rc<Tally>,
    route: usize,
    /// Its place among those that wait; `None` when it waits no more.
    waiting: Option<usize>,
    status: u16,
}

impl Counted {
    pub(crate) fn begin(tally: Rc<Tally>, route: usize) -> Self {
        let place = tally.row(route).waiting.borrow_mut().begin(Instant::now());
        Self { tally, route, waiting: Some(place), status: 0 }
    }

    /// The head of the answer came.
    pub(crate) fn answered(&mut self, status: u16) {
        self.status = status;
        self.waited();
        let class = usize::from(status / 100).clamp(1, 5) - 1;
        add(&self.row().answers[class], 1);
    }

    /// There will be no answer, and that is the backend's fault.
    pub(crate) fn failed(&mut self) {
        self.waited();
        add(&self.row().failed, 1);
    }

    /// The answer broke off.
    pub(crate) fn broke_off(&self) {
        if self.status < 500 {
            add(&self.row().broken, 1);
        }
    }

    /// It could not be delivered and goes elsewhere.
    pub(crate) fn moved(mut self) {
        self.end_wait();
        add(&self.row().moved, 1);
    }

    /// Body bytes were passed on.
    pub(crate) fn passed_on(&self, bytes: u64) {
        add(&self.row().bytes, bytes);
    }

    fn waited(&mut self) {
        if let Some(since) = self.end_wait() {
            add(&self.row().latency[latency_bucket(micros(since.elapsed()))], 1);
        }
    }

    fn end_wait(&mut self) -> Option<Instant> {
        let place = self.waiting.take()?;
        self.row().waiting.borrow_mut().end(place)
    }

    fn row(&self) -> &RouteTally {
        self.tally.row(self.route)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.end_wait().is_some() {
            add(&self.row().cancelled, 1);
        }
    }
}

fn add(count: &Cell<u64>, more: u64) {
    count.set(count.get().wrapping_add(more));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_end_of_a_request_is_counted_once() {
        let routes = Arc::new(Routes::new(&["/a".to_owned()]).unwrap());
        let tally = Rc::new(Tally::new(&"web1".into(), Some("v2".into()), 7, &routes));
        let begin = || Counted::begin(Rc::clone(&tally), 0);
        for status in [200, 204, 302, 404, 500, 599, 101] {
            let mut counted = begin();
            counted.answered(status);
            counted.passed_on(10);
        }
        let mut broken = begin();
        broken.answered(200);
        broken.broke_off();
        let mut bad_already = begin();
        bad_already.answered(503);
        bad_already.broke_off();
        begin().failed();
        begin().moved();
        drop(begin());
        let waiting = begin();
        let now = Instant::now() + Duration::from_secs(5);
        let rows = tally.rows(now);
        let [row] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!(
            (row.backend.as_str(), row.release.as_deref(), row.route.as_str(), row.since_generation),
            ("web1", Some("v2"), "/a", 7)
        );
        assert_eq!((row.requests, row.answers), (10, [1, 3, 1, 1, 3]));
        assert_eq!((row.failed, row.broken, row.cancelled, row.moved), (1, 1, 1, 1));
        assert_eq!((row.bytes, row.bad()), (70, 5));
        assert_eq!(
            (row.in_flight, row.in_flight_ages.as_slice()),
            (1, &[(latency_bucket(5_000_000), 1)][..])
        );
        assert_eq!(row.latency.iter().map(|(_, count)| count).sum::<u64>(), 10);
        drop(waiting);
        let mut late = Counted::begin(Rc::clone(&tally), 99);
        late.answered(200);
        let rows = tally.rows(now);
        assert_eq!((rows[0].in_flight, rows[0].cancelled, rows[1].route.as_str()), (0, 2, "other"));
    }
}
