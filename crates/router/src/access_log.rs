//! The access log: one JSON line per request, never in the way of one.
//!
//! Workers format lines into a buffer of their own and hand full buffers, or what there is at a tick, to a thread that
//! writes. When that thread is behind, buffers are dropped and their lines counted. A line holds the path without the
//! query, and no header but the request id: nothing that could be a secret.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

use crate::balance::Reason;

/// A buffer is handed over when it holds this much.
const FLUSH_BYTES: usize = 32 * 1024;
/// Buffers that wait for the writer: 64 × 32 KiB bounds the memory at 2 MiB, half a second of very heavy traffic.
const QUEUED_BUFFERS: usize = 64;
/// Longest path in a line, in bytes.
const MAX_PATH_BYTES: usize = 1024;

/// One request, as the access log shows it.
#[derive(Debug, Serialize)]
pub(crate) struct AccessLine<'a> {
    pub(crate) time: jiff::Timestamp,
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
    buffer: RefCell<Buffer>,
}

impl WorkerLog {
    pub(crate) fn new(sender: Option<LogSender>) -> Self {
        Self { sender, buffer: RefCell::default() }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.sender.is_some()
    }

    pub(crate) fn add(&self, mut line: AccessLine<'_>) {
        line.path = &line.path[..line.path.floor_char_boundary(MAX_PATH_BYTES)];
        let mut buffer = self.buffer.borrow_mut();
        let before = buffer.text.len();
        if serde_json::to_writer(&mut buffer.text, &line).is_err() {
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
