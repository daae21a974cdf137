//! The child process that a connection is made of: `ssh`, or the agent itself.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

/// How much of a child's standard error is kept: the end of it is what explains its death.
const STDERR_BYTES_MAX: usize = 16 * 1024;
/// How long a child that was told to end (its input closed) may take before it is killed.
pub(crate) const END_GRACE: Duration = Duration::from_secs(5);
/// How long the rest of standard error is waited for after the child has ended. It may stay open for ever: a control
/// master that ssh left behind inherits it.
const STDERR_GRACE: Duration = Duration::from_millis(300);

/// A child with its three pipes.
pub(crate) struct Process {
    pub(crate) stdin: ChildStdin,
    pub(crate) stdout: BufReader<ChildStdout>,
    pub(crate) life: Life,
}

/// What remains of a child besides its input and output: its life, and what it said on standard error.
pub(crate) struct Life {
    child: Child,
    tail: Arc<Mutex<VecDeque<u8>>>,
    stderr_reader: JoinHandle<()>,
}

/// How a child ended.
pub(crate) struct Ending {
    pub(crate) status: Option<ExitStatus>,
    /// The last lines of its standard error, without control characters.
    pub(crate) stderr: Vec<String>,
}

impl Process {
    /// Starts the command in a process group of its own, so that `^C` at the terminal reaches the controller only: it
    /// decides what becomes of the hosts. The child does not outlive its handle.
    pub(crate) fn spawn(mut command: Command) -> io::Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn()?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::Error::other("a child was started without its pipes"));
        };
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let stderr_reader = tokio::spawn(keep_tail(stderr, Arc::clone(&tail)));
        Ok(Self { stdin, stdout: BufReader::new(stdout), life: Life { child, tail, stderr_reader } })
    }

    /// Closes its input, waits for it to end and kills it if it does not.
    pub(crate) async fn end(self) -> Ending {
        drop(self.stdin);
        drop(self.stdout);
        self.life.end(END_GRACE).await
    }
}

impl Life {
    /// What it said last on standard error so far, for a child that is given up before its end; with a colon before it.
    pub(crate) fn heard(&self) -> String {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        clean_lines(tail.make_contiguous()).pop().map(|line| format!(": {line}")).unwrap_or_default()
    }

    /// Waits for the child, whose input is closed, to end, and kills it if it does not within `grace`.
    pub(crate) async fn end(mut self, grace: Duration) -> Ending {
        let status = match tokio::time::timeout(grace, self.child.wait()).await {
            Ok(status) => status.ok(),
            Err(_) => match self.child.start_kill() {
                Ok(()) => self.child.wait().await.ok(),
                Err(_) => None,
            },
        };
        let _ = tokio::time::timeout(STDERR_GRACE, &mut self.stderr_reader).await;
        self.stderr_reader.abort();
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        Ending { status, stderr: clean_lines(tail.make_contiguous()) }
    }
}

impl Ending {
    /// In words: `exit code 1: its last line`.
    pub(crate) fn describe(&self) -> String {
        let how = match self.status.map(|status| (status.code(), status)) {
            Some((Some(code), _)) => format!("exit code {code}"),
            Some((None, status)) => status.to_string(),
            None => "unknown status".to_owned(),
        };
        match self.said() {
            said if said.is_empty() => how,
            said => format!("{how}: {said}"),
        }
    }

    /// The last few lines it said, as one.
    pub(crate) fn said(&self) -> String {
        /// Enough for the loader's or sudo's complaint; a whole log would hide it.
        const LINES: usize = 3;
        self.stderr[self.stderr.len().saturating_sub(LINES)..].join(" | ")
    }
}

/// Splits into lines, drops empty ones, and takes out what could steer a terminal: a host is not to write to ours.
pub(crate) fn clean_lines(bytes: &[u8]) -> Vec<String> {
    /// Longer lines are cut: they end up inside one line of an error.
    const LINE_CHARS_MAX: usize = 500;
    String::from_utf8_lossy(bytes)
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).take(LINE_CHARS_MAX).collect::<String>())
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

async fn keep_tail(mut stderr: ChildStderr, tail: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = vec![0; 4096];
    // An error while reading ends what can be known of it, as its end does.
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&buffer[..count]);
        let excess = tail.len().saturating_sub(STDERR_BYTES_MAX);
        tail.drain(..excess);
    }
}
