//! The one place that starts programs.
//!
//! Guarantees: argument vectors only; the environment is exactly what is given; each program leads a process group of its own,
//! which is killed whole when its time is over or its reader has gone.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use greenlight_link::message::{LINE_BYTES_MAX, Stream};
use greenlight_model::quantity::human_duration;
use rustix::process::{Signal, WaitId, WaitIdOptions};

use crate::account::Account;
use crate::failure::OUTPUT_LINES_MAX;
use crate::process;

/// Where programs are looked for when nothing else is said.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How often a running step looks whether its reader has gone.
const CANCEL_INTERVAL: Duration = Duration::from_millis(200);
/// How long output is still read after a step has ended: what it left running may hold its output open for ever.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);
/// Lines that wait for the reader; beyond it, the step waits.
const LINES_QUEUE_MAX: usize = 256;
/// Most that is kept of what a helper program prints.
const CAPTURE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A program that runs to its end.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    /// Program and arguments.
    pub(crate) argv: &'a [String],
    /// Its working directory; the agent's when absent.
    pub(crate) directory: Option<&'a Path>,
    /// Its whole environment.
    pub(crate) environment: &'a BTreeMap<String, String>,
    /// The account it runs under; the agent's when absent.
    pub(crate) account: Option<&'a Account>,
    /// How long it may take.
    pub(crate) timeout: Duration,
}

/// How a step ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// The last lines of its standard error, or of its standard output when it printed nothing else.
    pub(crate) last_lines: Vec<String>,
}

/// Why a step has no exit status.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error("`{program}` could not be started: {source}")]
    NotStarted { program: String, source: io::Error },
    #[error("waiting for `{program}` failed: {source}")]
    Wait { program: String, source: io::Error },
    #[error("`{program}` did not end within {} and was killed", human_duration(*.timeout))]
    TimedOut { program: String, timeout: Duration, last_lines: Vec<String> },
    #[error("`{program}` was killed because the controller's connection ended")]
    Disconnected { program: String },
}

impl RunError {
    /// The last lines that it printed, where it ran.
    pub(crate) fn into_last_lines(self) -> Vec<String> {
        match self {
            Self::TimedOut { last_lines, .. } => last_lines,
            Self::NotStarted { .. } | Self::Wait { .. } | Self::Disconnected { .. } => Vec::new(),
        }
    }
}

enum Heard {
    Line(Stream, String),
    Closed,
    Exited(io::Result<()>),
}

