//! What a piece of work costs: processor time with cold caches, and memory.

use std::time::Duration;

use serde::Serialize;

use crate::measure::time;

/// The price of one piece of work.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Cost {
    /// Processor time of this thread; the median of several runs.
    #[serde(rename = "milliseconds", serialize_with = "as_milliseconds")]
    pub(crate) time: Duration,
    /// How often memory was asked for.
    pub(crate) allocations: u64,
    /// The most bytes that were held at a time beyond those held before.
    pub(crate) bytes_peak: u64,
}

/// More than the processor's caches hold.
const COLD_BYTES: usize = 64 << 20;
/// What a cache keeps at a time.
const CACHE_LINE_BYTES: usize = 64;

/// Makes the processor's caches forget what they hold, as they have forgotten the last decision when hosts answer seconds
/// later. Without that a small fleet would be measured in the caches and a large one in memory.
pub(crate) struct Cold(Vec<u8>);

impl Cold {
    pub(crate) fn new() -> Self {
        Self(vec![0; COLD_BYTES])
    }

    fn cool(&mut self) {
        for byte in self.0.iter_mut().step_by(CACHE_LINE_BYTES) {
            *byte = std::hint::black_box(byte.wrapping_add(1));
        }
    }
}

/// Does the work `runs` times by the processor's time, each time with cold caches, and once with its allocations counted.
pub(crate) fn cost<T>(runs: usize, cold: &mut Cold, mut work: impl FnMut() -> T) -> Cost {
    let memory = allocation_counter::measure(|| drop(work()));
    let once = |_| {
        cold.cool();
        time(&mut work).0
    };
    let mut times: Vec<Duration> = (0..runs.max(1)).map(once).collect();
    times.sort_unstable();
    Cost { time: times[times.len() / 2], allocations: memory.count_total, bytes_peak: memory.bytes_max }
}

fn as_milliseconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64() * 1e3)
}
