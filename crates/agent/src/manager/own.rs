//! The agent's own supervision, for hosts with neither systemd nor supervisord: the agent's side.
//!
//! Each process has a supervisor, a detached process of its own (`supervise`), and a directory that only the agent's account may look
//! into, with its plan, its state, a lock that the supervisor holds as long as it lives, and a socket on which it takes orders.
//! Nothing here starts processes after the machine was booted: that is what the other managers are for.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use greenlight_model::id::ProcessName;
use rustix::process::Signal;

use super::{ANSWER_TIMEOUT, Live, Manager, Site};
use crate::command::{self, Outputs};
use crate::failure::{OrHost as _, Outcome, host, release};
use crate::files::{self, Lock};
use crate::plan::Plan;
use crate::poll;
use crate::process::{self, Identity};
use crate::strays;
use crate::supervise::{self, State};

/// How long a supervisor may take to write down that its process has ended: it first ends what that left behind, which takes a
/// second when it must be killed.
const SETTLING: Duration = Duration::from_secs(2);

/// Our own supervision.
pub(crate) struct Own {
    site: Site,
}

impl Own {
    pub(crate) fn new(site: Site) -> Self {
        Self { site }
    }

    fn directory(&self, process: &ProcessName) -> PathBuf {
        self.site.layout.supervised(process)
    }

    /// The state, once the supervisor has written down the end of a process that has just ended.
    fn settled(directory: &Path, mut state: State) -> Outcome<State> {
        poll::until(poll::PROCESS_INTERVAL, Instant::now() + SETTLING, || {
            let is_settled = state.child.is_none_or(Identity::is_alive) || !Self::is_supervised(directory)?;
            if is_settled {
                return Ok(Some(()));
            }
            state = supervise::read_state(directory)?.unwrap_or_else(|| state.clone());
            Ok(None)
        })?;
        Ok(state)
    }

    /// Whether a supervisor holds the process's lock.
    fn is_supervised(directory: &Path) -> Outcome<bool> {
        let path = directory.join(supervise::LOCK);
        if !path.exists() {
            return Ok(false);
        }
        Ok(Lock::try_take(&path).or_host(|| format!("look at the lock {}", path.display()))?.is_none())
    }
}

impl Manager for Own {
    fn check(&self, _processes: &[&ProcessName]) -> Outcome<()> {
        match fs::metadata(&self.site.program) {
            Ok(_) => Ok(()),
            Err(error) => Err(host(format!(
                "the agent's own program {} cannot be started again to supervise processes: {error}",
                self.site.program.display()
            ))),
        }
    }

    fn start(&self, plan: &Plan) -> Outcome<()> {
        let directory = self.directory(&plan.process);
        files::create_directory(&directory, 0o700).or_host(|| format!("create {}", directory.display()))?;
        if Self::is_supervised(&directory)? {
            return Err(host(format!(
                "process {} is already being supervised; it must be stopped first",
                plan.process
            )));
        }
        plan.create_logs()?;
        supervise::write_plan(&directory, plan)?;
        let root = self.site.layout.root();
        let text = |path: &Path| {
            path.to_str()
                .map(str::to_owned)
                .ok_or_else(|| host(format!("the path {} is not UTF-8", path.display())))
        };
        let argv = [
            text(&self.site.program)?,
            "agent".to_owned(),
            "supervise".to_owned(),
            "--root".to_owned(),
            text(root)?,
            "--process".to_owned(),
            plan.process.to_string(),
        ];
        let mut child =
            command::spawn_to_detach(&argv, &command::helper_environment(), Outputs::first_piped())
                .or_host(|| format!("start the supervisor of process {}", plan.process))?;
        let mut answer = String::new();
        if let Some(stdout) = child.stdout.take() {
            // The supervisor closes its output when it has started the process or failed, so this ends.
            stdout
                .take(64 * 1024)
                .read_to_string(&mut answer)
                .or_host(|| format!("hear from the supervisor of process {}", plan.process))?;
        }
        // It is collected when it ends; until then it lives on its own, also without this agent.
        std::thread::spawn(move || child.wait());
        match answer.strip_prefix(supervise::STARTED) {
            Some(_) => Ok(()),
            None => {
                let why = if answer.trim().is_empty() {
                    "its supervisor ended without a word"
                } else {
                    answer.trim()
                };
                Err(release(format!("process {} could not be started: {why}", plan.process)))
            }
        }
    }