/// Runs a step, giving each line as it comes. It is killed, with all that it started in its process group, at its time-out and when
/// `cancelled` becomes true.
pub(crate) fn run(
    step: &Step<'_>,
    cancelled: &AtomicBool,
    on_line: &mut dyn FnMut(Stream, String),
) -> Result<Ended, RunError> {
    let program = step.argv.first().cloned().unwrap_or_default();
    let mut child = spawn(step.argv, step.directory, step.environment, step.account, Outputs::piped())
        .map_err(|source| RunError::NotStarted { program: program.clone(), source })?;
    let deadline = Instant::now() + step.timeout;
    let (sender, heard) = sync_channel(LINES_QUEUE_MAX);
    let mut open = 0;
    if let Some(output) = child.stdout.take() {
        read_lines(output, Stream::Stdout, sender.clone());
        open += 1;
    }
    if let Some(output) = child.stderr.take() {
        read_lines(output, Stream::Stderr, sender.clone());
        open += 1;
    }
    wait_for_exit(child.id(), sender);

    let mut last = LastLines::default();
    let mut exited = None;
    let cut = loop {
        let now = Instant::now();
        match exited {
            None if cancelled.load(Ordering::Relaxed) => {
                break Some(RunError::Disconnected { program: program.clone() });
            }
            None if now >= deadline => {
                let last_lines = last.lines();
                break Some(RunError::TimedOut {
                    program: program.clone(),
                    timeout: step.timeout,
                    last_lines,
                });
            }
            Some(at) if open == 0 || now >= at + OUTPUT_GRACE => break None,
            _ => {}
        }
        match heard.recv_timeout(
            CANCEL_INTERVAL.min(deadline.saturating_duration_since(now).max(Duration::from_millis(1))),
        ) {
            Ok(Heard::Line(stream, line)) => {
                last.push(stream, &line);
                on_line(stream, line);
            }
            Ok(Heard::Closed) => open -= 1,
            Ok(Heard::Exited(Ok(()))) => exited = Some(Instant::now()),
            Ok(Heard::Exited(Err(source))) => {
                break Some(RunError::Wait { program: program.clone(), source });
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break None,
        }
    };
    // The leader has not been collected yet, so its id still stands for its group and for no other.
    if cut.is_some() || open > 0 {
        kill_group(&child);
    }
    let status = child.wait().map_err(|source| RunError::Wait { program, source })?;
    match cut {
        Some(error) => Err(error),
        None => Ok(Ended { status, last_lines: last.lines() }),
    }
}

/// What a helper program printed and how it ended.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a helper program of the host (`systemctl`, `dpkg-query` …) with a plain environment and keeps what it prints.
pub(crate) fn capture(argv: &[&str], timeout: Duration) -> Result<Captured, RunError> {
    capture_with(argv, &helper_environment(), timeout)
}

/// As [`capture`], with the given environment.
pub(crate) fn capture_with(
    argv: &[&str],
    environment: &BTreeMap<String, String>,
    timeout: Duration,
) -> Result<Captured, RunError> {
    let argv: Vec<String> = argv.iter().map(|argument| (*argument).to_owned()).collect();
    let step = Step { argv: &argv, directory: None, environment, account: None, timeout };
    let (mut stdout, mut stderr) = (String::new(), String::new());
    let ended = run(&step, &AtomicBool::new(false), &mut |stream, line| {
        let kept = match stream {
            Stream::Stdout => &mut stdout,
            Stream::Stderr => &mut stderr,
        };
        if kept.len() + line.len() < CAPTURE_BYTES_MAX {
            kept.push_str(&line);
            kept.push('\n');
        }
    })?;
    Ok(Captured { status: ended.status, stdout, stderr })
}

/// The environment of helper programs: messages in one language, the same everywhere.
pub(crate) fn helper_environment() -> BTreeMap<String, String> {
    [("PATH", PATH), ("LC_ALL", "C")].map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// Where a program's two outputs go.
#[derive(Debug)]
pub(crate) struct Outputs {
    stdout: Stdio,
    stderr: Stdio,
}

impl Outputs {
    /// Into files.
    pub(crate) fn files(stdout: File, stderr: File) -> Self {
        Self { stdout: stdout.into(), stderr: stderr.into() }
    }

    /// The first to the caller, the second nowhere.
    pub(crate) fn first_piped() -> Self {
        Self { stdout: Stdio::piped(), stderr: Stdio::null() }
    }

    /// Both to the caller.
    pub(crate) fn piped() -> Self {
        Self { stdout: Stdio::piped(), stderr: Stdio::piped() }
    }
}

/// Starts a program in a process group of its own, without input.
pub(crate) fn spawn(
    argv: &[String],
    directory: Option<&Path>,
    environment: &BTreeMap<String, String>,
    account: Option<&Account>,
    outputs: Outputs,
) -> io::Result<Child> {
    let mut command = plain(argv, environment)?;
    command.process_group(0).stdout(outputs.stdout).stderr(outputs.stderr);
    if let Some(directory) = directory {
        command.current_dir(directory);
    }
    if let Some(account) = account {
        command.uid(account.uid).gid(account.gid);
    }
    command.spawn()
}

/// As [`spawn`], with a pipe into which its input is written.
pub(crate) fn spawn_with_input(
    argv: &[String],
    environment: &BTreeMap<String, String>,
    account: Option<&Account>,
) -> io::Result<Child> {
    let mut command = plain(argv, environment)?;
    let Outputs { stdout, stderr } = Outputs::piped();
    command.process_group(0).stdin(Stdio::piped()).stdout(stdout).stderr(stderr);
    if let Some(account) = account {
        command.uid(account.uid).gid(account.gid);
    }
    command.spawn()
}

/// Starts a program that is to leave its starter: it shares the starter's process group, which lets it begin a session of its own.
pub(crate) fn spawn_to_detach(
    argv: &[String],
    environment: &BTreeMap<String, String>,
    outputs: Outputs,
) -> io::Result<Child> {
    plain(argv, environment)?.stdout(outputs.stdout).stderr(outputs.stderr).spawn()
}

/// Kills a child's process group. The child must not have been waited for, so that its id is still its own.
pub(crate) fn kill_group(child: &Child) {
    if let Some(pid) = process::pid_of(child.id()) {
        // That the group has already gone is what was wanted.
        let _gone = rustix::process::kill_process_group(pid, Signal::KILL);
    }
}

/// Waits until a child has ended, and leaves it uncollected, so that its id cannot be given to another process meanwhile.
pub(crate) fn wait_without_collecting(pid: u32) -> io::Result<()> {
    let pid = process::pid_of(pid)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a process id"))?;
    loop {
        match rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// How a program ended, in words.
pub(crate) fn ended_how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

fn plain(argv: &[String], environment: &BTreeMap<String, String>) -> io::Result<Command> {
    let (program, arguments) = argv
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "there is no program"))?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(environment).stdin(Stdio::null());
    Ok(command)
}

fn read_lines(output: impl Read + Send + 'static, stream: Stream, sender: SyncSender<Heard>) {
    thread::spawn(move || {
        let mut lines = Lines::new(output);
        // A reader that has gone or an output that cannot be read ends it alike: the exit status still comes.
        while let Ok(Some(line)) = lines.next_line() {
            if sender.send(Heard::Line(stream, line)).is_err() {
                return;
            }
        }
        let _reader_gone = sender.send(Heard::Closed);
    });
}

fn wait_for_exit(pid: u32, sender: SyncSender<Heard>) {
    thread::spawn(move || {
        let _reader_gone = sender.send(Heard::Exited(wait_without_collecting(pid)));
    });
}

/// Cuts a stream of bytes into lines of at most [`LINE_BYTES_MAX`]; what is not UTF-8 is shown as such.
pub(crate) struct Lines<R> {
    reader: R,
    buffer: Vec<u8>,
    start: usize,
    ended: bool,
    /// The rest of a line that was cut is passed over.
    skipping: bool,
}

impl<R: Read> Lines<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, buffer: Vec::new(), start: 0, ended: false, skipping: false }
    }

    /// The next line without its end; none at the end of the stream.
    pub(crate) fn next_line(&mut self) -> io::Result<Option<String>> {
        loop {
            let rest = &self.buffer[self.start..];
            if let Some(length) = rest.iter().position(|byte| *byte == b'\n') {
                let line = text_of(&rest[..length]);
                self.start += length + 1;
                if !std::mem::take(&mut self.skipping) {
                    return Ok(Some(line));
                }
                continue;
            }
            if rest.len() >= LINE_BYTES_MAX || self.ended {
                let line = (!rest.is_empty() && !self.skipping).then(|| text_of(rest));
                self.buffer.clear();
                self.start = 0;
                if self.ended {
                    return Ok(line);
                }
                self.skipping = true;
                if line.is_some() {
                    return Ok(line);
                }
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let mut chunk = [0u8; 8 * 1024];
        loop {
            match self.reader.read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(read) => self.buffer.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            return Ok(());
        }
    }
}

fn text_of(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    String::from_utf8_lossy(&line[..line.len().min(LINE_BYTES_MAX)]).into_owned()
}

#[derive(Default)]
struct LastLines {
    stdout: VecDeque<String>,
    stderr: VecDeque<String>,
}

impl LastLines {
    fn push(&mut self, stream: Stream, line: &str) {
        let lines = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        if lines.len() == OUTPUT_LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    }

    fn lines(&self) -> Vec<String> {
        let lines = if self.stderr.is_empty() { &self.stdout } else { &self.stderr };
        lines.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn sh(script: &str) -> Vec<String> {
        ["/bin/sh", "-e", "-c", script].map(str::to_owned).into()
    }

    fn run_sh(
        script: &str,
        timeout: Duration,
        cancelled: &AtomicBool,
    ) -> (Result<Ended, RunError>, Vec<String>) {
        let mut lines = Vec::new();
        let environment = [("PATH".to_owned(), PATH.to_owned()), ("ONE".to_owned(), "1".to_owned())].into();
        let step =
            Step { argv: &sh(script), directory: None, environment: &environment, account: None, timeout };
        let ended = run(&step, cancelled, &mut |stream, line| lines.push(format!("{stream:?} {line}")));
        (ended, lines)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn lines_status_and_environment_come_through() {
        let (ended, lines) = run_sh("echo $ONE; echo oops >&2; exit 3", LONG, &AtomicBool::new(false));
        let ended = ended.unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert_eq!(ended.last_lines, ["oops"]);
        assert!(
            lines.contains(&"Stdout 1".to_owned()) && lines.contains(&"Stderr oops".to_owned()),
            "{lines:?}"
        );
        let (_, lines) = run_sh("env | cut -d= -f1 | sort", LONG, &AtomicBool::new(false));
        for inherited in ["Stdout HOME", "Stdout USER", "Stdout CARGO"] {
            assert!(!lines.contains(&inherited.to_owned()), "{inherited} came through: {lines:?}");
        }
    }

    #[test]
    fn a_step_is_killed_with_all_that_it_started() {
        // The child of the step prints its id and would live for a minute.
        let script = "sleep 60 & echo $!; wait";
        let (ended, lines) = run_sh(script, Duration::from_millis(300), &AtomicBool::new(false));
        assert!(matches!(ended, Err(RunError::TimedOut { .. })), "{ended:?}");
        check_gone(&lines);

        let cancelled = Arc::new(AtomicBool::new(false));
        let environment = BTreeMap::from([("PATH".to_owned(), PATH.to_owned())]);
        let step = Step {
            argv: &sh(script),
            directory: None,
            environment: &environment,
            account: None,
            timeout: LONG,
        };
        let mut lines = Vec::new();
        let ended = run(&step, &cancelled, &mut |_, line| {
            lines.push(format!("Stdout {line}"));
            cancelled.store(true, Ordering::Relaxed);
        });
        assert!(matches!(ended, Err(RunError::Disconnected { .. })), "{ended:?}");
        check_gone(&lines);
    }

    fn check_gone(lines: &[String]) {
        let pid: u32 = lines[0].strip_prefix("Stdout ").unwrap().parse().unwrap();
        let deadline = Instant::now() + LONG;
        let gone = crate::poll::until(crate::poll::PROCESS_INTERVAL, deadline, || {
            Ok(process::Identity::of(pid).is_none().then_some(()))
        });
        assert_eq!(gone.unwrap(), Some(()), "{} lives on", process::command_line(pid));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let argv = ["no-such-program".to_owned()];
        let step = Step {
            argv: &argv,
            directory: None,
            environment: &helper_environment(),
            account: None,
            timeout: LONG,
        };
        let error = run(&step, &AtomicBool::new(false), &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().starts_with("`no-such-program` could not be started"), "{error}");
    }

    #[test]
    fn lines_are_cut_and_decoded() {
        let long = "x".repeat(LINE_BYTES_MAX + 10_000);
        let text = format!("a\r\n\n{long}\nb\u{fc}\nlast");
        let mut bytes = text.into_bytes();
        bytes.push(0xff);
        let mut lines = Lines::new(&bytes[..]);
        let mut found = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            found.push(line);
        }
        assert_eq!(found.len(), 5);
        assert_eq!((found[0].as_str(), found[1].as_str()), ("a", ""));
        assert_eq!(found[2].len(), LINE_BYTES_MAX);
        assert_eq!((found[3].as_str(), found[4].as_str()), ("bü", "last\u{fffd}"));
    }
}
