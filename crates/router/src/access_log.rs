//! The access log: one line per request, or per one of so many, and never in the way of one.
//!
//! Workers format lines into a buffer of their own and hand full buffers, or what there is at a tick, to a thread that
//! writes. When that thread is behind, buffers are dropped and their lines counted. A line holds the path without the
//! query, and no header but the request id: nothing that could be a secret. Only the common log format has clients' addresses.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::Version;
use serde::{Deserialize, Serialize};

use crate::balance::Reason;
use crate::random::Random;

/// A buffer is handed over when it holds this much.
const FLUSH_BYTES: usize = 32 * 1024;
/// Buffers that wait for the writer: 64 × 32 KiB bounds the memory at 2 MiB, half a second of very heavy traffic.
const QUEUED_BUFFERS: usize = 64;
/// Longest path in a line, in bytes.
const MAX_PATH_BYTES: usize = 1024;

/// How a line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLogForm {
    /// A JSON object.
    #[default]
    Json,
    /// The common log format, with the backend, its release and what decided behind it, each in quotes, `-` where there is none.
    Common,
}

/// One request, as the access log shows it.
#[derive(Debug, Serialize)]
pub(crate) struct AccessLine<'a> {
    pub(crate) time: jiff::Timestamp,
    /// The client's address.
    #[serde(skip)]
    pub(crate) peer: &'a str,
    #[serde(skip)]
    pub(crate) version: Version,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    /// 499 when the client went away before there was an answer.
    pub(crate) status: u16,
    /// Body bytes of the answer that were passed on.
    pub(crate) bytes: u64,
    pub(crate) duration_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backend: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) release: Option<&'a str>,
    /// That release was on trial.
    #[serde(rename = "canary", skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_canary: bool,
    /// What decided that it went there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) chosen_by: Option<Reason>,
    /// How often the request was moved to another connection before this answer.
    pub(crate) retried: u32,
    pub(crate) request_id: &'a str,
    /// The answer broke off.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) incomplete: bool,
    /// The line stands for so many requests.
    #[serde(skip_serializing_if = "is_one")]
    pub(crate) one_in: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn is_one(count: &u32) -> bool {
    *count == 1
}

impl AccessLine<'_> {
    fn write_common(&self, out: &mut Vec<u8>) -> std::io::Result<()> {
        let zoned = self.time.to_zoned(jiff::tz::TimeZone::UTC);
        write!(out, "{} - - [{}] \"", self.peer, zoned.strftime("%d/%b/%Y:%H:%M:%S %z"))?;
        write_escaped(out, self.method)?;
        out.push(b' ');
        write_escaped(out, self.path)?;
        write!(out, " {:?}\" {} {}", self.version, self.status, self.bytes)?;
        let by = self.chosen_by.map(|reason| match reason {
            Reason::Weight => "weight",
            Reason::Sticky => "sticky",
            Reason::Tester => "tester",
        });
        for decided in [self.backend, self.release, by] {
            out.extend_from_slice(b" \"");
            write_escaped(out, decided.unwrap_or("-"))?;
            out.push(b'"');
        }
        Ok(())
    }
}

/// What could end a quoted field early is written as a number.
fn write_escaped(out: &mut Vec<u8>, text: &str) -> std::io::Result<()> {
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' | 0..=0x1f | 0x7f => write!(out, "\\x{byte:02x}")?,
            _ => out.push(byte),
        }
    }
    Ok(())
}

/// The writing end, shared by the workers.
#[derive(Debug, Clone)]
pub(crate) struct LogSender {
    buffers: SyncSender<Buffer>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Buffer {
    text: Vec<u8>,
    lines: u64,
}

/// Opens the log for appending and starts its writer. The thread ends when the last sender is gone.
pub(crate) fn open(path: &Path, dropped: Arc<AtomicU64>) -> std::io::Result<(LogSender, JoinHandle<()>)> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().create(true).append(true).mode(0o640).open(path)?;
    let (buffers, received) = sync_channel(QUEUED_BUFFERS);
    let lost = Arc::clone(&dropped);
    let thread = std::thread::Builder::new()
        .name("router-log".to_owned())
        .spawn(move || write_all(file, &received, &lost))?;
    Ok((LogSender { buffers, dropped }, thread))
}