    fn stop(&self, process: &ProcessName, timeout: Duration) -> Outcome<()> {
        let directory = self.directory(process);
        let Some(state) = supervise::read_state(&directory)? else { return Ok(()) };
        if Self::is_supervised(&directory)? {
            let asked = ask_to_stop(&directory, timeout + ANSWER_TIMEOUT);
            let deadline = Instant::now() + ANSWER_TIMEOUT;
            let gone = poll::until(poll::PROCESS_INTERVAL, deadline, || {
                Ok((!Self::is_supervised(&directory)?).then_some(()))
            })?;
            if gone.is_none() {
                // A supervisor that does not answer is stopped by force; its process is dealt with below.
                state.supervisor.signal(Signal::KILL).or_host(|| {
                    let trouble =
                        asked.err().map_or_else(|| "it goes on".to_owned(), |error| error.to_string());
                    format!("stop the supervisor {} of process {process} ({trouble})", state.supervisor.pid)
                })?;
            }
        }
        // Read again: the supervisor may have started the process once more before it heard.
        let Some(state) = supervise::read_state(&directory)? else { return Ok(()) };
        let known = state.child_of_this_boot()?;
        // A supervisor that was killed may have started one that it did not write down.
        let strays = strays::find(&self.site.layout, &self.site.service, process, None)?;
        for child in known.into_iter().chain(strays) {
            supervise::end(child, timeout).or_host(|| format!("stop process {process} ({})", child.pid))?;
        }
        supervise::write_state(&directory, &State { child: None, stopped: true, ..state })
    }

    fn state(&self, process: &ProcessName) -> Outcome<Live> {
        let directory = self.directory(process);
        let Some(state) = supervise::read_state(&directory)? else { return Ok(Live::Stopped) };
        if state.stopped {
            return Ok(Live::Stopped);
        }
        if state.boot != process::boot_id().or_host(|| "read the boot id".to_owned())? {
            return Ok(Live::Ended {
                why: "the machine was started anew, and nothing here starts processes then: activate the release again".to_owned(),
            });
        }
        let state = Self::settled(&directory, state)?;
        match state.child {
            Some(child) if child.is_alive() => Ok(Live::Running(child)),
            Some(_) if Self::is_supervised(&directory)? => {
                Ok(Live::Ended { why: "it has just ended".to_owned() })
            }
            _ => Ok(Live::Ended {
                why: state.ended.unwrap_or_else(|| "it is gone, and so is its supervisor".to_owned()),
            }),
        }
    }

    /// Its own record of the process is what it goes by, and nobody else's to write.
    fn written(&self, _plan: &Plan) -> Outcome<Vec<(PathBuf, String)>> {
        Ok(Vec::new())
    }

    fn remove(&self, process: &ProcessName) -> Outcome<()> {
        let directory = self.directory(process);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.or_host(|| format!("remove {}", directory.display())),
        }
    }

    /// Nothing of it is there at a boot.
    fn at_boot(&self, _argv: Option<&[String]>) -> Outcome<()> {
        Ok(())
    }
}

impl State {
    /// The process, unless it was one of an earlier boot.
    fn child_of_this_boot(&self) -> Outcome<Option<Identity>> {
        let boot = process::boot_id().or_host(|| "read the boot id".to_owned())?;
        Ok(self.child.filter(|_| self.boot == boot))
    }
}

/// Tells the supervisor to stop its process, and waits for its answer.
fn ask_to_stop(directory: &Path, timeout: Duration) -> io::Result<()> {
    // Paths of sockets are limited to some hundred bytes; through the open directory any root will do.
    let opened = fs::File::open(directory)?;
    let path = format!("/proc/self/fd/{}/{}", opened.as_raw_fd(), supervise::CONTROL);
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(supervise::STOP)?;
    let mut answer = Vec::new();
    stream.take(1024).read_to_end(&mut answer).map(|_| ())
}
