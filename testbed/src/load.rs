//! Requests without pause from the hub, and a count of what came back.
//!
//! Every answer counts once and no request is tried again: zero failures means that no user saw one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::histogram::Histogram;
use crate::http::{Connection, Request, Response};
use crate::{Bed, Error, network, wait};

/// Failures that a report shows in full; the rest is only counted.
const REASONS_SHOWN: usize = 10;
/// Versions told apart; a source of versions that is none would fill memory.
const VERSIONS_MAX: usize = 100;
/// Writes remembered by number, 8 MB of them.
const WRITES_MAX: usize = 1_000_000;

/// Where an answer says which version gave it.
#[derive(Debug, Clone)]
pub enum VersionSource {
    /// The body's first word.
    FirstWord,
    /// A header.
    Header(String),
    /// A field of the JSON object in the body.
    Field(String),
}

/// A load, before it is started.
#[derive(Clone)]
#[must_use]
pub struct Load {
    address: SocketAddr,
    connections: usize,
    per_second: Option<u32>,
    timeout: Duration,
    version: VersionSource,
    request: Arc<dyn Fn(u64) -> Request + Send + Sync>,
}

impl Load {
    /// GET / on four connections, as fast as they answer, the version being the body's first word.
    pub fn to(address: SocketAddr) -> Self {
        Self {
            address,
            connections: 4,
            per_second: None,
            timeout: Duration::from_secs(10),
            version: VersionSource::FirstWord,
            request: Arc::new(|_| Request::get("/")),
        }
    }

    /// How many connections are kept busy at once.
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.max(1);
        self
    }

    /// Not more than so many requests in a second, over all connections.
    pub fn per_second(mut self, requests: u32) -> Self {
        self.per_second = Some(requests.max(1));
        self
    }

    /// How long an answer may take before it counts as failed.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Where answers say their version.
    pub fn version(mut self, source: VersionSource) -> Self {
        self.version = source;
        self
    }

    /// What is asked, given the number of the request, which no two share.
    pub fn requests(mut self, request: impl Fn(u64) -> Request + Send + Sync + 'static) -> Self {
        self.request = Arc::new(request);
        self
    }

    /// Begins, in the hub of a bed.
    pub fn start(self, bed: &Bed) -> LoadHandle {
        let (tally, next) = (Arc::new(Mutex::new(Tally::default())), Arc::new(AtomicU64::new(0)));
        let workers = (0..self.connections)
            .map(|_| {
                let (stop, stopped) = channel();
                let (load, tally, next) = (self.clone(), Arc::clone(&tally), Arc::clone(&next));
                let hub = bed.hub_namespace();
                let thread = std::thread::spawn(move || {
                    network::enter(&hub)?;
                    load.work(&stopped, &next, &tally);
                    Ok(())
                });
                (stop, thread)
            })
            .collect();
        LoadHandle { tally, workers, started: Instant::now() }
    }

    /// One connection's life.
    fn work(&self, stopped: &Receiver<()>, next: &AtomicU64, tally: &Mutex<Tally>) {
        let interval = self.per_second.map(|rate| Duration::from_secs(1) * self.connections as u32 / rate);
        let (mut connection, mut due) = (None, Instant::now());
        loop {
            // With a rate this is the pace; without, it only looks. Either way it ends with the handle.
            let pause = due.saturating_duration_since(Instant::now());
            match stopped.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
            if let Some(interval) = interval {
                due = Instant::now().max(due + interval);
            }
            let number = next.fetch_add(1, Ordering::Relaxed);
            let request = (self.request)(number);
            let start = Instant::now();
            let answer = connection
                .take()
                .map_or_else(|| Connection::open(self.address, self.timeout), Ok)
                .and_then(|mut open| open.send(&request).map(|response| (open, response)));
            let elapsed = start.elapsed();
            let mut tally = lock(tally);
            match answer {
                Ok((open, response)) => {
                    connection = open.is_usable().then_some(open);
                    tally.answered(number, &request, &response, &self.version, elapsed);
                }
                Err(error) => tally.failed(number, &error.to_string()),
            }
        }
    }
}

/// One connection: what ends it by being dropped, and its thread.
type Worker = (Sender<()>, JoinHandle<Result<(), Error>>);

/// A load that runs. Dropped, it ends.
#[derive(Debug)]
pub struct LoadHandle {
    tally: Arc<Mutex<Tally>>,
    workers: Vec<Worker>,
    started: Instant,
}

impl LoadHandle {
    /// The counts until now.
    pub fn report(&self) -> LoadReport {
        lock(&self.tally).report(self.started.elapsed())
    }

    /// Waits until so many more requests have been answered or have failed.
    pub fn wait_for(&self, requests: u64, deadline: Duration) -> Result<(), Error> {
        let goal = self.report().requests + requests;
        wait::until(&format!("{requests} more requests of the load"), deadline, || {
            let now = self.report().requests;
            if now >= goal { Ok(()) } else { Err(format!("{} are missing", goal - now)) }
        })
    }