fn write_all(mut file: File, received: &Receiver<Buffer>, lost: &AtomicU64) {
    while let Ok(buffer) = received.recv() {
        // A full disk must not stop the traffic; the loss shows in the read-back.
        if file.write_all(&buffer.text).is_err() {
            lost.fetch_add(buffer.lines, Relaxed);
        }
    }
}

/// The lines of one worker.
#[derive(Debug)]
pub(crate) struct WorkerLog {
    sender: Option<LogSender>,
    form: AccessLogForm,
    one_in: u32,
    buffer: RefCell<Buffer>,
}

impl WorkerLog {
    /// `one_in`: of so many requests one is logged.
    pub(crate) fn new(sender: Option<LogSender>, form: AccessLogForm, one_in: u32) -> Self {
        Self { sender, form, one_in: one_in.max(1), buffer: RefCell::default() }
    }

    /// For how many requests a line about this one stands; `None` when it is not logged.
    pub(crate) fn draw(&self, random: &Random) -> Option<u32> {
        let is_logged =
            self.sender.is_some() && (self.one_in == 1 || random.below(u64::from(self.one_in)) == 0);
        is_logged.then_some(self.one_in)
    }

    pub(crate) fn add(&self, mut line: AccessLine<'_>) {
        line.path = &line.path[..line.path.floor_char_boundary(MAX_PATH_BYTES)];
        let mut buffer = self.buffer.borrow_mut();
        let before = buffer.text.len();
        let written = match self.form {
            AccessLogForm::Json => serde_json::to_writer(&mut buffer.text, &line).map_err(Into::into),
            AccessLogForm::Common => line.write_common(&mut buffer.text),
        };
        if written.is_err() {
            // Writing to memory does not fail; were it to, half a line must not stay.
            buffer.text.truncate(before);
            return;
        }
        buffer.text.push(b'\n');
        buffer.lines += 1;
        let full = buffer.text.len() >= FLUSH_BYTES;
        drop(buffer);
        if full {
            self.flush();
        }
    }

    /// Hands over what there is, or drops and counts it when the writer is behind.
    pub(crate) fn flush(&self) {
        let Some(sender) = &self.sender else { return };
        let buffer = self.buffer.take();
        if buffer.lines == 0 {
            return;
        }
        let lines = buffer.lines;
        if sender.buffers.try_send(buffer).is_err() {
            sender.dropped.fetch_add(lines, Relaxed);
        }
    }
}

impl Drop for WorkerLog {
    /// Requests that are cut at a shutdown end last, and are logged all the same.
    fn drop(&mut self) {
        self.flush();
    }
}

/// Microseconds, saturating.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_in_the_common_log_format() {
        let line = AccessLine {
            time: "2026-02-03T04:05:06Z".parse().unwrap(),
            peer: "192.0.2.1",
            version: Version::HTTP_2,
            method: "GET",
            path: "/a\"b",
            status: 200,
            bytes: 2326,
            duration_us: 1,
            backend: Some("ol-web3"),
            release: Some("v2 \\"),
            is_canary: true,
            chosen_by: Some(Reason::Sticky),
            retried: 0,
            request_id: "1",
            incomplete: false,
            one_in: 1,
        };
        let written = |line: &AccessLine<'_>| {
            let mut text = Vec::new();
            line.write_common(&mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let head = r#"192.0.2.1 - - [03/Feb/2026:04:05:06 +0000] "GET /a\x22b HTTP/2.0" 200 2326"#;
        assert_eq!(written(&line), format!(r#"{head} "ol-web3" "v2 \x5c" "sticky""#));
        let unrouted = AccessLine { backend: None, release: None, chosen_by: None, ..line };
        assert_eq!(written(&unrouted), format!(r#"{head} "-" "-" "-""#));
    }
}
