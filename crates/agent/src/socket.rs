//! Asking a stream socket of the host, such as HAProxy's.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use greenlight_link::message::SOCKET_OUTPUT_BYTES_MAX;
use greenlight_model::quantity::human_duration;

use crate::failure::{OrHost as _, Outcome, host, passing};

/// Longest that an answer may take, whatever is asked.
const TIMEOUT_MAX: Duration = Duration::from_secs(300);

/// Writes `input` to the socket and reads until it closes.
pub(crate) fn ask(path: &str, input: &str, timeout: Duration) -> Outcome<String> {
    let deadline = Instant::now() + timeout.min(TIMEOUT_MAX);
    let late = || passing(format!("the socket {path} did not answer within {}", human_duration(timeout)));
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => late(),
        _ => passing(format!("the socket {path} broke off: {error}")),
    };
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => host(format!("there is no socket {path} on this host")),
        io::ErrorKind::PermissionDenied => {
            host(format!("the agent's account may not use the socket {path}: add it to the socket's group, or let it be root"))
        }
        _ => passing(format!("cannot connect to the socket {path}: {error}")),
    })?;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(late()) } else { Ok(Some(left)) }
    };
    let limiting = || format!("limit the time of the socket {path}");
    stream.set_write_timeout(left()?).or_host(limiting)?;
    stream.write_all(input.as_bytes()).map_err(broken)?;
    // Some answer only when nothing more will come; others have closed already, which reading will show.
    drop(stream.shutdown(Shutdown::Write));
    let mut answer = Vec::new();
    let mut chunk = [0u8; 16 * 1024];
    loop {
        stream.set_read_timeout(left()?).or_host(limiting)?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) if answer.len() + read > SOCKET_OUTPUT_BYTES_MAX => {
                return Err(host(format!(
                    "the socket {path} answered more than {SOCKET_OUTPUT_BYTES_MAX} bytes"
                )));
            }
            Ok(read) => answer.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error)),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn check(serve: fn(UnixStream), timeout: Duration, expected: Result<&str, &str>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        let answer = ask(path.to_str().unwrap(), "show stat\n", timeout);
        match (&answer, expected) {
            (Ok(answer), Ok(expected)) => assert_eq!(answer, expected),
            (Err(error), Err(expected)) => assert!(error.message.contains(expected), "{error}"),
            _ => panic!("{answer:?}, expected {expected:?}"),
        }
        server.join().unwrap();
    }

    #[test]
    fn a_socket_is_asked_within_its_time_and_size() {
        let long = Duration::from_secs(30);
        check(
            |mut stream| {
                let mut asked = String::new();
                stream.read_to_string(&mut asked).unwrap();
                write!(stream, "asked: {asked}").unwrap();
            },
            long,
            Ok("asked: show stat\n"),
        );
        check(
            |mut stream| {
                let block = [b' '; 64 * 1024];
                while stream.write_all(&block).is_ok() {}
            },
            long,
            Err("more than"),
        );
        check(
            |mut stream| {
                stream.read_to_end(&mut Vec::new()).unwrap();
            },
            long,
            Ok(""),
        );
        // It closed without having read what was asked: that is no answer.
        check(drop, long, Err("broke off"));
        assert!(ask("/no/such/socket", "", long).unwrap_err().message.contains("there is no socket"));
    }

    #[test]
    fn silence_ends_at_the_time_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _silent = UnixListener::bind(&path).unwrap();
        let error = ask(path.to_str().unwrap(), "x", Duration::from_millis(100)).unwrap_err();
        assert!(error.message.contains("did not answer within 100ms"), "{error}");
    }
}
