//! The agent's own supervision, for hosts with neither systemd nor supervisord: the supervisor's side.
//!
//! Guarantees: one supervisor per process (a lock that ends with it); the process's two outputs go to two files; it is started again
//! when it fails, ever more slowly, and given up after [`RESTARTS_MAX`] failures within [`RESTARTS_WITHIN`]; it is asked to end and then
//! killed with its whole process group. Supervisor and process survive the agent and the controller.
//! What it does not do: start anything after the machine was booted.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use greenlight_model::id::ProcessName;
use rustix::fs::Mode;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::command::{self, Outputs};
use crate::failure::{OrHost as _, Outcome, host, with_sources};
use crate::files::{self, Lock};
use crate::layout::Layout;
use crate::plan::Plan;
use crate::poll;
use crate::process::{self, Identity};

/// The lock that a supervisor holds.
pub(crate) const LOCK: &str = "lock";
/// The socket on which it takes orders.
pub(crate) const CONTROL: &str = "control";
/// The order to stop.
pub(crate) const STOP: &[u8] = b"stop\n";
/// What it prints when the process was started.
pub(crate) const STARTED: &str = "started";
const PLAN: &str = "plan.json";
const STATE: &str = "state.json";

/// So many failures within [`RESTARTS_WITHIN`], and the process is given up.
const RESTARTS_MAX: usize = 5;
/// A process that fails more rarely than this is started again for ever.
const RESTARTS_WITHIN: Duration = Duration::from_secs(120);
/// The pause before the first new start; it doubles with each failure.
const BACKOFF: Duration = Duration::from_millis(500);
/// How long what a process left behind in its group may take to end before it is killed.
const REST_GRACE: Duration = Duration::from_secs(1);
const STATE_BYTES_MAX: u64 = 256 * 1024;

/// What a supervisor knows of its process, for whoever looks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// The boot of the machine that the identities belong to.
    pub(crate) boot: String,
    pub(crate) supervisor: Identity,
    /// The process, when it was started and has not ended.
    pub(crate) child: Option<Identity>,
    /// It was asked to stop, and has.
    pub(crate) stopped: bool,
    /// How it last ended by itself.
    pub(crate) ended: Option<String>,
    /// How often it was started again.
    pub(crate) restarts: u64,
}

/// Supervises one process until it is told to stop or gives it up. This is what `greenlight agent supervise` does; the agent starts it
/// detached, and reads its first line of output: `started`, or what went wrong.
///
/// `root` is the service's directory on the host (`/srv/web`).
///
/// # Errors
/// When the process could not be started or its state could not be kept. The message was printed.
pub fn supervise(root: &Path, process: &ProcessName) -> Result<(), greenlight_link::message::AgentError> {
    let directory = Layout::new(root).supervised(process);
    let result = Supervisor::begin(&directory);
    let mut first_line = io::stdout().lock();
    let told = match &result {
        Ok(_) => writeln!(first_line, "{STARTED}"),
        Err(error) => writeln!(first_line, "{}", error.message),
    };
    // An agent that died meanwhile does not hear it, and the process is supervised all the same.
    drop(told.and_then(|()| first_line.flush()));
    drop(first_line);
    detach_outputs()?;
    result?.run()
}

struct Supervisor {
    plan: Plan,
    state: State,
    child: Child,
    events: Receiver<Event>,
    sender: Sender<Event>,
    failures: VecDeque<Instant>,
    _lock: Lock,
}

enum Event {
    Exited(io::Result<()>),
    Stop(UnixStream),
}

impl Supervisor {
    fn begin(directory: &Path) -> Outcome<Self> {
        begin_session()?;
        rustix::process::umask(Mode::from_raw_mode(0o022));
        // The socket is bound by a relative name: whole paths of sockets are limited to some hundred bytes.
        std::env::set_current_dir(directory).or_host(|| format!("enter {}", directory.display()))?;
        let here = Path::new(".");
        let lock = Lock::try_take(Path::new(LOCK)).or_host(|| "take the supervisor's lock".to_owned())?;
        let lock = lock.ok_or_else(|| host("another supervisor holds this process"))?;
        let plan = read_plan(here)?;
        let (sender, events) = channel();
        listen(sender.clone())?;
        let state = State {
            boot: process::boot_id().or_host(|| "read the boot id".to_owned())?,
            supervisor: Identity::own().or_host(|| "find the own process".to_owned())?,
            child: None,
            stopped: false,
            ended: None,
            restarts: 0,
        };
        let child = spawn(&plan)?;
        let mut supervisor =
            Self { plan, state, child, events, sender, failures: VecDeque::new(), _lock: lock };
        supervisor.watch()?;
        Ok(supervisor)
    }

