//! An advisory lock of a PostgreSQL database, held while a migration runs: two projects or two environments that share a
//! database never migrate it at once, whatever tool does it.
//!
//! The lock is a session's: it is held by a `psql` that waits for input, and the server lets it go the moment that `psql` is
//! gone, however it went. The address of the database comes from a variable of the service and goes to `psql` in its
//! environment, never in its arguments.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::Child;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use greenlight_model::id::VariableName;

use crate::account::Account;
use crate::command::{self, Lines};
use crate::context::Context;
use crate::failure::{Outcome, host, passing, with_sources};

/// The number of the lock: `grnlight` in ASCII. Everybody who migrates with Greenlight takes the same one.
const KEY: i64 = 0x6772_6e6c_6967_6874;
/// How long connecting and asking may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How often it is looked whether the controller has gone.
const CANCEL_INTERVAL: Duration = Duration::from_millis(200);

/// The lock, held until this is dropped.
pub(super) struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        // Ended at once rather than asked to: it holds nothing that has to be written.
        command::kill_group(&self.0);
        let _collected = self.0.wait();
    }
}

/// Takes the lock, without waiting for who has it.
pub(super) fn hold(
    context: &Context,
    variable: &VariableName,
    variables: &BTreeMap<String, String>,
    account: Option<&Account>,
) -> Outcome<Held> {
    let address = variables.get(variable.as_str()).ok_or_else(|| {
        host(format!(
            "`lock` names the variable {variable}, which the service does not have; add it to its secrets"
        ))
    })?;
    let mut environment = connection(address)
        .map_err(|why| host(format!("the address in {variable} cannot be used for the lock: {why}")))?;
    for (name, value) in [("PATH", command::PATH), ("LC_ALL", "C"), ("PGCONNECT_TIMEOUT", "10")] {
        environment.insert(name.to_owned(), value.to_owned());
    }
    environment.insert("HOME".to_owned(), variables.get("HOME").cloned().unwrap_or_default());
    let argv = ["psql", "--no-psqlrc", "--no-password", "--quiet", "--tuples-only", "--no-align"];
    let argv = argv.map(str::to_owned);
    let mut child = command::spawn_with_input(&argv, &environment, account).map_err(|error| {
        host(format!(
            "the advisory lock is taken with psql, which could not be started: {error}; install postgresql-client, or take \
             `lock` out of the fleet file"
        ))
    })?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let held = Held(child);
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
        return Err(host("psql was started without its pipes"));
    };
    let asked = writeln!(stdin, "select pg_try_advisory_lock({KEY});").and_then(|()| stdin.flush());
    let (sender, heard) = sync_channel(1);
    let to_answer = sender.clone();
    thread::spawn(move || {
        let answer = Lines::new(stdout).next_line();
        // A lock that is not waited for any more is let go with its psql.
        let _unheard = to_answer.send(answer.map(|line| line.map(Ok)));
    });
    // Its input stays open as long as this thread has it: the session ends with it.
    thread::spawn(move || {
        let mut lines = Lines::new(stderr);
        if let Ok(Some(line)) = lines.next_line() {
            let _unheard = sender.send(Ok(Some(Err(line))));
        }
        while let Ok(Some(_)) = lines.next_line() {}
        drop(stdin);
    });
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    loop {
        if context.cancelled.load(Ordering::Relaxed) {
            return Err(passing("the controller went while the database's lock was asked for"));
        }
        match heard.recv_timeout(CANCEL_INTERVAL) {
            Ok(Ok(Some(Ok(answer)))) if answer == "t" => return Ok(held),
            Ok(Ok(Some(Ok(_)))) => {
                return Err(host(format!(
                    "another migration holds the advisory lock {KEY} of the database in {variable}; wait until it has ended"
                )));
            }
            Ok(Ok(Some(Err(said)))) => {
                return Err(host(format!(
                    "the advisory lock of the database in {variable}: {}",
                    said.trim()
                )));
            }
            Ok(Ok(None)) => {
                let why = asked.err().map_or_else(|| "psql ended".to_owned(), |error| with_sources(&error));
                return Err(host(format!("the advisory lock of the database in {variable}: {why}")));
            }
            Ok(Err(error)) => return Err(host(format!("psql cannot be read: {error}"))),
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            Err(_) => {
                return Err(host(format!(
                    "the database in {variable} did not answer within {} s",
                    ANSWER_TIMEOUT.as_secs()
                )));
            }
        }
    }
}

