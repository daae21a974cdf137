//! Processor time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The time that this thread gave to some work: what others do on the machine meanwhile is not in it.
pub(crate) fn time<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = thread_time();
    let result = work();
    (thread_time().saturating_sub(start), result)
}

fn thread_time() -> Duration {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(spent).unwrap_or_default()
}
