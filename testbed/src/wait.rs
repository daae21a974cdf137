//! The one place that polls.
//!
//! Whatever gives a signal is waited for by that signal: a process by its descriptor, a boot by a line on a
//! pipe. What answers over a network or a socket gives none, and is asked again here, with a stated reason and
//! a deadline, so that a failure says what was waited for and what was seen last.

use std::time::{Duration, Instant};

use crate::Error;

/// Between two looks. Short against a boot (0.3 s), long against the cost of a look (under 1 ms).
const PAUSE: Duration = Duration::from_millis(20);

/// Asks until `look` is `Ok`, at most for `deadline`. Its `Err` is what the error will show as last seen.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T, Error> {
    let start = Instant::now();
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(last) if start.elapsed() >= deadline => {
                return Err(Error::Timeout { what: what.into(), waited: deadline, last });
            }
            Err(_) => pause(),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the one helper that polls what gives no signal")]
fn pause() {
    std::thread::sleep(PAUSE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_until_it_is_so() {
        let mut looks = 0;
        let found = until("the third look", Duration::from_secs(10), || {
            looks += 1;
            if looks == 3 { Ok(looks) } else { Err(format!("look {looks}")) }
        });
        assert_eq!(found.unwrap(), 3);
    }

    #[test]
    fn says_what_it_waited_for_and_what_it_saw() {
        let error = until::<()>("a miracle", Duration::ZERO, || Err("nothing".into())).unwrap_err();
        assert_eq!(error.to_string(), "waited 0 s for a miracle; the last answer was: nothing");
    }
}