/// What `psql` reads from its environment, from `postgres://USER:PASSWORD@HOST:PORT/DATABASE?OPTION=VALUE`. A driver's name
/// after a `+` in the scheme, as SQLAlchemy has it, is passed over.
fn connection(address: &str) -> Result<BTreeMap<String, String>, &'static str> {
    const FORM: &str = "it is not of the form postgres://USER:PASSWORD@HOST:PORT/DATABASE";
    let (scheme, rest) = address.trim().split_once("://").ok_or(FORM)?;
    let engine = scheme.split('+').next().unwrap_or_default();
    if !matches!(engine, "postgres" | "postgresql") {
        return Err("it is not PostgreSQL's, and only PostgreSQL has this lock");
    }
    let (rest, options) = rest.split_once('?').unwrap_or((rest, ""));
    let (place, database) = rest.split_once('/').unwrap_or((rest, ""));
    let (login, place) = place.rsplit_once('@').unwrap_or(("", place));
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let (host, port) = match place.strip_prefix('[').and_then(|inside| inside.split_once(']')) {
        Some((host, port)) => (host, port.trim_start_matches(':')),
        None => place.split_once(':').unwrap_or((place, "")),
    };
    let mut found = BTreeMap::new();
    let named = [
        ("PGUSER", user),
        ("PGPASSWORD", password),
        ("PGHOST", host),
        ("PGPORT", port),
        ("PGDATABASE", database),
    ];
    for (name, value) in named.into_iter().filter(|(_, value)| !value.is_empty()) {
        found.insert(name.to_owned(), decoded(value).ok_or(FORM)?);
    }
    for (name, value) in options.split('&').filter_map(|option| option.split_once('=')) {
        let name = match name {
            "host" => "PGHOST",
            "port" => "PGPORT",
            "sslmode" => "PGSSLMODE",
            "sslrootcert" => "PGSSLROOTCERT",
            "sslcert" => "PGSSLCERT",
            "sslkey" => "PGSSLKEY",
            // What else there is concerns how the application works, not where the database is.
            _ => continue,
        };
        found.insert(name.to_owned(), decoded(value).ok_or(FORM)?);
    }
    Ok(found)
}

/// Text with its `%` sequences resolved.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let read = |address: &str| {
            let found = connection(address)?;
            let parts =
                found.iter().map(|(name, value)| format!("{}={value}", name.trim_start_matches("PG")));
            Ok(parts.collect::<Vec<_>>().join(" "))
        };
        let cases = [
            (
                "postgres://app:s%40c%2Fret@db:5433/shop",
                "DATABASE=shop HOST=db PASSWORD=s@c/ret PORT=5433 USER=app",
            ),
            (
                "postgresql+psycopg://app@db/shop?sslmode=require&pool=4",
                "DATABASE=shop HOST=db SSLMODE=require USER=app",
            ),
            ("postgresql:///shop?host=/run/postgresql", "DATABASE=shop HOST=/run/postgresql"),
            ("postgres://[::1]:5432/shop", "DATABASE=shop HOST=::1 PORT=5432"),
        ];
        for (address, expected) in cases {
            assert_eq!(read(address), Ok(expected.to_owned()), "{address}");
        }
        for bad in ["mysql://db/shop", "host=db dbname=shop", "postgres://a:%zz@db/shop"] {
            let result: Result<String, &str> = read(bad);
            assert!(result.is_err(), "{bad}");
        }
    }
}