    /// Notes the new child and waits for its end in a thread.
    fn watch(&mut self) -> Outcome<()> {
        let pid = self.child.id();
        self.state.child = Identity::of(pid);
        if self.state.child.is_none() {
            // It ended at once; its exit is on its way.
            self.state.ended = Some("it ended as soon as it was started".to_owned());
        }
        write_state(Path::new("."), &self.state)?;
        let sender = self.sender.clone();
        thread::spawn(move || {
            // The receiver lives as long as the supervisor.
            let _ended = sender.send(Event::Exited(command::wait_without_collecting(pid)));
        });
        Ok(())
    }

    fn run(mut self) -> Outcome<()> {
        loop {
            let stream = match self.events.recv() {
                Ok(Event::Stop(stream)) => Some(stream),
                Ok(Event::Exited(waited)) => {
                    waited.or_host(|| "wait for the process".to_owned())?;
                    match self.exited()? {
                        After::Watch => None,
                        After::GiveUp => return Ok(()),
                        After::Stop(stream) => Some(stream),
                    }
                }
                Err(error) => return Err(host(format!("the supervisor lost its events: {error}"))),
            };
            if let Some(stream) = stream {
                return self.stop(stream);
            }
        }
    }

    /// The process ended by itself: it is started again after a pause, or given up.
    fn exited(&mut self) -> Outcome<After> {
        let status = self.collect()?;
        self.state.child = None;
        if status.success() {
            self.state.ended = Some("it ended by itself with exit status 0".to_owned());
            write_state(Path::new("."), &self.state)?;
            return Ok(After::GiveUp);
        }
        let now = Instant::now();
        self.failures.retain(|at| now.duration_since(*at) < RESTARTS_WITHIN);
        self.failures.push_back(now);
        let how = command::ended_how(status);
        if self.failures.len() > RESTARTS_MAX {
            self.state.ended = Some(format!(
                "it {how}, and failed {} times within {} s: it is not started again",
                self.failures.len(),
                RESTARTS_WITHIN.as_secs()
            ));
            write_state(Path::new("."), &self.state)?;
            return Ok(After::GiveUp);
        }
        self.state.ended = Some(format!("it {how}"));
        write_state(Path::new("."), &self.state)?;
        let doublings = u32::try_from(self.failures.len() - 1).unwrap_or(u32::MAX);
        match self.events.recv_timeout(BACKOFF.saturating_mul(2u32.saturating_pow(doublings))) {
            Ok(Event::Stop(stream)) => return Ok(After::Stop(stream)),
            Ok(Event::Exited(_)) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        self.state.restarts += 1;
        self.child = match spawn(&self.plan) {
            Ok(child) => child,
            Err(error) => {
                self.state.ended =
                    Some(format!("it {how}, and could not be started again: {}", error.message));
                write_state(Path::new("."), &self.state)?;
                return Ok(After::GiveUp);
            }
        };
        self.watch()?;
        Ok(After::Watch)
    }

    /// Collects the ended child after ending what it left in its group.
    fn collect(&mut self) -> Outcome<ExitStatus> {
        end_rest_of_group(self.child.id(), REST_GRACE)
            .or_host(|| "end what the process left behind".to_owned())?;
        self.child.wait().or_host(|| "collect the process".to_owned())
    }

    fn stop(mut self, mut stream: UnixStream) -> Outcome<()> {
        if let Some(child) = self.state.child {
            end(child, self.plan.stop_timeout).or_host(|| format!("stop the process {}", child.pid))?;
            self.child.wait().or_host(|| "collect the process".to_owned())?;
        }
        self.state.child = None;
        self.state.stopped = true;
        write_state(Path::new("."), &self.state)?;
        // Who asked may have gone; it is stopped all the same.
        let _asker_gone = stream.write_all(b"stopped\n");
        Ok(())
    }
}

enum After {
    Watch,
    GiveUp,
    Stop(UnixStream),
}

fn spawn(plan: &Plan) -> Outcome<Child> {
    let outputs = Outputs::files(plan.open_log(&plan.stdout)?, plan.open_log(&plan.stderr)?);
    let environment = plan.environment()?;
    command::spawn(&plan.argv, Some(&plan.directory), &environment, plan.account.as_ref(), outputs)
        .or_host(|| format!("start `{}`", plan.argv.join(" ")))
}

/// Asks a process to end, waits, kills it, and then does the same with what is left of its group, which it leads.
pub(crate) fn end(process: Identity, timeout: Duration) -> io::Result<()> {
    process.signal(Signal::TERM)?;
    if !is_gone_within(timeout, || Ok(!process.is_alive()))? {
        process.signal(Signal::KILL)?;
    }
    if !is_gone_within(REST_GRACE * 10, || Ok(!process.is_alive()))? {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not end although it was killed"));
    }
    end_rest_of_group(process.pid, REST_GRACE)
}

/// Asks the living members of a group, whose leader has ended, to end, and kills them.
pub(crate) fn end_rest_of_group(group: u32, grace: Duration) -> io::Result<()> {
    for (signal, time) in [(Signal::TERM, grace), (Signal::KILL, grace * 10)] {
        let members = process::members_of(group)?;
        if members.is_empty() {
            return Ok(());
        }
        for member in members {
            member.signal(signal)?;
        }
        if is_gone_within(time, || Ok(process::members_of(group)?.is_empty()))? {
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "what it started does not end although it was killed"))
}

fn is_gone_within(time: Duration, mut is_gone: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
    let deadline = Instant::now() + time;
    let gone = poll::until(poll::PROCESS_INTERVAL, deadline, || {
        Ok(is_gone().or_host(|| "look at processes".to_owned())?.then_some(()))
    });
    gone.map(|gone| gone.is_some()).map_err(|error| io::Error::other(error.message))
}

/// Takes orders in a thread of its own.
fn listen(sender: Sender<Event>) -> Outcome<()> {
    files::remove_if_there(Path::new(CONTROL)).or_host(|| "remove an old control socket".to_owned())?;
    let listener = UnixListener::bind(CONTROL).or_host(|| "open the control socket".to_owned())?;
    thread::spawn(move || {
        use std::io::Read as _;
        for stream in listener.incoming().flatten() {
            let mut order = [0u8; STOP.len()];
            let mut from = &stream;
            // Nobody but the agent's account reaches the socket; one that says nothing must still not block the next.
            let heard = stream
                .set_read_timeout(Some(Duration::from_secs(5)))
                .and_then(|()| from.read_exact(&mut order));
            if heard.is_ok() && order == STOP && sender.send(Event::Stop(stream)).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// A session of its own, so that nothing which ends the agent's ends this. It fails only for one that already leads a group.
pub(crate) fn begin_session() -> Outcome<()> {
    match rustix::process::setsid() {
        Err(error) if error != rustix::io::Errno::PERM => Err(error).or_host(|| "begin a session".to_owned()),
        _ => Ok(()),
    }
}

/// Gives up the pipe to the agent, which waits for its end.
pub(crate) fn detach_outputs() -> Outcome<()> {
    let null = fs::File::options().write(true).open("/dev/null").or_host(|| "open /dev/null".to_owned())?;
    rustix::stdio::dup2_stdout(&null).or_host(|| "let go of the standard output".to_owned())?;
    rustix::stdio::dup2_stderr(&null).or_host(|| "let go of the standard error".to_owned())
}

pub(crate) fn write_plan(directory: &Path, plan: &Plan) -> Outcome<()> {
    write(&directory.join(PLAN), plan)
}

fn read_plan(directory: &Path) -> Outcome<Plan> {
    read(&directory.join(PLAN))?.ok_or_else(|| host("the supervisor has no plan"))
}

pub(crate) fn write_state(directory: &Path, state: &State) -> Outcome<()> {
    write(&directory.join(STATE), state)
}

pub(crate) fn read_state(directory: &Path) -> Outcome<Option<State>> {
    read(&directory.join(STATE))
}

fn write(path: &Path, value: &impl Serialize) -> Outcome<()> {
    let bytes = serde_json::to_vec(value).or_host(|| format!("write {} as JSON", path.display()))?;
    files::write_atomically(path, &bytes, 0o600, None).or_host(|| format!("write {}", path.display()))
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Outcome<Option<T>> {
    let bytes = files::read_if_there(path, STATE_BYTES_MAX).or_host(|| format!("read {}", path.display()))?;
    bytes
        .map(|bytes| {
            serde_json::from_slice(&bytes)
                .map_err(|error| host(format!("{} is damaged: {}", path.display(), with_sources(&error))))
        })
        .transpose()
}
