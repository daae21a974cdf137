//! What a canary's host uses, sample by sample, as guards want it: rates over a while, and counts since the canary was admitted.
//!
//! Guarantees: no rate over a time of which something is not known, and no start that was Greenlight's own counted as a restart.

use std::collections::VecDeque;

use greenlight_model::id::Instance;
use greenlight_model::sample::{HostSample, ServiceSample};
use greenlight_verdict::Sample;

/// Over how long processor time is divided by requests. Samples and counts do not come at the same moment: over so long that
/// makes a tenth at most.
const WINDOW_MS: u64 = 5_000;

/// One host, as far as one service is concerned.
#[derive(Default)]
pub(super) struct Watched {
    last: Option<HostSample>,
    /// Each process as it was last seen to run, also where it does not run now.
    processes: Option<ServiceSample>,
    /// Processor time and requests of the service since it is watched: only differences mean something.
    cpu_ms: u64,
    requests: u64,
    /// The last moments, oldest first, no longer than needed.
    window: VecDeque<Moment>,
    restarts: u64,
    /// When the last sample came, by the controller's clock.
    pub(super) sampled_ms: Option<u64>,
    /// Why the host last gave no samples.
    pub(super) failed: Option<String>,
}

#[derive(Clone, Copy)]
struct Moment {
    since_boot_ms: u64,
    cpu_ms: u64,
    requests: u64,
}

impl Watched {
    /// So many more requests were counted.
    pub(super) fn requested(&mut self, requests: u64) {
        self.requests = self.requests.saturating_add(requests);
    }

    /// What was counted is not known for a time.
    pub(super) fn miss_counts(&mut self) {
        self.window.clear();
    }

    /// The host is being changed: what it uses meanwhile, and what is started, is not its own doing.
    pub(super) fn pause(&mut self) {
        self.last = None;
        self.processes = None;
        self.window.clear();
    }

    /// Goes on where the evidence stops.
    pub(super) fn resume(&mut self, last: &Sample) {
        self.restarts = last.restarts.unwrap_or(self.restarts);
        self.sampled_ms = Some(last.at_ms);
    }

    /// Takes a sample in. `is_judged` is whether the canary is admitted: before that restarts do not count.
    pub(super) fn take(
        &mut self,
        instance: &Instance,
        now: HostSample,
        at_ms: u64,
        is_judged: bool,
    ) -> Sample {
        self.sampled_ms = Some(at_ms);
        self.failed = None;
        if self.last.as_ref().is_some_and(|last| last.since_boot_ms > now.since_boot_ms) {
            // It was booted meanwhile.
            self.pause();
        }
        let cpu_percent = self.last.as_ref().and_then(|last| now.cpu_percent_since(last));
        let cpu_seconds_per_request = now.services.get(&instance.service).and_then(|seen| {
            match &mut self.processes {
                None => self.processes = Some(seen.clone()),
                Some(known) => {
                    self.cpu_ms = self.cpu_ms.saturating_add(seen.cpu_ms_since(known));
                    if is_judged {
                        self.restarts += seen.restarts_since(known);
                    }
                    known.processes.extend(seen.processes.clone());
                }
            }
            self.per_request(now.since_boot_ms)
        });
        let memory_percent = now.memory_percent();
        self.last = Some(now);
        Sample {
            host: instance.host.to_string(),
            at_ms,
            cpu_percent: cpu_percent.map(|value| rounded(value, 100.0)),
            memory_percent: memory_percent.map(|value| rounded(value, 100.0)),
            cpu_seconds_per_request: cpu_seconds_per_request.map(|value| rounded(value, 1e9)),
            restarts: is_judged.then_some(self.restarts),
        }
    }

    /// CPU-seconds for a request over the window that ends now; none while it is not full, or without requests.
    fn per_request(&mut self, since_boot_ms: u64) -> Option<f64> {
        self.window.push_back(Moment { since_boot_ms, cpu_ms: self.cpu_ms, requests: self.requests });
        while self.window.get(1).is_some_and(|second| since_boot_ms - second.since_boot_ms >= WINDOW_MS) {
            self.window.pop_front();
        }
        let first = self.window.front().filter(|first| since_boot_ms - first.since_boot_ms >= WINDOW_MS)?;
        let requests = self.requests - first.requests;
        (requests > 0).then(|| (self.cpu_ms - first.cpu_ms) as f64 / 1000.0 / requests as f64)
    }
}

/// To so many parts of one: what is judged is then exactly what is read from the file again.
fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}
