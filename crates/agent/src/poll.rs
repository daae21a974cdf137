//! The one place that waits by looking again and again: for processes that are not our children, for ports, for files that
//! others append to. Nothing signals those.

use std::time::{Duration, Instant};

use crate::failure::Outcome;

/// How often a process is looked at that is to end or to begin. Reading `/proc` costs some microseconds.
pub(crate) const PROCESS_INTERVAL: Duration = Duration::from_millis(25);

/// Calls `look` until it finds something, fails, or `deadline` has passed; it looks at least once, and once more after the
/// deadline, so that a slow machine is not taken for a failure. `None`: it was not found in time.
pub(crate) fn until<T>(
    interval: Duration,
    deadline: Instant,
    mut look: impl FnMut() -> Outcome<Option<T>>,
) -> Outcome<Option<T>> {
    loop {
        let was_late = Instant::now() >= deadline;
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        if was_late {
            return Ok(None);
        }
        pause(interval.min(deadline.saturating_duration_since(Instant::now())));
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "what is polled gives no signal to wait on; this is the one place"
)]
fn pause(duration: Duration) {
    std::thread::sleep(duration);
}
