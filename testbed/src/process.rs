//! A process named so that another one with the same number is never taken for it.

use std::fs;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A process id with the time it started at, in clock ticks since the machine's boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// The process id, as the machine numbers it.
    pub(crate) id: u32,
    /// The start time, in clock ticks.
    pub(crate) start: u64,
}

impl Process {
    /// The process that has this number now; `None` when there is none.
    pub(crate) fn find(id: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        Some(Self { id, start: start_time(&stat)? })
    }

    /// This process.
    pub(crate) fn current() -> Result<Self, Error> {
        let id = std::process::id();
        Self::find(id).ok_or_else(|| Error::Machine { reason: format!("/proc/{id}/stat cannot be read") })
    }

    /// Whether it runs still. A process that has ended and was not yet collected by its parent does not.
    pub(crate) fn is_alive(self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id)).unwrap_or_default();
        start_time(&stat) == Some(self.start) && !matches!(field(&stat, 0), Some("Z" | "X"))
    }

    /// Ends it at once and returns when it is gone. It is no error when it was gone already.
    pub(crate) fn kill(self) -> Result<(), Error> {
        let doing = || Error::system(format!("end process {}", self.id));
        let Some(pid) = i32::try_from(self.id).ok().and_then(Pid::from_raw) else { return Ok(()) };
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            handle => handle.map_err(|errno| doing()(errno.into()))?,
        };
        // Looked at after the handle was opened: from here on the handle and the start time name one process.
        if !self.is_alive() {
            return Ok(());
        }
        match pidfd_send_signal(&handle, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(doing()(errno.into())),
        }
        loop {
            match poll(&mut [PollFd::new(&handle, PollFlags::IN)], None) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(doing()(errno.into())),
            }
        }
    }
}

/// Field 22 of `/proc/PID/stat`.
fn start_time(stat: &str) -> Option<u64> {
    field(stat, 19)?.parse().ok()
}

/// A field after the program's name, which may itself hold spaces and brackets.
fn field(stat: &str, position: usize) -> Option<&str> {
    stat.rsplit_once(") ")?.1.split(' ').nth(position)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_mislead() {
        let stat = "7 (a) b) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(start_time(stat), Some(4242));
    }

    #[test]
    fn kills_what_it_names_and_nothing_else() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let process = Process::find(child.id()).unwrap();
        let other = Process { start: process.start + 1, ..process };
        assert!(process.is_alive() && !other.is_alive());
        other.kill().unwrap();
        assert!(process.is_alive());
        process.kill().unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
    }
}
