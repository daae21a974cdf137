//! Running one build step: a shell in a process group of its own, its lines as they come, and an end that leaves nothing
//! running.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

/// Longest line that is passed on; what is longer comes as several.
const LINE_BYTES_MAX: u64 = 16 * 1024;
/// Lines between the readers and the one who shows them: a step that prints faster waits.
const LINES_WAITING_MAX: usize = 256;
/// Most bytes of a build's log; a step that prints without end does not fill the disk.
pub(crate) const LOG_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How many of the last lines an error carries.
pub(crate) const LAST_LINES: usize = 20;
/// How often the wish to cancel is looked at: it comes from a signal, which can wake nobody here.
const CANCEL_INTERVAL: Duration = Duration::from_millis(100);
/// How long a step may tidy up after SIGTERM, and how long its outputs are read after it ended, when a process that left
/// the group still holds them.
const GRACE: Duration = Duration::from_secs(5);

/// How a step ended.
pub(crate) enum Ended {
    /// By itself.
    Exited(ExitStatus),
    /// Because it was asked for.
    Cancelled,
}

/// A build's log, which stops growing at its limit.
pub(crate) struct Log {
    file: File,
    left_bytes: u64,
}

impl Log {
    pub(crate) fn new(file: File) -> Self {
        Self { file, left_bytes: LOG_BYTES_MAX }
    }

    pub(crate) fn line(&mut self, text: &str) -> io::Result<()> {
        let bytes = text.len() as u64 + 1;
        if self.left_bytes == 0 {
            return Ok(());
        }
        if bytes > self.left_bytes {
            self.left_bytes = 0;
            return writeln!(self.file, "… the rest is left out: the log has reached {LOG_BYTES_MAX} bytes");
        }
        self.left_bytes -= bytes;
        writeln!(self.file, "{text}")
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// What a step is run with.
pub(crate) struct Step<'a> {
    pub(crate) script: &'a str,
    pub(crate) directory: &'a Path,
    pub(crate) variables: &'a [(&'a str, String)],
    pub(crate) cancel: &'a AtomicBool,
}

enum News {
    Line(String),
    ReaderEnded,
    Exited,
}

/// Runs a step to its end; `on_line` gets each line of both outputs. Whatever the step started in its process group is gone
/// afterwards.
pub(crate) fn run(
    step: &Step<'_>,
    log: &mut Log,
    last: &mut VecDeque<String>,
    on_line: &mut dyn FnMut(&str),
) -> io::Result<Ended> {
    let child = Command::new("/bin/sh")
        .args(["-e", "-c", step.script])
        .current_dir(step.directory)
        .env_clear()
        .envs(step.variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let pid = Pid::from_child(&child);
    let mut group = Group { child, pid, collected: None };
    let (sender, news) = mpsc::sync_channel(LINES_WAITING_MAX);
    let outputs: [Option<Box<dyn Read + Send>>; 2] = [
        group.child.stdout.take().map(|output| Box::new(output) as _),
        group.child.stderr.take().map(|output| Box::new(output) as _),
    ];
    let mut readers = 0;
    for output in outputs.into_iter().flatten() {
        readers += 1;
        let sender = sender.clone();
        thread::spawn(move || read_lines(output, &sender));
    }
    thread::spawn(move || {
        // The dead process keeps its id until it is collected below, so that the group's id can mean no other one.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(rustix::io::Errno::INTR) = rustix::process::waitid(WaitId::Pid(pid), options) {}
        drop(sender.send(News::Exited));
    });

    let mut has_exited = false;
    let mut is_cancelled = false;
    let mut deadline = None;
    while readers > 0 || !has_exited {
        if !is_cancelled && !has_exited && step.cancel.load(Ordering::Relaxed) {
            is_cancelled = true;
            group.signal(Signal::TERM);
            deadline = Some(Instant::now() + GRACE);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            if has_exited {
                break;
            }
            group.signal(Signal::KILL);
            deadline = None;
        }
        match news.recv_timeout(CANCEL_INTERVAL) {
            Ok(News::Line(line)) => {
                log.line(&line)?;
                on_line(&line);
                if last.len() == LAST_LINES {
                    last.pop_front();
                }
                last.push_back(line);
            }
            Ok(News::ReaderEnded) => readers -= 1,
            Ok(News::Exited) => {
                has_exited = true;
                // What it left in the background would hold its outputs open, and the checkout busy.
                group.signal(Signal::KILL);
                deadline = Some(Instant::now() + GRACE);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = group.end()?;
    Ok(if is_cancelled { Ended::Cancelled } else { Ended::Exited(status) })
}

/// What an exit status means, in words.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// A step's process group: killed and collected when this is dropped, by an early return or a panic too.
struct Group {
    child: Child,
    pid: Pid,
    collected: Option<ExitStatus>,
}

impl Group {
    fn signal(&self, signal: Signal) {
        // It may be empty already, which is what is wanted.
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }

    fn end(&mut self) -> io::Result<ExitStatus> {
        // Once the shell is collected, its id may come to mean another process.
        if let Some(status) = self.collected {
            return Ok(status);
        }
        self.signal(Signal::KILL);
        let status = self.child.wait()?;
        self.collected = Some(status);
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Nobody is left to tell, and SIGKILL is not refused by a child of ours.
        drop(self.end());
    }
}

fn read_lines(output: Box<dyn Read + Send>, sender: &SyncSender<News>) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        match output.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                // Nobody listens any more when the build was given up.
                if sender.send(News::Line(text.trim_end_matches(['\n', '\r']).to_owned())).is_err() {
                    return;
                }
            }
        }
    }
    drop(sender.send(News::ReaderEnded));
}