    /// Ends the load, letting each connection finish the request it is at, and returns all counts.
    pub fn stop(self) -> Result<LoadReport, Error> {
        let Self { tally, workers, started } = self;
        for (stop, thread) in workers {
            drop(stop);
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(lock(&tally).report(started.elapsed()))
    }
}

/// What came of a load.
#[derive(Debug, Clone, Serialize)]
pub struct LoadReport {
    /// All requests that ended, well or not.
    pub requests: u64,
    /// Those without an answer, or with a status of 400 or more.
    pub failed: u64,
    /// The first failures, each with the number of its request.
    pub reasons: Vec<String>,
    /// Answers by the version that gave them.
    pub versions: BTreeMap<String, u64>,
    /// All answers by their status. What is missing to `requests` got none.
    pub statuses: BTreeMap<u16, u64>,
    /// When the last request was begun that each version answered, however, in milliseconds since 1970.
    pub last_begun_ms: BTreeMap<String, u64>,
    /// The numbers of requests other than GET that succeeded.
    pub written: Vec<u64>,
    /// How long the load ran.
    pub seconds: f64,
    /// The median time to an answer, in milliseconds.
    pub median_ms: f64,
    /// The time that 99 of 100 answers did not exceed, in milliseconds.
    pub p99_ms: f64,
    /// The longest time to an answer, in milliseconds.
    pub max_ms: f64,
}

#[derive(Debug, Default)]
struct Tally {
    requests: u64,
    failed: u64,
    reasons: Vec<String>,
    versions: BTreeMap<String, u64>,
    statuses: BTreeMap<u16, u64>,
    last_begun_ms: BTreeMap<String, u64>,
    written: Vec<u64>,
    latency_us: Histogram,
}

impl Tally {
    fn answered(
        &mut self,
        number: u64,
        request: &Request,
        response: &Response,
        source: &VersionSource,
        elapsed: Duration,
    ) {
        *self.statuses.entry(response.status).or_default() += 1;
        let version = version(response, source).unwrap_or_else(|| "unknown".into());
        if self.last_begun_ms.len() < VERSIONS_MAX || self.last_begun_ms.contains_key(&version) {
            let begun =
                SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(elapsed);
            // Connections come here in another order than they began.
            let last = self.last_begun_ms.entry(version.clone()).or_default();
            *last = (begun.as_millis() as u64).max(*last);
        }
        if response.status >= 400 {
            let text = response.text();
            let start: String = text.trim().chars().take(200).collect();
            return self.failed(number, &format!("status {}: {start}", response.status));
        }
        self.requests += 1;
        self.latency_us.record(elapsed.as_micros() as u64);
        if request.is_write() && self.written.len() < WRITES_MAX {
            self.written.push(number);
        }
        if self.versions.len() < VERSIONS_MAX || self.versions.contains_key(&version) {
            *self.versions.entry(version).or_default() += 1;
        }
    }

    fn failed(&mut self, number: u64, reason: &str) {
        self.requests += 1;
        self.failed += 1;
        if self.reasons.len() < REASONS_SHOWN {
            self.reasons.push(format!("request {number}: {reason}"));
        }
    }

    fn report(&self, elapsed: Duration) -> LoadReport {
        let milliseconds = |microseconds: u64| microseconds as f64 / 1000.0;
        LoadReport {
            requests: self.requests,
            failed: self.failed,
            reasons: self.reasons.clone(),
            versions: self.versions.clone(),
            statuses: self.statuses.clone(),
            last_begun_ms: self.last_begun_ms.clone(),
            written: self.written.clone(),
            seconds: elapsed.as_secs_f64(),
            median_ms: milliseconds(self.latency_us.quantile(0.5)),
            p99_ms: milliseconds(self.latency_us.quantile(0.99)),
            max_ms: milliseconds(self.latency_us.largest()),
        }
    }
}

fn version(response: &Response, source: &VersionSource) -> Option<String> {
    match source {
        VersionSource::FirstWord => response.text().split_whitespace().next().map(str::to_owned),
        VersionSource::Header(name) => response.header(name).map(str::to_owned),
        VersionSource::Field(name) => {
            let value: serde_json::Value = serde_json::from_slice(&response.body).ok()?;
            value.get(name).map(|field| field.as_str().map_or_else(|| field.to_string(), str::to_owned))
        }
    }
}

/// A worker that panicked has told its story by then; the counts are whole after every change.
fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_a_user_would_have_seen() {
        let answer = |status: u16, body: &str| Response {
            status,
            headers: vec![("X-Version".into(), "v9".into())],
            body: body.as_bytes().to_vec(),
        };
        let field = VersionSource::Field("version".into());
        let mut tally = Tally::default();
        let (read, write) = (Request::get("/"), Request::post("/", "text/plain", ""));
        let took = Duration::from_millis(2);
        tally.answered(0, &read, &answer(200, "v1 17"), &VersionSource::FirstWord, took);
        tally.answered(1, &write, &answer(201, r#"{"version": "v1"}"#), &field, took);
        tally.answered(2, &read, &answer(200, ""), &VersionSource::Header("x-version".into()), took);
        tally.answered(3, &read, &answer(200, "no JSON"), &field, took);
        tally.answered(4, &write, &answer(503, "v7 broke"), &VersionSource::FirstWord, took);
        tally.failed(5, "reset");
        let report = tally.report(Duration::from_secs(1));
        assert_eq!((report.requests, report.failed, report.written.clone()), (6, 2, vec![1]));
        assert_eq!(report.reasons, ["request 4: status 503: v7 broke", "request 5: reset"]);
        assert_eq!(report.statuses, BTreeMap::from([(200, 3), (201, 1), (503, 1)]));
        assert!(report.last_begun_ms.contains_key("v7"), "an error's version too: {report:?}");
        let versions: Vec<_> = report.versions.iter().map(|(name, count)| (name.as_str(), *count)).collect();
        assert_eq!(versions, [("unknown", 1), ("v1", 2), ("v9", 1)]);
    }
}
