//! Step boundaries, where a test may end or stop this process: before and after each record, and around each request to an
//! agent or a balancer.
//!
//! What dies between two steps must leave a state that the next controller reads correctly, and the tests show it at every
//! boundary there is. The variables below are theirs alone; without them a boundary costs a look at one value.
//!
//! - `GREENLIGHT_KILL_AT=NUMBER` ends the process as `kill -9` would at the boundary with this number, counted from 1 as
//!   they are passed; `GREENLIGHT_KILL_AT=TEXT` at the first one of this name; `GREENLIGHT_KILL_AT=list` names each on
//!   standard error instead.
//! - `GREENLIGHT_STOP_AT=NUMBER` or `TEXT` stops the process there, as `^Z` would, until it is sent SIGCONT.

use std::fmt::Display;
use std::io::Write as _;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};

const KILL_AT: &str = "GREENLIGHT_KILL_AT";
const STOP_AT: &str = "GREENLIGHT_STOP_AT";
const LIST: &str = "list";

/// What the environment asks for, read once.
static WATCH: LazyLock<Option<Watch>> =
    LazyLock::new(|| Watch::new(std::env::var(KILL_AT).ok(), std::env::var(STOP_AT).ok()));

struct Watch {
    lists: bool,
    kill: Option<Place>,
    stop: Option<Place>,
    passed: AtomicU64,
    has_stopped: AtomicBool,
}

/// One boundary.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Number(u64),
    Name(String),
}

/// What is to happen at a boundary.
#[derive(Debug, PartialEq, Eq)]
enum Order {
    GoOn,
    Name(u64),
    Die(u64),
    Stop(u64),
}

/// Whether boundaries are of interest to anybody, so that their names need to be made.
pub(crate) fn are_watched() -> bool {
    WATCH.is_some()
}

/// This process passes a boundary, or does not.
pub(crate) fn pass(name: impl Display) {
    let Some(watch) = &*WATCH else { return };
    let name = name.to_string();
    let (says, signal) = match watch.judge(&name) {
        Order::GoOn => return,
        Order::Name(number) => (format!("boundary {number}: {name}"), None),
        Order::Die(number) => (format!("killed at boundary {number}: {name}"), Some(Signal::KILL)),
        Order::Stop(number) => (format!("stopped at boundary {number}: {name}"), Some(Signal::STOP)),
    };
    // Nothing depends on whether anybody hears it.
    let _ = writeln!(std::io::stderr(), "{says}");
    if let Some(signal) = signal {
        // A process may always signal itself.
        let _ = kill_process(getpid(), signal);
    }
}

impl Watch {
    fn new(kill: Option<String>, stop: Option<String>) -> Option<Self> {
        let lists = kill.as_deref() == Some(LIST);
        let (kill, stop) = (kill.filter(|_| !lists).map(Place::of), stop.map(Place::of));
        (lists || kill.is_some() || stop.is_some()).then(|| Self {
            lists,
            kill,
            stop,
            passed: AtomicU64::new(0),
            has_stopped: AtomicBool::new(false),
        })
    }

    fn judge(&self, name: &str) -> Order {
        let number = self.passed.fetch_add(1, Ordering::SeqCst) + 1;
        let is_here = |place: &Option<Place>| place.as_ref().is_some_and(|place| place.is(number, name));
        if is_here(&self.kill) {
            Order::Die(number)
        } else if is_here(&self.stop) && !self.has_stopped.swap(true, Ordering::SeqCst) {
            Order::Stop(number)
        } else if self.lists {
            Order::Name(number)
        } else {
            Order::GoOn
        }
    }
}

impl Place {
    fn of(text: String) -> Self {
        text.parse().map_or(Self::Name(text), Self::Number)
    }

    fn is(&self, number: u64, name: &str) -> bool {
        match self {
            Self::Number(wanted) => *wanted == number,
            Self::Name(wanted) => wanted == name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kill: Option<&str>, stop: Option<&str>, expected: &[Order]) {
        let watch = Watch::new(kill.map(str::to_owned), stop.map(str::to_owned)).unwrap();
        let passed = ["before a", "after a", "before a"];
        let orders: Vec<Order> = passed.into_iter().map(|name| watch.judge(name)).collect();
        assert_eq!(orders, expected, "{kill:?} {stop:?}");
    }

    #[test]
    fn a_boundary_is_found_by_number_or_name() {
        use Order::{Die, GoOn, Name, Stop};
        check(Some("list"), None, &[Name(1), Name(2), Name(3)]);
        check(Some("2"), None, &[GoOn, Die(2), GoOn]);
        check(Some("after a"), None, &[GoOn, Die(2), GoOn]);
        check(None, Some("before a"), &[Stop(1), GoOn, GoOn]);
        check(Some("list"), Some("3"), &[Name(1), Name(2), Stop(3)]);
        check(Some("3"), Some("1"), &[Stop(1), GoOn, Die(3)]);
    }

    #[test]
    fn nobody_watches_without_the_variables() {
        assert!(Watch::new(None, None).is_none());
    }
}
