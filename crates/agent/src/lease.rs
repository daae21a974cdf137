//! What a controller lent through a socket of the host, and what takes it back when it has not been heard of for a while.
//!
//! A balancer that has no leases of its own (HAProxy) keeps a canary's share for ever. So the agent on its host is told, before the
//! share is set, what takes it back, and again and again while it is to last.
//!
//! Guarantees: what was lent goes back within its time after the controller died, its machine went dark or the way to it broke; the
//! agent lives on until then. What it does not do: outlive its own death, or the host's.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use greenlight_link::message::{LEASE_MAX, Lease};

use crate::failure::{OrHost as _, Outcome, host};
use crate::socket;

/// What is lent at once, at most: a balancer's backends.
const LENT_MAX: usize = 64;
/// How long the socket may take when it is told.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What is lent through this process, which serves one controller.
static LENT: Mutex<BTreeMap<Key, Lent>> = Mutex::new(BTreeMap::new());
/// It has changed.
static CHANGED: Condvar = Condvar::new();

/// A socket's path, and what it is about.
type Key = (String, String);

struct Lent {
    /// What takes it back.
    input: String,
    until: Instant,
}

/// Begins a lease, makes it last longer, or ends it; see `Request::Lease`.
pub(crate) fn set(path: &str, what: &str, lease: &Lease) -> Outcome<()> {
    let key = (path.to_owned(), what.to_owned());
    let until = |lasts: Duration| Instant::now() + lasts.min(LEASE_MAX);
    let mut lent = lock();
    match lease {
        Lease::End => drop(lent.remove(&key)),
        Lease::Renew { lasts } => {
            if let Some(one) = lent.get_mut(&key) {
                one.until = until(*lasts);
            }
        }
        Lease::Begin { .. } if lent.len() >= LENT_MAX && !lent.contains_key(&key) => {
            return Err(host(format!("{LENT_MAX} leases run through this agent already")));
        }
        Lease::Begin { input, lasts } => {
            let one = Lent { input: input.clone(), until: until(*lasts) };
            if lent.insert(key.clone(), one).is_none() {
                let watch = thread::Builder::new().name("lease".to_owned()).spawn(move || watch(&key));
                watch.or_host(|| "begin a lease".to_owned())?;
            }
        }
    }
    CHANGED.notify_all();
    Ok(())
}

/// Waits until everything that is lent has been given back or has lapsed.
pub(crate) fn wait() {
    let mut lent = lock();
    while !lent.is_empty() {
        lent = CHANGED.wait(lent).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Takes one back when its time is up.
fn watch(key: &Key) {
    let mut lent = lock();
    while let Some(one) = lent.get(key) {
        let left = one.until.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            (lent, _) = CHANGED.wait_timeout(lent, left).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let (input, until) = (one.input.clone(), one.until);
        drop(lent);
        // Nobody is there to be told when it fails: a controller that comes back sees how the traffic is shared out.
        drop(socket::ask(&key.0, &input, TIMEOUT));
        lent = lock();
        // Lent anew meanwhile, it goes on; whoever did that sees that it has been taken back.
        if lent.get(key).is_some_and(|one| one.until == until) {
            lent.remove(key);
            CHANGED.notify_all();
        }
    }
}

fn lock() -> MutexGuard<'static, BTreeMap<Key, Lent>> {
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::unix::net::UnixListener;

    #[test]
    fn what_nobody_renews_is_taken_back_once_and_what_is_ended_never() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let path = path.to_str().unwrap();
        let begun = Instant::now();
        let begin =
            |input: &str, ms| Lease::Begin { input: input.to_owned(), lasts: Duration::from_millis(ms) };
        set(path, "a", &begin("a back", 300)).unwrap();
        set(path, "b", &begin("b back", 3_600_000)).unwrap();
        set(path, "a", &begin("a back again", 300)).unwrap();
        set(path, "a", &Lease::Renew { lasts: Duration::from_millis(600) }).unwrap();
        set(path, "b", &Lease::End).unwrap();
        // What was on its way when the lease was ended begins none.
        set(path, "b", &Lease::Renew { lasts: Duration::from_millis(1) }).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(600), "it was renewed: {:?}", begun.elapsed());
        let mut input = String::new();
        stream.read_to_string(&mut input).unwrap();
        assert_eq!(input, "a back again");
        drop(stream);
        wait();
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "once, and b not at all");
    }
}
