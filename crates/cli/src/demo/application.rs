//! The application that the demo deploys: it serves the files of the release it was started from. One with a number in
//! `FAULT` answers every so many requests for its page with an error: no probe sees that, only traffic does.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::args::DemoApplication;
use crate::failure::{Exit, Failure};

/// The longest line of a request that is read; the demo's own requests are far shorter.
const LINE_BYTES_MAX: usize = 8 * 1024;

pub(crate) fn run(application: &DemoApplication) -> Result<Exit, Failure> {
    let cannot =
        |what: &str, error: std::io::Error| Failure::new(Exit::Failed, format!("cannot {what}: {error}"));
    let version = std::fs::read_to_string("VERSION").map_err(|error| cannot("read VERSION", error))?;
    let page = std::fs::read_to_string("page.txt").map_err(|error| cannot("read page.txt", error))?;
    let fault = std::fs::read_to_string("FAULT").ok().and_then(|text| text.trim().parse::<u64>().ok());
    let fault = Arc::new(Fault { every: fault.filter(|every| *every > 0), asked: AtomicU64::new(0) });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, application.port))
        .map_err(|error| cannot(&format!("listen on port {}", application.port), error))?;
    for stream in listener.incoming() {
        // A client that went away before it was accepted is nobody's failure.
        let Ok(stream) = stream else { continue };
        let (version, page, fault) = (version.clone(), page.clone(), Arc::clone(&fault));
        std::thread::spawn(move || serve(stream, &version, &page, &fault));
    }
    Ok(Exit::Done)
}

/// What is wrong with a release.
struct Fault {
    /// Every so many requests for the page fail; none where nothing is wrong.
    every: Option<u64>,
    asked: AtomicU64,
}

impl Fault {
    fn strikes(&self) -> bool {
        let number = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        self.every.is_some_and(|every| number.is_multiple_of(every))
    }
}

/// Answers requests of one connection until the client closes it.
fn serve(stream: TcpStream, version: &str, page: &str, fault: &Fault) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    while let Some(path) = read_request(&mut reader) {
        let (status, body) = match path.as_str() {
            "/" if fault.strikes() => ("500 Internal Server Error", format!("{} failed\n", version.trim())),
            "/" => ("200 OK", format!("{} {page}", version.trim())),
            "/version" => ("200 OK", version.to_owned()),
            "/health" => ("200 OK", "ok\n".to_owned()),
            _ => ("404 Not Found", "no such page\n".to_owned()),
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        if writer.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// The path of the next request; none when the connection is over or what comes is no request.
fn read_request(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let first = read_line(reader)?;
    let path = first.split(' ').nth(1)?.to_owned();
    while !read_line(reader)?.is_empty() {}
    Some(path)
}

fn read_line(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut line = Vec::new();
    let mut limited = std::io::Read::take(reader, LINE_BYTES_MAX as u64);
    limited.read_until(b'\n', &mut line).ok()?;
    let line = line.strip_suffix(b"\n")?;
    Some(String::from_utf8_lossy(line).trim_end_matches('\r').to_owned())
}
