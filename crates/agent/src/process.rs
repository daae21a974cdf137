//! Processes as the kernel knows them: a process id alone is never trusted, since ids are used again.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use greenlight_model::Timestamp;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

/// One process, for good: its id and the clock tick since boot at which it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    pub(crate) start_ticks: u64,
}

impl Identity {
    /// The living process with this id; none when there is none or it has ended and only waits to be collected.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Stat::of(pid).filter(Stat::is_alive).map(|stat| stat.identity())
    }

    /// The calling process.
    pub(crate) fn own() -> io::Result<Self> {
        Self::of(std::process::id()).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "/proc does not show the agent's own process")
        })
    }

    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal to exactly this process; nothing happens when it is gone.
    pub(crate) fn signal(self, signal: Signal) -> io::Result<()> {
        let Some(pid) = pid_of(self.pid) else { return Ok(()) };
        let sent = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            // The descriptor holds on to the process, so looking after opening it is exact.
            Ok(process) if self.is_alive() => rustix::process::pidfd_send_signal(&process, signal),
            Ok(_) => Ok(()),
            // Before Linux 5.3 there is only the way with a gap of some microseconds.
            Err(rustix::io::Errno::NOSYS) if self.is_alive() => rustix::process::kill_process(pid, signal),
            Err(error) => Err(error),
        };
        match sent {
            Ok(()) | Err(rustix::io::Errno::SRCH | rustix::io::Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// When it was started, by the wall clock.
    pub(crate) fn started_at(self) -> io::Result<Timestamp> {
        let text = fs::read_to_string("/proc/stat")?;
        let boot_s: i64 = text
            .lines()
            .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/stat has no line `btime`"))?;
        let since_boot_ms = i64::try_from(ticks_to_ms(self.start_ticks)).unwrap_or(i64::MAX);
        Timestamp::from_millisecond(boot_s.saturating_mul(1000).saturating_add(since_boot_ms))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Its working directory.
    pub(crate) fn directory(self) -> io::Result<PathBuf> {
        fs::read_link(format!("/proc/{}/cwd", self.pid))
    }

    /// The program it runs.
    pub(crate) fn program(self) -> io::Result<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.pid))
    }
}

/// What is read of `/proc/PID/stat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) pid: u32,
    state: char,
    pub(crate) parent: u32,
    pub(crate) group: u32,
    start_ticks: u64,
    /// Processor time of it and of those of its children that it has waited for.
    pub(crate) cpu_ticks: u64,
    pub(crate) resident_pages: u64,
}

impl Stat {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        // A program may give itself a name that is not UTF-8.
        let bytes = fs::read(format!("/proc/{pid}/stat")).ok()?;
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    fn parse(text: &str) -> Option<Self> {
        // The name stands in parentheses and may itself contain parentheses and spaces.
        let (pid, _) = text.split_once(' ')?;
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        Some(Self {
            pid: pid.parse().ok()?,
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            group: fields.get(2)?.parse().ok()?,
            start_ticks: fields.get(19)?.parse().ok()?,
            cpu_ticks: fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum(),
            resident_pages: fields.get(21)?.parse().ok()?,
        })
    }

    pub(crate) fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity { pid: self.pid, start_ticks: self.start_ticks }
    }
}

/// Every living process that can be seen.
pub(crate) fn all() -> io::Result<Vec<Stat>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        // One that ends while we look is not there any more.
        found.extend(pid.and_then(Stat::of).filter(Stat::is_alive));
    }
    Ok(found)
}

/// The living members of a process group.
pub(crate) fn members_of(group: u32) -> io::Result<Vec<Identity>> {
    Ok(all()?.iter().filter(|stat| stat.group == group).map(Stat::identity).collect())
}

/// A process's command line as people read it, cut at 200 characters; its id when it has none.
pub(crate) fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text: Vec<String> = bytes
        .split(|byte| *byte == 0)
        .filter(|argument| !argument.is_empty())
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    if text.is_empty() { format!("process {pid}") } else { text.join(" ").chars().take(200).collect() }
}

/// The time since boot: nobody sets it.
pub(crate) fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The clock ticks since boot, as start times of processes are counted.
pub(crate) fn ticks_now() -> u64 {
    let duration = since_boot();
    u64::try_from(duration.as_nanos() * u128::from(ticks_per_second()) / 1_000_000_000).unwrap_or(u64::MAX)
}

/// Tells this boot of the machine from any other: start times are counted from it.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

pub(crate) fn pid_of(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

/// Clock ticks in milliseconds.
pub(crate) fn ticks_to_ms(ticks: u64) -> u64 {
    ticks.saturating_mul(1000) / ticks_per_second()
}

fn ticks_per_second() -> u64 {
    rustix::param::clock_ticks_per_second().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn names_with_parentheses_do_not_confuse() {
        let text = "42 (a) b (c) S 7 41 41 0 -1 4194560 1 0 0 0 4 3 2 1 20 0 1 0 98765 1 2 3";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.pid, stat.parent, stat.group, stat.start_ticks), (42, 7, 41, 98765));
        assert_eq!((stat.cpu_ticks, stat.resident_pages), (10, 2));
        assert_eq!(Stat::parse("42 (a"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn a_process_is_known_by_id_and_start() {
        let before = ticks_now();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap();
        assert!(identity.is_alive());
        assert!(identity.start_ticks >= before, "{} started before {before}", identity.start_ticks);
        let age = Timestamp::now().duration_since(identity.started_at().unwrap());
        assert!(age.as_secs().abs() <= 2, "{age:?}");
        let other = Identity { start_ticks: identity.start_ticks - 1, ..identity };
        assert!(!other.is_alive());
        other.signal(Signal::KILL).unwrap();
        assert!(identity.is_alive(), "a signal for another process with the same id does nothing");
        identity.signal(Signal::KILL).unwrap();
        child.wait().unwrap();
        assert!(!identity.is_alive());
        identity.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn what_ended_and_is_not_collected_is_not_alive() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = pid_of(child.id()).unwrap();
        let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), options).unwrap();
        assert_eq!(Identity::of(child.id()), None);
        child.wait().unwrap();
    }
}
